"""A corpus that grows shard by shard, and survives a kill at any moment.

In the hidden folder of the corpus lie, until it is complete:

    journal.jsonl   a line of options; then a line for every shard that was made, with the hash of its task, counts and
                    hashes, and one for every shard that was appended, with the hashes of the blocks that it completed
    folder/         tokens.bin and boundaries.npy as far as shards were appended, in their order
    folder/shards/  shards that were made, but not appended

A line counts once it is whole, and a file is as long as the lines say, whatever was written behind that.
"""

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import xxhash

from glm_hf.conversion.streaming.segments import RESTART
from glm_hf.folders.atomic import sync
from glm_hf.folders.checksums import hash_range
from glm_hf.folders.validation import reading
from glm_hf.training.data.token_file import (
    BLOCK_BYTES,
    BOUNDARIES_FILE,
    TOKENS_FILE,
    blocks_at_opening,
    hashed_blocks,
    write_facts,
)
from glm_hf.training.data.tokenizing.shards import SHARD_FILES, shard_path

HEADER_BYTES = 128
"""Bytes in front of the numbers of boundaries.npy, which are zero until the count is known."""
JOURNAL = "journal.jsonl"
SHARDS = "shards"
COPIED_AT_ONCE = 4 * 2**20


class HashedFile:
    """
    A file that is appended to, with the hash of every block of it.

    Args:
        path: The file, made if it is not there and nothing is kept.
        hashes: Hashes of its whole blocks, as far as it is kept.
        size: Bytes that are kept.
        num_blank: Bytes at its start that are zero.

    Raises:
        ValueError: If the kept bytes are not those that were written, as far as they are looked at.
    """

    def __init__(self, path: Path, hashes: list[str], size: int, num_blank: int = 0) -> None:
        self.hashes, self.size = hashes, size
        path.touch()
        if size > num_blank and path.stat().st_size < size:
            raise ValueError(f"{path} should have {size:,} bytes from the interrupted run, but has not; {RESTART}")
        self.file = path.open("r+b")
        self.file.write(bytes(num_blank))
        self.file.truncate(size)
        self.file.flush()
        blocks = blocks_at_opening(len(hashes))
        for block, (_, _, digest) in zip(blocks, hashed_blocks(path, BLOCK_BYTES, blocks), strict=True):
            if digest != hashes[block]:
                raise ValueError(f"{path} is damaged: it has changed since the interrupted run; {RESTART}")
        self.file.seek(len(hashes) * BLOCK_BYTES)
        self.block = xxhash.xxh3_64(self.file.read())

    def append(self, content: bytes) -> None:
        """Write bytes behind all others."""
        self.file.write(content)
        left = memoryview(content)
        while len(left):
            taken = left[: BLOCK_BYTES - self.size % BLOCK_BYTES]
            self.block.update(taken)
            self.size, left = self.size + len(taken), left[len(taken) :]
            if self.size % BLOCK_BYTES == 0:
                self.hashes.append(self.block.hexdigest())
                self.block = xxhash.xxh3_64()

    def sync(self) -> None:
        """Wait until all bytes are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def write_header(self, header: bytes) -> None:
        """Replace the first bytes, and their hash; nothing can be appended afterwards."""
        self.file.seek(0)
        self.file.write(header)
        self.file.seek(0)
        first = xxhash.xxh3_64(self.file.read(BLOCK_BYTES))
        if self.hashes:
            self.hashes[0] = first.hexdigest()
        else:
            self.block = first

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def all_hashes(self) -> list[str]:
        """Return the hashes of all blocks, the last of which may be a part."""
        return self.hashes + ([self.block.hexdigest()] if self.size % BLOCK_BYTES else [])


class GrowingCorpus:
    """
    The corpus as far as it is made.

    A shard whose task has changed is made anew, and so is what was appended behind it.

    Args:
        home: Hidden folder.
        work: Folder in it that becomes the corpus.
        options: What all shards depend on, as JSON.
        tasks: Hash of every task.
        dtype: Dtype of the ids.

    Raises:
        ValueError: If an interrupted run had other options, or its files are damaged.
    """

    def __init__(self, home: Path, work: Path, options: Any, tasks: Sequence[str], dtype: np.dtype) -> None:
        self.work, self.shards, self.tasks, self.dtype = work, work / SHARDS, tasks, dtype
        self.made: dict[int, dict[str, Any]] = {}
        self.appended: list[dict[str, Any]] = []
        self.shards.mkdir(parents=True, exist_ok=True)
        with reading(home / JOURNAL):
            lines = _read_journal(home / JOURNAL)
            if lines and lines[0] != json.loads(json.dumps(options)):
                raise ValueError(f"the interrupted run had other options or another version of glm_hf; {RESTART}")
            self._replay(lines[1:])
        blocks = {
            name: [digest for line in self.appended for digest in line["blocks"][name]]
            for name in (TOKENS_FILE, BOUNDARIES_FILE)
        }
        size = self.num_tokens * dtype.itemsize
        self.files = {TOKENS_FILE: HashedFile(work / TOKENS_FILE, blocks[TOKENS_FILE], size)}
        size = HEADER_BYTES + 8 * (self.num_parts + 1)  # the first boundary is 0
        self.files[BOUNDARIES_FILE] = HashedFile(
            work / BOUNDARIES_FILE, blocks[BOUNDARIES_FILE], size, HEADER_BYTES + 8
        )
        kept = [line for n, line in enumerate(self.appended) for line in (self.made[n], line)]
        waiting = [line for n, line in sorted(self.made.items()) if n >= len(self.appended)]
        self.journal = _rewrite_journal(home / JOURNAL, [options, *kept, *waiting])

    def _replay(self, lines: Sequence[dict[str, Any]]) -> None:
        """Take over the shards of the lines whose tasks have not changed."""
        made = {
            line["made"]: line
            for line in lines
            if "made" in line and line["made"] < len(self.tasks) and line["task"] == self.tasks[line["made"]]
        }
        appended = {line["appended"]: line for line in lines if "appended" in line}
        while (number := len(self.appended)) in appended and number in made:
            self.appended.append(appended[number])
        self.made = {n: line for n, line in made.items() if n < len(self.appended) or self._is_whole(n, line)}
        self.num_tokens, self.num_parts = (
            sum(self.made[n][name] for n in range(len(self.appended))) for name in ("num_tokens", "num_parts")
        )

    def _is_whole(self, number: int, line: dict[str, Any]) -> bool:
        """Tell whether a shard's files hold what was written."""
        paths = {name: shard_path(self.shards, number, name) for name in SHARD_FILES}
        return all(
            path.is_file() and hash_range(path, 0, path.stat().st_size) == line["hashes"][name]
            for name, path in paths.items()
        )

    def missing(self) -> list[int]:
        """Return the numbers of the shards that have to be made."""
        return [number for number in range(len(self.tasks)) if number not in self.made]

    def add(self, number: int, made: dict[str, Any]) -> None:
        """Take a shard that was made, and append it as soon as all before it are there."""
        self.made[number] = {"made": number, "task": self.tasks[number], **made}
        self._log(self.made[number])
        self.append_waiting()

    def append_waiting(self) -> None:
        """Append the shards that come next, as far as they were made."""
        while (number := len(self.appended)) in self.made:
            before = {name: len(file.hashes) for name, file in self.files.items()}
            tokens, lengths = (shard_path(self.shards, number, name) for name in SHARD_FILES)
            with tokens.open("rb") as shard:
                while content := shard.read(COPIED_AT_ONCE):
                    self.files[TOKENS_FILE].append(content)
            ends = np.fromfile(lengths, np.int64).cumsum() + self.num_tokens
            self.files[BOUNDARIES_FILE].append(ends.tobytes())
            for file in self.files.values():
                file.sync()
            self.num_tokens += self.made[number]["num_tokens"]
            self.num_parts += self.made[number]["num_parts"]
            blocks = {name: file.hashes[before[name] :] for name, file in self.files.items()}
            self.appended.append({"appended": number, "blocks": blocks})
            self._log(self.appended[-1])
            os.fsync(self.journal.fileno())
            for path in (tokens, lengths):
                path.unlink()

    def finish(self, facts: dict[str, Any], vocab_size: int) -> None:
        """Complete the files when all shards are appended."""
        shutil.rmtree(self.shards)
        boundaries = self.files[BOUNDARIES_FILE]
        boundaries.write_header(npy_header(self.num_parts + 1))
        hashes = {name: file.all_hashes() for name, file in self.files.items()}
        write_facts(self.work, facts, self.dtype, self.num_tokens, vocab_size, hashes)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()
        self.journal.close()

    def _log(self, line: dict[str, Any]) -> None:
        self.journal.write(json.dumps(line) + "\n")
        self.journal.flush()


def npy_header(count: int) -> bytes:
    """Return the first bytes of a .npy file with `count` int64."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
    assert len(header.getvalue()) == HEADER_BYTES
    return header.getvalue()


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # the last line is empty, or was cut off
    return [json.loads(line) for line in lines]


def _rewrite_journal(path: Path, lines: Sequence[Any]) -> TextIO:
    """Replace a journal in one step, and open it to be appended to."""
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)
    return path.open("a", encoding="utf-8")
