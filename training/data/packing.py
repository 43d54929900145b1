"""Which texts stand together in a row.

A corpus is split in one of two ways. Documents that are joined form one stream, each followed by `</s>`, and a row is
a piece of it that fills the row exactly, as in the pre-training of GLM-130B. Documents that stay apart are samples of
their own, which see nothing of each other; only a document longer than a window is split. Either way every token of
the corpus is in exactly one row of an epoch.

No plan is stored. A row of the stream follows from its number. Documents apart are packed in blocks of a fixed number
of tokens, each by itself, and only how many rows come before each block is kept.
"""

from dataclasses import dataclass

import numpy as np

from glm_hf.training.data.blanks import exclusive_sum, ragged_range
from glm_hf.training.data.proportions import Proportions
from glm_hf.training.data.random_numbers import OBJECTIVE, ORDER, key_of, mix, uniform
from glm_hf.training.data.recipe import OBJECTIVES, InfillingRecipe
from glm_hf.training.data.token_file import TokenFile

NO_CORPUS = -1  # of a row that comes from no known corpus
BLOCK_ROWS = 64  # as many full rows have the tokens of a block; so few share its rows that are not full
BLOCKS_AT_ONCE = 1024
DOCUMENTS_AT_ONCE = 1 << 18
BLOCKS_KEPT = 256


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


def next_fit(lengths: np.ndarray, capacity: int, groups: np.ndarray | None = None) -> np.ndarray:
    """
    Pack items in their order, beginning a new row with each that does not fit.

    Args:
        lengths: Lengths of the items, at most `capacity` each.
        capacity: Number of tokens that fit a row.
        groups: Ascending number of the group of each item; a row holds items of one group.

    Returns:
        Index of the first item of every row, and the number of items at the end.
    """
    assert (lengths <= capacity).all(), "an item longer than a row would never fit"
    end = lengths.cumsum(dtype=np.int64)
    next_row = np.searchsorted(end, end - lengths + capacity, side="right")  # after a row that begins with the item
    if groups is not None:
        next_row = np.minimum(next_row, np.searchsorted(groups, groups, side="right"))
    following = next_row.tolist()
    starts = [0]
    while starts[-1] < len(lengths):
        starts.append(following[starts[-1]])
    return np.array(starts)


def choose_objectives(uniform: np.ndarray, recipe: InfillingRecipe) -> np.ndarray:
    """Return an index into `OBJECTIVES` for each number in [0, 1), by the shares of the recipe."""
    edges = np.cumsum((recipe.mask_probability, recipe.smask_probability))
    return np.searchsorted(edges, uniform, side="right").astype(np.uint8)


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

    def read(self, tokens: np.ndarray, sample_id: int) -> Row:
        """Read the row from the tokens of the corpus."""
        totals = self._totals()
        end = int(self.start[-1] + totals[-1])
        if end <= len(tokens) and (self.start[1:] == self.start[:-1] + totals[:-1]).all():
            read = tokens[self.start[0] : end]
        else:
            read = tokens[self.indices(len(tokens))]
        return Row(OBJECTIVES[self.objective], read.astype(np.int64), self.length, self.is_end, sample_id)

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


