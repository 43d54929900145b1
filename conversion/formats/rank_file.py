"""List what a SAT rank file holds without loading it.

Stored layout (a zip file of `torch.save`, nothing compressed): `ROOT/data.pkl`, the pickled structure `{"module":
{name: tensor}}`; `ROOT/data/KEY`, the bytes of one storage each; every member with its CRC-32. ROOT is the name under
which the file was saved, `mp_rank_RR_model_states`. Only plain tensors are unpickled, so that a file cannot run code.
"""

import hashlib
import logging
import pickle
import re
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from glm_hf.conversion.streaming.stored_tensor import Member, StoredTensor, contiguous_stride
from glm_hf.folders.validation import require_regular

RANK_FILE = re.compile(r"mp_rank_(0\d|[1-9]\d+)_model_states\.pt", re.ASCII)
NOTES = (".md5", ".sha1", ".sha256", ".sha512", ".asc", ".sig", ".txt", ".json")
"""Ends of names of files that tell of another."""
LIKE_A_RANK_FILE = re.compile(r"model_?states?")
SAVED_AS = re.compile(r"mp_rank_(\d+)_model_states/", re.ASCII)
ITERATION_KEYS = ("iteration", "global_steps")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
LOCAL_HEADER_SIZE = 30
MOST_EXPANDED_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankFile:
    """
    What one rank file holds.

    Attributes:
        path: The file.
        tensors: Tensors of the file by SAT name.
        members: All bytes with checksums, by the byte at which they begin.
        saved_as: The rank under which it was saved, None if it does not tell.
        iteration: Entries of the file among `ITERATION_KEYS`.
        fingerprint: Size, and a hash of all checksums.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    members: dict[int, Member]
    saved_as: int | None
    iteration: dict[str, Any]
    fingerprint: dict[str, Any]


def read_rank_file(path: Path, *, key: str | None = "module") -> RankFile:
    """
    Read the directory and the pickled structure of a rank file.

    Args:
        path: The file.
        key: Key under which the structure holds the tensors, None if they are all that it holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than plain tensors of a GLM-130B model.
    """
    require_regular(path)
    with open(path, "rb") as file:
        try:
            members, saved_as = _read_directory(path, file)
            content = torch.load(path, map_location="meta", weights_only=True)
            module = content if key is None or not isinstance(content, dict) else content.get(key)
            tensors = {name: _locate(path, name, value, members) for name, value in _items(module)}
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds more than plain tensors or is damaged; refused, because reading it further could run "
                "code"
            ) from error
        except _Unexpected as error:
            raise ValueError(f"{path}{error}") from error
        except Exception as error:  # whatever zipfile and torch trip over in a damaged file
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path} is not a complete zip file of torch.save, copy it again: {reason}") from error
        size = file.seek(0, 2)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values() if tensor.has_values)
    if num_bytes > size + MOST_EXPANDED_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, but its tensors would have {num_bytes:,}; they are expanded")
    if not tensors:
        where = "" if key is None else f" under the key '{key}'; expected a rank file of a SAT checkpoint"
        raise ValueError(f"{path} has no tensors{where}")
    checksums = repr(sorted((member.offset, member.nbytes, member.crc) for member in members.values()))
    return RankFile(
        path,
        tensors,
        members,
        saved_as,
        {key: content[key] for key in ITERATION_KEYS if isinstance(content.get(key), int)},
        {"size": size, "checksums": hashlib.sha256(checksums.encode()).hexdigest()},
    )


def canonical_files(folder: Path, name: re.Pattern[str], is_like: re.Pattern[str]) -> list[Path]:
    """
    Return the files of a folder that have the name of a rank's file, in the order of their names.

    Args:
        folder: The folder.
        name: Names of the files.
        is_like: What names contain that look like one of them, in lower case and with ordinary letters and digits.

    Raises:
        ValueError: If another file's name looks like one, so that nobody can tell which of them is meant.
    """
    found = []
    for path in sorted(folder.iterdir()):
        looks = unicodedata.normalize("NFKC", path.name).casefold()
        if name.fullmatch(path.name):
            found.append(path)
        elif is_like.search(looks) and not looks.startswith(".") and not looks.endswith(NOTES):
            raise ValueError(f"{path} looks like the file of a rank, but has another name; remove it or name it right")
    return found


class _Unexpected(Exception):
    """A file that is whole, but does not hold what it should; the text follows the file's name."""


def _items(module: Any) -> list[tuple[str, Any]]:
    return list(module.items()) if isinstance(module, dict) else []


def _read_directory(path: Path, file: BinaryIO) -> tuple[dict[int, Member], int | None]:
    """Return all members by the byte at which they begin, and the rank that their names tell."""
    members = {}
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{info.filename} is compressed")
            file.seek(info.header_offset)
            header = file.read(LOCAL_HEADER_SIZE)
            # the last four bytes: lengths of the name and of the extra field that follow
            offset = info.header_offset + len(header) + int.from_bytes(header[26:28], "little")
            offset += int.from_bytes(header[28:30], "little")
            members[offset] = Member(path, info.filename, offset, info.file_size, info.CRC or None)
            if info.filename.endswith("/data.pkl") and info.CRC:
                archive.read(info)  # raises if its checksum is wrong, which torch.load does not look at
            elif info.filename.endswith("/data.pkl"):
                logger.warning("%s was saved without checksums, so damage in it cannot be noticed", path)
            if info.filename.endswith("/byteorder") and not _is_little_endian(file, members[offset]):
                raise zipfile.BadZipFile("its numbers are not little-endian")
    match = SAVED_AS.match(infos[0].filename) if infos else None
    return members, int(match[1]) if match else None


def _is_little_endian(file: BinaryIO, member: Member) -> bool:
    file.seek(member.offset)
    return file.read(member.nbytes) == b"little"


def _locate(path: Path, name: str, value: Any, members: dict[int, Member]) -> StoredTensor:
    """Return where the bytes of the tensor `value` (on meta) lie."""
    if not isinstance(name, str):
        raise _Unexpected(f": {name!r} is no name; expected tensors by their names")
    if not isinstance(value, Tensor):
        raise _Unexpected(f": {name} is a {type(value).__name__}; expected a tensor")
    if value.layout != torch.strided or not value.dim() or not value.numel():
        raise _Unexpected(f": {name} is sparse, empty or without a dimension: {value.layout}, {tuple(value.shape)}")
    if value.dtype not in DTYPES:
        raise _Unexpected(
            f": {name} is {describe(value.shape, value.dtype)}; expected a float16, bfloat16, float32 or int8 tensor"
        )
    storage = value.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None:
        return StoredTensor(path, name, value.dtype, tuple(value.shape), value.stride(), -1)
    member = members.get(start)
    last = value.storage_offset() + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    if member is None or (last + 1) * value.element_size() > member.nbytes:
        raise zipfile.BadZipFile(f"the bytes of {name} are not where they should be")
    shape = tuple(value.shape)
    stride = contiguous_stride(shape) if value.is_contiguous() else value.stride()
    offset = member.offset + int(value.storage_offset()) * value.element_size()
    return StoredTensor(path, name, value.dtype, shape, stride, offset, member)


def describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return shape and dtype in words."""
    return f"{tuple(shape)} {dtype}".replace("torch.", "")
