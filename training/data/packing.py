"""Which texts stand together in a row.

A corpus is split in one of two ways. Documents that are joined form one stream, each followed by `</s>`, and a row is
a piece of it that fills the row exactly, as in the pre-training of GLM-130B. Documents that stay apart are samples of
their own, which see nothing of each other; only a document longer than a window is split. Either way every token of
the corpus is in exactly one row of an epoch.

No plan is stored. A row of the stream follows from its number. Documents apart are packed in blocks of a fixed number
of tokens, each by itself and by packing.c, and only how many rows come before each block is kept.
"""

import ctypes
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from glm_hf.training.data.blanks import exclusive_sum, ragged_range
from glm_hf.training.data.native import NUMBER, POINTER, SIZE, native_library, num_cores
from glm_hf.training.data.proportions import Proportions
from glm_hf.training.data.random_numbers import key_of
from glm_hf.training.data.recipe import OBJECTIVES, InfillingRecipe
from glm_hf.training.data.token_file import BOUNDARIES_FILE, TokenFile

NO_CORPUS = -1  # of a row that comes from no known corpus
BLOCK_ROWS = 64  # as many full rows have the tokens of a block; so few share its rows that are not full
BLOCKS_AT_ONCE = 1024
DOCUMENTS_AT_ONCE = 1 << 18
BLOCKS_KEPT = 256
MOST_THREADS = 4
ROW_ARRAYS = ("objectives", "first", "start", "length", "is_end")
NO_MEMORY, DAMAGED = -1, -2  # as in packing.c


@dataclass(frozen=True)
class Row:
    """What one training sequence is made of."""

    objective: str
    """One of `OBJECTIVES`."""
    tokens: np.ndarray
    """Texts one after another; of instructions, contexts and targets in turns."""
    lengths: np.ndarray
    """`(S,)` of the texts, `(S, 2)` of contexts and targets."""
    is_end: np.ndarray
    """`(S,)` whether a text ends where its document does."""
    sample_id: int
    """Keys the draws of its blanks."""
    samples_before: int = 0
    """Texts of the same `sample_id` in earlier rows."""
    corpus: int = NO_CORPUS
    """Number of its corpus in the dataset."""


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """
    Pack items in their order, beginning a new row with each that does not fit.

    Args:
        lengths: Lengths of the items, at most `capacity` each.
        capacity: Number of tokens that fit a row.

    Returns:
        Index of the first item of every row, and the number of items at the end.
    """
    assert (lengths <= capacity).all(), "an item longer than a row would never fit"
    end = lengths.cumsum(dtype=np.int64)
    next_row = np.searchsorted(end, end - lengths + capacity, side="right")  # after a row that begins with the item
    following = next_row.tolist()
    starts = [0]
    while starts[-1] < len(lengths):
        starts.append(following[starts[-1]])
    return np.array(starts)


def choose_objectives(uniform: np.ndarray, recipe: InfillingRecipe) -> np.ndarray:
    """Return an index into `OBJECTIVES` for each number in [0, 1), by the shares of the recipe."""
    return np.searchsorted(objective_edges(recipe), uniform, side="right").astype(np.uint8)


def objective_edges(recipe: InfillingRecipe) -> np.ndarray:
    """Return `(2,)` where the next of the `OBJECTIVES` begins in the numbers of [0, 1)."""
    return np.cumsum((recipe.mask_probability, recipe.smask_probability))


