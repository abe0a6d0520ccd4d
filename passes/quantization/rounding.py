"""Rounding of weights that looks at the error of a layer's output instead of each weight's own: AdaRound in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np

from ...compiler.graph import Array

_STRETCH, _SHIFT = 1.2, -0.1
"""The rectified sigmoid reaches 0 and 1 within finite V (AdaRound, equation 23: zeta = 1.1, gamma = -0.1)."""
_SWEEPS = 8


@dataclasses.dataclass(frozen=True)
class Grid:
    """The integers that the rows of a weight may take, [outputs, inputs]; scale and zero broadcast to that.

    Attributes:
        scale: step of the grid.
        zero: zero point.
        low: smallest integer.
        high: largest integer.
    """

    scale: Array
    zero: Array
    low: int
    high: int

    def nearest(self, weight: Array) -> Array:
        """The integer nearest to each weight."""
        return np.clip(np.rint(weight / self.scale) + self.zero, self.low, self.high)

    def floor(self, weight: Array) -> Array:
        """The integer below each weight, so far inside that the one above belongs to the grid too."""
        return np.clip(np.floor(weight / self.scale) + self.zero, self.low, self.high - 1)

    def back(self, codes: Array) -> Array:
        """The weights that ``codes`` stand for."""
        return (codes - self.zero) * self.scale


def output_error(error: Array, gram: Array) -> Array:
    """``e H e^T`` of each row e: the squared error of that output over the rows that ``gram = X^T X`` was made from."""
    return np.einsum("ij,ij->i", error @ gram, error)


def adaround(weight: Array, grid: Grid, gram: Array, *, iterations: int, start: Array | None = None) -> Array:
    """Rounds each weight up or down so that ``||X (W - W_hat)^T||^2`` is small; each row is no worse than its start.

    1. ``W_hat = s (clip(floor(W / s) + h(V)) - z)`` with ``h = clip(1.2 sigmoid(V) - 0.1, 0, 1)``, by Adam on V. The
       gradient is closed form: ``2 (W_hat - W) H s h'(V)``, plus that of ``lambda sum(1 - |2 h - 1|^beta)``, which
       pushes h to 0 or 1 while beta falls from 20 to 2 (Nagel et al., "Up or down?", 2020, equations 22 to 25).
    2. Then single weights are flipped between down and up wherever that lowers the error, until none does.

    Args:
        weight: float weights [outputs, inputs].
        grid: the integers.
        gram: ``X^T X`` over the layer's inputs, [inputs, inputs].
        iterations: steps of Adam; 0 leaves only the flips.
        start: codes to start from and not to fall behind; None: the nearest.

    Returns:
        The codes, float64.
    """
    weight, gram = weight.astype(np.float64), gram.astype(np.float64)
    start = grid.nearest(weight) if start is None else start.astype(np.float64)
    floor = grid.floor(weight)
    candidates = [_flip(weight, start, floor, grid, gram)]
    if iterations:
        soft = _descend(weight, floor, grid, gram, iterations)
        candidates.append(_flip(weight, floor + (soft >= 0.5), floor, grid, gram))
    best, least = start.copy(), output_error(grid.back(start) - weight, gram)
    for codes in candidates:
        error = output_error(grid.back(codes) - weight, gram)
        better = error < least
        best[better], least[better] = codes[better], error[better]
    return best


def _descend(weight: Array, floor: Array, grid: Grid, gram: Array, iterations: int) -> Array:
    """h(V) after Adam."""
    scale = np.broadcast_to(grid.scale, weight.shape).astype(np.float32)
    base = grid.back(floor).astype(np.float32)
    target, matrix = weight.astype(np.float32), gram.astype(np.float32)
    rest = np.clip((target - base) / scale, 0.01, 0.99)
    v = -np.log(_STRETCH / (rest - _SHIFT) - 1.0).astype(np.float32)
    # In units of a typical rounding error of a row, so that one learning rate and one lambda fit all layers.
    unit = np.square(scale).mean(axis=1, keepdims=True) * max(float(np.trace(matrix)) / len(matrix), 1e-30)
    first, second = np.zeros_like(v), np.zeros_like(v)
    h = rest
    for step in range(iterations):
        sigmoid = 1.0 / (1.0 + np.exp(-v))
        h = np.clip(_STRETCH * sigmoid + _SHIFT, 0.0, 1.0)
        slope = np.where((h > 0.0) & (h < 1.0), _STRETCH * sigmoid * (1.0 - sigmoid), 0.0)
        gradient = 2.0 * ((base + scale * h - target) @ matrix) * scale / unit
        progress = step / iterations
        if progress > 0.2:
            beta = 20.0 - 18.0 * (progress - 0.2) / 0.8
            centred = 2.0 * h - 1.0
            gradient -= 0.05 * beta * 2.0 * np.sign(centred) * np.abs(centred) ** (beta - 1.0)
        gradient *= slope
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * np.square(gradient)
        v -= 0.1 * (first / (1 - 0.9 ** (step + 1))) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
    return h


def _flip(weight: Array, start: Array, floor: Array, grid: Grid, gram: Array) -> Array:
    """Coordinate descent: changing weight j by d changes the error by ``2 d (e H)_j + d^2 H_jj``."""
    codes = np.clip(start, floor, floor + 1)
    scale = np.broadcast_to(grid.scale, weight.shape)
    slope = (grid.back(codes) - weight) @ gram
    curve = np.diagonal(gram)
    for _ in range(_SWEEPS):
        flips = 0
        for column in np.argsort(-curve):
            change = np.where(codes[:, column] > floor[:, column], -1.0, 1.0)
            delta = change * scale[:, column]
            rows = np.flatnonzero(2.0 * delta * slope[:, column] + delta**2 * curve[column] < 0.0)
            if rows.size:
                codes[rows, column] += change[rows]
                slope[rows] += delta[rows, None] * gram[column]
                flips += rows.size
        if not flips:
            break
    return codes
