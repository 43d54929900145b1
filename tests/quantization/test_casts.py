"""Casts, moves and counts of quantized models, beside the model dequantized and plain products."""

import copy
import io
import pickle

import peft
import pytest
import torch
from golden import golden_arrays
from torch import nn

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.quantization import QuantizedLinear, dequantize_weight, quantize_weight, quantized_linear
from glm_hf.training.measurements import flops_per_token

SETTINGS = [{"bits": 8}, {"bits": 4}, {"bits": 4, "quantize_embeddings": True}]


def load(folder, dtype=torch.float16, **settings):
    config = GLMQuantizationConfig(**settings)
    return GLMForBlankInfilling.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def logits_of(model):
    with torch.no_grad():
        return model(golden_arrays("cfg2")["mask_infill.input_ids"], use_cache=False).logits.float()


def assign(dtype):
    def cast(model):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        return model

    return cast


def cast_all_data(model):
    peft.cast_mixed_precision_params(model.requires_grad_(False), torch.bfloat16)
    return model


CASTS = {
    "to float32": (lambda model: model.to(torch.float32), torch.float32),
    "to float64": (lambda model: model.to(torch.float64), torch.float64),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "type": (lambda model: model.type(torch.float32), torch.float32),
    "module by module": (lambda model: model.apply(lambda module: nn.Module.float(module)), torch.float32),
    "data to float32": (assign(torch.float32), torch.float32),
    "data to bfloat16": (assign(torch.bfloat16), torch.bfloat16),
    "there and back": (lambda model: model.to(torch.bfloat16).to(torch.float32), torch.bfloat16),
    "data, then the model": (lambda model: assign(torch.bfloat16)(model).to(torch.float32), torch.bfloat16),
    "all data": (cast_all_data, torch.bfloat16),
    "a copy": (lambda model: copy.deepcopy(model).to(torch.float32), torch.float32),
    "data of a copy": (lambda model: copy.deepcopy(assign(torch.bfloat16)(model)), torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cast_model_answers_as_the_dequantized_one(settings, cast, plain):
    function, dtype = CASTS[cast]
    model = function(load(plain, **settings))
    assert {p.dtype for name, p in model.named_parameters() if name.endswith("_scale")} == {torch.float16}
    exact = load(plain, **settings).dequantize(dtype=torch.float32).to(torch.float32)
    expected = logits_of(exact)
    if dtype != torch.bfloat16:
        assert (logits_of(model) - expected).abs().max() < 0.02  # logits have a standard deviation of 3 to 4
    else:  # no further from the exact answer than the dense model, whose weights are rounded, too
        dense = logits_of(function(exact))
        assert (logits_of(model) - expected).abs().mean() < 1.2 * (dense - expected).abs().mean()


def test_scale_that_is_assigned_must_be_the_same(plain):
    layer = load(plain, bits=8).model.layers[0].attention.dense
    with pytest.raises(ValueError, match="cannot be changed"):
        layer.weight_scale.data = layer.weight_scale.data.float() * 1.01
    with pytest.raises(ValueError, match="cannot be changed"):
        layer.weight.data = layer.weight.data + 1
    layer.weight_scale.data = layer.weight_scale.data.float()
    assert layer.weight_scale.dtype == torch.float16


MOVES = {
    "another spelling of the device": lambda model: model.to("cpu:0"),
    "the device": lambda model: model.to(torch.device("cpu", 0)),
    "shared memory": lambda model: model.share_memory(),
    "clones": lambda model: model._apply(torch.clone),
    "a copy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "its own state": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), model)[1],
}


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch_saved(model)], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_unpickled_model_is_as_protected_as_before(settings, save, plain):
    model = load(plain, **settings)
    again = load_saved(save(model))
    assert again.num_parameters() == model.num_parameters()
    layer = assign(torch.float32)(again).model.layers[0].attention.dense
    assert layer.weight_scale.dtype == torch.float16
    with pytest.raises(ValueError, match="codes of a quantized weight were taken for weights"):
        layer.weight.float()
    with pytest.raises(ValueError, match="HRA with these settings computes with the weight of a layer"):
        logits_of(peft.get_peft_model(again, peft.HRAConfig(target_modules=["attention.dense"], r=8)))


def torch_saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


def load_saved(data):
    if data[:2] == b"PK":  # what torch has saved is a zip
        return torch.load(io.BytesIO(data), weights_only=False)
    return pickle.loads(data)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_moved_model_answers_the_same(settings, move, plain):
    model = load(plain, **settings)
    expected = logits_of(model)
    moved = MOVES[move](model)
    assert torch.equal(logits_of(moved), expected)
    if move != "its own state":
        assert moved.lm_head.weight is moved.model.embed_tokens.weight


def test_state_of_another_kind_is_refused(plain):
    layer = load(plain, bits=4).model.layers[0].attention.dense
    state = layer.state_dict()
    with pytest.raises(ValueError, match="must be torch.uint8 codes"):
        layer.load_state_dict(state | {"weight": state["weight"].float()})
    layer.load_state_dict(state | {"weight_scale": state["weight_scale"].double()})
    with pytest.raises(ValueError, match="fp16 would round"):
        layer.load_state_dict(state | {"weight_scale": state["weight_scale"].double() * (1 + 2**-20)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_other_dtypes_give_the_product_or_are_refused(bits, dtype):
    torch.manual_seed(0)
    codes, scale = quantize_weight(torch.randn(8, 64), bits=bits)
    scale = torch.full_like(scale, 2.0**-6)  # exact in every dtype
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(8)
    out = quantized_linear(x, codes, scale.to(dtype), bits, bias)
    weight = dequantize_weight(codes, scale, bits).float()
    torch.testing.assert_close(out, x @ weight.T + bias, atol=1e-4, rtol=1e-4)
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), atol=1e-4, rtol=1e-4)
    if dtype != torch.bfloat16:
        with pytest.raises(ValueError, match="fp16 would round"):
            quantized_linear(x, codes, scale.to(dtype) * (1 + 2**-15), bits)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_weights_are_counted_as_those_of_the_dense_model(settings, plain):
    dense = GLMForBlankInfilling.from_pretrained(plain, dtype=torch.float16)
    model = load(plain, **settings)
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < dense.num_parameters()
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    config = peft.LoraConfig(target_modules=["query_key_value"])
    adapted = [peft.get_peft_model(each, config).get_nb_trainable_parameters() for each in (model, dense)]
    assert adapted[0] == adapted[1]
    sizes = [each.num_parameters() for each in (model, dense)]
    counts = [flops_per_token(model.config, size, size, 64) for size in sizes]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "read",
    [
        lambda weight: torch.randn(2, weight.shape[1]) @ weight.T.to(torch.float32),
        lambda weight: nn.functional.linear(torch.randn(2, weight.shape[1]), weight),
        lambda weight: weight.float().norm(),
        lambda weight: weight.data.half(),
        lambda weight: weight.detach().clone().to(torch.bfloat16),
        lambda weight: weight * 0.5,
        lambda weight: weight / 127,
        lambda weight: torch.linalg.vector_norm(weight),
        lambda weight: weight[:3].double(),
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_not_taken_for_weights(bits, read, plain):
    weight = load(plain, bits=bits).model.layers[0].attention.dense.weight
    with pytest.raises(ValueError, match="codes of a quantized weight were taken for weights"):
        read(weight)


def test_codes_can_be_read_as_codes(plain):
    layer = load(plain, bits=8).model.layers[0].attention.dense
    assert layer.weight.dtype == torch.int8
    assert layer.weight.int().abs().max() == 127
    assert torch.equal(layer.weight[:2], layer.weight[:2].clone())
    assert isinstance(layer.weight, nn.Parameter)
    plain_codes = layer.weight.as_subclass(torch.Tensor)
    assert torch.equal(plain_codes.half() * layer.weight_scale, dequantize_weight(layer.weight, layer.weight_scale, 8))


def test_layer_made_by_hand_is_filled_in_place():
    layer = QuantizedLinear(64, 8, bits=8)
    layer.weight.copy_(torch.randint(-127, 127, (8, 64)))
    with torch.no_grad():
        layer.weight_scale.fill_(2.0**-7)
        layer.bias.zero_()
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ (layer.weight.float() * 2.0**-7).T, atol=1e-5, rtol=1e-5)
    assert layer.bfloat16().weight_scale.dtype == torch.float16
