"""GPTQ: codes that make the output of a linear layer, not its weight, close to the original.

Loss of a layer y = W x with W [N, K] and its calibration inputs X [K, tokens]:
``|| (W - Q) X ||^2 = tr((W - Q) H (W - Q)^T)`` with ``H = X X^T``.

Sources: Frantar et al., GPTQ (2210.17323), with static groups and act-order; Behdin et al., QuantEase (2309.01885), the
coordinate descent afterwards; GPTAQ (2504.02692) and QEP (2504.09629), the asymmetric target.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .blockwise import Grid, slabs

Array = np.ndarray[Any, Any]
_BLOCK = 64  # columns between two updates of the rest of the weight


@dataclasses.dataclass(frozen=True)
class Fit:
    """Codes for one weight.

    Attributes:
        codes: uint8 [N, K].
        grid: where they lie.
        loss: tr((W - Q) H (W - Q)^T).
        rounded: the same for plain rounding on the same target.
    """

    codes: Array
    grid: Grid
    loss: float
    rounded: float


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is known of a layer's calibration inputs; shared by all weights that multiply them.

    Attributes:
        hessian: X X^T, float64 [K, K], positive semi-definite, of any rank.
        damping: share of the mean diagonal that is added to it, so that it can be inverted.
    """

    hessian: Array
    damping: float = 0.01

    @functools.cached_property
    def damped(self) -> Array:
        """``H + damping * mean(diag H) I``; inputs that were always 0 get the largest diagonal, and no other entry."""
        h = np.array(self.hessian, np.float64)
        diagonal = np.einsum("kk->k", h)
        dead = diagonal <= 0
        diagonal += self.damping * max(float(diagonal.mean()), 1e-30)
        diagonal[dead] = max(float(diagonal.max()), 1.0)
        return h

    @functools.cached_property
    def order(self) -> Array:
        """The inputs, those of the largest mean square first (act-order)."""
        return np.argsort(-np.diagonal(self.damped), kind="stable")

    @functools.cached_property
    def upper(self) -> Array:
        """Upper triangular U with ``U^T U = H^-1`` in ``order``, float32."""
        return inverse_factor(self.damped[np.ix_(self.order, self.order)])


def inverse_factor(h: Array) -> Array:
    """Upper triangular U with ``U^T U = h^-1``, float32, of a positive definite ``h``.

    With ``h = M M^T`` for an upper triangular M (Cholesky from the last row to the first), U is the inverse of M.
    """
    import scipy.linalg

    factor = np.ascontiguousarray(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1])
    return scipy.linalg.solve_triangular(factor, np.eye(len(h)), check_finite=False).astype(np.float32)


def asymmetric_target(weight: Array, inputs: Inputs, cross: Array, alpha: float) -> Array:
    """The weight W* that best repeats, on inputs from the quantized prefix, what W does on the original's inputs.

    ``W* = W + alpha W (Xf - Xq) Xq^T H^-1``.

    Args:
        weight: W, [N, K].
        inputs: of the quantized prefix, H = Xq Xq^T.
        cross: (Xf - Xq) Xq^T, [K, K].
        alpha: 0 (plain GPTQ) to 1 (all of the difference).
    """
    change = weight @ (alpha * np.linalg.solve(inputs.damped, cross.T).T).astype(np.float32)
    change += weight
    return change


def row_losses(weight: Array, quantized: Array, hessian: Array) -> Array:
    """The rows' parts of tr((W - Q) H (W - Q)^T), float64 [N]."""
    difference = weight.astype(np.float64) - quantized
    return np.einsum("nk,nk->n", difference @ hessian, difference)


def gptq(weight: Array, inputs: Inputs, grid: Grid) -> Array:
    """Codes, uint8 [N, K]: columns rounded one by one, the largest inputs first, the rest making up for each error.

    Args:
        weight: float32 [N, K].
        inputs: the calibration inputs.
        grid: scales and zero points, found beforehand from the original weight (static groups).
    """
    order, upper = inputs.order, inputs.upper
    w = np.ascontiguousarray(weight.T[order], np.float32)  # one input a row, as rows are contiguous
    scale, zero = (np.ascontiguousarray(part.T) for part in grid.columns(order))
    codes = np.empty(w.shape, np.uint8)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = np.empty((end - start, w.shape[1]), np.float32)
        for j in range(start, end):
            code = np.clip(np.rint(w[j] / scale[j]) + zero[j], 0, grid.top)
            codes[order[j]] = code
            error = (w[j] - (code - zero[j]) * scale[j]) / upper[j, j]
            errors[j - start] = error
            w[j + 1 : end] -= upper[j, j + 1 : end, None] * error
        w[end:] -= upper[start:end, end:].T @ errors
    return np.ascontiguousarray(codes.T)


