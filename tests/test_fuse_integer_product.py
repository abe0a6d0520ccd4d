"""FuseIntegerProduct: integer arithmetic with the bias, QDQ of several spellings, and what stays as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes.fusion.fuse_integer_product import FuseIntegerProduct
from onnxlathe.passes.quantization.quantize_static import QuantizeStatic
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
STEP = FuseIntegerProduct()
CONSTANTS: dict[str, Any] = {
    "sx": np.float32(0.05),
    "zx": np.uint8(120),
    "zi": np.int8(-3),
    "w": RNG.integers(-64, 65, (16, 8)).astype(np.int8),  # 7 bits: no CPU saturates
    "u": RNG.integers(64, 192, (16, 8)).astype(np.uint8),
    "zu": np.uint8(128),
    "sw": RNG.uniform(0.01, 0.02, 8).astype(np.float32),
    "zw": np.zeros(8, np.int8),
    "one": np.float32(0.02),
    "rows": RNG.uniform(0.01, 0.02, 16).astype(np.float32),
    "blocks": RNG.uniform(0.01, 0.02, (2, 8)).astype(np.float32),
    "sv": RNG.uniform(0.01, 0.02, (16,)).astype(np.float32),
    "bias": RNG.standard_normal(8).astype(np.float32),
    "row": RNG.standard_normal((1, 1, 8)).astype(np.float32),
    "number": np.float32(0.5),
    "w3": RNG.integers(-64, 65, (2, 16, 8)).astype(np.int8),
}
KINDS = {"float32": "float", "uint8": "uint8", "int8": "int8"}
X = "q = QuantizeLinear(x, sx, zx) dx = DequantizeLinear(q, sx, zx)"
W = "dw = DequantizeLinear<axis=1>(w, sw, zw)"
FEEDS = [{"x": np.random.default_rng(seed).standard_normal((2, 5, 16)).astype(np.float32)} for seed in range(3)]


def build(body: str, outputs: str = "float[b, n, 8] y", x: str = "float[b, n, 16] x") -> ir.Model:
    words = set(re.findall(r"\w+", body))
    used = {name: value for name, value in CONSTANTS.items() if name in words}
    declared = [f"{KINDS[v.dtype.name]}[{','.join(map(str, v.shape))}] {name}" for name, v in used.items()]
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    model = from_text(f"{head} e ({', '.join([x, *declared])}) => ({outputs}) {{ {body} }}", **used)
    infer_shapes(model)
    return model


def test_is_integer_arithmetic() -> None:
    """Against the sums in NumPy's integers."""
    model = build(f"{X} {W} m = MatMul(dx, dw) y = Add(m, bias)")
    after, outcome = rewrite(STEP, model, feeds=FEEDS)
    assert outcome.counts == {"product on integers with its bias": 1}
    assert ops(after) == {"QuantizeLinear": 1, "com.microsoft.MatMulIntegerToFloat": 1}
    sx, zx, w, sw, b = (CONSTANTS[name] for name in ("sx", "zx", "w", "sw", "bias"))
    codes = np.clip(np.rint(FEEDS[0]["x"] / sx) + zx, 0, 255).astype(np.int64)
    expected = ((codes - int(zx)) @ w.astype(np.int64)) * (np.float64(sx) * sw) + b
    got = run_reference(after, FEEDS[:1])[0]["y"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (f"{X} {W} y = MatMul(dx, dw)", "product on integers"),
        (f"{X} {W} m = MatMul(dx, dw) y = Add(row, m)", "product on integers with its bias"),
        (f"{X} dw = DequantizeLinear(u, one, zu) y = MatMul(dx, dw)", "product on integers"),
        (f"{X} dw = DequantizeLinear<axis=-1>(w, sw) y = MatMul(dx, dw)", "product on integers"),
        (
            f"q = QuantizeLinear(x, sx, zi) dx = DequantizeLinear(q, sx, zi) {W} m = MatMul(dx, dw) y = Add(m, bias)",
            "product on integers with its bias",
        ),
        (f"{X} {W} m = MatMul(dx, dw) y = Add(m, number)", "product on integers"),
        (f"{X} {W} m = MatMul(dx, dw) y = Add(m, bias) t = Tanh(m)", "product on integers"),
    ],
)
def test_spellings(body: str, count: str) -> None:
    outputs = "float[b, n, 8] y, float[b, n, 8] t" if "Tanh" in body else "float[b, n, 8] y"
    after, outcome = rewrite(STEP, build(body, outputs), feeds=FEEDS)
    assert outcome.counts == {count: 1}
    assert "DequantizeLinear" not in ops(after)


