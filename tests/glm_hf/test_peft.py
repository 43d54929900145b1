"""Adapters of PEFT give what a computation in plain torch gives, which knows neither PEFT nor the model's own code."""

import copy
import itertools
import subprocess
import sys

import peft
import pytest
import torch
from golden import golden_model
from packaging.version import Version
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from torch.nn.functional import gelu, layer_norm
from transformers.cache_utils import DynamicCache
from transformers.integrations.peft import MIN_PEFT_VERSION

from glm_hf import GLMForBlankInfilling

MODEL = golden_model("cfg1", rope_dtype="float32")
CONFIG = MODEL.config
MASK, GMASK, SOP, EOP, EOS = (
    CONFIG.mask_token_id,
    CONFIG.gmask_token_id,
    CONFIG.sop_token_id,
    CONFIG.eop_token_id,
    CONFIG.eos_token_id,
)
SHORT = [11, 12, MASK, 13, EOS, SOP, 21, 22, EOP]
LONG = [31, 32, 33, GMASK, SOP, 41, 42, EOP]
TWO_BLANKS = [14, 15, 16, MASK, 17, MASK, EOS, SOP, 23, EOP, SOP, 24, 25, EOP]
TEXTS = [SHORT, LONG, TWO_BLANKS]
P, NOISE = 4, 2e-4  # learned tokens; fp32 noise of logits whose standard deviation is 3 to 4
HEADS, HEAD_DIM = CONFIG.num_attention_heads, CONFIG.hidden_size // CONFIG.num_attention_heads

TASK = {"task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda: LoraConfig(r=4, **TASK),
    "ia3": lambda: IA3Config(**TASK),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=P, **TASK),
    "prefix_v2": lambda: PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=24, **TASK
    ),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=P, **TASK),
    "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=24, **TASK),
}
PREFIX, PROMPT = ("prefix", "prefix_v2"), ("prompt", "p_tuning")


def adapted(method: str, attn_implementation: str = "sdpa") -> PeftModel:
    """Return a model with an adapter that changes what it says."""
    base = copy.deepcopy(MODEL)
    base.set_attn_implementation(attn_implementation)
    torch.manual_seed(1)
    model = get_peft_model(base, METHODS[method]())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "ia3_" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


# The computation in plain torch


def adapted_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the weights with those of LoRA or (IA)3 put in by hand."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = {name.removeprefix("base_model.").removeprefix("model."): p for name, p in parameters.items()}
    weights = {name.replace(".base_layer", ""): p for name, p in parameters.items() if "lora_" not in name}
    for name, parameter in parameters.items():
        target = name.partition(".lora_A" if "lora_A" in name else ".ia3_l")[0]
        if "lora_A" in name:
            low_rank = parameters[name.replace("lora_A", "lora_B")] @ parameter
            weights[f"{target}.weight"] = weights[f"{target}.weight"] + low_rank * (8 / 4)  # alpha / r
        elif "ia3_l" in name and target.endswith("dense_4h_to_h"):
            weights[f"{target}.weight"] = weights[f"{target}.weight"] * parameter.view(1, -1)
        elif "ia3_l" in name:
            weights[f"{target}.weight"] = weights[f"{target}.weight"] * parameter.view(-1, 1)
            weights[f"{target}.bias"] = weights[f"{target}.bias"] * parameter.view(-1)
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def learned_prompt(model: PeftModel, method: str) -> torch.Tensor:
    """Return `(P, layers * 2 * D)` of prefix tuning or `(P, D)` of prompt tuning."""
    encoder = model.prompt_encoder["default"]
    if method in ("prefix", "prompt"):
        return encoder.embedding.weight.detach()
    return encoder(torch.arange(P)[None])[0].detach()