@dataclass(frozen=True)
class PackedBlocks:
    """The rows of some blocks; row `r` holds the pieces from `first[r]` to `first[r + 1]`."""

    objectives: np.ndarray
    """`(rows,)` indices into `OBJECTIVES`."""
    first: np.ndarray
    """`(rows + 1,)`."""
    start: np.ndarray
    """`(pieces,)` index of the first token of a piece in the corpus."""
    length: np.ndarray
    """`(pieces,)`, or `(pieces, 2)` for contexts and targets."""
    is_end: np.ndarray
    """`(pieces,)` whether a piece ends where its document does."""
    rows_per_block: np.ndarray
    """`(blocks,)`."""

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
        ValueError: If an instruction is too long, having been tokenized for another recipe; as soon as its block is
            packed.
    """

    num_partitions = 8

    def __init__(self, corpus: TokenFile, recipe: InfillingRecipe, key: int) -> None:
        self.corpus, self.recipe, self.key = corpus, recipe, key
        self.is_instructions = corpus.facts["kind"] == "instructions"
        block_tokens = BLOCK_ROWS * recipe.row_length
        edges = np.arange(-(-len(corpus.tokens) // block_tokens) + 1) * block_tokens
        parts = self._parts_before(edges)
        self.first_documents = (parts + 1) // 2 if self.is_instructions else parts
        self.longest = np.array([recipe.longest_text(name) for name in OBJECTIVES[:3]])
        self.rows_before: dict[int, np.ndarray] = {}
        self.blocks: dict[tuple[int, int], PackedBlocks] = {}

    def _parts_before(self, tokens: np.ndarray) -> np.ndarray:
        """Return how many parts begin before each of some tokens, which rise."""
        counts = np.zeros(len(tokens), np.int64)
        num_parts = len(self.corpus.boundaries) - 1
        for first in range(0, num_parts, DOCUMENTS_AT_ONCE):
            starts = self.corpus.read_boundaries(first, min(first + DOCUMENTS_AT_ONCE, num_parts) - 1)
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
        packed = self.blocks.pop((partition, block), None) or self._pack(partition, block, block + 1)
        self.blocks[partition, block] = packed  # behind all that were not used since
        if len(self.blocks) > BLOCKS_KEPT:
            del self.blocks[next(iter(self.blocks))]
        return packed.pieces(number - int(rows_before[block]))

    def _rows_before(self, partition: int) -> np.ndarray:
        """Return `(blocks + 1,)` the rows before every block and after the last."""
        if partition not in self.rows_before:
            block, counts = 0, [np.zeros(1, np.int64)]
            while block < len(self.first_documents) - 1:
                fitting = np.searchsorted(self.first_documents, self.first_documents[block] + DOCUMENTS_AT_ONCE) - 1
                end = int(np.clip(fitting, block + 1, block + BLOCKS_AT_ONCE))
                end = min(end, len(self.first_documents) - 1)
                counts.append(self._pack(partition, block, end).rows_per_block)
                block = end
            self.rows_before[partition] = np.concatenate(counts).cumsum()
        return self.rows_before[partition]

    def _pack(self, partition: int, first: int, end: int) -> PackedBlocks:
        """Pack the blocks from `first` to before `end`."""
        edges = self.first_documents[first : end + 1]
        numbers = np.arange(edges[0], edges[-1])
        block = np.repeat(np.arange(end - first), np.diff(edges))
        key = np.array([key_of(self.key, partition)], np.uint64)
        start, length = self._documents(int(edges[0]), int(edges[-1]))
        if self.is_instructions:
            objective = np.full(len(numbers), OBJECTIVES.index("instruction"))
        else:
            objective = choose_objectives(uniform(key, OBJECTIVE, numbers), self.recipe).astype(np.int64)
        group = block * len(OBJECTIVES) + objective
        chance = mix(key, ORDER, numbers) >> np.uint64(16)
        order = np.argsort(group.astype(np.uint64) << np.uint64(48) | chance, kind="stable")
        start, length, group = start[order], length[order], group[order]
        if self.is_instructions:
            fit, is_end = length.sum(1) + 1, np.ones(len(numbers), bool)
            self._require_short(fit)
        else:
            document, offset, piece = split_documents(length, self.longest[group % len(OBJECTIVES)])
            is_end = offset + piece == length[document]
            start, length, group = start[document] + offset, piece, group[document]
            is_gmask = group % len(OBJECTIVES) == OBJECTIVES.index("gmask")
            fit = self.recipe.infilled_length(length, "mask")
            fit[is_gmask] = self.recipe.infilled_length(length[is_gmask], "gmask")
        first_piece = next_fit(fit, self.recipe.row_length, group)
        of_row = group[first_piece[:-1]]
        rows_per_block = np.bincount(of_row // len(OBJECTIVES), minlength=end - first)
        return PackedBlocks(of_row % len(OBJECTIVES), first_piece, start, length, is_end, rows_per_block)

    def _documents(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where documents start, and their lengths, `(documents, 2)` of instructions."""
        parts = self.corpus.read_boundaries(*((2 * first, 2 * end) if self.is_instructions else (first, end)))
        if self.is_instructions:
            return parts[:-1:2], np.diff(parts).reshape(-1, 2)
        return parts[:-1], np.diff(parts) - 1

    def _require_short(self, with_sop: np.ndarray) -> None:
        longest = self.recipe.longest_instruction
        if len(with_sop) and with_sop.max() > longest:
            name = "row_length" if self.recipe.instruction_length is None else "instruction_length"
            raise ValueError(
                f"an instruction takes {with_sop.max()} tokens, but {name} is {longest}; "
                "tokenize the instructions again for rows of this length"
            )
