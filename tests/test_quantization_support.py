"""Every row of the table of predictions against ONNX Runtime's own optimized graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxlathe.runtime.quantization_support import FLOAT_OPS, FOLDED_OPS, INTEGER_OPS, predict

_SEQUENCE, _IMAGE = "float[b, n, 8] x", "float[b, 8, 16, 16] x"
_Q = "xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)"
_Z = "rq = QuantizeLinear(r, s, z) rd = DequantizeLinear(rq, s, z)"
_W = "wd = DequantizeLinear<axis=1>(w, sw, zw)"
_C = "cd = DequantizeLinear<axis=0>(c, sw, zw)"
# How each operator reads dequantized values: (other inputs, dequantized constants, the node).
_ROWS = {
    "MatMul": (_SEQUENCE, _W, "v = MatMul(xd, wd)"),
    "Gemm": ("float[n, 8] x", _W, "v = Gemm(xd, wd)"),
    "Conv": (_IMAGE, _C, "v = Conv<pads=[1,1,1,1]>(xd, cd)"),
    "ConvTranspose": (_IMAGE, _C, "v = ConvTranspose(xd, cd)"),
    **{op: (f"{_SEQUENCE}, float[b, n, 8] r", _Z, f"v = {op}(xd, rd)") for op in ("Add", "Mul", "Sub", "Div", "Pow")},
    **{op: (f"{_SEQUENCE}, float[b, n, 8] r", _Z, f"v = {op}(xd, rd)") for op in ("Min", "Max")},
    "Concat": (f"{_SEQUENCE}, float[b, n, 8] r", _Z, "v = Concat<axis=2>(xd, rd)"),
    "Where": (f"{_SEQUENCE}, float[b, n, 8] r, bool[b, n, 8] k", _Z, "v = Where(k, xd, rd)"),
    "AveragePool": (_IMAGE, "", "v = AveragePool<kernel_shape=[2,2]>(xd)"),
    "GlobalAveragePool": (_IMAGE, "", "v = GlobalAveragePool(xd)"),
    "MaxPool": (_IMAGE, "", "v = MaxPool<kernel_shape=[2,2]>(xd)"),
    "DepthToSpace": (_IMAGE, "", "v = DepthToSpace<blocksize=2>(xd)"),
    "SpaceToDepth": (_IMAGE, "", "v = SpaceToDepth<blocksize=2>(xd)"),
    "Resize": (_IMAGE, "", 'v = Resize<mode="nearest">(xd, , up)'),
    "Transpose": (_SEQUENCE, "", "v = Transpose<perm=[0,2,1]>(xd)"),
    "Reshape": (_SEQUENCE, "", "v = Reshape(xd, flat)"),
    "Unsqueeze": (_SEQUENCE, "", "v = Unsqueeze(xd, zero)"),
    "Slice": (_SEQUENCE, "", "v = Slice(xd, zero, four, one)"),
    "Gather": (_SEQUENCE, "", "v = Gather(xd, four)"),
    "Tile": (_SEQUENCE, "", "v = Tile(xd, repeats)"),
    "Expand": (_SEQUENCE, "", "v = Expand(xd, wide)"),
    "Split": (_SEQUENCE, "", "v, v2 = Split<axis=2, num_outputs=2>(xd)"),
    "Clip": (_SEQUENCE, "", "v = Clip(xd, low)"),
    "Pad": (_SEQUENCE, "", "v = Pad(xd, edges)"),
    "LayerNormalization": (_SEQUENCE, "", "v = LayerNormalization<axis=-1>(xd, ones)"),
}
_CONSTANTS = {
    "s": np.float32(0.05),
    "z": np.array(128, np.uint8),
    "w": np.ones((8, 8), np.int8),
    "sw": np.full(8, 0.01, np.float32),
    "zw": np.zeros(8, np.int8),
    "c": np.ones((8, 8, 3, 3), np.int8),
    "up": np.array([1, 1, 2, 2], np.float32),
    "flat": np.array([0, 2, -1]),
    "low": np.float32(-1),
    "zero": np.array([0]),
    "one": np.array([1]),
    "four": np.array([4]),
    "repeats": np.array([1, 1, 2]),
    "wide": np.array([2, 1, 1, 1]),
    "edges": np.array([0, 1, 0, 0, 1, 0]),
    "ones": np.ones(8, np.float32),
}


def optimized(op: str, folder: Path, quantize: bool = True) -> Counter[str]:
    """Operators of ORT's optimized graph of ``op`` between DequantizeLinear and, if wanted, QuantizeLinear."""
    inputs, constants, node = _ROWS.get(op, (_SEQUENCE, "", f"v = {op}(xd)"))
    ends = "yq = QuantizeLinear(v, s, z) y = DequantizeLinear(yq, s, z)" if quantize else "y = Identity(v)"
    if op == "Split":
        ends += " q2 = QuantizeLinear(v2, s, z) y2 = DequantizeLinear(q2, s, z)"
    outputs = "float y, float y2" if op == "Split" else "float y"
    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {_Q} {constants} {node} {ends} }}")
    used = {name for item in model.graph.node for name in item.input}
    arrays = [onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in _CONSTANTS.items() if name in used]
    model.graph.initializer.extend(arrays)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(item.op_type for item in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("op", INTEGER_OPS)
def test_integer_kernels(op: str, tmp_path: Path) -> None:
    support = predict(op)
    found = optimized(op, tmp_path)
    kernel = "QLinearMatMul" if op == "MatMul" else support.kernel
    assert found[kernel] == 1 and not found[op]
    bare = optimized(op, tmp_path, quantize=False)
    assert bool(bare[support.kernel]) != support.needs_output


@pytest.mark.parametrize("op", FOLDED_OPS)
def test_data_movement_runs_on_integers(op: str, tmp_path: Path) -> None:
    assert predict(op).execution == "folded"
    found = optimized(op, tmp_path)
    if op in ("Identity", "Expand"):  # nothing is left of a no-op
        assert found["QuantizeLinear"] == 1 and found["DequantizeLinear"] == 1
    else:
        assert found[op] == 1 and found["QuantizeLinear"] == 1


@pytest.mark.parametrize("op", FLOAT_OPS)
def test_overhead(op: str, tmp_path: Path) -> None:
    support = predict(op)
    assert support.execution == "overhead" and support.reason
    found = optimized(op, tmp_path)
    assert found["QuantizeLinear"] >= 2 and found["DequantizeLinear"] >= 2
    assert not [name for name in found if name.startswith("QLinear")]


def test_sixteen_bits_and_cuda_are_overhead() -> None:
    assert predict("MatMul", activation="int16").execution == "overhead"
    assert predict("MatMul", device="cuda").execution == "overhead"
    assert predict("Gelu", "com.microsoft").execution == "overhead"
