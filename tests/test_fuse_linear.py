"""FuseLinear: scales and biases into weights, Gemm, and where the weight belongs to others too."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.graph import constant
from onnxlathe.passes import FuseLinear
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 30)).astype(np.float32)
CONSTANTS = {
    "w": W,
    "v": RNG.standard_normal((30, 30)).astype(np.float32),
    "b": RNG.standard_normal(30).astype(np.float32),
    "b2": RNG.standard_normal(30).astype(np.float32),
    "v3": RNG.standard_normal((6, 1)).astype(np.float32),
    "c": np.float32(0.25),
    "tiny": np.float32(1e-30),
    "one": np.ones((1, 1, 1, 1), np.float32),
    "matrix": RNG.standard_normal((3, 30)).astype(np.float32),
}


def build(body: str, x: str = "float[n, s, 6]", outputs: str = "y") -> ir.Model:
    words = set(re.findall(r"\w+", body))
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    declared = [f"float[{','.join(map(str, a.shape))}] {name}" for name, a in used.items()]
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]> l ({", ".join([f"{x} x", *declared])}) => ({outputs}) {{ {body} }}'
    )
    return from_text(text, **used)


@pytest.mark.parametrize(
    ("body", "factor"),
    [
        ("p = MatMul(x, w) y = Mul(p, c)", 0.25),
        ("p = MatMul(x, w) y = Mul(c, p)", 0.25),
        ("p = MatMul(x, w) y = Div(p, c)", 4.0),
        ("p = Mul(x, c) y = MatMul(p, w)", 0.25),
        ("p = Div(x, c) y = MatMul(p, w)", 4.0),
    ],
)
def test_scale_goes_into_the_weight(body: str, factor: float) -> None:
    after, outcome = rewrite(FuseLinear(), build(body))
    assert ops(after) == {"MatMul": 1} and outcome.counts == {"scale folded into weight": 1}
    assert np.allclose(constant(next(iter(after.graph)).inputs[1]), W * np.float32(factor))


def test_scales_in_a_row_go_in_one_run() -> None:
    after, outcome = rewrite(FuseLinear(), build("a = Mul(x, c) p = Div(a, c) q = Mul(c, p) y = MatMul(q, w)"))
    assert ops(after) == {"MatMul": 1} and outcome.counts == {"scale folded into weight": 3}


@pytest.mark.parametrize(
    ("body", "factor"),
    [
        ("p = MatMul(x, w) a = Add(p, b) y = Mul(a, c)", 0.25),
        ("p = MatMul(x, w) a = Add(b, p) y = Div(a, c)", 4.0),
        ("p = MatMul(x, w) a = Add(p, b) y = Mul(b2, a)", CONSTANTS["b2"]),
    ],
)
def test_scale_behind_the_bias_goes_into_both(body: str, factor: np.ndarray | float) -> None:
    after, outcome = rewrite(FuseLinear(), build(body))
    assert ops(after) == {"MatMul": 1, "Add": 1} and outcome.counts == {"scale folded into weight": 1}
    product, bias = after.graph
    assert np.allclose(constant(product.inputs[1]), W * factor)
    assert np.allclose(constant(bias.inputs[1]), CONSTANTS["b"] * factor)


def test_one_number_per_column() -> None:
    after, _ = rewrite(FuseLinear(), build("p = MatMul(x, w) y = Mul(p, b)"))
    assert ops(after) == {"MatMul": 1}


@pytest.mark.parametrize("body", ["p = Gemm(x, w, b) y = Mul(p, c)", "p = Gemm<alpha=2.0>(x, w) y = Div(p, c)"])
def test_gemm_scales_by_itself(body: str) -> None:
    """No weight is touched, so one that others read does no harm."""
    model = build(body + " z = MatMul(x, w)", x="float[n, 6]", outputs="y, z")
    after, outcome = rewrite(FuseLinear(), model)
    assert ops(after) == {"Gemm": 1, "MatMul": 1} and outcome.counts == {"scale folded into Gemm": 1}


def test_two_biases_become_one() -> None:
    after, outcome = rewrite(FuseLinear(), build("p = MatMul(x, w) a = Add(p, b) y = Add(b2, a)"))
    assert ops(after) == {"MatMul": 1, "Add": 1} and outcome.counts == {"biases merged": 1}


def test_gemm_for_matrices_only() -> None:
    body = "p = MatMul(x, w) y = Add(p, b)"
    after, _ = rewrite(FuseLinear(), build(body, x="float[n, 6]"))
    assert ops(after) == {"Gemm": 1}
    refused(FuseLinear(), build(body))


def test_all_together() -> None:
    body = "q = Mul(x, c) p = MatMul(q, w) a = Add(p, b) d = Add(a, b2) y = Relu(d)"
    after, _ = rewrite(FuseLinear(), build(body, x="float[n, 6]"))
    assert ops(after) == {"Gemm": 1, "Relu": 1}


NEAR_MISSES = {
    "weight shared": ("p = MatMul(x, w) s = Mul(p, c) q = MatMul(x, w) y = Add(s, q)", "y", "also used elsewhere"),
    "product read elsewhere": ("p = MatMul(x, w) y = Mul(p, c) z = Neg(p)", "y, z", "also used elsewhere"),
    "scaled input read elsewhere": ("p = Mul(x, c) y = MatMul(p, w) z = Neg(p)", "y, z", "also used elsewhere"),
    "constant of higher rank": ("p = MatMul(x, w) y = Mul(p, one)", "y", ""),
    "vector of another axis": ("p = MatMul(x, v3) y = Mul(p, b)", "y", ""),
    "scale behind a shared bias": ("p = MatMul(x, w) a = Add(p, b) y = Mul(a, c)", "y, a", "also used elsewhere"),
    "number out of range": ("p = MatMul(x, w) y = Mul(p, tiny)", "y", "out of the range"),
    "computed weight": ("e = Exp(w) p = MatMul(x, e) y = Mul(p, c)", "y", ""),
    "number over product": ("p = MatMul(x, w) y = Div(c, p)", "y", ""),
    "bias is a matrix": ("p = MatMul(x, w) y = Add(p, matrix)", "y", ""),
    "biased product read elsewhere": ("p = MatMul(x, w) a = Add(p, b) y = Add(a, b2) z = Neg(a)", "y, z", ""),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(case: str) -> None:
    body, outputs, reason = NEAR_MISSES[case]
    feeds = [{"x": np.ones((2, 3, 6), np.float32)}]
    refused(FuseLinear(), build(body, outputs=outputs), reason, feeds=feeds)


def test_product_read_elsewhere_makes_no_gemm() -> None:
    model = build("p = MatMul(x, w) y = Add(p, b) z = Neg(p)", x="float[n, 6]", outputs="y, z")
    refused(FuseLinear(), model, "also used elsewhere")


def test_bias_wider_than_the_product_makes_no_gemm() -> None:
    model = build("p = MatMul(x, v3) y = Add(p, b)", x="float[n, 6]")
    refused(FuseLinear(), model, "one number per column")


def test_quantized_product_makes_no_gemm() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> l (float[n, 6] x, uint8[6, 5] q, float s, float[5] b) => (y)
        { w = DequantizeLinear(q, s) p = MatMul(x, w) y = Add(p, b) }"""
    model = from_text(text, q=np.ones((6, 5), np.uint8), s=np.float32(0.1), b=np.ones(5, np.float32))
    refused(FuseLinear(), model, "quantized")


