"""Quantized linear layers on GPUs, by Triton kernels that read the stored layout of functional.py; import it lazily.

Three ways, by the number of tokens M:
    gemv           every program multiplies some rows by up to 8 tokens, over a part of the input features
    split_k_gemm   the same in tiles for tensor cores, which Triton uses from compute capability 8.0 on
    decoded_gemm   rows are decoded, some at a time, and multiplied by the vendor's library
All sum up in fp32, scale, add the bias and round once. The first two leave S parts of each sum, which another kernel
adds up, always in the same order.

Codes become fp32 without the conversion instruction, which is slow: around the bits of a code plus 8 (or 128, of 8
bits), those of 2**23 make the fp32 value that is 2**23 greater.

Shapes: `M` tokens, `N` output features (rows), `K` input features, `G` groups of a row, `S` parts of a sum. A byte of
a row holds one weight of 8 bits or two of 4; columns are counted in bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GEMV_TOKENS, SPLIT_K_TOKENS = 2, 64  # at most, where Triton uses tensor cores; instructions were counted, not clocks
GEMV_TOKENS_WITHOUT_TENSOR_CORES = 32
TOKENS_AT_ONCE = 8  # that a program multiplies, of a few
GEMV_PROGRAMS, SPLIT_K_PROGRAMS = 12, 3  # per multiprocessor
SMALLEST_BLOCK = 16  # bytes of a row that a program reads at once, and that share a scale
DECODED_BYTES = 64 * 2**20  # of a weight at once for many tokens; `glm-hf plan` counts them


def quantized_linear_triton(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """Return what `quantized_linear` does, for x in fp16, bf16 or fp32 and all tensors on one CUDA device."""
    if not x.numel() or not weight.numel():
        return x.new_zeros(*x.shape[:-1], len(weight))
    tokens = x.reshape(-1, x.shape[-1]).contiguous()  # (M, K)
    bias = None if bias is None else bias.contiguous()
    arguments = (tokens, weight.contiguous(), weight_scale.contiguous(), bits, bias)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of the tensors
        num_processors, has_tensor_cores = traits_of(x.device)
        has_tensor_cores = has_tensor_cores and x.dtype != torch.float32
        has_block = block_bytes(weight, weight_scale, SMALLEST_BLOCK) == SMALLEST_BLOCK
        if has_block and len(tokens) <= (GEMV_TOKENS if has_tensor_cores else GEMV_TOKENS_WITHOUT_TENSOR_CORES):
            out = gemv(*arguments, num_programs=num_processors * GEMV_PROGRAMS)
        elif has_block and len(tokens) <= SPLIT_K_TOKENS and has_tensor_cores:
            out = split_k_gemm(*arguments, num_programs=num_processors * SPLIT_K_PROGRAMS)
        else:
            out = decoded_gemm(*arguments)
    return out.view(*x.shape[:-1], len(weight))


def traits_of(device: torch.device) -> tuple[int, bool]:
    """Return the number of multiprocessors of a CUDA device, and whether Triton uses its tensor cores."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 8


def block_bytes(weight: Tensor, weight_scale: Tensor, largest: int) -> int:
    """Return how many bytes of a row to read at once: a power of two, at most `largest`, that divides every group."""
    num_groups = weight_scale.shape[1]
    group_bytes = weight.shape[1] // num_groups
    return largest if num_groups == 1 else min(largest, group_bytes & -group_bytes)


def new_parts(x: Tensor, weight: Tensor, block: int, num_splits: int) -> tuple[Tensor, int]:
    """Return memory for the sums `(S, M, N)` of about `num_splits` parts, and the bytes of a row in each part."""
    num_blocks = triton.cdiv(weight.shape[1], block)
    split_bytes = triton.cdiv(num_blocks, max(1, min(num_blocks, num_splits))) * block
    num_parts = triton.cdiv(weight.shape[1], split_bytes)
    return x.new_empty(num_parts, len(x), len(weight), dtype=torch.float32), split_bytes


