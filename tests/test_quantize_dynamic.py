"""QuantizeDynamic against the operators' definitions in NumPy and against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes.quantization.quantize_dynamic import QuantizeDynamic
from rewriting import from_text, ops, refused, rewrite

_RNG = np.random.default_rng(0)


def constant(*shape: int) -> Any:
    return (_RNG.standard_normal(shape) * 0.3).astype(np.float32)


def build(body: str, inputs: str = "float[b, n, 16] x", outputs: str = "float y", **arrays: Any) -> ir.Model:
    names = "".join(f", float{list(array.shape)} {name}" for name, array in arrays.items())
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}{names}) => ({outputs}) {{ {body} }}'
    return from_text(text, **arrays)


def dynamic(x: Any) -> tuple[Any, Any, int]:
    """DynamicQuantizeLinear by its definition: quantized, scale, zero point."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = np.float32((high - low) / 255)
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64), scale, zero


@pytest.mark.parametrize("per_channel", [False, True])
def test_integer_arithmetic(per_channel: bool) -> None:
    w, b = constant(16, 24), constant(24)
    model = build("m = MatMul(x, w) y = Add(b, m)", w=w, b=b)
    step = QuantizeDynamic(per_channel=per_channel, reduced=True)
    after, outcome = rewrite(step, model, tolerance=0.05)
    assert outcome.counts == {"MatMul on integers": 1}
    assert ops(after) == {"DynamicQuantizeLinear": 1, "com.microsoft.MatMulIntegerToFloat": 1}
    stored = {name: v.const_value.numpy() for name, v in after.graph.initializers.items() if v.const_value}
    x = _RNG.standard_normal((2, 3, 16)).astype(np.float32)
    qx, sx, zx = dynamic(x)
    expected = ((qx - zx) @ stored["w_quantized"].astype(np.int64)) * (np.float64(sx) * stored["w_scale"]) + b
    got = run_reference(after, [{"x": x}])[0]["y"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_one_quantization_for_all_readers() -> None:
    model = build("q = MatMul(x, w) k = MatMul(x, v) y = Add(q, k)", w=constant(16, 8), v=constant(16, 8))
    after, _ = rewrite(QuantizeDynamic(), model, tolerance=0.05)
    assert ops(after) == {"DynamicQuantizeLinear": 1, "com.microsoft.MatMulIntegerToFloat": 2, "Add": 1}


def test_an_unknown_shape_is_not_taken_for_a_scalar() -> None:
    model = build("a = Neg(x) y = MatMul(a, w)", w=constant(16, 8))
    for node in model.graph:
        node.outputs[0].shape, node.outputs[0].dtype = None, ir.DataType.FLOAT
    QuantizeDynamic()(model, PassContext())
    quantize = next(node for node in model.graph if node.op_type == "DynamicQuantizeLinear")
    assert quantize.outputs[0].shape is None
    assert run_reference(model, [{"x": np.ones((1, 2, 16), np.float32)}])[0]["y"].shape == (1, 2, 8)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int) -> None:
    w = constant(8, 16) if transposed else constant(16, 8)
    model = build(f"y = Gemm<transB={transposed}>(x, w, b)", "float[n, 16] x", w=w, b=constant(8))
    after, _ = rewrite(QuantizeDynamic(), model, tolerance=0.05)
    assert ops(after) == {"DynamicQuantizeLinear": 1, "com.microsoft.MatMulIntegerToFloat": 1}


def test_a_bias_that_is_no_vector_stays_outside() -> None:
    model = build("m = MatMul(x, w) y = Add(m, b)", "float[2, 3, 16] x", w=constant(16, 8), b=constant(3, 8))
    after, _ = rewrite(QuantizeDynamic(), model, tolerance=0.05)
    assert ops(after)["Add"] == 1


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_against_torch(bidirectional: bool) -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(8, 6, bidirectional=bidirectional)
    directions = 2 if bidirectional else 1
    suffixes = ["", "_reverse"][:directions]

    def gates(name: str) -> Any:
        """torch's gates i f g o in ONNX's order i o f c."""
        parts = [getattr(lstm, f"{name}_l0{suffix}").detach().numpy() for suffix in suffixes]
        return np.stack([np.concatenate([p[:6], p[18:], p[6:12], p[12:18]]) for p in parts])

    bias = np.concatenate([gates("bias_ih"), gates("bias_hh")], axis=1)
    direction = "bidirectional" if bidirectional else "forward"
    body = f'y = LSTM<hidden_size=6, direction="{direction}">(x, w, r, b)'
    model = build(body, "float[s, 2, 8] x", w=gates("weight_ih"), r=gates("weight_hh"), b=bias)
    feeds = [{"x": _RNG.standard_normal((5, 2, 8)).astype(np.float32)}]
    after, outcome = rewrite(QuantizeDynamic(), model, feeds=feeds, tolerance=0.05)
    assert outcome.counts == {"LSTM on integers": 1}
    with torch.no_grad():
        expected = lstm(torch.from_numpy(feeds[0]["x"]))[0].numpy()
    got = run_reference(after, feeds)[0]["y"].transpose(0, 2, 1, 3).reshape(expected.shape)
    assert np.abs(got - expected).max() < 0.03


def test_tables() -> None:
    model = build("y = Gather(t, i)", "int64[n] i", "float[n, 16] y", t=constant(500, 16))
    after, _ = rewrite(QuantizeDynamic(), model, tolerance=0.01)
    assert list(ops(after)) == ["com.microsoft.GatherBlockQuantized"]
    assert not rewrite(QuantizeDynamic(embeddings=False), model)[1].changed


@pytest.mark.parametrize(
    ("body", "inputs", "reason"),
    [
        ("y = MatMul(x, x)", "float[16, 16] x", "only products"),
        ("y = MatMul(w, x)", "float[16, n] x", "only products"),
        ("y = Gemm<transA=1>(x, w)", "float[16, n] x", "transposed"),
        ("y = Gemm<alpha=0.5>(x, w)", "float[n, 16] x", "alpha"),
        ("y = MatMul(x, bad)", "float[n, 16] x", "NaN"),
        ("y = Conv(x, c)", "float[n, 2, 4, 4] x", "quantize-static"),
        ("y = GRU<hidden_size=2>(x, g, h)", "float[s, n, 3] x", "no integer kernel for GRU"),
    ],
)
def test_refusals(body: str, inputs: str, reason: str) -> None:
    arrays = dict(w=constant(16, 16), bad=np.full((16, 4), np.nan, np.float32), c=constant(3, 2, 1, 1))
    arrays |= dict(g=constant(1, 6, 3), h=constant(1, 6, 2))
    used = {name: array for name, array in arrays.items() if f" {name}" in body or f"({name}" in body}
    step = QuantizeDynamic()
    model = build(body, inputs, **used)
    if "bad" in used:
        outcome = step(model, PassContext())
        assert not outcome.changed and reason in outcome.refusals[0].reason
    else:
        refused(step, model, reason)


def test_exclude_and_cuda() -> None:
    model = build("y = MatMul(x, w)", w=constant(16, 8))
    refused(QuantizeDynamic(exclude=("MatMul",)), model, "include or exclude")
    outcome = QuantizeDynamic()(model, PassContext(device="cuda"))
    assert not outcome.changed and "CUDA" in outcome.notes[0]
