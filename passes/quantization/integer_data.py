"""Which values integer kernels take and leave, and what Relu and Clip say about their ranges."""

from __future__ import annotations

import onnx_ir as ir

from ...compiler.graph import constant, is_op
from ...runtime.quantization_support import predict


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of ``node`` that an integer kernel takes as quantized data."""
    if node.op_type in ("MatMul", "Gemm", "Conv", "Add", "Mul"):
        return [value for value in node.inputs[:2] if value is not None]
    if node.op_type == "Where":
        return [value for value in node.inputs[1:3] if value is not None]
    if node.op_type == "Concat":
        return [value for value in node.inputs if value is not None]
    return [value for value in node.inputs[:1] if value is not None]


def integer_ends(value: ir.Value) -> list[ir.Value]:
    """``value`` and what data movement and clipping make of it."""
    found, todo = [value], [value]
    while todo:
        for use in todo.pop().uses():
            node = use.node
            moves = not node.domain and (predict(node.op_type).execution == "folded" or is_op(node, "Relu", "Clip"))
            if moves and use.idx == 0:
                for output in node.outputs:
                    found.append(output)
                    todo.append(output)
    return found


def keeps_zero(node: ir.Node) -> bool:
    """Whether ``node`` is Relu, or Clip from a constant zero on, so that a quantized range can say the same."""
    if not is_op(node, "Relu", "Clip"):
        return False
    top = node.inputs[2] if len(node.inputs) > 2 else None
    if top is not None and constant(top, limit=1) is None:
        return False
    low, high = clip_bounds(node)
    return low == 0.0 and (high is None or high > 0.0)


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Constant bounds of Relu or Clip; None where there is none or it is computed."""
    if node.op_type == "Relu":
        return 0.0, None
    bounds: list[float | None] = []
    for index, name in ((1, "min"), (2, "max")):
        array = constant(node.inputs[index], limit=1) if len(node.inputs) > index else None
        if array is not None:
            bounds.append(float(array.reshape(-1)[0]))
        else:
            bounds.append(node.attributes[name].as_float() if name in node.attributes else None)
    return bounds[0], bounds[1]
