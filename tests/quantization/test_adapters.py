"""Adapters on quantized layers are merged after the model has been dequantized, and never into codes."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from golden import golden_arrays
from safetensors.torch import load_file
from torch import nn

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.quantization import QuantizedLinear, dequantize_weight, unpack_int4
from glm_hf.quantization.embedding import QuantizedEmbedding

LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
SETTINGS = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "group_size": 10, "quantize_embeddings": True},
    {"bits": 8, "row_parallel_groups": 2, "quantize_embeddings": True},
]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return golden_arrays("cfg2")["mask_infill.input_ids"]


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: object) -> GLMForBlankInfilling:
    config = GLMQuantizationConfig(**settings)
    return GLMForBlankInfilling.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapted(folder: Path, settings: dict, targets: list[str], **options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(folder, **settings), LoraConfig(target_modules=targets, r=4, **options))
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def exact_weight(module: QuantizedLinear | QuantizedEmbedding) -> torch.Tensor:
    codes = unpack_int4(module.weight) if module.bits == 4 else module.weight.as_subclass(torch.Tensor)
    scale = module.weight_scale.float()
    return codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_dequantized_model_is_a_plain_one(settings, plain, ids, tmp_path):
    model = load(plain, **settings)
    logits = logits_of(model, ids)
    kinds = (QuantizedLinear, QuantizedEmbedding)
    exact = {name: exact_weight(module) for name, module in model.named_modules() if isinstance(module, kinds)}
    assert model.dequantize() is model
    assert not any(isinstance(module, kinds) for module in model.modules())
    for name, weight in exact.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (logits_of(model, ids) - logits).abs().max() < 1e-3  # quantized layers round activations to 16 bits
    model.save_pretrained(tmp_path / "saved")
    assert not any(name.endswith("_scale") for name in load_file(tmp_path / "saved" / "model.safetensors"))
    again, info = GLMForBlankInfilling.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert model.resize_token_embeddings(330).weight.shape == (330, 80)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantized_weights_have_the_dtype_of_the_model_or_the_one_asked_for(dtype, plain):
    model = load(plain, bits=4, dtype=dtype)
    layer = model.model.layers[1].mlp.dense_h_to_4h
    rounded, exact = dequantize_weight(layer.weight, layer.weight_scale, 4), exact_weight(layer)
    assert torch.equal(rounded, exact.half())
    model.dequantize()
    layer = model.model.layers[1].mlp.dense_h_to_4h
    assert torch.equal(layer.weight, exact.to(dtype))
    assert layer.bias.dtype == dtype
    other = load(plain, bits=4, dtype=dtype).dequantize(torch.float32)
    assert torch.equal(other.model.layers[1].mlp.dense_h_to_4h.weight, exact)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_weights_are_dequantized_ones_and_the_adapter(safe_merge, settings, plain, ids):
    model = adapted(plain, settings, LINEARS)
    logits = logits_of(model, ids)
    expected = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, QuantizedLinear) and name.endswith(".base_layer"):
            wrapper = model.base_model.model.get_submodule(name.removesuffix(".base_layer"))
            delta = wrapper.lora_B["default"].weight @ wrapper.lora_A["default"].weight
            expected[name.removesuffix(".base_layer")] = exact_weight(module) + delta * wrapper.scaling["default"]
    assert len(expected) == 20
    model.dequantize()
    assert (logits_of(model, ids) - logits).abs().max() < 1e-3
    merged = model.merge_and_unload(safe_merge=safe_merge)
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=1e-6, atol=1e-6)
    assert (logits_of(merged, ids) - logits).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_merged_embedding_is_the_dequantized_one_and_the_adapter(plain):
    model = adapted(plain, {"bits": 4, "quantize_embeddings": True}, ["embed_tokens"])
    wrapper = model.base_model.model.model.embed_tokens
    delta = (wrapper.lora_embedding_B["default"] @ wrapper.lora_embedding_A["default"]).T * wrapper.scaling["default"]
    expected = exact_weight(wrapper.base_layer) + delta
    model.dequantize()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.model.embed_tokens.weight, expected, rtol=1e-6, atol=1e-6)


def test_adapters_go_on_training_on_the_dequantized_model(plain, ids):
    model = adapted(plain, {"bits": 4}, LINEARS)
    model.dequantize()
    model(ids, labels=ids).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_weights_on_the_disk_cannot_be_dequantized(plain, tmp_path):
    load(plain, bits=4).save_pretrained(tmp_path / "saved")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" for layer in range(5)}
    model = GLMForBlankInfilling.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(
        ValueError, match=r"query_key_value is spread over devices, ranks or the disk; load the model on"
    ):
        model.dequantize()
    assert isinstance(model.model.layers[4].mlp.dense_4h_to_h, QuantizedLinear)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_are_not_merged_into_codes(bits, safe_merge, plain, ids):
    model = adapted(plain, {"bits": bits}, LINEARS)
    logits = logits_of(model, ids)
    message = r"can't be cast|must match the size|call model.dequantize\(\) first"  # the first two are torch's own
    with pytest.raises((ValueError, RuntimeError), match=message):
        model.merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(logits_of(model, ids), logits)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_into_a_quantized_embedding_is_refused(safe_merge, plain):
    model = adapted(plain, {"bits": 4, "quantize_embeddings": True}, ["embed_tokens"])
    with pytest.raises(ValueError, match=r"codes of a quantized weight cannot be changed; to merge adapters, call"):
        model.merge_and_unload(safe_merge=safe_merge)


def test_codes_are_moved_copied_and_pickled(plain, ids):
    model = load(plain, bits=8, quantize_embeddings=True)
    logits = logits_of(model, ids)
    model.to("cpu")
    assert torch.equal(logits_of(model, ids), logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.lm_head))):
        head = getattr(copied, "lm_head", copied)
        assert torch.equal(head.weight, model.lm_head.weight)
        assert head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 80)
    torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x))
    with pytest.raises(ValueError, match=r"codes of a quantized weight cannot be changed"):
        model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)
