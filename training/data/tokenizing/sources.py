"""Which files a corpus is made from, and how the work on them is divided into tasks of about equal size.

A task is one or more pieces: a range of bytes of uncompressed JSON lines, which stands for those that begin in it; row
groups of Parquet; or a whole file. Small files share a task. The division depends on nothing but the files, so that
any number of processes makes the same shards.
"""

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_hf.folders.records import facts_of_file
from glm_hf.training.data.tokenizing.files import COMPRESSED, blocks, guarded

TASK_BYTES = 16 * 2**20
KINDS = {".jsonl": "lines", ".json": "lines", ".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class Piece:
    """
    A part of a file, or the whole of it.

    Attributes:
        path: The file.
        kind: What it holds: "lines" of JSON, an "array" of JSON, the "text" of one document, or "parquet".
        start: First byte, or row group.
        end: Byte or row group after the last.
        num_bytes: About how many bytes it takes in the file.
        facts: Size and time of change of the file, which must not change meanwhile.
    """

    path: str
    kind: str
    start: int
    end: int
    num_bytes: int
    facts: tuple[int, ...]


Task = tuple[Piece, ...]


def find_sources(paths: Sequence[str | Path]) -> list[Path]:
    """
    Return the files of paths, folders and patterns, those of each in the order of their names.

    Files and folders with hidden names are found only by their own path.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If a file has an unknown ending, is not a regular one, or is given twice.
    """
    files: dict[Path, Path] = {}
    for path in map(str, paths):
        for file in _find(path):
            if kind_of(file.name) is None:
                raise ValueError(
                    f"{file} must end in {', '.join(KINDS)}, or these but .parquet with .gz or .zst behind"
                )
            if not file.is_file():
                raise ValueError(f"{file} is not a regular file")
            if files.setdefault(file.resolve(), file) is not file:
                raise ValueError(f"{file} is given twice; its documents would be there twice")
    return list(files.values())


def _find(path: str) -> list[Path]:
    if Path(path).is_dir():
        below = [file.relative_to(path) for file in Path(path).rglob("*") if kind_of(file.name) and file.is_file()]
        seen = [file for file in below if not any(part.startswith(".") for part in file.parts)]
        found = [Path(path) / file for file in seen if file.name != "corpus.json"]  # of a tokenized corpus
    else:
        found = [Path(path)] if Path(path).exists() else [Path(name) for name in glob.glob(path)]
    if not found:
        raise FileNotFoundError(f"there are no corpus files at {path}")
    return sorted(found)


def kind_of(name: str) -> str | None:
    """Return what a file of this name holds, None if its ending is unknown."""
    path = Path(name)
    if path.suffix in COMPRESSED:
        kind = KINDS.get(Path(path.stem).suffix)
        return None if kind == "parquet" else kind
    return KINDS.get(path.suffix)


def plan_tasks(files: Iterable[Path]) -> list[Task]:
    """Return the tasks, in the order of their documents; ValueError if a Parquet file cannot be read."""
    tasks: list[Task] = []
    current: list[Piece] = []
    for piece in (piece for file in files for piece in _pieces_of(file)):
        if current and sum(piece.num_bytes for piece in current) + piece.num_bytes > TASK_BYTES:
            tasks.append(tuple(current))
            current = []
        current.append(piece)
    return [*tasks, tuple(current)] if current else tasks


def _pieces_of(file: Path) -> Iterator[Piece]:
    size, kind, facts = file.stat().st_size, kind_of(file.name) or "", tuple(facts_of_file(file))
    if kind == "parquet":
        for group, num_bytes in enumerate(_row_groups(file)):
            yield Piece(str(file), kind, group, group + 1, num_bytes, facts)
    elif kind == "lines" and _holds_an_array(file):
        yield Piece(str(file), "array", 0, size, size, facts)
    elif kind == "lines" and file.suffix not in COMPRESSED:
        for start in range(0, size, TASK_BYTES):
            end = min(start + TASK_BYTES, size)
            yield Piece(str(file), kind, start, end, end - start, facts)
    elif size:
        yield Piece(str(file), kind, 0, size, size, facts)


def _holds_an_array(file: Path) -> bool:
    """Tell whether a JSON file has all of its records in an array."""
    for block in guarded(str(file), blocks(str(file), 2**10)):
        if beginning := block.removeprefix(b"\xef\xbb\xbf").lstrip():
            return beginning.startswith(b"[")
    return False


def _row_groups(file: Path) -> list[int]:
    """Return the bytes of each row group of a Parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError("Parquet files are read by the package pyarrow: pip install pyarrow") from error
    try:
        metadata = parquet.read_metadata(file)
    except (OSError, ArrowException) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
