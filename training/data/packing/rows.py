"""Rows, and where their texts lie in a corpus."""

from dataclasses import dataclass

import numpy as np

from glm_hf.training.data.blanks import exclusive_sum, ragged_range
from glm_hf.training.data.recipe import OBJECTIVES, InfillingRecipe
from glm_hf.training.data.token_file import TokenFile

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
