"""A tensor's bytes in a file: read in blocks of rows from first to last, and checked against their checksum."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# A block of this size is read, changed and written at a time; the memory of a conversion is a few of them.
BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Member:
    """
    Bytes in a file with their checksum.

    Attributes:
        path: The file.
        name: Their name in it.
        offset: Offset of the bytes in the file.
        nbytes: Number of the bytes.
        crc: Their CRC-32, None if none was computed.
    """

    path: Path
    name: str
    offset: int
    nbytes: int
    crc: int | None


@dataclass(frozen=True)
class StoredTensor:
    """
    Where a tensor lies in a file.

    Attributes:
        path: The file.
        name: The tensor's name in it.
        dtype: Dtype of the elements, little-endian.
        shape: Shape, of at least one dimension.
        stride: Elements between neighbours along every dimension.
        offset: Byte at which the first element lies; -1 if the tensor was saved on meta, without values.
        member: The checksummed bytes that hold the tensor, None if the file has no checksums.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    member: Member | None = None

    @property
    def has_values(self) -> bool:
        """Whether there is anything to read."""
        return self.offset >= 0

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes when it is contiguous."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def is_whole_member(self) -> bool:
        """Whether reading the rows in order reads the bytes of `member` in order, each once."""
        return self.member is not None and (
            (self.offset, self.nbytes) == (self.member.offset, self.member.nbytes)
            and self.stride == contiguous_stride(self.shape)
        )


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def rows_per_block(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return how many rows of a tensor make a block: at least one, and as many as `BLOCK_BYTES` hold."""
    return max(1, BLOCK_BYTES // (prod(shape[1:]) * dtype.itemsize))


class RowReader:
    """
    Read the rows of a stored tensor from first to last; holds the file open until `close`.

    Args:
        tensor: The tensor. If it is a whole member, its checksum is compared after the last row.
    """

    def __init__(self, tensor: StoredTensor) -> None:
        if not tensor.has_values:
            raise ValueError(f"{tensor.path}: {tensor.name} was saved on meta and has no values")
        self._tensor = tensor
        self._file: BinaryIO = open(tensor.path, "rb", buffering=0)
        self._row = 0
        self._crc = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def take(self, num_rows: int) -> Tensor:
        """Return the next `num_rows` rows; ValueError if they end too early or their checksum is wrong."""
        tensor = self._tensor
        shape = (num_rows, *tensor.shape[1:])
        span = sum((size - 1) * stride for size, stride in zip(shape, tensor.stride, strict=True)) + 1
        elements = torch.empty(span, dtype=tensor.dtype)
        content = elements.view(torch.uint8).numpy().data
        self._file.seek(tensor.offset + self._row * tensor.stride[0] * tensor.dtype.itemsize)
        _read_into(self._file, content, tensor.name)
        self._row += num_rows
        if tensor.member and tensor.is_whole_member:
            self._crc = zlib.crc32(content, self._crc)
            if self._row == tensor.shape[0]:
                _compare_checksum(self._crc, tensor.member, tensor.name)
        return elements.as_strided(shape, tensor.stride).contiguous()

    def blocks(self, num_rows: int) -> Iterator[Tensor]:
        """Yield the next `num_rows` rows in blocks."""
        step = rows_per_block(self._tensor.shape, self._tensor.dtype)
        for start in range(0, num_rows, step):
            yield self.take(min(step, num_rows - start))


def check_member(member: Member, label: str) -> None:
    """Read all bytes of a member; ValueError, which calls them `label`, if they are not those that were written."""
    crc, left = 0, member.nbytes
    buffer = memoryview(bytearray(min(BLOCK_BYTES, left)))
    with open(member.path, "rb", buffering=0) as file:
        file.seek(member.offset)
        while left:
            content = buffer[: min(len(buffer), left)]
            _read_into(file, content, label)
            crc = zlib.crc32(content, crc)
            left -= len(content)
    _compare_checksum(crc, member, label)


def _read_into(file: BinaryIO, content: memoryview, label: str) -> None:
    """Fill `content` from `file`."""
    while content:
        count = file.readinto(content)  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"{file.name}: {label} is truncated; the file has changed or is damaged, copy it again")
        content = content[count:]


def _compare_checksum(crc: int, member: Member, label: str) -> None:
    if member.crc not in (None, crc):
        raise ValueError(
            f"{member.path}: {label} is damaged: its CRC-32 is {crc:08x}, but {member.crc:08x} was written; copy the "
            "file again"
        )
