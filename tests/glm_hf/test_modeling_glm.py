import copy
import math
import shutil

import pytest
import torch
from golden import TOLERANCE, golden_arrays, golden_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMForMaskedLM, GLMModel

MODEL = golden_model("cfg1")
CONFIG = MODEL.config
MASK, GMASK, SOP, EOS = CONFIG.mask_token_id, CONFIG.gmask_token_id, CONFIG.sop_token_id, CONFIG.eos_token_id
SHORT = [11, 12, MASK, 13, EOS, SOP, 14, 15]
LONG = [21, 22, 23, GMASK, SOP, 24]
CAUSAL = [31, 32, 33]
NOISE = 1e-4  # of fp32 logits of these weights, as measured for the golden data


def logits_of(row, model=MODEL, **kwargs):
    with torch.no_grad():
        return model(torch.tensor([row]), **kwargs).logits[0]


def tiny_model(**changes):
    return copy.deepcopy(MODEL) if not changes else GLMForBlankInfilling(GLMConfig(**{**CONFIG.to_dict(), **changes}))


def test_meta_model_has_the_parameters_of_glm_130b():
    with torch.device("meta"):
        model = GLMForBlankInfilling(GLMConfig())
    hidden, inner, layers, vocab = 12288, 32768, 70, 150528
    linears = 3 * hidden * hidden + hidden * hidden + 3 * hidden * inner
    biases_and_norms = 3 * hidden + hidden + 2 * inner + hidden + 4 * hidden
    assert round(linears / 1e9, 3) == 1.812
    assert model.num_parameters() == layers * (linears + biases_and_norms) + vocab * hidden + 2 * hidden
    assert 128e9 < model.num_parameters() < 131e9


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_packed_samples_equal_samples_alone(attn_implementation):
    model = golden_model("cfg1", attn_implementation)
    samples = [SHORT, LONG, CAUSAL]
    row = [token for sample in samples for token in sample] + [0, 0]
    segments = [number for number, sample in enumerate(samples, 1) for _ in sample] + [0, 0]
    packed = logits_of(row, model, segment_ids=torch.tensor([segments]))
    start = 0
    for sample in samples:
        alone = logits_of(sample, model)
        torch.testing.assert_close(packed[start : start + len(sample)], alone, atol=NOISE, rtol=0)
        start += len(sample)


def test_packed_rows_of_a_batch_are_apart():
    rows = torch.tensor([SHORT + LONG, LONG + SHORT])
    segments = torch.tensor([[1] * len(SHORT) + [2] * len(LONG), [7] * len(LONG) + [3] * len(SHORT)])
    with torch.no_grad():
        logits = MODEL(rows, segment_ids=segments).logits
    torch.testing.assert_close(logits[0, len(SHORT) :], logits[1, : len(LONG)], atol=NOISE, rtol=0)


def test_later_spans_see_earlier_ones_but_not_the_reverse():
    row = [11, MASK, 12, MASK, EOS, SOP, 13, SOP, 14]
    base = logits_of(row)
    later = logits_of(row[:-1] + [15])
    earlier = logits_of(row[:6] + [16] + row[7:])
    torch.testing.assert_close(later[:8], base[:8], atol=NOISE, rtol=0)
    assert (earlier[8] - base[8]).abs().max() > 1e-2


def test_context_sees_itself_both_ways_and_nothing_behind():
    base = logits_of(SHORT)
    assert (logits_of([*SHORT[:3], 17, *SHORT[4:]])[0] - base[0]).abs().max() > 1e-2
    torch.testing.assert_close(logits_of([*SHORT[:-1], 17])[:-1], base[:-1], atol=NOISE, rtol=0)


