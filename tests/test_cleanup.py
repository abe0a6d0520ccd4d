"""Cleanup: every rule, every near miss, subgraphs, large graphs."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlathe.compiler.base import PassContext
from onnxlathe.passes import Cleanup
from rewriting import from_text, ops, refused, rewrite, with_external_data

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
CONSTANTS = {
    "one": np.float32(1),
    "zero": np.float32(0),
    "row1": np.ones((1, 1, 1, 1), np.float32),
    "two": np.float32(2),
    "yes": np.array(True),
    "axes0": np.array([0]),
    "noaxes": np.array([], np.int64),
    "ones2": np.array([1, 1]),
    "nopads": np.zeros(4, np.int64),
    "pads": np.array([0, 1, 0, 0]),
    "begin": np.array([0]),
    "start1": np.array([1]),
    "end": np.array([2**63 - 1]),
    "flat": np.array([-1]),
    "shape46": np.array([4, 6]),
    "copy": np.array([0, 3, 4]),
    "flat21": np.array([2, 12]),
}


def build(body: str, inputs: str = "float[4, 6] x", outputs: str = "y", **extra: np.ndarray) -> ir.Model:
    words = set(re.findall(r"\w+", body))
    constants = {name: array for name, array in {**CONSTANTS, **extra}.items() if name in words}
    kinds = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64", np.dtype(bool): "bool"}
    declared = [f"{kinds[np.asarray(a).dtype]}[{','.join(map(str, np.shape(a)))}] {n}" for n, a in constants.items()]
    return from_text(f"{HEAD} ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}", **constants)


NO_OPS = {
    "Identity": "t = Identity(x)",
    "Dropout": "t = Dropout(x)",
    "Cast": "t = Cast<to=1>(x)",
    "Concat": "t = Concat<axis=0>(x)",
    "Sum": "t = Sum(x)",
    "Max": "t = Max(x)",
    "Transpose": "t = Transpose<perm=[0,1]>(x)",
    "Reshape": "t = Reshape(x, shape46)",
    "Expand": "t = Expand(x, ones2)",
    "Unsqueeze": "t = Unsqueeze(x, noaxes)",
    "Squeeze": "u = Unsqueeze(x, axes0) t = Squeeze(u, axes0)",
    "Pad": "t = Pad(x, nopads)",
    "Slice": "t = Slice(x, begin, end)",
    "Mul": "t = Mul(one, x)",
    "Div": "t = Div(x, one)",
    "Add": "t = Add(x, zero)",
    "Sub": "t = Sub(x, zero)",
}


@pytest.mark.parametrize("op", NO_OPS)
def test_no_ops(op: str) -> None:
    after, outcome = rewrite(Cleanup(), build(f"{NO_OPS[op]} y = Neg(t)"))
    assert ops(after) == {"Neg": 1} and outcome.counts[f"no-op {op}"] == 1


def test_no_op_that_makes_an_output_hands_its_name_on() -> None:
    after, _ = rewrite(Cleanup(), build("a = Neg(x) y = Identity(a)"))
    assert ops(after) == {"Neg": 1} and after.graph.outputs[0].name == "y"


SAME = {
    "x + 1": "y = Add(x, one)",
    "0 - x": "y = Sub(zero, x)",
    "1 / x": "y = Div(one, x)",
    "* 1 that broadcasts to rank 4": "y = Mul(x, row1)",
    "Transpose that moves": "y = Transpose<perm=[1,0]>(x)",
    "Pad that pads": "y = Pad(x, pads)",
    "Slice that cuts": "y = Slice(x, start1, end)",
    "Identity from input to output": "y = Identity(x)",
    "Cast that casts": "y = Cast<to=11>(x)",
    "Concat of two": "y = Concat<axis=0>(x, x)",
    "random numbers": "a = RandomNormalLike<seed=1.0>(x) b = RandomNormalLike<seed=1.0>(x) y = Sub(a, b)",
    "lossy casts": "a = Cast<to=6>(x) y = Cast<to=1>(a)",
    "Reshape that copies a dim of the inner shape": "a = Reshape(x, flat21) b = Reshape(a, copy) y = Neg(b)",
}


@pytest.mark.parametrize("case", SAME)
def test_near_misses(case: str) -> None:
    refused(Cleanup(), build(SAME[case]))


def test_dropout_in_training_stays() -> None:
    refused(Cleanup(), build("m = Dropout(x, zero, yes) y = Neg(m)"))


def test_mask_of_dropout_is_read() -> None:
    refused(Cleanup(), build("t, m = Dropout(x) y = Neg(t)", outputs="y, m"))


def test_transposes_cancel_and_compose() -> None:
    after, outcome = rewrite(Cleanup(), build("a = Transpose<perm=[1,0]>(x) b = Transpose<perm=[1,0]>(a) y = Neg(b)"))
    assert ops(after) == {"Neg": 1} and outcome.counts["Transpose of Transpose"] == 1
    model = build("a = Transpose<perm=[1,2,0]>(x) b = Transpose<perm=[1,2,0]>(a) y = Neg(b)", "float[2, n, 4] x")
    after, _ = rewrite(Cleanup(), model)
    assert ops(after) == {"Transpose": 1, "Neg": 1}
    assert next(iter(after.graph)).attributes["perm"].value == (2, 0, 1)


def test_inner_transpose_with_another_reader_stays() -> None:
    model = build("a = Transpose<perm=[1,0]>(x) b = Transpose<perm=[1,0]>(a) y = Neg(b) z = Neg(a)", outputs="y, z")
    after, _ = rewrite(Cleanup(), model)
    assert ops(after) == {"Transpose": 1, "Neg": 2}


def test_reshapes_and_lossless_casts_compose() -> None:
    after, _ = rewrite(Cleanup(), build("a = Reshape(x, flat) b = Reshape(a, shape46) y = Neg(b)"))
    assert ops(after) == {"Neg": 1}
    after, _ = rewrite(Cleanup(), build("a = Cast<to=11>(x) b = Cast<to=7>(a) y = Neg(b)"))
    assert ops(after) == {"Cast": 1, "Neg": 1}


def test_common_subexpressions() -> None:
    model = build("a = Exp(x) b = Exp(x) c = Mul(a, two) d = Mul(two, b) y = Sub(c, d)")
    after, outcome = rewrite(Cleanup(), model)
    assert ops(after) == {"Exp": 1, "Mul": 1, "Sub": 1} and outcome.counts["common subexpressions"] == 2


def test_equal_outputs_stay_two_outputs() -> None:
    refused(Cleanup(), build("y = Exp(x) z = Exp(x)", outputs="y, z"))


def test_attributes_tell_nodes_apart() -> None:
    refused(Cleanup(), build("a = Elu<alpha=1.0>(x) b = Elu<alpha=2.0>(x) y = Sub(a, b)"))


def test_duplicate_weights_become_one() -> None:
    big = np.arange(60_000, dtype=np.float32).reshape(6, 10_000)
    almost = big.copy()
    almost[3, 5000] += 1  # in the middle, where the sample of the bytes does not look
    body = "a = MatMul(x, w1) b = MatMul(x, w2) c = MatMul(x, w3) d = Add(a, b) y = Add(d, c)"
    model = build(body, w1=big, w2=big.copy(), w3=almost)
    after, outcome = rewrite(Cleanup(), model)
    assert outcome.counts["duplicate initializers"] == 1 and len(after.graph.initializers) == 2


def test_initializers_that_callers_may_override_stay() -> None:
    model = build("a = Add(x, w1) y = Add(a, w2)", w1=np.ones(6, np.float32), w2=np.ones(6, np.float32))
    model.graph.inputs.append(model.graph.initializers["w2"])
    after = model.clone()
    outcome = Cleanup()(after, PassContext())
    assert not outcome.changed and len(after.graph.initializers) == 2


def test_unused_weights_and_dead_chains_go() -> None:
    model = build("a = Exp(x) b = Neg(a) c = Add(b, two) y = Neg(x)")
    after, outcome = rewrite(Cleanup(), model)
    assert ops(after) == {"Neg": 1} and not after.graph.initializers
    assert outcome.counts == {"dead nodes": 3, "unused initializers": 1}


def test_bodies_reuse_what_their_outer_graph_has() -> None:
    text = f"""{HEAD} (bool c, float[2] x) => (float[2] y) {{
      t = Exp(x)
      u = If (c) <then_branch = a () => (float[2] p) {{ s = Exp(x) p = Neg(s) }},
                  else_branch = b () => (float[2] q) {{ r = Identity(x) q = Neg(r) }}>
      y = Add(t, u)
    }}"""
    after, outcome = rewrite(Cleanup(), from_text(text), nested=False)
    assert ops(after) == {"Exp": 1, "If": 1, "Neg": 2, "Add": 1}
    assert outcome.counts["common subexpressions"] == 1


def test_body_that_returns_an_outer_value_keeps_its_identity() -> None:
    text = f"""{HEAD} (bool c, float[2] x) => (float[2] y) {{
      t = Exp(x)
      y = If (c) <then_branch = a () => (float[2] p) {{ p = Identity(t) }},
                  else_branch = b () => (float[2] q) {{ q = Neg(t) }}>
    }}"""
    refused(Cleanup(), from_text(text), nested=False)


def test_external_data(tmp_path: Path) -> None:
    weight = np.ones((6, 300), np.float32)
    model = build("i = Identity(x) a = MatMul(i, w1) b = MatMul(i, w2) y = Sub(a, b)", w1=weight, w2=weight.copy())
    after, outcome = rewrite(Cleanup(), with_external_data(model, tmp_path), nested=False)
    assert outcome.counts["duplicate initializers"] == 1 and ops(after) == {"MatMul": 1, "Sub": 1}


UNARY = ["Identity", "Neg", "Abs", "Transpose<perm=[1,0]>", "Cast<to=1>", "Tanh", "Sum"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 40)] * 3), min_size=1, max_size=14))
def test_random_graphs_keep_their_meaning(steps: list[tuple[int, int, int]]) -> None:
    lines, names = [], ["x"]
    for number, (a, b, kind) in enumerate(steps):
        left, right = names[a % len(names)], names[b % len(names)]
        if kind % 10 < len(UNARY):
            expression = f"{UNARY[kind % 10]}({left})"
        else:
            expression = {0: f"Add({left}, {right})", 1: f"Mul({left}, one)", 2: f"Sub({left}, zero)"}[kind % 3]
        lines.append(f"v{number} = {expression}")
        names.append(f"v{number}")
    model = build(" ".join([*lines, f"y = Tanh({names[-1]})"]), "float[3, 3] x")
    rewrite(Cleanup(), model, nested=False)


def test_growth_is_linear() -> None:
    """Ten times the nodes, at most about twenty times the time."""

    def seconds(count: int) -> float:
        body = " ".join(f"a{i + 1} = Identity(a{i}) b{i} = Exp(a{i}) c{i} = Exp(a{i})" for i in range(count))
        model = build(body.replace("a0)", "x)") + f" y = Neg(a{count})")
        start = time.perf_counter()
        Cleanup()(model, PassContext())
        return time.perf_counter() - start

    seconds(100)
    assert seconds(5000) < 20 * max(seconds(500), 0.01)


def test_what_only_a_dead_body_reads_is_dead_too() -> None:
    """In one run: the nodes in the branches of an If that goes no longer count as readers."""
    body = """c = Neg(x) i = If (go) <then_branch = t () => (float[4, 6] r) { r = Abs(c) },
    else_branch = e () => (float[4, 6] q) { q = Exp(c) }> y = Relu(x)"""
    after, _ = rewrite(Cleanup(), build(body, "float[4, 6] x, bool[1] go"))
    assert ops(after) == {"Relu": 1}


def test_the_type_of_an_output_survives_its_no_op() -> None:
    """onnx's shape inference does not know what a contrib operator makes; the output that is declared does."""
    model = build("s = com.microsoft.QuickGelu(x) y = Identity(s)", outputs="float[4, 6] y")
    for node in model.graph:
        if node.op_type == "QuickGelu":
            node.outputs[0].type = None
    model.opset_imports["com.microsoft"] = 1
    outcome = Cleanup()(model, PassContext())
    assert outcome.counts == {"no-op Identity": 1} and model.graph.outputs[0].dtype == ir.DataType.FLOAT
