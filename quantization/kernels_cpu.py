"""Quantized linear layers on CPUs: the C kernels of cpu/kernels.c, and torch's own where they were not built.

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
VERY_MANY_TOKENS = 128  # from here on, so do those of fp32, where they are faster than the kernels
DECODED_BYTES = 24 * 2**20  # of a weight at once: fits into a level 3 cache
PACKABLE_GROUPS = (256, 128, 64, 32)

logger = logging.getLogger(__name__)

POINTER: Any = ctypes.c_void_p
SIZE: Any = ctypes.c_int64
NUMBER: Any = ctypes.c_int32
FLOAT: Any = ctypes.c_float


class Linear(ctypes.Structure):
    """`struct linear` of cpu/jobs.h."""

    _fields_ = [
        *((name, POINTER) for name in ("weight", "weight_scale", "bias")),
        *((name, SIZE) for name in ("num_rows", "num_columns", "num_groups")),
        *((name, NUMBER) for name in ("bits", "bias_dtype")),
    ]


class Layer(ctypes.Structure):
    """`struct layer` of cpu/jobs.h."""

    _fields_ = [
        *((name, Linear) for name in ("query_key_value", "dense", "up", "down")),
        *((name, POINTER * 2) for name in ("norm_weights", "norm_biases")),
        *((name, POINTER) for name in ("x", "cos", "signed_sin", "out", "keys", "values", "mask")),
        ("lengths", POINTER),
        *((name, SIZE) for name in ("row_stride", "head_stride", "mask_stride")),
        *((name, SIZE) for name in ("num_tokens", "num_heads", "head_size", "length")),
        *(("eps", FLOAT * 2), ("alpha", FLOAT), ("scaling", FLOAT)),
        *((name, NUMBER) for name in ("dtype", "norm_dtype", "level", "num_threads")),
    ]


class KernelLibrary:
    """
    The C kernels, run by torch's own threads.

    Args:
        path: The shared library.

    Attributes:
        level: Best instruction set of this CPU: 0 plain C, 1 AVX2, 2 AVX-512, 3 AVX-512 with VNNI.
        multiplies_bfloat16: Whether this CPU has instructions for bf16 products.
        multiplies_fp32_faster: Whether the vendor's library multiplies many fp32 tokens faster than the kernels.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        linear: Any = ctypes.POINTER(Linear)
        self._linear = library.glm_quantized_linear
        self._linear.argtypes = [linear, POINTER, NUMBER, POINTER, SIZE, NUMBER, NUMBER, POINTER]
        self._decode = library.glm_decode
        self._decode.argtypes = [linear, POINTER, NUMBER, NUMBER, POINTER]
        self._decode.restype = None
        self._decode_layers = library.glm_decode_layers
        self._decode_layers.argtypes = [ctypes.POINTER(Layer), SIZE, POINTER]
        self._parallel_for = ctypes.cast(ctypes.CDLL(torch._C.__file__).torch_parallel_for, POINTER)
        self.level = library.glm_best_level()
        self.multiplies_bfloat16 = bool(library.glm_multiplies_bfloat16())
        self.multiplies_fp32_faster = bool(library.glm_multiplies_fp32_faster(self.level))

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
        out = x.new_empty(len(x), len(weight))
        is_done = self._linear(
            *(linear_arguments(weight, weight_scale, bits, bias), x.data_ptr(), DTYPE_CODES[x.dtype], out.data_ptr()),
            *(len(x), self.level if level is None else level, torch.get_num_threads(), self._parallel_for),
        )
        if not is_done:
            raise MemoryError(f"no memory for {len(x)} x {x.shape[1]} rounded activations")
        return out

    def decode(
        self, weight: Tensor, weight_scale: Tensor, bits: int, level: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return the matrix `(N, K)` of codes times scales, bf16 or as `out`, fp32 or bf16; all contiguous."""
        require_fp16_scale(weight, weight_scale, bits)
        if out is None:
            out = torch.empty(len(weight), weight.shape[1] * 8 // bits, dtype=torch.bfloat16)
        arguments = linear_arguments(weight, weight_scale, bits, None)
        level = self.level if level is None else level
        self._decode(arguments, out.data_ptr(), DTYPE_CODES[out.dtype], level, self._parallel_for)
        return out

    def decode_layers(self, layers: ctypes.Array[Layer]) -> None:
        """Compute one new token of each row through layers of the model, and write it, its keys and its values."""
        if not self._decode_layers(layers, len(layers), self._parallel_for):
            raise MemoryError(f"no memory for {layers[0].num_tokens} tokens in a layer of the model")


def linear_arguments(weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Linear:
    """Return where a quantized linear layer lies, for the C kernels."""
    return Linear(
        *(weight.data_ptr(), weight_scale.data_ptr(), None if bias is None else bias.data_ptr()),
        *(weight.shape[0], weight.shape[1] * 8 // bits, weight_scale.shape[1], bits),
        0 if bias is None else DTYPE_CODES[bias.dtype],
    )


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
    is_decoded = is_bf16 and many and library is not None and library.multiplies_bfloat16
    if x.dtype == torch.float32 and len(tokens) >= VERY_MANY_TOKENS and library is not None:
        is_decoded = library.multiplies_fp32_faster
    if library is not None and is_decoded:
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
    """Return `(M, N)` of `x` `(M, K)`, bf16 or fp32: decode some rows of the weight, multiply, take the next."""
    out = x.new_empty(len(x), len(weight))
    bias = None if bias is None else bias.to(x.dtype)
    step = rows_at_once(x.shape[1], x.dtype)
    buffer = x.new_empty(min(step, len(weight)), x.shape[1])  # used again and again, since new memory is slow at first
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        decoded = library.decode(weight[rows], weight_scale[rows], bits, out=buffer[: len(weight[rows])])
        out[:, rows] = nn.functional.linear(x, decoded, None if bias is None else bias[rows])
    return out


def decoded_rows(weight: Tensor, weight_scale: Tensor, bits: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, some rows of the matrix `(N, K)`), in bf16 for that dtype and otherwise fp32."""
    library = kernel_library()
    if library is None:
        yield from dequantize_rows(weight, weight_scale, bits)
        return
    is_bf16 = dtype == torch.bfloat16 and library.multiplies_bfloat16
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    buffer_dtype = torch.bfloat16 if is_bf16 else torch.float32
    num_columns = weight.shape[1] * 8 // bits
    step = rows_at_once(num_columns, buffer_dtype)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        out = torch.empty(len(weight[rows]), num_columns, dtype=buffer_dtype)
        yield start, library.decode(weight[rows], weight_scale[rows], bits, out=out)


def rows_at_once(num_columns: int, dtype: torch.dtype) -> int:
    """Return how many rows of a weight to decode at once."""
    return max(64, DECODED_BYTES // (dtype.itemsize * num_columns) // 64 * 64)


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
