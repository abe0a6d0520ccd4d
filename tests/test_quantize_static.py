"""QuantizeStatic against NumPy's integer arithmetic, ONNX Runtime's optimized graphs, and its refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.models.zoo import build as build_zoo
from onnxlathe.passes.quantization.quantize_static import QuantizeStatic
from onnxlathe.runtime.errors import ModelError, PassError
from onnxlathe.runtime.feeds import make_feeds
from onnxlathe.runtime.quantization import QuantSpec
from onnxlathe.runtime.quantization_support import has_vnni
from rewriting import from_text, inside_if, ops, rewrite

_RNG = np.random.default_rng(0)


def constant(*shape: int) -> Any:
    return (_RNG.standard_normal(shape) * 0.3).astype(np.float32)


def build(body: str, inputs: str, outputs: str = "float y", opset: int = 21, **arrays: Any) -> ir.Model:
    names = "".join(f", float{list(array.shape)} {name}" for name, array in arrays.items()).replace("[]", "")
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}{names}) => ({outputs}) {{ {body} }}'
    model = from_text(text, **arrays)
    infer_shapes(model)
    return model


def samples(model: ir.Model, count: int = 4, **sizes: int) -> list[dict[str, Any]]:
    feeds: list[dict[str, Any]] = []
    for _ in range(count):
        shapes = {
            v.name: [d if isinstance(d, int) else sizes.get(str(d), 3) for d in v.shape or ()]
            for v in model.graph.inputs
        }
        feeds.append({name or "": _RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    return feeds


def quantize(model: ir.Model, tolerance: float = 0.06, **options: Any) -> tuple[ir.Model, Any, list[dict[str, Any]]]:
    feeds = samples(model)
    context = PassContext(feeds=feeds)
    step = QuantizeStatic(**options)
    after, outcome = rewrite(step, model, feeds=feeds, context=context, tolerance=tolerance, nested=False)
    return after, outcome, feeds


def executed(model: ir.Model, folder: Path) -> Counter[str]:
    """Operators of ORT's optimized graph."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    content = ir.to_proto(model).SerializeToString()
    ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def run(model: ir.Model, feeds: dict[str, Any], optimize: bool) -> Any:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return next(iter(session.run(None, feeds)))


