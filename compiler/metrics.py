"""How far one array is from another, gathered over many samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Distance:
    """Signal-to-noise ratio, cosine and largest error between a reference and what was got, over all samples seen."""

    def __init__(self) -> None:
        self.signal = self.noise = self.product = self.power = 0.0
        self.largest = self.peak = 0.0

    def update(self, reference: Array, got: Array) -> None:
        """Takes in one sample; both arrays have the same shape. What is NaN or infinite makes the noise infinite."""
        a, b = reference.astype(np.float64).reshape(-1), got.astype(np.float64).reshape(-1)
        difference = a - b
        self.signal += float(a @ a)
        self.power += float(b @ b)
        self.product += float(a @ b)
        noise = float(difference @ difference)
        self.noise += noise if math.isfinite(noise) else math.inf
        if a.size:
            largest = float(np.abs(difference).max())
            self.largest = max(self.largest, largest if math.isfinite(largest) else math.inf)
            self.peak = max(self.peak, float(np.abs(a).max()))

    @property
    def ratio(self) -> float:
        """Energy of the noise over the energy of the signal."""
        if self.noise == 0.0:
            return 0.0
        return self.noise / self.signal if self.signal > 0 else math.inf

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB; infinite where nothing differs."""
        ratio = self.ratio
        if ratio == 0.0:
            return math.inf
        return -10.0 * math.log10(ratio) if math.isfinite(ratio) else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; 1 for equal ones."""
        if self.noise == 0.0:
            return 1.0
        size = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.product / size if size > 0 and math.isfinite(size) else 0.0

    @property
    def relative_error(self) -> float:
        """``max |reference - got| / max |reference|``."""
        if self.largest == 0.0:
            return 0.0
        return self.largest / self.peak if self.peak > 0 else math.inf