def layout(ids: list, num_learned: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what sees what `(L, L)` and positions of one sample, from its definition."""
    context_length = ids.index(SOP) if SOP in ids else 0
    visible = torch.tensor([[j <= i or max(i, j) < context_length for j in range(len(ids))] for i in range(len(ids))])
    blank = ids[:context_length].index(MASK) if MASK in ids[:context_length] else None
    positions = [i if i < context_length or blank is None else blank for i in range(len(ids))]
    return visible, torch.tensor(positions) + num_learned


def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    frequencies = (10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)).half().double()
    turns = torch.polar(torch.tensor(1.0).double(), positions[:, None].double() * frequencies)[:, None]  # (L, 1, K/2)
    first, second = states.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turns
    return torch.cat((turned.real, turned.imag), dim=-1).float()


def computed_logits(model: PeftModel, method: str, ids: list[int]) -> torch.Tensor:
    """Return the logits `(L, V)` of one sample."""
    weights = adapted_weights(model)
    embedded = weights["embed_tokens.weight"][torch.tensor(ids)]
    (visible, positions), prefix = layout(ids), None
    if method in PREFIX:
        visible, positions = torch.cat((torch.ones(len(ids), P, dtype=torch.bool), visible), 1), positions + P
        prefix = learned_prompt(model, method).view(P, CONFIG.num_hidden_layers, 2, HEADS, HEAD_DIM)
    elif method in PROMPT:
        embedded = torch.cat((learned_prompt(model, method), embedded))
        visible, positions = layout([None] * P + ids)
    return network(weights, embedded, visible, positions, prefix)[-len(ids) :]


def network(
    weights: dict, states: torch.Tensor, visible: torch.Tensor, positions: torch.Tensor, prefix: torch.Tensor | None
) -> torch.Tensor:
    length, hidden = states.shape
    alpha = (2 * CONFIG.num_hidden_layers) ** 0.5

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (hidden,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for layer in range(CONFIG.num_hidden_layers):
        name = f"layers.{layer}"
        states = norm(f"{name}.input_layernorm", states)
        qkv = linear(f"{name}.attention.query_key_value", states).view(length, HEADS, 3, HEAD_DIM)
        query, key, value = rotate(qkv[:, :, 0], positions), rotate(qkv[:, :, 1], positions), qkv[:, :, 2]
        if prefix is not None:
            key, value = torch.cat((prefix[:, layer, 0], key)), torch.cat((prefix[:, layer, 1], value))
        scores = torch.einsum("qhk,shk->hqs", query, key) / HEAD_DIM**0.5
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqs,shk->qhk", probabilities, value).reshape(length, hidden)
        states = norm(f"{name}.post_attention_layernorm", linear(f"{name}.attention.dense", mixed) + alpha * states)
        up, gate = linear(f"{name}.mlp.dense_h_to_4h", states).chunk(2, dim=-1)
        states = linear(f"{name}.mlp.dense_4h_to_h", up * gelu(gate)) + alpha * states
    return norm("norm", states) @ weights["embed_tokens.weight"].T


@torch.no_grad()
def decoded(model: PeftModel, method: str, ids: list[int], num_new: int, banned: tuple[int, ...] = ()) -> list[int]:
    """Return the most likely continuation, each token from a computation of its own."""
    row = list(ids)
    for _ in range(num_new):
        logits = computed_logits(model, method, row)[-1]
        logits[list(banned)] = -torch.inf
        row.append(int(logits.argmax()))
        if row[-1] in (EOP, EOS):
            break
    return row[len(ids) :]


def padded(rows: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    blank = [[0] * (length - len(row)) for row in rows]
    pair = [(b, r) if side == "left" else (r, b) for b, r in zip(blank, rows, strict=True)]
    mask = [[int(part is row) for part in parts for _ in part] for parts, row in zip(pair, rows, strict=True)]
    return torch.tensor([[*first, *second] for first, second in pair]), torch.tensor(mask)


# Forward


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("method", METHODS)
def test_forward_equals_the_computation(method, attn_implementation):
    model = adapted(method, attn_implementation)
    for text in TEXTS:
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -len(text) :]
            plain = MODEL(torch.tensor([text])).logits[0]
        torch.testing.assert_close(logits, computed_logits(model, method, text), atol=NOISE, rtol=0)
        assert (logits - plain).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_padding_changes_nothing(method, side):
    model = adapted(method)
    ids, mask = padded(TEXTS, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    for row, text in enumerate(TEXTS):
        expected = computed_logits(model, method, text)
        torch.testing.assert_close(logits[row][mask[row].bool()], expected, atol=NOISE, rtol=0)


@pytest.mark.parametrize("gives_positions", [False, True])
@pytest.mark.parametrize(
    ("method", "attn_implementation"),
    [
        *itertools.product(("lora", "prefix", "prefix_v2"), ("eager", "sdpa")),
        ("prefix", "flex_attention"),
    ],
)
def test_packed_samples_each_see_the_prefix_and_themselves(method, attn_implementation, gives_positions):
    model = adapted(method, attn_implementation)
    row = [*SHORT, *TWO_BLANKS, *LONG, 0, 0]
    segments = [1] * len(SHORT) + [2] * len(TWO_BLANKS) + [3] * len(LONG) + [0, 0]
    targets = [token if token in (21, 22, 23, 24, 41, EOP) else -100 for token in [*row[1:], -100]]
    options = {}
    if gives_positions:
        positions = [layout(text)[1] for text in (SHORT, TWO_BLANKS, LONG)]
        options["position_ids"] = torch.cat([*positions, torch.tensor([0, 0])])[None]
    with torch.no_grad():
        outputs = model(
            torch.tensor([row]),
            segment_ids=torch.tensor([segments]),
            shift_labels=torch.tensor([targets]),
            **options,
        )
    expected = torch.cat([computed_logits(model, method, text) for text in (SHORT, TWO_BLANKS, LONG)])
    torch.testing.assert_close(outputs.logits[0, :-2], expected, atol=NOISE, rtol=0)
    loss = nn.functional.cross_entropy(expected, torch.tensor(targets[:-2]), ignore_index=-100)
    torch.testing.assert_close(outputs.loss, loss, atol=NOISE, rtol=0)


# Training


@pytest.mark.parametrize("method", METHODS)
def test_training_reaches_the_adapter_only_and_lowers_the_loss(method):
    model = adapted(method).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(before) >= sum(1 for _ in MODEL.parameters())
    ids, mask = padded(TEXTS)
    labels = torch.where(mask.bool() & (ids > 20) & (ids < 50), ids, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if method not in PROMPT:
        logits = [computed_logits(adapted(method), method, text)[:-1] for text in TEXTS]
        targets = torch.cat([torch.tensor([t if 20 < t < 50 else -100 for t in text[1:]]) for text in TEXTS])
        first = nn.functional.cross_entropy(torch.cat(logits), targets)
        assert losses[0] == pytest.approx(first.item(), abs=NOISE)
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(parameter.grad is not None for parameter in trained)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


# Saving and merging


@pytest.mark.parametrize("method", METHODS)
def test_saved_adapter_says_the_same(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(MODEL), tmp_path).eval()
    ids, mask = padded(TEXTS, "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(again(ids, attention_mask=mask).logits, expected, atol=1e-5, rtol=0)
    prompt = torch.tensor([SHORT[:6]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(again.generate(input_ids=prompt, **options), model.generate(input_ids=prompt, **options))


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_merged_model_says_the_same(method, tmp_path):
    model = adapted(method)
    ids, mask = padded(TEXTS)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    merged = model.merge_and_unload()
    assert type(merged) is GLMForBlankInfilling
    merged.save_pretrained(tmp_path)
    for plain in (merged, GLMForBlankInfilling.from_pretrained(tmp_path)):
        with torch.no_grad():
            torch.testing.assert_close(plain(ids, attention_mask=mask).logits, expected, atol=NOISE, rtol=0)


# Generation


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_generated_tokens_are_the_computed_ones(method, options):
    model = adapted(method)
    starts = [text[: text.index(SOP) + 1] for text in TEXTS]
    ids, mask = padded(starts, "left")
    generated = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **options
    )
    for row, start in enumerate(starts):
        expected = decoded(model, method, start, 8)
        assert generated[row, ids.shape[1] :].tolist()[: len(expected)] == expected


@pytest.mark.parametrize("method", METHODS)
def test_filled_blanks_heed_the_adapter(method):
    model = adapted(method)
    texts = [[11, 12, MASK, 13], [31, 32, 33], [14, 15, MASK, 17, MASK]]
    filled = model.fill_blanks(texts, max_new_tokens=5)
    banned = (MASK, GMASK, CONFIG.smask_token_id, SOP)
    for text, blanks, scores in zip(texts, filled.blanks, filled.scores, strict=True):
        context = text if text[-1] == MASK else [*text, EOS] if MASK in text else [*text, GMASK]
        for blank, score in zip(blanks, scores, strict=True):
            start = [*context, SOP]
            expected = decoded(model, method, start, 5, banned)
            log_probs = computed_logits(model, method, [*start, *expected]).log_softmax(-1)
            of_tokens = [log_probs[len(start) - 1 + index, token] for index, token in enumerate(expected)]
            assert blank == [token for token in expected if token not in (EOP, EOS)]
            assert score == pytest.approx(float(sum(of_tokens)), abs=5 * NOISE)
            index = context.index(MASK if MASK in context else GMASK)
            context = [*context[:index], *blank, *context[index + 1 :]]
            if MASK not in context and EOP in expected:
                closed = model.score_blanks([[*start[:-1]]], [blank])
                assert closed[0] == pytest.approx(score, abs=5 * NOISE)
    with model.disable_adapter():
        assert model.fill_blanks(texts, max_new_tokens=5).blanks == MODEL.fill_blanks(texts, max_new_tokens=5).blanks


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_beams_do_not_depend_on_the_cache(method):
    model = adapted(method)
    ids, mask = padded([text[: text.index(SOP) + 1] for text in TEXTS], "left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3}
    cached = model.generate(input_ids=ids, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_learned_tokens_count_in_the_context_window(method):
    base = copy.deepcopy(MODEL)
    base.config.max_position_embeddings = 16
    model = get_peft_model(base, METHODS[method]()).eval()
    text = [11, 12, 13, 14, 15, 16, MASK]  # 8 tokens with sop
    assert len(base.fill_blanks([text], max_new_tokens=20, min_new_tokens=8).blanks[0][0]) == 8
    assert len(model.fill_blanks([text], max_new_tokens=20, min_new_tokens=4).blanks[0][0]) == 16 - 8 - P
    with model.disable_adapter():
        assert len(model.fill_blanks([text], max_new_tokens=20, min_new_tokens=8).blanks[0][0]) == 8


# Where adapters go


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LoraConfig(), {"query_key_value"}),
        (IA3Config(), {"query_key_value", "dense_4h_to_h"}),
        (AdaLoraConfig(total_step=10), {"query_key_value"}),
        (peft.LoHaConfig(), {"query_key_value"}),
        (peft.HiraConfig(), {"query_key_value"}),
        (peft.VBLoRAConfig(vector_length=8), {"query_key_value"}),
        (peft.FourierFTConfig(n_frequency=10), {"query_key_value"}),
        (LNTuningConfig(), {"input_layernorm", "post_attention_layernorm", "norm"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_default_targets_are_known(config, targets):
    model = get_peft_model(copy.deepcopy(MODEL), config)
    assert model.peft_config["default"].target_modules == targets
    found = {name.split(".")[-1] for name in model.base_model.targeted_module_names}
    assert found == targets
    if isinstance(config, IA3Config):
        assert model.peft_config["default"].feedforward_modules == {"dense_4h_to_h"}
        scales = {name: p.shape for name, p in model.named_parameters() if "ia3_l" in name}
        sizes = {tuple(shape) for name, shape in scales.items() if "dense_4h_to_h" in name}
        assert sizes == {(1, CONFIG.intermediate_size)}
        assert len(scales) == 2 * CONFIG.num_hidden_layers


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="transformers asks for a newer peft than there is"
)
def test_adapter_of_transformers_finds_its_targets():
    model = copy.deepcopy(MODEL)
    model.add_adapter(LoraConfig(r=2))
    found = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert [name.split(".")[-4] for name in found] == ["query_key_value"] * CONFIG.num_hidden_layers


def test_peft_is_imported_by_its_user_only():
    code = """
import sys
import glm_hf
assert "peft" not in sys.modules
config = glm_hf.GLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
model = glm_hf.GLMForBlankInfilling(config)
assert "peft" not in sys.modules
import peft
model = peft.get_peft_model(model, peft.LoraConfig())
assert model.peft_config["default"].target_modules == {"query_key_value"}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", capture_output=True)


def test_other_models_keep_their_own_names():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    other = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=20, **sizes))
    model = get_peft_model(other, PromptTuningConfig(num_virtual_tokens=2, **TASK))
    assert not hasattr(model, "fill_blanks")
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 5, 20)


