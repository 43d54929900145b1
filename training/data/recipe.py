"""The numbers of the blank-infilling recipe, and how many tokens of text fit a window under it.

Source: GLM-130B (arXiv 2210.02414), section 2.2; GLM (arXiv 2103.10360), section 2.1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

OBJECTIVES = ("mask", "smask", "gmask", "instruction")
LONGEST_ROW = 1 << 16
LONGEST_SPAN = 64  # of the table of Poisson probabilities; lengths beyond have less than 1e-9 of it
SPAN_MARGIN = 1.4  # spans above the expected number that are provided for: four standard deviations in 512 tokens


@dataclass(frozen=True)
class InfillingRecipe:
    """
    What share of the rows has which blanks, and how blanks are drawn; the defaults are GLM-130B's.

    Args:
        row_length: Tokens of a training sequence, masks and blanks included.
        window_length: Tokens of a sample with `[MASK]` or `[sMASK]`; several stand side by side in a row.
        mask_probability: Share of rows with `[MASK]` blanks, in `[0, 1]`.
        smask_probability: Share of rows with `[sMASK]` blanks, whole sentences. All other rows have a `[gMASK]`.
        span_share: Share of a sample's tokens that its `[MASK]` or `[sMASK]` blanks cover, in `(0, 0.5]`.
        mean_span_length: Mean of the Poisson distribution of `[MASK]` lengths, before it is truncated to the limits.
        min_span_length: Shortest `[MASK]`.
        max_span_length: Longest `[MASK]`; no limit by default.
        min_blank_length: Shortest `[gMASK]`, whose length is uniform.
        max_blank_length: Longest `[gMASK]`; all but one token by default.
        instruction_length: Longest instruction in tokens, its target and `sop` included; `row_length` by default.
            GLM-130B's had 512.

    Raises:
        ValueError: If a number is out of its range.
    """

    row_length: int = 2048
    window_length: int = 512
    mask_probability: float = 0.3
    smask_probability: float = 0.0
    span_share: float = 0.15
    mean_span_length: float = 3.0
    min_span_length: int = 1
    max_span_length: int | None = None
    min_blank_length: int = 1
    max_blank_length: int | None = None
    instruction_length: int | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.row_length >= LONGEST_ROW:
            raise ValueError(f"row_length must be below {LONGEST_ROW}, got {self.row_length}")
        if not 8 <= self.window_length <= self.row_length:
            raise ValueError(
                f"window_length must lie between 8 and row_length ({self.row_length}), got {self.window_length}"
            )
        if self.instruction_length is not None and not 4 <= self.instruction_length <= self.row_length:
            raise ValueError(
                f"instruction_length must lie between 4 and row_length ({self.row_length}), "
                f"got {self.instruction_length}"
            )
        probabilities = (self.mask_probability, self.smask_probability)
        if min(probabilities) < 0 or sum(probabilities) > 1:
            raise ValueError(
                f"mask_probability and smask_probability must lie in [0, 1], also together, got {probabilities}"
            )
        if not 0 < self.span_share <= 0.5:
            raise ValueError(f"span_share must lie in (0, 0.5], got {self.span_share}")
        if not 0 < self.mean_span_length <= LONGEST_SPAN / 2:
            raise ValueError(f"mean_span_length must lie in (0, {LONGEST_SPAN // 2}], got {self.mean_span_length}")
        for name, limit in (("span", LONGEST_SPAN), ("blank", self.row_length)):
            shortest, longest = getattr(self, f"min_{name}_length"), getattr(self, f"max_{name}_length")
            if not 1 <= shortest <= (limit if longest is None else longest):
                raise ValueError(f"min_{name}_length and max_{name}_length must be a range, got {shortest}, {longest}")

    @cached_property
    def span_cdf(self) -> np.ndarray:
        """Cumulative probabilities `(LONGEST_SPAN,)` of the lengths from 1 on, zero outside the limits."""
        lengths = np.arange(1, LONGEST_SPAN + 1)
        log_factorial = np.cumsum(np.log(lengths))
        probability = np.exp(lengths * np.log(self.mean_span_length) - log_factorial)
        longest = LONGEST_SPAN if self.max_span_length is None else self.max_span_length
        probability[(lengths < self.min_span_length) | (lengths > longest)] = 0
        return np.cumsum(probability / probability.sum())

    @cached_property
    def expected_span_length(self) -> float:
        """Mean length of the spans that are drawn."""
        return float((1 - self.span_cdf[:-1]).sum() + 1)

    @cached_property
    def expected_overshoot(self) -> float:
        """Tokens by which spans, drawn until they reach a number, pass it on average: `E[L(L - 1)] / (2 E[L])`."""
        lengths = np.arange(1, LONGEST_SPAN + 1)
        probability = np.diff(self.span_cdf, prepend=0)
        return float((probability * lengths * (lengths - 1)).sum() / (2 * self.expected_span_length))

    def most_spans(self, text_length: np.ndarray) -> np.ndarray:
        """Return the number of spans that a text of `text_length` tokens gets at most."""
        return 1 + (SPAN_MARGIN * self.span_share / self.expected_span_length * text_length).astype(np.int64)

    def infilled_length(self, text_length: np.ndarray, objective: str) -> np.ndarray:
        """Return how many tokens of a row a text takes at most once its blanks have masks and `sop`."""
        if objective == "gmask":
            return text_length + 2
        return text_length + 1 + 2 * self.most_spans(text_length)

    def longest_text(self, objective: str) -> int:
        """Return how many tokens of text fit the window of an objective."""
        window = self.row_length if objective == "gmask" else self.window_length
        lengths = np.arange(1, window)
        return int(lengths[self.infilled_length(lengths, objective) <= window].max())

    @property
    def longest_instruction(self) -> int:
        """How many tokens an instruction may have, its target and `sop` included."""
        return self.row_length if self.instruction_length is None else self.instruction_length

    def texts_per_row(self, objective: str) -> int:
        """Return how many texts of full length stand side by side in a row."""
        return 1 if objective == "gmask" else self.row_length // self.window_length
