"""FuseNormalization: every spelling against torch, and what only looks like it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.verify import relative_error, run_reference
from onnxlathe.passes import FuseNormalization
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
CONSTANTS = {
    "eps": np.float32(1e-5),
    "two": np.float32(2),
    "one": np.float32(1),
    "neg": np.float32(-0.5),
    "eight": np.float32(8),
    "seven": np.float32(7),
    "eighth": np.float32(1 / 8),
    "eps4": np.full((1, 1, 1, 1), 1e-5, np.float32),
    "last": np.array([-1]),
    "axis2": np.array([2]),
    "axis1": np.array([1]),
    "g": RNG.standard_normal(8).astype(np.float32),
    "b": RNG.standard_normal(8).astype(np.float32),
    "g3": RNG.standard_normal((1, 1, 8)).astype(np.float32),
    "column": RNG.standard_normal((8, 1)).astype(np.float32),
}
KINDS = {np.dtype(np.float32): "float", np.dtype(np.int64): "int64"}
SHAPE = "float[batch, s, 8]"


def build(body: str, outputs: str = "y", opset: int = 23, x: str = SHAPE) -> ir.Model:
    words = set(re.findall(r"\w+", body))
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    declared = [f"{KINDS[a.dtype]}[{','.join(map(str, a.shape))}] {name}" for name, a in used.items()]
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    return from_text(f"{header} n ({', '.join([f'{x} x', *declared])}) => ({outputs}) {{ {body} }}", **used)


CENTRE = "m = ReduceMean(x, last) d = Sub(x, m) "
ROOT = "v = ReduceMean(q, last) w = Add(v, eps) r = Sqrt(w) "
SUM = "t = ReduceSum(q, last) "
LAYER = {
    "Pow, Sqrt, Div": CENTRE + "q = Pow(d, two) " + ROOT + "n = Div(d, r) h = Mul(n, g) y = Add(h, b)",
    "Mul, Reciprocal": CENTRE + "q = Mul(d, d) " + ROOT + "i = Reciprocal(r) n = Mul(d, i) h = Mul(g, n) y = Add(b, h)",
    "1 / root": CENTRE + "q = Mul(d, d) " + ROOT + "i = Div(one, r) n = Mul(i, d) h = Mul(n, g) y = Add(h, b)",
    "Pow(-0.5)": CENTRE + "q = Mul(d, d) v = ReduceMean(q, axis2) w = Add(eps, v) i = Pow(w, neg) n = Mul(d, i) "
    "h = Mul(n, g) y = Add(h, b)",
    "scale first": CENTRE + "q = Mul(d, d) " + ROOT + "i = Reciprocal(r) k = Mul(i, g) n = Mul(d, k) y = Add(n, b)",
    "sum / width": CENTRE + "q = Mul(d, d) " + SUM + "v = Div(t, eight) w = Add(v, eps) r = Sqrt(w) "
    "n = Div(d, r) h = Mul(n, g) y = Add(h, b)",
    "scale [1, 1, 8]": CENTRE + "q = Mul(d, d) " + ROOT + "n = Div(d, r) h = Mul(n, g3) y = Add(h, b)",
}
RMS = {
    "Pow, Sqrt, Div": "q = Pow(x, two) " + ROOT + "n = Div(x, r) y = Mul(n, g)",
    "Llama": "q = Pow(x, two) " + ROOT + "i = Reciprocal(r) n = Mul(x, i) y = Mul(g, n)",
    "no scale": "q = Mul(x, x) " + ROOT + "y = Div(x, r)",
    "scale first": "q = Mul(x, x) " + ROOT + "i = Div(one, r) k = Mul(g, i) y = Mul(k, x)",
    "sum * 1 / width": "q = Pow(x, two) " + SUM + "v = Mul(eighth, t) w = Add(v, eps) r = Sqrt(w) n = Div(x, r) "
    "y = Mul(n, g)",
    "ReduceSumSquare": "t = ReduceSumSquare(x, last) v = Div(t, eight) w = Add(v, eps) r = Sqrt(w) n = Div(x, r) "
    "y = Mul(n, g)",
}


def reference(x: np.ndarray, centred: bool, scale: np.ndarray | None, bias: np.ndarray | None) -> np.ndarray:
    """Written from the papers, in float64."""
    x = x.astype(np.float64)
    d = x - x.mean(-1, keepdims=True) if centred else x
    n = d / np.sqrt((d**2).mean(-1, keepdims=True) + 1e-5)
    return n * (1 if scale is None else scale) + (0 if bias is None else bias)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("name", LAYER)
def test_layer_normalization(name: str, opset: int) -> None:
    after, outcome = rewrite(FuseNormalization(), build(LAYER[name], opset=opset))
    assert ops(after) == {"LayerNormalization": 1} and outcome.counts == {"LayerNormalization": 1}
    x = RNG.standard_normal((2, 3, 8)).astype(np.float32)
    scale = CONSTANTS["g3" if "g3" in LAYER[name] else "g"].reshape(-1)
    result = run_reference(after, [{"x": x}])[0]["y"]
    assert relative_error(reference(x, True, scale, CONSTANTS["b"]).astype(np.float32), result) <= 1e-5


@pytest.mark.parametrize("name", RMS)
def test_rms_normalization(name: str) -> None:
    after, outcome = rewrite(FuseNormalization(), build(RMS[name]))
    assert ops(after) == {"RMSNormalization": 1} and outcome.counts == {"RMSNormalization": 1}
    x = RNG.standard_normal((2, 3, 8)).astype(np.float32)
    scale = CONSTANTS["g"] if name != "no scale" else None
    result = run_reference(after, [{"x": x}])[0]["y"]
    assert relative_error(reference(x, False, scale, None).astype(np.float32), result) <= 1e-5


def test_axes_as_attribute() -> None:
    body = LAYER["Pow, Sqrt, Div"].replace("ReduceMean(", "ReduceMean<axes=[-1]>(").replace(", last)", ")")
    after, _ = rewrite(FuseNormalization(), build(body, opset=17))
    assert ops(after) == {"LayerNormalization": 1}


def test_half_precision_with_float_statistics() -> None:
    body = "f = Cast<to=1>(x) " + RMS["no scale"].replace("x, x", "f, f").replace("y = Div(x", "n = Div(f")
    model = build(body + " y = Cast<to=10>(n)", x="float16[batch, s, 8]", outputs="float16[batch, s, 8] y")
    after, _ = rewrite(FuseNormalization(), model, tolerance=2e-3)
    assert ops(after) == {"RMSNormalization": 1}


PLAIN, PLAIN_RMS = LAYER["Pow, Sqrt, Div"], RMS["Pow, Sqrt, Div"]
NEAR_MISSES = {
    "another axis": (PLAIN.replace("last", "axis1"), "y", "not the last"),
    "two axes": (PLAIN.replace("v = ReduceMean(q, last)", "v = ReduceMean(q, axis1)"), "y", "not the last"),
    "axis dropped": (
        "q = Mul(x, x) v = ReduceMean<keepdims=0>(q, last) w = Add(v, eps) r = Sqrt(w) "
        "u = Unsqueeze(r, last) y = Div(x, u)",
        "y",
        "drops its axis",
    ),
    "variance read elsewhere": (PLAIN, "y, v", "also used elsewhere"),
    "centred input read elsewhere": (PLAIN, "y, d", "also used elsewhere"),
    "divides another tensor": ("e = Exp(x) q = Mul(x, x) " + ROOT + "y = Div(e, r)", "y", ""),
    "scaled root read elsewhere": (RMS["scale first"], "y, k", "inverse root k is also used elsewhere"),
    "sum over another width": (LAYER["sum / width"].replace("eight", "seven"), "y", "not divided by the width 8"),
    "sum not divided": ("q = Mul(x, x) " + SUM + "w = Add(t, eps) r = Sqrt(w) y = Div(x, r)", "y", "width 8"),
    "epsilon adds an axis": (PLAIN_RMS.replace("eps", "eps4"), "y", "more axes"),
    "mean of squares alone": ("q = Mul(x, x) y = ReduceMean(q, last)", "y", ""),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    body, outputs, reason = NEAR_MISSES[case]
    refused(FuseNormalization(), build(body, outputs), reason)


def test_opset_without_the_operator_is_a_refusal_with_a_remedy() -> None:
    refused(FuseNormalization(), build(PLAIN_RMS, opset=20), "needs opset 23, not 20: run upgrade-opset first")


def test_scale_that_is_no_row_stays_outside() -> None:
    body = "q = Mul(x, x) " + ROOT + "n = Div(x, r) y = Mul(n, column)"
    after, _ = rewrite(FuseNormalization(), build(body, x="float[batch, 8, 8]"))
    assert ops(after) == {"RMSNormalization": 1, "Mul": 1}


def test_bias_without_scale() -> None:
    after, _ = rewrite(FuseNormalization(), build(PLAIN.replace("h = Mul(n, g) y = Add(h, b)", "y = Add(n, b)")))
    assert ops(after) == {"LayerNormalization": 1}


def test_casts_that_are_no_half_precision_stay() -> None:
    body = "f = Cast<to=1>(x) " + RMS["no scale"].replace("x, x", "f, f").replace("y = Div(x", "n = Div(f")
    model = build(body + " y = Cast<to=7>(n)", x="int64[batch, s, 8]", outputs="int64[batch, s, 8] y")
    after, _ = rewrite(FuseNormalization(), model, feeds=[{"x": np.ones((1, 2, 8), np.int64)}])
    assert ops(after) == {"Cast": 2, "RMSNormalization": 1}


def test_present_ones_are_noted() -> None:
    outcome = refused(FuseNormalization(), build("y = LayerNormalization(x, g, b)"))
    assert outcome.notes == ["1 normalizations were there already"]


def test_shared_scale(tmp_path: Path) -> None:
    twice = (
        PLAIN_RMS + " " + re.sub(r"\b([qvwrn])\b", r"\g<1>2", PLAIN_RMS).replace("x", "y").replace("y = Mul", "z = Mul")
    )
    model = build(twice.replace("eys", "exs"), outputs="z")
    after, _ = rewrite(FuseNormalization(), model)
    assert ops(after) == {"RMSNormalization": 2}
    _, outcome = rewrite(FuseNormalization(), with_external_data(model, tmp_path), nested=False)
    assert outcome.counts == {"RMSNormalization": 2}


def test_the_width_behind_a_normalization_just_made_is_known() -> None:
    """A contrib operator in front leaves the shapes open; the second normalization has no scale to read it from."""
    normalize = "m{0} = Mul(x{0}, x{0}) r{0} = ReduceMean(m{0}, last) a{0} = Add(r{0}, eps) s{0} = Sqrt(a{0}) "
    body = (
        "x1 = com.microsoft.QuickGelu<alpha=1.0>(x) "
        + normalize.format(1)
        + "d1 = Div(x1, s1) x2 = Mul(d1, w) "
        + normalize.format(2)
        + "y = Div(x2, s2)"
    )
    model = from_text(
        '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'
        f" g (float[n, s, 8] x, float[8] w, int64[1] last, float eps) => (float[n, s, 8] y) {{ {body} }}",
        w=np.arange(1, 9, dtype=np.float32),
        last=np.array([-1]),
        eps=np.float32(1e-5),
    )
    for node in model.graph:
        node.outputs[0].type = model.graph.inputs[0].type
        if node.outputs[0] not in model.graph.outputs:
            node.outputs[0].shape = None
    _, outcome = rewrite(FuseNormalization(), model)
    assert outcome.counts == {"RMSNormalization": 2}


def test_what_one_fusion_tells_of_shapes_serves_the_next() -> None:
    """Whether g is a scale of the second one depends on the rank of h, which is only known of an operator's result."""
    first = CENTRE + "q = Mul(d, d) " + ROOT + "n = Div(d, r) h = Mul(n, g) "
    second = """m2 = ReduceMean(h, last) d2 = Sub(h, m2) q2 = Mul(d2, d2) v2 = ReduceMean(q2, last) w2 = Add(v2, eps)
        r2 = Sqrt(w2) n2 = Div(d2, r2) h2 = Mul(n2, g) y = Add(h2, b)"""
    after, outcome = rewrite(FuseNormalization(), build(first + second))
    assert ops(after) == {"LayerNormalization": 2} and outcome.counts == {"LayerNormalization": 2}
