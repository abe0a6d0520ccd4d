"""OBS against brute force and least squares; the refit against NumPy's own solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxlathe.passes.pruning.obs import (
    Problem,
    activation_scores,
    damped,
    least_squares,
    magnitude_scores,
    rank_by,
    rank_by_obs,
    squared_error,
)

RNG = np.random.default_rng(0)


def problem(outputs: int, units: int, size: int = 1) -> Problem:
    """A weight and the covariance of correlated inputs."""
    inputs = units * size
    mixing = RNG.standard_normal((inputs, inputs)) * np.exp(-np.arange(inputs) / inputs * 3)
    blocks = RNG.permutation(inputs).reshape(units, size)
    return Problem(RNG.standard_normal((outputs, inputs)), mixing @ mixing.T / inputs, blocks)


def best_loss(item: Problem, gone: np.ndarray) -> float:
    """What least squares on the columns that stay loses, as a share of the energy: a Schur complement."""
    c = damped(item.covariance)
    lost = item.blocks[gone].reshape(-1)
    kept = np.setdiff1d(np.arange(len(c)), lost)
    rest = c[np.ix_(lost, lost)] - c[np.ix_(lost, kept)] @ np.linalg.solve(c[np.ix_(kept, kept)], c[np.ix_(kept, lost)])
    part = item.weight[:, lost]
    return float(np.trace(part @ rest @ part.T)) / item.energy


@pytest.mark.parametrize(("units", "size"), [(24, 1), (8, 3)])
def test_the_scores_added_up_are_the_loss_of_least_squares(units: int, size: int) -> None:
    item = problem(7, units, size)
    found = rank_by_obs([item], units)
    assert len(found.order) == units - 1 == len(set(found.order.tolist()))
    for count in (1, 2, units // 2, units - 1):
        assert found.losses[count - 1] == pytest.approx(best_loss(item, found.order[:count]), rel=1e-6)


@pytest.mark.parametrize(("units", "size"), [(6, 1), (5, 2)])
def test_the_first_unit_is_that_of_least_loss(units: int, size: int) -> None:
    item = problem(4, units, size)
    losses = [best_loss(item, np.array([unit])) for unit in range(units)]
    assert rank_by_obs([item], 1).order.tolist() == [int(np.argmin(losses))]


def test_close_to_the_best_choice_of_all() -> None:
    item = problem(5, 8)
    best = min(best_loss(item, np.array(gone)) for gone in itertools.combinations(range(8), 4))
    assert best - 1e-9 <= rank_by_obs([item], 4).losses[-1] <= 1.5 * best  # greedy


def test_the_losses_of_two_layers_add_up() -> None:
    first, second = problem(5, 10), problem(3, 10)
    found = rank_by_obs([first, second], 4)
    expected = (best_loss(first, found.order) + best_loss(second, found.order)) / 2
    assert found.losses[-1] == pytest.approx(expected, rel=1e-6)


def test_without_correlation_it_is_magnitude() -> None:
    item = Problem(RNG.standard_normal((5, 12)), np.eye(12), np.arange(12)[:, None])
    expected = np.argsort(np.square(item.weight).sum(axis=0))[:6]
    for ranking in (rank_by_obs([item], 6), rank_by(magnitude_scores([item])), rank_by(activation_scores([item]))):
        assert ranking.order[:6].tolist() == expected.tolist()


def test_least_squares_against_numpy() -> None:
    x, weight = RNG.standard_normal((400, 12)) @ RNG.standard_normal((12, 12)), RNG.standard_normal((5, 12))
    target = x @ weight.T + 0.1 * RNG.standard_normal((400, 5))
    kept = np.array([0, 3, 4, 7, 9, 11])
    covariance, cross = x.T @ x / 400, target.T @ x / 400
    found = least_squares(weight, covariance, cross, kept, ridge=1e-12)
    expected = np.linalg.lstsq(x[:, kept], target, rcond=None)[0].T
    assert np.allclose(found[:, kept], expected, atol=1e-6)
    assert not found[:, np.setdiff1d(np.arange(12), kept)].any()
    power = float(np.square(target).sum()) / 400
    error = np.square(x @ found.T - target).sum() / 400
    assert squared_error(found, covariance, cross, power) == pytest.approx(error, rel=1e-6)


def test_few_samples_leave_the_weights_near_what_they_were() -> None:
    x, weight = RNG.standard_normal((2, 12)), RNG.standard_normal((5, 12))
    kept = np.arange(6)
    found = least_squares(weight, x.T @ x / 2, weight @ x.T @ x / 2, kept, ridge=10.0)
    assert np.abs(found[:, kept] - weight[:, kept]).max() < np.abs(weight).max()


def test_a_covariance_that_rounding_left_indefinite_is_solved() -> None:
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    covariance = vectors @ np.diag([3.0, 2.0, 1.0, 0.5, 0.2, -1e-4]) @ vectors.T
    weight = rng.standard_normal((2, 6))
    fitted = least_squares(weight, covariance, weight @ covariance, np.arange(6), 1e-6)
    assert np.allclose(fitted, weight, atol=1e-3)
