"""Corpora mixed by weights into one endless sequence of rows.

Row `n` of the sequence depends on nothing but the seed and `n`, so any process can begin anywhere. It is computed, not
looked up: the shares of kinds and corpora say how many rows of its corpus come before it, and a permutation which of
them it is.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from glm_hf.training.data.packing.joined import JoinedRows
from glm_hf.training.data.packing.rows import Pieces, Row
from glm_hf.training.data.packing.separate import SeparateRows
from glm_hf.training.data.proportions import Proportions
from glm_hf.training.data.random_numbers import GOLDEN, Permutation, key_of
from glm_hf.training.data.recipe import InfillingRecipe
from glm_hf.training.data.token_file import TokenFile
from glm_hf.training.data.tokenizing.files import COMPRESSED
from glm_hf.training.data.tokenizing.sources import KINDS

DEFAULT_INSTRUCTION_SHARE = 0.05
GROUP = 64  # rows that have one share of instructions, that of the middle
GROUPS_PER_BLOCK = 1024
BLOCKS_AT_ONCE = 256


class CorpusRows:
    """
    The rows of one corpus, epoch after epoch, each in an order of its own.

    Args:
        corpus: Tokenized corpus.
        recipe: Recipe by which rows are made.
        join_documents: Whether documents are joined to full rows; instructions never are.
        key: Key of objectives and orders.
    """

    def __init__(self, corpus: TokenFile, recipe: InfillingRecipe, join_documents: bool, key: int) -> None:
        self.corpus, self.join_documents, self.key = corpus, join_documents, key
        self.layout: JoinedRows | SeparateRows
        if join_documents and not self.is_instructions:
            self.layout = JoinedRows(corpus.facts["num_tokens"], recipe, key_of(key, 0))
        else:
            self.layout = SeparateRows(corpus, recipe, key_of(key, 0))
        self.rows_per_epoch = self.layout.num_rows(0)
        self.order: tuple[int, Permutation] | None = None

    @property
    def is_instructions(self) -> bool:
        """Whether the corpus holds instructions."""
        return self.corpus.facts["kind"] == "instructions"

    @property
    def tokens_per_row(self) -> float:
        """Mean number of the corpus's tokens in a row."""
        return self.corpus.facts["num_tokens"] / self.rows_per_epoch

    def row(self, number: int, sample_id: int) -> Row:
        """Return row `number`, counted through all epochs."""
        return self._pieces(number).read(self.corpus, sample_id)

    def origin(self, number: int) -> dict[str, object]:
        """Tell the corpus of row `number` and the numbers of its documents, counted from 0."""
        tokens = self._pieces(number).indices(self.corpus.facts["num_tokens"])
        parts = np.searchsorted(self.corpus.boundaries, tokens, side="right") - 1
        documents = np.unique(parts // 2 if self.is_instructions else parts)
        return {"corpus": self.corpus.facts["source"], "documents": documents.tolist()}

    def _pieces(self, number: int) -> Pieces:
        epoch, place = self._find(number)
        if self.order is None or self.order[0] != epoch:
            num_rows = self.layout.num_rows(epoch % self.layout.num_partitions)
            self.order = epoch, Permutation(num_rows, key_of(self.key, 1, epoch))
        return self.layout.pieces(epoch, self.order[1](place))

    def _find(self, number: int) -> tuple[int, int]:
        """Return the epoch that row `number` belongs to, and its place there."""
        before = 0
        for partition in range(self.layout.num_partitions):
            num_rows = self.layout.num_rows(partition)
            if number < before + num_rows:
                return partition, number - before
            before += num_rows
        turns, rest = divmod(number, before)
        epoch, place = self._find(rest)
        return turns * self.layout.num_partitions + epoch, place


class BlankInfillingDataset(Dataset):
    """
    Rows for `DataCollatorForBlankInfilling`, from several corpora.

    `dataset[n]` is the same for the same seed whatever was read before; `n` may pass the length, which is the number
    of rows, give or take a few, after which every corpus was seen at least once under the shares of the first row.

    Args:
        corpora: Corpora that the rows come from.
        recipe: Recipe by which rows are made.
        weights: Shares of the tokens, among texts and among instructions, in proportion to each other; by default the
            number of tokens, so that every corpus of a kind is seen equally often.
        join_documents: Whether the documents of each corpus are joined to full rows.
        instruction_share: Share of the tokens that come from instructions, by row; the default is 5% where there are
            both kinds.
        seed: Seed of objectives, orders and mixture.

    Raises:
        ValueError: If there is no corpus, or the share is not in `[0, 1]`.
    """

    def __init__(
        self,
        corpora: Sequence[TokenFile],
        recipe: InfillingRecipe,
        *,
        weights: Sequence[float] | None = None,
        join_documents: Sequence[bool] | None = None,
        instruction_share: Callable[[np.ndarray], np.ndarray] | float = DEFAULT_INSTRUCTION_SHARE,
        seed: int = 0,
    ) -> None:
        if not corpora:
            raise ValueError("give at least one corpus")
        joined = [True] * len(corpora) if join_documents is None else join_documents
        self.rows = [
            CorpusRows(corpus, recipe, join, key_of(seed, number))
            for number, (corpus, join) in enumerate(zip(corpora, joined, strict=True))
        ]
        tokens = [corpus.facts["num_tokens"] for corpus in corpora]
        self.weights = np.array(tokens if weights is None else weights, dtype=np.float64)
        if self.weights.shape != (len(corpora),) or not (self.weights > 0).all():
            raise ValueError(f"weights must be {len(corpora)} numbers above 0, got {weights}")
        self.instruction_share = instruction_share
        self.is_instructions = np.array([rows.is_instructions for rows in self.rows])
        self.kinds = [np.flatnonzero(self.is_instructions == kind) for kind in (False, True)]
        shares = [self.weights[kind] / self.weights[kind].sum() for kind in self.kinds]
        tokens_per_row = np.array([rows.tokens_per_row for rows in self.rows])
        self.rows_per_token = [share / tokens_per_row[kind] for share, kind in zip(shares, self.kinds, strict=True)]
        self.proportions = [
            Proportions(rows.tolist(), key_of(seed, len(corpora), kind))
            for kind, rows in enumerate(self.rows_per_token)
        ]
        self.offset = np.uint64(key_of(seed, len(corpora)))
        self.rows_before = np.zeros(1, dtype=np.int64)  # of instructions, at the start of every block
        self.block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """Name of every corpus in logs: what its path has besides those of others, patterns and file types."""
        return names_of([str(rows.corpus.facts["source"]) for rows in self.rows])

    def row_shares(self, numbers: np.ndarray) -> np.ndarray:
        """Return `(rows, corpora)` the share of each corpus among rows, which follows from those of tokens."""
        of_kind = self._instruction_rows(numbers)
        shares = np.empty((len(numbers), len(self.rows)))
        for kind, of_rows in enumerate((1 - of_kind, of_kind)):
            shares[:, self.kinds[kind]] = (
                of_rows[:, None] * self.rows_per_token[kind] / self.rows_per_token[kind].sum()
            )
        return shares

    def _instruction_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return `(rows,)` the share of instructions among rows."""
        given = self.instruction_share
        share = given(numbers) if callable(given) else np.full(len(numbers), float(given))
        if not 0 <= share.min() <= share.max() <= 1:
            raise ValueError(f"instruction_share must lie in [0, 1], got {share.min()} to {share.max()}")
        if not all(map(len, self.kinds)):
            share = np.full(len(numbers), float(len(self.kinds[True]) > 0))
        of_texts, of_instructions = (
            part * rows.sum() for part, rows in zip((1 - share, share), self.rows_per_token, strict=True)
        )
        return of_instructions / (of_texts + of_instructions)

    def find(self, number: int) -> tuple[int, int]:
        """Return the corpus of row `number`, and how many rows of it come before."""
        before = self._instructions_before(number)
        is_instruction = self._instructions_before(number + 1) > before
        part, in_corpus = self.proportions[is_instruction].find(before if is_instruction else number - before)
        return int(self.kinds[is_instruction][part]), in_corpus

    def _instructions_before(self, number: int) -> int:
        """Return how many of the rows before are instructions, spread as evenly as the shares allow."""
        if not all(map(len, self.kinds)):
            return number if len(self.kinds[True]) else 0
        group, place = divmod(number, GROUP)
        block, group = divmod(group, GROUPS_PER_BLOCK)
        if self.block[0] != block:
            while len(self.rows_before) <= block:
                first = (len(self.rows_before) - 1) * GROUPS_PER_BLOCK
                end = min(block, len(self.rows_before) - 1 + BLOCKS_AT_ONCE) * GROUPS_PER_BLOCK
                counts = self._instructions_in(np.arange(first, end))
                of_blocks = counts.reshape(-1, GROUPS_PER_BLOCK).sum(1).cumsum()
                self.rows_before = np.append(self.rows_before, self.rows_before[-1] + of_blocks)
            counts = self._instructions_in(np.arange(block * GROUPS_PER_BLOCK, (block + 1) * GROUPS_PER_BLOCK))
            self.block = block, self.rows_before[block] + np.append(0, counts.cumsum())
        before, after = self.block[1][group : group + 2].tolist()
        return before + place * (after - before) // GROUP

    def _instructions_in(self, groups: np.ndarray) -> np.ndarray:
        """Return how many rows of each group are instructions; fractions add up to whole rows over the groups."""
        share = self._instruction_rows(groups * GROUP + GROUP // 2)
        # Multiples of the golden ratio fill the range most evenly.
        even = ((groups.astype(np.uint64) * GOLDEN + self.offset) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        return (GROUP * share + even).astype(np.int64)

    def __len__(self) -> int:
        """Return about how many rows it takes to see every corpus under the shares of the first row."""
        shares = self.row_shares(np.zeros(1, dtype=np.int64))[0]
        return max(
            int(np.ceil(rows.rows_per_epoch / share)) for rows, share in zip(self.rows, shares, strict=True) if share
        )

    def __getitem__(self, number: int) -> Row:
        """Return row `number`, at least 0."""
        corpus, in_corpus = self.find(number)
        return replace(self.rows[corpus].row(in_corpus, number), corpus=corpus)

    def origin(self, number: int) -> dict[str, object]:
        """Tell where row `number` comes from: its corpus, and the numbers of its documents there."""
        corpus, in_corpus = self.find(number)
        return self.rows[corpus].origin(in_corpus)


def names_of(paths: Sequence[str]) -> tuple[str, ...]:
    """
    Return short names of corpora, each another.

        corpus/en/*.jsonl  corpus/zh/*.parquet  ->  en  zh
        corpus/text.en.jsonl  corpus/text.zh.jsonl.gz  ->  text.en  text.zh
    """
    endings = ("|".join(map(re.escape, kinds)) for kinds in (KINDS, COMPRESSED))
    unneeded = r"([./]?\*+)?({})?({})?$".format(*endings)
    kept = [re.sub(unneeded, "", path) or path for path in paths]
    folders = [os.path.dirname(path) for path in kept]
    shared = os.path.commonpath(folders) if len({*map(os.path.isabs, folders)}) == 1 else ""
    names = [re.sub(r"[^\w./-]+", "_", os.path.relpath(path, shared) if shared else path) for path in kept]
    return tuple(f"{name}-{number}" if names.count(name) > 1 else name for number, name in enumerate(names))
