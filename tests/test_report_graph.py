"""Which nodes two graphs have in common and what became of the others, held against graphs whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.graph import PASS_KEY, all_nodes, qualified_op, weight_bytes
from onnxlathe.compiler.reporting.compare import compare_graphs
from onnxlathe.compiler.reporting.graph_match import Matching
from onnxlathe.compiler.reporting.records import GraphChange, Weights
from rewriting import from_text, inside_if, with_external_data

HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'


def random_graph(seed: int, nodes: int = 40, kinds: int = 3, weights: int = 4) -> ir.Model:
    """A DAG of few kinds of operators, so that many nodes look alike."""
    draw = random.Random(seed)
    ops = ["Relu", "Sigmoid", "Add", "Mul", "Sub", "Neg"][: 2 * kinds]
    arrays = {f"w{i}": np.full((4, 4), i, np.float32) for i in range(weights)}
    values, body = ["x"], list[str]()
    for index in range(nodes):
        op = draw.choice(ops)
        others = [draw.choice(values[-5:])]
        if op in ("Add", "Mul", "Sub"):
            others.append(draw.choice([*values[-5:], *arrays]))
        body.append(f"v{index} = {op}({', '.join(others)})")
        values.append(f"v{index}")
    used = {word for line in body for word in line.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    kept = {name: array for name, array in arrays.items() if name in used}
    sinks = [name for name in values[1:] if sum(name in line.split("=")[1] for line in body) == 0]
    inputs = ", ".join(["float[4, 4] x", *(f"float[4, 4] {name}" for name in kept)])
    outputs = ", ".join(sinks or ["v0"])
    return from_text(f"{HEAD} g ({inputs}) => ({outputs}) {{ {' '.join(body)} }}", **kept)


def renamed(model: ir.Model, seed: int = 0) -> ir.Model:
    """A copy with tensors of its own, in which nothing but inputs and outputs keeps its name."""
    copy = ir.from_proto(ir.to_proto(model))
    numbers = iter(random.Random(seed).sample(range(10**6), 10**4))
    kept = {value.name for value in (*copy.graph.inputs, *copy.graph.outputs)}
    for graph in copy.graphs():
        for value in list(graph.initializers.values()):
            value.name = f"n{next(numbers)}"
        for node in graph:
            node.name = f"n{next(numbers)}"
            for value in node.outputs:
                if value.name not in kept:
                    value.name = f"n{next(numbers)}"
    return copy


def check_pairs(match: Matching) -> None:
    """Operator, attributes, constants and the order of inputs agree, and nothing is paired twice."""
    assert len(set(match.pairs.values())) == len(match.pairs)
    for a, b in match.pairs.items():
        assert qualified_op(a) == qualified_op(b) and len(a.inputs) == len(b.inputs)
        kept = [{name: repr(item.value) for name, item in node.attributes.items()} for node in (a, b)]
        assert kept[0] == kept[1]
        for x, y in zip(a.inputs, b.inputs, strict=True):
            if x is not None and y is not None and x.is_initializer():
                np.testing.assert_array_equal(x.const_value.numpy(), y.const_value.numpy())


@pytest.mark.parametrize("seed", range(12))
def test_a_renamed_copy_is_the_same_graph(seed: int) -> None:
    """Every node is found, and the pairs keep every edge: an isomorphism."""
    model = random_graph(seed)
    match = Matching(model, renamed(model, seed))
    check_pairs(match)
    assert not match.removed and not match.added
    for a, b in match.pairs.items():
        for x, y in zip(a.inputs, b.inputs, strict=True):
            if x is not None and y is not None and x.producer() is not None:
                assert match.pairs[x.producer()] is y.producer() and x.index() == y.index()


@pytest.mark.parametrize("seed", range(8))
def test_cut_out_nodes_are_found(seed: int) -> None:
    """A few unary nodes of a renamed copy are taken out: no more than they and as many others are said to be gone."""
    model = random_graph(seed, kinds=3)
    copy = renamed(model, seed)
    outputs = {value.name for value in copy.graph.outputs}
    unary = [node for node in copy.graph if len(node.inputs) == 1 and node.outputs[0].name not in outputs]
    for node in random.Random(seed).sample(unary, 2):
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        copy.graph.remove(node, safe=True)
    match = Matching(model, copy)
    check_pairs(match)
    assert len(match.removed) == 2 + len(match.added) <= 2 + 6


def chain(middle: str, outputs: str = "y") -> str:
    return f"a = Relu(x) b = Neg(a) {middle} d = Neg(c) e = Relu(d) y = Sigmoid(e)"


def model_of(body: str, **weights: np.ndarray) -> ir.Model:
    names = "".join(f", float[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items())
    return from_text(f"{HEAD} g (float[4, 4] x{names}) => (y) {{ {body} }}", **weights)


W = np.arange(16, dtype=np.float32).reshape(4, 4)


def test_one_place_is_replaced() -> None:
    before = model_of(chain("m = MatMul(b, w) c = Add(m, v)"), w=W, v=W + 1)
    after = renamed(model_of(chain("c = Gemm(b, w, v)"), w=W, v=W + 1))
    next(node for node in after.graph if node.op_type == "Gemm").metadata_props[PASS_KEY] = "fuse-linear"
    graph, _ = compare_graphs(before, after)
    assert (graph.unchanged, graph.removed, graph.added) == (5, 2, 1)
    only = graph.replacements[0]
    assert (only.before, only.after) == ({"MatMul": 1, "Add": 1}, {"Gemm": 1})
    assert only.passes == ["fuse-linear"] and only.places == len(graph.replacements) == 1


def test_alike_places_are_counted_together() -> None:
    def body(layer: str) -> str:
        return "v0 = Neg(x) " + " ".join(layer.format(i=i, j=i + 1) for i in range(4)) + " y = Relu(v4)"

    weights = {f"w{i}": W + i for i in range(4)}
    before = model_of(body("m{i} = MatMul(v{i}, w{i}) s{i} = Sigmoid(m{i}) v{j} = Mul(m{i}, s{i})"), **weights)
    after = renamed(model_of(body("m{i} = MatMul(v{i}, w{i}) v{j} = Gelu(m{i})"), **weights))
    graph, _ = compare_graphs(before, after)
    assert graph.unchanged == 6 and [(r.places, r.before, r.after) for r in graph.replacements] == [
        (4, {"Sigmoid": 1, "Mul": 1}, {"Gelu": 1})
    ]


def test_other_weights_attributes_or_inputs_are_changes() -> None:
    before = model_of("m = MatMul(x, w) y = LeakyRelu<alpha=0.1>(m)", w=W)
    near = [
        model_of("m = MatMul(x, w) y = LeakyRelu<alpha=0.1>(m)", w=W + 1),
        model_of("m = MatMul(x, w) y = LeakyRelu<alpha=0.2>(m)", w=W),
        model_of("m = MatMul(w, x) y = LeakyRelu<alpha=0.1>(m)", w=W),
    ]
    for after in near:
        graph, _ = compare_graphs(before, after)
        assert (graph.unchanged, graph.removed, graph.added) == (1, 1, 1)
        assert graph.replacements[0].before == graph.replacements[0].after
    assert compare_graphs(before, renamed(before))[0].unchanged == 2, "equal content in another object is equal"


def test_nodes_that_were_only_removed_or_only_added() -> None:
    with_identity = model_of("a = Identity(x) y = Relu(a)")
    without = model_of("y = Relu(x)")
    gone, _ = compare_graphs(with_identity, without)
    come, _ = compare_graphs(without, with_identity)
    assert (gone.replacements[0].before, gone.replacements[0].after) == ({"Identity": 1}, {})
    assert (come.replacements[0].before, come.replacements[0].after) == ({}, {"Identity": 1})


def test_what_several_places_share_is_a_place_of_its_own() -> None:
    """The mask is computed once for two products that both get another operator."""
    mask = "s = Shape(x) r = ConstantOfShape(s) "
    two = "p{i} = Add({x}, r) q{i} = Softmax(p{i})"
    kept = " k = Neg(q0) l = Exp(k) n = Neg(l) "
    before = model_of(mask + two.format(i=0, x="x") + kept + two.format(i=1, x="n") + " y = Relu(q1)")
    after = renamed(model_of(f"q0 = LogSoftmax(x) {kept} q1 = LogSoftmax(n) y = Relu(q1)"))
    graph, _ = compare_graphs(before, after)
    found = [(r.places, r.before, r.after) for r in graph.replacements]
    assert (2, {"Add": 1, "Softmax": 1}, {"LogSoftmax": 1}) in found
    assert (1, {"Shape": 1, "ConstantOfShape": 1}, {}) in found and graph.unchanged == 4


def test_inside_a_branch() -> None:
    before = inside_if(model_of(chain("m = MatMul(b, w) c = Add(m, v)"), w=W, v=W + 1))
    after = inside_if(model_of(chain("c = Gemm(b, w, v)"), w=W, v=W + 1))
    graph, weights = compare_graphs(before, after)
    assert (graph.removed, graph.added) == (2, 1) and graph.unchanged == len(list(all_nodes(after))) - 1
    assert weights.more[1:] == (128, 128), "too small to be listed"


def test_a_compile_says_what_each_pass_replaced() -> None:
    before = model_of("m = MatMul(x, w) b = Add(m, v) i = Identity(b) y = Relu(i)", w=W, v=W[0])
    out = lathe.compile(before, ["cleanup", "fuse-linear"], progress=False)
    graph = out.report.graph
    assert graph is not None and graph.unchanged == 1
    first = graph.replacements[0]
    assert (first.before, first.after) == ({"MatMul": 1, "Add": 1, "Identity": 1}, {"Gemm": 1})
    assert first.passes == ["fuse-linear"]


# ---- weights


def packed(bits: int, zero_points: bool, seed: int = 0) -> tuple[ir.Model, np.ndarray, int]:
    """MatMulNBits of random codes; the codes as they are multiplied, zero point taken off; bytes stored."""
    rng = np.random.default_rng(seed)
    n, blocks, block = 24, 4, 16
    codes = rng.integers(0, 1 << bits, (n, blocks, block)).astype(np.uint8)
    points = rng.integers(0, 1 << bits, (n, blocks)).astype(np.uint8)

    def pack(array: np.ndarray) -> np.ndarray:
        text = ["".join(f"{code:0{bits}b}"[::-1] for code in row) for row in array.reshape(-1, array.shape[-1])]
        rows = [[int(line[i : i + 8].ljust(8, "0")[::-1], 2) for i in range(0, len(line), 8)] for line in text]
        return np.array(rows, np.uint8).reshape(*array.shape[:-1], -1)

    arrays = {"q": pack(codes), "s": rng.random((n, blocks)).astype(np.float32)}
    if zero_points:
        arrays["z"] = pack(points)
    kinds = {"q": "uint8", "s": "float", "z": "uint8"}
    inputs = "".join(f", {kinds[k]}[{','.join(map(str, a.shape))}] {k}" for k, a in arrays.items())
    call = f"com.microsoft.MatMulNBits<K=64, N=24, bits={bits}, block_size=16>(x, {', '.join(arrays)})"
    model = from_text(f"{HEAD} g (float[3, 64] x{inputs}) => (y) {{ y = {call} }}", **arrays)
    shift = points[:, :, None] if zero_points else np.uint8(1 << (bits - 1))
    return model, codes.astype(int) - shift.astype(int), sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_packed_weights(bits: int, zero_points: bool) -> None:
    after, codes, stored = packed(bits, zero_points)
    w = np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32)
    before = from_text(f"{HEAD} g (float[3, 64] x, float[64, 24] w) => (y) {{ y = MatMul(x, w) }}", w=w)
    _, weights = compare_graphs(before, after)
    only = weights.changes[0]
    assert (only.name, only.op, only.shape) == ("q", "com.microsoft.MatMulNBits", [64, 24])
    assert only.types == ("float", f"uint{bits}") and only.elements == (1536, 1536)
    assert only.zeros == pytest.approx(np.mean(codes == 0))
    assert (only.bytes_before, only.bytes_after) == (w.nbytes, stored)
    assert only.bits_after == pytest.approx(8 * stored / 1536) and only.bits_before == 32


def test_zeros_of_pruned_and_of_affine_weights() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 32)).astype(np.float32)
    pruned = np.where(rng.random(w.shape) < 0.7, 0, w).astype(np.float32)
    text = f"{HEAD} g (float[3, 32] x, float[32, 32] w) => (y) {{ y = MatMul(x, w) }}"
    _, weights = compare_graphs(from_text(text, w=w), from_text(text, w=pruned))
    assert weights.changes[0].zeros == np.mean(pruned == 0) and weights.changes[0].types == ("float", "float")

    q, zero = rng.integers(100, 140, (32, 32)).astype(np.uint8), np.uint8(120)
    affine = from_text(
        f"{HEAD} g (float[3, 32] x, uint8[32, 32] q, float s, uint8 z) => (y) "
        "{ w = DequantizeLinear(q, s, z) y = MatMul(x, w) }",
        q=q, s=np.float32(0.1), z=zero,
    )  # fmt: skip
    _, weights = compare_graphs(from_text(text, w=w), affine)
    only = weights.changes[0]
    assert only.zeros == pytest.approx(np.mean(q == zero)) and only.types == ("float", "uint8")
    assert only.elements == (1024, 1024) and only.bytes_after == 1024 + 4 + 1


def test_every_byte_is_accounted_for() -> None:
    """Shared initializers count once, small ones are summed up; two products that became one are one place."""
    rng = np.random.default_rng(0)
    shapes = {f"w{kind}{i}": (64, 128) for kind in "gu" for i in range(2)} | {"wd": (128, 64), "b": (64,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    inputs = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    layer = "g{i} = MatMul({x}, wg{i}) s{i} = Sigmoid(g{i}) a{i} = Mul(g{i}, s{i}) u{i} = MatMul({x}, wu{i}) "
    layer += "h{i} = Mul(a{i}, u{i}) d{i} = MatMul(h{i}, wd) {y} = Add(d{i}, b) "
    body = layer.format(i=0, x="x", y="m") + layer.format(i=1, x="m", y="y")
    model = from_text(f"{HEAD} g (float[n, 64] x{inputs}) => (y) {{ {body} }}", **arrays)
    out = lathe.compile(model, ["fuse-gelu", "fuse-gate-up", "quantize-weights", "cleanup"], progress=False)
    weights = out.report.weights
    assert weights is not None
    for side in range(2):
        listed = sum((item.bytes_before, item.bytes_after)[side] for item in weights.changes)
        assert listed + weights.more[1 + side] == out.report.weight_bytes[side]
        assert sum(weights.bytes_by_type[side].values()) == out.report.weight_bytes[side]
    assert weight_bytes(out.model) == out.report.weight_bytes[1]
    graph = out.report.graph
    assert graph is not None
    joined = [item for item in graph.replacements if item.before == {"MatMul": 2}]
    assert [(item.places, item.after) for item in joined] == [(2, {"com.microsoft.MatMulNBits": 1, "Split": 1})]
    assert max(item.elements for item in weights.changes) == (2 * 64 * 128, 2 * 64 * 128)


def test_weights_that_stay_in_their_file_are_not_read(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_external_data(model_of("m = MatMul(x, w) y = Relu(m)", w=W.repeat(16, 0).reshape(4, 64)), tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(ir.ExternalTensor, "numpy", lambda self: pytest.fail("read"))
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", lambda self: pytest.fail("read"))
    graph, weights = compare_graphs(model, model.clone())
    assert graph.unchanged == 2 and weights.changes[0].zeros is None


def test_records_survive_json() -> None:
    after, _, _ = packed(4, True)
    w = np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32)
    before = from_text(f"{HEAD} g (float[3, 64] x, float[64, 24] w) => (y) {{ y = MatMul(x, w) }}", w=w)
    for record, kind in zip(compare_graphs(before, after), (GraphChange, Weights), strict=True):
        assert kind.from_dict(json.loads(json.dumps(dataclasses.asdict(record)))) == record


def test_a_long_chain_takes_linear_time() -> None:
    """Ten thousand nodes that all look alike, one of them gone."""
    nodes = [f"v{i + 1} = Relu(v{i})" for i in range(5_000)]
    body = "v0 = Identity(x) " + " ".join(nodes) + " y = Identity(v5000)"
    shorter = "v0 = Identity(x) " + " ".join(nodes[:2_500]) + " z = Neg(v2500) v2502 = Sigmoid(z) "
    shorter += " ".join(nodes[2_502:]) + " y = Identity(v5000)"
    graph, _ = compare_graphs(model_of(body), model_of(shorter))
    assert graph.unchanged == 5_000 and Counter(r.places for r in graph.replacements) == {1: 1}
