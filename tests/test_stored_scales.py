"""Scales of a byte each: how near they are, what is written, and that ONNX Runtime makes floats of them at load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.passes import QuantizeWeights
from onnxlathe.passes.low_bit.blockwise import Grid, minmax_grid, searched_grid, stored_bytes
from onnxlathe.passes.low_bit.stored_scales import code_scales, scales_bytes, with_positive_scales
from onnxlathe.runtime.errors import PassError
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text, ops, rewrite

RNG = np.random.default_rng(0)
W = (RNG.standard_normal((96, 40)) * np.exp(RNG.standard_normal(40))).astype(np.float32)
TABLE = RNG.standard_normal((50, 64)).astype(np.float32)
HEADER = '<ir_version: 10, opset_import: ["" : 23]>'
TIED = "e = Gather(w, ids)  n = Tanh(e)  t = Transpose<perm=[1,0]>(w)  logits = MatMul(n, t)"


def product(weight: np.ndarray = W, dtype: str = "float") -> ir.Model:
    rows, columns = weight.shape
    declared = f"{dtype}[s, {rows}] x, {dtype}[{rows},{columns}] w"
    return from_text(f"{HEADER} g ({declared}) => ({dtype}[s, {columns}] y) {{ y = MatMul(x, w) }}", w=weight)


def step(**options: object) -> QuantizeWeights:
    return QuantizeWeights(**{"accuracy_level": 0, "head_bits": 4, "scales": "uint8", **options})  # type: ignore[arg-type]


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=300))
def test_error_is_that_of_the_grid(values: list[float]) -> None:
    scales = np.array(values, np.float32)
    coded = code_scales(scales)
    half = np.log(scales.max() / scales.min()) / 255 / 2
    assert (np.abs(np.log(coded.decode() / scales)) <= half + 1e-5).all()


def test_negative_scales_are_turned_around() -> None:
    codes = RNG.integers(0, 16, (3, 40)).astype(np.uint8)
    scales = RNG.standard_normal((3, 3)).astype(np.float32)
    grid = Grid(scales, RNG.integers(0, 16, (3, 3)).astype(np.uint8), 4, 16)
    assert (scales < 0).any()
    turned, positive = with_positive_scales(codes, grid)
    assert (positive.scales > 0).all()
    assert np.array_equal(positive.decode(turned), grid.decode(codes))
    same, kept = with_positive_scales(turned, positive)
    assert same is turned and kept is positive


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_onnxruntime_computes_them_once(bits: int, tmp_path: Path) -> None:
    x = RNG.standard_normal((3, 96)).astype(np.float32)
    after, _ = rewrite(step(bits=bits, head_bits=bits), product(), feeds=[{"x": x}], tolerance=1.0)
    assert ops(after) == {"Cast": 1, "Mul": 1, "Add": 1, "Exp": 1, "com.microsoft.MatMulNBits": 1}
    assert weight_bytes(after) == stored_bytes((40, 96), bits, 32, False, "uint8")
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    got = run_session(open_session(after, options), {"x": x})["y"]
    assert [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph] == ["MatMulNBits"]
    grid = searched_grid(np.ascontiguousarray(W.T), bits, 32, False)
    near = Grid(code_scales(grid.scales).decode(), grid.zero_points, bits, 32)
    assert np.allclose(got, x @ near.decode(grid.round(np.ascontiguousarray(W.T))).T, atol=1e-4)


def test_tied_table_and_head_share_them() -> None:
    declared = "int64[b, s] ids, float[50,64] w"
    model = from_text(f"{HEADER} g ({declared}) => (float[b, s, 50] logits) {{ {TIED} }}", w=TABLE)
    ids = np.array([[1, 49, 7]])
    after, _ = rewrite(step(embedding_bits=4), model, feeds=[{"ids": ids}], tolerance=2.0)
    assert ops(after)["Exp"] == 1
    grid = searched_grid(TABLE, 4, 32, False)
    table = Grid(code_scales(grid.scales).decode(), grid.zero_points, 4, 32).decode(grid.round(TABLE))
    got = run_session(open_session(after, session_options()), {"ids": ids})["logits"]
    assert np.allclose(got, np.tanh(table[ids]) @ table.T, atol=1e-4)


def test_half_precision_weights() -> None:
    weight = W.astype(np.float16)
    model = product(weight, "float16")
    x = RNG.standard_normal((3, 96)).astype(np.float16)
    after, _ = rewrite(step(), model, feeds=[{"x": x}], tolerance=1.0)
    assert ops(after)["Cast"] == 2
    got = run_session(open_session(after, session_options()), {"x": x})["y"]
    expected = x.astype(np.float32) @ weight.astype(np.float32)
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()


def test_few_scales_stay_float() -> None:
    weight = W[:, :8]
    model = product(weight)
    assert scales_bytes(8 * 3, "uint8") == scales_bytes(8 * 3, "float")
    step()(model, PassContext())
    assert ops(model) == {"com.microsoft.MatMulNBits": 1}


def test_refused_where_they_cannot_be() -> None:
    for options in ({"symmetric": True}, {"form": "qdq"}):
        with pytest.raises(PassError, match="symmetric=False only"):
            step(**options)(product(), PassContext())


def test_bytes() -> None:
    assert stored_bytes((40, 96), 4, 32, False) - stored_bytes((40, 96), 4, 32, False, "uint8") == 3 * 40 * 3 - 8
    assert minmax_grid(W, 4, 32, False).scales.size * 4 == scales_bytes(96 * 2, "float")
