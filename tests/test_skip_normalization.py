"""Fuse- and SplitSkipNormalization, opposite ways, each where it is the faster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.passes import FuseSkipNormalization, SplitSkipNormalization
from onnxlathe.runtime.capabilities import KernelCosts
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
VECTORS = {name: RNG.standard_normal(8).astype(np.float32) for name in ("g", "b", "c")}
VECTORS["zero"] = np.array([0])
MS = "com.microsoft."
FUSED = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
PLAIN = ("Add+LayerNormalization", "Add+RMSNormalization")


def costs(fused: dict[int, float]) -> PassContext:
    """A context in which fused kernels cost so much by rows, and the plain forms 2."""
    table = {f"{form}|{rows}": cost for form in FUSED for rows, cost in fused.items()}
    return PassContext(costs=KernelCosts(table | {f"{form}|{rows}": 2.0 for form in PLAIN for rows in fused}))


FASTER = costs({16: 1.0, 128: 1.0, 1024: 1.0})


def build(
    body: str, outputs: str = "float[n, s, 8] y", opset: int = 23, inputs: str = "float[n, s, 8] p, float[n, s, 8] q"
) -> ir.Model:
    used = {name: array for name, array in VECTORS.items() if f" {name}" in body}
    declared = ", ".join([inputs, *("int64[1] zero" if name == "zero" else f"float[8] {name}" for name in used)])
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return from_text(f"{header} k ({declared}) => ({outputs}) {{ x = Exp(p)  r = Tanh(q)  {body} }}", **used)


def test_split_with_every_part() -> None:
    body = f"y, m, v, s = {MS}SkipLayerNormalization<epsilon = 0.001>(x, r, g, b, c)  z = Neg(s)"
    model = build(body, "float[n, s, 8] y, float[n, s, 8] z")
    after, outcome = rewrite(SplitSkipNormalization(), model)
    assert ops(after) == {"Exp": 1, "Tanh": 1, "Add": 2, "LayerNormalization": 1, "Neg": 1}
    assert outcome.counts == {"SkipLayerNormalization -> Add + LayerNormalization": 1}


def test_split_whose_sum_is_an_output() -> None:
    model = build(f"y, , , s = {MS}SkipSimplifiedLayerNormalization(x, r, g)", "float[n, s, 8] y, float[n, s, 8] s")
    after, _ = rewrite(SplitSkipNormalization(), model)
    assert ops(after) == {"Exp": 1, "Tanh": 1, "Add": 1, "RMSNormalization": 1}
    assert [value.name for value in after.graph.outputs] == ["y", "s"]


def test_default_onnxruntime_leaves_the_split_form_alone(tmp_path: Path) -> None:
    """The claim the pass rests on, held against ORT's own optimized graph, before and after."""
    body = "s = Add(x, r)  y = LayerNormalization<axis = -1>(s, g, b)"
    for step, expected in (
        (None, {"SkipLayerNormalization"}),
        (SplitSkipNormalization(), {"Add", "LayerNormalization"}),
    ):
        out = lathe.compile(build(body), [step] if step else [], progress=False)
        source, dump = out.save(tmp_path / "m.onnx"), tmp_path / "optimized.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(dump)
        options.log_severity_level = 3
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        assert {node.op_type for node in ir.load(dump).graph} & {
            "SkipLayerNormalization",
            "Add",
            "LayerNormalization",
        } == expected


def test_protected_layers_share_a_scale() -> None:
    layer = "s{0} = Add({1}, r) y{0} = LayerNormalization<epsilon = 0.001>(s{0}, g, b) "
    model = build(layer.format(1, "x") + layer.format(2, "y1") + "y = Neg(y2)")
    after, outcome = rewrite(SplitSkipNormalization(), model)
    assert outcome.counts == {"Add kept apart from LayerNormalization": 2}
    scales = {node.inputs[1] for node in after.graph if node.op_type == "LayerNormalization"}
    assert [list(value.shape) for value in scales] == [[1, 8]]


def test_computed_scale_cannot_be_protected() -> None:
    model = build("s = Add(x, r) o = Mul(g, g) y = LayerNormalization(s, o, b)")
    refused(SplitSkipNormalization(), model, "computed at run time")


NOT_PROTECTED = {
    "sum read elsewhere: ORT does not fuse it": ("s = Add(x, r) y = LayerNormalization(s, g, b) z = Neg(s)", "y, z"),
    "bias, no residual": ("s = Add(x, c) y = LayerNormalization(s, g, b)", "y"),
    "RMS, which ORT does not fuse": ("s = Add(x, r) y = RMSNormalization(s, g)", "y"),
    "one is broadcast": ("t = ReduceMax(r, zero) s = Add(x, t) y = LayerNormalization(s, g, b)", "y"),
    "sum is an output": ("s = Add(x, r) y = LayerNormalization(s, g, b)", "y, s"),
}


@pytest.mark.parametrize("case", NOT_PROTECTED)
def test_adds_that_need_no_protection_stay(case: str) -> None:
    refused(SplitSkipNormalization(), build(*NOT_PROTECTED[case]))