def descend(weight: Array, inputs: Inputs, grid: Grid, codes: Array) -> Array:
    """One sweep of coordinate descent: every column gets its best codes for the others as they are.

    The loss never rises. With ``R = (W - Q) H`` the best value of column j is ``q_j + R_j / H_jj``; the nearest code is
    the best one, as the loss is a parabola in it.
    """
    h = inputs.damped.astype(np.float32)
    scale, zero = (np.ascontiguousarray(part.T) for part in grid.columns(slice(weight.shape[1])))
    current = np.ascontiguousarray(codes.T, np.float32)
    residual = h @ (weight.T - (current - zero) * scale)
    for start in range(0, len(h), _BLOCK):
        end = min(start + _BLOCK, len(h))
        changes = np.empty((end - start, weight.shape[0]), np.float32)
        for j in range(start, end):
            code = np.clip(np.rint(current[j] + residual[j] / (h[j, j] * scale[j])), 0, grid.top)
            change = (code - current[j]) * scale[j]
            current[j] = code
            changes[j - start] = change
            residual[j:end] -= h[j, j:end, None] * change
        residual[end:] -= h[start:end, end:].T @ changes
    return np.ascontiguousarray(current.T.astype(np.uint8))


def refit_scales(weight: Array, inputs: Inputs, grid: Grid, codes: Array) -> Grid:
    """``grid`` with the scales of each row that minimise the loss for these codes: least squares over its blocks."""
    rows, width = weight.shape
    blocks, size = grid.scales.shape[1], grid.block_size
    padding = blocks * size - width
    _, zero = grid.columns(slice(width))
    centred = np.pad(codes.astype(np.float32) - zero, ((0, 0), (0, padding)))
    h = np.pad(inputs.damped.astype(np.float32), (0, padding))
    target = (np.pad(weight, ((0, 0), (0, padding))) @ h).reshape(rows, blocks, size)
    right = np.einsum("nbk,nbk->nb", centred.reshape(rows, blocks, size), target)
    left = np.empty((rows, blocks, blocks), np.float32)
    for block in range(blocks):  # C^T H C, a column of blocks at a time; it is symmetric
        start, end = block * size, (block + 1) * size
        products = centred[:, start:end] @ h[start:end, start:]
        products *= centred[:, start:]
        left[:, block, block:] = left[:, block:, block] = products.reshape(rows, -1, size).sum(axis=-1)
    ridge = 1e-6 * np.maximum(np.einsum("nbb->n", left) / blocks, 1e-30)
    left += ridge[:, None, None] * np.eye(blocks, dtype=np.float32)
    right += ridge[:, None] * grid.scales
    scales = np.linalg.solve(left, right[..., None])[..., 0]
    return dataclasses.replace(grid, scales=np.where(np.abs(scales) > 1e-20, scales, grid.scales))


def fit(weight: Array, inputs: Inputs, bound: Grid, starts: Sequence[Grid], rounds: int = 3) -> Fit:
    """GPTQ on static grids, then ``rounds`` of new scales and coordinate descent; no row is worse than its rounding.

    Args:
        weight: the target, float32 [N, K].
        inputs: the calibration inputs.
        bound: plain rounding on this grid is what every row is at least as good as.
        starts: grids to begin with; rows are independent, so each takes the one that ends best.
        rounds: how often scales and codes are refined in turns; only what lowers the loss is kept.
    """
    parts = [
        _fit_rows(weight[rows], inputs, bound.rows(rows), [start.rows(rows) for start in starts], rounds)
        for rows in slabs(len(weight))
    ]
    grid = dataclasses.replace(
        bound,
        scales=np.concatenate([part.grid.scales for part in parts]),
        zero_points=np.concatenate([part.grid.zero_points for part in parts]),
    )
    codes = np.concatenate([part.codes for part in parts])
    return Fit(codes, grid, sum(part.loss for part in parts), sum(part.rounded for part in parts))


def _fit_rows(weight: Array, inputs: Inputs, bound: Grid, starts: Sequence[Grid], rounds: int) -> Fit:
    codes, grid = bound.round(weight), bound
    rounded = losses = row_losses(weight, grid.decode(codes), inputs.hessian)
    for start in starts:
        tried, moving = gptq(weight, inputs, start), start
        for number in range(rounds + 1):
            if number:
                moving = refit_scales(weight, inputs, moving, tried)
                tried = descend(weight, inputs, moving, tried)
            reached = row_losses(weight, moving.decode(tried), inputs.hessian)
            better = (reached < losses)[:, None]
            codes, losses = np.where(better, tried, codes), np.minimum(losses, reached)
            scales = np.where(better, moving.scales, grid.scales)
            zero_points = np.where(better, moving.zero_points, grid.zero_points)
            grid = dataclasses.replace(grid, scales=scales, zero_points=zero_points)
    return Fit(codes, grid, float(losses.sum()), float(rounded.sum()))
