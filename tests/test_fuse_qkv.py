"""FuseQKV: merged projections, with and without biases, and where they must stay apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.graph import constant
from onnxlathe.passes import FuseQKV
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
WIDTHS = {"q": 8, "k": 8, "v": 12}
CONSTANTS = {
    **{f"w{name}": RNG.standard_normal((10, width)).astype(np.float32) for name, width in WIDTHS.items()},
    **{f"b{name}": RNG.standard_normal(width).astype(np.float32) for name, width in WIDTHS.items()},
}
BIASED = "qm = MatMul(x, wq) km = MatMul(x, wk) vm = MatMul(x, wv) q = Add(qm, bq) k = Add(bk, km) v = Add(vm, bv) "
BARE = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) "
STANDARD = "y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)"
CONTRIB = "y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v)"


def build(body: str, inputs: str = "float[b, s, 10] x", outputs: str = "float[b, s, 12] y") -> ir.Model:
    used = {name: array for name, array in CONSTANTS.items() if name in body}
    declared = ", ".join([inputs, *(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in used.items())])
    header = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    return from_text(f"{header} g ({declared}) => ({outputs}) {{ {body} }}", **used)


@pytest.mark.parametrize("attention", [STANDARD, CONTRIB])
@pytest.mark.parametrize("projections", [BIASED, BARE])
def test_merged(projections: str, attention: str) -> None:
    after, outcome = rewrite(FuseQKV(), build(projections + attention))
    assert outcome.counts == {"QKV merged": 1}
    counts = ops(after)
    assert counts["MatMul"] == counts["Split"] == 1 and counts.get("Add", 0) == (projections is BIASED)
    weight = next(node for node in after.graph if node.op_type == "MatMul").inputs[1]
    merged = constant(weight)
    assert merged is not None and np.array_equal(
        merged, np.concatenate([CONSTANTS["wq"], CONSTANTS["wk"], CONSTANTS["wv"]], axis=1)
    )


NEAR_MISSES = {
    "cross attention": (
        BARE.replace("k = MatMul(x, wk)", "k = MatMul(z, wk)").replace("v = MatMul(x,", "v = MatMul(z,"),
        "different inputs",
    ),
    "one bias missing": (BIASED.replace("vm = MatMul", "v = MatMul").replace("v = Add(vm, bv)", ""), "only some"),
    "weight not constant": (BARE.replace("wv", "dynamic"), "not a constant"),
    "shared weight": (BARE.replace("v = MatMul(x, wv)", "v = MatMul(x, wq)"), "also used elsewhere"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    body, reason = NEAR_MISSES[name]
    inputs = "float[b, s, 10] x"
    if "(z" in body:
        inputs += ", float[b, s, 10] z"
    if "dynamic" in body:
        inputs += ", float[10, 12] dynamic"
    model = build(body + STANDARD, inputs, "float[b, s, n] y")
    refused(FuseQKV(), model, reason)


def test_projection_that_is_an_output_stays() -> None:
    model = build(BARE + STANDARD, outputs="float[b, s, 12] y, float[b, s, 8] k")
    refused(FuseQKV(), model, "also used elsewhere")


def test_a_weight_that_callers_may_replace_stays() -> None:
    model = build(BARE + STANDARD)
    model.graph.inputs.append(model.graph.initializers["wv"])
    refused(FuseQKV(), model, "not a constant", nested=False)


def test_external_data(tmp_path: Path) -> None:
    _, outcome = rewrite(FuseQKV(), with_external_data(build(BIASED + STANDARD), tmp_path), nested=False)
    assert outcome.changed


GROUPED = """
  y, pk, pv = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=1>
    (q, k, v, past_k, past_v, last, total)"""
ORDERED = {"order_q": [3, 2, 1, 0] * 4, "order_k": list(range(16, 24)), "order_v": list(range(24, 32))}


def grouped(body: str, **constants: np.ndarray) -> ir.Model:
    caches = "float[b, 1, p, 8] past_k, float[b, 1, p, 8] past_v, int32[b] last, int32 total"
    kinds = {"float32": "float", "int64": "int64"}
    declared = [f"{kinds[str(a.dtype)]}[{','.join(map(str, a.shape))}] {name}" for name, a in constants.items()]
    header = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
    outputs = "float[b, s, 16] y, float[b, 1, t, 8] pk, float[b, 1, t, 8] pv"
    inputs = ", ".join(["float[b, s, 10] x", caches, *declared])
    return from_text(f"{header} g ({inputs}) => ({outputs}) {{ {body} {GROUPED} }}", **constants)


def steps() -> list[dict[str, np.ndarray]]:
    cache = RNG.standard_normal((2, 2, 1, 4, 8)).astype(np.float32)
    sample = {"x": RNG.standard_normal((2, 1, 10)).astype(np.float32), "past_k": cache[0], "past_v": cache[1]}
    return [{**sample, "last": np.full(2, 4, np.int32), "total": np.array(5, np.int32)}]


def test_grouped_attention_takes_the_product_packed() -> None:
    weights = {f"w{n}": RNG.standard_normal((10, w)).astype(np.float32) for n, w in zip("qkv", (16, 8, 8), strict=True)}
    after, outcome = rewrite(FuseQKV(), grouped(BARE, **weights), feeds=steps(), nested=False)
    assert outcome.counts == {"QKV merged": 1} and ops(after) == {"MatMul": 1, "com.microsoft.GroupQueryAttention": 1}


@pytest.mark.parametrize("biased", [False, True])
def test_gathered_columns_become_columns_of_the_weight(biased: bool) -> None:
    """GPT-NeoX: parts of one product in another order."""
    constants = {name: np.array(numbers) for name, numbers in ORDERED.items()}
    constants["w"] = RNG.standard_normal((10, 32)).astype(np.float32)
    if biased:
        constants["b"] = RNG.standard_normal(32).astype(np.float32)
    product = "m = MatMul(x, w) all = Add(m, b)" if biased else "all = MatMul(x, w)"
    parts = " ".join(f"{name} = Gather<axis=-1>(all, order_{name})" for name in "qkv")
    after, outcome = rewrite(FuseQKV(), grouped(f"{product} {parts}", **constants), feeds=steps(), nested=False)
    assert outcome.counts == {"QKV merged": 1} and "Gather" not in ops(after)