def test_text_without_sop_is_causal():
    torch.testing.assert_close(logits_of([*CAUSAL, 34])[:3], logits_of(CAUSAL), atol=NOISE, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_batch_of_unequal_contexts_equals_its_rows(attn_implementation):
    model = golden_model("cfg1", attn_implementation)
    rows = [SHORT, [*LONG, 25, 26], [0, 0, 0, *CAUSAL, 34, 35]]
    padding = torch.tensor([[1] * 8, [1] * 8, [0] * 3 + [1] * 5])
    with torch.no_grad():
        logits = model(torch.tensor(rows), attention_mask=padding).logits
    for row in range(3):
        kept = padding[row].bool()
        alone = logits_of(torch.tensor(rows[row])[kept].tolist(), model)
        torch.testing.assert_close(logits[row][kept], alone, atol=NOISE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_four_dimensional_mask_of_ones_and_zeros_equals_bool(dtype):
    visible = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    for attn_implementation in ("eager", "sdpa"):
        model = golden_model("cfg1", attn_implementation)
        causal = logits_of(SHORT, model, attention_mask=visible.to(dtype))
        positions = torch.tensor([[0, 1, 2, 3, 4, 2, 2, 2]])
        unmarked = [token if token != SOP else 40 for token in SHORT]
        assert (causal - logits_of(SHORT, model)).abs().max() > 1e-2
        reference = logits_of(SHORT, golden_model("cfg1"), attention_mask=visible, position_ids=positions)
        torch.testing.assert_close(causal, reference, atol=NOISE, rtol=0)
        assert unmarked


def test_explicit_positions_win():
    positions = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    assert (logits_of(SHORT, position_ids=positions) - logits_of(SHORT)).abs().max() > 1e-2


def test_embeddings_instead_of_ids_are_causal():
    embeds = MODEL.get_input_embeddings()(torch.tensor([CAUSAL]))
    with torch.no_grad():
        logits = MODEL(inputs_embeds=embeds).logits[0]
    torch.testing.assert_close(logits, logits_of(CAUSAL), atol=NOISE, rtol=0)


def test_ids_and_embeddings_together_are_refused():
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        MODEL(torch.tensor([CAUSAL]), inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        MODEL()


def test_segments_with_padding_mask_are_refused():
    with pytest.raises(ValueError, match="leave out attention_mask"):
        MODEL(torch.tensor([CAUSAL]), attention_mask=torch.ones(1, 3), segment_ids=torch.ones(1, 3).long())


def test_steps_with_a_cache_equal_the_whole_row():
    whole = logits_of(LONG + [25, 26])
    cache = DynamicCache(config=CONFIG)
    first = logits_of(LONG, past_key_values=cache)
    steps = [first] + [logits_of([token], past_key_values=cache) for token in (25, 26)]
    torch.testing.assert_close(torch.cat(steps), whole, atol=NOISE, rtol=0)


def test_unpadded_batch_of_unequal_contexts_equals_its_rows():
    rows = torch.tensor([SHORT, [*LONG, 25, 26]])
    with torch.no_grad():
        logits = MODEL(rows).logits
    for row in range(2):
        torch.testing.assert_close(logits[row], logits_of(rows[row].tolist()), atol=NOISE, rtol=0)


def test_left_padded_step_with_a_cache_counts_tokens_only():
    cache = DynamicCache(config=CONFIG)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        MODEL(torch.tensor([[0, 0, *LONG]]), attention_mask=padding, past_key_values=cache)
        padding = torch.nn.functional.pad(padding, (0, 1), value=1)
        step = MODEL(torch.tensor([[25]]), attention_mask=padding, past_key_values=cache).logits[0, 0]
    torch.testing.assert_close(step, logits_of([*LONG, 25])[-1], atol=NOISE, rtol=0)


def test_additive_mask_is_taken_as_it_is():
    visible = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 8, 8).masked_fill(~visible, torch.finfo(torch.float32).min)
    for attn_implementation in ("eager", "sdpa"):
        model = golden_model("cfg1", attn_implementation)
        expected = logits_of(SHORT, model, attention_mask=visible)
        torch.testing.assert_close(logits_of(SHORT, model, attention_mask=additive), expected, atol=NOISE, rtol=0)


def test_eager_in_half_keeps_large_scores_finite():
    model = copy.deepcopy(golden_model("cfg1", "eager"))
    with torch.no_grad():
        model.model.layers[2].attention.query_key_value.weight.mul_(40)  # scores beyond the range of fp16
        exact = model(torch.tensor([SHORT])).logits
        half = model.half()(torch.tensor([SHORT]), attention_mask=torch.ones(1, 1, 8, 8).tril()).logits
    assert exact.isfinite().all()
    assert half.isfinite().all()


@pytest.mark.parametrize("rope_dtype", ["float16", "float32"])
def test_autocast_runs_and_stays_close(rope_dtype):
    model = golden_model("cfg1", rope_dtype=rope_dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.tensor([SHORT])).logits.float()
    assert (logits - logits_of(SHORT, model)).abs().mean() < 0.2  # bf16 has 8 bits; the standard deviation is 3


@pytest.mark.parametrize("kind", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(kind):
    model = tiny_model(**{kind: 0.5})
    model.load_state_dict(MODEL.state_dict())
    torch.testing.assert_close(logits_of(SHORT, model.eval()), logits_of(SHORT), atol=NOISE, rtol=0)
    assert (logits_of(SHORT, model.train()) - logits_of(SHORT)).abs().max() > 1e-2
    assert (logits_of(SHORT, model) - logits_of(SHORT, model)).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"segment_ids": torch.tensor([[1] * 8 + [2] * 6])}], ids=["ids", "packed"])
