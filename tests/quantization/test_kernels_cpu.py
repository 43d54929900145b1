import importlib.util
import logging
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from glm_hf.quantization import kernels_cpu as kernels
from glm_hf.quantization import quantize_weight, quantized_linear, unpack_int4

NAMES = ["plain C", "AVX2", "AVX-512", "AVX-512 VNNI"]
# Of the largest output: fp32 sums; fp16's and bf16's own rounding of the output.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.fixture(scope="module")
def library() -> kernels.KernelLibrary:
    found = kernels.kernel_library()
    if found is None:
        pytest.skip("the C kernels were not built here")
    return found


def matrix(num_rows: int, num_columns: int, bits: int, num_groups: int = 1) -> tuple[torch.Tensor, ...]:
    """Return codes, scales and the fp64 matrix that they stand for."""
    weight, scale = quantize_weight(
        torch.randn(num_rows, num_columns) * 0.02, bits=bits, group_size=num_columns // num_groups
    )
    codes = unpack_int4(weight) if bits == 4 else weight
    return weight, scale, (codes.double().unflatten(1, (num_groups, -1)) * scale.double()[..., None]).flatten(1)


def assert_close(out: torch.Tensor, x: torch.Tensor, exact: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    expected = nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
    assert out.dtype == x.dtype
    assert (out.double() - expected).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max()


@pytest.mark.parametrize("level", range(4), ids=NAMES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("num_columns", "num_groups"),
    [(2, 1), (96, 1), (272, 1), (4160, 1), (256, 4), (4096, 32), (384, 3), (6144, 2), (192, 3), (2304, 12)],
)
def test_every_instruction_set_gives_the_product(library, level, dtype, bits, num_columns, num_groups):
    if level > library.level:
        pytest.skip("this CPU does not have these instructions")
    weight, scale, exact = matrix(21, num_columns, bits, num_groups)
    bias = torch.randn(21)
    for num_tokens in (1, 2, 3, 4, 7, 18):
        x = torch.randn(num_tokens, num_columns).to(dtype)
        assert_close(library.linear(x, weight, scale, bits, bias, level), x, exact, bias)
        assert_close(library.linear(x, weight, scale, bits, None, level), x, exact)


@pytest.mark.parametrize("level", range(4), ids=NAMES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_overflow(library, level, bits, num_tokens, sign):
    if level > library.level:
        pytest.skip("this CPU does not have these instructions")
    num_columns = 2**15
    codes = torch.full((9, num_columns), 7 if bits == 4 else 127, dtype=torch.int8)
    codes[::2] *= -1
    weight = (codes[:, ::2] << 4 | codes[:, 1::2] & 15).view(torch.uint8) if bits == 4 else codes
    for dtype in TOLERANCES:
        x = torch.full((num_tokens, num_columns), sign * 3.0, dtype=dtype)
        scale = torch.full((9, 1), 2**-12, dtype=torch.float16)
        assert_close(library.linear(x, weight, scale, bits, None, level), x, codes.double() * 2**-12)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_outlier_features_cost_little_accuracy(library, dtype, num_tokens):
    weight, scale, exact = matrix(64, 8192, 4)
    x = torch.randn(num_tokens, 8192)
    x[:, 7] *= 300
    x = x.to(dtype)
    assert_close(library.linear(x, weight, scale, 4), x, exact)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_what_is_not_finite_stays_so(library, dtype, num_tokens):
    weight, scale, exact = matrix(16, 4096, 4)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(num_tokens, 4096).to(dtype)
        x[0, 100] = value
        out = library.linear(x, weight, scale, 4)
        assert not out[0].isfinite().any()
        if num_tokens > 1:
            assert_close(out[1:], x[1:], exact)


def test_tiny_and_zero_activations_give_zero(library):
    weight, scale, _ = matrix(16, 256, 4)
    for value in (0.0, 1e-40):
        assert not library.linear(torch.full((2, 256), value), weight, scale, 4).any()


def test_outputs_round_to_nearest_even_and_overflow_to_infinity(library):
    weight = torch.tensor([[1, 0]], dtype=torch.int8)
    scale = torch.ones(1, 1, dtype=torch.float16)
    values = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.0, 65520.0, 1e6]
    values += [2.0**-24, 2.0**-25, 3 * 2.0**-25, 6e-5, 2.0**-14, 1e-9, 3.3e38]
    for value in [*values, *(-value for value in values)]:
        bias = torch.tensor([value])
        for dtype in (torch.float16, torch.bfloat16):
            out = library.linear(torch.zeros(1, 2, dtype=dtype), weight, scale, 8, bias)
            assert torch.equal(out[0], bias.to(dtype)), (value, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_scales_and_biases_are_read_in_full_range(library, dtype):
    scale = torch.tensor([2.0**-24, 6e-8, 6.1e-5, 65504.0, 1.0, 0.0]).half()[:, None]
    weight = torch.ones(6, 2, dtype=torch.int8)
    for level in range(library.level + 1):
        out = library.linear(torch.ones(1, 2), weight, scale, 8, None, level)
        torch.testing.assert_close(out[0], 2 * scale[:, 0].float(), rtol=1e-5, atol=0)
    bias = torch.tensor([2.0**-24, -6e-5, 1.5, 60000.0, -0.1, 0.0]).to(dtype)
    out = library.linear(torch.zeros(1, 2), weight, scale, 8, bias)
    assert torch.equal(out[0], bias.float())


def test_any_not_a_number_stays_one(library):
    weight, scale, _ = matrix(1, 2, 8)
    bias = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for value in bias.split(1):
        for dtype in TOLERANCES:
            assert library.linear(torch.zeros(1, 2, dtype=dtype), weight, scale, 8, value).isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_columns", [2, 30, 40, 96])
@pytest.mark.parametrize("num_groups", [1, 5])
@pytest.mark.parametrize("level", [0, 3], ids=["plain C", "AVX-512"])
def test_decoded_weights_are_rounded_once(library, bits, num_columns, num_groups, level):
    weight, scale, exact = matrix(5, num_columns * num_groups, bits, num_groups)
    assert torch.equal(library.decode(weight, scale, bits, min(level, library.level)), exact.float().bfloat16())


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_public_function_takes_few_and_many_tokens(monkeypatch, num_groups, bits, dtype, num_tokens):
    monkeypatch.setattr(kernels, "DECODED_BYTES", 2 * 384 * 64)
    weight, scale, exact = matrix(150, 384, bits, num_groups)
    x, bias = torch.randn(2, num_tokens, 384).to(dtype), torch.randn(150).to(dtype)
    assert_close(quantized_linear(x, weight, scale, bits, bias), x, exact, bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_odd_group_sizes_are_right_too(bits):
    weight, scale, exact = matrix(20, 96, bits, 8)
    x = torch.randn(3, 96)
    assert_close(quantized_linear(x, weight, scale, bits), x, exact)


def test_all_threads_work_on_a_large_matrix(library):
    weight, scale, exact = matrix(1500, 512, 4)
    x = torch.randn(5, 512)
    threads = torch.get_num_threads()
    outs = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        outs.append(library.linear(x, weight, scale, 4))
    torch.set_num_threads(threads)
    assert_close(outs[0], x, exact)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.fixture
def without_library(monkeypatch, caplog):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels.kernel_library.cache_clear()
    yield caplog
    kernels.kernel_library.cache_clear()


def test_missing_kernels_are_told_once(without_library):
    weight, scale, exact = matrix(64, 128, 4)
    x = torch.randn(2, 128)
    with without_library.at_level(logging.WARNING):
        for _ in range(3):
            assert_close(quantized_linear(x, weight, scale, 4), x, exact)
    [record] = without_library.records
    assert "without its C kernels" in record.message


@pytest.mark.parametrize(("bits", "num_groups"), [(4, 1), (8, 1), (4, 4), (4, 8), (8, 4), (4, 32)])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("num_rows", [1600, 30])
def test_torchs_own_kernels_stand_in(without_library, bits, num_groups, num_tokens, num_rows):
    weight, scale, exact = matrix(num_rows, 512, bits, num_groups)
    x, bias = torch.randn(num_tokens, 512).bfloat16(), torch.randn(num_rows).bfloat16()
    assert_close(quantized_linear(x, weight, scale, bits, bias), x, exact, bias)


def test_packed_copy_follows_the_codes(without_library):
    weight, scale, _ = matrix(64, 128, 4)
    other, _, exact = matrix(64, 128, 4)
    x = torch.randn(2, 128).bfloat16()
    quantized_linear(x, weight, scale, 4)
    with torch.no_grad():
        weight.copy_(other)
    expected = quantized_linear(x, other, scale, 4)
    assert torch.equal(quantized_linear(x, weight, scale, 4), expected)


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs objdump, for x86")
def test_kernels_use_the_instructions_of_their_set_only(library):
    spec = importlib.util.find_spec("glm_hf.quantization._kernels_cpu")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", spec.origin], capture_output=True, text=True, check=True
    ).stdout
    found = 0
    for name, body in re.findall(r"^[0-9a-f]+ <(\w+)[^>]*>:\n((?:.+\n)+)", text, re.MULTILINE):
        if not (suffix := re.search("_(avx2|avx512|vnni)$", name)):
            continue
        found += 1
        instructions = [line.split("\t")[-1] for line in body.splitlines()]
        # Those of SSE, which have no v in front, wait for the upper halves of AVX registers on many processors.
        assert not [line for line in instructions if re.match(r"(?!v)\w+\s.*%[xy]mm", line)], name
        for called in re.findall(r"\tcall +\w+ <([^>+]+)>", body):
            assert called.endswith((suffix[0], "@plt")), (name, called)
    assert found >= 3 * 6


@pytest.mark.parametrize("num_tokens", [kernels.VERY_MANY_TOKENS - 1, kernels.VERY_MANY_TOKENS])
@pytest.mark.parametrize("is_faster", [False, True])
def test_many_tokens_are_multiplied_by_whichever_is_faster(library, monkeypatch, num_tokens, is_faster):
    monkeypatch.setattr(kernels, "kernel_library", lambda: library)
    monkeypatch.setattr(library, "multiplies_fp32_faster", is_faster)
    calls = []
    decode = library.decode
    monkeypatch.setattr(library, "decode", lambda *args, **options: calls.append(1) or decode(*args, **options))
    weight, scale, exact = matrix(96, 256, 4, 2)
    x = torch.randn(num_tokens, 256)
    assert_close(kernels.quantized_linear_cpu(x, weight, scale, 4), x, exact)
    assert bool(calls) == (is_faster and num_tokens == kernels.VERY_MANY_TOKENS)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not name its processor")
def test_the_vendors_library_is_faster_without_avx512_and_on_processors_of_intel(library):
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert library.multiplies_fp32_faster == (library.level < 2 or is_intel)
