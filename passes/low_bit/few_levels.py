"""Binary, ternary and mid-rise two-bit weights, as codes of kernels that exist.

ONNX Runtime has no kernel of one bit, and no fast one of two bits with half-way zero points; these are grids of
MatMulNBits that it does execute:

====================  ======================  ============================  ==================
weights               codes                   best scale                    stored as
====================  ======================  ============================  ==================
binary ``a {-1, 1}``  1, 3 (zero point 2)     a = mean |w|                  2 bits
ternary ``a {-1,0,1}``  1, 2, 3 (zero point 2)  see ``ternary``               2 bits
mid-rise ``s {-1.5, -.5, .5, 1.5}``  5, 7, 9, 11 (zero point 8)  least squares, scale s / 2    4 bits
====================  ======================  ============================  ==================
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .blockwise import Grid

Array = np.ndarray[Any, Any]
Levels = Literal["binary", "ternary", "midrise"]
BITS: dict[Levels, int] = {"binary": 2, "ternary": 2, "midrise": 4}
_ROUNDS = 8


def few_levels(weight: Array, levels: Levels, block_size: int) -> tuple[Array, Grid]:
    """Codes uint8 [N, K] and their grid.

    Args:
        weight: float32 [N, K].
        levels: which values.
        block_size: inputs that share a scale.
    """
    rows, inputs = weight.shape
    blocks = -(-inputs // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :inputs] = weight
    real = np.arange(blocks * block_size).reshape(blocks, block_size) < inputs
    w = padded.reshape(rows, blocks, block_size)
    codes, scales = {"binary": _binary, "ternary": _ternary, "midrise": _midrise}[levels](w, real)
    bits = BITS[levels]
    zero_points = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    grid = Grid(np.where(scales > 0, scales, 1).astype(np.float32), zero_points, bits, block_size)
    return codes.reshape(rows, -1)[:, :inputs].astype(np.uint8), grid


def _binary(w: Array, real: Array) -> tuple[Array, Array]:
    """a = mean |w| of a block's real inputs; sign(0) = +1 (XNOR-Net, 1603.05279)."""
    return np.where(w >= 0, 3, 1), np.abs(w).sum(axis=-1) / np.maximum(real.sum(axis=-1), 1)


def _ternary(w: Array, real: Array) -> tuple[Array, Array]:
    """The exact optimum of ``|| w - a t ||``: with |w| sorted, the k largest for the k of the largest
    ``(sum |w|)^2 / k``; a is their mean."""
    magnitude = np.abs(w)
    ordered = -np.sort(-magnitude, axis=-1)
    sums = np.cumsum(ordered, axis=-1)
    count = np.arange(1, w.shape[-1] + 1)
    best = (sums**2 / count).argmax(axis=-1)[..., None]
    scale = np.take_along_axis(sums, best, -1)[..., 0] / (best[..., 0] + 1)
    kept = magnitude >= np.take_along_axis(ordered, best, -1)
    return np.where(kept & (w != 0), np.where(w > 0, 3, 1), 2), scale


def _midrise(w: Array, real: Array) -> tuple[Array, Array]:
    """Levels half a step off zero; scale and codes in turns, from the best step of a Gaussian (0.996 deviations)."""
    deviation = np.sqrt((w**2).sum(axis=-1) / np.maximum(real.sum(axis=-1), 1))
    step = 0.996 * deviation
    level = np.zeros_like(w)
    for _ in range(_ROUNDS):
        safe = np.where(step > 0, step, 1)[..., None]
        level = np.clip(np.floor(w / safe), -2, 1) + 0.5
        level *= real
        step = (level * w).sum(axis=-1) / np.maximum((level**2).sum(axis=-1), 1e-30)
    return np.where(real, 8 + 2 * level, 8), step / 2
