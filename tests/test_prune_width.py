"""Width pruning: cut graphs against masked ones for every kind of unit, near misses, the refit, the options."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from cached_decoders import grouped, tiny
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import constant, weight_bytes
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.verify import check_structure, compare, run_reference
from onnxlathe.passes import PruneWidth
from onnxlathe.passes.pruning.coupling_rules import coupling_of
from onnxlathe.passes.pruning.cut import cut
from onnxlathe.passes.pruning.fit import mask
from onnxlathe.passes.pruning.units import Dimension
from onnxlathe.runtime.errors import LatheError, PassError
from onnxlathe.runtime.feeds import make_feeds
from rewriting import from_text, inside_if, with_external_data

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    """Random weights of a size that keeps activations near 1."""
    return (RNG.standard_normal(shape) / np.sqrt(shape[0] if len(shape) == 2 else 4)).astype(np.float32)


def graph(
    body: str, x: str = "float[n, 5, 8] x", opset: int = 23, y: str = "float[n, 5, 8] y", **weights: Any
) -> ir.Model:
    """A model from the body of its graph; ``weights`` are its initializers."""
    kinds = {"f": "float", "i": "int64"}
    arrays = {name: np.asarray(item) for name, item in weights.items()}
    declared = "".join(f", {kinds[item.dtype.kind]}{list(item.shape) or ''} {name}" for name, item in arrays.items())
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return from_text(f"{head} g ({x}{declared}) => ({y}) {{ {body} }}", **arrays)


def plain_ffn() -> ir.Model:
    body = "a = MatMul(x, w)  b = Add(a, c)  g = Gelu(b)  d = MatMul(g, v)  e = Add(d, f)  y = Add(e, x)"
    return graph(body, w=array(8, 32), c=array(32), v=array(32, 8), f=array(8))


def gemm_ffn() -> ir.Model:
    body = "a = Gemm<transB=1>(x, w, c)  b = Relu(a)  y = Gemm(b, v, f)"
    return graph(body, "float[n, 8] x", y="float[n, 3] y", w=array(32, 8), c=array(32), v=array(32, 3), f=array(3))


def bias_gelu() -> ir.Model:
    body = "a = MatMul(x, w)  g = com.microsoft.BiasGelu(a, c)  y = MatMul(g, v)"
    return graph(body, w=array(8, 32), c=array(32), v=array(32, 8))


def gated_ffn() -> ir.Model:
    body = "a = MatMul(x, w)  u = MatMul(x, k)  s = Sigmoid(a)  t = Mul(a, s)  m = Mul(t, u)  y = MatMul(m, v)"
    return graph(body, w=array(8, 32), k=array(8, 32), v=array(32, 8))


def merged_gate() -> ir.Model:
    body = "a = MatMul(x, w)  g, u = Split<axis=-1>(a, sizes)  s = Gelu(g)  m = Mul(s, u)  y = MatMul(m, v)"
    return graph(body, w=array(8, 64), sizes=np.array([32, 32]), v=array(32, 8))


def sliced_gate() -> ir.Model:
    body = """a = MatMul(x, w)  g = Slice(a, zero, half, last)  u = Slice(a, half, end, last)
        s = Gelu(g)  m = Mul(s, u)  y = MatMul(m, v)"""
    numbers = {"zero": [0], "half": [32], "end": [2**31], "last": [-1]}
    return graph(body, w=array(8, 64), v=array(32, 8), **{name: np.array(item) for name, item in numbers.items()})


def heads(op: str, attributes: str, biased: bool = False, width: int = 8) -> ir.Model:
    body = f"""q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        a = {op}<{attributes}>(q, k, v{", b" if biased else ""})  y = MatMul(a, wo)"""
    more = {"b": array(24)} if biased else {}
    return graph(body, wq=array(8, 8), wk=array(8, width), wv=array(8, width), wo=array(8, 8), **more)


def packed_heads() -> ir.Model:
    body = "a = com.microsoft.Attention<num_heads=4>(x, w, b)  y = MatMul(a, wo)"
    return graph(body, w=array(8, 24), b=array(24), wo=array(8, 8))


def conv_net() -> ir.Model:
    """A stem, a residual block with batch normalization, a depthwise layer, a Concat, pooling, a classifier."""
    body = """s = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x, ws, bs)  r = Relu(s)
        c = Conv<kernel_shape=[1, 1]>(r, w1)  n, _, _ = BatchNormalization<training_mode=0>(c, g, b, m, v)
        t = Add(n, r)  d = Conv<group=16, kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(t, wd)
        e = Conv<kernel_shape=[1, 1]>(d, w2)  j = Concat<axis=1>(d, e)
        p = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(j)  f = Flatten(p)  y = Gemm(f, wc)"""
    body = body.replace("n, _, _ =", "n =")
    vectors = {name: np.abs(array(16)) + 0.5 for name in "gmv"}
    weights = {"ws": array(16, 3, 3, 3), "bs": array(16), "w1": array(16, 16, 1, 1), "wd": array(16, 1, 3, 3)}
    shape = {"w2": array(6, 16, 1, 1), "wc": array(22 * 4, 5), "b": array(16), **vectors}
    return graph(body, "float[n, 3, 4, 4] x", y="float[n, 5] y", **weights, **shape)


@functools.cache
def encoder() -> ir.Model:
    from onnxlathe.models.encoder import Encoder, EncoderConfig
    from onnxlathe.models.zoo import build

    entry = build("encoder")
    module = Encoder(EncoderConfig(hidden=32, intermediate=64)).eval()
    return load_model(lathe.export(module, entry.args, dynamic_shapes=entry.dynamic_shapes, check=False))


@functools.cache
def decoder() -> ir.Model:
    from onnxlathe.models.decoder import decoder as build

    return load_model(lathe.export_causal_lm(build("tiny", vocab_size=64, max_position_embeddings=64), check=False))


@functools.cache
def fused(kind: str) -> ir.Model:
    model = encoder() if kind == "encoder" else decoder()
    return load_model(lathe.compile(model, "cpu-fp32", speed_gate=False, progress=False).model)


KINDS = {
    "plain": (plain_ffn, "ffn"),
    "gemm": (gemm_ffn, "ffn"),
    "BiasGelu": (bias_gelu, "ffn"),
    "gated": (gated_ffn, "ffn"),
    "merged gate and up": (merged_gate, "ffn"),
    "sliced gate and up": (sliced_gate, "ffn"),
    "MultiHeadAttention": (lambda: heads("com.microsoft.MultiHeadAttention", "num_heads=4", True), "heads"),
    "Attention-23": (lambda: heads("Attention", "q_num_heads=4, kv_num_heads=2", width=4), "heads"),
    "packed Attention": (packed_heads, "heads"),
    "conv": (conv_net, "channels"),
    "encoder": (encoder, "heads"),
    "fused encoder": (lambda: fused("encoder"), "heads"),
    "decoder": (decoder, "heads"),
    "fused decoder": (lambda: fused("decoder"), "heads"),
    "GroupQueryAttention": (lambda: grouped(tiny(), rotary=True), "heads"),
    "RotaryEmbedding": (lambda: grouped(tiny(), rotary=False), "heads"),
}


def cut_and_masked(model: ir.Model, every: int = 2) -> tuple[ir.Model, ir.Model, list[Dimension]]:
    """The model with every other unit cut, and the same units masked."""
    left, right = load_model(model), load_model(model)
    infer_shapes(left)
    infer_shapes(right)
    coupling, other = coupling_of(left), coupling_of(right)
    found = coupling.dimensions()
    gone = np.concatenate([item.units[1::every] for item in found])
    mask([consumer for item in other.dimensions() for consumer in item.consumers], gone)
    cut(coupling, gone, "test")
    check_structure(left)
    return left, right, found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_is_what_is_masked(kind: str) -> None:
    build, expected = KINDS[kind]
    model = build()
    smaller, masked, found = cut_and_masked(model)
    assert expected in {item.kind for item in found}
    assert weight_bytes(smaller) < weight_bytes(model)
    feeds = make_feeds(load_model(model), seed=1)
    shapes = {value.name: value.shape for value in smaller.graph.inputs}
    narrow = [{name: item[:, : shapes[name][1]] if "past" in name else item for name, item in f.items()} for f in feeds]
    caches = any("past" in name for name in feeds[0])
    full, small = run_reference(masked, feeds), run_reference(smaller, narrow)
    if caches:  # of the caches only the heads that are left can be compared; the logits say the rest
        full, small = ([{"logits": r["logits"]} for r in results] for results in (full, small))
    error, output = compare(full, small)
    assert error <= 1e-5, f"{output} differs by {error:.1e}"


def samples(model: ir.Model, count: int = 12) -> list[dict[str, np.ndarray]]:
    """Random inputs of a few sizes."""
    return [
        make_feeds(load_model(model), seed=seed, count=1, sizes={"n": 16, "batch": 4, "sequence": 12})[0]
        for seed in range(count)
    ]


def pruned(model: ir.Model, step: PruneWidth, feeds: list[dict[str, np.ndarray]] | None = None) -> tuple[ir.Model, Any]:
    """The model after the pass, structure checked, and the outcome."""
    after = load_model(model)
    infer_shapes(after)
    outcome = step(after, PassContext(feeds=samples(model) if feeds is None else feeds))
    check_structure(after)
    assert not step(after.clone(), PassContext(feeds=samples(model))).changed, "a second run cut again"
    return after, outcome


def lost(model: ir.Model, after: ir.Model) -> float:
    """Energy of the difference on samples that calibration did not see, as a share of the outputs' energy."""
    feeds = [make_feeds(load_model(model), seed=seed, count=1, sizes={"n": 16})[0] for seed in range(50, 60)]
    pairs = zip(run_reference(model, feeds), run_reference(after, feeds), strict=True)
    parts = [(np.square(a[k] - b[k]).sum(), np.square(a[k] - a[k].mean()).sum()) for a, b in pairs for k in a]
    return float(sum(part[0] for part in parts) / sum(part[1] for part in parts))


