import pytest
import torch
from torch import nn

from glm_hf.quantization import quantize_weight, unpack_int4

pytest.importorskip("triton", reason="triton is not installed")
from glm_hf.quantization import kernels_triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, conftest.py has Triton interpret the kernels

# Of the largest output: fp32 sums; fp16's and bf16's own rounding of the output.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def few(*arguments, num_programs: int = 4) -> torch.Tensor:
    return kernels.multiply_few(*arguments, num_programs=num_programs)


def matrix(num_rows: int, num_columns: int, bits: int, num_groups: int = 1) -> tuple[torch.Tensor, ...]:
    """Return codes, scales and the fp64 matrix that they stand for."""
    torch.manual_seed(0)
    weight, scale = quantize_weight(
        torch.randn(num_rows, num_columns) * 0.02, bits=bits, group_size=num_columns // num_groups
    )
    codes = unpack_int4(weight) if bits == 4 else weight
    exact = (codes.double().unflatten(1, (num_groups, -1)) * scale.double()[..., None]).flatten(1)
    return weight.to(DEVICE), scale.to(DEVICE), exact.to(DEVICE)


def assert_close(out: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    expected = nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max()


@pytest.mark.parametrize(("num_columns", "num_groups"), [(96, 1), (272, 1), (512, 4), (256, 8), (768, 2)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("function", "num_tokens", "dtype"),
    [
        *((few, number, dtype) for number in (1, 3) for dtype in TOLERANCES),
        *((kernels.multiply_some, number, dtype) for number in (20,) for dtype in TOLERANCES),
        *((kernels.multiply_many, 40, dtype) for dtype in TOLERANCES),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_kernel_gives_the_product(function, num_tokens, dtype, bits, num_columns, num_groups):
    if function is kernels.multiply_some and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 matrices wrongly with NumPy 2.4")
    if function is kernels.multiply_many and dtype == torch.bfloat16 and num_groups > 1 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter cuts numbers off for bf16 instead of rounding them")
    weight, scale, exact = matrix(70, num_columns, bits, num_groups)
    x = torch.randn(num_tokens, num_columns).to(DEVICE, dtype)
    assert_close(function(x, weight, scale, bits, None), x, exact)
    bias = torch.randn(70).to(DEVICE)
    assert_close(function(x, weight, scale, bits, bias), x, exact, bias)


@pytest.mark.parametrize("num_programs", [1, 2, 7, 1000])
def test_parts_of_a_sum_make_up_the_whole(num_programs):
    weight, scale, exact = matrix(70, 1088, 4)
    x = torch.randn(2, 1088).to(DEVICE)
    out = few(x, weight, scale, 4, None, num_programs=num_programs)
    assert_close(out, x, exact)
    assert torch.equal(out, few(x, weight, scale, 4, None, num_programs=num_programs))


def test_few_outlier_features_cost_little_accuracy():
    weight, scale, exact = matrix(33, 512, 4)
    x = torch.randn(9, 512)
    x[:, 7] *= 300
    for dtype in (torch.float16, torch.float32):
        rounded = x.to(DEVICE, dtype)
        assert_close(few(rounded[:3], weight, scale, 4, None), rounded[:3], exact)
        assert_close(kernels.multiply_some(rounded, weight, scale, 4, None), rounded, exact)


def test_large_activations_do_not_overflow_in_fp16():
    weight, scale, exact = matrix(33, 512, 8)
    x = (torch.randn(80, 512) * 100).to(DEVICE, torch.float16)
    assert_close(kernels.multiply_many(x, weight, scale, 8, None), x, exact)


def test_odd_groups_are_decoded(monkeypatch):
    monkeypatch.setattr(kernels, "DECODED_BYTES", 64 * 4 * 96)
    weight, scale, exact = matrix(150, 96, 4, 8)
    x = torch.randn(2, 96).to(DEVICE)
    assert kernels.block_bytes(48, 8) < kernels.SMALLEST_BLOCK
    assert_close(kernels.quantized_linear_triton(x, weight, scale, 4), x, exact)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (96,), (2, 3, 96), (30, 96), (70, 96)])
def test_any_shape_of_activations_is_taken(monkeypatch, shape):
    monkeypatch.setattr(kernels, "has_tensor_cores", lambda device: True)
    if DEVICE == "cpu":
        properties = type("Properties", (), {"multi_processor_count": 2})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    weight, scale, exact = matrix(20, 96, 4)
    x = torch.randn(shape).to(DEVICE, torch.float16)
    out = kernels.quantized_linear_triton(x, weight, scale, 4)
    assert out.shape == (*shape[:-1], 20)
    if x.numel():
        assert_close(out, x, exact)
    transposed = torch.randn(96, 5).to(DEVICE, torch.float16).T
    assert_close(kernels.quantized_linear_triton(transposed, weight, scale, 4), transposed, exact)
