"""What quantizing and dequantizing makes of an array: the rounding that the corrections minimise, in NumPy."""

from __future__ import annotations

import numpy as np

from ..compiler.graph import Array


def fake_weight(rows: Array, bits: int = 8, per_channel: bool = True) -> Array:
    """[..., outputs, inputs] rounded to a symmetric grid of ``bits``, one scale per output or one for all.

    Equation: ``s = max|w| / (2^(bits-1) - 1)``, ``w_hat = s rint(w / s)`` (QuantizeLinear rounds half to even).
    """
    top = 2 ** (bits - 1) - 1
    size = np.abs(rows).max(axis=-1, keepdims=True, initial=0.0) if per_channel else np.abs(rows).max(initial=0.0)
    scale = np.maximum(size / top, 1e-30)
    return np.rint(rows / scale) * scale


def fake_activation(x: Array, low: float, high: float, bits: int = 8) -> Array:
    """x rounded to an asymmetric grid of ``bits`` over [low, high], which is widened to hold zero; clipped outside."""
    low, high = min(low, 0.0), max(high, 0.0)
    top = 2**bits - 1
    scale = max((high - low) / top, 1e-30)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, top) - zero) * scale
