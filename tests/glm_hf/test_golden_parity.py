import pytest
import torch
from golden import CONFIGS, TOLERANCE, golden_arrays, golden_cases, golden_model, read_json

DERIVABLE = ("gmask_single", "gmask_batch", "mask_infill", "mask_infill_two", "smask_end", "unidirectional_gmask")
CASES = [(name, case) for name in CONFIGS for case in golden_cases(name)]


def case_inputs(name: str, case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids `(B, L)`, positions `(B, L)` and what is visible `(B, 1, L, L)`: the original marks what is hidden."""
    arrays = golden_arrays(name)
    return tuple(arrays[f"{case}.{key}"] for key in ("input_ids", "position_ids")) + (
        ~arrays[f"{case}.attention_mask"],
    )


def difference(logits: torch.Tensor, golden: torch.Tensor, visible: torch.Tensor) -> float:
    """Largest difference over the rows that are not padding, which see nothing."""
    is_token = visible[:, 0].any(-1)
    return (logits - golden)[is_token].abs().max().item()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_equal_the_originals_with_explicit_mask_and_positions(name, case, attn_implementation):
    input_ids, position_ids, visible = case_inputs(name, case)
    model = golden_model(name, attn_implementation)
    with torch.no_grad():
        logits = model(input_ids, attention_mask=visible, position_ids=position_ids).logits
    assert difference(logits, golden_arrays(name)[f"{case}.logits"], visible) < TOLERANCE


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", DERIVABLE)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_originals_from_input_ids_alone(name, case, attn_implementation):
    input_ids, _, visible = case_inputs(name, case)
    with torch.no_grad():
        logits = golden_model(name, attn_implementation)(input_ids).logits
    assert difference(logits, golden_arrays(name)[f"{case}.logits"], visible) < TOLERANCE


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["left_padded", "right_padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_batch_needs_only_ids_and_padding_mask(name, case, attn_implementation):
    input_ids, _, visible = case_inputs(name, case)
    is_token = visible[:, 0].any(-1)
    with torch.no_grad():
        logits = golden_model(name, attn_implementation)(input_ids, attention_mask=is_token.long()).logits
    assert difference(logits, golden_arrays(name)[f"{case}.logits"], visible) < TOLERANCE


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in CASES if f"{c}.logits_rope_fp32" in golden_arrays(n)])
def test_rope_in_float32_equals_the_original_upcast(name, case):
    input_ids, position_ids, visible = case_inputs(name, case)
    model = golden_model(name, rope_dtype="float32")
    with torch.no_grad():
        logits = model(input_ids, attention_mask=visible, position_ids=position_ids).logits
    assert difference(logits, golden_arrays(name)[f"{case}.logits_rope_fp32"], visible) < TOLERANCE


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, c in CASES if f"{c}.logits_all_fp16" in golden_arrays(n)])
def test_whole_model_in_half_stays_as_close_as_the_original_in_half(name, case):
    input_ids, position_ids, visible = case_inputs(name, case)
    arrays = golden_arrays(name)
    model = type(golden_model(name))(golden_model(name).config).eval()
    model.load_state_dict(golden_model(name).state_dict())
    with torch.no_grad():
        logits = model.half()(input_ids, attention_mask=visible, position_ids=position_ids).logits.float()
    exact = arrays[f"{case}.logits"]
    assert difference(logits, exact, visible) <= 1.5 * difference(
        arrays[f"{case}.logits_all_fp16"].float(), exact, visible
    )


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_equal_the_originals_in_every_layer(name, attn_implementation):
    golden = golden_arrays(name, "hidden_gmask_batch.npz")
    input_ids, position_ids, visible = (tensor[:1] for tensor in case_inputs(name, "gmask_batch"))
    model = golden_model(name, attn_implementation)
    seen: dict[str, torch.Tensor] = {}

    def record(key):
        return lambda module, args, output: seen.__setitem__(key, output[0] if isinstance(output, tuple) else output)

    hooks = [model.model.norm.register_forward_hook(record("final_layernorm"))]
    for index, layer in enumerate(model.model.layers):
        parts = {"output": layer, **{part: getattr(layer, part) for part in ("input_layernorm", "attention", "mlp")}}
        parts["post_attention_layernorm"] = layer.post_attention_layernorm
        hooks += [module.register_forward_hook(record(f"layer{index}.{part}")) for part, module in parts.items()]
    with torch.no_grad():
        outputs = model(input_ids, attention_mask=visible, position_ids=position_ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    seen["embeddings"] = outputs.hidden_states[0]
    assert seen.keys() == golden.keys()
    for key, expected in golden.items():
        actual = seen[key].reshape(expected.shape)
        torch.testing.assert_close(
            actual, expected, atol=TOLERANCE, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_of_choices_equal_cond_log_prob(name):
    golden = read_json(name, "scores.json")["cond_log_prob"]
    input_ids, position_ids, visible = case_inputs(name, golden["case"])
    with torch.no_grad():
        logits = golden_model(name)(input_ids, attention_mask=visible, position_ids=position_ids).logits
    log_probs = logits[0].log_softmax(-1)
    sums = [
        log_probs[at, ids].sum().item() for ids, at in zip(golden["choices"], golden["choice_target_ids"], strict=True)
    ]
    assert sums == pytest.approx(golden["log_probs"], abs=2e-3)  # sums of up to 3 logits within TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_unidirectional_loss_equals_calculate_loss(name):
    golden = read_json(name, "scores.json")["calculate_loss"]
    input_ids = case_inputs(name, golden["case"])[0]
    targets, kept = torch.tensor(golden["targets"]), torch.tensor(golden["loss_masks"]).bool()
    with torch.no_grad():
        outputs = golden_model(name)(input_ids, shift_labels=targets.masked_fill(~kept, -100))
    assert outputs.loss.item() * kept.sum().item() == pytest.approx(golden["loss"][0], abs=5e-3)  # 11 terms
