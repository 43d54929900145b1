"""Find NaN and infinity among weights while they are read, which no conversion makes better and no answer survives."""

import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

MOST_WARNINGS = 10

logger = logging.getLogger(__name__)


class FiniteWeights:
    """
    Watches tensors pass by in blocks of rows.

    Args:
        strict: Whether the first value that is not finite is an error rather than a warning.

    Attributes:
        found: What was found, a line for each tensor by its name: the first value that is not finite, with its index.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.found: dict[str, str] = {}

    def watch(self, name: str, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the blocks of a tensor as they are; ValueError if `strict` and a value is NaN or infinite."""
        row = 0
        for block in blocks:
            if name not in self.found and (index := first_not_finite(block)) is not None:
                where = ", ".join(map(str, (row + index[0], *index[1:])))
                self._report(name, f"{name}[{where}] is {block[index].item()}, which is not finite")
            row += len(block)
            yield block

    def _report(self, name: str, line: str) -> None:
        if self.strict:
            raise ValueError(f"{line}: weights must be finite; copy the model again, or use another")
        self.found[name] = line
        if len(self.found) <= MOST_WARNINGS:
            logger.warning("%s", line)
        elif len(self.found) == MOST_WARNINGS + 1:
            logger.warning("more tensors have values that are not finite")


def first_not_finite(block: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first element that is NaN or infinite, None if there is none, as among integers."""
    if not block.is_floating_point() or not block.numel():
        return None
    if all(bound.isfinite() for bound in torch.aminmax(block)):  # passes NaN on, and is as fast as memory
        return None
    return tuple((~block.isfinite()).nonzero()[0].tolist())
