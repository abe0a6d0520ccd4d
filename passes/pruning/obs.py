"""Which inputs of linear layers to leave out, and what the weights of the others become.

A layer ``y = W x`` with W [N, K] and inputs of covariance C [K, K] loses ``tr(D C D^T)`` when W changes by D. Units are
blocks of columns: one column for a hidden unit, the columns of a head, the kernel of a channel.

Sources: Hassibi and Stork, "Optimal Brain Surgeon" (1992); Kurtic et al., ZipLM (2302.04089), the block form; An et
al., FLAP (2312.11983), the bias; Kwon et al. (2204.09656), the refit by least squares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from ...compiler.graph import Array

DAMPING = 1e-2
"""Share of the mean variance that is added to every input's variance, so that the covariance can be inverted."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer that sums over the units.

    Attributes:
        weight: W, float64 [N, K].
        covariance: C of its inputs, float64 [K, K]; about their mean where a bias can take up the mean.
        blocks: for each unit the columns of W that it feeds, int64 [units, columns of a unit].
    """

    weight: Array
    covariance: Array
    blocks: Array

    @property
    def energy(self) -> float:
        """tr(W C W^T): what the layer's output varies by."""
        return max(float(np.einsum("nk,nk->", self.weight @ self.covariance, self.weight)), 1e-30)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Units from the most dispensable on.

    Attributes:
        order: indices of units, int64, at most [units - 1]: one always stays.
        losses: what leaving out the first 1, 2, ... of them loses, as a share of the layers' energy, float64.
    """

    order: Array
    losses: Array


def damped(covariance: Array, share: float = DAMPING) -> Array:
    """``covariance`` with a share of its mean diagonal added to the diagonal."""
    result = np.array(covariance, np.float64)
    diagonal = np.einsum("kk->k", result)
    diagonal += share * max(float(diagonal.mean()), 1e-30)
    return result


def rank_by_obs(problems: Sequence[Problem], most: int) -> Ranking:
    """Removes one unit after the other, that of least loss first; all other columns make up for it each time.

    Score of a unit G: ``tr(W_G (H^-1)_GG^-1 W_G^T)``; then ``W -= W_G (H^-1)_GG^-1 (H^-1)_G:`` and
    ``H^-1 -= (H^-1)_:G (H^-1)_GG^-1 (H^-1)_G:``. The second is kept as a product of thin matrices, so that a step costs
    what a row of the matrix costs, and the weights that remain are those of least squares on the inputs that remain.
    """
    eliminations = [_Elimination(problem) for problem in problems]
    count = len(problems[0].blocks)
    alive = np.ones(count, bool)
    order: list[int] = []
    losses: list[float] = []
    total = 0.0
    for _ in range(min(most, count - 1)):
        scores = np.sum([item.scores() for item in eliminations], axis=0)
        scores[~alive] = np.inf
        unit = int(scores.argmin())
        total += float(scores[unit])
        alive[unit] = False
        order.append(unit)
        losses.append(total / len(problems))
        for item in eliminations:
            item.remove(unit)
    return Ranking(np.array(order, np.int64), np.array(losses))


class _Elimination:
    """One problem while units leave it.

    Attributes:
        weight: the weights of what remains, for the inputs that remain; the columns of units that left are zero.
    """

    def __init__(self, problem: Problem) -> None:
        self.weight = np.array(problem.weight, np.float64)
        self._energy = problem.energy
        self._blocks = problem.blocks
        self._inverse = np.linalg.inv(damped(problem.covariance))
        count, size = problem.blocks.shape
        self._diagonal = self._inverse[problem.blocks[:, :, None], problem.blocks[:, None, :]]  # of each unit [b, b]
        self._left = np.zeros((len(self._inverse), max(count - 1, 1) * size))  # H^-1 has lost left left^T
        self._used = 0

    def scores(self) -> Array:
        """What each unit's removal would add to the loss, as a share of the energy."""
        if self._blocks.shape[1] == 1:
            squares = np.einsum("nk,nk->k", self.weight, self.weight)[self._blocks[:, 0]]
            return squares / np.maximum(self._diagonal[:, 0, 0], 1e-30) / self._energy
        parts = self.weight[:, self._blocks]  # [N, units, b]
        grams = np.einsum("nua,nub->uab", parts, parts, optimize=True)
        size = self._blocks.shape[1]
        ridge = 1e-12 * np.einsum("uaa->u", self._diagonal)[:, None, None] * np.eye(size) + 1e-30 * np.eye(size)
        return np.einsum("uaa->u", np.linalg.solve(self._diagonal + ridge, grams)) / self._energy

    def remove(self, unit: int) -> None:
        """Takes a unit out."""
        columns = self._blocks[unit]
        lost = self._left[:, : self._used]
        rows = self._inverse[:, columns] - lost @ lost[columns].T
        block = rows[columns]
        block = (block + block.T) / 2 + 1e-12 * np.trace(block) * np.eye(len(columns))
        factor = scipy.linalg.cholesky(block, lower=True)
        new = scipy.linalg.solve_triangular(factor, rows.T, lower=True).T  # rows factor^-T
        change = scipy.linalg.solve_triangular(factor, self.weight[:, columns].T, lower=True).T
        self.weight -= change @ new.T
        self.weight[:, columns] = 0.0
        self._left[:, self._used : self._used + len(columns)] = new
        self._used += len(columns)
        parts = new[self._blocks]  # [units, b, b]
        self._diagonal -= np.einsum("uar,ubr->uab", parts, parts)


