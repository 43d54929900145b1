import pytest

from glm_hf.planning.training_zero import (
    optimizer_groups,
    partition_size,
    reducing_elements,
    slices_of,
    touched_elements,
)


def test_biases_and_norms_are_a_group_of_their_own():
    groups = optimizer_groups([("mlp.weight", 10), ("mlp.bias", 1), ("norm.weight", 2), ("lm_head.weight", 21)])
    assert groups == [[10, 21], [1, 2]]


@pytest.mark.parametrize(
    ("group", "copies", "expected"), [([10, 21], 2, 16), ([1, 2], 2, 2), ([9], 4, 4), ([8], 1, 8)]
)
def test_partitions_are_padded_to_even_numbers(group, copies, expected):
    assert partition_size(group, copies) == expected


def test_slices_end_where_partitions_do():
    assert slices_of([10, 10, 12, 2], 2) == [[(0, 10)], [(0, 8), (1, 2)], [(1, 12)], [(1, 2)]]
    assert slices_of([40], 4) == [[(0, 10), (1, 10), (2, 10), (3, 10)]]
    assert slices_of([6, 6], 2) == [[(0, 6)], [(1, 6)]]


def test_touched_parameters_are_counted_whole():
    """Cut at 16 of 30, the second matrix belongs to both; cut at 2 of 3, the second vector does."""
    groups = [[10, 10, 10], [1, 2]]
    assert touched_elements(groups, 2) == [10 + 10 + 1 + 2, 10 + 10 + 2]
    assert touched_elements(groups, 1) == [33]


def test_all_in_one_bucket():
    """A bucket of 100, empty; then full, with a place for all 30; nothing is joined for a single copy."""
    assert reducing_elements([[10, 20]], 1, False, bucket_size=100) == [max(30 + 100, 100 + 30)]


def test_large_gradients_stay_where_they_are():
    """60 held, a bucket of 5, and a place for all: the first is copied before it is freed."""
    assert reducing_elements([[20, 40]], 1, False, bucket_size=5) == [60 + 5 + 60]


def test_parts_of_several_copies_are_joined():
    """Partitions of 30: a bucket of 40 takes the first, is averaged, then takes the second, of which both update."""
    groups, bucket_size = [[20, 40]], 40
    first = 40 + 40 + 0  # the second and the bucket; the first is of one copy, so nothing is joined
    place = {0: 60, 1: 40}
    second = 40 + 40  # the bucket, and the second joined of 10 and 30
    assert reducing_elements(groups, 2, False, bucket_size) == [
        max(60 + 40, first + place[0], second + place[0]),
        max(60 + 40, first, second, 40 + place[1]),
    ]


def test_copied_gradients_are_freed_before_others_are_joined():
    """Partitions of 30: 60 and a bucket of 15, a place for all less the first, then 10 and 30 of the second joined."""
    assert reducing_elements([[20, 40]], 2, False, bucket_size=15)[0] == 60 + 15 + 60 - 20 + 40


def test_no_more_is_joined_than_a_bucket_holds():
    """Partitions of 10: of 40 always two, which are more than a bucket of 15; the last copy has none of these."""
    assert reducing_elements([[40, 20]], 6, False, bucket_size=15)[5] == 60 + 15 + 20
    assert reducing_elements([[40, 20]], 6, False, bucket_size=35)[5] == 60 + 35 + 40
    assert (
        reducing_elements([[40]], 4, False, bucket_size=5) == [40 + 5 + 40] * 4
    )  # joined with nothing, copied as a whole


def test_in_16_bits_only_a_replicas_own_part_has_a_place():
    """A bucket of 40 takes the first matrix, for which a place of 30 is made; then the second, joined of two parts."""
    assert reducing_elements([[20, 40]], 2, True, bucket_size=40) == [
        max(60 + 40, 40 + 40 + 30, 40 + 30 + 40),
        max(60 + 40, 40 + 40, 40 + 30 + 40),
    ]


def test_in_16_bits_parts_that_a_replica_updates_itself_are_joined():
    """Matrices of 10 lie apart for the replica that updates them, and are one part for the other."""
    assert reducing_elements([[10, 10, 10]], 1, True, bucket_size=30) == [30 + 30 + 30]
    assert reducing_elements([[10, 10, 10, 10]], 2, True, bucket_size=20) == [
        max(40 + 20, 20 + 20 + 20 + 20, 20 + 20),
        max(40 + 20, 20 + 20, 20 + 20 + 20),
    ]