def gemv(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None, *, num_programs: int
) -> Tensor:
    """Return `(M, N)` for a few tokens `(M, K)`, by about `num_programs` programs."""
    tokens_at_once = min(TOKENS_AT_ONCE, triton.next_power_of_2(len(x)))
    largest_block, tile = (512, 8192) if tokens_at_once == 1 else (128, 4096)
    block = block_bytes(weight, weight_scale, largest_block)
    block_rows = min(128, tile // block)
    grid = triton.cdiv(len(weight), block_rows), triton.cdiv(len(x), tokens_at_once)
    parts, split_bytes = new_parts(x, weight, block, num_programs // grid[0])
    gemv_kernel[(grid[0], len(parts), grid[1])](
        *(x, weight, weight_scale, parts, len(x), len(weight), weight.shape[1], weight_scale.shape[1], split_bytes),
        BITS=bits,
        IN_GROUPS=weight_scale.shape[1] > 1,
        TOKENS=tokens_at_once,
        BLOCK_ROWS=block_rows,
        BLOCK=block,
    )
    return finish(parts, weight_scale, bias, out=x.new_empty(len(x), len(weight)))


@triton.jit
def gemv_kernel(
    x_pointer, weight_pointer, scale_pointer, parts_pointer,
    num_tokens, num_rows, row_bytes, num_groups, split_bytes,
    BITS: tl.constexpr, IN_GROUPS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums of some rows and tokens over one part; those of a lone token are added up at the very end."""
    AT_THE_END: tl.constexpr = TOKENS == 1 and not IN_GROUPS
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    weight_rows = weight_pointer + rows.to(tl.int64) * row_bytes
    first_token = tl.program_id(2) * TOKENS
    first_byte = tl.program_id(1) * split_bytes
    last_byte = tl.minimum(first_byte + split_bytes, row_bytes)
    totals = ()  # (BLOCK_ROWS, BLOCK) or (BLOCK_ROWS) of every token
    for _ in tl.static_range(TOKENS):
        none = tl.zeros((BLOCK_ROWS, BLOCK) if AT_THE_END else (BLOCK_ROWS,), dtype=tl.float32)
        totals = totals + (none,)  # type: ignore[assignment]
    for start in range(first_byte, last_byte, BLOCK):
        codes = load_codes(weight_rows, is_row, start, last_byte, BLOCK)  # (BLOCK_ROWS, BLOCK)
        if IN_GROUPS:
            group = start // (row_bytes // num_groups)
            scale = tl.load(scale_pointer + rows * num_groups + group, mask=is_row, other=0).to(tl.float32)
        new_totals = ()
        for index in tl.static_range(TOKENS):
            token = first_token + index
            end = tl.where(token < num_tokens, last_byte, 0)
            if AT_THE_END:
                total = add_products(totals[index], codes, x_pointer, token, start, end, row_bytes, BITS, BLOCK)
            else:
                zeros = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
                products = add_products(zeros, codes, x_pointer, token, start, end, row_bytes, BITS, BLOCK)
                total = tl.sum(products, axis=1)
                total = totals[index] + (total * scale if IN_GROUPS else total)
            new_totals = new_totals + (total,)  # type: ignore[assignment]
        totals = new_totals
    for index in tl.static_range(TOKENS):
        token = first_token + index
        total = tl.sum(totals[index], axis=1) if AT_THE_END else totals[index]
        target = parts_pointer + (tl.program_id(1) * num_tokens + token) * num_rows + rows
        tl.store(target, total, mask=rows < tl.where(token < num_tokens, num_rows, 0))


@triton.jit
def load_codes(weight_rows, is_row, start, end, BLOCK: tl.constexpr):
    """Return the bytes `(rows, BLOCK)` from column `start` on, with zeros from column `end` on."""
    columns = start + tl.arange(0, BLOCK)
    is_code = is_row[:, None] & (columns < end)[None, :]
    return tl.load(weight_rows[:, None] + columns[None, :], mask=is_code, other=0).to(tl.uint8, bitcast=True)


@triton.jit
def add_products(totals, codes, x_pointer, token, start, end, row_bytes, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the products of a block of codes, and one token's features before column `end`, to `totals`."""
    if BITS == 8:
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + token * row_bytes + columns, mask=columns < end, other=0).to(tl.float32)
        return totals + all_of_8_bits(codes) * x[None, :]
    features = start * 2 + tl.arange(0, BLOCK * 2)
    x = tl.load(x_pointer + token * row_bytes * 2 + features, mask=features < end * 2, other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (BLOCK, 2)))
    # A byte without its bias is 16 * high + low, so
    # high * even + low * odd = byte * even / 16 + low * (odd - even / 16), which saves extracting the high half.
    even = even * 0.0625
    biased = codes.to(tl.int32) ^ 0x4B000088
    byte = biased.to(tl.float32, bitcast=True) - (8388608.0 + 136)
    return totals + byte * even[None, :] + low_of_4_bits(biased) * (odd - even)[None, :]


@triton.jit
def all_of_8_bits(codes):
    """Return the fp32 values that bytes hold."""
    return (codes.to(tl.int32) ^ 0x4B000080).to(tl.float32, bitcast=True) - (8388608.0 + 128)


@triton.jit
def high_of_4_bits(biased):
    """Return the fp32 values in the high halves of bytes, which come as bytes ^ 0x4B000088."""
    return (biased & 0x4B0000F0).to(tl.float32, bitcast=True) * 0.0625 - (524288.0 + 8)


@triton.jit
def low_of_4_bits(biased):
    """Return the fp32 values in the low halves of bytes, which come as bytes ^ 0x4B000088."""
    return (biased & 0x4B00000F).to(tl.float32, bitcast=True) - (8388608.0 + 8)


def split_k_gemm(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None, *, num_programs: int
) -> Tensor:
    """Return `(M, N)` for some tokens `(M, K)`, by about `num_programs` programs."""
    block = block_bytes(weight, weight_scale, 64)
    block_tokens = max(16, min(64, triton.next_power_of_2(len(x))))
    block_rows = 128 if block_tokens < 64 else 64
    grid = triton.cdiv(len(weight), block_rows), triton.cdiv(len(x), block_tokens)
    parts, split_bytes = new_parts(x, weight, block, num_programs // grid[0])
    split_k_kernel[(grid[0], len(parts), grid[1])](
        *(x, weight, weight_scale, parts, len(x), len(weight), weight.shape[1], weight_scale.shape[1], split_bytes),
        BITS=bits,
        IN_GROUPS=weight_scale.shape[1] > 1,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        num_stages=4,
    )
    return finish(parts, weight_scale, bias, out=x.new_empty(len(x), len(weight)))


@triton.jit
def split_k_kernel(
    x_pointer, weight_pointer, scale_pointer, parts_pointer,
    num_tokens, num_rows, row_bytes, num_groups, split_bytes,
    BITS: tl.constexpr, IN_GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums of some rows and tokens over one part."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_row, is_token = rows < num_rows, tokens < num_tokens
    weight_rows = weight_pointer + rows.to(tl.int64) * row_bytes
    x_rows = x_pointer + tokens * (row_bytes * (8 // BITS))
    first_byte = tl.program_id(1) * split_bytes
    last_byte = tl.minimum(first_byte + split_bytes, row_bytes)
    totals = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), dtype=tl.float32)
    for start in range(first_byte, last_byte, BLOCK):
        codes = load_codes(weight_rows, is_row, start, last_byte, BLOCK)  # (BLOCK_ROWS, BLOCK)
        features = start * (8 // BITS) + tl.arange(0, BLOCK * (8 // BITS))
        is_x = is_token[:, None] & (features < last_byte * (8 // BITS))[None, :]
        x = tl.load(x_rows[:, None] + features[None, :], mask=is_x, other=0)  # (BLOCK_TOKENS, BLOCK) or twice as many
        sums = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), dtype=tl.float32) if IN_GROUPS else totals
        if BITS == 4:
            even, odd = tl.split(tl.reshape(x, (BLOCK_TOKENS, BLOCK, 2)))
            biased = codes.to(tl.int32) ^ 0x4B000088
            sums = tl.dot(high_of_4_bits(biased).to(x.dtype), tl.trans(even), sums, input_precision="ieee")
            sums = tl.dot(low_of_4_bits(biased).to(x.dtype), tl.trans(odd), sums, input_precision="ieee")
        else:
            sums = tl.dot(all_of_8_bits(codes).to(x.dtype), tl.trans(x), sums, input_precision="ieee")
        if IN_GROUPS:
            group = start // (row_bytes // num_groups)
            scale = tl.load(scale_pointer + rows * num_groups + group, mask=is_row, other=0).to(tl.float32)
            totals += sums * scale[:, None]
        else:
            totals = sums
    targets = parts_pointer + (tl.program_id(1) * num_tokens + tokens[None, :]) * num_rows + rows[:, None]
    tl.store(targets, totals, mask=is_row[:, None] & is_token[None, :])


def decoded_gemm(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """Return `(M, N)` for many tokens `(M, K)`; scales of rows come after the sums, those of groups before."""
    out = x.new_empty(len(x), len(weight))
    step = max(64, DECODED_BYTES // (x.shape[1] * x.element_size()) // 64 * 64)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        sums = product_in_fp32(x, decode(weight[rows], weight_scale[rows], bits, x.dtype))  # (M, step)
        finish(sums[None], weight_scale[rows], None if bias is None else bias[rows], out=out[:, rows])
    return out


def product_in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` with sums and result in fp32, in which sums of fp16 codes cannot overflow."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def decode(weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix `(N, K)` of codes, exactly, or of codes times scales if there are groups."""
    num_rows, row_bytes = weight.shape
    num_groups = weight_scale.shape[1]
    out = torch.empty(num_rows, row_bytes * 8 // bits, dtype=dtype, device=weight.device)
    grid = num_rows, triton.cdiv(row_bytes, 1024)
    decode_kernel[grid](
        weight, weight_scale, out, row_bytes, num_groups, BITS=bits, IN_GROUPS=num_groups > 1, BLOCK=1024
    )
    return out


@triton.jit
def decode_kernel(
    weight_pointer, scale_pointer, out_pointer, row_bytes, num_groups,
    BITS: tl.constexpr, IN_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the weights of one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(weight_pointer + row * row_bytes + columns, mask=columns < row_bytes, other=0)
    codes = codes.to(tl.uint8, bitcast=True)
    if BITS == 4:
        biased = codes.to(tl.int32) ^ 0x4B000088
        weights = tl.interleave(high_of_4_bits(biased), low_of_4_bits(biased))
    else:
        weights = all_of_8_bits(codes)
    num_columns = row_bytes * (8 // BITS)
    features = tl.program_id(1) * BLOCK * (8 // BITS) + tl.arange(0, BLOCK * (8 // BITS))
    is_feature = features < num_columns
    if IN_GROUPS:
        groups = features // (num_columns // num_groups)
        weights *= tl.load(scale_pointer + row * num_groups + groups, mask=is_feature, other=0).to(tl.float32)
    tl.store(out_pointer + row * num_columns + features, weights.to(out_pointer.dtype.element_ty), mask=is_feature)


def finish(parts: Tensor, weight_scale: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """Write the total of `parts` `(S, M, N)`, times each row's scale, plus `bias`, to `out` `(M, N)`; return it."""
    num_parts, num_tokens, num_rows = parts.shape
    finish_kernel[(num_tokens, triton.cdiv(num_rows, 512))](
        *(parts, weight_scale, parts if bias is None else bias, out, num_parts, num_tokens, num_rows, out.stride(0)),
        IN_GROUPS=weight_scale.shape[1] > 1,
        HAS_BIAS=bias is not None,
        BLOCK=512,
    )
    return out


@triton.jit
def finish_kernel(
    parts_pointer, scale_pointer, bias_pointer, out_pointer, num_parts, num_tokens, num_rows, out_stride,
    IN_GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the outputs of one token and some rows."""
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(num_parts):
        total += tl.load(parts_pointer + (part * num_tokens + token) * num_rows + rows, mask=is_row, other=0)
    if not IN_GROUPS:
        total *= tl.load(scale_pointer + rows, mask=is_row, other=0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_pointer + rows, mask=is_row, other=0).to(tl.float32)
    tl.store(out_pointer + token * out_stride + rows, total.to(out_pointer.dtype.element_ty), mask=is_row)