def split_documents(lengths: np.ndarray, longest: np.ndarray | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Cut documents longer than `longest` into pieces of nearly the same length.

    Returns:
        Of every piece its document, its offset in it, and its length.
    """
    count = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), count)
    number = np.arange(len(document)) - np.repeat(exclusive_sum(count), count)
    offset = number * lengths[document] // count[document]
    return document, offset, (number + 1) * lengths[document] // count[document] - offset


@dataclass(frozen=True)
class Pieces:
    """Where the texts of a row lie in their corpus."""

    objective: int
    """Index into `OBJECTIVES`."""
    start: np.ndarray
    """`(S,)` index of the first token of a text; a text that goes beyond the last token goes on at the first."""
    length: np.ndarray
    """`(S,)`, or `(S, 2)` for contexts and targets."""
    is_end: np.ndarray
    """`(S,)` whether a text ends where its document does."""

    def indices(self, num_tokens: int) -> np.ndarray:
        """Return the index of every token of the row in a corpus of so many."""
        return ragged_range(self.start, self._totals()) % num_tokens

    def read(self, corpus: TokenFile, sample_id: int) -> Row:
        """Read the row from its corpus."""
        tokens = corpus.read_tokens(self.start.tolist(), self._totals().tolist())
        return Row(OBJECTIVES[self.objective], tokens.astype(np.int64), self.length, self.is_end, sample_id)

    def _totals(self) -> np.ndarray:
        return self.length if self.length.ndim == 1 else self.length.sum(1)


class JoinedRows:
    """
    A stream of documents cut into rows that are full, whatever their objective.

    Objectives are spread evenly over the rows. The stream is a circle, on which the first row begins elsewhere in
    every epoch, so that a text has another objective and other neighbours.

    Args:
        num_tokens: Number of tokens of the stream.
        recipe: Shares of the objectives and lengths of their texts.
        key: Key of the places.
    """

    num_partitions = 1

    def __init__(self, num_tokens: int, recipe: InfillingRecipe, key: int) -> None:
        self.num_tokens, self.key = num_tokens, key
        names = OBJECTIVES[:3]
        self.longest = [recipe.longest_text(name) for name in names]
        self.texts = [recipe.texts_per_row(name) for name in names]
        shares = recipe.mask_probability, recipe.smask_probability
        self.objectives = Proportions((*shares, 1 - sum(shares)), key)
        fewest, most = 0, num_tokens
        while fewest < most:  # rows that hold all tokens
            middle = (fewest + most) // 2
            fewest, most = (middle + 1, most) if self._start(middle) < num_tokens else (fewest, middle)
        self._num_rows = fewest

    def num_rows(self, partition: int) -> int:
        """Return the rows of an epoch."""
        return self._num_rows

    def pieces(self, epoch: int, number: int) -> Pieces:
        """Return where row `number` lies in an epoch."""
        objective, _ = self.objectives.find(number)
        start = self._start(number) + np.arange(self.texts[objective]) * self.longest[objective]
        length = np.minimum(self.longest[objective], self.num_tokens - start)
        start, length = start[length > 0], length[length > 0]  # the last row may have fewer
        shift = key_of(self.key, epoch) % self.num_tokens
        return Pieces(objective, (start + shift) % self.num_tokens, length, np.zeros(len(start), bool))

    def _start(self, number: int) -> int:
        """Return the tokens of all rows before."""
        counts = self.objectives.before(number)
        return sum(map(int.__mul__, counts, map(int.__mul__, self.longest, self.texts)))


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
def packing_library() -> ctypes.CDLL:
    """
    Return what packing.c was compiled to.

    Raises:
        ModuleNotFoundError: If it was not.
    """
    library = native_library()
    if library is None:
        raise ModuleNotFoundError(
            "glm_hf was installed without its C code, which packs documents that stay apart, and instructions; "
            "install glm_hf where a C compiler is at hand, not on Windows, to have it built"
        )
    library.pack_blocks.argtypes = [
        *(ctypes.POINTER(Packing), ctypes.c_uint64, POINTER, SIZE),
        *(POINTER, SIZE, SIZE, POINTER, ctypes.POINTER(RowArrays)),
    ]
    library.pack_blocks.restype = SIZE
    return library


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


class SeparateRows:
    """
    Documents, or instructions, packed into rows of one objective each.

    A block, the documents that begin within so many tokens, is packed by itself: objectives are drawn for documents,
    and those of one objective are packed in a random order. Epochs come in some partitions in turns, each with draws
    of its own.

    Args:
        corpus: Texts, the last token of each being its `</s>`, or contexts and targets in turns.
        recipe: Shares of the objectives, and lengths of texts and rows.
        key: Key of the draws.

    Raises:
        ValueError: If an instruction is too long, having been tokenized for another recipe, or a boundary is damaged;
            as soon as its block is packed.
        ModuleNotFoundError: If glm_hf was installed without its C code.
    """

    num_partitions = 8

    def __init__(self, corpus: TokenFile, recipe: InfillingRecipe, key: int) -> None:
        packing_library()
        self.corpus, self.recipe, self.key = corpus, recipe, key
        self.is_instructions = corpus.facts["kind"] == "instructions"
        self.block_tokens = BLOCK_ROWS * recipe.row_length
        edges = np.arange(-(-len(corpus.tokens) // self.block_tokens) + 1) * self.block_tokens
        parts = self._parts_before(edges)
        self.first_documents = (parts + 1) // 2 if self.is_instructions else parts
        self.longest = [recipe.longest_text(name) for name in OBJECTIVES[:3]]
        lengths = np.arange(recipe.row_length + 1)
        self.infilled = np.stack([recipe.infilled_length(lengths, name) for name in OBJECTIVES[:3]]).astype(np.int32)
        self.rows_before: dict[int, np.ndarray] = {}
        self.blocks: dict[tuple[int, int], PackedBlock] = {}

    def _parts_before(self, tokens: np.ndarray) -> np.ndarray:
        """Return how many parts begin before each of some tokens, which rise."""
        counts = np.zeros(len(tokens), np.int64)
        num_parts = len(self.corpus.boundaries) - 1
        for first in range(0, num_parts, DOCUMENTS_AT_ONCE):
            boundaries = self.corpus.read_boundaries(first, min(first + DOCUMENTS_AT_ONCE, num_parts))
            if (boundaries[1:] < boundaries[:-1]).any() or boundaries[0] < 0:
                raise self._damage()
            starts = boundaries[:-1]
            inner, after = np.searchsorted(tokens, (starts[0], starts[-1]), side="right")
            counts[inner:after] += np.searchsorted(starts, tokens[inner:after])
            counts[after:] += len(starts)
        return counts

    def num_rows(self, partition: int) -> int:
        """Return the rows of an epoch that has this partition."""
        return int(self._rows_before(partition)[-1])

    def pieces(self, epoch: int, number: int) -> Pieces:
        """Return where row `number` lies in an epoch."""
        partition = epoch % self.num_partitions
        rows_before = self._rows_before(partition)
        block = int(np.searchsorted(rows_before, number, side="right")) - 1
        packed = self.blocks.pop((partition, block), None) or self._pack(partition, block)
        self.blocks[partition, block] = packed  # behind all that were not used since
        if len(self.blocks) > BLOCKS_KEPT:
            del self.blocks[next(iter(self.blocks))]
        return packed.pieces(number - int(rows_before[block]))

    def _rows_before(self, partition: int) -> np.ndarray:
        """Return `(blocks + 1,)` the rows before every block and after the last."""
        if partition not in self.rows_before:
            with ThreadPoolExecutor(min(MOST_THREADS, num_cores())) as pool:
                counts = pool.map(lambda blocks: self._count(partition, *blocks), self._ranges())
                self.rows_before[partition] = np.concatenate([np.zeros(1, np.int64), *counts]).cumsum()
        return self.rows_before[partition]

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the first block and the one behind the last of ranges that are counted at once."""
        first, num_blocks = 0, len(self.first_documents) - 1
        while first < num_blocks:
            fitting = np.searchsorted(self.first_documents, self.first_documents[first] + DOCUMENTS_AT_ONCE) - 1
            end = min(max(first + 1, min(int(fitting), first + BLOCKS_AT_ONCE)), num_blocks)
            yield first, end
            first = end

    def _count(self, partition: int, first: int, end: int) -> np.ndarray:
        """Return `(blocks,)` how many rows each block from `first` to before `end` has."""
        rows_per_block = np.empty(end - first, np.int64)
        self._pack_blocks(partition, self._read(first, end), first, rows_per_block, None)
        return rows_per_block

    def _pack(self, partition: int, block: int) -> PackedBlock:
        """Pack a block."""
        parts, num_rows = self._read(block, block + 1), np.empty(1, np.int64)
        num_pieces = self._pack_blocks(partition, parts, block, num_rows, None)
        objectives, first = np.empty(num_rows[0], np.uint8), np.full(num_rows[0] + 1, num_pieces)
        start, is_end = np.empty(num_pieces, np.int64), np.empty(num_pieces, np.bool_)
        length = np.empty((num_pieces, 2) if self.is_instructions else num_pieces, np.int64)
        packed = PackedBlock(objectives, first, start, length, is_end)
        self._pack_blocks(partition, parts, block, num_rows, packed)
        return packed

    def _read(self, first: int, end: int) -> np.ndarray:
        """Return the boundaries of the documents of the blocks from `first` to before `end`."""
        parts_each = 2 if self.is_instructions else 1
        first_part, last = (int(self.first_documents[block]) * parts_each for block in (first, end))
        return np.ascontiguousarray(self.corpus.read_boundaries(first_part, last), np.int64)

    def _pack_blocks(
        self, partition: int, parts: np.ndarray, first: int, rows_per_block: np.ndarray, packed: PackedBlock | None
    ) -> int:
        """Pack as many blocks as `rows_per_block` has, from `first` on; return the number of pieces."""
        recipe = self.recipe
        packing = Packing(
            self.infilled.ctypes.data,
            (SIZE * 3)(*self.longest),
            (ctypes.c_double * 2)(*objective_edges(recipe)),
            *(recipe.row_length, self.block_tokens, len(self.corpus.tokens), self.is_instructions),
        )
        arrays = packed and RowArrays(*(getattr(packed, name).ctypes.data for name in ROW_ARRAYS))
        num_pieces = packing_library().pack_blocks(
            *(packing, key_of(self.key, partition), parts.ctypes.data, len(parts) - 1),
            *(self.first_documents[first:].ctypes.data, first, len(rows_per_block)),
            *(rows_per_block.ctypes.data, arrays),
        )
        if num_pieces == NO_MEMORY:
            raise MemoryError(f"no memory to pack {len(parts):,} documents")
        if num_pieces == DAMAGED:
            raise self._damage()
        if self.is_instructions:
            self._require_short(parts[2::2] - parts[:-2:2] + 1)
        return num_pieces

    def _damage(self) -> ValueError:
        path = self.corpus.folder / BOUNDARIES_FILE
        return ValueError(f"{path} is damaged: its numbers do not rise; tokenize it again")

    def _require_short(self, with_sop: np.ndarray) -> None:
        longest = self.recipe.longest_instruction
        if len(with_sop) and with_sop.max() > longest:
            name = "row_length" if self.recipe.instruction_length is None else "instruction_length"
            raise ValueError(
                f"an instruction takes {with_sop.max()} tokens, but {name} is {longest}; "
                "tokenize the instructions again for rows of this length"
            )