def test_split_refusals() -> None:
    fused = f"y = {MS}SkipLayerNormalization(x, r, g, b)"
    refused(SplitSkipNormalization(), build(fused), "faster on CUDA", context=PassContext(device="cuda"))
    refused(SplitSkipNormalization(), build(fused, opset=16), "needs opset 17")
    costs = KernelCosts({"SkipLayerNormalization|128": 1.0, "Add+LayerNormalization|128": 2.0})
    refused(SplitSkipNormalization(), build(fused), "measured faster", context=PassContext(costs=costs))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("s = Add(x, r) y = LayerNormalization<epsilon = 0.001>(s, g, b)", "SkipLayerNormalization"),
        ("s = Sum(x, r) y = RMSNormalization<axis = 2>(s, g)", "SkipSimplifiedLayerNormalization"),
    ],
)
def test_fuse_where_measured_faster(body: str, kind: str) -> None:
    after, outcome = rewrite(FuseSkipNormalization(), build(body), context=FASTER)
    assert ops(after) == {"Exp": 1, "Tanh": 1, MS + kind: 1} and outcome.counts == {kind: 1}


def test_fuse_hands_the_sum_on() -> None:
    model = build("s = Add(x, r) y = RMSNormalization(s, g) z = Neg(s)", "float[n, s, 8] y, float[n, s, 8] z")
    after, _ = rewrite(FuseSkipNormalization(), model, context=FASTER)
    assert ops(after) == {"Exp": 1, "Tanh": 1, MS + "SkipSimplifiedLayerNormalization": 1, "Neg": 1}


FUSE_NEAR_MISSES = {
    "sum read before": (
        "s = Add(x, r) z = Neg(s) t = Add(z, g) y = LayerNormalization(s, g, b)",
        "y, t",
        "read before",
    ),
    "broadcast": ("s = Add(x, c) y = LayerNormalization(s, g, b)", "y", "same dims"),
    "three terms": ("s = Sum(x, r, p) y = LayerNormalization(s, g, b)", "y", "more than two"),
    "another axis": ("s = Add(x, r) o = Abs(x) y = LayerNormalization<axis = 1>(s, o)", "y", "last axis"),
    "scale of two axes": ("s = Add(x, r) o = Exp(r) y = LayerNormalization(s, o)", "y", "no vector"),
    "mean is read": ("s = Add(x, r) y, m = LayerNormalization(s, g, b)", "y, m", "mean or inverse"),
}


@pytest.mark.parametrize("case", FUSE_NEAR_MISSES)
def test_fuse_near_misses(case: str) -> None:
    body, outputs, reason = FUSE_NEAR_MISSES[case]
    refused(FuseSkipNormalization(), build(body, outputs), reason, context=FASTER)


def test_not_fused_where_slower_or_unknown() -> None:
    model = build("s = Add(x, r) y = LayerNormalization(s, g, b)")
    refused(FuseSkipNormalization(), model, "was not measured")
    refused(FuseSkipNormalization(), model, "up to 6.0 x the time", context=costs({16: 1.0, 1024: 12.0}))
    _, outcome = rewrite(FuseSkipNormalization(always=True), model)
    assert outcome.counts == {"SkipLayerNormalization": 1}


def test_sum_read_by_a_branch() -> None:
    """A reader inside the body of an earlier node counts as a reader before; inside a later one as one after."""
    branches = [
        f"{kind}_branch = {kind} () => (float[n, s, 8] {kind}_z) {{{kind}_z = Neg(s)}}" for kind in ("then", "else")
    ]
    lines = ["s = Add(x, r)", f"z = If(take) <{', '.join(branches)}>", "y = RMSNormalization(s, g)"]
    inputs = "float[n, s, 8] p, float[n, s, 8] q, bool take"
    before = build(" ".join(lines), "y, z", inputs=inputs)
    refused(FuseSkipNormalization(), before, "read before", context=FASTER, nested=False)
    after = build(" ".join([lines[0], lines[2], lines[1]]), "y, z", inputs=inputs)
    rewrite(FuseSkipNormalization(), after, context=FASTER, nested=False)


def test_protected_form_can_be_fused() -> None:
    model = build("s = Add(x, r) y = LayerNormalization(s, g, b)")
    split, _ = rewrite(SplitSkipNormalization(), model)
    fused, _ = rewrite(FuseSkipNormalization(), split, context=FASTER)
    assert ops(fused) == {"Exp": 1, "Tanh": 1, MS + "SkipLayerNormalization": 1}


def test_there_and_back() -> None:
    model = build("s = Add(x, r) y = RMSNormalization(s, g)")
    fused, _ = rewrite(FuseSkipNormalization(), model, context=FASTER)
    back, _ = rewrite(SplitSkipNormalization(), fused)
    assert ops(back) == {"Exp": 1, "Tanh": 1, "Add": 1, "RMSNormalization": 1}


def test_external_data(tmp_path: Path) -> None:
    body = f"t = {MS}SkipLayerNormalization(x, r, g, b) y = MatMul(t, w)"
    model = build(body, "float[n, s, 300] y", inputs="float[n, s, 8] p, float[n, s, 8] q, float[8, 300] w")
    value = model.graph.inputs.pop(2)
    value.const_value = ir.tensor(np.ones((8, 300), np.float32), name="w")
    model.graph.register_initializer(value)
    _, outcome = rewrite(SplitSkipNormalization(), with_external_data(model, tmp_path), nested=False)
    assert outcome.changed