def values(model: ir.Model) -> dict[str, Any]:
    return {name: item.const_value.numpy() for name, item in model.graph.initializers.items() if item.const_value}


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_product_is_integer_arithmetic(reduced: bool, per_channel: bool, tmp_path: Path) -> None:
    w, b = constant(16, 24), constant(24)
    model = build("m = MatMul(x, w) y = Add(m, b)", "float[b, n, 16] x", w=w, b=b)
    after, outcome, feeds = quantize(model, reduced=reduced, per_channel=per_channel)
    assert outcome.counts == {"MatMul on integers": 1}
    stored = values(after)
    x = feeds[0]["x"]
    sx, zx, sw, qw = (stored[name] for name in ("x_scale", "x_zero_point", "w_scale", "w_quantized"))
    assert np.abs(qw).max() <= (64 if reduced else 127)
    qx = np.clip(np.rint(x / sx) + zx, 0, 255).astype(np.int64)
    expected = ((qx - int(zx)) @ qw.astype(np.int64)) * (np.float64(sx) * sw) + b
    got = run(after, feeds[0], optimize=False)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert executed(after, tmp_path)["MatMulIntegerToFloat"] == 1
    if reduced or has_vnni():
        assert np.abs(run(after, feeds[0], optimize=True) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_scales_are_those_of_the_samples() -> None:
    model = build("y = MatMul(x, w)", "float[n, 16] x", w=constant(16, 8))
    after, outcome, feeds = quantize(model)
    low, high = min(f["x"].min() for f in feeds), max(f["x"].max() for f in feeds)
    scale, zero = QuantSpec().parameters(low, high)
    assert values(after)["x_scale"] == scale and values(after)["x_zero_point"] == zero
    assert (outcome.ranges["x"].low, outcome.ranges["x"].high) == (low, high)


@pytest.mark.parametrize("shape", ["n, 16", "2, 3, 16", "b, n, 16"])
def test_float_gemm_trap(shape: str, tmp_path: Path) -> None:
    model = build("m = MatMul(x, w) y = Add(m, b)", f"float[{shape}] x", w=constant(16, 8), b=constant(8))
    after, _, _ = quantize(model)
    found = executed(after, tmp_path)
    assert found["QGemm"] + found["MatMulIntegerToFloat"] == 1 and not found["Gemm"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_an_integer_bias(transposed: int, tmp_path: Path) -> None:
    w = constant(8, 16) if transposed else constant(16, 8)
    body = f"g = Gemm<transB={transposed}>(x, w, b) r = Relu(g) y = Gemm<transB=1>(r, w2, b2)"
    model = build(body, "float[n, 16] x", w=w, b=constant(8), w2=constant(5, 8), b2=constant(5))
    after, outcome, feeds = quantize(model)
    assert outcome.counts["Gemm on integers"] == 2 and "Relu" not in ops(after)
    found = executed(after, tmp_path)
    assert found["QGemm"] == 2 and not found["Gemm"] and not found["Relu"]
    assert np.abs(run(after, feeds[0], True) - run(after, feeds[0], False)).max() < 0.05


_CONV = dict(c=constant(8, 3, 3, 3), b=constant(8), c2=constant(8, 8, 3, 3), b2=constant(8))
_SAME = "<pads=[1,1,1,1]>"


@pytest.mark.parametrize("clip", ["Relu(a)", "Clip(a, low, six)", "Clip(a, low)"])
@pytest.mark.parametrize("options", [{}, {"activation": "int8"}, {"activation": "int8", "symmetric": True}])
def test_conv_with_relu(clip: str, options: dict[str, Any], tmp_path: Path) -> None:
    body = f"a = Conv{_SAME}(x, c, b) r = {clip} y = Conv{_SAME}(r, c2, b2)"
    limits = dict(low=np.float32(0), six=np.float32(6))
    extra = {name: array for name, array in limits.items() if name in clip}
    model = build(body, "float[n, 3, 8, 8] x", **_CONV, **extra)
    after, outcome, feeds = quantize(model, **options)
    assert outcome.counts == {"Conv on integers": 2}
    found = executed(after, tmp_path)
    assert found["QLinearConv"] == 2
    assert not set(found) & {"Conv", "FusedConv", "Relu", "Clip"}
    step = max(array for name, array in values(after).items() if name.startswith("y") and name.endswith("scale"))
    assert np.abs(run(after, feeds[0], True) - run(after, feeds[0], False)).max() <= 2.01 * step


def test_residual_pool_and_classifier_run_on_integers(tmp_path: Path) -> None:
    body = f"""a = Conv{_SAME}(x, c, b) r = Relu(a) d = Conv{_SAME}(r, c2, b2) s = Add(d, r) t = Relu(s)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t) e = Conv(p, c2, b2) g = GlobalAveragePool(e)
        f = Flatten(g) y = Gemm(f, w)"""
    model = build(body, "float[n, 3, 8, 8] x", **_CONV, w=constant(8, 5))
    after, outcome, _ = quantize(model, tolerance=0.1)
    assert outcome.counts == {
        "Conv on integers": 3, "Add on integers": 1, "GlobalAveragePool on integers": 1, "Gemm on integers": 1,
    }  # fmt: skip
    found = executed(after, tmp_path)
    assert found["QLinearConv"] == 3 and found["QLinearAdd"] == 1 and found["QGemm"] == 1
    assert found["QuantizeLinear"] == 1  # the input; everything behind it is integers
    assert not set(found) & {"Conv", "FusedConv", "Relu", "Add", "Gemm", "GlobalAveragePool"}


def test_only_what_pays_is_quantized(tmp_path: Path) -> None:
    body = """m = MatMul(x, w) g = Gelu(m) h = MatMul(g, v) r = Add(h, x) y = LayerNormalization<axis=-1>(r, s)"""
    model = build(body, "float[b, n, 16] x", w=constant(16, 32), v=constant(32, 16), s=np.ones(16, np.float32))
    after, _, _ = quantize(model, tolerance=0.1)
    found = executed(after, tmp_path)
    assert found["MatMulIntegerToFloat"] == 2 and found["QuantizeLinear"] == 2 and not found["DequantizeLinear"]


def test_one_quantize_for_three_readers_and_shared_weights() -> None:
    body = "q = MatMul(x, w) k = MatMul(x, w2) v = MatMul(x, w) y = Sum(q, k, v)"
    after, _, _ = quantize(build(body, "float[b, n, 16] x", w=constant(16, 8), w2=constant(16, 8)))
    assert ops(after) == {"QuantizeLinear": 1, "DequantizeLinear": 3, "MatMul": 3, "Sum": 1}


def test_products_of_activations_on_demand(tmp_path: Path) -> None:
    body = "t = Transpose<perm=[0,2,1]>(x) s = MatMul(x, t) p = Softmax(s) y = MatMul(p, x)"
    model = build(body, "float[b, n, 16] x")
    assert not QuantizeStatic()(model.clone(), PassContext(feeds=samples(model))).changed
    after, outcome, _ = quantize(model, products=True, tolerance=0.1)
    assert outcome.counts == {"MatMul on integers": 2}
    found = executed(after, tmp_path)
    assert found["MatMulIntegerToFloat"] == 2 and found["Softmax"] == 1 and not found["MatMul"]


def test_embedding_rows_are_dequantized_not_tables(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (int64[n] i, float[500, 16] t) => (float[n, 16] y)
        { y = Gather(t, i) }"""
    model = from_text(text, t=constant(500, 16))
    feeds = [{"i": np.array([3, 499, 0])}]
    step = QuantizeStatic()
    after, outcome = rewrite(step, model, feeds=feeds, tolerance=0.01, nested=False)
    assert outcome.counts == {"embedding table in 8 bits": 1}
    assert list(ops(after)) == ["com.microsoft.GatherBlockQuantized"]
    assert not rewrite(QuantizeStatic(embeddings=False), model, feeds=feeds, nested=False)[1].changed


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
def test_every_range_method(method: Any) -> None:
    model = build("y = MatMul(x, w)", "float[n, 16] x", w=constant(16, 8))
    quantize(model, ranges=method, percentile=99.9, tolerance=0.3)


def test_int16_activations_are_nearly_exact() -> None:
    model = build("y = MatMul(x, w)", "float[n, 16] x", w=constant(16, 8), opset=13)
    after, outcome, _ = quantize(model, activation="int16", reduced=False, tolerance=0.02)
    assert after.opset_imports[""] == 21 and outcome.counts["opset 13 -> 21"] == 1
    assert any("never faster" in note for note in outcome.notes)


def test_old_opsets_are_upgraded() -> None:
    model = build("y = MatMul(x, w)", "float[n, 16] x", w=constant(16, 8), opset=11)
    after, outcome, _ = quantize(model)
    assert after.opset_imports[""] == 13 and outcome.counts["opset 11 -> 13"] == 1


def test_include_and_exclude() -> None:
    body = "a = MatMul(x, w) y = MatMul(a, v)"
    model = build(body, "float[n, 16] x", w=constant(16, 8), v=constant(8, 8))
    first = next(iter(model.graph)).name or ""
    for options in ({"exclude": (first,)}, {"include": (lambda node: node.name != first,)}):
        _, outcome, _ = quantize(model, **options)
        assert outcome.counts == {"MatMul on integers": 1}
        assert [item.node for item in outcome.refusals] == [first]
    assert not quantize(model, exclude=("MatMul",))[1].changed


def test_constant_activations() -> None:
    model = build(
        "z = Mul(x, none) m = MatMul(z, w) y = Add(m, x)", "float[n, 16] x", none=np.float32(0), w=constant(16, 16)
    )
    after, outcome, _ = quantize(model)
    assert values(after)["z_scale"] == 1.0 and any("always zero" in note for note in outcome.notes)


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("y = MatMul(w, x)", "float[16, n] x", "constant on the left"),
        ("y = Gemm<beta=0.5>(x, w, b)", "float[n, 16] x", "beta"),
        ("y = Gemm(x, w, z)", "float[n, 16] x, float[16] z", "bias is computed"),
        ("y = MatMul(x, z)", "float[n, 16] x, float[16, 4] z", "products=True"),
        ("y = MatMul(x, bad)", "float[n, 16] x", "bad holds NaN"),
    ],
)
def test_refusals(body: str, inputs: str, reason: str) -> None:
    arrays = dict(w=constant(16, 16), b=constant(16), bad=np.full((16, 4), np.nan, np.float32))
    model = build(
        body,
        inputs,
        **{name: array for name, array in arrays.items() if name in body.replace("beta", "").replace("MatMul", "")},
    )
    outcome = QuantizeStatic()(model, PassContext(feeds=samples(model)))
    assert not outcome.changed and any(reason in item.reason for item in outcome.refusals)


def test_recurrent_layers_are_refused() -> None:
    arrays = {"w": constant(1, 24, 8), "r": constant(1, 24, 6)}
    model = build("y, h, c = LSTM<hidden_size=6>(x, w, r)", "float[s, n, 8] x", **arrays)
    outcome = QuantizeStatic()(model, PassContext(feeds=samples(model)))
    assert not outcome.changed and "quantize-dynamic has one" in outcome.refusals[0].reason


def test_bodies_of_ifs_are_left_alone() -> None:
    model = inside_if(build("y = MatMul(x, w)", "float[n, 16] x", w=constant(16, 8)))
    assert not QuantizeStatic()(model, PassContext()).changed


def test_no_samples() -> None:
    model = build("y = MatMul(x, w)", "float[n, 16] x", w=constant(16, 8))
    with pytest.raises(PassError, match=r"no calibration samples.*quantize-dynamic"):
        lathe.compile(model, [QuantizeStatic()], progress=False)


def test_nan_activations_are_named() -> None:
    model = build("r = Log(x) y = MatMul(r, w)", "float[n, 16] x", w=constant(16, 8))
    with pytest.raises(ModelError, match="'r' is NaN"):
        QuantizeStatic()(model, PassContext(feeds=[{"x": -np.ones((2, 16), np.float32)}]))


def test_second_compile_needs_no_samples(tmp_path: Path) -> None:
    model = build(
        "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", "float[n, 16] x", w=constant(16, 8), v=constant(8, 8)
    )
    first = lathe.compile(model, [QuantizeStatic()], calibration=samples(model), progress=False)
    first.save(tmp_path / "first.onnx")
    first.report.save_json(tmp_path / "first.json")
    for known in (first.report, tmp_path / "first.onnx", str(tmp_path / "first.json")):
        again = lathe.compile(model, [QuantizeStatic()], calibration=known, progress=False)
        assert values(again.model)["x_scale"] == values(first.model)["x_scale"]
    plain = lathe.compile(model, "basic", progress=False)
    plain.save(tmp_path / "plain.onnx")
    with pytest.raises(ModelError, match="no calibrated ranges"):
        lathe.compile(model, [QuantizeStatic()], calibration=tmp_path / "plain.onnx", progress=False)


def test_preset_on_an_encoder(tmp_path: Path) -> None:
    entry = build_zoo("encoder")
    model = lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
    feeds = make_feeds(model, count=4)
    out = lathe.compile(model, "cpu-int8", calibration=feeds, speed_gate=False, progress=False)
    found = executed(out.model, tmp_path)
    record = next(item for item in out.report.passes if item.name == "quantize-static")
    assert record.counts["MatMul on integers"] == found["MatMulIntegerToFloat"] and not found["MatMul"]
    assert record.counts["embedding table in 8 bits"] == 2  # the two types are too few to matter
    assert out.report.error is not None and out.report.error < 0.1


def test_preset_on_a_residual_network(tmp_path: Path) -> None:
    entry = build_zoo("convnet")
    model = lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
    feeds = make_feeds(model, count=4)
    out = lathe.compile(model, "cpu-int8", calibration=feeds, speed_gate=False, progress=False)
    found = executed(out.model, tmp_path)
    assert found["QLinearConv"] == 21 and found["QLinearAdd"] == 8  # the last one is read by a mean, which is float
    assert found["Relu"] == found["Add"] == 1
    assert not set(found) & {"Conv", "FusedConv", "BatchNormalization", "Gemm"}
    assert out.report.error is not None and out.report.error < 0.1


def test_a_weight_that_callers_may_override_stays_float() -> None:
    """Among the inputs it is no constant, products=True or not."""
    model = build("y = MatMul(x, w)", "float[n, 8] x", "float[n, 4] y", w=constant(8, 4))
    model.graph.inputs.append(model.graph.initializers["w"])
    feeds = [{"x": _RNG.standard_normal((3, 8)).astype(np.float32)}]
    for products in (False, True):
        outcome = QuantizeStatic(products=products)(model.clone(), PassContext(feeds=feeds))
        assert not outcome.changed and any("callers may override" in item.reason for item in outcome.refusals)
