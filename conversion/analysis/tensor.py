"""Measure one weight matrix in blocks of rows: how its values spread, and what INT8 and INT4 lose of them.

The matrix is read twice: first for its moments and errors, then for what is counted in standard deviations. Values are
widened to fp64, so that sums are exact to about 1e-15.

Shapes: `N` output features, `K` input features.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypedDict

import torch
from torch import Tensor

from glm_hf.quantization.functional import dequantize_weight, quantize_weight

WEIGHTS_AT_ONCE = 2**17  # in fp64 a block of this size stays in the cache, and its memory is kept for the next one
SCALE_BITS = 16
FAR = 6  # standard deviations
LARGEST_EDGE = 10  # of the histogram, in standard deviations
BINS_PER_STD = 8
HISTOGRAM_EDGES = [
    number / BINS_PER_STD for number in range(-LARGEST_EDGE * BINS_PER_STD, LARGEST_EDGE * BINS_PER_STD + 1)
]
UNITS = {
    "mean, std, min, max": "as the weights; std divides by num_weights",
    "kurtosis": "fourth central moment / std^4, 3 for a normal distribution; null if all weights are equal",
    "share_beyond_6_std": "of num_weights, those farther than 6 std from the mean",
    "row_magnitude": "largest magnitude of each row, as the weights",
    "histogram_edges": "std from the mean",
    "histogram": "number of weights below the first edge, from each edge to the next, and from the last edge on",
    "relative_rms_error": "||W - Wq|| / ||W||, 0.01 is 1%; null if all weights are 0",
    "largest_error": "largest magnitude of W - Wq, as the weights",
    "snr": "dB, -20 log10(relative_rms_error); null if the error is 0 or undefined",
    "bits_per_weight": "codes and fp16 scales",
}


class Scheme(TypedDict):
    """How a matrix is quantized: with one scale per row (None), or one per `group_size` input features."""

    bits: int
    group_size: int | None


class QuantizationError(TypedDict):
    """What a scheme loses of a matrix."""

    relative_rms_error: float | None
    largest_error: float
    snr: float | None
    bits_per_weight: float


class Statistics(TypedDict):
    """How the values of a matrix spread, and what each scheme that fits its input features loses of them."""

    num_weights: int
    mean: float
    std: float
    min: float
    max: float
    kurtosis: float | None
    share_beyond_6_std: float
    row_magnitude: dict[str, float]
    histogram: list[int]
    quantization: dict[str, QuantizationError]


def fits(scheme: Scheme, num_columns: int) -> bool:
    """Tell whether a scheme can store rows of this many input features."""
    group_size = num_columns if scheme["group_size"] is None else scheme["group_size"]
    return num_columns % group_size == 0 and (scheme["bits"] == 8 or group_size % 2 == 0)


def measure(read: Callable[[], Iterator[Tensor]], shape: tuple[int, int], schemes: dict[str, Scheme]) -> Statistics:
    """
    Measure a matrix `(N, K)`, whose units are `UNITS`.

    Args:
        read: Function that yields the matrix in blocks of rows, floating point.
        shape: `(N, K)`.
        schemes: Quantization schemes by name; those that do not fit are left out.

    Raises:
        ValueError: If a weight is not finite, in fp16 too.
    """
    num_rows, num_columns = shape
    spread = _Spread(num_rows)
    errors = {name: _Errors(scheme) for name, scheme in schemes.items() if fits(scheme, num_columns)}
    for rows in _in_cache(read()):
        values = rows.double()
        spread.add(values)
        for error in errors.values():
            error.add(rows, values)
    tails = _Tails(spread.mean, spread.std)
    for rows in _in_cache(read()):
        tails.add(rows.double())
    norm = math.sqrt(spread.count * (spread.std**2 + spread.mean**2))
    return Statistics(
        num_weights=spread.count,
        mean=spread.mean,
        std=spread.std,
        min=spread.min,
        max=spread.max,
        kurtosis=tails.fourth / spread.count if spread.std else None,
        share_beyond_6_std=tails.num_far / spread.count,
        row_magnitude=spread.row_magnitude(),
        histogram=tails.counts.tolist(),
        quantization={name: error.summary(norm, num_columns) for name, error in errors.items()},
    )


def _in_cache(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    for block in blocks:
        yield from block.split(max(1, WEIGHTS_AT_ONCE // block.shape[1]))


class _Spread:
    """Count, mean and sum of squared deviations, merged block by block; source: Chan, Golub, LeVeque (1979)."""

    def __init__(self, num_rows: int) -> None:
        self.count = 0
        self.mean = 0.0
        self._deviation = 0.0
        self._row = 0
        self._lows, self._highs = torch.empty(2, num_rows, dtype=torch.double)  # of every row

    def add(self, values: Tensor) -> None:
        """Add rows; ValueError if one of their weights is not finite."""
        rows = slice(self._row, self._row + len(values))
        self._lows[rows], self._highs[rows] = values.amin(1), values.amax(1)
        if not (self._lows[rows].isfinite() & self._highs[rows].isfinite()).all():
            row, column = (~values.isfinite()).nonzero()[0].tolist()
            value = values[row, column].item()
            raise ValueError(f"[{self._row + row}, {column}] is {value}, but weights must be finite")
        self._row += len(values)
        mean = values.mean().item()
        centred = (values - mean).flatten()
        step, count = mean - self.mean, self.count + values.numel()
        self._deviation += centred.dot(centred).item() + step**2 * self.count * values.numel() / count
        self.mean += step * values.numel() / count
        self.count = count

    @property
    def min(self) -> float:
        return self._lows.min().item()

    @property
    def max(self) -> float:
        return self._highs.max().item()

    @property
    def std(self) -> float:
        return math.sqrt(self._deviation / self.count)

    def row_magnitude(self) -> dict[str, float]:
        """Return statistics of the largest magnitude of every row."""
        largest = torch.maximum(self._highs, -self._lows)
        return {
            "min": largest.min().item(),
            "median": largest.quantile(0.5).item(),
            "mean": largest.mean().item(),
            "max": largest.max().item(),
        }


class _Tails:
    """What needs mean and standard deviation first: fourth moment, share of far weights, histogram."""

    def __init__(self, mean: float, std: float) -> None:
        self._mean = mean
        self._std = std or 1.0
        self.fourth = 0.0  # sum of z^4
        self.num_far = 0
        self.counts = torch.zeros(len(HISTOGRAM_EDGES) + 1, dtype=torch.long)

    def add(self, values: Tensor) -> None:
        """Add rows, which are overwritten."""
        z = values.sub_(self._mean).div_(self._std).flatten()
        squares = z * z
        self.fourth += squares.dot(squares).item()
        self.num_far += int((squares > FAR**2).sum())
        last = LARGEST_EDGE * BINS_PER_STD
        bins = z.mul_(BINS_PER_STD).floor_().clamp_(-last - 1, last).add_(last + 1).int()
        self.counts += torch.bincount(bins, minlength=len(self.counts))


class _Errors:
    """What a scheme loses."""

    def __init__(self, scheme: Scheme) -> None:
        self._bits, self._group_size = scheme["bits"], scheme["group_size"]
        self._squares = 0.0
        self._largest = 0.0

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add rows, given also in fp64; ValueError if a weight is not finite in fp16."""
        weight, weight_scale = quantize_weight(rows, bits=self._bits, group_size=self._group_size)
        error = (values - dequantize_weight(weight, weight_scale, self._bits).double()).flatten()
        self._squares += error.dot(error).item()
        self._largest = max(self._largest, error.abs().max().item())

    def summary(self, norm: float, num_columns: int) -> QuantizationError:
        """Return the error relative to the matrix, of which the Frobenius norm is `norm`."""
        relative = math.sqrt(self._squares) / norm if norm else None
        return QuantizationError(
            relative_rms_error=relative,
            largest_error=self._largest,
            snr=-20 * math.log10(relative) if relative else None,
            bits_per_weight=self._bits + SCALE_BITS / (self._group_size or num_columns),
        )
