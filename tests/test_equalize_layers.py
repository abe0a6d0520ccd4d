"""EqualizeLayers: the same meaning, equal channels on both sides, help for per-tensor weights, and what is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.graph import constant
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes import EqualizeLayers
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
SPREAD = np.exp(RNG.uniform(-4, 4, 16))


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "w1": (array(8, 16) * SPREAD).astype(np.float32),
    "b1": array(16),
    "w2": array(16, 5),
    "wt": array(5, 16),
    "w3": array(5, 16),
    "b2": array(5),
    "one": np.float32(0.3),
    "zero": np.float32(0),
    "six": np.float32(6),
    "slope": np.float32(0.1) * np.abs(array(16)),
    "k1": (array(16, 3, 3, 3) * SPREAD[:, None, None, None]).astype(np.float32),
    "k2": array(6, 16, 3, 3),
    "depth": array(16, 1, 3, 3),
    "grouped": array(8, 4, 3, 3),
    "bias": array(16, 1, 1),
}
MATMUL, CONV = "float[n, s, 8] x", "float[n, 3, 9, 9] x"


def build(body: str, x: str = MATMUL, outputs: str = "y") -> ir.Model:
    words = set(re.findall(r"\w+", body))
    used = {name: value for name, value in CONSTANTS.items() if name in words}
    declared = [f"float[{','.join(map(str, value.shape))}] {name}" for name, value in used.items()]
    text = f'<ir_version: 10, opset_import: ["" : 20]> e ({", ".join([x, *declared])}) => ({outputs}) {{ {body} }}'
    return from_text(text, **used)


@pytest.mark.parametrize(
    ("body", "x"),
    [
        ("p = MatMul(x, w1) a = Add(p, b1) r = Relu(a) y = MatMul(r, w2)", MATMUL),
        ("p = MatMul(x, w1) a = Add(one, p) r = LeakyRelu(a) y = MatMul(r, w2)", MATMUL),
        ("p = MatMul(x, w1) r = PRelu(p, slope) y = MatMul(r, w2)", MATMUL),
        ("p = MatMul(x, w1) r = Clip(p, zero) y = MatMul(r, w2)", MATMUL),
        ("p = MatMul(x, w1) y = MatMul(p, w2)", MATMUL),
        ("p = Gemm<alpha=2.0>(x, w1, b1) r = Relu(p) y = Gemm<transB=1>(r, wt, b2)", "float[n, 8] x"),
        ("p = Conv<pads=[1,1,1,1]>(x, k1, b1) r = Relu(p) y = Conv(r, k2)", CONV),
        ("p = Conv(x, k1) a = Add(p, bias) r = Relu(a) y = Conv<group=16>(r, depth, b1)", CONV),
        ("p = Conv(x, k1) a = Add(p, one) m = MaxPool<kernel_shape=[2,2]>(a) y = Conv<group=4>(m, grouped)", CONV),
    ],
)
def test_meaning_kept_and_channels_equal(body: str, x: str) -> None:
    after, outcome = rewrite(EqualizeLayers(), build(body, x))
    assert sum(outcome.counts.values()) == 1 and not outcome.refusals
    assert ops(after) == ops(build(body, x))
    first, second = (node for node in after.graph if node.op_type in ("MatMul", "Gemm", "Conv"))
    ranges = [channels(first, True), channels(second, False)]
    assert np.allclose(ranges[0], ranges[1], rtol=1e-3)


def channels(node: ir.Node, outputs: bool) -> np.ndarray:
    """Largest weight of each output or input channel, read from the definition of the operators."""
    weight = np.abs(constant(node.inputs[1]))
    if node.op_type == "Conv":
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        if outputs:
            return weight.max(axis=(1, 2, 3))
        per_group = np.split(weight, groups)
        return np.concatenate([part.max(axis=(0, 2, 3)) for part in per_group])
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
    matrix = weight.T if transposed else weight
    return matrix.max(axis=0 if outputs else 1)


def test_a_chain_settles() -> None:
    body = "p = MatMul(x, w1) r = Relu(p) q = MatMul(r, w2) t = Relu(q) y = MatMul(t, w3)"
    after, outcome = rewrite(EqualizeLayers(), build(body))
    assert outcome.counts == {"MatMul and MatMul": 2}
    nodes = [node for node in after.graph if node.op_type == "MatMul"]
    for first, second in itertools.pairwise(nodes):
        assert np.allclose(channels(first, True), channels(second, False), rtol=1e-2)


def test_dead_channels_keep_their_scale() -> None:
    dead = CONSTANTS["w1"].copy()
    dead[:, 3] = 0
    model = build("p = MatMul(x, w1) r = Relu(p) y = MatMul(r, w2)")
    model.graph.initializers["w1"].const_value = ir.tensor(dead, name="w1")
    after, _ = rewrite(EqualizeLayers(), model)
    second = [node for node in after.graph if node.op_type == "MatMul"][1]
    assert np.array_equal(constant(second.inputs[1])[3], CONSTANTS["w2"][3])


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("p = MatMul(x, w1) r = Clip(p, zero, six) y = MatMul(r, w2)", "y", "Clip"),
        ("p = MatMul(x, w1) r = Gelu(p) y = MatMul(r, w2)", "y", "Gelu"),
        ("p = MatMul(x, w1) r = Relu(p) y = MatMul(r, w2)", "y, r", "also used elsewhere"),
        ("p = MatMul(x, w1) r = Relu(p) y = MatMul(r, w2)", "y, p", "also used elsewhere"),
        ("p = MatMul(x, w1) r = Relu(p) q = MatMul(r, w2) y = MatMul(x, w1)", "y, q", "also used elsewhere"),
        ("p = MatMul(x, w1) t = Relu(p) r = Add(p, t) y = MatMul(r, w2)", "y", "sum of two values"),
        (
            "p = MatMul(x, w1) r = Transpose<perm=[0,2,1]>(p) t = Transpose<perm=[0,2,1]>(r) y = MatMul(t, w2)",
            "y",
            "Tr",
        ),
    ],
)
def test_left_alone(body: str, outputs: str, reason: str) -> None:
    refused(EqualizeLayers(), build(body, outputs=outputs), reason)


def test_shared_bias_stays_for_the_others() -> None:
    model = build(
        "p = MatMul(x, w1) a = Add(p, b1) r = Relu(a) y = MatMul(r, w2) z = Relu(b1)", outputs="y, float[16] z"
    )
    after, outcome = rewrite(EqualizeLayers(), model)
    assert outcome.changed and "b1" in after.graph.initializers


def test_external_data(tmp_path: Path) -> None:
    model = with_external_data(build("p = MatMul(x, w1) r = Relu(p) y = MatMul(r, w2)"), tmp_path)
    assert rewrite(EqualizeLayers(), model)[1].changed


def test_helps_one_scale_per_tensor() -> None:
    """Channels e^8 apart that the next layer undoes: with one scale per weight the error falls at least 10 times."""
    model = build("p = Conv<pads=[1,1,1,1]>(x, k1, b1) r = Relu(p) y = Conv(r, k2)", CONV)
    undone = (CONSTANTS["k2"] / SPREAD[:, None, None]).astype(np.float32)
    model.graph.initializers["k2"].const_value = ir.tensor(undone, name="k2")
    after, _ = rewrite(EqualizeLayers(), model)
    feeds = [{"x": array(4, 3, 9, 9)}]
    exact = run_reference(model, feeds)[0]["y"]

    def error(source: ir.Model) -> float:
        copy = source.clone()
        for node in copy.graph:
            if node.op_type == "Conv":
                value = node.inputs[1]
                scale = np.abs(constant(value)).max() / 127
                rounded = (np.rint(constant(value) / scale) * scale).astype(np.float32)
                value.const_value = ir.tensor(rounded, name=value.name)
        return float(np.linalg.norm(run_reference(copy, feeds)[0]["y"] - exact) / np.linalg.norm(exact))

    assert error(after) < error(model) / 10
