"""Quantized linear layers on CPUs: the C kernels of kernels_cpu.c, and torch's own where they were not built.

Shapes: `M` tokens, `N` output features, `K` input features, `G` groups of a row. Layout of weights: functional.py.
"""

import ctypes
import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glm_hf.quantization.functional import dequantize_rows, quantized_linear_reference, require_stored, unpack_int4

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MANY_TOKENS = 32  # from here on, bf16 matrix products of the vendor's library pay for decoding the weight
DECODED_BYTES = 24 * 2**20  # of a weight at once: fits into a level 3 cache
PACKABLE_GROUPS = (256, 128, 64, 32)

logger = logging.getLogger(__name__)


class KernelLibrary:
    """
    The C kernels, run by torch's own threads.

    Args:
        path: The shared library.

    Attributes:
        level: Best instruction set of this CPU: 0 plain C, 1 AVX2, 2 AVX-512, 3 AVX-512 with VNNI.
        multiplies_bfloat16: Whether this CPU has instructions for bf16 products.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        number: Any = ctypes.c_int
        size: Any = ctypes.c_int64
        pointer: Any = ctypes.c_void_p
        self._linear = library.glm_quantized_linear
        self._linear.argtypes = (
            [pointer, number, size, pointer, pointer, pointer, number, pointer] + [size] * 4 + [number] * 3 + [pointer]
        )
        self._decode = library.glm_decode
        self._decode.argtypes = [pointer] * 3 + [size] * 3 + [number] * 2 + [pointer]
        self._decode.restype = None
        self._parallel_for = ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, pointer)
        self.level = library.glm_best_level()
        self.multiplies_bfloat16 = bool(library.glm_multiplies_bfloat16())

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bits: int,
        bias: Tensor | None = None,
        level: int | None = None,
    ) -> Tensor:
        """Return `(M, N)` in the dtype of `x` `(M, K)`; all contiguous, and groups a multiple of 64 features."""
        require_fp16_scale(weight, weight_scale, bits)
        (num_tokens, num_columns), num_rows = x.shape, len(weight)
        out = x.new_empty(num_tokens, num_rows)
        is_done = self._linear(
            *(x.data_ptr(), DTYPE_CODES[x.dtype], num_columns, weight.data_ptr(), weight_scale.data_ptr()),
            *((None, 0) if bias is None else (bias.data_ptr(), DTYPE_CODES[bias.dtype])),
            *(out.data_ptr(), num_tokens, num_rows, num_columns, weight_scale.shape[1], bits),
            *(self.level if level is None else level, torch.get_num_threads(), self._parallel_for),
        )
        if not is_done:
            raise MemoryError(f"no memory for {num_tokens} x {num_columns} rounded activations")
        return out

    def decode(
        self, weight: Tensor, weight_scale: Tensor, bits: int, level: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return the bf16 matrix `(N, K)` of codes times scales; all contiguous, as is `out` if it is given."""
        require_fp16_scale(weight, weight_scale, bits)
        num_rows, num_columns = len(weight), weight.shape[1] * 8 // bits
        if out is None:
            out = torch.empty(num_rows, num_columns, dtype=torch.bfloat16)
        self._decode(
            *(weight.data_ptr(), weight_scale.data_ptr(), out.data_ptr(), num_rows, num_columns),
            *(weight_scale.shape[1], bits, self.level if level is None else level, self._parallel_for),
        )
        return out


def require_fp16_scale(weight: Tensor, weight_scale: Tensor, bits: int) -> None:
    """Raise ValueError unless the bytes are those that the C kernels take them for."""
    require_stored(weight, weight_scale, bits)
    if weight_scale.dtype != torch.float16:
        raise ValueError(f"weight_scale must be torch.float16, got {weight_scale.dtype}")


@functools.cache
def kernel_library() -> KernelLibrary | None:
    """Return the C kernels, None if they were not built; says so once."""
    spec = importlib.util.find_spec("glm_hf.quantization._kernels_cpu")
    if spec is None or spec.origin is None:
        logger.warning(
            "glm_hf was installed without its C kernels, so INT4 and INT8 weights run on torch's own: fast for bf16, "
            "slow for fp16 and fp32. Install glm_hf where a C compiler is at hand to have them built."
        )
        return None
    return KernelLibrary(spec.origin)