# Refusals


def test_context_behind_real_text_is_refused_and_behind_a_prefix_read():
    real = DynamicCache(config=CONFIG)
    MODEL(torch.tensor([[11, 12, 13, 14]]), past_key_values=real)
    with pytest.raises(ValueError, match="came with a filled cache"):
        MODEL(torch.tensor([SHORT]), past_key_values=real)
    model = adapted("prefix")
    prefix = model.get_prompt(1)
    outputs = model.get_base_model()(torch.tensor([SHORT]), past_key_values=prefix)
    expected = computed_logits(model, "prefix", SHORT)
    torch.testing.assert_close(outputs.logits[0], expected, atol=NOISE, rtol=0)
    with pytest.raises(ValueError, match="came with a filled cache"):
        model.get_base_model()(torch.tensor([SHORT]), past_key_values=prefix)
    with pytest.raises(ValueError, match="a cache behind a learned prefix cannot be reused"):
        model.generate(input_ids=torch.tensor([[*SHORT, 31, 32]]), past_key_values=prefix, max_new_tokens=1)


@pytest.mark.parametrize("method", [*PREFIX, *PROMPT])
def test_assisted_generation_behind_a_prompt_is_refused(method):
    prompt = torch.tensor([[21, 22, 21, 22, GMASK, SOP, 21, 22]])
    others = [token for token in range(CONFIG.vocab_size) if token not in (21, 22)]
    options = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 9, "suppress_tokens": others}
    with pytest.raises(ValueError, match="tokens are generated one by one; leave assistants out"):
        adapted(method).generate(input_ids=prompt, **options)


