"""Ranks: each file's graph, and what they compute together, against the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from grouped_decoders import Spec, decoder
from rank_models import FFN, check_ranks, ffn, weights

import onnxlathe as lathe
from cached_decoders import grouped, stories
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.ranks import save_ranks
from onnxlathe.passes.partition.partition_tensor import PartitionTensor
from onnxlathe.passes.partition.splits import CannotSplit, divide, reshape
from onnxlathe.runtime.errors import ModelError, PlanError
from rewriting import from_text, ops, rewrite


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_columns_then_rows(ranks: int, tmp_path: Path) -> None:
    """250 columns, which 3 and 4 do not divide: parts differ by one."""
    model = ffn(
        "a = MatMul(x, up) b = Add(a, bias) c = Gelu(b) d = MatMul(c, down) y = Add(d, after)",
        **weights(up=(64, 250), bias=(250,), down=(250, 64), after=(64,)),
    )
    graphs = check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.02)
    for graph in graphs:
        assert ops(graph)["com.microsoft.AllReduce"] == 1 and "com.microsoft.AllGather" not in ops(graph)
    sizes = [graph.graph.initializers["up_part"].const_value.shape[1] for graph in graphs]  # type: ignore[union-attr]
    assert sum(map(int, sizes)) == 250 and max(sizes) - min(sizes) <= 1


def test_the_second_run_changes_nothing() -> None:
    model = ffn("a = MatMul(x, up) c = Relu(a) y = MatMul(c, down)", **weights(up=(64, 250), down=(250, 64)))
    after, outcome = rewrite(PartitionTensor(2), model, nested=False)
    assert outcome.counts == {"weights divided": 2}
    assert [node.op_type for node in after.graph] == ["MatMul", "Relu", "MatMul"], "the graph itself stays"


@pytest.mark.parametrize("ranks", [2, 3])
def test_gate_and_up_in_one_matrix(ranks: int, tmp_path: Path) -> None:
    """Each rank has a part of the gate and the part of up that goes with it."""
    model = ffn(
        "a = MatMul(x, gate_up) gate, up = Split<axis=-1, num_outputs=2>(a) s = Sigmoid(gate) t = Mul(gate, s)"
        " u = Mul(t, up) y = MatMul(u, down)",
        **weights(gate_up=(64, 344), down=(172, 64)),
    )
    check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.01)


def test_gemm_adds_its_bias_once(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 64] x, float[250, 64] up, float[250] b1,
      float[64, 250] down, float[64] b2) => (float[batch, 64] y) {
      a = Gemm<transB=1>(x, up, b1) c = Relu(a) y = Gemm<transB=1>(c, down, b2) }"""
    model = from_text(text, **weights(up=(250, 64), b1=(250,), down=(64, 250), b2=(64,)))
    graphs = check_ranks(model, 3, tmp_path / "r")
    with_bias = [len([v for v in list(g.graph)[2].inputs if v is not None]) for g in graphs]
    assert with_bias == [3, 2, 2]


@pytest.mark.parametrize(
    ("spec", "ranks"),
    [
        (Spec(), 2),
        (Spec(heads=6, kv_heads=3), 3),
        (Spec(heads=4, kv_heads=4, repeat="none"), 4),
        (Spec(repeat="tile", scale="both"), 2),
        (Spec(norm=True, softcap=5.0, mask="where"), 2),
        (Spec(packed="split", windows=(0, 3)), 2),
        (Spec(mask="attention"), 2),
    ],
)
def test_unfused_decoders(spec: Spec, ranks: int, tmp_path: Path) -> None:
    """Caches of each rank hold its key/value heads."""
    graphs = check_ranks(decoder(spec), ranks, tmp_path / "r")
    for graph in graphs:
        past = next(value for value in graph.graph.inputs if "past" in (value.name or ""))
        assert past.shape is not None and past.shape[1] == spec.kv_heads // ranks
        assert ops(graph)["com.microsoft.AllReduce"] == 2, "one a layer, behind attention"


