"""ConvertFloat16: types, what stays float32, no overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import run_reference
from onnxlathe.models.zoo import build as build_zoo
from onnxlathe.passes.quantization.convert_float16 import ConvertFloat16
from rewriting import from_text, ops, rewrite

_RNG = np.random.default_rng(0)


def build(body: str, outputs: str = "float[n, 8] y", **arrays: Any) -> ir.Model:
    names = "".join(f", float{list(array.shape) or ''} {name}" for name, array in arrays.items())
    header = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
    model = from_text(f"{header} g (float[n, 8] x{names}) => ({outputs}) {{ {body} }}", **arrays)
    infer_shapes(model)
    return model


def weight(*shape: int) -> Any:
    return _RNG.standard_normal(shape).astype(np.float32)


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {value.name or "": value.dtype for node in model.graph for value in node.outputs}


def test_casts_stand_only_where_the_types_meet() -> None:
    model = build("m = MatMul(x, w) r = Relu(m) y = MatMul(r, w)", w=weight(8, 8))
    after, outcome = rewrite(ConvertFloat16(), model, tolerance=5e-3, nested=False)
    assert ops(after) == {"Cast": 2, "MatMul": 2, "Relu": 1}
    assert types(after)["m"] == ir.DataType.FLOAT16 and after.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert any("never faster" in note for note in outcome.notes)
    stored = [v.const_value for v in after.graph.initializers.values() if v.uses()]
    assert [tensor.dtype for tensor in stored if tensor] == [ir.DataType.FLOAT16]


def test_sums_and_exponentials_stay_float() -> None:
    model = build("m = MatMul(x, w) e = Exp(m) y = Add(e, x)", w=weight(8, 8) * 0.1)
    after, outcome = rewrite(ConvertFloat16(), model, tolerance=5e-3, nested=False)
    assert types(after)["e"] == ir.DataType.FLOAT and types(after)["m"] == ir.DataType.FLOAT16
    assert any("kept in float32" in item.reason for item in outcome.refusals)


def test_values_beyond_the_range_stay_float() -> None:
    model = build("a = Mul(x, big) b = Mul(a, a) c = Sqrt(b) y = MatMul(c, w)", big=np.float32(1e3), w=weight(8, 8))
    feeds = [{"x": np.abs(weight(4, 8)) + 0.5}]
    context = PassContext(feeds=feeds)
    after, outcome = rewrite(ConvertFloat16(), model, feeds=feeds, context=context, tolerance=5e-3, nested=False)
    assert types(after)["a"] == ir.DataType.FLOAT16 and types(after)["b"] == ir.DataType.FLOAT
    assert sum("65504" in item.reason for item in outcome.refusals) == 2
    assert np.isfinite(run_reference(after, feeds)[0]["y"]).all()


def test_weights_beyond_the_range_stay_float() -> None:
    model = build("y = MatMul(x, w)", w=weight(8, 8) * np.float32(1e6))
    outcome = ConvertFloat16()(model, PassContext())
    assert not outcome.changed and "65504" in outcome.refusals[0].reason


def test_keep() -> None:
    model = build("m = MatMul(x, w) y = Relu(m)", w=weight(8, 8))
    after, _ = rewrite(ConvertFloat16(keep=("MatMul",)), model, tolerance=5e-3, nested=False)
    assert types(after)["m"] == ir.DataType.FLOAT


def test_outputs_and_their_readers() -> None:
    model = build("m = MatMul(x, w) y = Relu(m)", "float[n, 8] y, float[n, 8] m", w=weight(8, 8))
    after, _ = rewrite(ConvertFloat16(), model, tolerance=5e-3, nested=False)
    assert [value.name for value in after.graph.outputs] == ["y", "m"]


def test_bfloat16_weights() -> None:
    model = build("y = MatMul(x, w)", w=weight(8, 8) * np.float32(1e6))
    assert ConvertFloat16(dtype="bfloat16")(model, PassContext(device="cuda")).changed
    assert ir.DataType.BFLOAT16 in {value.dtype for value in model.graph.initializers.values()}


def test_a_masked_encoder_stays_finite() -> None:
    entry = build_zoo("encoder")
    model = lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
    fused = lathe.compile(model, "cpu-fp32", speed_gate=False, progress=False).model
    names = [value.name or "" for value in fused.graph.inputs]
    feeds = [dict(zip(names, (array.numpy() for array in entry.args), strict=True))]
    out = lathe.compile(fused, [ConvertFloat16(), "cleanup"], calibration=feeds, progress=False)
    assert out.report.error is not None and out.report.error < 0.02
    assert out.report.weight_bytes[1] < 0.6 * out.report.weight_bytes[0]


def test_values_of_unknown_type_stay() -> None:
    """onnx's shape inference does not know contrib operators; what reads their results would get half precision."""
    model = build("s = com.microsoft.QuickGelu(x) y = Erf(s)")
    for node in model.graph:
        if node.op_type == "QuickGelu":
            node.outputs[0].type = None
    outcome = ConvertFloat16()(model, PassContext())
    assert not outcome.changed and any("types of its operands" in item.reason for item in outcome.refusals)
