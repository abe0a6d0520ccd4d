"""FuseRotary: every kind of rotation before attention without a cache, and what is none."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.passes import FuseAttention, FuseRotary
from rewriting import from_text, ops, refused, rewrite

HEADS, HEAD = 2, 8
HIDDEN = HEADS * HEAD
RNG = np.random.default_rng(0)
INTEGERS = {
    "zero": [0],
    "one": [1],
    "two": [2],
    "three": [3],
    "four": [4],
    "last": [-1],
    "head": [HEAD],
    "w1": [HIDDEN],
    "w2": [2 * HIDDEN],
    "w3": [3 * HIDDEN],
    "split": [0, 0, HEADS, HEAD],
    "merge": [0, 0, HIDDEN],
    "pairs": [0, 0, 0, HEAD // 2, 2],
    "unpaired": [0, 0, 0, HEAD],
}
CONSTANTS: dict[str, np.ndarray] = {
    **{name: np.array(numbers) for name, numbers in INTEGERS.items()},
    "s0": np.array(0),
    "s1": np.array(1),
    "frequencies": (10.0 ** -np.arange(HEAD // 2)).astype(np.float32),
    "few": (10.0 ** -np.arange(2)).astype(np.float32),
    "gain": RNG.standard_normal(HEAD).astype(np.float32),
    "larger": np.array(1.5, np.float32),
    "wq": RNG.standard_normal((HIDDEN, HIDDEN)).astype(np.float32),
    "wk": RNG.standard_normal((HIDDEN, HIDDEN)).astype(np.float32),
    "wv": RNG.standard_normal((HIDDEN, HIDDEN)).astype(np.float32),
    "packed": RNG.standard_normal((HIDDEN, 3 * HIDDEN)).astype(np.float32),
}

COUNTED = """
  shape = Shape(ids)  n0 = Gather(shape, one)  n = Squeeze(n0, zero)  count = Range(s0, n, s1)
  number = Cast<to=1>(count)  column = Unsqueeze(number, one)  angle = Mul(column, frequencies)"""
GIVEN = """
  number = Cast<to=1>(position_ids)  column = Unsqueeze(number, last)  angle0 = Mul(column, frequencies)
  angle = Unsqueeze(angle0, one)"""
HALVES = "  both = Concat<axis=-1>(angle, angle)  cos = Cos(both)  sin = Sin(both)"
NEIGHBOURS = """
  thin = Unsqueeze(angle, last)  thick = Concat<axis=-1>(thin, thin)  shape2 = Shape(angle)
  rows = Slice(shape2, zero, last)
  wide = Concat<axis=0>(rows, head)  both = Reshape(thick, wide)  cos = Cos(both)  sin = Sin(both)"""
PROJECT = "  q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
SPLIT = """
  q4 = Reshape(q, split)  k4 = Reshape(k, split)  v4 = Reshape(v, split)
  qt = Transpose<perm=[0,2,1,3]>(q4)  kt = Transpose<perm=[0,2,1,3]>(k4)  vt = Transpose<perm=[0,2,1,3]>(v4)"""
ATTENTION = """
  c = Attention(qr, kr, vt)  ct = Transpose<perm=[0,2,1,3]>(c)  y = Reshape(ct, merge)"""
WRITTEN = """
  kk = Transpose<perm=[0,1,3,2]>(kr)  s = MatMul(qr, kk)  p = Softmax<axis=-1>(s)  c = MatMul(p, vt)
  ct = Transpose<perm=[0,2,1,3]>(c)  y = Reshape(ct, merge)"""


def half_rotated(x: str, to: str) -> str:
    return f"""
  {to}a = Slice({x}, zero, four, three)  {to}b = Slice({x}, four, head, three)  {to}n = Neg({to}b)
  {to}h = Concat<axis=-1>({to}n, {to}a)  {to}c = Mul({x}, cos)  {to}s = Mul({to}h, sin)  {to} = Add({to}c, {to}s)"""


def neighbours(x: str, to: str) -> str:
    return f"""
  {to}5 = Reshape({x}, pairs)  {to}a = Slice({to}5, zero, one, four)  {to}b = Slice({to}5, one, two, four)
  {to}n = Neg({to}b)  {to}h5 = Concat<axis=-1>({to}n, {to}a)  {to}h = Reshape({to}h5, unpaired)
  {to}c = Mul(cos, {x})  {to}s = Mul(sin, {to}h)  {to} = Add({to}c, {to}s)"""


def partial(x: str, to: str) -> str:
    rotated = (
        half_rotated(f"{to}r", f"{to}o")
        .replace("four, three", "two, three")
        .replace(
            "two, three)  " + to + "ob = Slice(" + to + "r, four, head",
            "two, three)  " + to + "ob = Slice(" + to + "r, two, four",
        )
    )
    return f"""
  {to}r = Slice({x}, zero, four, three)  {to}rest = Slice({x}, four, head, three)  {rotated}
  {to} = Concat<axis=-1>({to}o, {to}rest)"""


def build(*parts: str, opset: int = 23) -> ir.Model:
    body = "".join(parts)
    words = set(re.findall(r"\w+", body))
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    kinds = {"f": "float", "i": "int64"}
    declared = [f"{kinds[a.dtype.kind]}[{','.join(map(str, a.shape))}] {n}" for n, a in used.items()]
    inputs = [f"float[b, s, {HIDDEN}] x", "int64[b, s] ids"]
    inputs += ["int64[b, s] position_ids"] if "position_ids" in body else []
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    return from_text(
        f"{header} g ({', '.join([*inputs, *declared])}) => (float[b, s, {HIDDEN}] y) {{ {body} }}", **used
    )


def feeds() -> list[dict[str, np.ndarray]]:
    """Two sizes; positions of every row begin elsewhere."""
    found: list[dict[str, np.ndarray]] = []
    for batch, length in ((3, 9), (1, 1)):
        x = RNG.standard_normal((batch, length, HIDDEN)).astype(np.float32)
        positions = np.arange(length)[None] + np.arange(batch)[:, None] * 3
        found.append({"x": x, "ids": np.zeros((batch, length), np.int64), "position_ids": positions})
    return found


def fused(model: ir.Model, expected: str) -> ir.Model:
    """Both rotations become ``expected``, and the attention fusion then drops the split into heads."""
    names = {value.name for value in model.graph.inputs}
    samples = [{name: array for name, array in sample.items() if name in names} for sample in feeds()]
    after, outcome = rewrite(FuseRotary(), model, feeds=samples, nested=False)
    assert outcome.counts == {expected: 2}, outcome.refusals
    final, attention = rewrite(FuseAttention(), after, feeds=samples, nested=False)
    assert sum(attention.counts.values()) == 1, attention.refusals
    assert "Transpose" not in ops(final) and "Neg" not in ops(final)
    return final


CONTRIB = "com.microsoft.RotaryEmbedding"


@pytest.mark.parametrize("attention", [ATTENTION, WRITTEN])
def test_half_rotated(attention: str) -> None:
    model = build(COUNTED, HALVES, PROJECT, SPLIT, half_rotated("qt", "qr"), half_rotated("kt", "kr"), attention)
    after = fused(model, CONTRIB)
    assert ops(after)["Cos"] == ops(after)["Sin"] == 1 and ops(after)["Slice"] == 2, "one table for both"


def test_interleaved() -> None:
    model = build(COUNTED, NEIGHBOURS, PROJECT, SPLIT, neighbours("qt", "qr"), neighbours("kt", "kr"), ATTENTION)
    node = next(node for node in fused(model, CONTRIB).graph if node.op_type == "RotaryEmbedding")
    assert node.attributes["interleaved"].value == 1


def test_partial() -> None:
    counted = COUNTED.replace("frequencies", "few")
    model = build(counted, HALVES, PROJECT, SPLIT, partial("qt", "qr"), partial("kt", "kr"), ATTENTION)
    node = next(node for node in fused(model, CONTRIB).graph if node.op_type == "RotaryEmbedding")
    assert node.attributes["rotary_embedding_dim"].value == 4


def test_rows_with_their_own_positions() -> None:
    model = build(GIVEN, HALVES, PROJECT, SPLIT, half_rotated("qt", "qr"), half_rotated("kt", "kr"), ATTENTION)
    fused(model, "RotaryEmbedding")


def test_rows_with_their_own_positions_need_opset_23() -> None:
    model = build(GIVEN, HALVES, PROJECT, SPLIT, half_rotated("qt", "qr"), half_rotated("kt", "kr"), WRITTEN, opset=20)
    samples = [{k: v for k, v in sample.items() if k != "ids"} | {"ids": sample["ids"]} for sample in feeds()]
    refused(FuseRotary(), model, "upgrade-opset", feeds=samples, nested=False)


def test_parts_of_one_product() -> None:
    project = """  joined = MatMul(x, packed)  q = Slice(joined, zero, w1, two)  k = Slice(joined, w1, w2, two)
      v = Slice(joined, w2, w3, two)"""
    model = build(COUNTED, HALVES, project, SPLIT, half_rotated("qt", "qr"), half_rotated("kt", "kr"), ATTENTION)
    fused(model, CONTRIB)


def test_scaled_cosines_are_the_kernels_too() -> None:
    """YaRN scales cosines and sines."""
    scaled = (
        HALVES.replace("cos =", "cos1 =").replace("sin =", "sin1 =")
        + " cos = Mul(cos1, larger) sin = Mul(sin1, larger)"
    )
    model = build(COUNTED, scaled, PROJECT, SPLIT, half_rotated("qt", "qr"), half_rotated("kt", "kr"), ATTENTION)
    fused(model, CONTRIB)


def test_norms_by_head() -> None:
    norms = "  qn = RMSNormalization<axis=-1>(qt, gain)  kn = RMSNormalization<axis=-1>(kt, gain)"
    model = build(COUNTED, HALVES, PROJECT, SPLIT, norms, half_rotated("qn", "qr"), half_rotated("kn", "kr"), ATTENTION)
    samples = [{k: v for k, v in sample.items() if k != "position_ids"} for sample in feeds()]
    after, outcome = rewrite(FuseRotary(), model, feeds=samples, nested=False)
    assert outcome.counts == {CONTRIB: 2}
    assert ops(after)["RMSNormalization"] == 2


NEAR_MISSES = {
    "sign": (half_rotated("qt", "qr").replace("Neg", "Identity"), "no rotation"),
    "sines of tokens": (half_rotated("qt", "qr").replace("Mul(qrh, sin)", "Mul(qrh, qt)"), "no rotation"),
    "uneven scales": (half_rotated("qt", "qr").replace("Mul(qt, cos)", "Mul(qt, sin)"), "no rotation"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    body, reason = NEAR_MISSES[name]
    model = build(COUNTED, HALVES, PROJECT, SPLIT, body, "  kr = Identity(kt)", ATTENTION)
    samples = [{k: v for k, v in sample.items() if k != "position_ids"} for sample in feeds()]
    refused(FuseRotary(), model, reason, feeds=samples, nested=False)


def test_nothing_to_rotate() -> None:
    model = build(PROJECT, SPLIT, "  qr = Identity(qt)  kr = Identity(kt)", ATTENTION)
    assert not FuseRotary()(model, PassContext()).changed


def test_models_with_a_cache_are_left_to_the_decoder_fusion() -> None:
    model = build(COUNTED, HALVES, PROJECT, SPLIT, half_rotated("qt", "qr"), half_rotated("kt", "kr"), ATTENTION)
    graph = model.graph
    kr = next(value for node in graph for value in node.outputs if value.name == "kr")
    past = ir.Value(name="past", type=kr.type, shape=ir.Shape(["b", HEADS, "p", HEAD]))
    present = ir.Value(name="present", type=kr.type, shape=ir.Shape(["b", HEADS, "t", HEAD]))
    maker = kr.producer()
    assert maker is not None
    graph.insert_after(maker, [ir.node("Concat", [past, kr], attributes={"axis": 2}, outputs=[present], name="cache")])
    graph.inputs.append(past)
    graph.outputs.append(present)
    infer_shapes(model)
    outcome = FuseRotary()(model, PassContext())
    assert not outcome.changed and "key/value cache" in outcome.refusals[0].reason
