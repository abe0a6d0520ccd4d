"""CorrectBias: against the equation of the paper, in a chain, int32 biases, padding, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized import quantize

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import constant
from onnxlathe.compiler.verify import check_structure, run_reference
from onnxlathe.passes import CorrectBias
from onnxlathe.runtime.errors import PassError
from onnxlathe.runtime.inference import expose
from rewriting import from_text

RNG = np.random.default_rng(0)
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def array(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


W1, B1, W2, B2 = array(10, 16), array(16), array(16, 6), array(6)
CHAIN = f"""{HEAD} c (float[n, s, 10] x, float[10, 16] w1, float[16] b1, float[16, 6] w2, float[6] b2) => (y) {{
  p = MatMul(x, w1) h = Add(p, b1) r = Relu(h) q = MatMul(r, w2) y = Add(b2, q) }}"""
FEEDS = [{"x": (np.random.default_rng(seed).random((2, 20, 10)) + 0.5).astype(np.float32)} for seed in range(6)]


def chain() -> ir.Model:
    return from_text(CHAIN, w1=W1, b1=B1, w2=W2, b2=B2)


def correct(model: ir.Model, quantized: ir.Model, feeds: list) -> tuple[ir.Model, dict]:
    after = quantized.clone()
    outcome = CorrectBias(reference=model)(after, PassContext(feeds=feeds))
    check_structure(after)
    again = after.clone()
    assert not CorrectBias(reference=model)(again, PassContext(feeds=feeds)).changed
    return after, dict(outcome.counts)


def test_the_equation_of_the_paper() -> None:
    """Only weights quantized, one layer: b' = b - (W_hat - W) E[x]."""
    text = f"{HEAD} c (float[n, s, 10] x, float[10, 16] w1, float[16] b1) => (y) {{ p = MatMul(x, w1) y = Add(p, b1) }}"
    model = from_text(text, w1=W1, b1=B1)
    quantized = quantize(model, FEEDS, bits=4, activations=False)
    after, counts = correct(model, quantized, FEEDS)
    assert counts == {"biases corrected": 1}
    scale = np.abs(W1).max(0) / 7
    w_hat = np.clip(np.rint(W1 / scale), -7, 7) * scale
    mean = np.concatenate([feed["x"].reshape(-1, 10) for feed in FEEDS]).mean(0)
    got = constant(after.graph[-1].inputs[1])
    assert np.allclose(got, B1 - mean @ (w_hat - W1), atol=1e-5)
    assert "b1" not in after.graph.initializers and "b1" in quantized.graph.initializers


def test_a_chain_has_no_shift_left_anywhere() -> None:
    """The second bias takes in what is left of the first layer's error: sequential."""
    model = chain()
    quantized = quantize(model, FEEDS, bits=4)
    after, counts = correct(model, quantized, FEEDS)
    assert counts == {"biases corrected": 2}
    before = shifts(model, quantized)
    now = shifts(model, after)
    assert all(now[name] < 0.02 * before[name] for name in ("h", "y"))
    assert noise(model, after) < 0.7 * noise(model, quantized)


def shifts(model: ir.Model, other: ir.Model) -> dict[str, float]:
    a, b = (run_reference(expose(item, ["h"]), FEEDS) for item in (model, other))
    means = {name: [np.mean([r[name].mean((0, 1)) for r in rows], 0) for rows in (a, b)] for name in ("h", "y")}
    return {name: float(np.linalg.norm(x - y)) for name, (x, y) in means.items()}


def noise(model: ir.Model, other: ir.Model) -> float:
    feeds = [
        {"x": (np.random.default_rng(seed).random((2, 20, 10)) + 0.5).astype(np.float32)} for seed in range(50, 54)
    ]
    pairs = zip(run_reference(model, feeds), run_reference(other, feeds), strict=True)
    return float(sum(np.square(a["y"] - b["y"]).sum() for a, b in pairs))


@pytest.mark.parametrize("bias", [False, True])
def test_conv_with_padding(bias: bool) -> None:
    """Padding lowers E[x] at the borders: the mean over real positions is what counts; int32 biases are rounded."""
    text = f"""{HEAD} c (float[n, 3, 5, 5] x, float[8, 3, 3, 3] w, float[8] b) => (y) {{
      y = Conv<pads=[1,1,1,1]>(x, w, b) }}"""
    model = from_text(text, w=array(8, 3, 3, 3), b=array(8))
    feeds = [{"x": (np.random.default_rng(seed).random((4, 3, 5, 5)) + 1).astype(np.float32)} for seed in range(4)]
    quantized = quantize(model, feeds, bits=4, bias=bias)
    after, counts = correct(model, quantized, feeds)
    assert counts == {"biases corrected": 1}
    exact, got = (np.concatenate([r["y"] for r in run_reference(m, feeds)]) for m in (model, after))
    step = 1e-3 if bias else 1e-5
    assert np.abs((exact - got).mean((0, 2, 3))).max() < step
    if bias:
        assert constant(after.graph.initializers["b_quantized"]).dtype == np.int32


def test_gemm() -> None:
    text = f"{HEAD} c (float[n, 10] x, float[10, 16] w1, float[16] b1) => (y) {{ y = Gemm(x, w1, b1) }}"
    feeds = [{"x": feed["x"].reshape(-1, 10)} for feed in FEEDS]
    model = from_text(text, w1=W1, b1=B1)
    assert correct(model, quantize(model, feeds, bits=4), feeds)[1] == {"biases corrected": 1}


def test_a_bias_of_others_stays() -> None:
    text = f"""{HEAD} c (float[n, s, 10] x, float[10, 16] w1, float[16] b1) => (y, z) {{
      p = MatMul(x, w1) y = Add(p, b1) z = Relu(b1) }}"""
    model = from_text(text, w1=W1, b1=B1)
    after, counts = correct(model, quantize(model, FEEDS, bits=4), FEEDS)
    assert counts and np.array_equal(run_reference(after, FEEDS[:1])[0]["z"], np.maximum(B1, 0))


def test_what_is_refused() -> None:
    text = f"{HEAD} c (float[n, s, 10] x, float[10, 16] w1) => (y) {{ y = MatMul(x, w1) }}"
    model = from_text(text, w1=W1)
    quantized = quantize(model, FEEDS)
    outcome = CorrectBias(reference=model)(quantized, PassContext(feeds=FEEDS))
    assert not outcome.changed and outcome.refusals[0].reason == "it has no bias"
    with pytest.raises(PassError, match="needs the float model"):
        CorrectBias()(quantized, PassContext(feeds=FEEDS))
    with pytest.raises(PassError, match="needs calibration samples"):
        CorrectBias(reference=model)(quantized, PassContext())
    renamed = chain()
    next(node for node in renamed.graph if node.outputs[0].name == "h").outputs[0].name = "other"
    outcome = CorrectBias(reference=renamed)(quantize(chain(), FEEDS, bits=4), PassContext(feeds=FEEDS))
    assert any("no value h" in refusal.reason for refusal in outcome.refusals)
