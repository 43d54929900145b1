import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from glm_hf.quantization import dequantize_weight, quantize_weight, unpack_int4

pytest.importorskip("triton", reason="triton is not installed")
from glm_hf.quantization import kernels_triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, conftest.py has Triton interpret the kernels

# Of the largest output: fp32 sums; fp16's and bf16's own rounding of the output.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def few(*arguments, num_programs: int = 12) -> torch.Tensor:
    return kernels.gemv(*arguments, num_programs=num_programs)


def some(*arguments, num_programs: int = 4) -> torch.Tensor:
    if arguments[0].dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 matrices wrongly with NumPy 2.4")
    return kernels.split_k_gemm(*arguments, num_programs=num_programs)


def many(*arguments) -> torch.Tensor:
    if arguments[0].dtype == torch.bfloat16 and arguments[2].shape[1] > 1 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter cuts numbers off for bf16 instead of rounding them")
    return kernels.decoded_gemm(*arguments)


def matrix(num_rows: int, num_columns: int, bits: int, num_groups: int = 1) -> tuple[torch.Tensor, ...]:
    """Return codes, scales and the fp64 matrix that they stand for."""
    torch.manual_seed(0)
    weight, scale = quantize_weight(
        torch.randn(num_rows, num_columns) * 0.02, bits=bits, group_size=num_columns // num_groups
    )
    weight[:2, :2] = torch.tensor([[-128, 127], [127, -128]]).to(weight.dtype)  # what THUDM's tool does not write
    codes = unpack_int4(weight) if bits == 4 else weight
    exact = (codes.double().unflatten(1, (num_groups, -1)) * scale.double()[..., None]).flatten(1)
    return weight.to(DEVICE), scale.to(DEVICE), exact.to(DEVICE)


