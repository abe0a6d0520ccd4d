"""Which weights of a linear layer become zero, and what the others become, so that its output changes least.

Loss of a layer y = W x with W [N, K] on its calibration inputs X [K, tokens]:
``|| (W - W') X ||^2 = tr((W - W') H (W - W')^T)`` with ``H = X X^T``; W' may be non-zero on its support only.

Sources: Sun et al., Wanda (2306.11695); Frantar and Alistarh, SparseGPT (2301.00774); Meng et al., ALPS (2406.07831),
the alternating direction method of multipliers; Zhou et al. (2102.04010), the N:M patterns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from ..low_bit.gptq import inverse_factor, row_losses

Array = np.ndarray[Any, Any]
Method = Literal["magnitude", "wanda", "sparsegpt", "admm"]
_BLOCK = 128  # columns whose mask SparseGPT chooses at a time
_STEPS = 120
_PENALTY, _GROWTH, _EVERY = 0.1, 1.1, 3


@dataclasses.dataclass(frozen=True)
class Second:
    """Second moments of a layer's calibration inputs; shared by all weights that multiply them.

    Attributes:
        hessian: X X^T, float64 [K, K], positive semi-definite, of any rank.
        damping: share of the mean diagonal that is added to it. It holds weights back where the samples say nothing.
    """

    hessian: Array
    damping: float = 0.01

    @functools.cached_property
    def damped(self) -> Array:
        """``H + damping * mean(diag H) I``; unlike GPTQ's, inputs that were always 0 stay the least important."""
        h = np.array(self.hessian, np.float64)
        diagonal = np.einsum("kk->k", h)
        diagonal += self.damping * max(float(diagonal.mean()), 1e-30)
        return h

    @functools.cached_property
    def upper(self) -> Array:
        """Upper triangular U with ``U^T U = H^-1``, damped, float32."""
        return inverse_factor(self.damped)

    @functools.cached_property
    def sizes(self) -> Array:
        """``sqrt(H_kk)``, damped, float32 [K]: the inputs' sizes."""
        return np.sqrt(np.diagonal(self.damped)).astype(np.float32)

    @functools.cached_property
    def scaled_eigen(self) -> tuple[Array, Array]:
        """Eigenvalues [K] and eigenvectors [K, K], float32, of damped H with a diagonal of ones."""
        import scipy.linalg

        scale = np.sqrt(np.diagonal(self.damped))
        values, vectors = scipy.linalg.eigh(self.damped / np.outer(scale, scale), check_finite=False)
        return values.astype(np.float32), vectors.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Goal:
    """How sparse a weight [N, K] shall be.

    Attributes:
        zeros: how many of its numbers become zero.
        pattern: (n, m): instead, at most n of m consecutive inputs are non-zero, in every row.
    """

    zeros: int = 0
    pattern: tuple[int, int] | None = None

    def keep(self, scores: Array) -> Array:
        """The support (bool [N, K]) with the largest ``scores``, whichever rows they are in."""
        if self.pattern is not None:
            return _keep_pattern(scores, *self.pattern)
        return _drop_smallest(scores.reshape(1, -1), [self.zeros]).reshape(scores.shape)

    def keep_by_row(self, scores: Array) -> Array:
        """The support with the largest ``scores`` of each row, as many in all rows, give or take one."""
        if self.pattern is not None:
            return _keep_pattern(scores, *self.pattern)
        return _drop_smallest(scores, shares(self.zeros, len(scores)))


