"""Orders and divisions of which every place is computed by itself."""

from collections import Counter
from math import factorial

import numpy as np
import pytest

from glm_hf.training.data.proportions import Proportions
from glm_hf.training.data.random_numbers import KEY, Permutation, key_of, mix


def test_keys_of_single_numbers_are_those_of_arrays():
    keys = np.array([0, 1, 2**64 - 1], np.uint64)
    counters = np.array([0, 5, 2**32 - 1])
    expected = mix(keys, KEY, counters).tolist()
    assert [key_of(key, number) for key, number in zip(keys.tolist(), counters.tolist(), strict=True)] == expected
    assert key_of(1, 2, 3) == key_of(key_of(1, 2), 3) != key_of(1, 3, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 99, 1000, 1024, 4097])
def test_an_order_has_every_number_once(size):
    for key in range(3):
        order = Permutation(size, key)
        assert sorted(map(order, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_a_few_numbers_are_about_equally_likely(size):
    counted = Counter(tuple(map(Permutation(size, key), range(size))) for key in range(200 * factorial(size)))
    assert len(counted) == factorial(size)
    assert 100 < min(counted.values()) <= max(counted.values()) < 300  # of 200 each


@pytest.mark.parametrize("size", [1000, 200_000_000])
@pytest.mark.parametrize("seed", range(2))
def test_neighbours_of_an_order_have_nothing_to_do_with_each_other(size, seed):
    order = Permutation(size, key_of(7, seed))
    count = min(size, 10_000)
    places = np.array([order(number) for number in range(count)]) / size
    limit = 4 / count**0.5  # four standard deviations
    for distance in (1, 2, 3, 64, 100):
        assert abs(np.corrcoef(places[distance:], places[:-distance])[0, 1]) < limit
    assert abs(np.corrcoef(places, np.arange(count))[0, 1]) < limit
    other = np.array([Permutation(size, key_of(7, seed + 10))(number) for number in range(count)]) / size
    assert abs(np.corrcoef(places, other)[0, 1]) < limit
    in_tenths = np.bincount((places * 10).astype(int), minlength=10)
    assert abs(in_tenths - count / 10).max() < 4 * (0.09 * count) ** 0.5


@pytest.mark.parametrize(
    "shares",
    [[1.0], [0.3, 0.2, 0.5], [0, 0.3, 0, 0.7, 0], [1.0, 0.0], [0.0, 1.0], [3, 1, 4, 1, 5], [1e-3, 1]],
    ids=str,
)
@pytest.mark.parametrize("key", range(3))
def test_a_count_is_divided_as_evenly_as_shares_allow(shares, key):
    divided = Proportions(shares, key)
    counts = [0] * len(shares)
    for number in range(3000):
        assert divided.before(number) == counts
        part, before = divided.find(number)
        assert before == counts[part]
        counts[part] += 1
        assert shares[part] > 0
        expected = (number + 1) * np.array(shares) / sum(shares)
        assert abs(np.array(counts) - expected).max() < len(shares)


def test_a_count_far_away_is_found_at_once():
    divided = Proportions([0.3, 0.7], 1)
    first = 10**11
    counts = divided.before(first)
    assert abs(counts[0] - 0.3 * first) < 100  # of the 32 bits of a share
    part, before = divided.find(first)
    assert before == counts[part]
