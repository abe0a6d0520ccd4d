"""Sums of many as chains: the same numbers, less memory in ONNX Runtime, near misses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.passes.memory.chain_variadic import ChainVariadic
from onnxlathe.passes.memory.plan_memory import PlanMemory
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.memory_stats import can_measure, measure_memory
from rewriting import from_text, ops, refused, rewrite


def build(body: str, inputs: str = "float[n, 8] x", outputs: str = "float[n, 8] y", opset: int = 20) -> ir.Model:
    return from_text(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}')


PARTS = "a = Sin(x) b = Exp(x) c = Neg(x) d = Sigmoid(x) "


@pytest.mark.parametrize("opset", [11, 13, 20])
@pytest.mark.parametrize(("operator", "pairwise"), [("Sum", "Add"), ("Max", "Max"), ("Min", "Min")])
def test_the_same_numbers_in_two_at_a_time(operator: str, pairwise: str, opset: int) -> None:
    """Tolerance 0: the inputs are taken in the order in which the kernel takes them."""
    model = build(f"a = Exp(x) b = Neg(x) c = Sigmoid(x) y = {operator}(a, b, c, x, b)", opset=opset)
    after, outcome = rewrite(ChainVariadic(), model)
    assert ops(after)[pairwise] == 4 and outcome.counts == {f"{operator} chained": 1}
    assert [value.name for value in after.graph.outputs] == ["y"]
    chain = [node for node in after.graph if node.op_type == pairwise]
    assert all(node.metadata_props["onnxlathe.from"].startswith(f"{operator}:") for node in chain)


def test_what_others_read_and_outputs_stay() -> None:
    model = build(PARTS + "y = Sum(a, b, c, d) z = Mul(a, y)", outputs="float[n, 8] y, float[n, 8] z, float[n, 8] a")
    after, _ = rewrite(ChainVariadic(), model)
    assert ops(after)["Add"] == 3


def test_near_misses() -> None:
    refused(ChainVariadic(), build("a = Sin(x) y = Sum(a, x)"))  # two already
    refused(ChainVariadic(), build(PARTS + "y = Mean(a, b, c)"))  # not one after the other
    rows = "float[n, 8] x, float[8] r"
    refused(ChainVariadic(), build("a = Sin(x) y = Sum(a, x, r)", rows), "differ in shape")
    cut = "float[n, 8] x, int64[1] k"
    body = "z = Constant<value_ints = [0]>() a = Slice(x, z, k) b = Sin(a) c = Exp(a) y = Max(a, b, c)"
    refused(ChainVariadic(), build(body, cut, "float[m, 8] y"), "not known", feeds=_cut())


def _cut() -> list[dict[str, np.ndarray]]:
    return [{"x": np.ones((4, 8), np.float32), "k": np.array([2])}]


@pytest.mark.skipif(not can_measure(), reason="memory is measured on Linux only")
def test_onnxruntime_needs_less() -> None:
    """The sum so far, the next result and their sum, instead of four, their sum and the kernel's own buffer."""
    size = 1 << 19
    model = build(PARTS + "s = Sum(a, b, c, d) y = ReduceMax<keepdims=0>(s)", f"float[{size}] x", "float y")
    out = lathe.compile(model, [ChainVariadic(), PlanMemory()], speed_gate=False, progress=False)
    feeds = make_feeds(model, 0, 1)[0]
    before, after = measure_memory(model, feeds, {}).peak, measure_memory(out.model, feeds, out.ort_config).peak
    assert after / (4 * size) == pytest.approx(3, abs=0.2)
    assert before / (4 * size) >= 5
