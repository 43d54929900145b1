"""One new token of each row through a layer of a quantized model on a GPU, by eight Triton kernels; import it lazily.

    norm              a = LN(x)
    query_key_value   q, k, v = a W + b; rotary positions on q and k; k and v go to their places in the cache
    attend, combine   c = attention(q, keys, values), over parts of the cache and then over the parts
    linear            h = alpha a + c W + b
    norm              m = LN(h)
    gated             g = (m W + b) GELU(m W' + b')
    linear            out = alpha m + g W + b

No size depends on the lengths of the rows, which are read from memory, so a step can be captured as a CUDA graph.
Sums are fp32; what torch rounds to the dtype of the model is rounded here.

Shapes: `M` rows of the batch, `D` hidden, `F` inner width, `H` heads, `K` head dim, `S` tokens that fit the cache.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm_hf.quantization.kernels_triton import (
    SMALLEST_BLOCK,
    add_products,
    all_of_8_bits,
    block_bytes,
    high_of_4_bits,
    load_codes,
    low_of_4_bits,
)
from glm_hf.quantization.kernels_triton_attention import attend

FEW_TOKENS = 8  # at most multiplied one by one; more by tensor cores, if there are any, in tiles of TILE_TOKENS
TILE_TOKENS, TILE_ROWS = 16, 16


@dataclass
class Linear:
    """A quantized linear layer: codes and scales in the stored layout of functional.py, and its bias."""

    weight: Tensor
    weight_scale: Tensor
    bits: int
    bias: Tensor


@dataclass
class Layer:
    """A layer of the model; the norms are weights, biases and epsilons of the first and the second."""

    query_key_value: Linear
    dense: Linear
    up: Linear
    down: Linear
    norms: tuple[tuple[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]
    num_heads: int
    alpha: float
    scaling: float


def decode_layer(
    layer: Layer,
    x: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    has_tensor_cores: bool,
) -> Tensor:
    """
    Return the layer's states `(M, D)` of one new token of each row, and write its keys and values.

    Args:
        layer: The layer, on the device of all tensors.
        x: `(M, D)`, fp16, bf16 or fp32, contiguous.
        cos: `(M, K)`, as `apply_rotary` takes them.
        signed_sin: `(M, K)`.
        keys: `(M, H, S, K)`, contiguous in its last two dimensions.
        values: `(M, H, S, K)`, laid out as the keys.
        lengths: `(M)` int32, tokens of each row with the new one.
        has_tensor_cores: Whether Triton uses those of the device, for more than a few rows in fp16 or bf16.

    Raises:
        ValueError: If weights have groups that are too short to be read.
    """
    num_rows, hidden = x.shape
    tokens = tokens_at_once(num_rows, has_tensor_cores and x.dtype != torch.float32)
    token_blocks = triton.cdiv(num_rows, tokens)
    size = hidden // layer.num_heads
    normed = norm(x, *layer.norms[0])
    query = torch.empty_like(x)
    qkv = layer.query_key_value
    block_rows, grid_rows, constants = tiling(qkv, tokens, size // 2)
    query_key_value_kernel[(layer.num_heads * grid_rows, token_blocks)](
        *(normed, qkv.weight, qkv.weight_scale, qkv.bias, cos, signed_sin, query, keys, values, lengths),
        *(num_rows, qkv.weight.shape[1], qkv.weight_scale.shape[1], size // 2, keys.stride(0), keys.stride(1)),
        NUM_HEADS=layer.num_heads,
        ROWS=block_rows,
        **constants,
    )
    context = attend(query, keys, values, lengths, layer.num_heads, layer.scaling)
    states = linear(layer.dense, context, normed, layer.alpha, tokens)
    normed = norm(states, *layer.norms[1])
    gated = x.new_empty(num_rows, len(layer.up.weight) // 2)
    block_rows, grid_rows, constants = tiling(layer.up, tokens, gated.shape[1])
    gated_kernel[(grid_rows, token_blocks)](
        *(normed, layer.up.weight, layer.up.weight_scale, layer.up.bias, gated),
        *(num_rows, layer.up.weight.shape[1], layer.up.weight_scale.shape[1], gated.shape[1]),
        ROWS=block_rows,
        **constants,
    )
    return linear(layer.down, gated, normed, layer.alpha, tokens)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the layer norm `(M, D)` of `x` `(M, D)`."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    norm_kernel[(len(x),)](x, weight, bias, out, x.shape[1], eps, BLOCK=block, num_warps=8 if block >= 4096 else 4)
    return out


def linear(layer: Linear, x: Tensor, residual: Tensor, alpha: float, tokens: int) -> Tensor:
    """Return `alpha * residual + x @ weight.T + bias` `(M, N)` of `x` `(M, K)`, by so many tokens at once."""
    out = x.new_empty(len(x), len(layer.weight))
    block_rows, grid_rows, constants = tiling(layer, tokens, len(layer.weight))
    linear_kernel[(grid_rows, triton.cdiv(len(x), tokens))](
        *(x, layer.weight, layer.weight_scale, layer.bias, residual, out),
        *(len(x), layer.weight.shape[1], layer.weight_scale.shape[1], len(layer.weight), alpha),
        ROWS=block_rows,
        **constants,
    )
    return out


def tokens_at_once(num_tokens: int, has_tensor_cores: bool) -> int:
    """Return how many tokens a program multiplies."""
    if num_tokens > FEW_TOKENS and has_tensor_cores:
        return TILE_TOKENS
    return min(FEW_TOKENS, triton.next_power_of_2(num_tokens))


def tiling(layer: Linear, tokens: int, num_rows: int) -> tuple[int, int, dict[str, int | bool]]:
    """Return how many rows of a weight a program multiplies at once, how many programs that are, and other sizes."""
    largest = 512 if tokens == 1 else 256 if tokens <= 4 else 128
    block = block_bytes(layer.weight, layer.weight_scale, largest)
    if block < SMALLEST_BLOCK:
        raise ValueError(f"groups of {SMALLEST_BLOCK * 8 // layer.bits} input features or multiples of it are needed")
    rows = TILE_ROWS if tokens == TILE_TOKENS else max(1, min(16, 4096 // (largest * tokens)))
    constants = {
        **{"BITS": layer.bits, "IN_GROUPS": layer.weight_scale.shape[1] > 1},
        **{"TOKENS": tokens, "BLOCK": block},
    }
    return rows, triton.cdiv(num_rows, rows), constants


@triton.jit
def norm_kernel(x_pointer, weight_pointer, bias_pointer, out_pointer, size, eps, BLOCK: tl.constexpr):
    """Write the layer norm of a row."""
    columns = tl.arange(0, BLOCK)
    is_column = columns < size
    start = tl.program_id(0).to(tl.int64) * size
    x = tl.load(x_pointer + start + columns, mask=is_column, other=0).to(tl.float32)
    mean = tl.sum(x) / size
    centered = tl.where(is_column, x - mean, 0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered) / size + eps)
    weight = tl.load(weight_pointer + columns, mask=is_column, other=0).to(tl.float32)
    bias = tl.load(bias_pointer + columns, mask=is_column, other=0).to(tl.float32)
    out = centered * scale * weight + bias
    tl.store(out_pointer + start + columns, out.to(out_pointer.dtype.element_ty), mask=is_column)


@triton.jit
def row_sums(
    rows, is_row, x_pointer, weight_pointer, scale_pointer, bias_pointer, first_token, num_tokens, row_bytes,
    num_groups,
    BITS: tl.constexpr, IN_GROUPS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the products `(ROWS, TOKENS)` of rows and tokens, with their biases, rounded to the dtype of `x`."""
    weight_rows = weight_pointer + rows.to(tl.int64) * row_bytes
    tokens = first_token + tl.arange(0, TOKENS)
    totals = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, row_bytes, BLOCK):
        codes = load_codes(weight_rows, is_row, start, row_bytes, BLOCK)  # (ROWS, BLOCK)
        if TOKENS >= 16:
            sums = dot_products(codes, x_pointer, tokens, num_tokens, start, row_bytes, BITS, BLOCK)
        else:
            sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for index in tl.static_range(TOKENS):
                token = first_token + index
                end = tl.where(token < num_tokens, row_bytes, 0)
                none = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                products = add_products(none, codes, x_pointer, token, start, end, row_bytes, BITS, BLOCK)
                own = tl.sum(products, axis=1)
                sums = tl.where((tl.arange(0, TOKENS) == index)[None, :], own[:, None], sums)
        if IN_GROUPS:
            group = start // (row_bytes // num_groups)
            sums *= tl.load(scale_pointer + rows * num_groups + group, mask=is_row, other=0).to(tl.float32)[:, None]
        totals += sums
    if not IN_GROUPS:
        totals *= tl.load(scale_pointer + rows, mask=is_row, other=0).to(tl.float32)[:, None]
    totals += tl.load(bias_pointer + rows, mask=is_row, other=0).to(tl.float32)[:, None]
    return totals.to(x_pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def dot_products(codes, x_pointer, tokens, num_tokens, start, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sums `(ROWS, TOKENS)` of a block of codes times the features of all tokens."""
    features = start * (8 // BITS) + tl.arange(0, BLOCK * (8 // BITS))
    num_features = row_bytes * (8 // BITS)
    is_x = (tokens < num_tokens)[:, None] & (features < num_features)[None, :]
    x = tl.load(x_pointer + tokens[:, None] * num_features + features[None, :], mask=is_x, other=0)
    if BITS == 8:
        return tl.dot(all_of_8_bits(codes).to(x.dtype), tl.trans(x), input_precision="ieee")
    even, odd = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    biased = codes.to(tl.int32) ^ 0x4B000088
    sums = tl.dot(high_of_4_bits(biased).to(x.dtype), tl.trans(even), input_precision="ieee")
    return tl.dot(low_of_4_bits(biased).to(x.dtype), tl.trans(odd), sums, input_precision="ieee")


@triton.jit
def query_key_value_kernel(
    x_pointer, weight_pointer, scale_pointer, bias_pointer, cos_pointer, sin_pointer, query_pointer, keys_pointer,
    values_pointer, lengths_pointer, num_tokens, row_bytes, num_groups, half, row_stride, head_stride,
    NUM_HEADS: tl.constexpr,
    BITS: tl.constexpr, IN_GROUPS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write some pairs of features of a head's query, key and value, of some tokens; queries and keys are rotated."""
    head = tl.program_id(0) % NUM_HEADS
    pairs = tl.program_id(0) // NUM_HEADS * ROWS + tl.arange(0, ROWS)
    is_pair = pairs < half
    first_token = tl.program_id(1) * TOKENS
    tokens = first_token + tl.arange(0, TOKENS)
    size = 2 * half
    is_out = is_pair[:, None] & (tokens < num_tokens)[None, :]
    tables = tokens[None, :] * size + pairs[:, None]
    queries = query_pointer + (tokens[None, :] * NUM_HEADS + head) * size + pairs[:, None]
    slots = tl.load(lengths_pointer + tokens, mask=tokens < num_tokens, other=1) - 1
    places = tokens.to(tl.int64) * row_stride + head * head_stride + slots * size
    places = places[None, :] + pairs[:, None]
    for part in tl.static_range(3):
        rows = (head * 3 + part) * size + pairs
        first = row_sums(
            rows, is_pair, x_pointer, weight_pointer, scale_pointer, bias_pointer, first_token, num_tokens, row_bytes,
            num_groups, BITS, IN_GROUPS, TOKENS, ROWS, BLOCK,
        )  # fmt: skip
        second = row_sums(
            rows + half, is_pair, x_pointer, weight_pointer, scale_pointer, bias_pointer, first_token, num_tokens,
            row_bytes, num_groups, BITS, IN_GROUPS, TOKENS, ROWS, BLOCK,
        )  # fmt: skip
        if part < 2:
            rotated = rotate(first, second, cos_pointer + tables, sin_pointer + tables, is_out)
            second = rotate(second, first, cos_pointer + tables + half, sin_pointer + tables + half, is_out)
            first = rotated
        if part == 0:
            targets = queries
        elif part == 1:
            targets = keys_pointer + places
        else:
            targets = values_pointer + places
        tl.store(targets, first.to(query_pointer.dtype.element_ty), mask=is_out)
        tl.store(targets + half, second.to(query_pointer.dtype.element_ty), mask=is_out)


@triton.jit
def rotate(states, others, cos_pointers, sin_pointers, mask):
    """Return states times their cosines plus the other half of their pairs times the sines, rounded twice."""
    dtype = cos_pointers.dtype.element_ty
    cos = tl.load(cos_pointers, mask=mask, other=0).to(tl.float32)
    sin = tl.load(sin_pointers, mask=mask, other=0).to(tl.float32)
    return ((states * cos).to(dtype).to(tl.float32) + others * sin).to(dtype).to(tl.float32)


@triton.jit
def linear_kernel(
    x_pointer, weight_pointer, scale_pointer, bias_pointer, residual_pointer, out_pointer,
    num_tokens, row_bytes, num_groups, num_rows, alpha,
    BITS: tl.constexpr, IN_GROUPS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write some rows of a product, plus the residual times alpha, for some tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_token = tl.program_id(1) * TOKENS
    sums = row_sums(
        rows, rows < num_rows, x_pointer, weight_pointer, scale_pointer, bias_pointer, first_token, num_tokens,
        row_bytes, num_groups, BITS, IN_GROUPS, TOKENS, ROWS, BLOCK,
    )  # fmt: skip
    tokens = first_token + tl.arange(0, TOKENS)
    is_out = (rows < num_rows)[:, None] & (tokens < num_tokens)[None, :]
    targets = tokens[None, :] * num_rows + rows[:, None]
    residual = tl.load(residual_pointer + targets, mask=is_out, other=0).to(tl.float32)
    tl.store(out_pointer + targets, (sums + alpha * residual).to(out_pointer.dtype.element_ty), mask=is_out)


@triton.jit
def gated_kernel(
    x_pointer, weight_pointer, scale_pointer, bias_pointer, out_pointer,
    num_tokens, row_bytes, num_groups, num_rows,
    BITS: tl.constexpr, IN_GROUPS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write some rows of the first half of a product times the GELU of those of the second, for some tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_token = tl.program_id(1) * TOKENS
    linear = row_sums(
        rows, rows < num_rows, x_pointer, weight_pointer, scale_pointer, bias_pointer, first_token, num_tokens,
        row_bytes, num_groups, BITS, IN_GROUPS, TOKENS, ROWS, BLOCK,
    )  # fmt: skip
    gate = row_sums(
        rows + num_rows, rows < num_rows, x_pointer, weight_pointer, scale_pointer, bias_pointer, first_token,
        num_tokens, row_bytes, num_groups, BITS, IN_GROUPS, TOKENS, ROWS, BLOCK,
    )  # fmt: skip
    dtype = out_pointer.dtype.element_ty
    activated = (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))).to(dtype).to(tl.float32)
    tokens = first_token + tl.arange(0, TOKENS)
    is_out = (rows < num_rows)[:, None] & (tokens < num_tokens)[None, :]
    tl.store(out_pointer + tokens[None, :] * num_rows + rows[:, None], (linear * activated).to(dtype), mask=is_out)
