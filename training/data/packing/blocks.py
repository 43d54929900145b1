"""Blocks of documents that stay apart, or of instructions, packed by packing.c, or by numpy where that is missing."""

import ctypes
import functools
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from glm_hf.training.data.native import NUMBER, POINTER, SIZE, native_library
from glm_hf.training.data.packing.rows import Pieces, choose_objectives, next_fit, objective_edges, split_documents
from glm_hf.training.data.random_numbers import OBJECTIVE, ORDER, mix, uniform
from glm_hf.training.data.recipe import OBJECTIVES, InfillingRecipe

BLOCK_ROWS = 64  # as many full rows have the tokens of a block; so few share its rows that are not full
ROW_ARRAYS = ("objectives", "first", "start", "length", "is_end")
NO_MEMORY, DAMAGED = -1, -2  # as in packing.c


@dataclass(frozen=True)
class BlockRules:
    """
    How the blocks of a corpus are packed.

    Attributes:
        recipe: Shares of the objectives, and lengths of texts and rows.
        num_tokens: Tokens of the corpus.
        is_instructions: Whether it holds contexts and targets in turns.
        file: File of the boundaries, for errors.
    """

    recipe: InfillingRecipe
    num_tokens: int
    is_instructions: bool
    file: Path

    @property
    def block_tokens(self) -> int:
        """Tokens within which the documents of a block begin."""
        return BLOCK_ROWS * self.recipe.row_length

    @property
    def parts_each(self) -> int:
        """Parts of a document: a context and a target, or the text alone."""
        return 2 if self.is_instructions else 1

    @cached_property
    def longest(self) -> list[int]:
        """Tokens of the longest text in one piece, for each objective of texts."""
        return [self.recipe.longest_text(name) for name in OBJECTIVES[:3]]

    @cached_property
    def infilled(self) -> np.ndarray:
        """`(3, row_length + 1)` int32: tokens of a row that a text takes, by objective and length."""
        lengths = np.arange(self.recipe.row_length + 1)
        return np.stack([self.recipe.infilled_length(lengths, name) for name in OBJECTIVES[:3]]).astype(np.int32)

    def damage(self) -> ValueError:
        """Return the error of boundaries that no corpus can have."""
        return ValueError(f"{self.file} is damaged: its numbers do not rise; tokenize it again")


@dataclass(frozen=True)
class Blocks:
    """
    Documents of some blocks.

    Attributes:
        key: Key of their draws.
        first: Number of the first block in the corpus.
        first_documents: `(blocks + 1,)` number of the first document of every block, and of the one behind, int64.
        parts: Boundaries of their parts, of which the first is that of document `first_documents[0]`, int64.
    """

    key: int
    first: int
    first_documents: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class PackedBlock:
    """The rows of a block; row `r` holds the pieces from `first[r]` to `first[r + 1]`."""

    objectives: np.ndarray
    """`(rows,)` indices into `OBJECTIVES`, uint8."""
    first: np.ndarray
    """`(rows + 1,)`."""
    start: np.ndarray
    """`(pieces,)` index of the first token of a piece in the corpus."""
    length: np.ndarray
    """`(pieces,)`, or `(pieces, 2)` for contexts and targets."""
    is_end: np.ndarray
    """`(pieces,)` whether a piece ends where its document does."""

    def pieces(self, number: int) -> Pieces:
        """Return where row `number` lies."""
        of_row = slice(self.first[number], self.first[number + 1])
        return Pieces(int(self.objectives[number]), self.start[of_row], self.length[of_row], self.is_end[of_row])


def count_rows(rules: BlockRules, blocks: Blocks) -> np.ndarray:
    """Return `(blocks,)` how many rows each block has; ValueError if boundaries are damaged."""
    if packing_library() is None:
        return _pack_by_numpy(rules, blocks)[1]
    rows_per_block = np.empty(len(blocks.first_documents) - 1, np.int64)
    _pack_by_c(rules, blocks, rows_per_block, None)
    return rows_per_block


def pack_block(rules: BlockRules, block: Blocks) -> PackedBlock:
    """Pack one block; ValueError if boundaries are damaged."""
    if packing_library() is None:
        return _pack_by_numpy(rules, block)[0]
    num_rows = np.empty(1, np.int64)
    num_pieces = _pack_by_c(rules, block, num_rows, None)
    objectives, first = np.empty(num_rows[0], np.uint8), np.full(num_rows[0] + 1, num_pieces)
    start, is_end = np.empty(num_pieces, np.int64), np.empty(num_pieces, np.bool_)
    length = np.empty((num_pieces, 2) if rules.is_instructions else num_pieces, np.int64)
    packed = PackedBlock(objectives, first, start, length, is_end)
    _pack_by_c(rules, block, num_rows, packed)
    return packed


class Packing(ctypes.Structure):
    """`struct packing` of packing.c."""

    _fields_ = [
        ("infilled", POINTER),
        *(("longest", SIZE * 3), ("edges", ctypes.c_double * 2)),
        *((name, SIZE) for name in ("row_length", "block_tokens", "num_tokens")),
        ("is_instructions", NUMBER),
    ]


