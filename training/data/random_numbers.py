"""Random numbers that depend on a key and a counter only, so that no sample's draws depend on its neighbours.

Numbers are outputs of SplitMix64, whose state is the key plus as many golden ratios as the counter says.
Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (OOPSLA 2014).
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# What a number is drawn for; counters stay below 2^32.
KEY, OBJECTIVE, LENGTH, GOAL, PLACE, ORDER, MOVE, PART = (np.uint64(purpose << 32) for purpose in range(8))


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
