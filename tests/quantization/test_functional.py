import numpy as np
import pytest
import torch
from golden import DATA, golden_arrays

from glm_hf.quantization import dequantize_weight, functional, pack_int4, quantize_weight, unpack_int4

LARGEST = {8: 127, 4: 7}


def load_rank(folder: str, rank: int) -> dict[str, torch.Tensor]:
    path = DATA / "cfg2" / folder / "49300" / f"mp_rank_{rank:02d}_model_states.pt"
    return torch.load(path, weights_only=True)["module"]


def stored(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the original's int8 tensor as ours."""
    return weight.view(torch.uint8) if bits == 4 else weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tp_size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_codes_and_scales_are_those_of_the_original_tool(bits, tp_size, rank):
    plain, quantized = load_rank(f"sat_tp{tp_size}", rank), load_rank(f"sat_int{bits}_tp{tp_size}", rank)
    names = [name for name in quantized if name.endswith("weight_scale")]
    assert len(names) == 20
    for name in names:
        weight, weight_scale = quantize_weight(plain[name.removesuffix("_scale")], bits=bits)
        assert torch.equal(weight, stored(quantized[name.removesuffix("_scale")], bits))
        assert torch.equal(weight_scale, quantized[name][:, None])


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantized_weights_are_those_of_the_original_tool(bits):
    quantized, golden = load_rank(f"sat_int{bits}_tp1", 0), golden_arrays("cfg2", "quant.npz")
    names = [name for name in golden if name.startswith(f"dequant.int{bits}.")]
    assert len(names) == 2
    for name in names:
        key = name.removeprefix(f"dequant.int{bits}.")
        weight = dequantize_weight(stored(quantized[key], bits), quantized[f"{key}_scale"][:, None], bits)
        assert torch.equal(weight, golden[name])


def by_hand(weight: torch.Tensor, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantize with numpy, group by group, rounding scale and quotient to fp16."""
    rows, columns = weight.shape
    groups = weight.numpy().reshape(rows, columns // group_size, group_size).astype(np.float32)
    scale = (np.abs(groups).max(-1) / LARGEST[bits]).astype(np.float16)
    quotient = (groups / scale[..., None].astype(np.float32)).astype(np.float16)
    return np.rint(quotient.astype(np.float32)).astype(np.int8).reshape(rows, columns), scale


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 2, 16, 48])
def test_groups_have_scales_of_their_own(bits, group_size):
    weight = (torch.randn(5, 48) * 0.02).half()
    codes, expected_scale = by_hand(weight, bits, group_size or 48)
    quantized, weight_scale = quantize_weight(weight, bits=bits, group_size=group_size)
    assert torch.equal(weight_scale, torch.from_numpy(expected_scale))
    assert torch.equal(unpack_int4(quantized) if bits == 4 else quantized, torch.from_numpy(codes))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 8])
def test_error_is_at_most_half_a_step(bits, group_size):
    weight = torch.randn(7, 64).half()
    quantized, weight_scale = quantize_weight(weight, bits=bits, group_size=group_size)
    again = dequantize_weight(quantized, weight_scale, bits)
    step = weight_scale.repeat_interleave(64 // weight_scale.shape[1], dim=1).float()
    # fp16 rounds the quotient, of up to 127, by at most 1/32, and the product by 1/2048
    assert ((again.float() - weight.float()).abs() <= step * (0.5 + 1 / 32) + weight.abs() / 1024).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_taken_in_fp16(bits, dtype):
    weight = torch.randn(4, 8).to(dtype)
    expected = quantize_weight(weight.half(), bits=bits)
    assert all(map(torch.equal, quantize_weight(weight, bits=bits), expected))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zero(bits):
    weight = torch.zeros(2, 4).half()
    weight[1, 2] = 1
    again = dequantize_weight(*quantize_weight(weight, bits=bits), bits)
    assert torch.equal(again, weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_tiny_weights_keep_their_sign(bits):
    # Here the rounded scale is so small that the released rule overflows: 128 as int8 is -128.
    weight = torch.arange(1, 4096).half()[:, None] * 2.0**-24 * torch.tensor([1.0, -1.0]).half()
    again = dequantize_weight(*quantize_weight(weight, bits=bits), bits)
    assert (again * weight >= 0).all()
    largest = LARGEST[bits]
    assert (again[largest:, 0] > 0).all()
    codes = quantize_weight(weight, bits=bits)[0]
    codes = unpack_int4(codes) if bits == 4 else codes
    assert (codes.min(), codes.max()) == (-largest, largest)


def test_int4_byte_holds_the_even_feature_in_its_high_nibble():
    packed = pack_int4(torch.tensor([[1, -1, -7, 7]], dtype=torch.int8))
    assert packed.tolist() == [[0x1F, 0x97]]


def test_unpacking_returns_every_code():
    codes = torch.arange(-8, 8).to(torch.int8)
    pairs = torch.cartesian_prod(codes, codes)
    packed = pack_int4(pairs)
    assert sorted(packed.flatten().tolist()) == list(range(256))
    assert torch.equal(unpack_int4(packed), pairs)


@pytest.mark.parametrize("bits", [3, 16])
def test_bits_that_are_neither_8_nor_4(bits):
    with pytest.raises(ValueError, match=rf"bits must be 8 or 4, got {bits}"):
        quantize_weight(torch.ones(2, 2), bits=bits)
    with pytest.raises(ValueError, match=rf"bits must be 8 or 4, got {bits}"):
        dequantize_weight(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1).half(), bits)


@pytest.mark.parametrize(
    ("bits", "columns", "group_size"), [(8, 6, 4), (8, 6, 0), (8, 6, 12), (4, 6, 3), (4, 5, None)]
)
def test_group_size_that_does_not_fit(bits, columns, group_size):
    message = rf"group_size must divide the {columns} input features( and be even)?, got"
    with pytest.raises(ValueError, match=message):
        quantize_weight(torch.ones(2, columns), bits=bits, group_size=group_size)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e6])
def test_weights_that_are_not_finite(value):
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"weights must be finite in fp16"):
        quantize_weight(weight, bits=8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "weight",
    [torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 4, dtype=torch.int64), torch.ones(4), torch.ones(2, 2, 4)],
    ids=["int8", "int64", "vector", "three dimensions"],
)
def test_weights_that_are_no_floating_point_matrix(weight, bits):
    with pytest.raises(ValueError, match=r"weight must be a floating point matrix, got \(.*\) torch\."):
        quantize_weight(weight, bits=bits)


@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_matrix_without_rows(bits, group_size):
    weight, weight_scale = quantize_weight(torch.empty(0, 8), bits=bits, group_size=group_size)
    assert (weight.shape, weight_scale.shape) == ((0, bits), (0, 8 // (group_size or 8)))
    assert dequantize_weight(weight, weight_scale, bits).shape == (0, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_matrix_without_columns(bits):
    with pytest.raises(ValueError, match=r"group_size must divide the 0 input features"):
        quantize_weight(torch.empty(3, 0), bits=bits)


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_need_not_be_contiguous(bits, group_size):
    wide = torch.randn(24, 20)
    for weight in (wide.T, wide[:, ::2][:, :8], wide[:12:3, 4:], torch.randn(1, 8).expand(5, 8)):
        assert not weight.is_contiguous()
        expected = quantize_weight(
            weight.clone(memory_format=torch.contiguous_format), bits=bits, group_size=group_size
        )
        assert all(map(torch.equal, quantize_weight(weight, bits=bits, group_size=group_size), expected))
        codes, scale = expected
        again = dequantize_weight(codes.T.contiguous().T, scale.T.contiguous().T, bits)
        assert torch.equal(again, dequantize_weight(codes, scale, bits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(3).half()}, r"weight_scale must be \(3, G\), where G divides 8, got \(3,\)"),
        ({"weight_scale": torch.ones(2, 1).half()}, r"weight_scale must be \(3, G\)"),
        ({"weight_scale": torch.ones(3, 3).half()}, r"weight_scale must be \(3, G\)"),
        ({"weight_scale": torch.ones(3, 0).half()}, r"weight_scale must be \(3, G\)"),
        ({"weight_scale": torch.ones(3, 1).int()}, r"weight_scale must be floating point, got torch.int32"),
        ({"weight": torch.ones(3, 8)}, r"weight must be a torch.uint8 matrix for 4 bits, got \(3, 8\) torch.float32"),
        ({"bits": 8}, r"weight must be a torch.int8 matrix for 8 bits, got \(3, 4\) torch.uint8"),
    ],
)
def test_codes_and_scales_that_do_not_fit_together(change, message):
    weight, weight_scale = quantize_weight(torch.randn(3, 8), bits=4)
    with pytest.raises(ValueError, match=message):
        dequantize_weight(**{"weight": weight, "weight_scale": weight_scale, "bits": 4} | change)


def test_packing_takes_codes_at_any_address():
    codes = torch.randint(-7, 8, (3, 13), dtype=torch.int8)
    for part in (codes[:, 1:], codes[:, :12], codes.T[:12].T, codes.flatten()[1:9]):
        assert torch.equal(unpack_int4(pack_int4(part)), part)


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", [8, 4])
def test_large_matrices_are_quantized_in_blocks_of_rows(monkeypatch, bits, group_size):
    weight = torch.randn(25, 16)
    whole = quantize_weight(weight, bits=bits, group_size=group_size)
    monkeypatch.setattr(functional, "WEIGHTS_AT_ONCE", 7 * 16)
    for parts, expected in zip(quantize_weight(weight, bits=bits, group_size=group_size), whole, strict=True):
        assert torch.equal(parts, expected)
