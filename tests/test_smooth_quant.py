"""SmoothQuant: the same meaning, where the factor goes, what is refused, and a block with outliers that it rescues."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import constant
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes import SmoothQuant
from onnxlathe.runtime.errors import PassError
from rewriting import from_text, inside_if, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
OUTLIERS = np.ones(16)
OUTLIERS[[3, 9]] = 60.0


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "g": (OUTLIERS * RNG.uniform(0.8, 1.2, 16)).astype(np.float32),
    "b": array(16),
    "wq": array(16, 12) / 4,
    "wk": array(16, 12) / 4,
    "wt": array(12, 16) / 4,
    "bq": array(12),
    "up": (array(16, 16) / 4 * OUTLIERS).astype(np.float32),
    "gate": array(16, 16) / 4,
    "wide": (array(16, 8) / 4 * OUTLIERS[:8]).astype(np.float32),
    "half": array(16, 12).astype(np.float16),
    "shift": np.float32(0.1),
}
FEEDS = [{"x": np.random.default_rng(seed).standard_normal((2, 9, 16)).astype(np.float32)} for seed in range(4)]
CONTEXT = PassContext(feeds=FEEDS)


def build(body: str, outputs: str = "y", x: str = "float[n, s, 16] x") -> ir.Model:
    words = set(re.findall(r"\w+", body))
    used = {name: value for name, value in CONSTANTS.items() if name in words}
    kinds = {np.dtype(np.float32): "float", np.dtype(np.float16): "float16"}
    declared = [f"{kinds[v.dtype]}[{','.join(map(str, v.shape))}] {name}" for name, v in used.items()]
    head = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    model = from_text(f"{head} e ({', '.join([x, *declared])}) => ({outputs}) {{ {body} }}", **used)
    for node in model.graph:
        if (
            node.op_type.endswith("LayerNormalization") or node.op_type == "MultiHeadAttention"
        ):  # contrib operators, for which onnx infers no types
            node.outputs[0].type, node.outputs[0].shape = node.inputs[0].type, model.graph.inputs[0].shape
    infer_shapes(model)
    return model


NORM = "h = LayerNormalization(x, g, b)"


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (f"{NORM} q = MatMul(h, wq) y = Add(q, bq)", "LayerNormalization"),
        (f"{NORM} q = MatMul(h, wq) k = MatMul(h, wk) y = Add(q, k)", "LayerNormalization"),
        ("h = RMSNormalization(x, g) y = MatMul(h, wq)", "RMSNormalization"),
        ("r = Relu(x) h = com.microsoft.SkipSimplifiedLayerNormalization(x, r, g) y = MatMul(h, wq)", "SkipSim"),
        (
            "r = Relu(x) h = com.microsoft.SkipLayerNormalization(x, r, g, b) y = MatMul(h, wq)",
            "SkipLayerNormalization",
        ),
        ("t = Tanh(x) m = Mul(t, g) h = Add(m, shift) y = MatMul(h, wq)", "Add"),
        ("u = MatMul(x, up) h = Relu(u) y = MatMul(h, wq)", "MatMul"),
        (
            "u = MatMul(x, up) c = MatMul(x, gate) s = Sigmoid(c) a = Mul(c, s) h = Mul(a, u) y = MatMul(h, wq)",
            "MatMul",
        ),
        ("v = MatMul(x, up) h = Attention<q_num_heads=4, kv_num_heads=4>(x, x, v) y = MatMul(h, wq)", "MatMul"),
        ("v = MatMul(x, up) h = com.microsoft.MultiHeadAttention<num_heads=2>(x, x, v) y = MatMul(h, wq)", "MatMul"),
    ],
)
def test_folded(body: str, rule: str) -> None:
    model = build(body)
    after, outcome = rewrite(SmoothQuant(), model, feeds=FEEDS, context=CONTEXT, nested=False)
    assert len(outcome.counts) == 1 and next(iter(outcome.counts)).startswith(f"folded into {rule}")
    assert ops(after) == ops(model)


def test_gemm() -> None:
    feeds = [{"x": sample["x"].reshape(-1, 16)} for sample in FEEDS]
    model = build(f"{NORM} y = Gemm<transB=1, alpha=0.5>(h, wt, bq)", x="float[n, 16] x")
    _, outcome = rewrite(SmoothQuant(), model, feeds=feeds, context=PassContext(feeds=feeds), nested=False)
    assert outcome.counts == {"folded into LayerNormalization": 1}


def test_the_gate_is_left_alone() -> None:
    """In silu(g) * u only u is linear: the projection of g keeps its weight."""
    body = "u = MatMul(x, up) c = MatMul(x, gate) s = Sigmoid(c) a = Mul(c, s) h = Mul(a, u) y = MatMul(h, wq)"
    after, _ = rewrite(SmoothQuant(), build(body), feeds=FEEDS, context=CONTEXT, nested=False)
    assert np.array_equal(constant(after.graph.initializers["gate"]), CONSTANTS["gate"])
    assert "up" not in after.graph.initializers


def test_alpha_by_the_formula() -> None:
    """alpha = 0.5: the equation of the paper, one s for both readers."""
    model = build(f"{NORM} q = MatMul(h, wq) k = MatMul(h, wk) y = Add(q, k)")
    after, _ = rewrite(SmoothQuant(alpha=0.5), model, feeds=FEEDS, context=CONTEXT, nested=False)
    hidden = np.concatenate([_layer_norm(sample["x"]).reshape(-1, 16) for sample in FEEDS])
    w = np.maximum(np.abs(CONSTANTS["wq"]).max(1), np.abs(CONSTANTS["wk"]).max(1))
    s = np.sqrt(np.abs(hidden).max(0) / w)
    norm = next(iter(after.graph))
    assert np.allclose(constant(norm.inputs[1]), CONSTANTS["g"] / s, rtol=1e-4)
    assert np.allclose(constant(norm.inputs[2]), CONSTANTS["b"] / s, rtol=1e-4)
    for node, name in zip([n for n in after.graph if n.op_type == "MatMul"], ("wq", "wk"), strict=True):
        assert np.allclose(constant(node.inputs[1]), CONSTANTS[name] * s[:, None], rtol=1e-4)


def _layer_norm(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normal * CONSTANTS["g"] + CONSTANTS["b"]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (f"{NORM} q = MatMul(h, wq) y = Add(q, bq) z = Add(h, x)", "y, z", "also read by Add"),
        (f"{NORM} y = MatMul(h, wq)", "y, h", "the caller"),
        ("y = MatMul(x, wq)", "y", "input of the graph"),
        ("u = MatMul(x, up) h = Gelu(u) y = MatMul(h, wq)", "y", "Gelu"),
        ("r = Relu(x) h = Add(x, r) y = MatMul(h, wq)", "y", "sum of two values"),
        (f"{NORM} c = Cast<to=10>(h) y = MatMul(c, half)", "float16[n, s, 12] y", "not float32"),
        (f"{NORM} q = MatMul(h, wq) t = Tanh(x) k = MatMul(t, wq) y = Add(q, k)", "y", "also used elsewhere"),
        (
            "v = MatMul(x, wide) h = Attention<q_num_heads=4, kv_num_heads=2>(x, v, v) y = MatMul(h, wq)",
            "y",
            "read the same values",
        ),
        (
            "v = MatMul(x, up) h, k, c = Attention<q_num_heads=4, kv_num_heads=4>(x, x, v) y = MatMul(h, wq)",
            "y, float[n, 4, s, 4] c",
            "a cache",
        ),
        ("t = Tanh(x) h = LayerNormalization<axis=1>(t, plane) y = MatMul(h, wq)", "y", "more than the last axis"),
    ],
)
def test_left_alone(body: str, outputs: str, reason: str) -> None:
    if "plane" in body:
        CONSTANTS["plane"] = np.ones((9, 16), np.float32) * OUTLIERS.astype(np.float32)
    model = build(body, outputs)
    refused(SmoothQuant(), model, reason, feeds=FEEDS, context=CONTEXT, nested=False)


def test_nothing_to_gain_is_refused() -> None:
    """Even channels: no s lowers the error by more than chance."""
    rows = np.sign(RNG.standard_normal((512, 16))).astype(np.float32)
    weight = np.sign(array(16, 12))
    text = '<ir_version: 10, opset_import: ["" : 20]> e (float[n, 16] x, float[16] one, float[16, 12] w) => (y) {'
    model = from_text(f"{text} h = Mul(x, one) y = MatMul(h, w) }}", one=np.ones(16, np.float32), w=weight)
    context = PassContext(feeds=[{"x": rows}])
    refused(SmoothQuant(), model, "does not pay", feeds=[{"x": rows}], context=context, nested=False)


def test_a_mul_where_it_pays() -> None:
    model = build(f"{NORM} q = MatMul(h, wq) y = Add(q, bq) z = Add(h, x)", "y, z")
    step = SmoothQuant(multiply="where-it-pays")
    after, outcome = rewrite(step, model, feeds=FEEDS, context=CONTEXT, nested=False)
    assert outcome.counts == {"Mul in front": 1} and ops(after)["Mul"] == 1


def test_subgraphs_are_refused() -> None:
    inner = inside_if(build(f"{NORM} y = MatMul(h, wq)"))
    outcome = SmoothQuant()(inner, CONTEXT)
    assert not outcome.changed and "in a subgraph" in outcome.refusals[0].reason


def test_needs_samples_and_a_sensible_alpha() -> None:
    with pytest.raises(PassError, match="needs calibration samples"):
        SmoothQuant()(build(f"{NORM} y = MatMul(h, wq)"), PassContext())
    with pytest.raises(PassError, match=r"0\.\.1"):
        lathe.compile(build(f"{NORM} y = MatMul(h, wq)"), [lathe.passes.presets.make_pass("smooth-quant", alpha=2.0)])


def test_external_data(tmp_path: Path) -> None:
    model = with_external_data(build(f"{NORM} y = MatMul(h, wq)"), tmp_path)
    assert rewrite(SmoothQuant(), model, feeds=FEEDS, context=CONTEXT, nested=False)[1].changed


def test_rescues_a_block_with_outliers() -> None:
    """W8A8 of a pre-normalization block whose activations have outliers of 60 times: a third of the error or less."""
    model, feeds, held_out = outlier_block()
    after, outcome = rewrite(
        SmoothQuant(), model, feeds=feeds, context=PassContext(feeds=feeds), nested=False, tolerance=1e-5
    )
    assert sum(outcome.counts.values()) == 2
    before, smoothed = w8a8_error(model, feeds, held_out), w8a8_error(after, feeds, held_out)
    assert smoothed < before / 3, f"{before:.4f} -> {smoothed:.4f}"


def outlier_block() -> tuple[ir.Model, list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Norm, gated feed-forward, residual: hidden 64, 128 inside, two outlier channels, as language models have."""
    rng = np.random.default_rng(1)

    def make(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    gain = np.ones(64, np.float32)
    gain[[7, 40]] = 60
    inner = np.ones(128, np.float32)
    inner[[5, 90]] = 40
    up, down = make(64, 128) * inner, make(128, 64)
    weights = {"gain": gain, "up": up, "gate": make(64, 128), "down": down}
    weights["up"][[7, 40]] /= 60
    weights["gate"][[7, 40]] /= 60
    text = """<ir_version: 10, opset_import: ["" : 23]> block
    (float[n, s, 64] x, float[64] gain, float[64, 128] up, float[64, 128] gate, float[128, 64] down)
    => (float[n, s, 64] y) {
      h = RMSNormalization(x, gain) u = MatMul(h, up) c = MatMul(h, gate) s1 = Sigmoid(c) a = Mul(c, s1)
      p = Mul(a, u) d = MatMul(p, down) y = Add(x, d) }"""
    samples = [{"x": rng.standard_normal((2, 32, 64)).astype(np.float32)} for _ in range(8)]
    return from_text(text, **weights), samples[:6], samples[6:]


def w8a8_error(model: ir.Model, feeds: list, held_out: list) -> float:
    """Relative error of y with every MatMul's operands rounded to 8 bits: ranges from feeds, per-tensor activations."""
    w = {name: constant(value) for name, value in model.graph.initializers.items()}
    matmuls = [next(w[i.name] for i in node.inputs if i.name in w) for node in model.graph if node.op_type == "MatMul"]
    gain = constant(next(iter(model.graph)).inputs[1])

    def block(x: np.ndarray, rounded: bool, ranges: dict) -> np.ndarray:
        def product(value: np.ndarray, weight: np.ndarray, name: str) -> np.ndarray:
            if rounded:
                value = fake_activation(value, *ranges[name])
                weight = fake_weight(weight.T).T
            else:
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = (min(low, float(value.min())), max(high, float(value.max())))
            return value @ weight

        h = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * gain
        u, c = product(h, matmuls[0], "h"), product(h, matmuls[1], "h")
        return x + product(c / (1 + np.exp(-c)) * u, matmuls[2], "p")

    ranges: dict = {}
    for sample in feeds:
        block(sample["x"].astype(np.float64), False, ranges)
    exact = [result["y"] - sample["x"] for result, sample in zip(run_reference(model, held_out), held_out, strict=True)]
    got = [block(sample["x"].astype(np.float64), True, ranges) - sample["x"] for sample in held_out]
    return float(np.linalg.norm(np.stack(got) - np.stack(exact)) / np.linalg.norm(np.stack(exact)))


def fake_weight(weight: np.ndarray) -> np.ndarray:
    """[outputs, inputs] rounded to int8, one symmetric scale per output."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    return np.rint(weight / scale) * scale


def fake_activation(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """x rounded to uint8 over [low, high]."""
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def test_what_is_smoothed_stays() -> None:
    """Other samples would move the factors again, and again."""
    model = build(f"{NORM} q = MatMul(h, wq) y = Add(q, bq)")
    after, _ = rewrite(SmoothQuant(alpha=0.2), model, feeds=FEEDS, context=CONTEXT, nested=False)
    outcome = SmoothQuant(alpha=0.5)(after, CONTEXT)
    assert not outcome.changed and "smoothed already" in outcome.refusals[0].reason