@pytest.mark.parametrize("build", [plain_ffn, gemm_ffn, bias_gelu, gated_ffn, conv_net], ids=lambda f: f.__name__)
def test_the_refit_loses_less_than_dropping(build: Any) -> None:
    model = build()
    dropped, _ = pruned(model, PruneWidth(ratio=0.5, multiple=1, method="activation", refit=False))
    fitted, outcome = pruned(model, PruneWidth(ratio=0.5, multiple=1, method="activation"))
    best, _ = pruned(model, PruneWidth(ratio=0.5, multiple=1))
    assert lost(model, fitted) < lost(model, dropped)
    assert lost(model, best) < lost(model, dropped)
    assert weight_bytes(best) < 0.75 * weight_bytes(model)
    assert outcome.counts and any("refitted" in note for note in outcome.notes)


def test_units_that_repeat_others_cost_nothing() -> None:
    """Half of the hidden units are copies: least squares gives their weights to the others."""
    half = array(8, 16)
    model = graph(
        "a = MatMul(x, w)  b = Add(a, c)  g = Gelu(b)  d = MatMul(g, v)  y = Add(d, f)",
        w=np.concatenate([half, half], axis=1),
        c=np.tile(array(16), 2),
        v=array(32, 8),
        f=array(8),
    )
    after, outcome = pruned(model, PruneWidth(ratio=0.5, multiple=1))
    assert lost(model, after) < 1e-3
    assert outcome.counts == {"hidden units of a layer cut": 1}


