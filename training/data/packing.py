"""Which texts stand together in a row.

A corpus is split in one of two ways. Documents that are joined form one stream, each followed by `</s>`, and a row is
a piece of it that fills the row exactly, as in the pre-training of GLM-130B. Documents that stay apart are samples of
their own, which see nothing of each other; only a document longer than a window is split. Either way every token of
the corpus is in exactly one row of an epoch.
"""

from dataclasses import dataclass

import numpy as np

from glm_hf.training.data.blanks import exclusive_sum, ragged_range
from glm_hf.training.data.recipe import OBJECTIVES, InfillingRecipe

NO_CORPUS = -1  # of a row that comes from no known corpus


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
    starts = [0]
    before = 0
    while starts[-1] < len(lengths):
        starts.append(int(np.searchsorted(end, before + capacity, side="right")))
        before = int(end[starts[-1] - 1])
    return np.array(starts)


def choose_objectives(uniform: np.ndarray, recipe: InfillingRecipe) -> np.ndarray:
    """Return an index into `OBJECTIVES` for each number in [0, 1), by the shares of the recipe."""
    edges = np.cumsum((recipe.mask_probability, recipe.smask_probability))
    return np.searchsorted(edges, uniform, side="right").astype(np.uint8)


def split_documents(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
class EpochPlan:
    """The rows of one epoch of a corpus; row `r` holds the pieces from `first[r]` to `first[r + 1]`."""

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
    order: np.ndarray
    """`(rows,)` which row comes when."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.order)

    def extents(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where every piece of the row that comes as `number` starts in the corpus, and its tokens in all."""
        row = self.order[number]
        pieces = slice(self.first[row], self.first[row + 1])
        length = self.length[pieces]
        return self.start[pieces], length if length.ndim == 1 else length.sum(1)

    def row(self, number: int, tokens: np.ndarray, sample_id: int) -> Row:
        """Read the row that comes as `number` from the tokens of the corpus."""
        row = self.order[number]
        pieces = slice(self.first[row], self.first[row + 1])
        start, total = self.extents(number)
        if len(start) == 1 or (start[1:] == start[:-1] + total[:-1]).all():
            read = tokens[start[0] : start[0] + int(total.sum())]
        else:
            read = tokens[ragged_range(start, total)]
        objective = OBJECTIVES[self.objectives[row]]
        return Row(objective, read.astype(np.int64), self.length[pieces], self.is_end[pieces], sample_id)


def plan_joined(num_tokens: int, recipe: InfillingRecipe, rng: np.random.Generator) -> EpochPlan:
    """
    Cut a stream of documents into rows that are full, whatever their objective.

    Args:
        num_tokens: Number of tokens of the stream.
        recipe: Shares of the objectives and lengths of their texts.
        rng: Source of the objective of every row and of their order.
    """
    names = OBJECTIVES[:3]
    longest = np.array([recipe.longest_text(name) for name in names])
    texts = np.array([recipe.texts_per_row(name) for name in names])
    objectives = choose_objectives(rng.random(-(-num_tokens // int((longest * texts).min()))), recipe)
    row_start = exclusive_sum((longest * texts)[objectives])
    num_rows = int(np.searchsorted(row_start, num_tokens))
    objectives = objectives[:num_rows]
    start = np.repeat(row_start[:num_rows], texts[objectives])
    start += ragged_range(np.zeros(num_rows, np.int64), texts[objectives]) * np.repeat(
        longest[objectives], texts[objectives]
    )
    length = np.minimum(np.repeat(longest[objectives], texts[objectives]), num_tokens - start)
    first = np.append(exclusive_sum(texts[objectives]), len(start))
    is_real = length > 0  # the last row may have fewer
    first = np.minimum(first, int(is_real.sum()))
    is_end = np.zeros(len(start), dtype=bool)
    return EpochPlan(objectives, first, start, length, is_end, rng.permutation(num_rows))


def plan_apart(boundaries: np.ndarray, recipe: InfillingRecipe, rng: np.random.Generator) -> EpochPlan:
    """
    Pack documents into rows of one objective each.

    Args:
        boundaries: `(documents + 1,)` index of the first token of every document; the last of each is its `</s>`.
        recipe: Shares of the objectives, which are drawn for documents, and lengths of their texts.
        rng: Source of the objectives and of the order.
    """
    objective_of = choose_objectives(rng.random(len(boundaries) - 1), recipe)
    plans = []
    for index, name in enumerate(OBJECTIVES[:3]):
        documents = np.flatnonzero(objective_of == index)
        if len(documents):
            documents = rng.permutation(documents)
            lengths = boundaries[documents + 1] - boundaries[documents] - 1
            piece_of, offset, length = split_documents(lengths, recipe.longest_text(name))
            first = next_fit(recipe.infilled_length(length, name), recipe.row_length)
            is_end = offset + length == lengths[piece_of]
            plans.append((index, first, boundaries[documents][piece_of] + offset, length, is_end))
    return join_plans(plans, rng)


def plan_instructions(boundaries: np.ndarray, recipe: InfillingRecipe, rng: np.random.Generator) -> EpochPlan:
    """
    Pack instructions into rows.

    Args:
        boundaries: `(2 * instructions + 1,)` index of the first token of every context and every target, in turns.
        recipe: Lengths of a row and of an instruction.
        rng: Source of the order.

    Raises:
        ValueError: If an instruction is too long, having been tokenized for another recipe.
    """
    number = rng.permutation(len(boundaries) // 2)
    length = np.diff(boundaries).reshape(-1, 2)[number]
    with_sop = length.sum(1) + 1
    longest = recipe.longest_instruction
    if (with_sop > longest).any():
        name = "row_length" if recipe.instruction_length is None else "instruction_length"
        raise ValueError(
            f"an instruction takes {with_sop.max()} tokens, but {name} is {longest}; "
            "tokenize the instructions again for rows of this length"
        )
    first = next_fit(with_sop, recipe.row_length)
    plan = (OBJECTIVES.index("instruction"), first, boundaries[2 * number], length, np.ones(len(number), dtype=bool))
    return join_plans([plan], rng)


def join_plans(
    plans: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]], rng: np.random.Generator
) -> EpochPlan:
    """Put the rows of several objectives together, each given as objective, `first`, `start`, `length`, `is_end`."""
    pieces_before = np.cumsum([0, *(len(plan[2]) for plan in plans)])
    objectives = np.repeat([plan[0] for plan in plans], [len(plan[1]) - 1 for plan in plans])
    first = np.concatenate([plan[1][:-1] + before for plan, before in zip(plans, pieces_before, strict=False)])
    start, length, is_end = (np.concatenate([plan[field] for plan in plans]) for field in (2, 3, 4))
    first = np.append(first, pieces_before[-1])
    return EpochPlan(objectives, first, start, length, is_end, order=rng.permutation(len(objectives)))
