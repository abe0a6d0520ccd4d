"""How a tensor is quantized: the affine arithmetic of ONNX QuantizeLinear, in NumPy.

``q = clip(round(x / scale) + zero_point)``, ``x' = (q - zero_point) * scale``; rounding is half to even and zero is
always exactly representable (ONNX operator spec, QuantizeLinear-21 and DequantizeLinear-21).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
QuantType = Literal["uint8", "int8", "uint16", "int16"]

_LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
_REDUCED = {"uint8": (0, 127), "int8": (-64, 64)}


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """The form of a quantized tensor; scales come from its range.

    Attributes:
        dtype: element type of the quantized tensor.
        symmetric: zero lies in the middle (zero_point 0, or 128 for uint8), and the range is the same on both sides.
        axis: one scale for each index of this axis; None: one for the whole tensor.
        reduced: one bit less. x86 CPUs without VNNI add two products in saturating 16-bit arithmetic:
            ``2 * 255 * 127`` does not fit, ``2 * 255 * 64`` does.
    """

    dtype: QuantType = "uint8"
    symmetric: bool = False
    axis: int | None = None
    reduced: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _LIMITS:
            raise ValueError(f"dtype is one of {', '.join(_LIMITS)}, not {self.dtype!r}")

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest quantized number used; a symmetric range drops the lowest, e.g. -128."""
        low, high = _REDUCED.get(self.dtype, _LIMITS[self.dtype]) if self.reduced else _LIMITS[self.dtype]
        if self.symmetric and (high - low) % 2:
            return low + 1, high
        return low, high

    def parameters(self, low: Any, high: Any) -> tuple[Array, Array]:
        """Scale (float32) and zero point for a range that is widened to hold zero.

        Args:
            low: smallest value; a number, or one for each channel.
            high: largest value, of the same shape.

        Returns:
            Two arrays of the shape of ``low``. An empty range (all zero) has the scale 1. Scales are at least the
            smallest normal float32.
        """
        bottom = np.minimum(np.asarray(low, np.float64), 0.0)
        top = np.maximum(np.asarray(high, np.float64), 0.0)
        qmin, qmax = self.limits
        if self.symmetric:
            top = np.maximum(-bottom, top)
            bottom = -top
        width = top - bottom
        scale = np.where(width > 0, width / (qmax - qmin), 1.0)
        scale = np.asarray(np.maximum(scale, np.finfo(np.float32).tiny), np.float32)
        if self.symmetric:
            zero = np.full(scale.shape, (qmin + qmax) // 2)
        else:
            zero = np.clip(np.rint(qmin - bottom / scale), qmin, qmax)
        return scale, np.asarray(zero).astype(self.dtype)

    def weight_parameters(self, weight: Array) -> tuple[Array, Array]:
        """Scale and zero point of a constant: from its own smallest and largest values, by channel with an ``axis``."""
        if self.axis is None:
            axes = tuple(range(weight.ndim))
        else:
            axes = tuple(index for index in range(weight.ndim) if index != self.axis % weight.ndim)
        if not weight.size:
            kept = () if self.axis is None else (weight.shape[self.axis],)
            return self.parameters(np.zeros(kept), np.zeros(kept))
        return self.parameters(weight.min(axis=axes), weight.max(axis=axes))

    def quantize(self, array: Array, scale: Array, zero_point: Array) -> Array:
        """``array`` as integers of ``dtype``."""
        qmin, qmax = self.limits
        scaled = array.astype(np.float32) / self._spread(scale, array.ndim)
        shifted = np.rint(scaled) + self._spread(zero_point, array.ndim).astype(np.float32)
        return np.clip(shifted, qmin, qmax).astype(self.dtype)

    def dequantize(self, quantized: Array, scale: Array, zero_point: Array) -> Array:
        """The float32 numbers that ``quantized`` stands for."""
        shift = self._spread(zero_point, quantized.ndim).astype(np.int32)
        return (quantized.astype(np.int32) - shift).astype(np.float32) * self._spread(scale, quantized.ndim)

    def round_trip(self, array: Array, scale: Array, zero_point: Array) -> Array:
        """``array`` as it comes back from the quantized form."""
        return self.dequantize(self.quantize(array, scale, zero_point), scale, zero_point)

    def _spread(self, values: Array, rank: int) -> Array:
        """Scales or zero points by channel, shaped to broadcast over a tensor of ``rank``."""
        if self.axis is None or values.ndim == 0:
            return values
        shape = [1] * rank
        shape[self.axis] = values.size
        return values.reshape(shape)


def pack_bits(values: Array, bits: int) -> Array:
    """Joins 8 / bits neighbours of the last axis in one byte, the first in the lowest bits; padded with zeros."""
    per_byte = 8 // bits
    if per_byte == 1:
        return np.ascontiguousarray(values, np.uint8)
    padding = -values.shape[-1] % per_byte
    padded = np.pad(values, ((0, 0), (0, padding))).reshape(values.shape[0], -1, per_byte)
    packed = padded[..., 0].copy()
    for index in range(1, per_byte):
        packed |= padded[..., index] << np.uint8(bits * index)
    return packed


def unpack_bits(packed: Array, bits: int) -> Array:
    """The inverse of ``pack_bits``, padding included: uint8 [..., n] -> uint8 [..., n * 8 / bits]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)
