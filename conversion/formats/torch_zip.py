"""The layout of a rank file that is to be written: which bytes go where, before a single weight is read.

Stored layout, a zip file as `torch.save` writes it: members `ROOT/data.pkl` (the pickled structure),
`ROOT/byteorder`, `ROOT/version` and `ROOT/data/KEY` (one tensor each), not compressed; every member behind a local
header with its CRC-32 and at a multiple of 64 bytes; then the directory of all members. ROOT is the file's name
without `.pt`. All sizes are in 64-bit fields, as files and tensors can be larger than 4 GB.

`torch.serialization.skip_data` reserves such members, too, but with checksums of 0, by which nobody could tell damage.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from glm_hf.conversion.streaming.stored_tensor import contiguous_stride

ALIGNMENT = 64
CRC_OFFSET = 14  # of the checksum in a local header
VERSION_NEEDED = 45  # the version of zip that brought 64-bit sizes
DATE = 1 << 5 | 1  # 1 January 1980
IN_EXTRA_FIELD, MANY = 2**32 - 1, 2**16 - 1
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
LOCAL_SIZES = struct.Struct("<2H2Q")
PADDING = struct.Struct("<2H")
ENTRY = struct.Struct("<4s6H3I5H2I")
ENTRY_SIZES = struct.Struct("<2H3Q")
END_64 = struct.Struct("<4sQ2H2I4Q")
END_64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
    torch.int8: torch.CharStorage,
}


@dataclass(frozen=True)
class ZipMember:
    """A member's name, the byte at which its local header begins, the length of that header, and its size."""

    name: bytes
    start: int
    header_size: int
    nbytes: int

    @property
    def end(self) -> int:
        """Byte after the last one."""
        return self.start + self.header_size + self.nbytes

    def header(self, crc: int = 0) -> bytes:
        """Return the local header, padded so that the content is aligned."""
        padding = self.header_size - LOCAL_HEADER.size - len(self.name) - LOCAL_SIZES.size - PADDING.size
        extra = LOCAL_SIZES.pack(1, LOCAL_SIZES.size - 4, self.nbytes, self.nbytes)
        extra += PADDING.pack(int.from_bytes(b"FB", "little"), padding) + bytes(padding)
        sizes = (IN_EXTRA_FIELD, IN_EXTRA_FIELD, len(self.name), len(extra))
        return LOCAL_HEADER.pack(b"PK\3\4", VERSION_NEEDED, 0, 0, 0, DATE, crc, *sizes) + self.name + extra

    def entry(self, crc: int) -> bytes:
        """Return the member's entry in the directory."""
        extra = ENTRY_SIZES.pack(1, ENTRY_SIZES.size - 4, self.nbytes, self.nbytes, self.start)
        versions_to_date = (VERSION_NEEDED, VERSION_NEEDED, 0, 0, 0, DATE)
        sizes = (IN_EXTRA_FIELD, IN_EXTRA_FIELD, len(self.name), len(extra))
        return ENTRY.pack(b"PK\1\2", *versions_to_date, crc, *sizes, 0, 0, 0, 0, IN_EXTRA_FIELD) + self.name + extra


class TorchZip:
    """
    The layout of one file.

    Args:
        root: The file's name without its suffix.
        tensors: Tensors that are written block by block, on meta by name.
        small_tensors: Tensors that are known already, by name; they lie in front of the others.
        content: Entries of the pickled structure beside `module`.

    Attributes:
        beginning: The bytes in front of the first of `tensors`.
        members: The members of `tensors`, by name.
        directory_start: Byte after the last of them.
        size: Bytes of the whole file.
    """

    def __init__(
        self, root: str, tensors: Mapping[str, Tensor], small_tensors: Mapping[str, Tensor], content: dict[str, Any]
    ) -> None:
        keys = {name: f"data/{number}" for number, name in enumerate((*tensors, *small_tensors))}
        module = {name: _Tensor(tensor, keys[name]) for name, tensor in (*tensors.items(), *small_tensors.items())}
        small = {"data.pkl": _pickled({"module": module, **content}), "byteorder": b"little", "version": b"3\n"}
        small |= {keys[name]: tensor.contiguous().numpy().tobytes() for name, tensor in small_tensors.items()}
        self._root = root
        self._small: dict[ZipMember, int] = {}
        self.beginning, start = b"", 0
        for key, value in small.items():
            member = self._place(key, len(value), start)
            self._small[member] = zlib.crc32(value)
            self.beginning += member.header(self._small[member]) + value
            start = member.end
        self.members: dict[str, ZipMember] = {}
        for name, tensor in tensors.items():
            self.members[name] = self._place(keys[name], tensor.nbytes, start)
            start = self.members[name].end
        self.directory_start = start
        self.size = start + len(self.directory(dict.fromkeys(self.members, 0)))

    def _place(self, key: str, nbytes: int, start: int) -> ZipMember:
        """Return the member that begins at byte `start`."""
        name = f"{self._root}/{key}".encode()
        header_size = LOCAL_HEADER.size + len(name) + LOCAL_SIZES.size + PADDING.size
        return ZipMember(name, start, header_size + -(start + header_size) % ALIGNMENT, nbytes)

    def directory(self, crcs: Mapping[str, int]) -> bytes:
        """Return the end of the file, given the checksums of `members`."""
        checksums = self._small | {self.members[name]: crc for name, crc in crcs.items()}
        entries = b"".join(member.entry(crc) for member, crc in checksums.items())
        end = self.directory_start + len(entries)
        counts = (len(checksums), len(checksums), len(entries), self.directory_start)
        return b"".join(
            (
                entries,
                END_64.pack(b"PK\6\6", END_64.size - 12, VERSION_NEEDED, VERSION_NEEDED, 0, 0, *counts),
                END_64_LOCATOR.pack(b"PK\6\7", 0, end, 1),
                END.pack(b"PK\5\6", 0, 0, MANY, MANY, IN_EXTRA_FIELD, IN_EXTRA_FIELD, 0),
            )
        )


class _Storage:
    """Stands for the bytes of a tensor in the pickled structure."""

    def __init__(self, *identity: Any) -> None:
        self.identity = identity


class _Tensor:
    """Pickles as the tensor that is on meta would, with its bytes under `key`."""

    def __init__(self, tensor: Tensor, key: str) -> None:
        dtype = torch.int8 if tensor.dtype == torch.uint8 else tensor.dtype
        self._shape = tuple(tensor.shape)
        self._storage = _Storage("storage", STORAGES[dtype], key.removeprefix("data/"), "cpu", prod(self._shape))

    def __reduce__(self) -> tuple:
        return _rebuild_tensor_v2, (
            self._storage,
            0,
            self._shape,
            contiguous_stride(self._shape),
            False,
            OrderedDict(),
        )


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, _Storage) else None


def _pickled(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()
