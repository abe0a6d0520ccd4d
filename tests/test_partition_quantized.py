"""Ranks of quantized models: codes, scales and zero points are cut together; what cannot be is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from quantized import quantize
from rank_models import FFN, check_ranks, ffn, weights

import onnxlathe as lathe
from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.passes.fusion.fuse_integer_product import FuseIntegerProduct
from onnxlathe.passes.low_bit.quantize_weights import QuantizeWeights
from onnxlathe.passes.partition.partition_tensor import PartitionTensor
from onnxlathe.passes.partition.splits import CannotSplit, Split, divide
from onnxlathe.passes.quantization.quantize_dynamic import QuantizeDynamic
from rewriting import from_text, ops

UP_DOWN = "a = MatMul(x, up) b = Add(a, bias) c = Gelu(b) d = MatMul(c, down) y = Add(d, after)"
SHAPES = {"up": (64, 250), "bias": (250,), "down": (250, 64), "after": (64,)}


def layer(opset: int = 21) -> ir.Model:
    model = ffn(UP_DOWN, **weights(**SHAPES))
    model.opset_imports[""] = opset
    infer_shapes(model)
    return model


def low_bit(model: ir.Model, **options: object) -> ir.Model:
    """Its products in blocks; activations are not rounded, so that only the division can differ."""
    QuantizeWeights(**{"accuracy_level": 0, "head_bits": 4, **options})(model, PassContext())  # type: ignore[arg-type]
    infer_shapes(model)
    return model


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "form"), [(2, "operator"), (4, "operator"), (8, "operator"), (4, "qdq")])
def test_blocks_stay_whole(ranks: int, symmetric: bool, bits: int, form: str, tmp_path: Path) -> None:
    """250 inputs in blocks of 32, the last one smaller; zero points of several blocks share a byte."""
    model = low_bit(layer(), bits=bits, head_bits=bits, symmetric=symmetric, form=form)
    graphs = check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.12, as_written=True)
    for graph in graphs:
        assert ops(graph)["com.microsoft.AllReduce"] == 1 and "com.microsoft.AllGather" not in ops(graph)
    if form == "operator":
        inputs = [list(graph.graph)[-3].attributes["K"].as_int() for graph in graphs]
        assert sum(inputs) == 250 and all(count % 32 == 0 for count in inputs[:-1])


def test_scales_and_zero_points_that_are_flat(tmp_path: Path) -> None:
    """As onnxruntime's own quantizer and genai's builder write them."""
    model = low_bit(layer())
    for node in model.graph:
        for value in node.inputs[2:4] if node.op_type == "MatMulNBits" else ():
            assert value is not None and value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().reshape(-1), name=value.name)
            value.shape = ir.Shape(value.const_value.shape)
    check_ranks(model, 3, tmp_path / "r", 0.45)


def test_an_order_of_inputs_is_refused(tmp_path: Path) -> None:
    """g_idx of GPTQ: blocks are not of neighbours. The columns are divided and put together."""
    model = low_bit(layer())
    down = [node for node in model.graph if node.op_type == "MatMulNBits"][1]
    order = ir.Value(name="order", const_value=ir.tensor(np.arange(250, dtype=np.int32) // 32, name="order"))
    order.type, order.shape = ir.TensorType(ir.DataType.INT32), ir.Shape([250])
    model.graph.register_initializer(order)
    down.resize_inputs(5)
    down.replace_input_with(4, order)
    outcome = PartitionTensor(2)(model.clone(), PassContext())
    assert any("g_idx" in refusal.reason for refusal in outcome.refusals)
    graphs = check_ranks(model, 2, tmp_path / "r", 0.6)
    assert ops(graphs[0])["com.microsoft.AllGather"] == 2 and "com.microsoft.AllReduce" not in ops(graphs[0])


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("per_channel", [True, False])
def test_qdq_weights(ranks: int, per_channel: bool, tmp_path: Path) -> None:
    model = quantize(layer(), [], per_channel=per_channel, activations=False)
    graphs = check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.06, as_written=True)
    assert ops(graphs[0])["com.microsoft.AllReduce"] == 1 and "com.microsoft.AllGather" not in ops(graphs[0])


def test_qdq_gemm_with_an_integer_bias(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 64] x, float[250, 64] up, float[250] b1,
      float[64, 250] down, float[64] b2) => (float[batch, 64] y) {
      a = Gemm<transB=1>(x, up, b1) c = Relu(a) y = Gemm<transB=1>(c, down, b2) }"""
    model = from_text(text, **weights(up=(250, 64), b1=(250,), down=(64, 250), b2=(64,)))
    feeds = [{"x": np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)}]
    model = quantize(model, feeds, activations=False, bias=True)
    check_ranks(model, 3, tmp_path / "r", 0.42, as_written=True)


