"""AWQ: inputs that are large get finer weights; their scales go into what makes the inputs.

Source: Lin et al., AWQ (2306.00978): ``W' = W diag(s)``, ``x' = x / s``, ``s_j = mean|x_j|^a``, with the exponent a
that gives the smallest output error after quantization. a = 0 is among the choices, so it is never worse than rounding
on the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array, Names, add_initializer, constant, dims, is_op, producer
from ..matching import NORMALIZATIONS
from .blockwise import searched_grid
from .gptq import row_losses

EXPONENTS = tuple(round(0.05 * step, 2) for step in range(21))


def awq_scales(
    weights: Sequence[Array], hessian: Array, magnitude: Array, bits: int, block_size: int, symmetric: bool
) -> Array:
    """The scales s, float32 [K], for weights that share their input; ones where nothing is gained.

    Args:
        weights: float32 [N, K] each.
        hessian: X X^T, [K, K].
        magnitude: mean |x_j|, [K].
        bits, block_size, symmetric: how the weights will be quantized.
    """
    best, chosen = np.inf, np.ones(len(magnitude), np.float32)
    for exponent in EXPONENTS:
        scales = np.maximum(magnitude, 1e-4 * magnitude.max() + 1e-30) ** exponent
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        loss = 0.0
        for weight in weights:
            scaled = weight * scales
            grid = searched_grid(scaled, bits, block_size, symmetric, np.diagonal(hessian) / scales**2)
            loss += float(row_losses(weight, grid.decode(grid.round(scaled)) / scales, hessian).sum())
        if loss < best:
            best, chosen = loss, scales
    return chosen


class Upstream:
    """Where the scales of an input can be folded.

    Attributes:
        reason: why they cannot, empty if they can.
        constants: (node, input index) of the vectors to divide.
        product: the linear layer whose outputs are divided, if it is not a normalization.
    """

    def __init__(self, x: ir.Value, readers: set[ir.Node]) -> None:
        self.constants: list[tuple[ir.Node, int]] = []
        self.product: ir.Value | None = None
        self.reason = ""
        if x.is_graph_output() or {use.node for use in x.uses()} != readers:
            self.reason = f"{x.name} is also read by others"
            return
        node = x.producer()
        kind = (node.op_type, node.domain) if node is not None else ("", "")
        if node is not None and kind in NORMALIZATIONS:
            used = [
                index for index in NORMALIZATIONS[kind] if index < len(node.inputs) and node.inputs[index] is not None
            ]
            self.constants = [(node, index) for index in used]
        elif node is not None and is_op(node, "Mul"):
            self._product_or_scale(node, x)
        else:
            self.reason = f"nothing in front of {x.name} can take the scales"
        if any(constant(node.inputs[index]) is None for node, index in self.constants):
            self.reason = f"the normalization in front of {x.name} has no constant weight"

    def _product_or_scale(self, node: ir.Node, x: ir.Value) -> None:
        width = (dims(x) or [None])[-1]
        for index, value in enumerate(node.inputs):
            array = constant(value, limit=1 << 20)
            if array is not None and array.shape == (width,):
                self.constants = [(node, index)]
                return
        for value in reversed(node.inputs):  # act(gate) * up: the linear side takes them
            maker = producer(value, "MatMul")
            if maker is not None and value is not None and len(value.uses()) == 1 and not value.is_graph_output():
                self.product = value
                return
        self.reason = f"neither side of the product {node.name} is a constant or a MatMul"


def fold_into_constants(places: Sequence[tuple[ir.Node, int]], scales: Array, names: Names) -> None:
    """Divides the vectors at ``places`` by ``scales``; shared initializers stay as they are for their other readers."""
    for node, index in places:
        value = node.inputs[index]
        array = constant(value)
        if value is None or array is None or not isinstance(node.graph, ir.Graph):
            raise ValueError(f"{node.name} has no constant at {index}")
        divided = (array.astype(np.float32) / scales).astype(array.dtype)
        node.replace_input_with(index, add_initializer(node.graph, names, f"{value.name}_awq", divided))