class RowArrays(ctypes.Structure):
    """`struct rows` of packing.c."""

    _fields_ = [(name, POINTER) for name in ROW_ARRAYS]


@functools.cache
def packing_library() -> ctypes.CDLL | None:
    """Return what packing.c was compiled to, None if it was not."""
    library = native_library()
    if library is not None:
        library.pack_blocks.argtypes = [
            *(ctypes.POINTER(Packing), ctypes.c_uint64, POINTER, SIZE),
            *(POINTER, SIZE, SIZE, POINTER, ctypes.POINTER(RowArrays)),
        ]
        library.pack_blocks.restype = SIZE
    return library


def _pack_by_c(rules: BlockRules, blocks: Blocks, rows_per_block: np.ndarray, packed: PackedBlock | None) -> int:
    """Count the rows of blocks, and write them if `packed` is given; return the number of pieces."""
    library, recipe = packing_library(), rules.recipe
    assert library is not None
    packing = Packing(
        rules.infilled.ctypes.data,
        (SIZE * 3)(*rules.longest),
        (ctypes.c_double * 2)(*objective_edges(recipe)),
        *(recipe.row_length, rules.block_tokens, rules.num_tokens, rules.is_instructions),
    )
    arrays = packed and RowArrays(*(getattr(packed, name).ctypes.data for name in ROW_ARRAYS))
    num_pieces = library.pack_blocks(
        *(packing, blocks.key, blocks.parts.ctypes.data, len(blocks.parts) - 1),
        *(blocks.first_documents.ctypes.data, blocks.first, len(rows_per_block)),
        *(rows_per_block.ctypes.data, arrays),
    )
    if num_pieces == NO_MEMORY:
        raise MemoryError(f"no memory to pack {len(blocks.parts):,} documents")
    if num_pieces == DAMAGED:
        raise rules.damage()
    return num_pieces


def _pack_by_numpy(rules: BlockRules, blocks: Blocks) -> tuple[PackedBlock, np.ndarray]:
    """Return the rows of all blocks, and how many each has."""
    edges, step = blocks.first_documents, rules.parts_each
    numbers, of_block = np.arange(edges[0], edges[-1]), np.diff(edges)
    block = np.repeat(np.arange(len(of_block)), of_block)
    parts = blocks.parts
    if len(parts) - 1 != step * len(numbers) or (np.diff(parts) < 0).any() or parts[-1] > rules.num_tokens:
        raise rules.damage()
    start = parts[:-1:step][: len(numbers)]
    if (start // rules.block_tokens != blocks.first + block).any():
        raise rules.damage()
    objective, length = _drawn_objectives(rules, blocks, numbers), np.diff(parts).reshape(-1, step)
    group = block * len(OBJECTIVES) + objective
    chance = mix(np.array([blocks.key], np.uint64), ORDER, numbers) >> np.uint64(16)
    order = np.argsort(group.astype(np.uint64) << np.uint64(48) | chance, kind="stable")
    start, length, group = start[order], length[order], group[order]
    if rules.is_instructions:
        infilled = (length.sum(1) + 1).clip(max=rules.recipe.row_length)  # longer ones are refused once counted
        is_end = np.ones(len(numbers), np.bool_)
    else:
        longest = np.array(rules.longest)[group % len(OBJECTIVES)]
        document, offset, piece = split_documents((length[:, 0] - 1).clip(0), longest)
        is_end = offset + piece == length[document, 0] - 1
        start, length, group = start[document] + offset, piece, group[document]
        infilled = rules.infilled[group % len(OBJECTIVES), piece]
    first = _next_fit_of_groups(infilled, group, rules.recipe.row_length)
    of_row = group[first[:-1]]
    objectives = (of_row % len(OBJECTIVES)).astype(np.uint8)
    rows_per_block = np.bincount(of_row // len(OBJECTIVES), minlength=len(of_block))
    return PackedBlock(objectives, first, start, length, is_end), rows_per_block


def _drawn_objectives(rules: BlockRules, blocks: Blocks, numbers: np.ndarray) -> np.ndarray:
    if rules.is_instructions:
        return np.full(len(numbers), OBJECTIVES.index("instruction"))
    return choose_objectives(uniform(np.array([blocks.key], np.uint64), OBJECTIVE, numbers), rules.recipe).astype(int)


def _next_fit_of_groups(lengths: np.ndarray, groups: np.ndarray, capacity: int) -> np.ndarray:
    """Return what `next_fit` does of items of some groups, one behind the other; a row holds items of one group."""
    edges = [*np.flatnonzero(np.diff(groups, prepend=-1)), len(groups)]
    rows = [start + next_fit(lengths[start:end], capacity)[:-1] for start, end in pairwise(edges)]
    return np.concatenate([*rows, edges[-1:]]).astype(np.int64)
