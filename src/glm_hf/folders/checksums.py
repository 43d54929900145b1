"""The checksums of a folder's files, which tell whether it is whole, and which of its files is damaged.

They are written last, to `checksums.json`: {"format": 1, "files": {name: {"size": bytes, "xxh3_128": digest}}}. XXH3
finds damage at the speed of memory; it does not tell who has written a file, for which there are signatures.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from glm_hf.folders.model_folder import write_json
from glm_hf.folders.validation import read_json

CHECKSUMS = "checksums.json"
FORMAT = 1
BLOCK_BYTES = 4 * 2**20
THREADS = min(8, os.cpu_count() or 1)
LOADED = (".bin", ".json", ".pt", ".pth", ".safetensors")
"""Ends of names of files that are loaded if they are there."""

FileFacts = dict[str, Any]


def compute_checksums(folder: Path, names: Iterable[str]) -> dict[str, FileFacts]:
    """Return size and hash of the files `names` in `folder`, which threads read."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _facts(folder / name), names), strict=True))


def write_checksums(folder: Path, files: Mapping[str, FileFacts] | None = None) -> None:
    """Write the checksums of `files`, as `compute_checksums` returns them; of all in the folder if none are given."""
    files = compute_checksums(folder, files_of(folder)) if files is None else files
    write_json(folder / CHECKSUMS, {"format": FORMAT, "files": files})


def files_of(folder: Path) -> list[str]:
    """Return the names of all files in `folder`, without those of folders in it that have checksums of their own."""
    return sorted(path.relative_to(folder).as_posix() for path in _walk(folder) if path != folder / CHECKSUMS)


def read_checksums(folder: Path) -> dict[str, FileFacts]:
    """
    Return size and hash of all files of a folder, as they were written.

    Raises:
        FileNotFoundError: If it has no checksums.
        ValueError: If their file is damaged.
    """
    path = folder / CHECKSUMS
    content = read_json(path)
    files = content.get("files")
    if content.get("format") != FORMAT or not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise ValueError(f"{path} holds no checksums that this version knows")
    return files


def find_damage(folder: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """
    Return what is wrong with a folder that has checksums, a line for each file; nothing if it is whole.

    Args:
        folder: The folder.
        share: (index, count) to hash only every `count`-th file, so that several processes share the work. Names and
            sizes are always compared.

    Raises:
        FileNotFoundError: If it has no checksums.
        ValueError: If their file is damaged.
    """
    expected = read_checksums(folder)
    problems = []
    whole = []
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (size := path.stat().st_size) != facts["size"]:
            problems.append(f"{path} has {size:,} bytes, but {facts['size']:,} were written")
        else:
            whole.append(name)
    problems += [f"{folder / name} is not of this folder; remove it" for name in _surplus(folder, expected)]
    for name, facts in compute_checksums(folder, spread(folder, whole, *share)).items():
        if facts != expected[name]:
            problems.append(f"{folder / name} is damaged: its bytes are not those that were written")
    return problems


def spread(folder: Path, names: Iterable[str], index: int, count: int) -> list[str]:
    """Return share `index` of `count` of the files `names`, whose sizes come to about the same in every share."""
    by_size = sorted(names, key=lambda name: (-(folder / name).stat().st_size, name))
    return by_size[index::count]


def _surplus(folder: Path, expected: Mapping[str, FileFacts]) -> Iterator[str]:
    """Yield the files beside the `expected` ones that would be loaded with them."""
    folders = {str(PurePosixPath(name).parent) for name in expected}
    for name in files_of(folder):
        parent = str(PurePosixPath(name).parent)
        if name not in expected and parent in folders and name.endswith(LOADED):
            yield name


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if not (path / CHECKSUMS).is_file():
                yield from _walk(path)
        else:
            yield path


def _facts(path: Path) -> FileFacts:
    size = path.stat().st_size
    return {"size": size, "xxh3_128": hash_range(path, 0, size)}


def hash_range(path: Path, start: int, end: int) -> str:
    """Return the XXH3 hash of the bytes of a file from `start` to `end`, or to the end of the file."""
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end and (count := file.readinto(buffer[: min(BLOCK_BYTES, end - start)])):
            hasher.update(buffer[:count])
            start += count
    return hasher.hexdigest()


def _is_entry(item: tuple[str, Any]) -> bool:
    name, facts = item
    is_inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    return is_inside and isinstance(facts, dict) and facts.keys() == {"size", "xxh3_128"}