def test_traced_graph_derives_its_mask_from_ids(options):
    row = torch.tensor([SHORT + LONG])
    compiled = torch.compile(MODEL, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = MODEL(row, use_cache=False, **options).logits
        torch.testing.assert_close(compiled(row, use_cache=False, **options).logits, expected, atol=NOISE, rtol=0)


def test_shifted_labels_equal_labels():
    labels = torch.tensor([[-100] * 6 + SHORT[6:]])
    shifted = torch.cat((labels[:, 1:], torch.tensor([[-100]])), dim=1)
    ids = torch.tensor([SHORT])
    torch.testing.assert_close(MODEL(ids, shift_labels=shifted).loss, MODEL(ids, labels=labels).loss)


def test_trainer_keeps_packed_columns_trains_and_evaluates(tmp_path):
    sample = {
        "input_ids": SHORT + LONG,
        "segment_ids": [1] * 8 + [2] * 6,
        "labels": [-100] * 6 + [14, 15] + [-100] * 5 + [24],
    }
    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no"
    )
    trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=[sample] * 4, eval_dataset=[sample] * 2)
    expected = MODEL(**{key: torch.tensor([value]) for key, value in sample.items()}).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < expected


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "row", [SHORT, [*LONG, 25, 26], [*CAUSAL, 34, 35, 36, 37, 38]], ids=["mask", "gmask", "causal"]
)
def test_logits_that_are_kept_are_those_of_all(row, kept):
    torch.testing.assert_close(logits_of(row, logits_to_keep=kept), logits_of(row)[-kept:], atol=NOISE, rtol=0)


def test_last_layer_leaves_out_the_context_when_its_output_is_not_used():
    shapes = []
    hook = MODEL.model.layers[-1].register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    logits_of(SHORT, logits_to_keep=1)
    logits_of(SHORT, logits_to_keep=1, output_hidden_states=True)
    logits_of(SHORT)
    hook.remove()
    assert shapes == [3, 8, 8]


def test_flex_attention_equals_sdpa_for_every_derived_mask():
    model = golden_model("cfg1", "flex_attention")
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):  # flex attention's own reference, without its kernels
        alone = [logits_of(row, model) for row in (SHORT, LONG)]
        padded = model(torch.tensor([SHORT, [0, 0, *LONG]]), attention_mask=torch.tensor([[1] * 8, [0, 0] + [1] * 6]))
        packed = model(torch.tensor([SHORT + LONG]), segment_ids=torch.tensor([[1] * 8 + [2] * 6]))
    for short, long in [alone, (padded.logits[0], padded.logits[1, 2:]), packed.logits[0].split([8, 6])]:
        torch.testing.assert_close(short, logits_of(SHORT), atol=NOISE, rtol=0)
        torch.testing.assert_close(long, logits_of(LONG), atol=NOISE, rtol=0)


def test_compiled_flex_attention_takes_a_four_dimensional_mask():
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("flex attention on the CPU needs a C++ compiler")
    arrays = {key: golden_arrays("cfg1")[f"multichoice.{key}"] for key in ("input_ids", "position_ids", "logits")}
    visible = ~golden_arrays("cfg1")["multichoice.attention_mask"]
    model = golden_model("cfg1", "flex_attention")
    with torch.no_grad():
        logits = model(arrays["input_ids"], attention_mask=visible, position_ids=arrays["position_ids"]).logits
    assert (logits - arrays["logits"]).abs().max() < TOLERANCE


