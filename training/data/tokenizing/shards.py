"""A shard: the ids of one task, as a worker process writes them.

N.tokens    ids in the corpus's dtype, document after document
N.lengths   int64: length of every part; a part is a document with its `</s>`, or a context or target
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from glm_hf.training.data.tokenizing.encoder import TextEncoder, drop_first
from glm_hf.training.data.tokenizing.inputs import InputEncoder
from glm_hf.training.data.tokenizing.instructions import InstructionRule
from glm_hf.training.data.tokenizing.records import MOST_RECORD_BYTES, Record, place_of, read_records
from glm_hf.training.data.tokenizing.sources import Piece, Task

Item = TypeVar("Item")
BATCH_CHARACTERS = 1 << 18
SHARD_FILES = ("tokens", "lengths")
MOST_INSTRUCTION_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Job:
    """
    What a worker process has to know.

    Attributes:
        folder: Folder of the shards.
        backend: The fast tokenizer as JSON.
        dtype: Dtype of the ids.
        eos_token_id: Id behind every text.
        fields: Field of a text, or fields of inputs and targets.
        instructions: How instructions are completed; None for texts.
        most_bytes: Longest record.
    """

    folder: str
    backend: str
    dtype: str
    eos_token_id: int
    fields: tuple[str, ...]
    instructions: InstructionRule | None = None
    most_bytes: int = MOST_RECORD_BYTES


def shard_path(folder: str | Path, number: int, name: str) -> Path:
    """Return the path of one of the files of a shard."""
    return Path(folder) / f"{number}.{name}"


class ShardMaker:
    """Makes the shards of a job, one after the other."""

    def __init__(self, job: Job) -> None:
        self.job, self.dtype = job, np.dtype(job.dtype)
        self.texts = TextEncoder(job.backend, self.dtype, splits_special_tokens=True)

    def make(self, number: int, task: Task) -> dict[str, Any]:
        """
        Write shard `number`; return its `num_tokens` and `num_parts`, and `hashes` of its files.

        Raises:
            ValueError: If a file of the task is damaged, or a record is not what it should be.
        """
        make = self._texts if self.job.instructions is None else self._instructions
        hashes, counts = {name: xxhash.xxh3_128() for name in SHARD_FILES}, dict.fromkeys(SHARD_FILES, 0)
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(shard_path(self.job.folder, number, name).open("wb")) for name in SHARD_FILES
            }
            for arrays in make(task):
                for name, array in zip(SHARD_FILES, arrays, strict=True):
                    content = array.tobytes()
                    files[name].write(content)
                    hashes[name].update(content)
                    counts[name] += len(array)
        digests = {name: hasher.hexdigest() for name, hasher in hashes.items()}
        return {"num_tokens": counts["tokens"], "num_parts": counts["lengths"], "hashes": digests}

    def _texts(self, task: Task) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ids, and the lengths of the documents that end in them."""
        num_begun = 0  # ids of a document that ends in a later batch
        for batch in batches(self._pieces(task), lambda piece: len(piece[0])):
            ids, lengths = self.texts.encode_joined([text for text, _, _ in batch])
            num_dropped = np.array([number for _, number, _ in batch], np.int64)
            ids, lengths = drop_first(ids, lengths, num_dropped)
            ends = np.cumsum(lengths)[np.array([is_last for _, _, is_last in batch])]
            documents = np.diff(ends, prepend=-num_begun)
            num_begun = len(ids) - int(ends[-1]) if len(ends) else num_begun + len(ids)
            some = documents > 0
            yield np.insert(ids, ends[some], self.job.eos_token_id), documents[some] + 1

    def _pieces(self, task: Task) -> Iterator[tuple[str, int, bool]]:
        """Yield the pieces of texts, how many ids of each are to be dropped, and whether its text ends with it."""
        for piece, number, record in self._records(task):
            [text] = self._strings(piece, number, record)
            try:
                yield from self.texts.pieces(text)
            except ValueError as error:
                raise ValueError(f"{place_of(piece, number)}: {error}") from error

    def _instructions(self, task: Task) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids of contexts and targets in turns, and their lengths."""
        rule, encoder = self.job.instructions, InputEncoder(self.job.backend, self.texts)
        assert rule is not None
        for batch in batches(self._pairs(task), lambda pair: sum(map(len, pair[:2]))):
            inputs, targets = (
                encoder.encode([pair[0] for pair in batch]),
                self.texts.encode([pair[1] for pair in batch]),
            )
            parts = []
            for (_, _, piece, number), ids, target in zip(batch, inputs, targets, strict=True):
                try:
                    context = rule.context(ids.tolist(), len(target))
                except ValueError as error:
                    raise ValueError(f"{place_of(piece, number)}: {error}") from error
                parts += [np.array(context, self.dtype), target]
            yield np.concatenate(parts), np.array(list(map(len, parts)))

    def _pairs(self, task: Task) -> Iterator[tuple[str, str, Piece, int]]:
        """Yield inputs and targets, and where each pair stands."""
        for piece, number, record in self._records(task):
            inputs, target = self._strings(piece, number, record)
            if max(len(inputs), len(target)) > MOST_INSTRUCTION_BYTES:
                raise ValueError(f"{place_of(piece, number)} has more than {MOST_INSTRUCTION_BYTES:,} characters")
            yield inputs, target, piece, number

    def _records(self, task: Task) -> Iterator[tuple[Piece, int, Record]]:
        for piece in task:
            for number, record in read_records(piece, self.job.fields, self.job.most_bytes):
                yield piece, number, record

    def _strings(self, piece: Piece, number: int, record: Record) -> list[str]:
        """Return the fields of a record; ValueError if one is no string, or holds what is no text."""
        values: list[str] = []
        for field in self.job.fields:
            value = record.get(field)
            if not isinstance(value, str):
                raise ValueError(f"{place_of(piece, number)} must have a string in {field!r}, got {repr(value)[:80]}")
            try:
                value.isascii() or value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{place_of(piece, number)} holds half a surrogate pair in {field!r}") from error
            values.append(value)
        return values


def batches(items: Iterable[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yield items in lists of at least `BATCH_CHARACTERS` characters, but for the last."""
    batch, size = list[Item](), 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
