"""FoldConstants: folds what is constant, never grows the file, leaves Q/DQ and randomness alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import constant
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.passes import FoldConstants
from rewriting import from_text, ops, refused, rewrite, with_external_data

HEAD = '<ir_version: 10, opset_import: ["" : 20]> g '
W = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)


def build(body: str, declared: str, outputs: str = "y", **arrays: np.ndarray) -> ir.Model:
    return from_text(f"{HEAD} (float[n, 20] x, {declared}) => ({outputs}) {{ {body} }}", **arrays)


def test_chain_is_folded_at_once() -> None:
    body = "a = Transpose<perm=[1,0]>(w) b = Mul(a, two) c = Neg(b) t = Transpose<perm=[1,0]>(c) y = MatMul(x, t)"
    after, outcome = rewrite(FoldConstants(), build(body, "float[20, 30] w, float two", w=W, two=np.float32(2)))
    assert ops(after) == {"MatMul": 1} and outcome.counts == {"folded nodes": 4}
    weight = next(iter(after.graph)).inputs[1]
    assert np.array_equal(constant(weight), -2 * W)


def test_never_grows_the_file() -> None:
    body = "e = Expand(one, shape) y = MatMul(x, e)"
    arrays = {"one": np.ones((1, 1), np.float32), "shape": np.array([20, 500])}
    model = build(body, "float[1, 1] one, int64[2] shape", **arrays)
    refused(FoldConstants(), model, "folding would write 40000 bytes")
    after, _ = rewrite(FoldConstants(growth_limit=100_000), model)
    assert ops(after) == {"MatMul": 1}


def test_shared_weight_is_not_stored_twice() -> None:
    """A tied table: folding its transpose for the head would keep both."""
    body = "t = Transpose<perm=[1,0]>(w) a = MatMul(x, w) y = MatMul(a, t)"
    refused(FoldConstants(), build(body, "float[20, 30] w", w=W), "folding would write 2400 bytes and free 0")


def test_broadcasting_growth_is_foreseen() -> None:
    body = "s = Add(column, row) y = MatMul(x, s)"
    arrays = {"column": np.ones((20, 1), np.float32), "row": np.ones((1, 900), np.float32)}
    refused(FoldConstants(), build(body, "float[20, 1] column, float[1, 900] row", **arrays), "folding would write")


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear(w, s, z) d = DequantizeLinear(q, s, z) y = MatMul(x, d)",
        "r = RandomNormalLike<seed=1.0>(w) y = MatMul(x, r)",
        "y = MatMul(x, w) v = Neg(s)",
    ],
)
def test_left_alone(body: str) -> None:
    arrays = {"w": W, "s": np.float32(0.1), "z": np.int8(0)}
    outputs = "y, v" if "v =" in body else "y"
    feeds = [{"x": np.ones((2, 20), np.float32)}]
    model = build(body, "float[20, 30] w, float s, int8 z", outputs, **arrays)
    if "Random" in body:  # its numbers differ from run to run; only the graph can be compared
        after = model.clone()
        assert not FoldConstants()(after, PassContext()).changed
    else:
        refused(FoldConstants(), model, feeds=feeds)


def test_overridable_initializer_is_no_constant() -> None:
    model = build("t = Neg(w) y = MatMul(x, t)", "float[20, 30] w", w=W)
    model.graph.inputs.append(model.graph.initializers["w"])
    assert not FoldConstants()(model, PassContext()).changed


def test_shape_arithmetic_over_static_dims() -> None:
    body = "s = Shape(x) d = Gather(s, one) r = Cast<to=1>(d) f = Sqrt(r) y = Div(x, f)"
    after, _ = rewrite(FoldConstants(), build(body, "int64 one", one=np.array(1)))
    assert ops(after) == {"Div": 1}
    assert constant(next(iter(after.graph)).inputs[1]) == pytest.approx(20**0.5)


def test_dynamic_dims_stay() -> None:
    body = "s = Shape(x) d = Gather(s, zero) r = Cast<to=1>(d) y = Div(x, r)"
    refused(FoldConstants(), build(body, "int64 zero", zero=np.array(0)))


def test_types_without_a_kernel_go_through_the_reference_evaluator() -> None:
    """ORT's CPU provider adds no int16."""
    body = "s = Add(a, b) f = Cast<to=1>(s) y = Mul(x, f)"
    arrays = {"a": np.arange(20, dtype=np.int16), "b": np.ones(20, np.int16)}
    model = build(body, "int16[20] a, int16[20] b", **arrays)
    infer_shapes(model)
    after = model.clone()
    outcome = FoldConstants()(after, PassContext())
    assert outcome.counts == {"folded nodes": 2} and ops(after) == {"Mul": 1}
    assert np.array_equal(constant(next(iter(after.graph)).inputs[1]), np.arange(1, 21, dtype=np.float32))


def test_external_data(tmp_path: Path) -> None:
    model = build("t = Neg(w) y = MatMul(x, t)", "float[20, 30] w", w=W)
    after, _ = rewrite(FoldConstants(), with_external_data(model, tmp_path), nested=False)
    assert ops(after) == {"MatMul": 1}
