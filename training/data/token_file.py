"""A tokenized corpus on disk, of which the runs are read that are needed.

A folder holds

    tokens.bin       token ids in little-endian uint16 or int32, document after document
    boundaries.npy   int64: index of the first token of every part, and the number of tokens at the end
    corpus.json      kind ("text" or "instructions"), dtype, counts, what the ids were made from, and the XXH3 hash of
                     every `block_bytes` of the two files

A part is a document with its `</s>`; of instructions, contexts and targets come in turns. The folder appears under its
name only when it is complete.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from glm_hf.folders.atomic import AtomicFolder
from glm_hf.folders.validation import read_json, reading, require_regular

FACTS_FILE, TOKENS_FILE, BOUNDARIES_FILE = "corpus.json", "tokens.bin", "boundaries.npy"
FORMAT = 2
WITHOUT_CHECKSUMS = 1
SMALL_VOCABULARY = 1 << 16
DTYPES = ("<u2", "<i4")
BLOCK_BYTES = 16 * 2**20
MOST_BLOCK_BYTES = 2**28
BLOCKS_AT_OPENING, BLOCKS_OF_LARGE = 64, 8
SEEKING = threading.Lock()
"""Blocks of a file that are checked when a corpus is opened: all up to 1 GiB, of a larger file some spread evenly."""
KINDS = ("text", "instructions")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """An opened corpus; copies of it in other processes open the files themselves."""

    folder: Path
    tokens: np.ndarray
    """Memory map of all ids."""
    boundaries: np.ndarray
    """`(parts + 1,)`, a memory map, too."""
    facts: dict[str, Any]
    """Content of corpus.json."""
    files: tuple[FileIO, FileIO] | None = None
    """The open files of the ids and of the boundaries, which stay as they are when others replace the folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder only."""
        return _map_files, (self.folder,)

    def read_boundaries(self, first: int, last: int) -> np.ndarray:
        """Return the boundaries from one to another, both included."""
        return _read_runs(self.files and self.files[1], self.boundaries, [(first, last + 1)])

    def read_tokens(self, starts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """Return the tokens of texts one after another; a text that passes the last token goes on at the first."""
        runs: list[tuple[int, int]] = []
        for start, length in zip(starts, lengths, strict=True):
            first = runs.pop()[0] if runs and runs[-1][1] == start else start
            runs.append((first, start + length))
            if start + length > len(self.tokens):
                runs[-1:] = (first, len(self.tokens)), (0, start + length - len(self.tokens))
        return _read_runs(self.files and self.files[0], self.tokens, runs)

    @property
    def num_documents(self) -> int:
        """Documents, or pairs of context and target."""
        parts = len(self.boundaries) - 1
        return parts // 2 if self.facts["kind"] == "instructions" else parts


def write_token_file(
    folder: Path, parts: Iterable[Sequence[Sequence[int]]], facts: dict[str, Any], vocab_size: int
) -> None:
    """
    Write a corpus.

    Args:
        folder: Destination, which appears when it is complete; an existing corpus is replaced.
        parts: Batches of parts, each a sequence of token ids.
        facts: Kind of the corpus, and what the ids were made from.
        vocab_size: Size of the vocabulary, which decides how many bytes an id takes.

    Raises:
        OSError: If the disk is full; nothing is left behind then.
    """
    dtype = dtype_for(vocab_size)
    lengths = []
    with AtomicFolder(folder.absolute(), replaces=True).writing() as staged:
        with (staged / TOKENS_FILE).open("wb") as file:
            for batch in parts:
                lengths.append(np.fromiter(map(len, batch), np.int64, len(batch)))
                file.write(np.fromiter((i for part in batch for i in part), dtype, int(lengths[-1].sum())).tobytes())
        boundaries = np.concatenate(([0], *lengths)).cumsum(dtype=np.int64)
        np.save(staged / BOUNDARIES_FILE, boundaries)
        hashes = {
            name: [digest for _, _, digest in hashed_blocks(staged / name, BLOCK_BYTES)]
            for name in (TOKENS_FILE, BOUNDARIES_FILE)
        }
        write_facts(staged, facts, dtype, int(boundaries[-1]), vocab_size, hashes)


def dtype_for(vocab_size: int) -> np.dtype:
    """Return the dtype that holds the ids of a vocabulary."""
    return np.dtype(DTYPES[0] if vocab_size <= SMALL_VOCABULARY else DTYPES[1])


def write_facts(
    folder: Path,
    facts: dict[str, Any],
    dtype: np.dtype,
    num_tokens: int,
    vocab_size: int,
    hashes: dict[str, list[str]],
) -> None:
    """
    Write corpus.json beside the two files that it is about.

    Args:
        folder: Folder of the corpus.
        facts: Kind of the corpus, and what the ids were made from.
        dtype: Dtype of the ids.
        num_tokens: Number of the ids.
        vocab_size: Size of the vocabulary.
        hashes: Hash of every block of `BLOCK_BYTES` of the two files, by name.
    """
    counts = {"format": FORMAT, "dtype": dtype.str, "num_tokens": num_tokens, "vocab_size": vocab_size}
    text = json.dumps(facts | counts | {"block_bytes": BLOCK_BYTES, "xxh3_64": hashes}, ensure_ascii=False)
    (folder / FACTS_FILE).write_text(text + "\n", encoding="utf-8")


def open_token_file(folder: Path) -> TokenFile:
    """
    Open a corpus that `write_token_file` has written.

    Sizes and some blocks are checked, all of them in a small corpus; `find_damage` checks all.

    Raises:
        FileNotFoundError: If the folder or one of its files is not there.
        ValueError: If the corpus is damaged, or was written by a version that this one does not know.
    """
    corpus = _map_files(folder)
    if problem := next(_problems(corpus, blocks_at_opening), None):
        raise ValueError(f"{problem}; tokenize it again")
    if corpus.facts["format"] == WITHOUT_CHECKSUMS:
        logger.warning("%s was tokenized without checksums, so damage in it cannot be noticed", folder)
    return corpus


def find_damage(corpus: TokenFile) -> list[str]:
    """Return what is wrong with a corpus, whose files are read as a whole, a line for each block."""
    return list(_problems(corpus, range))


def require_ids(corpus: TokenFile, vocab_size: int, forbidden: Iterable[int]) -> None:
    """
    Check ids of a corpus, as many as are checked when it is opened.

    Args:
        corpus: The corpus.
        vocab_size: Size of the model's vocabulary.
        forbidden: Ids that have no place in a text, such as masks; instructions have them.

    Raises:
        ValueError: If an id is not of the vocabulary, or is forbidden.
    """
    has_masks = corpus.facts["kind"] == "instructions"
    unwanted = np.array([] if has_masks else sorted(forbidden), corpus.tokens.dtype)
    step = BLOCK_BYTES // corpus.tokens.itemsize
    for block in blocks_at_opening(-(-len(corpus.tokens) // step)):
        start = block * step
        ids = corpus.read_tokens([start], [min(step, len(corpus.tokens) - start)])
        if ids.max() >= vocab_size or ids.min() < 0 or any((ids == one).any() for one in unwanted):
            wrong = (ids >= vocab_size) | (ids < 0) | np.isin(ids, unwanted)
            place = int(wrong.argmax())
            raise ValueError(
                f"{corpus.folder / TOKENS_FILE}: token {start + place} is {ids[place]}, which has no place in "
                f"a text of a vocabulary of {vocab_size}; tokenize it again"
            )


def _require_facts(facts: dict[str, Any]) -> None:
    """Raise ValueError unless corpus.json holds what this version reads."""
    if facts.get("format") not in (FORMAT, WITHOUT_CHECKSUMS):
        raise ValueError(f"it has format {facts.get('format')}, this version reads {FORMAT}; tokenize it again")
    rules: dict[str, Callable[[Any], bool]] = {
        "kind": lambda value: value in KINDS,
        "dtype": lambda value: value in DTYPES,
        "num_tokens": _is_count,
        "vocab_size": _is_count,
    }
    if facts["format"] == FORMAT:
        rules |= {"block_bytes": lambda value: _is_count(value) and value <= MOST_BLOCK_BYTES, "xxh3_64": _is_hashes}
    for name, is_valid in rules.items():
        if not is_valid(facts.get(name)):
            raise ValueError(f"{FACTS_FILE} has no valid {name}: {str(facts.get(name))[:80]}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), list) for name in (TOKENS_FILE, BOUNDARIES_FILE)
    )


def _map_files(folder: Path) -> TokenFile:
    """Open the files of a corpus; ValueError if they are of another kind, or their sizes do not fit together."""
    with reading(folder, "is not a tokenized corpus"):
        for name in (FACTS_FILE, TOKENS_FILE, BOUNDARIES_FILE):
            require_regular(folder / name)
        facts = read_json(folder / FACTS_FILE)
        _require_facts(facts)
        boundaries = np.lib.format.open_memmap(folder / BOUNDARIES_FILE, mode="r")  # which never unpickles
        if boundaries.ndim != 1 or boundaries.dtype != np.int64 or len(boundaries) < 2:
            raise ValueError(f"{BOUNDARIES_FILE} does not hold the boundaries of documents")
    dtype, num_tokens = np.dtype(facts["dtype"]), facts["num_tokens"]
    size = (folder / TOKENS_FILE).stat().st_size
    if size != num_tokens * dtype.itemsize or boundaries[-1] != num_tokens:
        raise ValueError(f"{folder} is damaged: {num_tokens} tokens expected, {size} bytes found; tokenize it again")
    files = FileIO(folder / TOKENS_FILE), FileIO(folder / BOUNDARIES_FILE)
    return TokenFile(folder, np.memmap(folder / TOKENS_FILE, dtype=dtype, mode="r"), boundaries, facts, files)


def _problems(corpus: TokenFile, choose: Callable[[int], Sequence[int]]) -> Iterator[str]:
    """Yield what is wrong in some blocks of each file, which `choose` chooses of their number."""
    if corpus.facts["format"] == FORMAT:
        for name in (TOKENS_FILE, BOUNDARIES_FILE):
            path, expected = corpus.folder / name, corpus.facts["xxh3_64"][name]
            if len(expected) != -(-path.stat().st_size // corpus.facts["block_bytes"]):
                yield f"{path} has another size than was written"
                continue
            blocks = choose(len(expected))
            for block, (start, end, digest) in zip(
                blocks, hashed_blocks(path, corpus.facts["block_bytes"], blocks), strict=True
            ):
                if digest != expected[block]:
                    yield f"{path} is damaged: bytes {start:,} to {end:,} are not those that were written"
    step = BLOCK_BYTES // 8
    for block in choose(-(-len(corpus.boundaries) // step)):
        starts = corpus.read_boundaries(block * step, (block + 1) * step)
        if starts[0] < 0 or (starts[1:] < starts[:-1]).any():
            yield f"{corpus.folder / BOUNDARIES_FILE} is damaged: its numbers do not rise"
            return


def _read_runs(file: FileIO | None, mapped: np.ndarray, runs: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    Return numbers of a file without its map, whose pages count as memory and are read with megabytes around them.

    Args:
        file: The file, None if its numbers are an array in memory.
        mapped: The map or the array.
        runs: Numbers of each run, from the first to before the last; what is beyond the end is left out.

    Raises:
        ValueError: If the file has become shorter.
    """
    runs = [(start, min(end, len(mapped))) for start, end in runs]
    if file is None:
        return np.concatenate([mapped[start:end] for start, end in runs])
    assert isinstance(mapped, np.memmap)
    numbers = np.empty(sum(end - start for start, end in runs), mapped.dtype)
    room = numbers.view(np.uint8).data
    for start, end in runs:
        size = (end - start) * mapped.itemsize
        if _read_at(file, mapped.offset + start * mapped.itemsize, room[:size]) != size:
            raise ValueError(f"{file.name} is damaged: it has become shorter; tokenize it again")
        room = room[size:]
    return numbers


def _read_at(file: FileIO, start: int, room: memoryview) -> int:
    """Read what fits the room; threads, and forked processes, share the place in a file."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [room], start)
    with SEEKING:
        file.seek(start)
        return file.readinto(room)


def blocks_at_opening(count: int) -> Sequence[int]:
    """Choose all of a few blocks; of many some, the first and the last among them."""
    return (
        range(count) if count <= BLOCKS_AT_OPENING else np.linspace(0, count - 1, BLOCKS_OF_LARGE).astype(int).tolist()
    )


def hashed_blocks(path: Path, block_bytes: int, blocks: Iterable[int] | None = None) -> Iterator[tuple[int, int, str]]:
    """Yield (first byte, byte after the last, hash) of some blocks of a file, of all for None."""
    with path.open("rb") as file:
        blocks = range(-(-path.stat().st_size // block_bytes)) if blocks is None else blocks
        for block in blocks:
            yield block * block_bytes, *_hash_block(file, block * block_bytes, block_bytes)


def _hash_block(file: BinaryIO, start: int, block_bytes: int) -> tuple[int, str]:
    file.seek(start)
    content = file.read(block_bytes)
    return start + len(content), xxhash.xxh3_64_hexdigest(content)