GQA = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (int64[batch, sequence] input_ids,
  int64[batch, total_sequence] attention_mask, float[batch, {kv}, past, 16] past_k, float[batch, {kv}, past, 16] past_v,
  {inputs}) => (float[batch, sequence, 300] logits, float[batch, {kv}, total_sequence, 16] pk,
  float[batch, {kv}, total_sequence, 16] pv) {{
  total = Shape<start=1, end=2>(attention_mask) last = Sub(total, one) zero = Squeeze(last) l32 = Cast<to=6>(last)
  n = Shape<start=0, end=1>(input_ids) seqlens = Expand(l32, n) t32 = Cast<to=6>(total) width = Squeeze(t32)
  h = Gather(embed, input_ids) qkv = MatMul(h, w) biased = Add(qkv, b)
  a, pk, pv = com.microsoft.GroupQueryAttention<num_heads={q}, kv_num_heads={kv}, do_rotary=1>
    (biased, , , past_k, past_v, seqlens, width, cosines, sines)
  o = MatMul(a, wo) r = Add(h, o) logits = MatMul(r, head) }}"""


@pytest.mark.parametrize(("query", "kv", "ranks"), [(4, 2, 2), (6, 3, 3), (8, 4, 4)])
def test_packed_group_query_attention(query: int, kv: int, ranks: int, tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = weights(
        embed=(300, 64), w=(64, (query + 2 * kv) * 16), b=((query + 2 * kv) * 16,), wo=(query * 16, 64), head=(64, 300)
    )
    angles = np.outer(np.arange(64), 100.0 ** (-np.arange(0, 16, 2) / 16))
    arrays |= {"cosines": np.cos(angles).astype(np.float32), "sines": np.sin(angles).astype(np.float32)}
    inputs = ", ".join(f"float[{', '.join(map(str, a.shape))}] {name}" for name, a in arrays.items())
    model = from_text(GQA.format(q=query, kv=kv, inputs=inputs + ", int64[1] one"), **arrays, one=np.array([1]))
    for value in [*model.graph.inputs, *model.graph.outputs]:
        names = {"past_k": "past_key_values.0.key", "past_v": "past_key_values.0.value"}
        names |= {"pk": "present.0.key", "pv": "present.0.value"}
        value.name = names.get(value.name or "", value.name)
    check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.05)


def encoder_text(attention: str, opset: int = 23) -> str:
    return f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> g (float[batch, n, 48] x,
      float[batch, 1, n, n] mask, float[48, 96] wq, float[48, 96] wk, float[48, 96] wv, float[96, 48] wo, float[288] b)
      => (float[batch, n, 48] y) {{
      q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) {attention} o = MatMul(a, wo) y = Add(o, x) }}"""


SIX_HEADS = "a = Attention<q_num_heads=6, kv_num_heads=6>(q, k, v, mask)"
ENCODER = {"wq": (48, 96), "wk": (48, 96), "wv": (48, 96), "wo": (96, 48), "b": (288,)}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "attention",
    [
        SIX_HEADS,
        "a = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v, , , mask)",
        "a = com.microsoft.MultiHeadAttention<num_heads=6>(q, k, v, b, , mask)",
    ],
)
def test_fused_encoders(attention: str, ranks: int, tmp_path: Path) -> None:
    model = from_text(encoder_text(attention), **weights(**ENCODER))
    check_ranks(model, ranks, tmp_path / "r", 1 / ranks + (0.07 if "b" not in attention else 0.02))


def test_a_head_that_is_the_table(tmp_path: Path) -> None:
    """Both have the same rows of one table; other rows are looked up by other ranks."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (int64[batch, n] ids, float[300, 32] table, float[32, 96] up,
      float[96, 32] down) => (float[batch, n, 300] y) {
      h = Gather(table, ids) a = MatMul(h, up) c = Relu(a) d = MatMul(c, down) e = Add(d, h)
      t = Transpose<perm=[1, 0]>(table) y = MatMul(e, t) }"""
    model = from_text(text, **weights(table=(300, 32), up=(32, 96), down=(96, 32)))
    graphs = check_ranks(model, 2, tmp_path / "r", 0.51)
    assert all(len(graph.graph.initializers["table_part"].uses()) == 2 for graph in graphs)


