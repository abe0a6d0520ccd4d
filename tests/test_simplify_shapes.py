"""SimplifyShapes: no-op Reshape and Expand, constant targets, and where neither may happen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.graph import integers
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes import SimplifyShapes
from onnxlathe.passes.simplify.simplify_shapes import constant_target
from onnxlathe.passes.symbolic_dims import number
from rewriting import from_text, ops, refused, rewrite, with_external_data

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
CONSTANTS = {"i0": np.array([0]), "i1": np.array([1]), "m1": np.array([-1]), "d4": np.array([4]), "d6": np.array([6])}


def build(body: str, inputs: str = "float[b, s, 24] x", output: str = "y") -> ir.Model:
    used = {name: array for name, array in CONSTANTS.items() if name in body}
    declared = ", ".join([inputs, *(f"int64[1] {name}" for name in used)])
    return from_text(f"{HEAD} ({declared}) => ({output}) {{ {body} }}", **used)


SPLIT = (
    "s = Shape(x) b = Gather(s, i0) n = Gather(s, i1) t = Concat<axis=0>(b, n, m1, d6) r = Reshape(x, t) y = Relu(r)"
)


def target(model: ir.Model) -> list[int] | None:
    return integers(next(node for node in model.graph if node.op_type == "Reshape").inputs[1])


def test_computed_target_becomes_constant() -> None:
    after, outcome = rewrite(SimplifyShapes(), build(SPLIT))
    assert outcome.counts == {"constant Reshape target": 1}
    assert ops(after) == {"Reshape": 1, "Relu": 1}
    assert target(after) == [0, 0, 4, 6]


def test_empty_batch_runs() -> None:
    """ORT cannot infer -1 beside a 0 dim, so the original fails on an empty batch; the constant target does not."""
    after, _ = rewrite(SimplifyShapes(), build(SPLIT))
    result = run_reference(after, [{"x": np.zeros((0, 3, 24), np.float32)}])
    assert result[0]["y"].shape == (0, 3, 4, 6)


def test_merged_dims_are_inferred() -> None:
    body = SPLIT.replace("t = Concat<axis=0>(b, n, m1, d6)", "m = Mul(b, n) t = Concat<axis=0>(m, d4, d6)")
    after, _ = rewrite(SimplifyShapes(), build(body))
    assert target(after) == [-1, 4, 6]


def test_no_op_reshape_and_expand_go() -> None:
    body = "s = Shape(x) r = Reshape(x, s) e = Expand(r, s) y = Relu(e)"
    after, outcome = rewrite(SimplifyShapes(), build(body))
    assert outcome.counts == {"no-op Reshape": 1, "no-op Expand": 1}
    assert ops(after) == {"Relu": 1}


def test_no_op_that_is_a_graph_output_stays() -> None:
    model = build("s = Shape(x) y = Reshape(x, s)")
    after, outcome = rewrite(SimplifyShapes(), model)
    assert outcome.counts == {"constant Reshape target": 1}, "the output keeps its name, so the node stays"
    assert ops(after) == {"Reshape": 1}


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        # [b, s, 24] -> [s, b, 24]: two dims are open at once
        (
            SPLIT.replace("(b, n, m1, d6)", "(n, b, m1)"),
            "float[b, s, 24] x",
        ),
        # the dims of another tensor, of which nothing is known here
        ("t = Shape(z) r = Reshape(x, t) y = Relu(r)", "float[b, s, 24] x, float[k, l] z"),
        # an Expand that does broadcast
        ("t = Shape(z) e = Expand(x, t) y = Relu(e)", "float[1, s, 24] x, float[k, s, 24] z"),
    ],
)
def test_near_misses(body: str, inputs: str) -> None:
    model = build(body, inputs)
    feeds = {"x": np.ones((1, 1, 24), np.float32)} if "1, s" in inputs else {"x": np.ones((2, 2, 24), np.float32)}
    if "z" in {value.name for value in model.graph.inputs}:
        feeds["z"] = np.ones((2, 1, 24) if "1, s" in inputs else (4, 24), np.float32)
    refused(SimplifyShapes(), model, feeds=[feeds])


GRID = """s = Shape(m) b = Gather(s, zero) n = Gather(s, one)
  rb = Range(zero, b, one) rn = Range(zero, n, one) ub = Unsqueeze(rb, tail) un = Unsqueeze(rn, lead)
  big = Max(ub, un) all = Shape(big) eb = Expand(ub, all) en = Expand(un, all)
  ib = Unsqueeze(eb, last) jn = Unsqueeze(en, last) index = Concat<axis=-1>(ib, jn) g = GatherND(m, index) y = Not(g)"""


def grid(body: str) -> ir.Model:
    """transformers' mask code: mask[b, n] indexed by counting tensors that broadcast to [b, 1, n]."""
    arrays = {"zero": np.array(0), "one": np.array(1), "two": np.array(2)}
    arrays |= {"tail": np.array([1, 2]), "lead": np.array([0, 1]), "last": np.array([-1])}
    declared = ", ".join(f"int64{[len(a)] if a.ndim else ''} {name}" for name, a in arrays.items())
    return from_text(f"{HEAD} (bool[batch, seq] m, {declared}) => (y) {{ {body} }}", **arrays)


def test_gathering_everything_is_unsqueeze() -> None:
    feeds = [{"m": np.random.default_rng(0).random((3, 5)) < 0.5}]
    after, outcome = rewrite(SimplifyShapes(), grid(GRID), feeds=feeds)
    assert outcome.counts["GatherND of everything"] == 1 and ops(after) == {"Unsqueeze": 1, "Not": 1}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rn = Range(zero, n, one)", "rn = Range(one, n, one)"),  # starts at 1
        ("rn = Range(zero, n, one)", "rn = Range(zero, n, two)"),  # every second
        ("(ib, jn)", "(jn, ib)"),  # transposed: only valid for a square mask
        ("rn = Range(zero, n, one)", "rn = Range(zero, b, one)"),  # as many positions as rows
    ],
)
def test_gathering_something_else_stays(old: str, new: str) -> None:
    feeds = [{"m": np.random.default_rng(0).random((4, 4)) < 0.5}]
    after, outcome = rewrite(SimplifyShapes(), grid(GRID.replace(old, new)), feeds=feeds)
    assert outcome.counts["GatherND of everything"] == 0 and ops(after)["GatherND"] == 1


def test_targets_are_shared_and_shared_ones_left_alone() -> None:
    twice = SPLIT.replace("y = Relu(r)", "r2 = Relu(x) q = Reshape(r2, t) y = Add(r, q)")
    after, outcome = rewrite(SimplifyShapes(), build(twice))
    assert outcome.counts == {"constant Reshape target": 2}
    assert len(after.graph.initializers) - len(build(twice).graph.initializers) == 1


def test_literal_zero_is_no_copy() -> None:
    assert constant_target((number(0), number(3)), (number(0), number(3))) is None


def test_external_data(tmp_path: Path) -> None:
    model = build(SPLIT.replace("y = Relu(r)", "y = Mul(r, w)"), "float[b, s, 24] x, float[600, 1, 1, 6] w")
    value = model.graph.inputs.pop(1)
    value.const_value = ir.tensor(np.ones((600, 1, 1, 6), np.float32), name="w")
    model.graph.register_initializer(value)
    feeds = [{"x": np.ones((1, 2, 24), np.float32)}]
    _, outcome = rewrite(SimplifyShapes(), with_external_data(model, tmp_path), feeds=feeds, nested=False)
    assert outcome.changed
