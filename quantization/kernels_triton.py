"""Quantized linear layers on GPUs, by Triton kernels that read the stored layout of functional.py; import it lazily.

Three ways, by the number of tokens M:
    few     every program multiplies some rows by all tokens, over a part of the input features; sums are fp32
    some    tiles for tensor cores, which Triton uses from compute capability 8.0 on
    many    rows are decoded, some at a time, and multiplied by the vendor's library
Shapes: `N` output features, `K` input features, `G` groups of a row. A byte holds one weight of 8 bits or two of 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_TOKENS, SOME_TOKENS = 8, 64
DECODED_BYTES = 64 * 2**20  # of a weight at once for many tokens; `glm-hf plan` counts them
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16  # bytes of a row that a program reads at once; they share a scale
PROGRAMS_PER_PROCESSOR = 4


def quantized_linear_triton(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """Return what `quantized_linear` does, for tensors on one CUDA device."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()  # (M, K)
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    arguments = (tokens, weight, weight_scale, bits, bias)
    has_block = block_bytes(weight.shape[1], weight_scale.shape[1]) >= SMALLEST_BLOCK
    if not tokens.numel() or not weight.numel():
        out = tokens.new_zeros(len(tokens), len(weight))
    elif has_block and len(tokens) <= FEW_TOKENS:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        out = multiply_few(*arguments, num_programs=processors * PROGRAMS_PER_PROCESSOR)
    elif has_block and len(tokens) <= SOME_TOKENS and x.dtype != torch.float32 and has_tensor_cores(x.device):
        out = multiply_some(*arguments)
    else:
        out = multiply_many(*arguments)
    return out.view(*x.shape[:-1], len(weight))


