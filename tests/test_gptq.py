"""GPTQ and its refinements against rounding, brute force and the textbook loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxlathe.passes.low_bit.blockwise import minmax_grid, searched_grid
from onnxlathe.passes.low_bit.gptq import (
    Inputs,
    asymmetric_target,
    descend,
    fit,
    gptq,
    refit_scales,
    row_losses,
)

RNG = np.random.default_rng(0)


def problem(outputs: int, inputs: int, tokens: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight and correlated inputs X [inputs, tokens]."""
    mixing = RNG.standard_normal((inputs, inputs)) * np.exp(-np.arange(inputs) / inputs * 4)
    x = mixing @ RNG.standard_normal((inputs, tokens or 8 * inputs))
    return RNG.standard_normal((outputs, inputs)).astype(np.float32), x


def textbook(weight: np.ndarray, damped: np.ndarray, grid) -> np.ndarray:
    """Section 2.3 of the reference, column by column, float64, without blocks."""
    order = np.argsort(-np.diagonal(damped), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    w = weight[:, order].astype(np.float64)
    scale, zero = grid.columns(order)
    codes = np.zeros(w.shape)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.rint(w[:, j] / scale[:, j]) + zero[:, j], 0, grid.top)
        error = (w[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    result = np.zeros_like(codes)
    result[:, order] = codes
    return result.astype(np.uint8)


def test_like_the_textbook_loop() -> None:
    weight, x = problem(9, 150)  # more than two blocks of columns
    grid = minmax_grid(weight, 4, 32, False)
    inputs = Inputs(x @ x.T)
    codes, expected = gptq(weight, inputs, grid), textbook(weight, inputs.damped, grid)
    assert (codes == expected).mean() > 0.995  # float32 against float64: a tie may fall the other way
    losses = [row_losses(weight, grid.decode(c), inputs.hessian).sum() for c in (codes, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_without_correlation_it_is_rounding() -> None:
    weight, _ = problem(5, 64)
    grid = searched_grid(weight, 4, 32, False)
    inputs = Inputs(3.0 * np.eye(64))
    assert np.array_equal(gptq(weight, inputs, grid), grid.round(weight))
    assert np.array_equal(descend(weight, inputs, grid, grid.round(weight)), grid.round(weight))


def test_factor() -> None:
    _, x = problem(1, 40)
    inputs = Inputs(x @ x.T)
    inverse = np.linalg.inv(inputs.damped[np.ix_(inputs.order, inputs.order)])
    assert np.allclose(inputs.upper.T @ inputs.upper, inverse, rtol=1e-3, atol=1e-5 * np.abs(inverse).max())
    assert np.array_equal(inputs.upper, np.triu(inputs.upper))


def test_better_than_rounding_on_both_samples_and_held_out() -> None:
    weight, x = problem(32, 96, 3000)
    held_out = x[:, 2000:]
    x = x[:, :2000]
    inputs = Inputs(x @ x.T)
    plain, searched = minmax_grid(weight, 4, 32, False), searched_grid(weight, 4, 32, False)
    found = fit(weight, inputs, plain, [plain, searched], rounds=2)
    assert found.loss < 0.5 * found.rounded
    grid = minmax_grid(weight, 4, 32, False)
    new = held_out @ held_out.T
    plain = row_losses(weight, grid.decode(grid.round(weight)), new).sum()
    assert row_losses(weight, found.grid.decode(found.codes), new).sum() < 0.5 * plain


def test_each_refinement_lowers_the_loss() -> None:
    weight, x = problem(16, 80)
    inputs = Inputs(x @ x.T)
    grid = searched_grid(weight, 4, 16, False)
    codes = gptq(weight, inputs, grid)

    def loss() -> float:
        return float(row_losses(weight, grid.decode(codes), inputs.damped).sum())

    losses = [loss()]
    for _ in range(3):
        grid = refit_scales(weight, inputs, grid, codes)
        losses.append(loss())
        codes = descend(weight, inputs, grid, codes)
        losses.append(loss())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def test_near_the_best_of_all_codes() -> None:
    """2 bits, 5 inputs: every combination of codes is tried."""
    weight, x = problem(12, 5)
    grid = minmax_grid(weight, 2, 16, False)
    inputs = Inputs(x @ x.T, damping=1e-6)
    combinations = np.array(list(itertools.product(range(4), repeat=5)))
    codes = descend(weight, inputs, grid, gptq(weight, inputs, grid))
    got = row_losses(weight, grid.decode(codes), inputs.hessian)
    best = np.empty(len(weight))
    for row in range(len(weight)):
        decoded = (combinations - grid.zero_points[row]) * grid.scales[row]
        best[row] = row_losses(np.broadcast_to(weight[row], decoded.shape), decoded, inputs.hessian).min()
    rounded = row_losses(weight, grid.decode(grid.round(weight)), inputs.hessian)
    assert (got >= best - 1e-6).all()
    assert got.sum() - best.sum() < 0.35 * (rounded.sum() - best.sum())


def test_no_row_is_worse_than_rounding() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        weight = rng.standard_t(2, (20, 48)).astype(np.float32)
        x = rng.standard_normal((48, 30))  # fewer tokens than inputs
        grid = minmax_grid(weight, 2, 16, False)
        hessian = x @ x.T
        found = fit(weight, Inputs(hessian), grid, [grid])
        rounded = row_losses(weight, grid.decode(grid.round(weight)), hessian)
        assert (row_losses(weight, found.grid.decode(found.codes), hessian) <= rounded * (1 + 1e-6)).all()


def test_inputs_that_are_always_zero() -> None:
    weight, x = problem(6, 32)
    x[5] = 0
    inputs = Inputs(x @ x.T)
    found = fit(weight, inputs, minmax_grid(weight, 4, 32, False), [searched_grid(weight, 4, 32, False)])
    assert np.isfinite(found.grid.decode(found.codes)).all()
    assert np.array_equal(Inputs(np.zeros((4, 4))).damped, np.eye(4))


def test_lossless_where_the_weight_is_on_the_grid() -> None:
    weight, x = problem(6, 64)
    grid = minmax_grid(weight, 8, 32, False)
    on_grid = grid.decode(grid.round(weight))
    found = fit(on_grid, Inputs(x @ x.T), grid, [grid])
    assert np.allclose(found.grid.decode(found.codes), on_grid, atol=1e-6)


def test_asymmetric_target_is_the_least_squares_answer() -> None:
    """With alpha 1 and no damping, W* minimises || W* Xq - W Xf ||."""
    weight, original = problem(7, 24)
    quantized = original + 0.3 * RNG.standard_normal(original.shape)
    inputs = Inputs(quantized @ quantized.T, damping=0)
    cross = (original - quantized) @ quantized.T
    target = asymmetric_target(weight, inputs, cross, 1.0)
    expected = np.linalg.lstsq(quantized.T, (weight @ original).T, rcond=None)[0].T
    assert np.allclose(target, expected, rtol=1e-3, atol=1e-3)
    assert np.allclose(asymmetric_target(weight, inputs, cross, 0.0), weight)