def test_weights_and_activations_with_other_readers() -> None:
    body = f"{X} {W} m = MatMul(dx, dw) y = Add(m, bias) t = Tanh(dx) k = MatMul(t, dw)"
    after, outcome = rewrite(STEP, build(body, "float[b, n, 8] y, float[b, n, 8] k"), feeds=FEEDS)
    assert sum(outcome.counts.values()) == 1
    assert ops(after)["DequantizeLinear"] == 2 and ops(after)["MatMul"] == 1


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (
            f"{X} {W} m = MatMul(dx, dw) p = QuantizeLinear(m, sx, zx) y = DequantizeLinear(p, sx, zx)",
            "float[b, n, 8] y",
            "quantized right away",
        ),
        (f"{X} dw = DequantizeLinear<axis=0>(w, rows) y = MatMul(dx, dw)", "float[b, n, 8] y", "for each row"),
        (
            f"{X} dw = DequantizeLinear<axis=0, block_size=8>(w, blocks) y = MatMul(dx, dw)",
            "float[b, n, 8] y",
            "in blocks",
        ),
        (
            f"q = QuantizeLinear<axis=2>(x, sv) dx = DequantizeLinear<axis=2>(q, sv) {W} y = MatMul(dx, dw)",
            "float[b, n, 8] y",
            "more than one scale",
        ),
        (f"{X} dw = DequantizeLinear(w3, one) y = MatMul(dx, dw)", "float[b, n, 8] y", "no matrix"),
    ],
)
def test_refused(body: str, outputs: str, reason: str) -> None:
    refused(STEP, build(body, outputs), reason, feeds=FEEDS)


def test_products_of_activations_and_float_products_stay() -> None:
    body = f"{X} t = Transpose<perm=[0, 2, 1]>(dx) m = MatMul(dx, t) y = Identity(m)"
    model = build(body, "float[b, n, n] y")
    outcome = STEP(model, PassContext())
    assert not outcome.changed and not outcome.refusals


def test_external_data(tmp_path: Path) -> None:
    model = with_external_data(build(f"{X} {W} m = MatMul(dx, dw) y = Add(m, bias)"), tmp_path)
    _, outcome = rewrite(STEP, model, feeds=FEEDS)
    assert outcome.changed


def test_nothing_on_cuda() -> None:
    model = build(f"{X} {W} y = MatMul(dx, dw)")
    outcome = STEP(model, PassContext(device="cuda"))
    assert not outcome.changed and "CUDA" in outcome.notes[0]


def test_after_quantize_static() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[b, n, 16] x, float[16, 8] w, float[8] b)
        => (float[b, n, 8] y) { m = MatMul(x, w) y = Add(m, b) }"""
    array = np.random.default_rng(1).standard_normal
    model = from_text(text, w=array((16, 8)).astype(np.float32), b=array(8).astype(np.float32))
    QuantizeStatic(reduced=True)(model, PassContext(feeds=FEEDS))
    after, outcome = rewrite(STEP, model, feeds=FEEDS)
    assert outcome.counts == {"product on integers with its bias": 1}
    assert ops(after) == {"QuantizeLinear": 1, "com.microsoft.MatMulIntegerToFloat": 1}