@pytest.mark.parametrize("fused", [True, False])
def test_static_int8(fused: bool, tmp_path: Path) -> None:
    """Activations with one scale: ranks round the same numbers, and add up the same integers."""
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)}]
    model = quantize(layer(), feeds)
    if fused:
        assert FuseIntegerProduct()(model, PassContext()).counts
        infer_shapes(model)
    graphs = check_ranks(model, 2, tmp_path / "r", 0.55, as_written=True)
    assert ops(graphs[0])["com.microsoft.AllReduce"] == 1 and "com.microsoft.AllGather" not in ops(graphs[0])


def test_integers_are_added_up_exactly(tmp_path: Path) -> None:
    """MatMulInteger: the sum of the ranks is that of the whole, to the bit."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (uint8[n, 64] x, int8[64, 90] up, int8[90] zeros,
      float scale, uint8 middle, int8[90, 64] down, uint8 x_zero) => (int32[n, 64] y) {
      a = MatMulInteger(x, up, x_zero, zeros) f = Cast<to=1>(a) q = QuantizeLinear(f, scale, middle)
      y = MatMulInteger(q, down, middle) }"""
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(-99, 99, shape).astype(np.int8) for name, shape in
              (("up", (64, 90)), ("zeros", (90,)), ("down", (90, 64)))}  # fmt: skip
    model = from_text(text, **arrays, scale=np.float32(300), middle=np.uint8(128), x_zero=np.uint8(7))
    graphs = check_ranks(model, 3, tmp_path / "r", 0.36)
    assert ops(graphs[0])["com.microsoft.AllReduce"] == 1