def shares(total: int, parts: int) -> list[int]:
    """``total`` in equal parts, give or take one."""
    ends = [total * number // parts for number in range(parts + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _drop_smallest(scores: Array, counts: list[int]) -> Array:
    kept = np.ones(scores.shape, bool)
    for row, count in enumerate(counts):
        if count:
            kept[row, np.argpartition(scores[row], count - 1)[:count]] = False
    return kept


def _keep_pattern(scores: Array, n: int, m: int) -> Array:
    blocks = scores.reshape(len(scores), -1, m)
    ranks = np.argsort(np.argsort(-blocks, axis=-1, kind="stable"), axis=-1, kind="stable")
    return (ranks < n).reshape(scores.shape)


def loss(target: Array, weight: Array, second: Second) -> float:
    """tr((W - W') H (W - W')^T), without damping."""
    return float(row_losses(target, weight, second.hessian).sum())


def sparsegpt(target: Array, second: Second, goal: Goal) -> Array:
    """SparseGPT: columns one after the other, those behind making up for the zeros of those in front.

    The mask is chosen for blocks of 128 columns by ``w^2 / U_kk^2`` of the weights as they have become, with N:M for
    the m columns ahead.

    Args:
        target: W, float32 [N, K].
        second: the calibration inputs.
        goal: how sparse.

    Returns:
        W', float32 [N, K].
    """
    upper = second.upper
    w = np.ascontiguousarray(target.T, np.float32)  # one input a row, as rows are contiguous
    width, rows = w.shape
    for start in range(0, width, _BLOCK):
        end = min(start + _BLOCK, width)
        kept = np.ones((end - start, rows), bool)
        if goal.pattern is None:
            zeros = goal.zeros * end // width - goal.zeros * start // width
            kept = Goal(zeros).keep((w[start:end] / np.diagonal(upper)[start:end, None]) ** 2)
        errors = np.empty((end - start, rows), np.float32)
        for k in range(start, end):
            if goal.pattern is not None and k % goal.pattern[1] == 0:
                ahead = slice(k, k + goal.pattern[1])
                scores = (w[ahead] / np.diagonal(upper)[ahead, None]) ** 2
                kept[k - start : k - start + goal.pattern[1]] = goal.keep(scores.T).T
            error = np.where(kept[k - start], np.float32(0), w[k] / upper[k, k])
            w[k] *= kept[k - start]
            errors[k - start] = error
            w[k + 1 : end] -= upper[k, k + 1 : end, None] * error
        w[end:] -= upper[start:end, end:].T @ errors
    return np.ascontiguousarray(w.T)


def admm(target: Array, second: Second, goal: Goal) -> Array:
    """W' that ADMM settles on: W free, Z sparse, ``W = Z`` enforced more and more.

    With the inputs scaled to a diagonal of ones, ``W = (H W0 + rho Z - V) (H + rho I)^-1``, ``Z = the largest of
    (W + V / rho)``, ``V += rho (W - Z)``; rho grows by a tenth every three steps.
    """
    values, vectors = second.scaled_eigen
    start = target * second.sizes
    pull = (start @ vectors * values) @ vectors.T
    penalty = np.float32(_PENALTY)
    z, v = start * goal.keep(start**2), np.zeros_like(start)
    for step in range(_STEPS):
        w = ((pull + penalty * z - v) @ vectors / (values + penalty)) @ vectors.T
        z = w + v / penalty
        z *= goal.keep(z**2)
        v += penalty * (w - z)
        if step % _EVERY == _EVERY - 1:
            penalty *= np.float32(_GROWTH)
    return z / second.sizes


def refit(target: Array, second: Second, weight: Array, kept: Array) -> Array:
    """The least squares solution of every row on its support: ``w_S = w0 H_:S H_SS^-1``, exact, float64 inside.

    A row for which that is not better on the undamped H than ``weight``, its present content, stays.
    """
    from scipy.linalg import get_lapack_funcs

    (solve,) = get_lapack_funcs(("posv",), dtype=np.float64)
    damped = second.damped
    result = np.zeros(target.shape, np.float32)
    for row, right in enumerate(target.astype(np.float64) @ damped):
        support = np.flatnonzero(kept[row])
        if len(support):
            _, found, _ = solve(damped[np.ix_(support, support)], right[support], lower=1, overwrite_a=True)
            result[row, support] = found
    worse = row_losses(target, result, second.hessian) > row_losses(target, weight, second.hessian)
    result[worse] = weight[worse]
    return result


def prune(target: Array, second: Second | None, goal: Goal, method: Method, refitted: bool) -> Array:
    """``target`` [N, K] made sparse.

    Args:
        target: the dense weight, float32.
        second: its inputs; None is enough for magnitude without refit.
        goal: how sparse.
        method: ``admm`` takes the best of its own support and those of the simpler methods.
        refitted: whether what is left is fitted to the layer's output.
    """
    best: Array | None = None
    least = np.inf
    for weight in _candidates(target, second, goal, method):
        if second is None:
            return weight
        if refitted:
            weight = refit(target, second, weight, weight != 0)
        reached = loss(target, weight, second)
        if best is None or reached < least:
            best, least = weight, reached
    if best is None:
        raise ValueError(f"no method {method!r}")
    return best


def _candidates(target: Array, second: Second | None, goal: Goal, method: Method) -> Iterator[Array]:
    if method == "magnitude" or second is None:
        yield target * goal.keep(np.abs(target))
        return
    if method in ("wanda", "admm"):
        yield target * goal.keep_by_row(np.abs(target) * second.sizes)
    if method in ("sparsegpt", "admm"):
        yield sparsegpt(target, second, goal)
    if method == "admm":
        yield admm(target, second, goal)