def test_a_bias_takes_up_the_mean_of_what_is_gone() -> None:
    """Units that hardly vary go without loss, as their mean is in the bias."""
    still = np.concatenate([array(8, 16), np.zeros((8, 16), np.float32)], axis=1)
    model = graph(
        "a = MatMul(x, w)  b = Add(a, c)  g = Gelu(b)  d = MatMul(g, v)  y = Add(d, f)",
        w=still,
        c=np.full(32, 2, np.float32),
        v=array(32, 8),
        f=array(8),
    )
    after, _ = pruned(model, PruneWidth(ratio=0.5, multiple=1))
    assert lost(model, after) < 1e-4


def test_widths_are_multiples() -> None:
    after, _ = pruned(plain_ffn(), PruneWidth(ratio=0.3, multiple=8))
    assert sorted(constant(v).shape for v in after.graph.initializers.values() if len(v.shape or ()) == 2) == [
        (8, 24),
        (24, 8),
    ]


def test_heads_and_their_attributes() -> None:
    model = heads("com.microsoft.MultiHeadAttention", "num_heads=4", biased=True)
    after, outcome = pruned(model, PruneWidth(ratio=0.25))
    node = next(node for node in after.graph if node.op_type == "MultiHeadAttention")
    assert node.attributes["num_heads"].value == 3
    assert outcome.counts == {"heads of a layer cut": 1}


