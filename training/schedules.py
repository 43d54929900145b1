"""What changes during training, as functions of the samples or steps before."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchSchedule:
    """
    How many samples every optimizer step takes: from `start` to `full`, linear over the first samples.

    Sizes are multiples of the greatest common divisor of both, whatever the number of processes, so that a run resumes
    the same on other machines.

    Args:
        total_samples: Samples of the run; what is left at the end and fills no such multiple is not trained on.
        full: Samples of a step behind the ramp.
        start: Samples of the first step; `full` for no ramp.
        ramp_samples: Samples over which the batch grows.

    Raises:
        ValueError: If sizes are not positive, `start` is above `full`, or the samples do not suffice for one step.
    """

    total_samples: int
    full: int
    start: int
    ramp_samples: float

    def __post_init__(self) -> None:
        """Check that the schedule is possible."""
        if not 1 <= self.start <= self.full:
            raise ValueError(
                f"batches must grow from at least 1 to at least as many samples, got {self.start} to {self.full}"
            )
        if not 0 <= self.ramp_samples <= self.total_samples:
            raise ValueError(f"the ramp of {self.ramp_samples} samples exceeds the {self.total_samples} of the run")
        if self.total_samples < self.multiple:
            raise ValueError(
                f"{self.total_samples} samples do not fill one batch of {self.multiple}; train on more, or set "
                "a smaller batch"
            )

    @property
    def multiple(self) -> int:
        """What every batch size is a multiple of."""
        return math.gcd(self.start, self.full)

    def batch_sizes(self) -> np.ndarray:
        """Return `(steps,)` the number of samples of every step."""
        sizes = []
        consumed = 0
        while consumed < self.ramp_samples:
            size = self.start + (self.full - self.start) * consumed / self.ramp_samples
            size = int(size) // self.multiple * self.multiple
            if consumed + size > self.total_samples:
                break
            sizes.append(size)
            consumed += size
        left = self.total_samples - consumed
        sizes += [self.full] * (left // self.full)
        rest = left % self.full // self.multiple * self.multiple
        return np.array([*sizes, *([rest] if rest else [])], dtype=np.int64)


@dataclass(frozen=True)
class LearningRateSchedule:
    """
    Learning rate by samples: linear from `initial` to `peak`, then half a cosine down to `minimum`.

    Args:
        initial: Learning rate at the first sample.
        peak: After `warmup_samples`.
        minimum: Learning rate at the last sample.
        warmup_samples: Samples of the linear part.
        total_samples: Samples of the run.

    Raises:
        ValueError: If the rates are not ordered or the warm-up is longer than the run.

    Source: GLM-130B (arXiv 2210.02414), appendix B.2.
    """

    initial: float
    peak: float
    minimum: float
    warmup_samples: float
    total_samples: int

    def __post_init__(self) -> None:
        """Check that the schedule is possible."""
        if not (0 <= self.initial <= self.peak and 0 <= self.minimum <= self.peak and self.peak > 0):
            raise ValueError(
                "initial_learning_rate and min_learning_rate must be at least 0 and at most learning_rate "
                f"({self.peak}), got {self.initial} and {self.minimum}"
            )
        if not 0 <= self.warmup_samples <= self.total_samples:
            raise ValueError(
                f"the warm-up of {self.warmup_samples:.0f} samples exceeds the {self.total_samples} of the run"
            )

    def at(self, samples: float) -> float:
        """Return the learning rate after so many samples."""
        if samples < self.warmup_samples:
            return self.initial + (self.peak - self.initial) * samples / self.warmup_samples
        done = (samples - self.warmup_samples) / max(self.total_samples - self.warmup_samples, 1)
        return self.minimum + (self.peak - self.minimum) * (1 + math.cos(math.pi * min(done, 1))) / 2


@dataclass(frozen=True)
class PiecewiseLinear:
    """
    A value that moves linearly from point to point and stays at the last; two points at one place make a jump.

    Args:
        points: Pairs of place and value, in order; the first value holds before the first place, too.

    Raises:
        ValueError: If there is no point, or places are not in order.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        """Check that the schedule is possible."""
        places = [place for place, _ in self.points]
        if not places or places != sorted(places):
            raise ValueError(f"a schedule needs points [place, value] with growing places, got {list(self.points)}")

    @classmethod
    def of(cls, value: float | Sequence[Sequence[float]]) -> "PiecewiseLinear":
        """Return the schedule of a number, which never changes, or of a list of points."""
        if isinstance(value, (int, float)):
            return cls(((0.0, float(value)),))
        try:
            return cls(tuple((float(place), float(size)) for place, size in value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"a schedule is a number or a list of [place, value], got {value!r}: {error}") from error

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """Return the values at places of any shape; at a jump, the value behind it."""
        places, values = (np.array(column, dtype=np.float64) for column in zip(*self.points, strict=True))
        right = np.searchsorted(places, at, side="right").clip(0, len(places) - 1)
        left = np.maximum(np.searchsorted(places, at, side="right") - 1, 0)
        width = places[right] - places[left]
        share = np.divide(at - places[left], width, out=np.zeros(np.shape(at)), where=width > 0)
        return values[left] + np.clip(share, 0, 1) * (values[right] - values[left])


def sample_indices(samples: np.ndarray, skipped: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    Return which samples of the data are trained on when some ranges are left out.

    Args:
        samples: Numbers of samples as training counts them.
        skipped: Ranges `[first, end)` of the data, in order and apart.
    """
    numbers = samples.copy()
    for first, end in skipped:
        numbers += (numbers >= first) * (end - first)
    return numbers


def parse_ranges(ranges: Sequence[str], ends: np.ndarray) -> list[tuple[int, int]]:
    """
    Turn ranges of steps into ranges of samples.

    Args:
        ranges: Such as `40701-40900`, steps counted from 1 as logs do, both included.
        ends: `(steps,)` number of samples after every step.

    Raises:
        ValueError: If a range is none, reaches beyond the run, or overlaps another.
    """
    starts = np.append(0, ends)
    found = []
    for text in ranges:
        first, _, last = str(text).partition("-")
        if not (first.strip().isdigit() and last.strip().isdigit() and 1 <= int(first) <= int(last) <= len(ends)):
            raise ValueError(f"a skipped range must be steps FIRST-LAST of the {len(ends)} of the run, got {text!r}")
        found.append((int(starts[int(first) - 1]), int(starts[int(last)])))
    found.sort()
    if any(end > first for (_, end), (first, _) in zip(found[:-1], found[1:], strict=True)):
        raise ValueError(f"skipped ranges must not overlap, got {', '.join(map(str, ranges))}")
    return found