def rank_by(scores: Array) -> Ranking:
    """Units by a score of each by itself, the smallest first; losses are the scores added up."""
    order = np.argsort(scores, kind="stable")[:-1]
    return Ranking(order, np.cumsum(scores[order]))


def magnitude_scores(problems: Sequence[Problem]) -> Array:
    """Squared length of each unit's columns, as a share of all."""
    found = [np.square(p.weight[:, p.blocks]).sum(axis=(0, 2)) for p in problems]
    return np.mean([squares / max(float(squares.sum()), 1e-30) for squares in found], axis=0)


def activation_scores(problems: Sequence[Problem]) -> Array:
    """What each unit by itself adds to the output's variance, ``tr(W_G C_GG W_G^T)``, as a share of the energy."""
    found: list[Array] = []
    for p in problems:
        inner = p.covariance[p.blocks[:, :, None], p.blocks[:, None, :]]
        parts = p.weight[:, p.blocks]
        found.append(np.einsum("nua,uab,nub->u", parts, inner, parts, optimize=True) / p.energy)
    return np.mean(found, axis=0)


def least_squares(weight: Array, covariance: Array, cross: Array, kept: Array, ridge: float) -> Array:
    """The weights of the columns ``kept`` that fit a target best; all others are zero.

    Minimises ``E ||W' x - t||^2 + ridge mean(diag C) ||W' - W||^2`` over W' with those columns only, x and t about
    their means: with few samples the weights stay near what they were.

    Args:
        weight: W, [N, K].
        covariance: E[x x^T], [K, K].
        cross: E[t x^T], [N, K].
        kept: indices of columns.
        ridge: share of the mean variance of the columns kept.
    """
    result = np.zeros_like(weight, dtype=np.float64)
    if not len(kept):
        return result
    inner = covariance[np.ix_(kept, kept)]
    right = cross[:, kept] - weight[:, kept] @ inner
    result[:, kept] = weight[:, kept] + _solve(damped(inner, ridge), right.T).T
    return result


def _solve(covariance: Array, right: Array) -> Array:
    """``covariance^-1 right``; where rounding left eigenvalues that are not positive (means far above the deviations),
    these count as a small share of the mean one.
    """
    try:
        return scipy.linalg.solve(covariance, right, assume_a="pos")
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(covariance)
        values = np.maximum(values, DAMPING * max(float(values.mean()), 1e-30))
        return vectors @ ((vectors.T @ right) / values[:, None])


def squared_error(weight: Array, covariance: Array, cross: Array, power: float) -> float:
    """``E ||W x - t||^2`` from the moments; ``power`` is ``E ||t||^2``."""
    quadratic = float(np.einsum("nk,nk->", weight @ covariance, weight))
    return max(quadratic - 2.0 * float(np.einsum("nk,nk->", cross, weight)) + power, 0.0)
