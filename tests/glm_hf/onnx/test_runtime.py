"""The graph against the original's numbers, and every use of it against the same use of the torch model."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import pytest
import torch
from golden import CONFIGS, TOLERANCE, golden_arrays, golden_cases
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, DynamicCache, StaticCache, pipeline

from glm_hf import GLMForBlankInfilling
from glm_hf.decoding import Decoder, Engine, fill_texts
from glm_hf.infilling_glm import pad_left, prepare_context
from glm_hf.onnx import ORTGLMForBlankInfilling

FACTS = files("glm_hf") / "evaluation" / "tasks" / "world_facts"
FOLDER = str(files("glm_hf") / "world_facts")
CASES = [(name, case) for name in CONFIGS for case in golden_cases(name)]
NEAR = 1e-4


@pytest.fixture(scope="module")
def torch_model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def texts(count: int) -> list[str]:
    """Return texts with a blank, half of them Chinese."""
    lines = [(FACTS / f"heldout.{language}.jsonl").read_text().splitlines() for language in ("en", "zh")]
    return [json.loads(line)["text"] for of_language in lines for line in of_language[: count // 2]]


def golden_inputs(name: str, case: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    arrays = golden_arrays(name)
    visible = ~arrays[f"{case}.attention_mask"]
    return visible, {
        "input_ids": arrays[f"{case}.input_ids"],
        "position_ids": arrays[f"{case}.position_ids"],
        "attention_mask": visible,
    }


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_equal_the_originals(golden_folder, exported, name, case):
    visible, inputs = golden_inputs(name, case)
    logits = exported(golden_folder(name))(**inputs).logits
    is_token = visible[:, 0].any(-1)
    assert (logits - golden_arrays(name)[f"{case}.logits"])[is_token].abs().max() < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_near_position_2000_are_those_of_fp16_angles(golden_folder, exported, name):
    """Where exact angles give something else, as they would if the optimizer took the rounding for a needless cast."""
    visible, inputs = golden_inputs(name, "long_positions")
    expected = golden_arrays(name)["long_positions.logits"]
    rounded, exact = (
        exported(golden_folder(name, **changes))(**inputs).logits for changes in ({}, {"rope_dtype": "float32"})
    )
    assert inputs["position_ids"].max() > 2000
    assert (rounded - expected).abs().max() < TOLERANCE
    assert (exact - expected).abs().max() > 100 * TOLERANCE
    of_original = golden_arrays(name)["long_positions.logits_rope_fp32"]
    assert (exact - of_original).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", ["gmask_single", "gmask_batch", "mask_infill", "mask_infill_two", "smask_end"])
@pytest.mark.parametrize("name", CONFIGS)
def test_contexts_and_positions_follow_from_ids(golden_folder, exported, name, case):
    input_ids = golden_arrays(name)[f"{case}.input_ids"]
    logits = exported(golden_folder(name))(input_ids).logits
    assert (logits - golden_arrays(name)[f"{case}.logits"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", ["left_padded", "right_padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(golden_folder, exported, name, case):
    visible, inputs = golden_inputs(name, case)
    is_token = visible[:, 0].any(-1)
    logits = exported(golden_folder(name))(inputs["input_ids"], attention_mask=is_token.long()).logits
    assert (logits - golden_arrays(name)[f"{case}.logits"])[is_token].abs().max() < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_added_to_a_cache_equal_whole_rows(golden_folder, exported, name):
    graph = exported(golden_folder(name))
    input_ids, whole = golden_arrays(name)["gmask_batch.input_ids"], golden_arrays(name)["gmask_batch.logits"]
    for start in range(int((input_ids == graph.config.sop_token_id).int().argmax(1).max()) + 1, input_ids.shape[1]):
        outputs = graph(input_ids[:, :start], use_cache=True)
        rest = graph(input_ids[:, start:], past_key_values=outputs.cache if "cache" in outputs else outputs[1])
        assert (torch.cat((outputs.logits, rest.logits), dim=1) - whole).abs().max() < TOLERANCE


def test_200_greedy_answers_equal_those_of_torch(world_facts, torch_model, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in texts(200)]
    assert len(ids) == 200
    filled, expected = (model.fill_blanks(ids, max_new_tokens=12) for model in (world_facts, torch_model))
    assert filled.sequences == expected.sequences
    assert filled.blanks == expected.blanks
    torch.testing.assert_close(torch.tensor(filled.scores), torch.tensor(expected.scores), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "do_sample": True},
        {"use_cache": False},
        {"repetition_penalty": 1.5},
        {"num_return_sequences": 3, "do_sample": True},
        {"negative_prompt_ids": torch.tensor([[25, 56, 17, 41, 12]]), "guidance_scale": 1.5},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generate_equals_torch(world_facts, torch_model, tokenizer, options):
    one = texts(8)[:1] if "negative_prompt_ids" in options else texts(8)
    encoded = tokenizer(one, padding=True, return_tensors="pt")
    results = []
    for model in (world_facts, torch_model):
        torch.manual_seed(3)
        results.append(model.generate(**encoded, max_new_tokens=8, **options))
    assert torch.equal(*results)


def test_generate_continues_a_filled_cache(world_facts, torch_model, tokenizer):
    ids = tokenizer("The capital of France is [gMASK]", return_tensors="pt").input_ids
    results = []
    for model in (world_facts, torch_model):
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, past_key_values=cache, max_new_tokens=2, min_new_tokens=2)
        results.append(model.generate(first, past_key_values=cache, max_new_tokens=4, min_new_tokens=4))
    assert torch.equal(*results)


def test_a_cache_may_be_cut_and_its_rows_chosen(world_facts, torch_model, tokenizer):
    rows = [[*prepare_context(tokenizer(text)["input_ids"], world_facts.config)] for text in texts(4)]
    input_ids, mask = pad_left([[*row, world_facts.config.sop_token_id, 5, 6, 7] for row in rows], 0)
    results = []
    for model in (world_facts, torch_model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids, attention_mask=mask, past_key_values=cache)
            cache.crop(-2)
            cache.batch_select_indices(torch.tensor([2, 0, 2]))
            logits = model(
                torch.tensor([[9], [10], [11]]), attention_mask=mask[[2, 0, 2], :-1], past_key_values=cache
            ).logits
        results.append(logits)
    assert (results[0] - results[1]).abs().max() < NEAR


@pytest.mark.parametrize("num_slots", [1, 3])
def test_the_decoder_fills_as_with_torch(world_facts, torch_model, tokenizer, num_slots):
    contexts = [prepare_context(tokenizer(text)["input_ids"], world_facts.config) for text in texts(10)]
    answers = [
        [
            [blank.ids for blank in blanks]
            for blanks in fill_texts(Decoder(Engine(model, num_slots)), list(contexts), 8)
        ]
        for model in (world_facts, torch_model)
    ]
    assert answers[0] == answers[1]


def test_new_tokens_are_written_where_the_cache_lies(world_facts):
    cache = DynamicCache(config=world_facts.config)
    ids = torch.randint(10, 200, (2, 9))
    world_facts(ids, past_key_values=cache)
    layer = cache.layers[0]
    place = layer.keys.data_ptr()
    for _ in range(5):
        world_facts(ids[:, :1], past_key_values=cache)
    assert layer.keys.data_ptr() == place
    assert layer.keys.shape[2] == 14
    assert layer.keys[:, :, 13].abs().sum() > 0


def test_threads_may_share_a_graph(world_facts, tokenizer):
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts(16)]
    expected = [world_facts.generate(one, max_new_tokens=6) for one in ids]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(
            expected, pool.map(lambda x: world_facts.generate(x, max_new_tokens=6), ids), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([0, 2]), "mask"])
def test_some_logits_equal_those_of_torch(world_facts, torch_model, kept):
    ids = torch.randint(10, 200, (2, 7))
    kept = torch.rand(2, 7) > 0.5 if kept == "mask" else kept
    with torch.no_grad():
        expected = torch_model(ids, logits_to_keep=kept).logits
    logits = world_facts(ids, logits_to_keep=kept).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < NEAR


def test_packed_rows_and_losses_equal_those_of_torch(world_facts, torch_model):
    sop, gmask = world_facts.config.sop_token_id, world_facts.config.gmask_token_id
    ids = torch.tensor([[11, 12, gmask, sop, 13, 14, 15, 16, gmask, sop, 17, 18]])
    segments = torch.tensor([[1] * 6 + [2] * 6])
    labels = torch.where(ids < 18, -100, ids)
    with torch.no_grad():
        expected = torch_model(ids, segment_ids=segments, labels=labels)
    outputs = world_facts(ids, segment_ids=segments, labels=labels)
    assert (outputs.logits - expected.logits).abs().max() < NEAR
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)


@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_the_caller(world_facts, torch_model, additive):
    ids = torch.randint(10, 200, (2, 6))
    visible = torch.rand(2, 1, 6, 6) > 0.4
    visible |= torch.eye(6, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float).min) if additive else visible
    positions = torch.arange(6).expand(2, 6)
    with torch.no_grad():
        expected = torch_model(ids, attention_mask=visible, position_ids=positions).logits
    logits = world_facts(ids, attention_mask=mask, position_ids=positions).logits
    assert (logits - expected).abs().max() < NEAR


def test_auto_classes_and_pipelines_open_the_folder(world_facts, tokenizer, tmp_path):
    world_facts.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), ORTGLMForBlankInfilling)
    prompts = ["Paris is the capital of [MASK].", "Rome is the [MASK] of [MASK]."]
    filled, expected = (pipeline("fill-mask", model=str(folder)) for folder in (tmp_path, FOLDER))
    for options in ({}, {"top_k": 1}, {"targets": ["France", "Chad"]}):
        for one, other in zip(filled(prompts, **options), expected(prompts, **options), strict=True):
            assert str(drop_scores(one)) == str(drop_scores(other))
    written, expected = (pipeline("text-generation", model=str(folder)) for folder in (tmp_path, FOLDER))
    prompt = "The capital of Peru is"
    assert written(prompt, do_sample=False) == expected(prompt, do_sample=False)


def drop_scores(results: list) -> list:
    """Return results of a pipeline without what differs in the last bits."""
    if isinstance(results, dict):
        return {name: value for name, value in results.items() if name != "score"}
    return [drop_scores(result) for result in results]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(inputs_embeds=torch.zeros(1, 2, 4)), "inputs_embeds"),
        (lambda model: model.generate(inputs_embeds=torch.zeros(1, 2, 4)), "inputs_embeds"),
        (lambda model: model(torch.tensor([[9, 8]]), output_hidden_states=True), "output_hidden_states"),
        (lambda model: model(torch.tensor([[9, 8]]), output_attentions=True), "output_attentions"),
        (lambda model: model(torch.ones(1, 600, dtype=torch.long)), "position 599 lies beyond the"),
        (lambda model: model.to("meta"), "runs on the CPU"),
        (lambda model: model.half(), "runs on the CPU"),
        (lambda model: model.double(), "runs on the CPU"),
        (lambda model: model.type(torch.float16), "runs on the CPU"),
        (lambda model: model.save_pretrained("nowhere", push_to_hub=True), "hf upload"),
        (lambda model: ORTGLMForBlankInfilling.from_pretrained(model.name_or_path, device_map=0), "device_map"),
        (lambda model: model.get_input_embeddings(), "embeddings"),
        (
            lambda model: model(torch.tensor([[9, 8]]), attention_mask=torch.full((1, 1, 2, 2), -0.5)),
            "masks that show",
        ),
        (
            lambda model: model(
                torch.tensor([[9, 8]]), past_key_values=StaticCache(config=model.config, max_cache_len=8)
            ),
            "pass a DynamicCache",
        ),
        (
            lambda model: ORTGLMForBlankInfilling.from_pretrained(model.name_or_path, dtype=torch.bfloat16),
            "computes in torch.float32",
        ),
        (lambda model: ORTGLMForBlankInfilling.from_pretrained(model.name_or_path, device_map="cuda"), "device_map"),
        (lambda model: AutoModelForCausalLM.from_pretrained(model.name_or_path, load_in_8bit=True), "load_in_8bit"),
        (
            lambda model: AutoModelForCausalLM.from_pretrained(model.name_or_path, rope_dtype="float32"),
            "rope_dtype is fixed",
        ),
    ],
)
def test_what_a_graph_cannot_do_is_an_error_of_one_line(world_facts, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(world_facts)
    assert "\n" not in str(error.value)


def test_downloads_are_those_that_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: asked.append((names, options)))
    with pytest.raises(TypeError):  # of the path of nothing
        ORTGLMForBlankInfilling.from_pretrained("owner/graph", revision="v1", cache_dir="elsewhere")
    [(names, options)] = asked
    assert names == ("owner/graph",)
    assert options["revision"] == "v1"
    assert options["cache_dir"] == "elsewhere"
    assert "model.onnx.data" in options["allow_patterns"]
    assert not [pattern for pattern in options["allow_patterns"] if pattern.endswith(".py")]


def test_torch_models_do_not_open_a_graph(world_facts):
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        GLMForBlankInfilling.from_pretrained(world_facts.name_or_path)


def test_masked_lm_scores_as_in_torch(world_facts, tokenizer):
    encoded = tokenizer(texts(6), padding=True, return_tensors="pt")
    graph = AutoModelForMaskedLM.from_pretrained(world_facts.name_or_path)
    model = AutoModelForMaskedLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**encoded).logits
    is_token = encoded["attention_mask"].bool()
    assert (graph(**encoded).logits - expected)[is_token].abs().max() < NEAR


def test_torch_and_graph_share_a_cache(world_facts, torch_model):
    ids = torch.randint(10, 200, (2, 6))
    with torch.no_grad():
        whole = torch_model(ids, use_cache=False).logits
        for first, second in ((torch_model, world_facts), (world_facts, torch_model)):
            cache = DynamicCache(config=world_facts.config)
            logits = [
                one(part, past_key_values=cache).logits for one, part in ((first, ids[:, :4]), (second, ids[:, 4:]))
            ]
            assert (torch.cat(logits, dim=1) - whole).abs().max() < NEAR


def test_a_call_that_fails_leaves_the_cache_as_it_was(world_facts, monkeypatch):
    ids = torch.randint(10, 200, (1, 6))
    cache = DynamicCache(config=world_facts.config)
    world_facts(ids, past_key_values=cache)
    session = world_facts.session

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    for wrong in (torch.tensor([[10**6]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match="input_ids must be from"):
            world_facts(wrong, past_key_values=cache)
    with pytest.raises(ValueError, match="mask must be of shape"):
        world_facts(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 1, 1, 14, dtype=torch.bool))
    with monkeypatch.context() as patch:
        patch.setattr(session, "run", fail)
        with pytest.raises(KeyboardInterrupt):
            world_facts(ids[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 6
    again = world_facts(ids[:, :1], past_key_values=cache).logits
    whole = world_facts(torch.cat((ids, ids[:, :1]), dim=1)).logits
    assert (again[:, -1] - whole[:, -1]).abs().max() < NEAR


def test_integers_of_32_bits_are_ids_too(world_facts):
    ids = torch.randint(10, 200, (2, 5))
    assert torch.equal(world_facts(ids.int()).logits, world_facts(ids).logits)


def test_training_is_refused(world_facts):
    world_facts.train()
    try:
        with pytest.raises(ValueError, match="training"):
            world_facts(torch.tensor([[9, 8]]), labels=torch.tensor([[9, 8]]))
    finally:
        world_facts.eval()
