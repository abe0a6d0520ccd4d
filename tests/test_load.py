"""Models from elsewhere, brought into one shape."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.load import load_model

TEXT = """<ir_version: {version}, opset_import: ["" : {opset}]>
g (float[n, 4] x, float[4] w, float[4] b) => (float[n, 4] y) {{ m = Mul(x, w) y = Add(m, b) }}"""


def build(version: int, opset: int, listed: tuple[str, ...]) -> onnx.ModelProto:
    """A model whose initializers ``listed`` are also inputs, as old exporters wrote them."""
    proto = onnx.parser.parse_model(TEXT.format(version=version, opset=opset))
    for name in ("w", "b"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(4, 2.0, np.float32), name))
    kept = [value for value in proto.graph.input if value.name == "x" or value.name in listed]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return proto


@pytest.mark.parametrize(("version", "opset"), [(3, 8), (3, 9), (4, 11), (7, 13), (10, 21)])
def test_weights_listed_as_inputs_become_constants(version: int, opset: int) -> None:
    proto = build(version, opset, ("w", "b"))
    out = lathe.compile(proto, "cpu-fp32", speed_gate=False, progress=False)
    assert [value.name for value in out.model.graph.inputs] == ["x"] and out.report.error == 0.0
    x = np.ones((2, 4), np.float32)
    assert np.array_equal(out.session().run({"x": x})["y"], np.full((2, 4), 4.0, np.float32))


def test_a_single_listed_weight_is_meant() -> None:
    model = load_model(build(8, 17, ("w",)))
    assert [value.name for value in model.graph.inputs] == ["x", "w"]
    out = lathe.compile(model, "cpu-fp32", speed_gate=False, progress=False)
    session = out.session()
    x = np.ones((1, 4), np.float32)
    assert session.ort.run(None, {"x": x, "w": np.zeros(4, np.float32)})[0].tolist() == [[2.0] * 4], "still overridable"


def test_functions_are_inlined_and_constants_lifted() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
    g (float[n] x) => (float[n] y) { c = Constant<value_float = 3.0>()  t = local.twice(x)  y = Mul(t, c) }
    <domain: "local", opset_import: ["" : 20]> twice (a) => (b) { b = Add(a, a) }"""
    model = load_model(onnx.parser.parse_model(text))
    assert {node.op_type for node in model.graph} == {"Add", "Mul"} and len(model.graph.initializers) == 1
    out = lathe.compile(model, "basic", progress=False)
    assert out.session().run({"x": np.ones(2, np.float32)})["y"].tolist() == [6.0, 6.0]


@pytest.mark.parametrize("opset", [6, 99])
def test_unsupported_opset(opset: int) -> None:
    proto = build(8, 13, ())
    proto.opset_import[0].version = opset
    with pytest.raises(lathe.ModelError, match=f"opset {opset}; supported are"):
        load_model(proto)


def test_the_source_is_left_alone() -> None:
    model = ir.from_proto(build(3, 9, ("w", "b")))
    before = ir.to_proto(model)
    load_model(model)
    assert ir.to_proto(model) == before