def assert_close(out: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    expected = nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
    assert out.dtype == x.dtype
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max()


@pytest.fixture(autouse=True)
def _round_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch round outputs to bf16, for which Triton's interpreter cuts numbers off."""
    if DEVICE == "cpu":
        finish = kernels.finish
        monkeypatch.setattr(kernels, "finish", lambda *inputs, out: out.copy_(finish(*inputs, out=out.float())))


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the dispatch see two multiprocessors with tensor cores."""
    monkeypatch.setattr(kernels, "traits_of", lambda device: (2, True))


@pytest.mark.parametrize(("num_columns", "num_groups"), [(96, 1), (272, 1), (512, 4), (256, 8)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("function", "num_tokens"), [(few, 1), (few, 3), (some, 16), (many, 40)])
def test_every_kernel_gives_the_product(function, num_tokens, dtype, bits, num_columns, num_groups):
    weight, scale, exact = matrix(37, num_columns, bits, num_groups)
    x = torch.randn(num_tokens, num_columns).to(DEVICE, dtype)
    bias = torch.randn(37).to(DEVICE, torch.float32 if num_tokens == 1 else dtype)
    assert_close(function(x, weight, scale, bits, bias), x, exact, bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("function", "num_tokens"), [(few, 8), (few, 11), (some, 40), (some, 100)])
def test_many_rows_and_tokens_take_several_programs(function, num_tokens, bits):
    weight, scale, exact = matrix(133, 64, bits)
    x = torch.randn(num_tokens, 64).to(DEVICE)
    assert_close(function(x, weight, scale, bits, None), x, exact)


def test_kernels_agree_with_the_dequantized_weight():
    weight, scale, _ = matrix(33, 256, 4, 2)
    x = torch.randn(3, 256).to(DEVICE)
    expected = x @ dequantize_weight(weight, scale, 4).float().T  # rounded to fp16
    for function in (few, some, many):
        torch.testing.assert_close(function(x, weight, scale, 4, None), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_tokens_take_some_rows_at_a_time(monkeypatch, bits):
    monkeypatch.setattr(kernels, "DECODED_BYTES", 64 * 4 * 2112)
    weight, scale, exact = matrix(70, 2112, bits)
    x, bias = torch.randn(40, 2112).to(DEVICE), torch.randn(70).to(DEVICE)
    assert_close(many(x, weight, scale, bits, bias), x, exact, bias)


@pytest.mark.parametrize("function", [few, some])
@pytest.mark.parametrize("num_programs", [1, 5, 1000])
@pytest.mark.parametrize(("num_tokens", "num_groups"), [(1, 1), (2, 1), (1, 3)])
def test_parts_of_a_sum_make_up_the_whole(function, num_programs, num_tokens, num_groups):
    weight, scale, exact = matrix(20, 2112, 4, num_groups)
    x = torch.randn(num_tokens, 2112).to(DEVICE)
    out = function(x, weight, scale, 4, None, num_programs=num_programs)
    assert_close(out, x, exact)
    assert torch.equal(out, function(x, weight, scale, 4, None, num_programs=num_programs))


@pytest.mark.parametrize("function", [few, some, many])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_few_outlier_features_cost_little_accuracy(function, dtype):
    weight, scale, exact = matrix(33, 512, 4)
    x = torch.randn(3, 512)
    x[:, 7] *= 300
    x = x.to(DEVICE, dtype)
    assert_close(function(x, weight, scale, 4, None), x, exact)


@pytest.mark.parametrize("function", [few, some, many])
def test_large_activations_do_not_overflow_in_fp16(function):
    weight, scale, exact = matrix(33, 512, 8)
    x = (torch.randn(8, 512) * 1000).to(DEVICE, torch.float16)
    assert_close(function(x, weight, scale, 8, None), x, exact)


@pytest.mark.parametrize(("num_columns", "num_groups"), [(96, 8), (24, 12), (96, 48)])
def test_odd_groups_are_decoded(small_gpu, monkeypatch, num_columns, num_groups):
    monkeypatch.setattr(kernels, "DECODED_BYTES", 64 * 4 * num_columns)
    weight, scale, exact = matrix(150, num_columns, 4 if num_columns > 24 else 8, num_groups)
    x = torch.randn(2, num_columns).to(DEVICE)
    for name in ("gemv", "split_k_gemm"):
        monkeypatch.delattr(kernels, name)
    bias = torch.randn(150).to(DEVICE)
    out = kernels.quantized_linear_triton(x, weight, scale, 4 if num_columns > 24 else 8, bias)
    assert_close(out, x, exact, bias)


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "has_tensor_cores", "expected"),
    [
        (2, torch.float16, True, "gemv"), (3, torch.float16, True, "split_k_gemm"),
        (64, torch.bfloat16, True, "split_k_gemm"),
        (65, torch.float16, True, "decoded_gemm"), (32, torch.float32, True, "gemv"),
        (33, torch.float32, True, "decoded_gemm"),
        (32, torch.float16, False, "gemv"), (33, torch.float16, False, "decoded_gemm"),
    ],
)  # fmt: skip
def test_number_of_tokens_chooses_the_kernel(monkeypatch, num_tokens, dtype, has_tensor_cores, expected):
    monkeypatch.setattr(kernels, "traits_of", lambda device: (2, has_tensor_cores))
    chosen = []
    for name in ("gemv", "split_k_gemm", "decoded_gemm"):

        def record(x, weight, *_, name=name, **__):
            chosen.append(name)
            return x.new_empty(len(x), len(weight))

        monkeypatch.setattr(kernels, name, record)
    weight, scale, _ = matrix(2, 64, 4)
    kernels.quantized_linear_triton(torch.zeros(num_tokens, 64, dtype=dtype, device=DEVICE), weight, scale, 4)
    assert chosen == [expected]


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96), (96,), (2, 3, 96), (30, 96), (70, 96)])
def test_any_shape_of_activations_is_taken(small_gpu, shape):
    weight, scale, exact = matrix(21, 96, 4)
    x = torch.randn(shape).to(DEVICE, torch.float16)
    out = kernels.quantized_linear_triton(x, weight, scale, 4)
    assert out.shape == (*shape[:-1], 21)
    if x.numel():
        assert_close(out, x, exact)


def test_tensors_need_not_be_contiguous(small_gpu):
    weight, scale, exact = matrix(21, 96, 4)
    weight, scale = weight.T.contiguous().T, scale.repeat(1, 2)[:, :1]
    bias = torch.randn(42).to(DEVICE)[::2]
    for x in (torch.randn(96, 5).T, torch.randn(5, 192)[:, ::2], torch.randn(1, 96).expand(5, -1)):
        x = x.to(DEVICE, torch.float16)
        assert_close(kernels.quantized_linear_triton(x, weight, scale, 4, bias), x, exact, bias)
    unaligned = torch.randn(97).to(DEVICE, torch.float16)[1:]
    assert_close(kernels.quantized_linear_triton(unaligned, weight, scale, 4), unaligned, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_need_not_be_on_the_current_device():
    weight, scale, exact = (tensor.to("cuda:1") for tensor in matrix(21, 96, 4))
    x = torch.randn(1, 96).to("cuda:1", torch.float16)
    assert_close(kernels.quantized_linear_triton(x, weight, scale, 4), x, exact)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels were compiled for this GPU by the tests above")
def test_kernels_compile_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, __file__], check=True, env=environment)


def compile_kernels() -> None:
    """Compile every kernel as for sizes that 16 divides; from capability 8.0 on with matrix instructions."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"weight_pointer": "*u8", "scale_pointer": "*fp16", "parts_pointer": "*fp32"}
    single, grouped = {"BITS": 4, "IN_GROUPS": False}, {"BITS": 4, "IN_GROUPS": True}
    for capability, kernel, constants in (
        (75, kernels.gemv_kernel, {**single, "TOKENS": 1, "BLOCK_ROWS": 16, "BLOCK": 512}),
        (75, kernels.gemv_kernel, {**grouped, "TOKENS": 2, "BLOCK_ROWS": 32, "BLOCK": 64}),
        (80, kernels.split_k_kernel, {**single, "BLOCK_TOKENS": 16, "BLOCK_ROWS": 64, "BLOCK": 64}),
        (90, kernels.split_k_kernel, {**grouped, "BLOCK_TOKENS": 16, "BLOCK_ROWS": 64, "BLOCK": 64}),
        (75, kernels.decode_kernel, {**grouped, "BLOCK": 1024}),
        (75, kernels.finish_kernel, {"IN_GROUPS": False, "HAS_BIAS": True, "BLOCK": 512}),
    ):
        names = kernel.arg_names
        signature = {name: types.get(name, "*fp16" if name.endswith("_pointer") else "i32") for name in names}
        signature |= dict.fromkeys(constants, "constexpr")
        values = {(names.index(name),): value for name, value in constants.items()}
        aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in constants}
        compiled = compile_kernel(ASTSource(kernel, signature, values, aligned), GPUTarget("cuda", capability, 32))
        assert ("mma" in compiled.asm["ptx"]) == (kernel is kernels.split_k_kernel), kernel


if __name__ == "__main__":
    compile_kernels()
