"""Attention of one new token of each row to its cached tokens on a GPU, by Triton kernels; import it lazily.

Parts of a row's tokens are read by programs of their own, whose results another kernel combines. Sums are fp32.

Shapes: `M` rows of the batch, `D` hidden, `H` heads, `K` head dim, `S` tokens that fit the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CACHE_BLOCK = 64  # tokens of the cache that a program reads at once
CACHE_PARTS = 4


def attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, num_heads: int, scaling: float) -> Tensor:
    """Return what the queries `(M, D)` of one token of each row find among its keys and values: `(M, D)`."""
    num_rows, hidden = query.shape
    size = hidden // num_heads
    part_length = triton.cdiv(triton.cdiv(keys.shape[2], CACHE_PARTS), CACHE_BLOCK) * CACHE_BLOCK
    num_parts = triton.cdiv(keys.shape[2], part_length)
    block = triton.next_power_of_2(size)
    sums = query.new_empty(num_rows * num_heads, num_parts, block, dtype=torch.float32)
    extremes = query.new_empty(num_rows * num_heads, num_parts, 2, dtype=torch.float32)
    attend_kernel[(num_rows * num_heads, num_parts)](
        *(query, keys, values, lengths, sums, extremes),
        *(num_heads, size, keys.stride(0), keys.stride(1), part_length, scaling),
        BLOCK=block,
        BLOCK_TOKENS=CACHE_BLOCK,
    )
    out = torch.empty_like(query)
    combine_kernel[(num_rows * num_heads,)](
        sums, extremes, out, num_parts, size, BLOCK=block, PARTS=triton.next_power_of_2(num_parts)
    )
    return out


@triton.jit
def attend_kernel(
    query_pointer, keys_pointer, values_pointer, lengths_pointer, sums_pointer, extremes_pointer,
    num_heads, size, row_stride, head_stride, part_length, scaling,
    BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Write a head's weighted sum of values over one part of its tokens, its largest score and its sum of weights."""
    token = tl.program_id(0) // num_heads
    columns = tl.arange(0, BLOCK)
    is_column = columns < size
    query = tl.load(query_pointer + tl.program_id(0) * size + columns, mask=is_column, other=0).to(tl.float32)
    cache = token.to(tl.int64) * row_stride + tl.program_id(0) % num_heads * head_stride
    length = tl.load(lengths_pointer + token)
    start = tl.program_id(1) * part_length
    end = tl.minimum(start + part_length, length)
    largest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(start, end, BLOCK_TOKENS):
        places = first + tl.arange(0, BLOCK_TOKENS)
        offsets = cache + places[:, None] * size + columns[None, :]
        is_here = (places < end)[:, None] & is_column[None, :]
        keys = tl.load(keys_pointer + offsets, mask=is_here, other=0).to(tl.float32)
        scores = tl.sum(keys * query[None, :], axis=1) * scaling
        scores = tl.where(places < end, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        weights = tl.exp(scores - new_largest)
        shrink = tl.exp(largest - new_largest)
        values = tl.load(values_pointer + offsets, mask=is_here, other=0).to(tl.float32)
        sums = sums * shrink + tl.sum(values * weights[:, None], axis=0)
        total = total * shrink + tl.sum(weights, axis=0)
        largest = new_largest
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_pointer + part * BLOCK + columns, sums)
    tl.store(extremes_pointer + part * 2 + tl.arange(0, 1), largest)
    tl.store(extremes_pointer + part * 2 + 1 + tl.arange(0, 1), total)


@triton.jit
def combine_kernel(
    sums_pointer, extremes_pointer, out_pointer, num_parts, size, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """Write a head's result from those of all parts, of which some may have no token."""
    parts = tl.arange(0, PARTS)
    is_part = parts < num_parts
    first = tl.program_id(0) * num_parts
    largest = tl.load(extremes_pointer + (first + parts) * 2, mask=is_part, other=float("-inf"))
    total = tl.load(extremes_pointer + (first + parts) * 2 + 1, mask=is_part, other=0)
    shrink = tl.exp(largest - tl.max(largest, axis=0))
    columns = tl.arange(0, BLOCK)
    sums = tl.load(sums_pointer + (first + parts)[:, None] * BLOCK + columns[None, :], mask=is_part[:, None], other=0)
    out = tl.sum(sums * shrink[:, None], axis=0) / tl.sum(total * shrink, axis=0)
    target = out_pointer + tl.program_id(0) * size + columns
    tl.store(target, out.to(out_pointer.dtype.element_ty), mask=columns < size)
