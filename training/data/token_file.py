"""A tokenized corpus on disk, read through the memory map.

A folder holds

    tokens.bin       token ids in little-endian uint16 or int32, document after document
    boundaries.npy   int64: index of the first token of every part, and the number of tokens at the end
    corpus.json      kind ("text" or "instructions"), dtype, counts, and what the ids were made from

A part is a document with its `</s>`; of instructions, contexts and targets come in turns. The folder appears under its
name only when it is complete.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

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
        folder: Where it appears when it is complete; an existing one is replaced.
        parts: Batches of parts, each a sequence of token ids.
        facts: Kind, and what the ids were made from.
        vocab_size: Of the ids; decides how many bytes one takes.

    Raises:
        OSError: If the disk is full; nothing is left behind then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= SMALL_VOCABULARY else "<i4")
    lengths = []
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as hidden:
        staged = Path(hidden) / folder.name
        staged.mkdir()  # unlike its parent, it is readable for whom the umask allows
        with (staged / "tokens.bin").open("wb") as file:
            for batch in parts:
                lengths.append(np.fromiter(map(len, batch), np.int64, len(batch)))
                file.write(np.fromiter((i for part in batch for i in part), dtype, int(lengths[-1].sum())).tobytes())
            file.flush()
            os.fsync(file.fileno())
        boundaries = np.concatenate(([0], *lengths)).cumsum(dtype=np.int64)
        np.save(staged / "boundaries.npy", boundaries)
        counts = {"format": FORMAT, "dtype": dtype.str, "num_tokens": int(boundaries[-1]), "vocab_size": vocab_size}
        text = json.dumps(facts | counts, indent=2, ensure_ascii=False) + "\n"
        (staged / FACTS_FILE).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)


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