def test_whole_groups_of_a_grouped_query_attention() -> None:
    model = grouped(tiny(), rotary=True)
    after, _ = pruned(model, PruneWidth(ratio=0.5, what=("heads",), method="magnitude", refit=False))
    node = next(node for node in after.graph if node.op_type == "GroupQueryAttention")
    assert (node.attributes["num_heads"].value, node.attributes["kv_num_heads"].value) == (2, 1)
    caches = [v for v in [*after.graph.inputs, *after.graph.outputs] if (v.name or "").startswith(("past", "present"))]
    assert caches and all(value.shape is not None and value.shape[1] == 1 for value in caches)


def test_what_and_exclude() -> None:
    model = conv_net()
    _, outcome = pruned(model, PruneWidth(ratio=0.5, what=("ffn", "heads")))
    assert not outcome.changed
    _, outcome = pruned(plain_ffn(), PruneWidth(ratio=0.5, multiple=1, exclude=("w",)))
    assert not outcome.changed


def test_in_compile_with_external_weights(tmp_path: Any) -> None:
    model = with_external_data(encoder(), tmp_path)
    before = ir.to_proto(model).SerializeToString()
    result = lathe.compile(
        model, [PruneWidth(ratio=0.5), "cpu-fp32"], calibration=samples(encoder()), speed_gate=False, progress=False
    )
    assert ir.to_proto(model).SerializeToString() == before
    assert result.report.passes[0].counts == {"hidden units of a layer cut": 2, "heads of a layer cut": 2}
    assert {n.op_type for n in result.model.graph} >= {"LayerNormalization"}


def test_bytes_target() -> None:
    model = plain_ffn()
    after, _ = pruned(model, PruneWidth(bytes_target=0.6, multiple=1))
    assert 0.5 < weight_bytes(after) / weight_bytes(model) <= 0.6


def test_a_second_run_to_a_target_leaves_alone_what_was_too_small_for_the_first() -> None:
    body = "a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  s = Add(c, x)"
    body += "  d = MatMul(s, k)  e = Relu(d)  y = MatMul(e, z)"
    model = graph(body, w=array(8, 64), v=array(64, 8), k=array(8, 8), z=array(8, 8))
    _, outcome = pruned(model, PruneWidth(bytes_target=0.8, multiple=4))
    assert any("too few" in item.reason for item in outcome.refusals)
    for target in (0.8, 0.25):  # a layer of few units never stands in the way of a target
        after, _ = pruned(model, PruneWidth(bytes_target=target, multiple=1))
        assert 0.8 * target < weight_bytes(after) / weight_bytes(model) <= target


def test_latency_target_is_measured() -> None:
    model = graph("a = MatMul(x, w)  g = Relu(a)  y = MatMul(g, v)", w=array(8, 4096), v=array(4096, 8))
    after, outcome = pruned(model, PruneWidth(latency_target=0.8, method="activation"), samples(model, 2))
    assert weight_bytes(after) < weight_bytes(model)
    assert any("of each layer's units go" in note for note in outcome.notes)


BLOCKED = {
    "a normalization": ("a = MatMul(x, w)  b = LayerNormalization(a, s)  y = MatMul(b, v)", "normalizes over it"),
    "an output": ("a = MatMul(x, w)  g = Relu(a)  y = MatMul(g, v)", "output of the model"),
    "an operator that is not known": ("a = MatMul(x, w)  g = CumSum(a, one)  y = MatMul(g, v)", "cannot be followed"),
    "a sum": ("a = MatMul(x, w)  m = ReduceMax<keepdims=1>(a, last)  g = Div(a, m)  y = MatMul(g, v)", "reduces it"),
    "a weight made at run time": ("a = MatMul(x, w)  u = Neg(v)  y = MatMul(a, u)", "computed first"),
    "a size read for more": (
        "a = MatMul(x, w)  h = Shape<start=2>(a)  f = Cast<to=1>(h)  g = Div(a, f)  y = MatMul(g, v)",
        "more than shapes",
    ),
}


