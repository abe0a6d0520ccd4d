"""What was seen of a tensor, in memory that does not grow with the number of samples, and the range chosen from it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from .quantization import QuantSpec

Array = np.ndarray[Any, Any]
RangeMethod = Literal["minmax", "percentile", "entropy", "mse"]

_BINS = 8192
_SHRINKS = [1.0 - step / 100 for step in range(81)]


@dataclasses.dataclass(frozen=True)
class TensorRange:
    """The range of a tensor that its quantized form covers; values outside saturate.

    Attributes:
        low: smallest value covered.
        high: largest value covered.
        observed: smallest and largest value seen; None: as covered.
    """

    low: float
    high: float
    observed: tuple[float, float] | None = None

    def to_list(self) -> list[float]:
        """Four numbers for a JSON report: low, high, and what was seen."""
        return [self.low, self.high, *(self.observed or (self.low, self.high))]

    @classmethod
    def from_list(cls, numbers: list[float]) -> TensorRange:
        """The inverse of ``to_list``."""
        low, high, least, most = numbers
        return cls(low, high, (least, most))


class MinMax:
    """The exact smallest and largest value of everything seen."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, array: Array) -> None:
        """Takes in one tensor of any shape."""
        if array.size:
            self.low = min(self.low, float(array.min()))
            self.high = max(self.high, float(array.max()))

    def range(self) -> TensorRange:
        """What was seen; zero for a tensor that was always empty."""
        return TensorRange(self.low, self.high) if self.low <= self.high else TensorRange(0.0, 0.0)


class Histogram(MinMax):
    """Counts in equal bins over ``[-reach, reach]``; for larger values the reach doubles and bins merge in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.reach = 0.0
        self.counts = np.zeros(_BINS, np.int64)

    def update(self, array: Array) -> None:
        """Takes in one tensor of any shape."""
        super().update(array)
        most = max(abs(self.low), abs(self.high)) if array.size else 0.0
        if most == 0.0:
            self.counts[_BINS // 2] += array.size
            return
        self._grow(most)
        scaled = array.reshape(-1).astype(np.float64) * (_BINS / 2 / self.reach) + _BINS / 2
        index = np.clip(scaled.astype(np.int64), 0, _BINS - 1)
        self.counts += np.bincount(index, minlength=_BINS)

    def centers(self) -> Array:
        """The middle of each bin."""
        return (np.arange(_BINS) + 0.5 - _BINS / 2) * (2 * self.reach / _BINS)

    def _grow(self, most: float) -> None:
        if self.reach == 0.0:
            self.reach = 2.0 ** math.ceil(math.log2(most))
        while self.reach < most:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(_BINS, np.int64)
            self.counts[_BINS // 4 : _BINS // 4 + _BINS // 2] = pairs
            self.reach *= 2


def choose_range(
    seen: MinMax, method: RangeMethod = "minmax", spec: QuantSpec | None = None, percentile: float = 99.99
) -> TensorRange:
    """The range to quantize with.

    ``minmax`` covers everything seen. ``percentile`` leaves out ``100 - percentile`` percent of the values, half on
    each side. ``mse`` and ``entropy`` clip at 81 fractions, 1 to 0.2, of the largest magnitude and take the one with
    the least mean square error, or the least Kullback-Leibler divergence of the quantized distribution from the one
    seen (Migacz, "8-bit inference with TensorRT", 2017). No range is wider than what was seen; 16-bit types cover it.

    Args:
        seen: a ``Histogram``; ``MinMax`` will do for ``minmax``.
        method: see above.
        spec: how the tensor will be quantized, for ``mse`` and ``entropy``; None: asymmetric uint8.
        percentile: percent of the values kept by ``percentile``.
    """
    whole = seen.range()
    if method == "minmax" or not isinstance(seen, Histogram) or whole.low == whole.high or seen.reach == 0.0:
        return whole
    if spec is not None and spec.dtype in ("uint16", "int16"):
        return whole
    if method == "percentile":
        low, high = _tails(seen, percentile)
    else:
        spec = dataclasses.replace(spec or QuantSpec(), axis=None)
        cost = _square_error if method == "mse" else _divergence
        most = max(-whole.low, whole.high)
        choices = [(max(whole.low, -most * part), min(whole.high, most * part)) for part in _SHRINKS]
        low, high = min(choices, key=lambda choice: cost(seen, *choice, spec))
    return TensorRange(max(low, whole.low), min(high, whole.high), (whole.low, whole.high))


def _tails(seen: Histogram, percentile: float) -> tuple[float, float]:
    total = np.cumsum(seen.counts)
    cut = total[-1] * (100.0 - percentile) / 200.0
    width = 2 * seen.reach / _BINS
    first = int(np.searchsorted(total, cut, side="right"))
    last = int(np.searchsorted(total, total[-1] - cut, side="left"))
    return (first - _BINS / 2) * width, (last + 1 - _BINS / 2) * width


def _square_error(seen: Histogram, low: float, high: float, spec: QuantSpec) -> float:
    used = seen.counts > 0
    centers, counts = seen.centers()[used], seen.counts[used]
    scale, zero = spec.parameters(low, high)
    back = spec.round_trip(centers.astype(np.float32), scale, zero)
    return float((counts * (back - centers) ** 2).sum() / counts.sum())


def _divergence(seen: Histogram, low: float, high: float, spec: QuantSpec) -> float:
    used = seen.counts > 0
    used[_BINS // 2] = False  # zeros have a code of their own; behind Relu they would outweigh everything else
    centers, counts = seen.centers()[used], seen.counts[used].astype(np.float64)
    scale, zero = spec.parameters(low, high)
    codes = spec.quantize(centers.astype(np.float32), scale, zero).astype(np.int64)
    codes -= codes.min()
    inside = (centers >= low) & (centers <= high)
    if not inside.any():
        return math.inf
    clipped = np.where(inside, counts, 0.0)  # what lies outside is counted in the outermost bins inside
    positions = np.flatnonzero(inside)
    clipped[positions[0]] += counts[: positions[0]].sum()
    clipped[positions[-1]] += counts[positions[-1] + 1 :].sum()
    # The quantized distribution: each code spreads its count evenly over its occupied bins.
    total = np.bincount(codes[inside], counts[inside])
    bins = np.bincount(codes[inside])
    spread = np.where(inside, (total / np.maximum(bins, 1))[np.minimum(codes, len(total) - 1)], 0.0)
    p, q = clipped / clipped.sum(), spread / spread.sum()
    kept = p > 0
    return float((p[kept] * np.log(p[kept] / np.maximum(q[kept], 1e-30))).sum())