QLINEAR = """a = QuantizeLinear(x, s, z) b = QLinearMatMul(a, s, z, up, us, uz, s, z)
  c = QLinearMatMul(b, s, z, down, ds, dz, s, z) y = DequantizeLinear(c, s, z)"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sum_that_is_rounded_is_put_together(ranks: int, tmp_path: Path) -> None:
    """QLinearMatMul rounds its sum, so its columns are divided; one scale for each column, or one."""
    rng = np.random.default_rng(0)
    arrays = {"up": rng.integers(-99, 99, (64, 90)).astype(np.int8), "uz": np.zeros(90, np.int8)}
    arrays |= {"us": rng.uniform(0.001, 0.003, 90).astype(np.float32), "ds": np.float32(0.002), "dz": np.int8(0)}
    arrays |= {"down": rng.integers(-99, 99, (90, 64)).astype(np.int8), "s": np.float32(0.05), "z": np.uint8(128)}
    inputs = "int8[64, 90] up, int8[90] uz, float[90] us, float ds, int8 dz, int8[90, 64] down, float s, uint8 z"
    model = from_text(FFN.format(inputs=inputs, body=QLINEAR), **arrays)
    outcome = PartitionTensor(ranks)(model.clone(), PassContext())
    assert any("rounds its sum" in refusal.reason for refusal in outcome.refusals)
    graphs = check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.04, as_written=True)
    assert ops(graphs[0])["com.microsoft.AllGather"] == 2


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_dynamic_int8(ranks: int, tmp_path: Path) -> None:
    """The range of a whole activation is needed in front of the second product; the columns are put together there."""
    model = layer()
    QuantizeDynamic()(model, PassContext())
    infer_shapes(model)
    outcome = PartitionTensor(ranks)(model.clone(), PassContext())
    assert any("by the range of the whole" in refusal.reason for refusal in outcome.refusals)
    graphs = check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.06, as_written=True)
    assert ops(graphs[0])["com.microsoft.AllGather"] == 2


@pytest.mark.parametrize(("ranks", "gathers"), [(2, 2), (4, 11)])
def test_int4_stories_by_ranks_are_the_same(
    ranks: int, gathers: int, exported_stories: ir.Model, tmp_path: Path
) -> None:
    """8 heads of 8: on 4 ranks a block of 32 has heads of two ranks, so that attention's results are put together in
    front of its last product and behind it (5 layers)."""
    model = lathe.compile(exported_stories, ["basic"], verify=False, progress=False).model
    low_bit(model)
    assert ops(model)["com.microsoft.MatMulNBits"] == 36
    prompts = [[1, 403, 407, 261, 378], [1, 346, 388]]
    expected = lathe.Session(model, threads=1).generate(prompts, 40)
    graphs = check_ranks(model, ranks, tmp_path / "r")
    assert ops(graphs[0])["com.microsoft.AllGather"] == gathers
    session = lathe.RankedSession(tmp_path / "r")
    for got, wanted in zip(session.generate(prompts, 40), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_quantized_table_that_is_the_head(ranks: int, tmp_path: Path) -> None:
    """Its codes are stored once: both have the same rows of them."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (int64[batch, n] ids, float[300, 64] table, float[64, 128] up,
      float[128, 64] down) => (float[batch, n, 300] y) {
      h = Gather(table, ids) a = MatMul(h, up) c = Relu(a) d = MatMul(c, down) e = Add(d, h)
      t = Transpose<perm=[1, 0]>(table) y = MatMul(e, t) }"""
    model = from_text(text, **weights(table=(300, 64), up=(64, 128), down=(128, 64)))
    infer_shapes(model)
    low_bit(model, embedding_bits=4)
    assert ops(model)["Reshape"] == 1
    check_ranks(model, ranks, tmp_path / "r", 1 / ranks + 0.06)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_table_alone(bits: int, tmp_path: Path) -> None:
    """Each rank has some blocks of the width."""
    model = from_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (int64[batch, n] ids, float[300, 96] table, float[96, 64] w)
        => (float[batch, n, 64] y) { h = Gather(table, ids) y = MatMul(h, w) }""",
        **weights(table=(300, 96), w=(96, 64)),
    )
    infer_shapes(model)
    low_bit(model, embedding_bits=bits)
    assert ops(model)["com.microsoft.GatherBlockQuantized"] == 1
    check_ranks(model, 3, tmp_path / "r", 0.4)


def test_what_stays_whole_is_named() -> None:
    """QGemm is no product that the pass knows."""
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> g (uint8[n, 64] x, float s, uint8 z,
      int8[64, 90] w, int8 wz, float[90, 64] up) => (float[n, 64] y) {
      a = com.microsoft.QGemm(x, s, z, w, s, wz) y = MatMul(a, up) }"""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.integers(-99, 99, (64, 90)).astype(np.int8), **weights(up=(90, 64))}
    model = from_text(text, **arrays, s=np.float32(0.1), z=np.uint8(0), wz=np.int8(0))
    outcome = PartitionTensor(2)(model, PassContext())
    assert [refusal.reason for refusal in outcome.refusals] == ["every rank has all of w: QGemm is not divided"]


def test_blocks_of_a_division() -> None:
    assert divide(0, [250], 3, unit=32).ranges == (((0, 64),), ((64, 160),), ((160, 250),))
    assert divide(0, [250], 3, unit=32).blocks(32) == Split(0, (((0, 2),), ((2, 5),), ((5, 8),)), 8)
    assert divide(0, [250], 3).blocks(32) is None
    assert divide(0, [64, 32], 2, unit=16).even and not divide(0, [48], 2, unit=32).even
    with pytest.raises(CannotSplit, match="blocks of 32"):
        divide(0, [64], 3, unit=32)
