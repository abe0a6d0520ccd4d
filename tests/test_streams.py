"""Stream: stage by stage it makes what the whole graph makes, in memory or spilled, also through bodies and padding."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import onnx_ir as ir
import pytest
from low_bit_models import block, block_feeds

from onnxlathe.passes.low_bit.streams import ArrayStore, Stream, stage_order, token_rows
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text

BRANCHED = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 4] x, bool[1] take) => (float[n, 4] y) {
  a = Neg(x)  b = Abs(x)
  c = If (take) <then_branch = t () => (float[n, 4] r) { r = Mul(a, b) }, else_branch = e () => (float[n, 4] q)
    { q = Add(a, b) }>
  d = Add(c, x)  y = Exp(d)
}"""


def values(model: ir.Model, *names: str) -> list[ir.Value]:
    found = {value.name: value for node in model.graph for value in node.outputs}
    return [found[name] for name in names]


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_like_the_whole_graph(memory: int) -> None:
    model, feeds = block(), block_feeds(3)
    stages = stage_order(model, values(model, "m", "n", "r"))
    assert [value.name for value in stages] == ["n", "m", "r"]
    whole = model.clone()
    whole.graph.outputs.extend(values(whole, "n", "m", "r"))
    session = open_session(whole, session_options())
    expected = [run_session(session, sample) for sample in feeds]
    stream = Stream(model, stages, feeds, memory)
    for number, stage in enumerate(stages):
        for got, wanted in zip(stream.advance(number), expected, strict=True):
            assert np.allclose(got, wanted[stage.name or ""], atol=1e-5)


def test_later_stages_see_weights_changed_in_between() -> None:
    model, feeds = block(), block_feeds(2)
    stages = stage_order(model, values(model, "n", "m"))
    stream = Stream(model, stages, feeds, 1 << 20)
    list(stream.advance(0))
    up = model.graph.initializers["up_w"]
    up.const_value = ir.tensor(np.zeros((64, 80), np.float32), name="up_w")
    assert all((array == 0).all() for array in stream.advance(1))


@pytest.mark.parametrize("take", [True, False])
def test_values_that_only_a_body_reads_are_kept(take: bool) -> None:
    model = from_text(BRANCHED)
    from onnxlathe.compiler.load import infer_shapes

    infer_shapes(model)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    stream = Stream(model, values(model, "b", "d"), [{"x": x, "take": np.array([take])}], 1 << 20)
    (first,) = stream.advance(0)
    (second,) = stream.advance(1)
    assert np.array_equal(first, np.abs(x))
    assert np.allclose(second, (-x * np.abs(x) if take else -x + np.abs(x)) + x, atol=1e-6)


def test_store_spills_and_forgets() -> None:
    store = ArrayStore(100)
    arrays = [np.full(10, i, np.float64) for i in range(4)]  # 80 bytes each: the first fits
    for number, array in enumerate(arrays):
        store.put(number, "a", array)
    assert all(np.array_equal(store.get(number, "a"), array) for number, array in enumerate(arrays))
    store.keep_only(set())
    with pytest.raises(KeyError):
        store.get(0, "a")


def test_padding_is_left_out() -> None:
    array = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 1]])  # one past column
    assert np.array_equal(token_rows(array, {"attention_mask": mask}), array.reshape(6, 2)[[0, 1, 2, 4, 5]])
    assert token_rows(array, {}).shape == (6, 2)


def test_weights_replaced_later_are_let_go() -> None:
    """Although the loop pauses the collector of cycles: GPTQ puts a new weight in at every stage."""
    model, feeds = block(), block_feeds(1)
    stages = stage_order(model, values(model, "n", "m", "r"))
    stream = Stream(model, stages, feeds, 1 << 20)
    up = model.graph.initializers["up_w"]
    gc.disable()
    try:
        up.const_value = ir.tensor(np.zeros((64, 80), np.float32), name="up_w")
        alive = weakref.ref(up.const_value)
        list(stream.advance(0)), list(stream.advance(1))
        up.const_value = None
        assert alive() is None
    finally:
        gc.enable()


def test_ends_that_no_later_stage_reads_are_kept() -> None:
    """Two inputs of the model, and two outputs of one node, as stages: nothing else keeps the second of each."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x, float[n, 4] z) => (float[n, 4] y)
    { a, b = Split<axis=1, num_outputs=2>(x) s = Neg(b) y = Concat<axis=1>(a, s) }"""
    model = from_text(text)
    feeds = [{"x": np.arange(4, dtype=np.float32)[None], "z": np.ones((1, 4), np.float32)}]
    stages = [*model.graph.inputs, *values(model, "a", "b")]
    stream = Stream(model, stages, feeds, 1 << 20)
    found = [next(iter(stream.advance(number))).tolist() for number in range(4)]
    assert found == [[[0, 1, 2, 3]], [[1, 1, 1, 1]], [[0, 1]], [[2, 3]]]


def test_a_stage_after_values_of_unknown_type() -> None:
    """Shape inference knows no types of contrib operators' outputs; a part that begins with one needs it."""
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (float[n, 4] x) => (float[n, 4] y)
    { a = com.microsoft.FastGelu(x) b = Neg(a) y = Exp(b) }"""
    model = from_text(text)
    stages = values(model, "a", "b")
    assert stages[0].dtype is None
    stream = Stream(model, stages, [{"x": np.zeros((1, 4), np.float32)}], 1 << 20)
    assert [next(iter(stream.advance(number))).tolist() for number in range(2)] == [[[0.0] * 4], [[-0.0] * 4]]
