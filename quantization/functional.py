"""Quantize weights to INT8 or INT4 and back, in plain torch: the released rule, and what kernels must equal.

Shapes: `N` output features, `K` input features, `G` groups of `K/G` input features.

Stored layout of one quantized matrix:
    weight        int8 (N, K) for 8 bits; uint8 (N, K/2) for 4 bits, the even input feature in the high nibble and the
                  odd one in the low nibble, both as two's complement
    weight_scale  fp16 (N, G); G = 1 (one scale per row) is the released form
A weight is `code * weight_scale`. Codes lie in [-127, 127] and [-7, 7].
Source: GLM-130B (arXiv 2210.02414), section 2.5 and appendix B; the released code rounds scale and quotient to fp16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

LARGEST_CODES = {8: 127, 4: 7}
EMBEDDING_BITS = 8  # of quantized embeddings and output matrices, one scale per row, whatever the layers have
ROWS_AT_ONCE = 2048
WEIGHTS_AT_ONCE = 2**24  # to be quantized, which takes several numbers for each


def quantize_weight(weight: Tensor, *, bits: int, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """
    Quantize a matrix symmetrically, with one scale per row or per group of a row.

    Scale and quotient are rounded to fp16, as the released tool does, so that codes are the same bit for bit. Codes
    that this rounding would push out of range, in rows with weights below 0.001 only, are clamped.

    Args:
        weight: `(N, K)`, floating point; taken in fp16.
        bits: Bits of a code, 8 or 4.
        group_size: Input features per scale, which must divide `K`; the whole row by default.

    Returns:
        `weight` and `weight_scale` in the stored layout.

    Raises:
        ValueError: If `weight` is not such a matrix, `bits` or `group_size` does not fit it, or a weight is not finite
            in fp16.
    """
    _largest_code(bits)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating point matrix, got {tuple(weight.shape)} {weight.dtype}")
    num_columns = weight.shape[-1]
    group_size = num_columns if group_size is None else group_size
    if group_size < 1 or num_columns % group_size or (bits == 4 and group_size % 2):
        raise ValueError(
            f"group_size must divide the {num_columns} input features{' and be even' * (bits == 4)}, got {group_size}"
        )
    return quantize_by_absmax(weight, absmax_of_groups(weight, group_size), bits)


def absmax_of_groups(weight: Tensor, group_size: int) -> Tensor:
    """Return the largest magnitude, in fp16, of every group of a matrix `(N, K)`: `(N, K/group_size)`."""
    blocks = weight.split(_quantized_at_once(weight))
    return torch.cat([block.half().unflatten(-1, (-1, group_size)).abs().amax(-1) for block in blocks])


def quantize_by_absmax(weight: Tensor, absmax: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize a matrix `(N, K)` as `quantize_weight` does, given the largest magnitudes `(N, G)` of its groups."""
    largest = _largest_code(bits)
    weight_scale = (absmax.half() / largest).half()  # (N, G)
    if not weight_scale.isfinite().all():
        raise ValueError("weights must be finite in fp16 to be quantized, but some are infinite or not a number")
    divisor = weight_scale.masked_fill(weight_scale == 0, 1)[..., None]  # (N, G, 1)
    dtype = torch.uint8 if bits == 4 else torch.int8
    quantized = torch.empty(len(weight), weight.shape[1] * bits // 8, dtype=dtype, device=weight.device)
    step = _quantized_at_once(weight)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        groups = weight[rows].half().unflatten(-1, (absmax.shape[-1], -1))  # (rows, G, K/G)
        quotients = (groups / divisor[rows]).round_().clamp_(-largest, largest)
        codes = quotients.float().to(torch.int8).flatten(-2)  # torch's cast from fp16 is several times slower
        quantized[rows] = pack_int4(codes) if bits == 4 else codes
    return quantized, weight_scale


def _quantized_at_once(weight: Tensor) -> int:
    """Return how many rows of a matrix are quantized at once."""
    return max(1, WEIGHTS_AT_ONCE // weight.shape[1])


def dequantize_weight(weight: Tensor, weight_scale: Tensor, bits: int) -> Tensor:
    """
    Return the fp16 matrix `(N, K)` that a quantized one stands for, each product rounded once.

    Args:
        weight: Codes in the stored layout.
        weight_scale: `(N, G)`, floating point.
        bits: Bits of a code, 8 or 4.

    Raises:
        ValueError: If shapes or dtypes do not fit together.
    """
    require_stored(weight, weight_scale, bits)
    codes = unpack_int4(weight) if bits == 4 else weight.as_subclass(Tensor)  # (N, K)
    groups = codes.half().unflatten(-1, (weight_scale.shape[-1], -1))  # (N, G, K/G)
    return (groups * weight_scale[..., None]).flatten(-2).half()


def quantized_linear_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """
    Return `x @ (code * weight_scale).T + bias` `(..., N)`, computed in fp32 and rounded once to the dtype of `x`.

    Arguments and errors are those of `quantized_linear` in ops.py, which kernels compute faster.
    """
    require_layout(x, weight, weight_scale, bits, bias)
    out = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype, device=x.device)
    for start, rows in dequantize_rows(weight, weight_scale, bits):
        out[..., start : start + len(rows)] = nn.functional.linear(
            x.float(), rows, None if bias is None else bias[start : start + len(rows)].float()
        )
    return out


def dequantize_rows(weight: Tensor, weight_scale: Tensor, bits: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, some rows of the fp32 matrix), so that it is never there as a whole."""
    weight = weight.as_subclass(Tensor)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = weight[start : start + ROWS_AT_ONCE]
        codes = unpack_int4(part) if bits == 4 else part  # (rows, K)
        scale = weight_scale[start : start + ROWS_AT_ONCE].float()[..., None]  # (rows, G, 1)
        yield start, (codes.float().unflatten(-1, (weight_scale.shape[-1], -1)) * scale).flatten(-2)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes `(..., K)` of 4 bits, in [-8, 7], into uint8 `(..., K/2)`; `K` must be even."""
    pairs = codes.clone(memory_format=torch.contiguous_format).view(torch.int16)  # the even code in the low byte
    return ((pairs << 4) & 0xF0 | (pairs >> 8) & 0x0F).to(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the int8 codes `(..., K)` that `pack_int4` has packed into uint8 `(..., K/2)`."""
    packed = packed.as_subclass(Tensor)
    even, odd = packed.view(torch.int8) >> 4, (packed << 4).view(torch.int8) >> 4
    return torch.stack((even, odd), dim=-1).flatten(-2)


def fp16_scale(weight_scale: Tensor) -> Tensor:
    """
    Return scales in fp16, as kernels read them.

    Raises:
        ValueError: If fp16 cannot hold one of them exactly.
    """
    rounded = weight_scale.half()
    if weight_scale.dtype != torch.float16 and not torch.equal(rounded.to(weight_scale.dtype), weight_scale):
        raise ValueError(f"weight_scale must be exact in fp16, got {weight_scale.dtype} values that fp16 would round")
    return rounded


def require_layout(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None = None) -> None:
    """Raise ValueError unless the tensors are a quantized matrix in the stored layout and what it is applied to."""
    require_stored(weight, weight_scale, bits)
    num_columns = weight.shape[1] * 8 // bits
    if not x.is_floating_point() or x.shape[-1:] != (num_columns,):
        raise ValueError(f"x must be floating point (..., {num_columns}), got {tuple(x.shape)} {x.dtype}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != (len(weight),)):
        raise ValueError(f"bias must be floating point ({len(weight)},), got {tuple(bias.shape)} {bias.dtype}")
    devices = {tensor.device.type for tensor in (x, weight, weight_scale, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")


def require_stored(weight: Tensor, weight_scale: Tensor, bits: int) -> None:
    """Raise ValueError unless the tensors are a quantized matrix in the stored layout."""
    _largest_code(bits)
    dtype = torch.uint8 if bits == 4 else torch.int8
    if weight.dtype != dtype or weight.dim() != 2:
        raise ValueError(f"weight must be a {dtype} matrix for {bits} bits, got {tuple(weight.shape)} {weight.dtype}")
    num_rows, num_columns, shape = len(weight), weight.shape[1] * 8 // bits, weight_scale.shape
    if len(shape) != 2 or shape[0] != num_rows or shape[1] == 0 or num_columns % shape[1]:
        raise ValueError(
            f"weight_scale must be ({num_rows}, G), where G divides {num_columns}, got {tuple(weight_scale.shape)}"
        )
    if not weight_scale.is_floating_point():
        raise ValueError(f"weight_scale must be floating point, got {weight_scale.dtype}")


def _largest_code(bits: int) -> int:
    if bits not in LARGEST_CODES:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    return LARGEST_CODES[bits]
