"""The weights that PruneSparse can make sparse: constants of MatMul, Gemm and Conv, with all nodes that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds, Outcome
from ...compiler.graph import Array, all_nodes, attribute, constant, is_op, rank
from ..linear_layers import LinearLayer, linear_layer
from ..low_bit.streams import token_rows
from ..quantization.quantization_plan import Filter, selected

RULE = "dense weight -> sparse weight"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(eq=False)
class Prunable:
    """One constant weight W, as [groups, N, K], and the layers that multiply with it.

    The K inputs of an output are those of the unfolded convolution, kernel position by kernel position, so that
    consecutive inputs are consecutive channels.

    Attributes:
        value: the initializer.
        layers: its readers, all of one layout.
        bias: the initializer that takes in the change of the layer's mean output, None without.
    """

    value: ir.Value
    layers: list[LinearLayer]
    bias: ir.Value | None = None

    @property
    def name(self) -> str:
        """The initializer's name."""
        return self.value.name or ""

    @property
    def inputs(self) -> list[ir.Value]:
        """What is multiplied with it, without repetition."""
        values = [layer.node.inputs[0] for layer in self.layers]
        return list(dict.fromkeys(value for value in values if value is not None))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the initializer."""
        return tuple(int(size) for size in self.value.shape or () if isinstance(size, int))

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape))

    def matrix(self) -> Array:
        """W, float32 [groups, N, K]."""
        array = constant(self.value)
        if array is None:
            raise ValueError(f"{self.name} has no data")
        return self._by_position(self.layers[0].matrix(array)).astype(np.float32)

    def stored(self, matrix: Array) -> ir.TensorProtocol:
        """The tensor for a W [groups, N, K], in the initializer's layout and type."""
        layer = self.layers[0]
        if is_op(layer.node, "Conv"):
            channels = self.shape[1]
            matrix = matrix.reshape(*matrix.shape[:2], -1, channels).swapaxes(2, 3).reshape(matrix.shape)
        dtype = self.value.dtype or ir.DataType.FLOAT
        return ir.Tensor(layer.unmatrix(matrix, self.shape).astype(dtype.numpy()), name=self.name)

    def rows(self, layer: LinearLayer, x: Array, feeds: Feeds) -> Array:
        """What the outputs of ``layer`` see of its input ``x``: float32 [groups, rows, K], without padded tokens."""
        if not is_op(layer.node, "Conv"):
            return token_rows(x, feeds)[None]
        return self._by_position(layer.rows(x.astype(np.float32, copy=False)))

    def output_rows(self, layer: LinearLayer, y: Array, feeds: Feeds) -> Array:
        """An output of ``layer``, row by row as in ``rows``: float32 [groups, rows, N]."""
        if not is_op(layer.node, "Conv"):
            return token_rows(y, feeds)[None]
        outputs = self.shape[0]
        return (
            np.moveaxis(y, 1, -1).reshape(-1, layer.groups, outputs // layer.groups).swapaxes(0, 1).astype(np.float32)
        )

    def _by_position(self, matrix: Array) -> Array:
        """[..., channels, positions] as [..., positions, channels], for a Conv."""
        if not is_op(self.layers[0].node, "Conv"):
            return matrix
        return matrix.reshape(*matrix.shape[:2], self.shape[1], -1).swapaxes(2, 3).reshape(matrix.shape)


def find_prunable(
    model: ir.Model, include: Sequence[Filter], exclude: Sequence[Filter], outcome: Outcome
) -> list[Prunable]:
    """The weights to make sparse, in the order in which the graph uses them; near misses are refused by name."""
    found: dict[ir.Value, list[LinearLayer]] = {}
    for node in all_nodes(model):
        layer = linear_layer(node)
        reason = _unfit(node, layer)
        if layer is not None and not reason and not selected(node, include, exclude):
            reason = "left dense by include or exclude"
        if reason:
            outcome.refuse(node, RULE, reason)
        elif layer is not None:
            found.setdefault(layer.weight, []).append(layer)
    kept: list[Prunable] = []
    for value, layers in found.items():
        weight = Prunable(value, layers)
        reason = _shared(weight)
        if reason:
            outcome.refuse(layers[0].node, RULE, reason)
        else:
            kept.append(weight)
    return kept


def _unfit(node: ir.Node, layer: LinearLayer | None) -> str:
    """Why the weight of ``node`` cannot be made sparse; empty if it can, or if it has none."""
    if not is_op(node, "MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
        return ""
    right = node.inputs[1]
    if layer is None:
        if is_op(node, "MatMul") and rank(right) != 2:
            return ""  # a product of two activations: nothing to report
        if attribute(node, "transA", 0):
            return "the Gemm transposes its input"
        name = right.name if right is not None else ""
        return f"the weight {name} is not a constant: if it is computed from some, run fold-constants first"
    if layer.dequantize is not None:
        return "the weight is quantized: prune first, then quantize"
    if layer.weight.dtype not in _FLOATS or constant(layer.weight) is None:
        return f"the weight {layer.weight.name} is {layer.weight.dtype}"
    return ""


def _shared(weight: Prunable) -> str:
    """Why a weight with these readers is left alone."""
    first, known = weight.layers[0], {layer.node for layer in weight.layers}
    others = [use.node for use in weight.value.uses() if use.node not in known or use.idx != 1]
    if others or weight.value.is_graph_output():
        reader = others[0].name if others else "the caller"
        return f"the weight {weight.name} is also read by {reader}, which is not pruned"
    layouts = {(layer.node.op_type, layer.out_axis, layer.groups) for layer in weight.layers}
    if len(layouts) > 1:
        return f"the weight {weight.name} is also read by {weight.layers[1].node.name} in another layout"
    array = constant(weight.value)
    if array is None or not np.isfinite(array).all():
        return f"the weight {first.weight.name} holds NaN or infinity"
    return ""
