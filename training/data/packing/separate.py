"""Documents that stay apart, and instructions."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from glm_hf.training.data.native import num_cores
from glm_hf.training.data.packing.blocks import BlockRules, Blocks, PackedBlock, count_rows, pack_block
from glm_hf.training.data.packing.rows import Pieces
from glm_hf.training.data.random_numbers import key_of
from glm_hf.training.data.recipe import InfillingRecipe
from glm_hf.training.data.token_file import BOUNDARIES_FILE, TokenFile

BLOCKS_AT_ONCE = 1024
DOCUMENTS_AT_ONCE = 1 << 18
BLOCKS_KEPT = 256
MOST_THREADS = 4


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
    """

    num_partitions = 8

    def __init__(self, corpus: TokenFile, recipe: InfillingRecipe, key: int) -> None:
        self.corpus, self.key = corpus, key
        is_instructions = corpus.facts["kind"] == "instructions"
        self.rules = BlockRules(recipe, len(corpus.tokens), is_instructions, corpus.folder / BOUNDARIES_FILE)
        block_tokens = self.rules.block_tokens
        edges = np.arange(-(-len(corpus.tokens) // block_tokens) + 1) * block_tokens
        parts = self._parts_before(edges)
        self.first_documents = (parts + 1) // 2 if is_instructions else parts
        self.rows_before: dict[int, np.ndarray] = {}
        self.blocks: dict[tuple[int, int], PackedBlock] = {}

    def _parts_before(self, tokens: np.ndarray) -> np.ndarray:
        """Return how many parts begin before each of some tokens, which rise."""
        counts = np.zeros(len(tokens), np.int64)
        num_parts = len(self.corpus.boundaries) - 1
        for first in range(0, num_parts, DOCUMENTS_AT_ONCE):
            boundaries = self.corpus.read_boundaries(first, min(first + DOCUMENTS_AT_ONCE, num_parts))
            if (boundaries[1:] < boundaries[:-1]).any() or boundaries[0] < 0:
                raise self.rules.damage()
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
        packed = self.blocks.pop((partition, block), None)
        packed = packed or pack_block(self.rules, self._read(partition, block, block + 1))
        self.blocks[partition, block] = packed  # behind all that were not used since
        if len(self.blocks) > BLOCKS_KEPT:
            del self.blocks[next(iter(self.blocks))]
        return packed.pieces(number - int(rows_before[block]))

    def _rows_before(self, partition: int) -> np.ndarray:
        """Return `(blocks + 1,)` the rows before every block and after the last."""
        if partition not in self.rows_before:
            with ThreadPoolExecutor(min(MOST_THREADS, num_cores())) as pool:
                counts = pool.map(lambda edges: self._count(self._read(partition, *edges)), self._ranges())
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

    def _read(self, partition: int, first: int, end: int) -> Blocks:
        """Read the blocks from `first` to before `end`."""
        first_documents = self.first_documents[first : end + 1]
        first_part, last = (int(first_documents[place]) * self.rules.parts_each for place in (0, -1))
        parts = np.ascontiguousarray(self.corpus.read_boundaries(first_part, last), np.int64)
        return Blocks(key_of(self.key, partition), first, first_documents, parts)

    def _count(self, blocks: Blocks) -> np.ndarray:
        """Return the rows of each block; ValueError if an instruction is too long."""
        counts = count_rows(self.rules, blocks)
        if self.rules.is_instructions:
            self._require_short(blocks.parts[2::2] - blocks.parts[:-2:2] + 1)
        return counts

    def _require_short(self, with_sop: np.ndarray) -> None:
        recipe = self.rules.recipe
        longest = recipe.longest_instruction
        if len(with_sop) and with_sop.max() > longest:
            name = "row_length" if recipe.instruction_length is None else "instruction_length"
            raise ValueError(
                f"an instruction takes {with_sop.max()} tokens, but {name} is {longest}; "
                "tokenize the instructions again for rows of this length"
            )
