"""FuseGateUp: merged gate and up products, and where they must stay apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.graph import constant
from onnxlathe.passes import FuseGateUp
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
CONSTANTS = {name: RNG.standard_normal((10, 12)).astype(np.float32) for name in ("wg", "wu", "w3")}
CONSTANTS["narrow"] = RNG.standard_normal((10, 1)).astype(np.float32)
BODY = "g = MatMul(x, wg) u = MatMul(x, wu) a = Sigmoid(g) y = Mul(a, u)"


def build(
    body: str = BODY, inputs: str = "float[b, s, 10] x", outputs: str = "float[b, s, 12] y", opset: int = 20
) -> ir.Model:
    used = {name: array for name, array in CONSTANTS.items() if f" {name})" in body}
    declared = ", ".join([inputs, *(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in used.items())])
    header = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return from_text(f"{header} g ({declared}) => ({outputs}) {{ {body} }}", **used)


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        BODY.replace("Mul(a, u)", "Mul(u, a)"),
        BODY.replace("g = MatMul(x, wg) u = MatMul(x, wu)", "u = MatMul(x, wu) g = MatMul(x, wg)"),
        BODY.replace("Sigmoid(g)", "com.microsoft.QuickGelu<alpha=1.0>(g)"),
        BODY.replace("Sigmoid(g)", "Gelu(g)"),
    ],
    ids=["plain", "swapped", "up first", "SiLU", "GeGLU"],
)
def test_merged(body: str) -> None:
    after, outcome = rewrite(FuseGateUp(), build(body))
    assert outcome.counts == {"gate and up merged": 1}
    assert ops(after)["MatMul"] == ops(after)["Split"] == 1
    weight = next(node for node in after.graph if node.op_type == "MatMul").inputs[1]
    merged = constant(weight)
    assert merged is not None and np.array_equal(merged, np.concatenate([CONSTANTS["wg"], CONSTANTS["wu"]], axis=1))


NEAR_MISSES = {
    "weights of two sizes": (build(BODY.replace("wu", "narrow")), "differ in size"),
    "gate is an output": (build(outputs="float[b, s, 12] y, float[b, s, 12] g"), "also used elsewhere"),
    "up is read twice": (build(BODY.replace("y = Mul(a, u)", "m = Mul(a, u) y = Add(m, u)")), "also used elsewhere"),
    "one weight": (build(BODY.replace("wu", "wg")), "store it twice"),
    "weight from outside": (
        build(BODY.replace("wu", "w"), "float[b, s, 10] x, float[10, 12] w"),
        "not a constant matrix",
    ),
    "two inputs": (build(BODY.replace("MatMul(x, wu)", "MatMul(z, wu)"), "float[b, s, 10] x, float[b, s, 10] z"), ""),
    "no activation": (build("g = MatMul(x, wg) u = MatMul(x, wu) y = Mul(g, u)"), ""),
    "old Split": (build(opset=12), "needs opset 13"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    model, reason = NEAR_MISSES[name]
    refused(FuseGateUp(), model, reason)


def test_external_data(tmp_path: Path) -> None:
    _, outcome = rewrite(FuseGateUp(), with_external_data(build(), tmp_path), nested=False)
    assert outcome.changed
