"""How long products take on this machine: one row (decoding) through a float or quantized weight."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime as ort

from ...runtime.benchmark import fastest
from ...runtime.inference import session_options
from ...runtime.providers import Device, providers_for
from .blockwise import Grid, minmax_grid, pack_codes, pack_zero_points

_SECONDS = 0.03


@functools.cache
def product_seconds(
    outputs: int, inputs: int, bits: int, block_size: int, device: Device = "cpu", threads: int = 0
) -> float:
    """Seconds of the fastest run of ``x W^T`` with x [1, inputs] and W [outputs, inputs].

    Args:
        outputs, inputs: N and K.
        bits: 2, 4, 8 (MatMulNBits, accuracy_level 4) or 16 (MatMul in float).
        block_size: of the quantized weight.
        device, threads: where to run.
    """
    weight = np.random.default_rng(0).standard_normal((outputs, inputs)).astype(np.float32)
    model = (
        _float_model(weight) if bits == 16 else _quantized_model(weight, minmax_grid(weight, bits, block_size, False))
    )
    options = session_options(threads=threads)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=providers_for(device))
    feeds = {"x": np.ones((1, inputs), np.float32)}
    return fastest(functools.partial(session.run, None, feeds), _SECONDS)


def _float_model(weight: np.ndarray) -> onnx.ModelProto:
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    return _model(node, {"w": np.ascontiguousarray(weight.T)}, weight.shape)


def _quantized_model(weight: np.ndarray, grid: Grid) -> onnx.ModelProto:
    sizes = {"N": weight.shape[0], "K": weight.shape[1], "bits": grid.bits, "block_size": grid.block_size}
    names = ["x", "codes", "scales", "zero_points"]
    node = onnx.helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", accuracy_level=4)
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in sizes.items())
    packed = pack_codes(grid.round(weight), grid)
    return _model(node, {"codes": packed, "scales": grid.scales, "zero_points": pack_zero_points(grid)}, weight.shape)


def _model(node: onnx.NodeProto, initializers: dict[str, np.ndarray], shape: tuple[int, ...]) -> onnx.ModelProto:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [info("x", onnx.TensorProto.FLOAT, [1, shape[1]])],
        [info("y", onnx.TensorProto.FLOAT, [1, shape[0]])],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
