"""The file of a graph's weights: where each of them lies, and what form it has there.

Stored forms, all row after row and without copies of what is tied:
    plain      (N, K) or (N), fp32 or fp16
    .codes     uint8 (N, blocks, size * bits / 8): blocks of a row, the last one filled up; code + 2^(bits - 1), of two
               4-bit codes the first in the low bits
    .scales    (N, blocks) fp32 or fp16, the row's or group's scale for each of its blocks
Source: the operator MatMulNBits of onnxruntime.
"""

from dataclasses import dataclass
from math import gcd, prod

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from glm_hf.quantization.functional import unpack_int4

FILE = "model.onnx.data"
ONNX_DTYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.uint8: TensorProto.UINT8}
BITS = {torch.uint8: 4, torch.int8: 8}
"""Bits of stored codes by their dtype."""
LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
ALIGNMENT = 4096  # by which files are mapped into memory


@dataclass(frozen=True)
class Blocks:
    """How the rows of a quantized weight are divided."""

    num_rows: int
    num_columns: int
    bits: int
    block_size: int
    num_blocks: int
    num_groups: int


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Weights:
    """
    Plan of the file.

    Args:
        tensors: What the model stores, on meta by name: plain tensors, and codes with their scales.
        dtype: Dtype of everything that is not a code.

    Attributes:
        quantized: How the quantized weights are divided.
        places: Where each tensor lies, by its name in the graph.
        num_bytes: Size of the file.

    Raises:
        ValueError: If the groups of a quantized weight cannot be divided into blocks.
    """

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.dtype, self.onnx_dtype = dtype, ONNX_DTYPES[dtype]
        self.quantized: dict[str, Blocks] = {}
        self.places: dict[str, Place] = {}
        self.num_bytes = 0
        for name, tensor in tensors.items():
            if name.removesuffix("_scale") in self.quantized:
                continue
            if tensor.is_floating_point():
                self._place(name, tuple(tensor.shape), dtype)
                continue
            blocks = blocks_of(name, tensor, tensors[f"{name}_scale"])
            self.quantized[name], divided = blocks, (blocks.num_rows, blocks.num_blocks)
            self._place(f"{name}.codes", (*divided, blocks.block_size * blocks.bits // 8), torch.uint8)
            self._place(f"{name}.scales", divided, dtype)

    def _place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        offset = -(-self.num_bytes // ALIGNMENT) * ALIGNMENT
        self.places[name] = place = Place(offset, shape, dtype)
        self.num_bytes = offset + place.num_bytes

    def initializer(self, name: str) -> onnx.TensorProto:
        """Return the entry of the graph that says where a tensor lies."""
        place = self.places[name]
        entry = TensorProto(name=name, data_type=ONNX_DTYPES[place.dtype], dims=place.shape)
        entry.data_location = TensorProto.EXTERNAL
        for key, value in (("location", FILE), ("offset", place.offset), ("length", place.num_bytes)):
            entry.external_data.add(key=key, value=str(value))
        return entry

    def stored(self, name: str, rows: Tensor) -> tuple[str, Tensor]:
        """Return the name in the graph of a tensor of the model, and its rows in the form of the file."""
        weight = name.removesuffix("_scale")
        if weight not in self.quantized:
            return name, rows.to(self.dtype)
        blocks = self.quantized[weight]
        if name == weight:
            return f"{name}.codes", blocked_codes(rows, blocks)
        per_group = -(-blocks.num_blocks // blocks.num_groups)
        return f"{weight}.scales", rows.to(self.dtype).repeat_interleave(per_group, dim=1)


def blocks_of(name: str, codes: Tensor, scales: Tensor) -> Blocks:
    """Return how the rows of a weight are divided: into the largest blocks of which each lies within one group."""
    bits, num_groups = BITS[codes.dtype], scales.shape[1]
    num_columns = codes.shape[1] * 8 // bits
    block_size = gcd(LARGEST_BLOCK, num_columns // num_groups)
    if num_groups == 1:  # whose last block is filled up
        block_size = max(SMALLEST_BLOCK, block_size)
    elif block_size < SMALLEST_BLOCK:
        raise ValueError(
            f"{name} has groups of {num_columns // num_groups} columns, but onnxruntime takes multiples of "
            f"{SMALLEST_BLOCK}; quantize the model with another group_size"
        )
    return Blocks(len(codes), num_columns, bits, block_size, -(-num_columns // block_size), num_groups)


def blocked_codes(codes: Tensor, blocks: Blocks) -> Tensor:
    """Return stored codes `(N, K)` or `(N, K/2)` as `(N, blocks, bytes)` of unsigned ones."""
    values = unpack_int4(codes) if blocks.bits == 4 else codes
    unsigned = (values.short() + 2 ** (blocks.bits - 1)).to(torch.uint8)
    num_padded = blocks.num_blocks * blocks.block_size
    unsigned = nn.functional.pad(unsigned, (0, num_padded - unsigned.shape[1]), value=2 ** (blocks.bits - 1))
    if blocks.bits == 4:
        unsigned = unsigned[:, ::2] | (unsigned[:, 1::2] << 4)
    return unsigned.unflatten(1, (blocks.num_blocks, -1))
