"""MixedPrecision: the exact choice, ties, prediction, and no worse than uniform bits at the same bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from low_bit_models import HIDDEN, block, block_feeds

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.passes import MixedPrecision, QuantizeWeights
from onnxlathe.passes.low_bit.mixed_precision import solve
from onnxlathe.passes.low_bit.output_effect import OutputEffect
from onnxlathe.passes.low_bit.product_times import product_seconds
from onnxlathe.runtime.errors import PassError
from rewriting import inside_if, refused, rewrite


def test_solved_exactly() -> None:
    """Against brute force."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        effects, costs = rng.random((5, 4)) ** 4, rng.integers(1, 20, (5, 4)).astype(float)
        budget = float(rng.integers(int(costs.min(axis=1).sum()), 60))
        choices = itertools.product(range(4), repeat=5)
        rows = np.arange(5)
        within = [list(choice) for choice in choices if costs[rows, list(choice)].sum() <= budget]
        best = min(effects[rows, choice].sum() for choice in within)
        picked = solve(effects, costs, budget)
        assert costs[rows, picked].sum() <= budget
        assert effects[rows, picked].sum() == pytest.approx(best)


def test_options_that_break_the_model_are_the_last_resort() -> None:
    effects, costs = np.array([[np.nan, 5.0], [np.inf, 0.1]]), np.array([[1.0, 4.0], [1.0, 2.0]])
    assert solve(effects, costs, 6.0) == [1, 1]
    assert solve(effects, costs, 5.0) in ([1, 0], [0, 1])
    assert solve(effects, costs, 2.0) == [0, 0]


def mixed(**options: object) -> MixedPrecision:
    return MixedPrecision(**{"accuracy_level": 0, "block_sizes": (32,), **options})  # type: ignore[arg-type]


def bits_of(model) -> dict[str, int]:
    return {
        str(node.inputs[1].name).split("_q")[0]: node.attributes["bits"].as_int()
        for node in model.graph
        if node.op_type == "MatMulNBits"
    }


def test_more_budget_is_better_and_ties_hold() -> None:
    feeds = block_feeds(4)
    context = PassContext(feeds=feeds)
    effect = OutputEffect(block(), feeds)
    found = []
    for budget in (4.0, 5.3, 7.0, 12.0):
        after, outcome = rewrite(
            mixed(budget=budget, options=(2, 4, 8)),
            block(),
            feeds=feeds[:1],
            context=context,
            tolerance=3.0,
            nested=False,
        )
        found.append(effect(after))
        bits = bits_of(after)
        assert bits.get("gate_w") == bits.get("up_w")
        assert any("predicted" in note and "measured" in note for note in outcome.notes)
    assert found == sorted(found, reverse=True)
    assert len(set(bits.values())) == 1  # all 8


def test_extremes() -> None:
    feeds = block_feeds(2)
    context = PassContext(feeds=feeds)
    model = block()
    outcome = mixed(budget=40.0)(model, context)
    assert not outcome.changed  # everything stays float: nothing to do
    after, _ = rewrite(mixed(budget=3.26), block(), feeds=feeds[:1], context=context, tolerance=3.0, nested=False)
    assert set(bits_of(after).values()) == {2}
    with pytest.raises(PassError, match="below the cheapest"):
        mixed(budget=1.0)(block(), context)


def test_better_than_uniform_at_its_bytes() -> None:
    feeds = block_feeds(6)
    context = PassContext(feeds=feeds[:3])
    uniform = block()
    QuantizeWeights(accuracy_level=0, head_bits=4, embedding_bits=4)(uniform, context)
    # What the budget does not count: the normalization's weight.
    step = mixed(budget=float(weight_bytes(uniform) - 4 * HIDDEN), unit="bytes", block_sizes=(16, 32, 64))
    model = block()
    step(model, context)
    assert weight_bytes(model) <= weight_bytes(uniform)
    effect = OutputEffect(block(), feeds[3:])
    assert effect(model) <= 1.02 * effect(uniform)


def test_latency() -> None:
    assert product_seconds(512, 512, 16, 0, threads=1) > 0
    model = block()
    outcome = mixed(unit="latency", budget=50.0, options=(4, 8))(model, PassContext(feeds=block_feeds(2), threads=1))
    assert outcome.changed
    assert set(bits_of(model).values()) == {8}  # time enough for all


def test_in_a_branch_is_refused() -> None:
    inner = inside_if(block())
    samples = [{**sample, "take": np.array([True])} for sample in block_feeds(1)]
    outcome = mixed(budget=8.0)(inner, PassContext(feeds=samples))
    assert not outcome.changed
    assert all("body of an If" in refusal.reason for refusal in outcome.refusals)
    assert outcome.refusals


def test_nothing_to_quantize() -> None:
    from rewriting import from_text

    refused(
        mixed(), from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = Neg(x) }')
    )
