import math

import numpy as np
import pytest

from glm_hf.training.schedules import (
    BatchSchedule,
    LearningRateSchedule,
    PiecewiseLinear,
    parse_ranges,
    sample_indices,
)


def test_batches_ramp_up_as_in_the_paper():
    total = 200_000_000
    sizes = BatchSchedule(total, full=4224, start=192, ramp_samples=0.025 * total).batch_sizes()
    before = np.append(0, sizes.cumsum())[:-1]
    assert (sizes % 192 == 0).all()
    assert (np.diff(sizes[:-1]) >= 0).all()
    line = 192 + (4224 - 192) * before / (0.025 * total)
    in_ramp = before < 0.025 * total
    assert ((line - sizes)[in_ramp] >= 0).all()
    assert ((line - sizes)[in_ramp] < 192).all()
    assert set(sizes[~in_ramp][:-1].tolist()) == {4224}
    assert total - sizes.sum() < 192


def test_batches_without_a_ramp_are_equal_but_for_the_last():
    assert BatchSchedule(100, full=32, start=32, ramp_samples=0).batch_sizes().tolist() == [32, 32, 32]
    assert BatchSchedule(100, full=32, start=8, ramp_samples=0).batch_sizes().tolist() == [32, 32, 32]
    assert BatchSchedule(45, full=12, start=4, ramp_samples=24).batch_sizes().tolist() == [4, 4, 4, 8, 8, 12, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((100, 8, 16, 10), "must grow"),
        ((100, 8, 0, 10), "must grow"),
        ((100, 8, 8, 101), "exceeds the 100"),
        ((7, 8, 8, 0), "7 samples do not fill one batch of 8"),
    ],
)
def test_impossible_batches_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BatchSchedule(*settings)


def test_learning_rate_follows_line_and_cosine():
    rate = LearningRateSchedule(1e-7, 8e-5, 8e-6, warmup_samples=500, total_samples=100_000)
    assert rate.at(0) == 1e-7
    assert rate.at(250) == pytest.approx((1e-7 + 8e-5) / 2)
    assert rate.at(500) == pytest.approx(8e-5)
    middle = 500 + 99_500 / 2
    assert rate.at(middle) == pytest.approx((8e-5 + 8e-6) / 2)
    assert rate.at(500 + 99_500 / 3) == pytest.approx(8e-6 + 7.2e-5 * (1 + math.cos(math.pi / 3)) / 2)
    assert rate.at(100_000) == pytest.approx(8e-6)
    assert rate.at(200_000) == pytest.approx(8e-6)
    assert LearningRateSchedule(0, 1, 0, 0, 10).at(0) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [((2.0, 1.0, 0.0, 1, 10), "learning_rate"), ((0.0, 1.0, 2.0, 1, 10), "learning_rate"),
     ((0.0, 0.0, 0.0, 1, 10), "learning_rate"), ((0.0, 1.0, 0.0, 11, 10), "warm-up of 11")],
)  # fmt: skip
def test_impossible_learning_rates_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LearningRateSchedule(*settings)


def test_piecewise_lines_go_from_point_to_point_and_jump():
    alpha = PiecewiseLinear.of([[10, 0.1], [20, 1.0], [30, 1.0], [30, 0.5]])
    at = np.array([0, 10, 15, 20, 29, 30, 99])
    assert alpha(at).tolist() == pytest.approx([0.1, 0.1, 0.55, 1.0, 1.0, 0.5, 0.5])
    assert PiecewiseLinear.of(0.05)(at).tolist() == [0.05] * 7
    assert float(alpha(np.array(15))) == pytest.approx(0.55)


@pytest.mark.parametrize("points", [[], [[1]], [[2, 0.1], [1, 0.2]], "0.1", None, [["a", 1]]])
def test_schedules_that_are_none_are_refused(points):
    with pytest.raises(ValueError, match="schedule"):
        PiecewiseLinear.of(points)


def test_skipped_ranges_leave_out_exactly_their_samples():
    ends = np.array([4, 8, 16, 24, 32])
    ranges = parse_ranges(["4-4", "2-2"], ends)
    assert ranges == [(4, 8), (16, 24)]
    expected = [n for n in range(100) if not 4 <= n < 8 and not 16 <= n < 24]
    assert sample_indices(np.arange(80), ranges).tolist() == expected[:80]
    assert parse_ranges(["1-5"], ends) == [(0, 32)]
    assert parse_ranges(["3-4", "1-2"], ends) == [(0, 8), (8, 24)]


@pytest.mark.parametrize("ranges", [["3"], ["0-2"], ["4-2"], ["1-9"], ["a-b"], ["1-3", "3-4"]])
def test_ranges_that_are_none_are_refused(ranges):
    with pytest.raises(ValueError, match="skipped range"):
        parse_ranges(ranges, np.array([4, 8, 12, 16]))