def test_half_precision_weight_is_not_rounded_again() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> l (float16[n, 6] x, float16[6, 5] w, float16 c)
        => (float16[n, 5] y) { p = MatMul(x, w) y = Mul(p, c) }"""
    model = from_text(text, w=np.ones((6, 5), np.float16), c=np.float16(0.3))
    refused(FuseLinear(), model, "rounded a second time")


def test_external_data(tmp_path: Path) -> None:
    model = with_external_data(build("p = MatMul(x, w) m = MatMul(p, v) y = Mul(m, c)"), tmp_path)
    after, _ = rewrite(FuseLinear(), model, nested=False)
    assert ops(after) == {"MatMul": 2}
    assert isinstance(after.graph.initializers["w"].const_value, ir.ExternalTensor), "not touched, so not loaded"


def test_dead_nodes_are_not_its_business() -> None:
    refused(FuseLinear(), build("dead = Relu(x) y = Tanh(x)"))


def test_a_factor_behind_two_biases() -> None:
    after, outcome = rewrite(FuseLinear(), build("p = MatMul(x, w) q = Add(p, b) r = Add(q, b2) y = Mul(r, c)"))
    assert ops(after) == {"MatMul": 1, "Add": 1}
    assert outcome.counts == {"biases merged": 1, "scale folded into weight": 1}