@pytest.mark.parametrize("method", PROMPT)
def test_packed_samples_behind_one_prompt_are_refused(method):
    with pytest.raises(ValueError, match="use prefix tuning or LoRA instead"):
        adapted(method)(torch.tensor([SHORT]), segment_ids=torch.ones(1, len(SHORT), dtype=torch.long))


@pytest.mark.parametrize("method", PROMPT)
def test_embeddings_whose_context_is_unknown_are_not_trained_on(method):
    model = adapted(method).train()
    noisy = model.word_embeddings.register_forward_hook(lambda module, args, output: output + torch.rand(output.shape))
    with pytest.raises(ValueError, match="no row of inputs_embeds is the embedding of sop"):
        model(torch.tensor([SHORT]), labels=torch.tensor([SHORT]))
    noisy.remove()
    assert model(torch.tensor([SHORT]), labels=torch.tensor([SHORT])).loss.isfinite()


def test_prefix_of_an_encoder_and_a_decoder_is_refused():
    config = PrefixTuningConfig(num_virtual_tokens=P, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(copy.deepcopy(MODEL), config)
    with pytest.raises(ValueError, match='GLM takes one of task_type="CAUSAL_LM"'):
        model(input_ids=torch.tensor([SHORT]))


def test_embeddings_are_read_like_their_ids():
    ids, mask = padded(TEXTS, "left")
    embeds = MODEL.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        expected = MODEL(ids, attention_mask=mask).logits
        logits = MODEL(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, atol=NOISE, rtol=0)
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = MODEL.generate(ids, **options)[:, ids.shape[1] :]
    assert torch.equal(MODEL.generate(inputs_embeds=embeds, **options), expected)
    both = MODEL.generate(ids, inputs_embeds=embeds, **options)
    assert torch.equal(both[:, -5:], expected)