@pytest.mark.parametrize("what", BLOCKED)
def test_what_cannot_be_followed_is_refused_by_name(what: str) -> None:
    body, reason = BLOCKED[what]
    weights = {"w": array(8, 32), "v": array(32, 8), "s": array(32), "one": np.array(2), "last": np.array([-1])}
    used = {name: item for name, item in weights.items() if f" {name})" in body or f"({name})" in body}
    y = "float[n, 5, 8] y, float[n, 5, 32] g" if what == "an output" else "float[n, 5, 8] y"
    _, outcome = pruned(graph(body, y=y, **used), PruneWidth(ratio=0.5))
    assert not outcome.changed
    assert any(reason in refusal.reason for refusal in outcome.refusals), outcome.refusals


def test_grouped_convolutions_are_refused() -> None:
    body = """a = Conv<kernel_shape=[1, 1]>(x, w)  b = Conv<group=2, kernel_shape=[1, 1]>(a, v)
        y = Conv<kernel_shape=[1, 1]>(b, u)"""
    weights = {"w": array(8, 3, 1, 1), "v": array(8, 4, 1, 1), "u": array(2, 8, 1, 1)}
    model = graph(body, "float[n, 3, 4, 4] x", y="float[n, 2, 4, 4] y", **weights)
    _, outcome = pruned(model, PruneWidth(ratio=0.5, multiple=1))
    assert not outcome.changed
    assert any("groups of several channels" in refusal.reason for refusal in outcome.refusals)


def test_a_branch_of_an_if_stays() -> None:
    model = inside_if(load_model(plain_ffn()))
    outcome = PruneWidth(ratio=0.5)(model, PassContext(feeds=[{"x": array(2, 5, 8), "take": np.array([True])}]))
    assert not outcome.changed


def test_a_weight_that_two_layers_share_is_cut_once() -> None:
    body = "a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  d = MatMul(c, w)  e = Relu(d)  y = MatMul(e, v)"
    model = graph(body, w=array(8, 32), v=array(32, 8))
    smaller, masked, _ = cut_and_masked(model)
    feeds = make_feeds(load_model(model), seed=1)
    assert compare(run_reference(masked, feeds), run_reference(smaller, feeds))[0] <= 1e-5
    after, _ = pruned(model, PruneWidth(ratio=0.5, multiple=1))
    assert weight_bytes(after) == weight_bytes(model) // 2


def test_a_bias_that_two_layers_share_does_not_tie_them() -> None:
    body = """a = MatMul(x, w)  b = Add(a, c)  g = Relu(b)  d = MatMul(g, v)
        e = MatMul(d, p)  h = Add(e, c)  i = Relu(h)  y = MatMul(i, q)"""
    model = graph(body, w=array(8, 32), c=array(32), v=array(32, 8), p=array(8, 32), q=array(32, 8))
    loaded = load_model(model)
    infer_shapes(loaded)
    assert [len(item.units) for item in coupling_of(loaded).dimensions()] == [32, 8, 32]
    after, _ = pruned(model, PruneWidth(ratio=0.5, multiple=1))
    assert lost(model, after) < 0.5


def test_bad_input() -> None:
    with pytest.raises(PassError, match="leaves none of the 4 heads"):
        pruned(heads("Attention", "q_num_heads=4, kv_num_heads=4"), PruneWidth(ratio=0.95))
    with pytest.raises(PassError, match="needs calibration samples"):
        pruned(plain_ffn(), PruneWidth(ratio=0.5), [])
    with pytest.raises(PassError, match="at most"):
        pruned(conv_net(), PruneWidth(bytes_target=0.01))
    for options in ({"ratio": 1.0}, {"ratio": 0.0}, {"latency_target": 2.0}, {"what": ("layers",)}, {"multiple": 0}):
        with pytest.raises((ValueError, LatheError)):
            PruneWidth(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        PruneWidth(latency_target=0.5, bytes_target=0.5)
