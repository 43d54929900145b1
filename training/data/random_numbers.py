"""Random numbers and orders that depend on a key and a counter only, so that each is computed by itself.

Numbers are outputs of SplitMix64, whose state is the key plus as many golden ratios as the counter says.
Sources: Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014); of orders, Black and
Rogaway, Ciphers with arbitrary finite domains (CT-RSA 2002).
"""

from math import isqrt

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# What a number is drawn for; counters stay below 2^32.
KEY, OBJECTIVE, LENGTH, GOAL, PLACE, ORDER, MOVE, PART = (np.uint64(purpose << 32) for purpose in range(8))
BITS = (1 << 64) - 1
GOLDEN_INT, FACTOR_INTS = int(GOLDEN), tuple(map(int, FACTORS))
ROUNDS = 8


def keys_of(seed: int, sample_ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """
    Return a key for each sample.

    Args:
        seed: Seed of the run.
        sample_ids: `(S,)` of the rows that hold the samples.
        numbers: `(S,)` of the samples in their rows.
    """
    seeds = np.full(1, seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return mix(mix(mix(seeds, KEY, seeds - seeds), KEY, sample_ids), KEY, numbers)


def uniform(keys: np.ndarray, purpose: np.uint64, counters: np.ndarray) -> np.ndarray:
    """Return float64 numbers in [0, 1), one for each key and counter; shapes are broadcast."""
    return (mix(keys, purpose, counters) >> np.uint64(11)) * 2.0**-53


def mix(keys: np.ndarray, purpose: np.uint64, counters: np.ndarray) -> np.ndarray:
    """Return 64 random bits for each key and counter."""
    state = counters.astype(np.uint64)
    state += purpose + np.uint64(1)
    state *= GOLDEN
    state = state + keys
    state ^= state >> np.uint64(30)
    state *= FACTORS[0]
    state ^= state >> np.uint64(27)
    state *= FACTORS[1]
    state ^= state >> np.uint64(31)
    return state


def key_of(seed: int, *numbers: int) -> int:
    """Return 64 random bits for a seed and some numbers, in whose order they matter."""
    key = seed & BITS
    for number in numbers:
        key = _mix_one(key, number)
    return key


def _mix_one(key: int, counter: int) -> int:
    """Return what `mix` does of single numbers; much faster in Python's own."""
    state = (key + (counter + 1) * GOLDEN_INT) & BITS
    state = (state ^ state >> 30) * FACTOR_INTS[0] & BITS
    state = (state ^ state >> 27) * FACTOR_INTS[1] & BITS
    return state ^ state >> 31


class Permutation:
    """
    A random order of the numbers below `size`, of which each is computed by itself.

    A number is a pair, of which one half in turns moves by random bits of the other, as in a Feistel cipher; pairs
    beyond the size go on until they come to one within.

    Args:
        size: How many numbers there are, at least 1.
        key: Key of the order.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self.width = isqrt(size - 1) + 1
        self.height = -(-size // self.width)
        self.keys = [key_of(key, number) for number in range(ROUNDS)]

    def __call__(self, place: int) -> int:
        """Return the number at a place, both from 0 on."""
        while True:
            high, low = divmod(place, self.width)
            for first, second in zip(self.keys[::2], self.keys[1::2], strict=True):
                high = (high + _mix_one(first, low)) % self.height
                low = (low + _mix_one(second, high)) % self.width
            place = high * self.width + low
            if place < self.size:
                return place