def test_attention_probabilities_are_returned_by_eager():
    model = golden_model("cfg1", "eager")
    with torch.no_grad():
        attentions = model(torch.tensor([SHORT]), output_attentions=True).attentions
    assert len(attentions) == CONFIG.num_hidden_layers
    assert attentions[0].shape == (1, CONFIG.num_attention_heads, 8, 8)
    visible = attentions[0][0, 0] > 0
    assert visible[:5].tolist() == [[True] * 5 + [False] * 3] * 5
    assert visible[5:].tolist() == [[True] * (6 + row) + [False] * (2 - row) for row in range(3)]


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    checkpointed.gradient_checkpointing_enable()
    ids = torch.tensor([SHORT])
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, left), right in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, msg=name)


def test_labels_are_aligned_with_inputs_and_shifted():
    labels = torch.tensor([[-100] * 6 + SHORT[6:]])
    loss = MODEL(torch.tensor([SHORT]), labels=labels).loss.item()
    log_probs = logits_of(SHORT).log_softmax(-1)
    assert loss == pytest.approx(-(log_probs[5, SHORT[6]] + log_probs[6, SHORT[7]]).item() / 2, abs=1e-5)


def test_gradient_shrink_touches_only_the_path_through_the_embedding():
    alpha = 0.1
    ids, labels = torch.tensor([SHORT]), torch.tensor([[-100] * 6 + SHORT[6:]])

    def embedding_gradient(shrink, untied_output):
        model = tiny_model(embedding_gradient_shrink=shrink).double()
        model.load_state_dict(MODEL.state_dict())
        if untied_output:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.train()(ids, labels=labels).loss.backward()
        return model.model.embed_tokens.weight.grad

    through_input = embedding_gradient(1.0, untied_output=True)
    through_output = embedding_gradient(1.0, untied_output=False) - through_input
    expected = alpha * through_input + through_output
    torch.testing.assert_close(embedding_gradient(alpha, untied_output=False), expected)


def test_weights_start_as_deepnorm_prescribes():
    config = GLMConfig(
        **{
            **CONFIG.to_dict(),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
        }
    )
    layer = GLMModel(config).layers[0]
    shrink = (2 * 8) ** -0.5
    by_head = layer.attention.query_key_value.weight.view(4, 3, 64, 256)
    xavier, xavier_mlp = math.sqrt(2 / 512), math.sqrt(2 / 768)
    for actual, expected in [
        (by_head[:, 0], xavier),
        (by_head[:, 1], xavier),
        (by_head[:, 2], xavier * shrink),
        (layer.attention.dense.weight, xavier * shrink),
        (layer.mlp.dense_h_to_4h.weight, xavier_mlp * shrink),
        (layer.mlp.dense_4h_to_h.weight, xavier_mlp * shrink),
    ]:
        assert actual.std().item() == pytest.approx(expected, rel=0.03)
    assert all(not parameter.any() for name, parameter in layer.named_parameters() if name.endswith("bias"))


def test_auto_classes_load_what_was_saved(tmp_path):
    MODEL.save_pretrained(tmp_path)
    classes = {
        AutoModel: GLMModel,
        AutoModelForCausalLM: GLMForBlankInfilling,
        AutoModelForSeq2SeqLM: GLMForBlankInfilling,
        AutoModelForMaskedLM: GLMForMaskedLM,
    }
    for auto, expected in classes.items():
        model, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is expected
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(SHORT, loaded), logits_of(SHORT))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.eos_token_id == [CONFIG.eop_token_id, CONFIG.eos_token_id]


def test_folder_without_generation_config_still_stops_at_eop(tmp_path):
    MODEL.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [CONFIG.eop_token_id, CONFIG.eos_token_id]


def test_generation_config_of_a_folder_is_kept(tmp_path):
    MODEL.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 7


def test_flash_attention_is_refused():
    assert not GLMModel._supports_flash_attn
    with pytest.raises((ValueError, ImportError)):
        tiny_model().set_attn_implementation("flash_attention_2")
