"""Structure, errors, comparisons and the search for the first difference."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import (
    Signature,
    check_model,
    check_structure,
    compare,
    first_difference,
    relative_error,
    run_reference,
)
from onnxlathe.runtime.errors import ModelError, VerifyError
from rewriting import from_text


def test_good_structure(small_model: ir.Model) -> None:
    check_structure(small_model)
    check_model(small_model)


def break_order(model: ir.Model) -> None:
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])


def break_name(model: ir.Model) -> None:
    list(model.graph)[1].outputs[0].name = "a"


def break_data(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = None


def break_domain(model: ir.Model) -> None:
    next(iter(model.graph)).domain = "com.example"


def break_output(model: ir.Model) -> None:
    model.graph.outputs.append(ir.Value(name="extra"))


def empty_name(model: ir.Model) -> None:
    model.graph.inputs[0].name = ""


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_order, "before anything makes it"),
        (break_name, "made twice"),
        (break_data, "has no data"),
        (break_domain, "com.example"),
        (break_output, "Nothing makes the graph output 'extra'"),
        (empty_name, "no name"),
    ],
)
def test_each_rule(small_model: ir.Model, damage: object, words: str) -> None:
    damage(small_model)  # type: ignore[operator]
    with pytest.raises(VerifyError, match=words):
        check_structure(small_model)


def test_bodies_see_outer_values_but_not_later_ones() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (bool c, float[2] x) => (float[2] y) {
      t = Relu(x)
      y = If (c) <then_branch = a () => (float[2] u) { u = Neg(t) }, else_branch = b () => (float[2] v) { v = Abs(t) }>
    }"""
    model = from_text(text)
    check_structure(model)
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    with pytest.raises(VerifyError, match="reads 't'"):
        check_structure(model)


def test_signature(small_model: ir.Model) -> None:
    before = Signature.of(small_model)
    before.check_kept(Signature.of(small_model.clone()))
    small_model.graph.inputs[0].dtype = ir.DataType.DOUBLE
    with pytest.raises(VerifyError, match="inputs changed"):
        before.check_kept(Signature.of(small_model))


def test_checker_speaks() -> None:
    model = from_text('<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    next(iter(model.graph)).op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="NoSuchOperator"):
        check_model(model)


A = np.array([1.0, -4.0, 2.0], np.float32)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (A, 0.0),
        (A + np.array([0, 0.4, 0], np.float32), 0.1),
        (A[:2], np.inf),
        (A.astype(np.float64), np.inf),
        (np.array([1.0, np.nan, 2.0], np.float32), np.inf),
        (np.array([1.0, -np.inf, 2.0], np.float32), np.inf),
    ],
)
def test_relative_error(got: np.ndarray, expected: float) -> None:
    assert relative_error(A, got) == pytest.approx(expected, rel=1e-5)


def test_relative_error_of_special_arrays() -> None:
    nan = np.array([np.nan, np.inf, 1.0])
    assert relative_error(nan, nan.copy()) == 0.0
    assert relative_error(nan, np.array([np.nan, -np.inf, 1.0])) == np.inf
    assert relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0
    assert relative_error(np.array([1, 2]), np.array([1, 3])) == np.inf
    assert relative_error(np.zeros(3), np.full(3, 1e-9)) > 1, "nothing is small beside zero"


def test_compare_names_the_worst_output() -> None:
    before = [{"a": A, "b": A}, {"a": A, "b": A}]
    after = [{"a": A, "b": A}, {"a": A, "b": A * np.float32(1.5)}]
    error, name = compare(before, after)
    assert (round(error, 6), name) == (0.5, "b")


def test_first_difference_is_the_first(small_model: ir.Model) -> None:
    feeds = [{"x": np.ones((2, 8), np.float32)}]
    infer_shapes(small_model)
    after = small_model.clone()
    next(node for node in after.graph if node.op_type == "Add").op_type = "Sub"
    found = first_difference(small_model, after, feeds, 1e-5)
    assert found is not None and "value a" in found[0] and found[1] > 1e-3
    assert first_difference(small_model, small_model.clone(), feeds, 1e-5) is None


def test_reference_run_takes_bfloat16_and_small_and_subgraph_weights(small_model: ir.Model) -> None:
    """Weights are handed over without a copy; what NumPy has no type for stays in the graph."""
    wide = from_text(
        """<ir_version: 10, opset_import: ["" : 20]> g (float[2] x, bfloat16[2] w) => (float[2] y) {
          f = Cast<to = 1>(w)  y = Mul(x, f) }"""
    )
    value = wide.graph.inputs.pop(1)
    value.const_value = ir.Tensor(np.array([2.0, 3.0], ir.DataType.BFLOAT16.numpy()), name="w")
    wide.graph.register_initializer(value)
    assert run_reference(wide, [{"x": np.ones(2, np.float32)}])[0]["y"].tolist() == [2.0, 3.0]
    before = small_model.graph.initializers["w"].const_value
    run_reference(small_model, [{"x": np.ones((1, 8), np.float32)}])
    assert small_model.graph.initializers["w"].const_value is before, "put back after opening"


def test_relative_error_of_arrays_compared_in_parts() -> None:
    a = np.zeros((1 << 20) + 7, np.float32)
    a[3] = 10.0
    b = a.copy()
    b[-1] = 0.5
    assert relative_error(a, b) == pytest.approx(0.05)
    b[-1] = np.nan
    assert relative_error(a, b) == np.inf
    a[-1] = np.nan
    assert relative_error(a, b) == 0.0
