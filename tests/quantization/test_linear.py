import pytest
import torch
from torch import nn

from glm_hf.quantization import QuantizedLinear, dequantize_weight, functional, quantize_weight, quantized_linear

SHAPES = {"N": 30, "K": 24}


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch) -> None:
    monkeypatch.setattr(functional, "ROWS_AT_ONCE", 7)


def quantized(bits: int, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales, and the exact fp32 matrix that they stand for, made one code at a time."""
    weight, scale = quantize_weight(torch.randn(SHAPES["N"], SHAPES["K"]), bits=bits, group_size=group_size)
    step = group_size or SHAPES["K"]
    exact = torch.empty(SHAPES["N"], SHAPES["K"])
    for row in range(SHAPES["N"]):
        for column in range(SHAPES["K"]):
            byte = int(weight[row, column * bits // 8])
            if bits == 4:
                nibble = byte >> 4 if column % 2 == 0 else byte & 15
                byte = nibble - 16 if nibble > 7 else nibble
            exact[row, column] = byte * float(scale[row, column // step])
    return weight, scale, exact


def layer_of(bits: int, group_size: int | None = None) -> tuple[QuantizedLinear, torch.Tensor]:
    weight, scale, exact = quantized(bits, group_size)
    layer = QuantizedLinear(SHAPES["K"], SHAPES["N"], bits=bits, num_groups=scale.shape[1])
    layer.weight.data, layer.weight_scale.data = weight, scale
    layer.bias.data = torch.randn(SHAPES["N"])
    return layer, exact


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("bits", [8, 4])
def test_product_is_that_of_the_exact_weights(bits, group_size, shape, has_bias):
    weight, scale, exact = quantized(bits, group_size)
    x, bias = torch.randn(shape), torch.randn(SHAPES["N"]) if has_bias else None
    out = quantized_linear(x, weight, scale, bits, bias)
    torch.testing.assert_close(out, nn.functional.linear(x, exact, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [quantized_linear, functional.quantized_linear_reference])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 4e-3)])
def test_result_has_the_dtype_of_the_input_and_its_accuracy(function, dtype, tolerance):
    weight, scale, exact = quantized(4)
    x = torch.randn(3, 24).to(dtype)
    out = function(x, weight, scale, 4)
    expected = x.float() @ exact.T
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_an_operator_as_torch_wants_them(bits):
    weight, scale, _ = quantized(bits)
    for bias in (None, torch.randn(30, requires_grad=True)):
        x = torch.randn(2, 3, 24, requires_grad=True)
        torch.library.opcheck(torch.ops.glm_hf.quantized_linear, (x, weight, scale, bits, bias))


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_layer_is_one_graph_and_gives_the_same(bits):
    layer, _ = layer_of(bits)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, reference = (torch.ones(2, 24).requires_grad_() for _ in range(2))
    out, expected = compiled(x), layer(reference)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(out, expected)
    torch.testing.assert_close(x.grad, reference.grad)


def test_inputs_need_not_be_contiguous():
    weight, scale, exact = quantized(8)
    for x in (torch.randn(24, 5).T, torch.randn(5, 48)[:, ::2], torch.randn(1, 24).expand(4, 24)):
        torch.testing.assert_close(quantized_linear(x, weight, scale, 8), x @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_and_scales_need_not_be_contiguous(bits):
    weight, scale, exact = quantized(bits, 6)
    x = torch.randn(3, 24)
    out = quantized_linear(x, weight.T.contiguous().T, scale.T.contiguous().T, bits)
    torch.testing.assert_close(out, x @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_layer_without_rows_and_rows_of_zeros(bits):
    weight, scale, exact = quantized(bits)
    assert quantized_linear(torch.randn(2, 24), weight[:0], scale[:0], bits).shape == (2, 0)
    weight, scale = quantize_weight(torch.zeros(5, 24), bits=bits)
    assert torch.equal(quantized_linear(torch.randn(2, 24), weight, scale, bits), torch.zeros(2, 5))


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_those_of_the_exact_weights(bits, group_size):
    layer, exact = layer_of(bits, group_size)
    x = torch.randn(2, 3, 24, requires_grad=True)
    grad = torch.randn(2, 3, 30)
    layer(x).backward(grad)
    reference = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    nn.functional.linear(reference, exact, bias).backward(grad)
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None
    assert layer.weight_scale.grad is None


def test_layer_is_a_linear_with_its_sizes():
    layer = QuantizedLinear(24, 30, bits=4, num_groups=3, bias=False)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.bias) == (24, 30, None)
    assert (layer.weight.shape, layer.weight.dtype) == ((30, 12), torch.uint8)
    assert (layer.weight_scale.shape, layer.weight_scale.dtype) == ((30, 3), torch.float16)
    assert "bits=4, num_groups=3" in repr(layer)


@pytest.mark.parametrize(("bits", "num_groups"), [(8, 5), (4, 24), (4, 7)])
def test_groups_that_do_not_fit(bits, num_groups):
    with pytest.raises(ValueError, match=rf"{num_groups} groups must divide the 24 input features"):
        QuantizedLinear(24, 30, bits=bits, num_groups=num_groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 23)}, r"x must be floating point \(..., 24\), got \(2, 23\) torch.float32"),
        ({"x": torch.ones(2, 24, dtype=torch.int32)}, r"x must be floating point .* torch.int32"),
        ({"weight": torch.zeros(30, 24).char()}, r"weight must be a torch.uint8 matrix for 4 bits, got .* torch.int8"),
        ({"weight_scale": torch.ones(30).half()}, r"weight_scale must be \(30, G\), where G divides 24, got \(30,\)"),
        ({"weight_scale": torch.ones(29, 1).half()}, r"weight_scale must be \(30, G\)"),
        ({"weight_scale": torch.ones(30, 5).half()}, r"weight_scale must be \(30, G\)"),
        ({"weight_scale": torch.ones(30, 0).half()}, r"weight_scale must be \(30, G\)"),
        ({"weight_scale": torch.ones(30, 1).int()}, r"weight_scale must be floating point, got torch.int32"),
        ({"bits": 3}, r"bits must be 8 or 4, got 3"),
    ],
)
def test_arguments_that_do_not_fit_together(change, message):
    weight, scale, _ = quantized(4)
    arguments = {"x": torch.randn(2, 24), "weight": weight, "weight_scale": scale, "bits": 4} | change
    with pytest.raises(ValueError, match=message):
        quantized_linear(**arguments)


@pytest.mark.parametrize("bits", [8, 4])
def test_exact_and_rounded_weights_differ_by_rounding_only(bits):
    weight, scale, exact = quantized(bits)
    assert torch.equal(dequantize_weight(weight, scale, bits), exact.half())
