"""The records of a piece of a file, read as a stream: lines of JSON, rows of Parquet, or the text of a whole file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_hf.folders.records import facts_of_file
from glm_hf.training.data.tokenizing.files import BLOCK_BYTES, COMPRESSED, guarded, open_file
from glm_hf.training.data.tokenizing.sources import Piece

MOST_RECORD_BYTES = 256 * 2**20
"""Longest record, of which a process holds some copies at a time."""
ROWS_AT_ONCE = 16

DECODER = json.JSONDecoder()

Record = dict[str, Any]


def read_records(
    piece: Piece, fields: Sequence[str], most_bytes: int = MOST_RECORD_BYTES
) -> Iterator[tuple[int, Record]]:
    """
    Yield the records of a piece with their numbers, counted from 0, of which `place_of` makes a sentence.

    Args:
        piece: What is to be read.
        fields: Fields that are needed, of which a file may lack some; the text of a text file is in the first.
        most_bytes: Longest record; an array as a whole may have `MOST_RECORD_BYTES`.

    Raises:
        ValueError: If the file cannot be read, has changed, or holds something else.
    """
    if piece.kind == "parquet":
        for number, row in enumerate(guarded(piece.path, _rows(piece, fields))):
            _require_room(piece, number, _size_of(row), most_bytes)
            yield number, row
    elif piece.kind == "text":
        for content in guarded(piece.path, _whole(piece, most_bytes)):
            _require_room(piece, 0, len(content), most_bytes)
            yield 0, {fields[0]: _decoded(piece, content)}
    elif piece.kind == "array":
        for content in guarded(piece.path, _whole(piece, MOST_RECORD_BYTES)):
            for number, record in enumerate(_array(piece, content)):
                _require_room(piece, number, _size_of(record), most_bytes)
                yield number, record
    else:
        for number, line in enumerate(guarded(piece.path, _lines(piece, most_bytes))):
            if line.strip():
                _require_room(piece, number, len(line), most_bytes)
                yield number, _parsed(piece, number, line)
    if tuple(facts_of_file(Path(piece.path))) != piece.facts:
        raise ValueError(f"{piece.path} has changed while it was read; run the command again")


def place_of(piece: Piece, number: int) -> str:
    """Tell where record `number` of a piece is, as a person counts."""
    if piece.kind == "text":
        return piece.path
    if piece.kind == "array":
        return f"record {number + 1} of {piece.path}"
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
    try:
        record = _loaded(line)
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{place_of(piece, number)} is not JSON: {reason}") from reason
    if not isinstance(record, dict):
        raise ValueError(f"{place_of(piece, number)} must be a JSON object, got {line[:40]!r}")
    return record


def _loaded(line: bytes) -> Any:
    """Return what `json.loads` does, without a search for the encoding where a line cannot but be UTF-8."""
    if line.startswith(b'{"'):
        text = line.decode("utf-8", "surrogatepass")
        record, end = DECODER.raw_decode(text)
        if end == len(text) or text[end:] == "\n":
            return record
    return json.loads(line)


def _array(piece: Piece, content: bytes) -> list[Record]:
    """Return the records of an array."""
    if len(content) > MOST_RECORD_BYTES:
        raise ValueError(
            f"{piece.path} is an array of more than {MOST_RECORD_BYTES:,} bytes; write every record into a line of "
            "its own"
        )
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{piece.path} is not JSON: {reason}") from reason
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{place_of(piece, number)} must be a JSON object, got {repr(record)[:40]}")
    return records


def _size_of(record: Record) -> int:
    """Return the bytes of a record's values."""
    return sum(len(str(value).encode("utf-8", "replace")) for value in record.values())


def _require_room(piece: Piece, number: int, num_bytes: int, most_bytes: int) -> None:
    """Raise ValueError if a record is too long."""
    if num_bytes > most_bytes:
        way_out = "split it" if most_bytes == MOST_RECORD_BYTES else "split it, or raise max_record_size"
        if piece.kind == "text":
            way_out += "; a text file is one document, of several make lines of a .jsonl file"
        raise ValueError(f"{place_of(piece, number)} has more than {most_bytes:,} bytes; {way_out}")


def _decoded(piece: Piece, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{piece.path} is not text in UTF-8: {error}") from error


def _whole(piece: Piece, most_bytes: int) -> Iterator[bytes]:
    with open_file(piece.path) as file:
        yield file.read(most_bytes + 1)


def _lines(piece: Piece, most_bytes: int) -> Iterator[bytes]:
    """Yield the lines that begin in a piece, the longest ones only as far as they are allowed to be."""
    with open_file(piece.path) as file:
        place = piece.start
        if place:  # in the middle of a line, which is another piece's
            place -= 1
            file.seek(place)
            while skipped := file.readline(BLOCK_BYTES):
                place += len(skipped)
                if skipped.endswith(b"\n"):
                    break
        is_compressed = piece.path.endswith(COMPRESSED)
        while (is_compressed or place < piece.end) and (line := file.readline(most_bytes + 1)):
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
