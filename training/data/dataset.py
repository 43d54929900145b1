"""Corpora mixed by weights into one endless sequence of rows.

Row `n` of the sequence depends on nothing but the seed and `n`, so any process can begin anywhere.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from glm_hf.training.data.blanks import ragged_range
from glm_hf.training.data.packing import EpochPlan, Row, plan_apart, plan_instructions, plan_joined
from glm_hf.training.data.random_numbers import GOLDEN
from glm_hf.training.data.recipe import InfillingRecipe
from glm_hf.training.data.token_file import TokenFile

BLOCK = 1 << 16
DEFAULT_INSTRUCTION_SHARE = 0.05


class CorpusRows:
    """
    The rows of one corpus, epoch after epoch, each in an order of its own.

    Args:
        corpus: Tokenized corpus.
        recipe: Recipe by which rows are made.
        join_documents: Whether documents are joined to full rows; instructions never are.
        seed: Seed of objectives and orders.
    """

    def __init__(self, corpus: TokenFile, recipe: InfillingRecipe, join_documents: bool, seed: Sequence[int]) -> None:
        self.corpus, self.recipe, self.join_documents, self.seed = corpus, recipe, join_documents, tuple(seed)
        self.epoch_starts = [0]
        self.plans: dict[int, EpochPlan] = {}
        self.rows_per_epoch = len(self.plan(0))

    @property
    def is_instructions(self) -> bool:
        """Whether the corpus holds instructions."""
        return self.corpus.facts["kind"] == "instructions"

    @property
    def tokens_per_row(self) -> float:
        """Mean number of the corpus's tokens in a row."""
        return self.corpus.facts["num_tokens"] / self.rows_per_epoch

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch; the last two are kept."""
        if epoch not in self.plans:
            rng = np.random.default_rng((*self.seed, epoch))
            if self.is_instructions:
                plan = plan_instructions(self.corpus.boundaries, self.recipe, rng)
            elif self.join_documents:
                plan = plan_joined(self.corpus.facts["num_tokens"], self.recipe, rng)
            else:
                plan = plan_apart(self.corpus.boundaries, self.recipe, rng)
            self.plans = dict([*self.plans.items()][-1:]) | {epoch: plan}
        return self.plans[epoch]

    def row(self, number: int, sample_id: int) -> Row:
        """Return row `number`, counted through all epochs."""
        plan, row = self._find(number)
        return plan.row(row, self.corpus.tokens, sample_id)

    def origin(self, number: int) -> dict[str, object]:
        """Tell the corpus of row `number` and the numbers of its documents, counted from 0."""
        plan, row = self._find(number)
        start, total = plan.extents(row)
        first, last = np.searchsorted(self.corpus.boundaries, (start, start + total - 1), side="right") - 1
        parts = np.unique(ragged_range(first, last - first + 1))
        documents = np.unique(parts // 2) if self.is_instructions else parts
        return {"corpus": self.corpus.facts["source"], "documents": documents.tolist()}

    def _find(self, number: int) -> tuple[EpochPlan, int]:
        """Return the plan of the epoch that row `number` belongs to, and its number there."""
        while self.epoch_starts[-1] <= number:
            self.epoch_starts.append(self.epoch_starts[-1] + len(self.plan(len(self.epoch_starts) - 1)))
        epoch = int(np.searchsorted(self.epoch_starts, number, side="right")) - 1
        return self.plan(epoch), number - self.epoch_starts[epoch]


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
            CorpusRows(corpus, recipe, join, (seed, number))
            for number, (corpus, join) in enumerate(zip(corpora, joined, strict=True))
        ]
        tokens = [corpus.facts["num_tokens"] for corpus in corpora]
        self.weights = np.array(tokens if weights is None else weights, dtype=np.float64)
        if self.weights.shape != (len(corpora),) or not (self.weights > 0).all():
            raise ValueError(f"weights must be {len(corpora)} numbers above 0, got {weights}")
        self.instruction_share = instruction_share
        self.offset = np.random.default_rng((seed, len(corpora))).integers(1 << 63, dtype=np.uint64)
        self.rows_before = np.zeros((1, len(corpora)), dtype=np.int64)  # of each corpus, at the start of every block
        self.block = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    @property
    def corpus_names(self) -> tuple[str, ...]:
        """Name of every corpus in logs: what its path has besides those of others, patterns and file types."""
        return names_of([str(rows.corpus.facts["source"]) for rows in self.rows])

    def row_shares(self, numbers: np.ndarray) -> np.ndarray:
        """Return `(rows, corpora)` the probability of each corpus, which turns shares of tokens into those of rows."""
        is_instructions = np.array([rows.is_instructions for rows in self.rows])
        weights = np.empty((len(numbers), len(self.rows)))
        given = self.instruction_share
        share = given(numbers) if callable(given) else np.full(len(numbers), float(given))
        if not 0 <= share.min() <= share.max() <= 1:
            raise ValueError(f"instruction_share must lie in [0, 1], got {share.min()} to {share.max()}")
        for kind, kind_share in ((False, 1 - share), (True, share)):
            chosen = is_instructions == kind
            if chosen.any():
                of_kind = kind_share if (~chosen).any() else np.ones_like(share)
                weights[:, chosen] = of_kind[:, None] * self.weights[chosen] / self.weights[chosen].sum()
        weights /= [rows.tokens_per_row for rows in self.rows]
        return weights / weights.sum(1, keepdims=True)

    def choose(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `(BLOCK,)` the corpus of every row of a block, and how many rows of it came before."""
        if self.block[0] == block:
            return self.block[1:]
        while len(self.rows_before) <= block:
            corpora = self._draw(len(self.rows_before) - 1)
            counts = np.bincount(corpora, minlength=len(self.rows))
            self.rows_before = np.vstack((self.rows_before, self.rows_before[-1] + counts))
        corpora = self._draw(block)
        numbers = np.empty(BLOCK, dtype=np.int64)
        for corpus in range(len(self.rows)):
            is_chosen = corpora == corpus
            numbers[is_chosen] = self.rows_before[block, corpus] + np.arange(int(is_chosen.sum()))
        self.block = block, corpora, numbers
        return corpora, numbers

    def _draw(self, block: int) -> np.ndarray:
        """Return `(BLOCK,)` the corpus of every row, spread as evenly over the rows as the shares allow."""
        numbers = np.arange(block * BLOCK, (block + 1) * BLOCK)
        # Multiples of the golden ratio fill the range most evenly.
        even = (numbers.astype(np.uint64) * GOLDEN + self.offset) / 2.0**64  # (BLOCK,) in [0, 1)
        edges = self.row_shares(numbers).cumsum(1)[:, :-1]
        return (even[:, None] >= edges).sum(1)

    def __len__(self) -> int:
        """Return about how many rows it takes to see every corpus under the shares of the first row."""
        shares = self.row_shares(np.zeros(1, dtype=np.int64))[0]
        return max(
            int(np.ceil(rows.rows_per_epoch / share)) for rows, share in zip(self.rows, shares, strict=True) if share
        )

    def __getitem__(self, number: int) -> Row:
        """Return row `number`, at least 0."""
        corpora, numbers = self.choose(number // BLOCK)
        corpus = int(corpora[number % BLOCK])
        return replace(self.rows[corpus].row(int(numbers[number % BLOCK]), number), corpus=corpus)

    def origin(self, number: int) -> dict[str, object]:
        """Tell where row `number` comes from: its corpus, and the numbers of its documents there."""
        corpora, numbers = self.choose(number // BLOCK)
        return self.rows[corpora[number % BLOCK]].origin(int(numbers[number % BLOCK]))


def names_of(paths: Sequence[str]) -> tuple[str, ...]:
    """
    Return short names of corpora, each another.

        corpus/en/*.jsonl  corpus/zh/*.parquet  ->  en  zh
    """
    kept = [re.sub(r"(/?\*+)?(\.\w+)*$", "", path) or path for path in paths]
    folders = [os.path.dirname(path) for path in kept]
    shared = os.path.commonpath(folders) if len({*map(os.path.isabs, folders)}) == 1 else ""
    names = [re.sub(r"[^\w./-]+", "_", os.path.relpath(path, shared) if shared else path) for path in kept]
    return tuple(f"{name}-{number}" if names.count(name) > 1 else name for number, name in enumerate(names))
