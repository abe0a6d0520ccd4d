"""HQQ: a grid found from the weight alone, which lets few large weights be wrong so that the many others are right.

Source: Badri and Shaji, Half-Quadratic Quantization (mobiusml.github.io/hqq_blog, 2023): minimise ``|| W - Q ||_p^p``,
p = 0.7, by splitting off the large errors, ``E = shrink(W - Q)``, and fitting the grid to ``W - E``. There the zero
point is a float and the scale stays; kernels that run packed codes take an integer zero point, so here both are fitted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .blockwise import Grid, minmax_grid

Array = np.ndarray[Any, Any]
_P, _BETA, _GROWTH = 0.7, 10.0, 1.01


def hqq_grid(weight: Array, bits: int, block_size: int, symmetric: bool, rounds: int = 20) -> Grid:
    """The grid, never worse in the p-norm than that of plain rounding.

    Args:
        weight: float32 [N, K].
        bits: 2, 4 or 8.
        block_size: inputs per block.
        symmetric: keep the zero points at 2^(bits - 1).
        rounds: alternations between large errors and grid; blocks keep their best.
    """
    grid = minmax_grid(weight, bits, block_size, symmetric)
    rows, inputs = weight.shape
    padded = np.pad(weight.astype(np.float32), ((0, 0), (0, -inputs % block_size)))
    w = padded.reshape(rows, -1, block_size)
    scale, zero = grid.scales, grid.zero_points.astype(np.float32)
    best_scale, best_zero = scale, zero
    best = np.full(scale.shape, np.inf, np.float32)
    beta = _BETA
    for _ in range(rounds):
        codes = np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, grid.top)
        error = w - (codes - zero[..., None]) * scale[..., None]
        norm = (np.abs(error) ** _P).sum(axis=-1)
        better = norm < best
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
        best = np.where(better, norm, best)
        relative = error / scale[..., None]  # in steps of the grid, so that beta means the same in every block
        magnitude = np.maximum(np.abs(relative), 1e-6)
        large = np.sign(relative) * np.maximum(np.abs(relative) - magnitude ** (_P - 1) / beta, 0)
        scale, zero = _fit(w - large * scale[..., None], codes, scale, zero, grid.top, symmetric)
        beta *= _GROWTH
    return dataclasses.replace(grid, scales=best_scale.astype(np.float32), zero_points=best_zero.astype(np.uint8))


def _fit(target: Array, codes: Array, scale: Array, zero: Array, top: int, symmetric: bool) -> tuple[Array, Array]:
    """Least squares for ``target = scale * codes - scale * zero``; the zero point rounded, then the scale again."""
    if not symmetric:
        middle = codes.mean(axis=-1, keepdims=True)
        spread = codes - middle
        squares = (spread**2).sum(axis=-1)
        slope = (spread * target).sum(axis=-1) / np.where(squares > 0, squares, 1)
        usable = (squares > 0) & (slope > 1e-20)
        slope = np.where(usable, slope, scale)
        exact = middle[..., 0] - target.mean(axis=-1) / slope
        zero = np.where(usable, np.clip(np.rint(exact), 0, top), zero)
    centred = codes - zero[..., None]
    squares = (centred**2).sum(axis=-1)
    refit = (centred * target).sum(axis=-1) / np.where(squares > 0, squares, 1)
    return np.where((squares > 0) & (np.abs(refit) > 1e-20), refit, scale).astype(np.float32), zero
