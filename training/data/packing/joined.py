"""Documents that are joined to full rows."""

import numpy as np

from glm_hf.training.data.packing.rows import Pieces
from glm_hf.training.data.proportions import Proportions
from glm_hf.training.data.random_numbers import key_of
from glm_hf.training.data.recipe import OBJECTIVES, InfillingRecipe


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
