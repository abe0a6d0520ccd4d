"""FuseAttention on ONNX Attention with 4-D operands, on grouped heads, and on operands that are computed by head."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.passes import (
    FuseAttention,
    FuseGelu,
    FuseGroupQueryAttention,
    FuseNormalization,
    FuseQKV,
    FuseSkipNormalization,
    SplitSkipNormalization,
)
from onnxlathe.runtime.capabilities import KernelCosts
from rewriting import from_text, ops, refused, rewrite

HEADS, HEAD, KV = 4, 6, 2
HIDDEN = HEADS * HEAD
RNG = np.random.default_rng(0)
ATTENTION = PassContext(costs=KernelCosts({"Attention|128": 1.0, "MultiHeadAttention|128": 2.0}))
MULTI_HEAD = PassContext(costs=KernelCosts({"Attention|128": 2.0, "MultiHeadAttention|128": 1.0}))
CONSTANTS: dict[str, np.ndarray] = {
    "split": np.array([0, 0, -1, HEAD]),
    "grouped": np.array([0, 0, KV, HEAD]),
    "merge": np.array([0, 0, HIDDEN]),
    "two": np.array([2]),
    "one": np.array([1]),
    "by_group": np.array([1, 1, HEADS // KV, 1, 1]),
    "repeated": np.array([0, HEADS, -1, HEAD]),
    "scale": np.array(HEAD**-0.5, np.float32),
    "half": np.array(0.5, np.float32),
    "gain": RNG.standard_normal(HEAD).astype(np.float32),
}

SPLIT = """
  q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
  qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,1,3]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)"""
MERGE = "  ct = Transpose<perm=[0,2,1,3]>(c)  y = Reshape(ct, merge)"
REPEAT = """
  k5 = Unsqueeze(kt, two)  ke = Expand(k5, by_group)  kr = Reshape(ke, repeated)
  v5 = Unsqueeze(vt, two)  ve = Expand(v5, by_group)  vr = Reshape(ve, repeated)"""
WRITTEN = """
  kk = Transpose<perm=[0,1,3,2]>(KEYS)  s0 = MatMul(QUERIES, kk)  s1 = Mul(s0, scale)  s2 = Add(s1, mask)
  p = Softmax<axis=-1>(s2)  c = MatMul(p, VALUES)"""
NORMS = """
  qn = RMSNormalization<axis=-1>(qt, gain)  kn = RMSNormalization<axis=-1>(kt, gain)"""


def build(body: str, *, kv: int = HIDDEN, mask: str = "", outputs: str = "", opset: int = 23) -> ir.Model:
    used = {name: array for name, array in CONSTANTS.items() if f" {name})" in body or f"({name}," in body}
    kinds = {"f": "float", "i": "int64"}
    declared = [f"{kinds[a.dtype.kind]}[{','.join(map(str, a.shape))}] {n}" for n, a in used.items()]
    heads = [f"float[b, s, {HIDDEN}] q", f"float[b, t, {kv}] k", f"float[b, t, {kv}] v"]
    inputs = ", ".join([*heads, *([mask] if mask else []), *declared])
    results = outputs or f"float[b, s, {HIDDEN}] y"
    return from_text(f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({results}) {{ {body} }}', **used)


def feeds(model: ir.Model, lengths: tuple[int, int] = (5, 7), low: float = -1e4) -> list[dict[str, np.ndarray]]:
    """Two samples; one row of the mask is masked everywhere."""
    found: list[dict[str, np.ndarray]] = []
    for batch in (2, 1):
        sizes = {"b": batch, "s": lengths[0], "t": lengths[1]}
        sample: dict[str, np.ndarray] = {}
        for value in model.graph.inputs:
            dims = [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape or ()]
            sample[value.name or ""] = RNG.standard_normal(dims).astype(np.float32)
        if "mask" in sample:
            keep = sample["mask"] < 0.5
            keep[0, 0, 1] = False
            is_bool = model.graph.inputs[3].dtype == ir.DataType.BOOL
            sample["mask"] = keep if is_bool else np.where(keep, 0, low).astype(np.float32)
        found.append(sample)
    return found


def operator(attributes: str = "", mask: bool = False, operands: str = "qt, kt, vt") -> str:
    return f"  c = Attention{attributes}({operands}{', mask' if mask else ''})"


BOOL, FLOAT = "bool[b, 1, s, t] mask", "float[b, 1, s, t] mask"


@pytest.mark.parametrize("mask", ["", BOOL, FLOAT])
@pytest.mark.parametrize(
    "attributes", ["", "<scale=0.7>", "<softcap=3.0>", "<is_causal=1>", "<scale=1.0, is_causal=1>"]
)
def test_operator_gets_operands_before_the_split(attributes: str, mask: str) -> None:
    if mask and "causal" in attributes:
        attributes = attributes.replace("is_causal=1", "softmax_precision=1")
    model = build(SPLIT + operator(attributes, bool(mask)) + MERGE, mask=mask)
    after, outcome = rewrite(FuseAttention(), model, feeds=feeds(model))
    assert outcome.counts == {"Attention": 1}, outcome.refusals
    assert ops(after) == {"Attention": 1}


@pytest.mark.parametrize("mask", ["", BOOL])
@pytest.mark.parametrize("guarded_by", ["costs", "form"])
def test_operator_becomes_the_contrib_one_where_that_is_faster(mask: str, guarded_by: str) -> None:
    model = build(SPLIT + operator("<scale=0.7>", bool(mask)) + MERGE, mask=mask)
    step, context = (
        (FuseAttention(), MULTI_HEAD) if guarded_by == "costs" else (FuseAttention("MultiHeadAttention"), None)
    )
    after, outcome = rewrite(step, model, feeds=feeds(model), context=context)
    assert outcome.counts == {"MultiHeadAttention": 1}, outcome.refusals
    extra = {"Where": 2, "IsNaN": 1} if mask else {}
    assert ops(after) == {"com.microsoft.MultiHeadAttention": 1} | extra


def test_causal_self_attention_becomes_unidirectional() -> None:
    model = build(SPLIT + operator("<is_causal=1>") + MERGE)
    for value in model.graph.inputs[1:3]:
        value.shape = ir.Shape(["b", "s", HIDDEN])
    after, outcome = rewrite(FuseAttention("MultiHeadAttention"), model, feeds=feeds(model, (5, 5)))
    assert outcome.counts == {"MultiHeadAttention": 1}
    assert next(iter(after.graph)).attributes["unidirectional"].value == 1


STAYS = {
    "causal over other lengths": ("<is_causal=1>", ""),
    "cap": ("<softcap=2.0>", ""),
    "float mask": ("", FLOAT),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_the_contrib_operator_cannot_say_stays_standard(name: str) -> None:
    attributes, mask = STAYS[name]
    model = build(SPLIT + operator(attributes, bool(mask)) + MERGE, mask=mask)
    _, outcome = rewrite(FuseAttention("MultiHeadAttention"), model, feeds=feeds(model))
    assert outcome.counts == {"Attention": 1}


def test_lowest_floats_of_an_operator_keep_their_meaning() -> None:
    """ONNX Runtime gives 0 for rows whose mask is the lowest float everywhere; so does the new node."""
    model = build(SPLIT + operator("", mask=True) + MERGE, mask=FLOAT)
    for low in (float(np.finfo(np.float32).min), -np.inf):
        _, outcome = rewrite(FuseAttention(), model, feeds=feeds(model, low=low), context=MULTI_HEAD)
        assert outcome.counts == {"Attention": 1}


def test_scales_on_the_way_go_into_the_operator() -> None:
    scaled = SPLIT + "  qs = Mul(qt, half)  ks = Mul(kt, half)" + operator(operands="qs, ks, vt") + MERGE
    model = build(scaled)
    after, _ = rewrite(FuseAttention(), model, feeds=feeds(model))
    assert ops(after) == {"Attention": 1}
    assert next(iter(after.graph)).attributes["scale"].value == pytest.approx(0.25 * HEAD**-0.5)


def test_repeated_heads_of_an_operator_are_not_repeated() -> None:
    model = build(SPLIT + REPEAT + operator("", mask=True, operands="qt, kr, vr") + MERGE, kv=KV * HEAD, mask=BOOL)
    after, outcome = rewrite(FuseAttention("MultiHeadAttention"), model, feeds=feeds(model))
    assert outcome.counts == {"Attention": 1} and ops(after) == {"Attention": 1}
    assert next(iter(after.graph)).attributes["kv_num_heads"].value == KV


def written(queries: str = "qt", keys: str = "kr", values: str = "vr") -> str:
    return WRITTEN.replace("QUERIES", queries).replace("KEYS", keys).replace("VALUES", values)


@pytest.mark.parametrize("context", [ATTENTION, PassContext()])
def test_grouped_heads_written_out(context: PassContext) -> None:
    body = (
        SPLIT
        + REPEAT
        + written().replace("s2 = Add(s1, mask)", "s2 = Identity(s1)").replace("Identity(s1)", "Mul(s1, half)")
    )
    model = build(body + MERGE, kv=KV * HEAD)
    after, outcome = rewrite(FuseAttention(), model, feeds=feeds(model), context=context)
    assert outcome.counts == {"Attention": 1} and ops(after) == {"Attention": 1}


@pytest.mark.parametrize("opset", [20, 23])
def test_grouped_heads_stay_repeated_for_the_contrib_operator(opset: int) -> None:
    model = build(SPLIT + REPEAT + written() + MERGE, kv=KV * HEAD, mask=FLOAT, opset=opset)
    after, outcome = rewrite(FuseAttention(), model, feeds=feeds(model))
    assert outcome.counts == {"MultiHeadAttention": 1}, "a mask from outside may be minus infinity"
    assert ops(after)["Expand"] == 2 and "Softmax" not in ops(after)


def test_heads_repeated_as_a_whole_are_not_grouped() -> None:
    """Tiled heads [0, 1, 0, 1] are not the kernel's [0, 0, 1, 1]: they stay repeated."""
    tiled = REPEAT.replace("Unsqueeze(kt, two)", "Unsqueeze(kt, one)").replace(
        "Unsqueeze(vt, two)", "Unsqueeze(vt, one)"
    )
    CONSTANTS["by_tile"] = np.array([1, HEADS // KV, 1, 1, 1])
    model = build(SPLIT + tiled.replace("by_group", "by_tile") + written() + MERGE, kv=KV * HEAD, mask=FLOAT)
    after, outcome = rewrite(FuseAttention("Attention"), model, feeds=feeds(model))
    assert outcome.counts == {"MultiHeadAttention": 1}
    assert ops(after)["Expand"] == 2


def test_multi_query() -> None:
    """One head of K and V for all, without a repeat: MatMul broadcasts it."""
    body = SPLIT + written("qt", "kt", "vt").replace("Add(s1, mask)", "Mul(s1, half)") + MERGE
    model = build(body, kv=HEAD)
    after, outcome = rewrite(FuseAttention(), model, feeds=feeds(model))
    assert outcome.counts == {"Attention": 1} and ops(after) == {"Attention": 1}


@pytest.mark.parametrize("form", ["Attention", "MultiHeadAttention"])
def test_operands_computed_by_head(form: str) -> None:
    body = SPLIT + NORMS + written("qn", "kn", "vt").replace("Add(s1, mask)", "Mul(s1, half)") + MERGE
    model = build(body)
    after, outcome = rewrite(FuseAttention(form), model, feeds=feeds(model))  # type: ignore[arg-type]
    assert outcome.counts == {form: 1}
    assert ops(after)["Transpose"] == 4 and ops(after)["RMSNormalization"] == 2


def test_norms_before_the_transpose_need_no_transpose() -> None:
    """Qwen3 normalizes [batch, length, heads, head_dim]."""
    norms = """ q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
      q5 = RMSNormalization<axis=-1>(q4, gain)  k5 = RMSNormalization<axis=-1>(k4, gain)
      qt = Transpose<perm=[0,2,1,3]>(q5)  kt = Transpose<perm=[0,2,1,3]>(k5)  vt = Transpose<perm=[0,2,1,3]>(v4)"""
    model = build(norms + operator() + MERGE)
    after, outcome = rewrite(FuseAttention(), model, feeds=feeds(model))
    assert outcome.counts == {"Attention": 1}
    assert "Transpose" not in ops(after)


NEAR_MISSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "computed by head": (SPLIT + NORMS + operator(operands="qn, kn, vt") + MERGE, "more Transposes", {}),
    "heads not merged": (SPLIT + operator(), "not merged", {"outputs": f"float[b, {HEADS}, s, {HEAD}] c"}),
    "past of its own": (
        SPLIT + "  c, pk, pv = Attention(qt, kt, vt, , past, past)" + MERGE,
        "cache of its own",
        {"mask": f"float[b, {HEADS}, 3, {HEAD}] past", "outputs": f"float[b, s, {HIDDEN}] y, float[b,h,l,d] pk"},
    ),
    "scores asked for": (
        SPLIT + "  c, , , z = Attention(qt, kt, vt)" + MERGE,
        "further outputs",
        {"outputs": f"float[b, s, {HIDDEN}] y, float[b, {HEADS}, s, t] z"},
    ),
    "scaled values": (SPLIT + "  vs = Mul(vt, half)" + operator(operands="qt, kt, vs") + MERGE, "V is scaled", {}),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    body, reason, options = NEAR_MISSES[name]
    model = build(body, **options)
    refused(FuseAttention(), model, reason, feeds=feeds(model))


def test_other_readers_keep_the_split_tensor() -> None:
    model = build(SPLIT + operator() + MERGE, outputs=f"float[b, s, {HIDDEN}] y, float[b, {HEADS}, t, {HEAD}] kt")
    after, _ = rewrite(FuseAttention(), model, feeds=feeds(model))
    assert ops(after) == {"Attention": 1, "Reshape": 1, "Transpose": 1}


def test_caches_are_left_to_the_decoder_fusion() -> None:
    body = """ q4 = Reshape(q, split)  k4 = Reshape(k, grouped)  v4 = Reshape(v, grouped)
      qt = Transpose<perm=[0,2,1,3]>(q4)  kt0 = Transpose<perm=[0,2,1,3]>(k4)  vt0 = Transpose<perm=[0,2,1,3]>(v4)
      kt = Concat<axis=2>(past_k, kt0)  vt = Concat<axis=2>(past_v, vt0)"""
    body += REPEAT + operator(operands="qt, kr, vr") + MERGE
    pasts = ", ".join(f"float[b, {KV}, past, {HEAD}] past_{name}" for name in "kv")
    presents = ", ".join(f"float[b, {KV}, total, {HEAD}] {name}t" for name in "kv")
    model = build(body, kv=KV * HEAD, mask=pasts, outputs=f"float[b, s, {HIDDEN}] y, {presents}")
    assert "key/value cache" in FuseAttention()(model, PassContext()).refusals[0].reason


def test_standard_nodes_do_not_disturb_other_passes() -> None:
    """RMSNormalization, RotaryEmbedding and Attention as torch writes them at opset 23 stay what they are."""
    body = f"""
      n = RMSNormalization<axis=-1, epsilon=0.00001>(q, weight)
      q4 = Reshape(n, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
      qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,1,3]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)
      qr = RotaryEmbedding(qt, cos, sin)  kr = RotaryEmbedding(kt, cos, sin)
      {operator(operands="qr, kr, vt")} {MERGE.replace("y =", "a =")}
      sum = Add(q, a)  y = RMSNormalization<axis=-1, epsilon=0.00001>(sum, weight)"""
    CONSTANTS["weight"] = RNG.standard_normal(HIDDEN).astype(np.float32)
    tables = "float[b, s, 3] cos, float[b, s, 3] sin"
    model = build(body, mask=tables)
    for value in model.graph.inputs[1:3]:
        value.shape = ir.Shape(["b", "s", HIDDEN])
    samples = feeds(model, (5, 5))
    for step in (FuseGelu(), FuseNormalization(), FuseQKV(), SplitSkipNormalization(), FuseGroupQueryAttention()):
        assert not rewrite(step, model, feeds=samples)[1].changed, step.name
    costs = KernelCosts({"SkipSimplifiedLayerNormalization|128": 1.0, "Add+RMSNormalization|128": 2.0})
    after, _ = rewrite(FuseSkipNormalization(), model, feeds=samples, context=PassContext(costs=costs))
    assert ops(after)["RotaryEmbedding"] == 2 and ops(after)["RMSNormalization"] >= 1
    assert "more Transposes" in rewrite(FuseAttention(), model, feeds=samples)[1].refusals[0].reason
