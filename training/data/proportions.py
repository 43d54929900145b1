"""A count divided among parts by shares, so that any place of it is computed by itself."""

from collections.abc import Sequence

from glm_hf.training.data.random_numbers import key_of

BITS = 32


class Proportions:
    """
    The numbers 0, 1, 2, ... divided among some parts, spread as evenly as their shares allow.

    The first part takes a number whenever its share of all so far passes a whole one; what is left is counted anew and
    divided among the others.

    Args:
        shares: Shares of the parts, at least 0 and not all of them.
        key: Key of the places where the parts begin.
    """

    def __init__(self, shares: Sequence[float], key: int) -> None:
        left = [sum(shares[part:]) for part in range(len(shares))]
        self.rates = [
            round((1 << BITS) * share / rest) if rest else 0 for share, rest in zip(shares, left, strict=True)
        ]
        self.offsets = [key_of(key, part) >> (64 - BITS) for part in range(len(shares))]

    def before(self, number: int) -> list[int]:
        """Return how many of the first `number` belong to each part."""
        counts = []
        for rate, offset in zip(self.rates[:-1], self.offsets, strict=False):
            counts.append((number * rate + offset) >> BITS)
            number -= counts[-1]
        return [*counts, number]

    def find(self, number: int) -> tuple[int, int]:
        """Return the part that a number belongs to, and how many of the part come before."""
        for part, (rate, offset) in enumerate(zip(self.rates[:-1], self.offsets, strict=False)):
            before = (number * rate + offset) >> BITS
            if ((number + 1) * rate + offset) >> BITS > before:
                return part, before
            number -= before
        return len(self.rates) - 1, number