def quantized_linear_cpu(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """Return what `quantized_linear` does, by the fastest way that this CPU and installation have."""
    library = kernel_library()
    tokens = x.reshape(-1, x.shape[-1]).contiguous()  # (M, K)
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    num_groups = weight_scale.shape[1]
    group_size = tokens.shape[1] // num_groups
    is_bf16, many = x.dtype == torch.bfloat16, len(tokens) >= MANY_TOKENS
    if library is not None and is_bf16 and many and library.multiplies_bfloat16:
        out = linear_by_decoding(library, tokens, weight, weight_scale, bits, bias)
    elif library is not None and x.dtype in DTYPE_CODES and (num_groups == 1 or group_size % 64 == 0):
        bias = bias if bias is None or bias.dtype in DTYPE_CODES else bias.float()
        out = library.linear(tokens, weight, weight_scale, bits, None if bias is None else bias.contiguous())
    elif library is None and is_bf16 and not many and can_pack(len(weight), tokens.shape[1], num_groups, bits):
        out = linear_by_torch(tokens, weight, weight_scale, bits, bias)
    else:
        out = quantized_linear_reference(tokens, weight, weight_scale, bits, bias)
    return out.view(*x.shape[:-1], -1) if x.numel() else out.new_empty(*x.shape[:-1], len(weight))


def linear_by_decoding(
    library: KernelLibrary, x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None
) -> Tensor:
    """Return `(M, N)` of bf16 `x` `(M, K)`: decode some rows of the weight to bf16, multiply, take the next."""
    out = x.new_empty(len(x), len(weight))
    bias = None if bias is None else bias.to(x.dtype)
    step = rows_at_once(x.shape[1])
    buffer = x.new_empty(min(step, len(weight)), x.shape[1])  # used again and again, since new memory is slow at first
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        decoded = library.decode(weight[rows], weight_scale[rows], bits, out=buffer[: len(weight[rows])])
        out[:, rows] = nn.functional.linear(x, decoded, None if bias is None else bias[rows])
    return out


def decoded_rows(weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, some rows of the matrix `(N, K)`), in bf16 for that dtype and otherwise fp32."""
    library = kernel_library()
    if library is None or dtype != torch.bfloat16 or not library.multiplies_bfloat16:
        yield from dequantize_rows(weight, weight_scale, bits)
        return
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    step = rows_at_once(weight.shape[1] * 8 // bits)
    for start in range(0, len(weight), step):
        yield start, library.decode(weight[start : start + step], weight_scale[start : start + step], bits)


def rows_at_once(num_columns: int) -> int:
    """Return how many rows of a weight to decode at once."""
    return max(64, DECODED_BYTES // (2 * num_columns) // 64 * 64)


def linear_by_torch(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """Return `(M, N)` of few rows of bf16 `x` `(M, K)`, by torch's own kernels for quantized weights."""
    if bits == 8:
        product = torch._weight_int8pack_mm(x, weight, x.new_ones(len(weight)))
    else:
        group_size = x.shape[1] // weight_scale.shape[1]
        step = next(size for size in PACKABLE_GROUPS if group_size % size == 0)
        scale = weight_scale if weight_scale.shape[1] > 1 else torch.ones_like(weight_scale)
        scale = scale.repeat_interleave(group_size // step, dim=1).T.bfloat16()  # (K/step, N)
        scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1)
        product = torch._weight_int4pack_mm_for_cpu(x, packed_int4(weight), step, scale_and_zero)
    scaled = product * weight_scale[:, 0].float() if weight_scale.shape[1] == 1 else product
    return (scaled if bias is None else scaled + bias.float()).to(x.dtype)


def can_pack(num_rows: int, num_columns: int, num_groups: int, bits: int) -> bool:
    """Tell whether torch's own kernels can hold a quantized matrix `(N, K)`."""
    if bits == 8:
        return num_groups == 1
    group_size = num_columns // num_groups
    return num_rows % 64 == 0 and any(group_size % size == 0 for size in PACKABLE_GROUPS)


def packed_int4(weight: Tensor) -> Tensor:
    """Return INT4 codes `(N, K/2)` in the layout of torch's CPU kernel; a second copy, kept with the tensor."""
    version = None if weight.is_inference() else weight._version
    known_version, packed = getattr(weight, "int4pack", (None, None))
    if packed is None or known_version != version:
        parts = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_int4(part).int() + 8, 1)
            for part in weight.split(1024)
        ]
        packed = torch.cat(parts)
        setattr(weight, "int4pack", (version, packed))  # noqa: B010, tensors declare no such attribute
    return packed
