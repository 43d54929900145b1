"""The records of a piece of a file, read as a stream: lines of JSON, rows of Parquet, or the text of a whole file."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from glm_hf.folders.records import facts_of_file
from glm_hf.training.data.tokenizing.sources import Piece

MOST_RECORD_BYTES = 256 * 2**20
"""Longest record, of which a process holds some copies at a time."""
ROWS_AT_ONCE = 16
BLOCK_BYTES = 2**20

Record = dict[str, Any]


def read_records(piece: Piece, fields: Sequence[str]) -> Iterator[tuple[int, Record]]:
    """
    Yield the records of a piece with their numbers, counted from 0, of which `place_of` makes a sentence.

    Args:
        piece: What is to be read.
        fields: Fields that are needed, of which a file may lack some; the text of a text file is in the first.

    Raises:
        ValueError: If the file cannot be read, has changed, or holds something else.
    """
    if piece.kind == "parquet":
        yield from enumerate(_guarded(piece, _rows(piece, fields)))
    elif piece.kind == "text":
        for content in _guarded(piece, _whole(piece)):
            yield 0, {fields[0]: _decoded(piece, content)}
    else:
        for number, line in enumerate(_guarded(piece, _lines(piece))):
            if line.strip():
                yield number, _parsed(piece, number, line)
    if tuple(facts_of_file(Path(piece.path))) != piece.facts:
        raise ValueError(f"{piece.path} has changed while it was read; run the command again")


def place_of(piece: Piece, number: int) -> str:
    """Tell where record `number` of a piece is, as a person counts."""
    if piece.kind == "text":
        return piece.path
    if piece.kind == "parquet":
        from pyarrow import parquet

        metadata = parquet.read_metadata(piece.path)
        before = sum(metadata.row_group(group).num_rows for group in range(piece.start))
        return f"row {before + number + 1} of {piece.path}"
    return f"line {_num_lines_before(piece) + number + 1} of {piece.path}"


def _num_lines_before(piece: Piece) -> int:
    """Return how many lines begin before a piece."""
    if not piece.start:
        return 0
    count, left = 1, piece.start - 1
    with open(piece.path, "rb") as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


def _parsed(piece: Piece, number: int, line: bytes) -> Record:
    """Return the record of a line."""
    if len(line) > MOST_RECORD_BYTES:
        raise ValueError(f"{place_of(piece, number)} has more than {MOST_RECORD_BYTES:,} bytes; split it")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as reason:
        hint = "; write every record of an array into a line of its own" if line.lstrip()[:1] == b"[" else ""
        raise ValueError(f"{place_of(piece, number)} is not JSON: {reason}{hint}") from reason
    if not isinstance(record, dict):
        raise ValueError(f"{place_of(piece, number)} must be a JSON object, got {line[:40]!r}")
    return record


def _decoded(piece: Piece, content: bytes) -> str:
    if len(content) > MOST_RECORD_BYTES:
        raise ValueError(
            f"{piece.path} has more than {MOST_RECORD_BYTES:,} bytes, and a text file is one document; write its "
            "documents as lines of a .jsonl file"
        )
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{piece.path} is not text in UTF-8: {error}") from error


def _guarded(piece: Piece, items: Iterator[Any]) -> Iterator[Any]:
    """Yield `items`; ValueError with the file's name if it is damaged."""
    damages: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if piece.kind == "parquet" or piece.path.endswith(".zst"):
        from pyarrow import ArrowException

        damages += (ArrowException,)
    end = object()
    while True:
        try:
            item = next(items, end)
        except damages as error:
            raise ValueError(f"{piece.path} cannot be read: {error}") from error
        if item is end:
            return
        yield item


def _open(piece: Piece) -> BinaryIO:
    """Open a file, decompressed."""
    if piece.path.endswith(".gz"):
        return io.BufferedReader(gzip.open(piece.path, "rb"))
    if piece.path.endswith(".zst"):
        try:
            import pyarrow
        except ImportError as error:
            raise ValueError("zst files are read by the package pyarrow: pip install pyarrow") from error
        return io.BufferedReader(pyarrow.input_stream(piece.path, compression="zstd"), BLOCK_BYTES)
    return open(piece.path, "rb")


def _whole(piece: Piece) -> Iterator[bytes]:
    with _open(piece) as file:
        yield file.read(MOST_RECORD_BYTES + 1)


def _lines(piece: Piece) -> Iterator[bytes]:
    """Yield the lines that begin in a piece, the longest ones only as far as they are allowed to be."""
    with _open(piece) as file:
        place = piece.start
        if place:  # in the middle of a line, which is another piece's
            place -= 1
            file.seek(place)
            while skipped := file.readline(BLOCK_BYTES):
                place += len(skipped)
                if skipped.endswith(b"\n"):
                    break
        is_compressed = piece.path.endswith((".gz", ".zst"))
        while (is_compressed or place < piece.end) and (line := file.readline(MOST_RECORD_BYTES + 1)):
            place += len(line)
            yield line


def _rows(piece: Piece, fields: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of row groups, with the fields that there are."""
    from pyarrow import parquet

    with parquet.ParquetFile(piece.path, memory_map=True) as file:
        names = [name for name in file.schema_arrow.names if name in fields]
        groups = list(range(piece.start, piece.end))
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=names or None, use_threads=False):
            yield from batch.to_pylist()