@pytest.mark.parametrize("ranks", [2, 4])
def test_stories_by_ranks_are_the_same(ranks: int, tmp_path: Path) -> None:
    model = grouped(stories(), rotary=False)
    prompts = [[1, 403, 407, 261, 378], [1, 346, 388]]
    expected = lathe.Session(model, threads=1).generate(prompts, 40)
    PartitionTensor(ranks)(model, PassContext(threads=1))
    session = lathe.RankedSession(save_ranks(model, tmp_path / "r"))
    for got, wanted in zip(session.generate(prompts, 40), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_exported_stories_by_ranks_are_the_same(exported_stories: ir.Model, tmp_path: Path) -> None:
    """Unfused, the cache concatenated, tied weights."""
    model = lathe.compile(exported_stories, ["basic"], verify=False, progress=False).model
    expected = lathe.Session(model, threads=1).generate([1, 403, 407], 40)
    check_ranks(model, 2, tmp_path / "r", 0.52)
    np.testing.assert_array_equal(lathe.RankedSession(tmp_path / "r").generate([1, 403, 407], 40), expected)


def test_a_rank_alone_does_not_run(tmp_path: Path) -> None:
    """Its exchanges are operators that plain onnxruntime has no kernels for: better than wrong numbers."""
    model = ffn("a = MatMul(x, up) c = Relu(a) y = MatMul(c, down)", **weights(up=(64, 250), down=(250, 64)))
    check_ranks(model, 2, tmp_path / "r")
    with pytest.raises(Exception, match="AllReduce"):
        ort.InferenceSession(tmp_path / "r" / "rank0.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = MatMul(x, up) s = ReduceMean<keepdims=1>(a, last) c = Sub(a, s) y = MatMul(c, down)", "needs it whole"),
        ("a = MatMul(x, up) c = Softmax<axis=-1>(a) y = MatMul(c, down)", "needs it whole"),
        ("a = MatMul(x, up) c = CumSum(a, axis) y = MatMul(c, down)", "needs it whole"),
    ],
)
def test_what_needs_all_columns_stays_whole(body: str, reason: str, tmp_path: Path) -> None:
    """Only the second product is divided: its columns are put together at the output."""
    shape = {"last": np.array([-1], np.int64), "axis": np.array(2, np.int64)}
    text = FFN.format(inputs="float[64, 250] up, float[250, 64] down, int64[1] last, int64 axis", body=body)
    model = from_text(text, **weights(up=(64, 250), down=(250, 64)), **shape)
    outcome = PartitionTensor(2)(model.clone(), PassContext())
    assert any(reason in refusal.reason for refusal in outcome.refusals)
    graphs = check_ranks(model, 2, tmp_path / "r")
    assert ops(graphs[0])["com.microsoft.AllGather"] == 1 and "up" in graphs[0].graph.initializers


@pytest.mark.parametrize(
    ("model", "ranks", "reason"),
    [
        (lambda: decoder(Spec(heads=6, kv_heads=3)), 2, "3 heads cannot be divided over 2 ranks"),
        (lambda: from_text(encoder_text(SIX_HEADS), **weights(**ENCODER)), 4, "6 query heads"),
        (lambda: decoder(Spec()), 1, "Give at least 2"),
        (lambda: ffn("y = Relu(x)", **weights(w=(64, 64))), 2, "No weight of this model"),
    ],
)
def test_what_cannot_be_divided(model: Any, ranks: int, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        PartitionTensor(ranks)(model(), PassContext())


def test_passes_afterwards_are_noticed(tmp_path: Path) -> None:
    model = ffn("a = MatMul(x, up) c = Relu(a) y = MatMul(c, down)", **weights(up=(64, 250), down=(250, 64)))
    PartitionTensor(2)(model, PassContext())
    next(iter(model.graph)).name = "renamed"
    with pytest.raises(PlanError, match="was changed after"):
        save_ranks(model, tmp_path / "r")
    with pytest.raises(PlanError, match="partition-stages"):
        lathe.save_stages(model, tmp_path / "s")
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        lathe.RankedSession(tmp_path)


def test_divisions_through_reshapes() -> None:
    heads = reshape(divide(2, [12], 2), [3, 7, 12], [3, 7, 4, 3])
    assert (heads.axis, heads.sizes, heads.total) == (2, [2, 2], 4)
    assert reshape(heads, [3, 7, 4, 3], [3, 7, 12]) == divide(2, [12], 2)
    merged = reshape(divide(1, [4], 2), [3, 4, 7, 2], [12, 7, 2])
    assert (merged.axis, merged.outer, merged.total) == (0, 3, 4)
    assert reshape(merged, [12, 7, 2], [3, 4, 7, 2]) == divide(1, [4], 2)
    with pytest.raises(CannotSplit, match="3 heads"):
        reshape(divide(2, [12], 2), [3, 7, 12], [3, 7, 3, 4])


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_divisions(seed: int) -> None:
    """What ranks have of an axis, cut, scaled or within a piece, against arrays of indices."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 5))
    pieces = [int(n) for n in rng.integers(ranks, 20, int(rng.integers(1, 4)))]
    split = divide(0, pieces, ranks)
    places = [np.concatenate([np.arange(a, b) for a, b in ranges]) for ranges in split.ranges]
    np.testing.assert_array_equal(np.sort(np.concatenate(places)), np.arange(sum(pieces)))
    assert split.in_order == (len(pieces) == 1)
    for start, size in zip(np.cumsum([0, *pieces[:-1]]), pieces, strict=True):
        inner = split.within(int(start), int(start + size))
        assert inner is not None
        for rank, ranges in enumerate(inner.ranges):
            mine = places[rank][(places[rank] >= start) & (places[rank] < start + size)] - start
            np.testing.assert_array_equal(np.concatenate([np.arange(a, b) for a, b in ranges]), mine)
    factor = int(rng.integers(2, 5))
    assert split.times(factor).over(factor) == split
