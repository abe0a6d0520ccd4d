"""QuantizeWeights: what is written, what it computes in ONNX Runtime, what is refused, and quality on stories260k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from low_bit_models import HIDDEN, block, block_feeds, nats, stories, story_feeds

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.passes import QuantizeWeights
from onnxlathe.passes.low_bit.blockwise import searched_grid
from onnxlathe.runtime.artifact import save
from onnxlathe.runtime.errors import PassError
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text, ops, refused, rewrite, with_external_data

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((96, 40)) / 10).astype(np.float32)
WIDE = (RNG.standard_normal((80, 40)) / 10).astype(np.float32)


def single(body: str, inputs: str = "float[b, s, 96] x", outputs: str = "float[b, s, 40] y", **arrays: Any) -> ir.Model:
    declared = ", ".join([inputs, *(f"float[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items())])
    return from_text(f'<ir_version: 10, opset_import: ["" : 23]> g ({declared}) => ({outputs}) {{ {body} }}', **arrays)


def plain(**options: Any) -> QuantizeWeights:
    return QuantizeWeights(**{"accuracy_level": 0, "head_bits": options.get("bits", 4), **options})


def expected(x: np.ndarray, weight: np.ndarray, bits: int, size: int, symmetric: bool) -> np.ndarray:
    matrix = np.ascontiguousarray(weight.T)
    grid = searched_grid(matrix, bits, size, symmetric)
    return x @ grid.decode(grid.round(matrix)).T


def executed(model: ir.Model, folder: Path, level: str | None = None) -> list[str]:
    """Operators of the graph that ONNX Runtime runs with its own optimizations."""
    options = session_options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    if level:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    open_session(model, options)
    return [node.op_type for node in ir.load(folder / "optimized.onnx").graph]


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [False, True])
def test_operator_computes_the_decoded_weight(bits: int, size: int, symmetric: bool) -> None:
    model = single("y = MatMul(x, w)", w=W)
    x = RNG.standard_normal((2, 3, 96)).astype(np.float32)
    step = plain(bits=bits, block_size=size, symmetric=symmetric)
    after, outcome = rewrite(step, model, feeds=[{"x": x}], tolerance=1.0)
    assert ops(after) == {"com.microsoft.MatMulNBits": 1}
    assert outcome.counts == {f"{bits}-bit products": 1}
    got = run_session(open_session(after, session_options()), {"x": x})["y"]
    assert np.allclose(got, expected(x, W, bits, size, symmetric), atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = Gemm(x, w, b)", "y = Gemm<transB=1>(x, v, b)"])
def test_qdq_is_fused_by_onnxruntime(bits: int, symmetric: bool, body: str, tmp_path: Path) -> None:
    arrays = {"w": W, "v": np.ascontiguousarray(W.T), "b": RNG.standard_normal(40).astype(np.float32)}
    arrays = {name: array for name, array in arrays.items() if f" {name}" in body}
    model = single(body, "float[s, 96] x", "float[s, 40] y", **arrays)
    model.opset_imports[""] = 25
    model.ir_version = 13
    x = RNG.standard_normal((3, 96)).astype(np.float32)
    step = plain(bits=bits, symmetric=symmetric, form="qdq")
    after, outcome = rewrite(step, model, feeds=[{"x": x}], tolerance=1.0, nested=False)
    assert ops(after)["DequantizeLinear"] == 1
    assert outcome.ort_config == {"config_entries": {"session.qdq_matmulnbits_accuracy_level": "0"}}
    assert executed(after, tmp_path, "0") == ["MatMulNBits"]
    options = session_options(ort_config=outcome.ort_config)
    got = run_session(open_session(after, options), {"x": x})["y"]
    assert np.allclose(got, expected(x, W, bits, 32, symmetric) + arrays.get("b", 0), atol=1e-5)


def test_gemm_bias_becomes_the_operators_bias() -> None:
    bias = RNG.standard_normal(40).astype(np.float32)
    model = single("y = Gemm(x, w, b)", "float[s, 96] x", "float[s, 40] y", w=W, b=bias)
    x = RNG.standard_normal((3, 96)).astype(np.float32)
    after, _ = rewrite(plain(), model, feeds=[{"x": x}], tolerance=1.0)
    assert ops(after) == {"com.microsoft.MatMulNBits": 1}
    got = run_session(open_session(after, session_options()), {"x": x})["y"]
    assert np.allclose(got, expected(x, W, 4, 32, False) + bias, atol=1e-5)


def test_inputs_that_no_block_divides(tmp_path: Path) -> None:
    model = single("y = MatMul(x, w)", "float[b, s, 80] x", w=WIDE)
    x = RNG.standard_normal((2, 3, 80)).astype(np.float32)
    after, _ = rewrite(plain(), model, feeds=[{"x": x}], tolerance=1.0)
    got = run_session(open_session(after, session_options()), {"x": x})["y"]
    assert np.allclose(got, expected(x, WIDE, 4, 32, False), atol=1e-5)
    after, _ = rewrite(plain(form="qdq"), model, feeds=[{"x": x}], tolerance=1.0, nested=False)
    assert executed(after, tmp_path) == ["MatMulNBits"]


def test_weight_with_two_consumers_is_stored_once() -> None:
    model = single("a = MatMul(x, w)  c = MatMul(z, w)  y = Add(a, c)", "float[b, s, 96] x, float[b, s, 96] z", w=W)
    after, outcome = rewrite(plain(), model, tolerance=1.0)
    assert ops(after) == {"com.microsoft.MatMulNBits": 2, "Add": 1}
    assert outcome.counts == {"4-bit products": 2}
    assert len(after.graph.initializers) == 3


def test_weight_that_others_read_stays_as_well() -> None:
    model = single("y = MatMul(x, w)  other = Neg(w)", outputs="float[b, s, 40] y, float[96, 40] other", w=W)
    _, outcome = rewrite(plain(), model, tolerance=1.0)
    assert any("stays as well" in note for note in outcome.notes)


TABLE = RNG.standard_normal((50, 64)).astype(np.float32)
TIED = "e = Gather(w, ids)  n = Tanh(e)  t = Transpose<perm=[1,0]>(w)  logits = MatMul(n, t)"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tied_table_and_head_are_stored_once(bits: Any) -> None:
    model = single(TIED, "int64[b, s] ids", "float[b, s, 50] logits", w=TABLE)
    ids = np.array([[1, 49, 7]])
    step = plain(head_bits=bits, embedding_bits=bits)
    after, _ = rewrite(step, model, feeds=[{"ids": ids}], tolerance=2.0)
    assert ops(after) == {
        "com.microsoft.GatherBlockQuantized": 1,
        "Reshape": 1,
        "Tanh": 1,
        "com.microsoft.MatMulNBits": 1,
    }
    arrays = [value.const_value for value in after.graph.initializers.values() if value.const_value is not None]
    assert sum(array.nbytes for array in arrays) < 50 * (64 * bits // 8 + 2 * 4 + 2) + 32
    grid = searched_grid(TABLE, bits, 32, False)
    table = grid.decode(grid.round(TABLE))
    got = run_session(open_session(after, session_options()), {"ids": ids})["logits"]
    assert np.allclose(got, np.tanh(table[ids]) @ table.T, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_tied_table_whose_rows_do_not_fill_their_blocks(symmetric: bool) -> None:
    """MatMulNBits wants whole blocks: the rows of the shared table are longer than those of the weight."""
    table = TABLE[:, :40]
    model = single(TIED, "int64[b, s] ids", "float[b, s, 50] logits", w=table)
    ids = np.array([[1, 49, 7]])
    step = plain(head_bits=4, embedding_bits=4, symmetric=symmetric)
    after, _ = rewrite(step, model, feeds=[{"ids": ids}], tolerance=2.0)
    assert ops(after)["Slice"] == 1
    grid = searched_grid(table, 4, 32, symmetric)
    decoded = grid.decode(grid.round(table))
    got = run_session(open_session(after, session_options()), {"ids": ids})["logits"]
    assert np.allclose(got, np.tanh(decoded[ids]) @ decoded.T, atol=1e-4)


def test_table_and_head_with_bits_of_their_own() -> None:
    model = single(TIED, "int64[b, s] ids", "float[b, s, 50] logits", w=TABLE)
    ids = np.array([[1, 49, 7]])
    after, outcome = rewrite(plain(head_bits=8, embedding_bits=4), model, feeds=[{"ids": ids}], tolerance=2.0)
    assert outcome.counts == {"8-bit products": 1, "4-bit tables": 1}
    head, table = (
        grid.decode(grid.round(TABLE)) for grid in (searched_grid(TABLE, bits, 32, False) for bits in (8, 4))
    )
    got = run_session(open_session(after, session_options()), {"ids": ids})["logits"]
    assert np.allclose(got, np.tanh(table[ids]) @ head.T, atol=1e-4)
    after, _ = rewrite(plain(head_bits=16, embedding_bits=4), model, feeds=[{"ids": ids}], tolerance=2.0)
    assert ops(after)["MatMul"] == 1


REFUSED = {
    "not constant": ("y = MatMul(x, w)", "float[b, s, 96] x, float[96, 40] w", {}, "not a constant"),
    "transA": ("y = Gemm<transA=1>(x, w)", "float[96, s] x", {"w": W}, "transposes its input"),
    "alpha": ("y = Gemm<alpha=2.0>(x, w)", "float[s, 96] x", {"w": W}, "run fuse-linear first"),
    "wide bias": ("y = Gemm(x, w, b)", "float[2, 96] x", {"w": W, "b": np.ones((2, 40), "f")}, "one number per output"),
    "vector": ("y = MatMul(x, w)", "float[96] x", {"w": W}, "is a vector"),
    "tiny": ("y = MatMul(x, w)", "float[b, s, 3] x", {"w": W[:3]}, "not get smaller"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, inputs, arrays, reason = REFUSED[name]
    rank = {
        "vector": "float[40] y",
        "transA": "float[s, 40] y",
        "alpha": "float[s, 40] y",
        "wide bias": "float[2, 40] y",
    }
    refused(plain(), single(body, inputs, rank.get(name, "float[b, s, 40] y"), **arrays), reason)


def test_qdq_needs_an_opset() -> None:
    model = single("y = MatMul(x, w)", w=W)
    model.opset_imports[""] = 20
    refused(plain(form="qdq"), model, "from opset 21 on")
    model.opset_imports[""] = 23
    refused(plain(form="qdq", bits=2), model, "from opset 25 on")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_calibrating_methods_need_samples(method: Any) -> None:
    with pytest.raises(PassError, match="needs calibration samples"):
        plain(method=method)(block(), PassContext())


@pytest.mark.parametrize("method", ["rtn", "hqq", "awq", "gptq"])
def test_methods_on_a_block(method: Any) -> None:
    """Each writes the same nodes, and its error on samples it has not seen is at most that of rounding."""
    feeds = block_feeds()
    context = PassContext(feeds=feeds[:8])
    after, outcome = rewrite(
        plain(method=method), block(), feeds=feeds[:2], context=context, tolerance=1.0, nested=method in ("rtn", "hqq")
    )
    assert outcome.counts == {"4-bit products": 4, "8-bit tables": 1}
    errors = {}
    rounded = block()
    plain()(rounded, PassContext())
    for name, model in {"original": block(), "rtn": rounded, method: after}.items():
        session = open_session(model, session_options())
        errors[name] = np.concatenate([run_session(session, sample)["logits"] for sample in feeds[8:]])
    loss = {name: float(np.square(value - errors["original"]).sum()) for name, value in errors.items()}
    assert loss[method] <= {"rtn": 1.0, "hqq": 1.5, "awq": 1.0, "gptq": 0.75}[method] * loss["rtn"]


def test_awq_folds_exactly() -> None:
    """At 8 bits what is left is the fold itself: gate and up take the norm's scale, up takes down's."""
    feeds = block_feeds()
    context = PassContext(feeds=feeds)
    after, outcome = rewrite(
        plain(method="awq", bits=8, embedding_bits=16),
        block(),
        feeds=feeds[:2],
        context=context,
        tolerance=0.02,
        nested=False,
    )
    assert any("2 of 3 inputs scaled" in note for note in outcome.notes), (
        outcome.notes
    )  # the residual has other readers
    gain = next(value for name, value in after.graph.initializers.items() if name.startswith("gain_awq"))
    assert gain.shape is not None and list(gain.shape) == [HIDDEN]


def test_few_samples_are_said() -> None:
    outcome = plain(method="gptq")(block(), PassContext(feeds=block_feeds(1, 4)))
    assert any("fewer calibration tokens (8) than inputs" in note for note in outcome.notes)


def test_gptq_inside_a_branch_rounds_and_says_so() -> None:
    _, outcome = rewrite(
        plain(method="gptq"),
        block(),
        feeds=block_feeds(2),
        context=PassContext(feeds=block_feeds(4)),
        tolerance=1.0,
        nested=False,
    )
    from rewriting import inside_if

    inner = inside_if(block())
    samples = [{**sample, "take": np.array([True])} for sample in block_feeds(2)]
    outcome = plain(method="gptq")(inner, PassContext(feeds=samples))
    assert outcome.counts == {"4-bit products": 4, "8-bit tables": 1}
    assert any("rounded instead" in note for note in outcome.notes)


def test_external_data(tmp_path: Path) -> None:
    rewrite(plain(), with_external_data(block(), tmp_path), feeds=block_feeds(2), tolerance=1.0, nested=False)


def test_half_precision() -> None:
    model = single("y = MatMul(x, w)", w=W)
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.tensor(W.astype(np.float16), name="w")
    x = RNG.standard_normal((1, 3, 96)).astype(np.float16)
    after, _ = rewrite(plain(), model, feeds=[{"x": x}], tolerance=1.0)
    got = run_session(open_session(after, session_options()), {"x": x})["y"]
    assert (
        np.abs(
            got.astype(np.float32)
            - expected(x.astype(np.float32), W.astype(np.float16).astype(np.float32), 4, 32, False)
        ).max()
        < 0.02
    )


def test_accuracy_level_by_measured_effect() -> None:
    """A model whose second product dies of int8 activations (one input a million times the others) keeps it exact."""
    feeds = block_feeds()
    model = block()
    outcome = QuantizeWeights()(model, PassContext(feeds=feeds))
    levels = {
        node.name: node.attributes["accuracy_level"].as_int() for node in model.graph if "MatMulNBits" in node.op_type
    }
    assert set(levels.values()) <= {0, 4} and 4 in levels.values()
    assert any("accuracy_level 4 in" in note for note in outcome.notes)

    spike = block()
    table = spike.graph.initializers["table"]
    array = np.array(table.const_value.numpy())  # type: ignore[union-attr]
    array[:, 0] = 3e3  # in every block of the residual's first 32 inputs int8 loses the others
    table.const_value = ir.tensor(array, name="table")
    head = spike.graph.initializers["head_w"]
    changed = np.array(head.const_value.numpy())  # type: ignore[union-attr]
    changed[0] = 0
    head.const_value = ir.tensor(changed, name="head_w")
    QuantizeWeights(embedding_bits=16, head_bits=4)(spike, PassContext(feeds=feeds))
    kept = [node for node in spike.graph if node.op_type == "MatMulNBits" and node.outputs[0].is_graph_output()]
    assert [node.attributes["accuracy_level"].as_int() for node in kept] == [0]


def test_accuracy_level_of_qdq_is_a_session_option() -> None:
    outcome = QuantizeWeights(form="qdq")(block(), PassContext(feeds=block_feeds()))
    assert outcome.ort_config["config_entries"]["session.qdq_matmulnbits_accuracy_level"] in ("0", "4")
    assert any("is taken, for all products" in note for note in outcome.notes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_where_onnxruntime_has_integer_kernels(bits: int, size: int) -> None:
    """Probes what ``has_integer_kernel`` states: level 4 gives another result than level 0, or the same."""
    from onnxlathe.passes.low_bit.accuracy_levels import has_integer_kernel

    weight = RNG.standard_normal((512, 64)).astype(np.float32)
    model = single("y = MatMul(x, w)", "float[b, s, 512] x", "float[b, s, 64] y", w=weight)
    plain(bits=bits, block_size=size)(model, PassContext())
    (node,) = model.graph
    x = {"x": RNG.standard_normal((1, 1, 512)).astype(np.float32)}
    results = []
    for level in (0, 4):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
        results.append(run_session(open_session(model, session_options()), x)["y"])
    assert (np.abs(results[0] - results[1]).max() > 1e-4) == has_integer_kernel(node)


def test_saved_and_loaded_by_plain_onnxruntime(tmp_path: Path) -> None:
    model = block()
    plain(bits=4)(model, PassContext())
    path = save(model, tmp_path / "block.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.run(None, block_feeds(1)[0])[0].shape == (2, 24, 96)


def test_quality_on_stories260k() -> None:
    """W4 in blocks of 32: GPTQ within 0.045 nats of fp32; W8 within 0.001; on stories not calibrated on."""
    samples = story_feeds()
    calibration, judged = samples[:60:2], samples[1:80:2]
    context = PassContext(feeds=calibration, threads=1)
    base = nats(stories(), judged)
    increase: dict[str, float] = {}
    for name, options in {"rtn": {}, "gptq": {"method": "gptq"}, "w8": {"bits": 8}}.items():
        model = stories().clone()
        outcome = plain(**{"head_bits": 16, "embedding_bits": 16, **options})(model, context)
        increase[name] = nats(model, judged) - base
        if name == "gptq":
            note = next(note for note in outcome.notes if note.startswith("layer loss"))
            median, largest = (float(note.split(word)[1].split()[0].strip(",")) for word in ("median ", "largest "))
            assert median <= 0.6 and largest <= 1.0
            assert "plain rounding kept in 0 of 35" in note
    assert increase["gptq"] <= 0.045
    assert increase["gptq"] < 0.65 * increase["rtn"]
    assert abs(increase["w8"]) <= 0.001


@pytest.mark.parametrize("form", ["operator", "qdq"])
def test_a_product_that_reads_another_product(form: Any) -> None:
    """The first is replaced before the second: what the second reads is then the new one's result."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((96, 96)).astype(np.float32) for name in ("v", "w")}
    body = "h = MatMul(x, v) m = MatMul(h, w) y = Add(m, h)"
    model = single(body, outputs="float[b, s, 96] y", **arrays)
    _, outcome = rewrite(plain(form=form, bits=8), model, tolerance=0.05)
    assert outcome.counts == {"8-bit products": 2}


def test_a_weight_used_both_ways_is_refused_by_both_names() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]> g (float[n, 32] x, float[32, 32] w) => (float[n, 32] y)
        { a = MatMul(x, w) t = Transpose<perm=[1, 0]>(w) y = MatMul(a, t) }"""
    model = from_text(text, w=np.eye(32, dtype=np.float32))
    infer_shapes(model)
    outcome = QuantizeWeights(bits=8)(model, PassContext())
    assert not outcome.changed
    assert [refusal.reason for refusal in outcome.refusals] == ["the weight w is also used transposed"] * 2