def has_tensor_cores(device: torch.device) -> bool:
    """Tell whether Triton's matrix products use the tensor cores of a CUDA device."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def block_bytes(row_bytes: int, num_groups: int) -> int:
    """Return how many bytes of a row a program reads at once: a power of two that lies inside one group."""
    if num_groups == 1:
        return LARGEST_BLOCK
    group_bytes = row_bytes // num_groups
    return min(LARGEST_BLOCK, group_bytes & -group_bytes)


def multiply_few(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None, *, num_programs: int
) -> Tensor:
    """Return `(M, N)` for a few tokens `(M, K)`, with about `num_programs` programs; the same for the same number."""
    (num_tokens, _), (num_rows, row_bytes) = x.shape, weight.shape
    num_groups, block_rows = weight_scale.shape[1], 32
    block = block_bytes(row_bytes, num_groups)
    num_blocks = triton.cdiv(row_bytes, block)
    num_splits = max(1, min(num_blocks, num_programs // triton.cdiv(num_rows, block_rows)))
    bytes_per_split = triton.cdiv(num_blocks, num_splits) * block
    parts = x.new_empty(triton.cdiv(row_bytes, bytes_per_split), num_tokens, num_rows, dtype=torch.float32)
    grid = (triton.cdiv(num_rows, block_rows), len(parts))
    few_kernel[grid](
        *(x, weight, weight_scale, parts, num_rows, row_bytes, num_groups, row_bytes // num_groups, bytes_per_split),
        BITS=bits,
        TOKENS=num_tokens,
        PADDED_TOKENS=triton.next_power_of_2(num_tokens),
        BLOCK_ROWS=block_rows,
        BLOCK=block,
    )
    out = parts.sum(0)
    return (out if bias is None else out + bias.float()).to(x.dtype)


@triton.jit
def few_kernel(
    x_pointer, weight_pointer, scale_pointer, parts_pointer,
    num_rows, row_bytes, num_groups, group_bytes, bytes_per_split,
    BITS: tl.constexpr, TOKENS: tl.constexpr, PADDED_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the products of some rows and all tokens, summed up over one part of the input features."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.arange(0, PADDED_TOKENS)
    first_byte = tl.program_id(1) * bytes_per_split
    totals = tl.zeros((BLOCK_ROWS, PADDED_TOKENS), dtype=tl.float32)
    for start in range(first_byte, min(first_byte + bytes_per_split, row_bytes), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_column, is_row = columns < row_bytes, rows < num_rows
        addresses = weight_pointer + rows[:, None].to(tl.int64) * row_bytes + columns[None, :]
        codes = tl.load(addresses, mask=is_row[:, None] & is_column[None, :], other=0).to(tl.int32)
        scale = tl.load(scale_pointer + rows * num_groups + start // group_bytes, mask=is_row, other=0).to(tl.float32)
        for token in tl.static_range(TOKENS):
            if BITS == 4:
                x_row = x_pointer + token * row_bytes * 2 + columns * 2
                x_first = tl.load(x_row, mask=is_column, other=0).to(tl.float32)
                x_second = tl.load(x_row + 1, mask=is_column, other=0).to(tl.float32)
                first = (((codes >> 4) & 15) ^ 8) - 8
                second = ((codes & 15) ^ 8) - 8
                products = first.to(tl.float32) * x_first[None, :] + second.to(tl.float32) * x_second[None, :]
            else:
                x_row = tl.load(x_pointer + token * row_bytes + columns, mask=is_column, other=0).to(tl.float32)
                products = codes.to(tl.float32) * x_row[None, :]
            total = tl.sum(products, axis=1) * scale
            totals += tl.where(tokens[None, :] == token, total[:, None], 0.0)
    targets = parts_pointer + (tl.program_id(1) * TOKENS + tokens[None, :]) * num_rows + rows[:, None]
    tl.store(targets, totals, mask=(rows[:, None] < num_rows) & (tokens[None, :] < TOKENS))


def multiply_some(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """Return `(M, N)` for some tokens `(M, K)`."""
    (num_tokens, _), (num_rows, row_bytes) = x.shape, weight.shape
    num_groups = weight_scale.shape[1]
    block_tokens, block_rows = max(16, min(64, triton.next_power_of_2(num_tokens))), 64
    out = x.new_empty(num_tokens, num_rows)
    some_kernel[(triton.cdiv(num_rows, block_rows), triton.cdiv(num_tokens, block_tokens))](
        *(x, weight, weight_scale, out if bias is None else bias, out),
        *(num_tokens, num_rows, row_bytes, num_groups, row_bytes // num_groups),
        BITS=bits,
        HAS_BIAS=bias is not None,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK=min(64, block_bytes(row_bytes, num_groups)),
    )
    return out


@triton.jit
def some_kernel(
    x_pointer, weight_pointer, scale_pointer, bias_pointer, out_pointer,
    num_tokens, num_rows, row_bytes, num_groups, group_bytes,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the products of some rows and some tokens."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_row, is_token = rows < num_rows, tokens < num_tokens
    totals = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, row_bytes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_column = columns < row_bytes
        addresses = weight_pointer + rows[None, :].to(tl.int64) * row_bytes + columns[:, None]  # (BLOCK, BLOCK_ROWS)
        codes = tl.load(addresses, mask=is_column[:, None] & is_row[None, :], other=0).to(tl.int32)
        scale = tl.load(scale_pointer + rows * num_groups + start // group_bytes, mask=is_row, other=0).to(tl.float32)
        is_x = is_token[:, None] & is_column[None, :]
        if BITS == 4:
            x_block = x_pointer + tokens[:, None] * row_bytes * 2 + columns[None, :] * 2
            x_first = tl.load(x_block, mask=is_x, other=0)
            x_second = tl.load(x_block + 1, mask=is_x, other=0)
            first = ((((codes >> 4) & 15) ^ 8) - 8).to(x_first.dtype)
            second = (((codes & 15) ^ 8) - 8).to(x_first.dtype)
            products = tl.dot(x_first, first, input_precision="ieee")
            products = tl.dot(x_second, second, products, input_precision="ieee")
        else:
            x_block = tl.load(x_pointer + tokens[:, None] * row_bytes + columns[None, :], mask=is_x, other=0)
            products = tl.dot(x_block, codes.to(x_block.dtype), input_precision="ieee")
        totals += products * scale[None, :]
    if HAS_BIAS:
        totals += tl.load(bias_pointer + rows, mask=is_row, other=0).to(tl.float32)[None, :]
    targets = out_pointer + tokens[:, None] * num_rows + rows[None, :]
    tl.store(targets, totals.to(out_pointer.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


def multiply_many(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """Return `(M, N)` for many tokens `(M, K)`; scales of rows come after the sums, those of groups before."""
    out = x.new_empty(len(x), len(weight))
    in_groups = weight_scale.shape[1] > 1
    step = max(64, DECODED_BYTES // (x.shape[1] * x.element_size()))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        sums = product_in_fp32(x, decode(weight[rows], weight_scale[rows] if in_groups else None, bits, x.dtype))
        if not in_groups:
            sums *= weight_scale[rows, 0].float()
        if bias is not None:
            sums += bias[rows].float()
        out[:, rows] = sums
    return out


def product_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` with sums and result in fp32, in which sums of fp16 codes cannot overflow."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def decode(weight: Tensor, weight_scale: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix `(N, K)` of codes, which is exact, or of codes times scales."""
    num_rows, row_bytes = weight.shape
    num_groups = 1 if weight_scale is None else weight_scale.shape[1]
    out = torch.empty(num_rows, row_bytes * 8 // bits, dtype=dtype, device=weight.device)
    decode_kernel[(num_rows, triton.cdiv(row_bytes, 1024))](
        *(
            weight,
            weight if weight_scale is None else weight_scale,
            out,
            row_bytes,
            num_groups,
            row_bytes // num_groups,
        ),
        BITS=bits,
        IS_SCALED=weight_scale is not None,
        BLOCK=1024,
    )
    return out


@triton.jit
def decode_kernel(
    weight_pointer, scale_pointer, out_pointer, row_bytes, num_groups, group_bytes,
    BITS: tl.constexpr, IS_SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weights of one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < row_bytes
    codes = tl.load(weight_pointer + row * row_bytes + columns, mask=is_column, other=0).to(tl.int32)
    scale = 1.0
    if IS_SCALED:
        scale = tl.load(scale_pointer + row * num_groups + columns // group_bytes, mask=is_column, other=0).to(
            tl.float32
        )
    dtype = out_pointer.dtype.element_ty
    if BITS == 4:
        targets = out_pointer + row * row_bytes * 2 + columns * 2
        tl.store(targets, (((((codes >> 4) & 15) ^ 8) - 8).to(tl.float32) * scale).to(dtype), mask=is_column)
        tl.store(targets + 1, ((((codes & 15) ^ 8) - 8).to(tl.float32) * scale).to(dtype), mask=is_column)
    else:
        tl.store(out_pointer + row * row_bytes + columns, (codes.to(tl.float32) * scale).to(dtype), mask=is_column)
