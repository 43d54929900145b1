"""A tokenized corpus on disk, read through the memory map.

A folder holds

    tokens.bin       token ids in little-endian uint16 or int32, document after document
    boundaries.npy   int64: index of the first token of every part, and the number of tokens at the end
    corpus.json      kind ("text" or "instructions"), dtype, counts, and what the ids were made from

A part is a document with its `</s>`; of instructions, contexts and targets come in turns. The folder appears under its
name only when it is complete.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm_hf.folders.atomic import AtomicFolder

FACTS_FILE = "corpus.json"
FORMAT = 1
SMALL_VOCABULARY = 1 << 16


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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the folder only."""
        return open_token_file, (self.folder,)

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
    dtype = np.dtype("<u2" if vocab_size <= SMALL_VOCABULARY else "<i4")
    lengths = []
    with AtomicFolder(folder.absolute(), replaces=True).writing() as staged:
        with (staged / "tokens.bin").open("wb") as file:
            for batch in parts:
                lengths.append(np.fromiter(map(len, batch), np.int64, len(batch)))
                file.write(np.fromiter((i for part in batch for i in part), dtype, int(lengths[-1].sum())).tobytes())
        boundaries = np.concatenate(([0], *lengths)).cumsum(dtype=np.int64)
        np.save(staged / "boundaries.npy", boundaries)
        counts = {"format": FORMAT, "dtype": dtype.str, "num_tokens": int(boundaries[-1]), "vocab_size": vocab_size}
        text = json.dumps(facts | counts, indent=2, ensure_ascii=False) + "\n"
        (staged / FACTS_FILE).write_text(text, encoding="utf-8")


def open_token_file(folder: Path) -> TokenFile:
    """
    Open a corpus that `write_token_file` has written.

    Raises:
        FileNotFoundError: If the folder or one of its files is not there.
        ValueError: If the sizes of its files do not fit together.
    """
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        boundaries = np.load(folder / "boundaries.npy", mmap_mode="r")
        dtype, num_tokens = np.dtype(facts["dtype"]), facts["num_tokens"]
        size = (folder / "tokens.bin").stat().st_size
        if facts["format"] != FORMAT:
            raise ValueError(f"it has format {facts['format']}, this version reads {FORMAT}; tokenize it again")
    except (EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not a tokenized corpus: {error}") from error
    if size != num_tokens * dtype.itemsize or boundaries[-1] != num_tokens:
        raise ValueError(f"{folder} is damaged: {num_tokens} tokens expected, {size} bytes found; tokenize it again")
    return TokenFile(folder, np.memmap(folder / "tokens.bin", dtype=dtype, mode="r"), boundaries, facts)
