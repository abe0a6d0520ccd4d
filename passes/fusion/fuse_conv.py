"""Convolutions: constant scales, biases and batch normalizations behind them, folded into their weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import (
    FROM_KEY,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    all_nodes,
    attribute,
    constant,
    is_op,
    rank,
    remove_dead,
)
from ..matching import next_node, other_operand

_RULE = "Conv + per-channel scale and shift -> Conv"


@dataclasses.dataclass(frozen=True)
class FuseConv(Pass):
    """Folds what multiplies or shifts the channels of a Conv with constant weights into its weights and bias.

    1. ``Conv(x, W, b) * c + d`` -> ``Conv(x, c W, c b + d)`` for constants c and d, numbers or one per channel, in any
       order and number; ``BatchNormalization`` is such a scale and shift: ``scale / sqrt(var + epsilon)`` by its spec.

    Refused: weights that are shared, half-precision weights (they would be rounded a second time), an intermediate with
    other readers, constants that differ within a channel.

    Pays on no provider by itself, as ONNX Runtime does it when it loads a float model; but not behind quantization,
    which must come after it.
    """

    name: ClassVar[str] = "fuse-conv"
    gate: ClassVar[Gate] = "off"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        for node in all_nodes(model):
            if is_op(node, "Conv") and isinstance(node.graph, ir.Graph):
                while self._fold(node, node.graph, names, outcome):
                    pass
        if outcome.changed:
            remove_dead(model)
        return outcome

    def _fold(self, conv: ir.Node, graph: ir.Graph, names: Names, outcome: Outcome) -> bool:
        after = next_node(conv.outputs[0])
        if after is None or not is_op(after, "Add", "Mul", "BatchNormalization"):
            return False
        weight, bias = conv.inputs[1], (*conv.inputs, None)[2]
        stored = constant(weight)
        shift = (
            constant(bias) if bias is not None else np.zeros(stored.shape[0] if stored is not None else 0, np.float32)
        )
        if weight is None or stored is None or shift is None:
            outcome.refuse(conv, _RULE, "its weight or bias is computed at run time")
            return False
        if stored.dtype != np.float32 or len(weight.uses()) != 1:
            outcome.refuse(conv, _RULE, "its weight is shared, or not float32")
            return False
        factors = _scale_and_shift(after, conv.outputs[0], stored.shape[0])
        if factors is None:
            outcome.refuse(conv, _RULE, f"the constants of {after.name} are not one per channel, or computed")
            return False
        scale, extra = factors
        wide = scale.reshape(-1, *[1] * (stored.ndim - 1))
        new = add_initializer(graph, names, f"{weight.name}_folded", (stored * wide).astype(np.float32))
        moved = add_initializer(graph, names, f"{weight.name}_bias", (shift * scale + extra).astype(np.float32))
        for index, value in ((1, new), (2, moved)):
            conv.resize_inputs(max(len(conv.inputs), index + 1))
            conv.replace_input_with(index, value)
        conv.metadata_props[PASS_KEY] = self.name
        origin = conv.metadata_props.get(FROM_KEY, f"Conv:{conv.name}")
        conv.metadata_props[FROM_KEY] = f"{origin}, {after.op_type}:{after.name}"
        old, kept = after.outputs[0], conv.outputs[0]
        old.replace_all_uses_with(kept, replace_graph_outputs=True)
        if kept.is_graph_output():
            old.name, kept.name = kept.name, old.name
        graph.remove(after, safe=True)
        outcome.counts[f"{after.op_type} into Conv"] += 1
        return True


def _scale_and_shift(node: ir.Node, x: ir.Value, channels: int) -> tuple[Array, Array] | None:
    """``node`` as ``x * scale + shift``, float64 by channel."""
    one, none = np.ones(channels), np.zeros(channels)
    if node.op_type == "BatchNormalization":
        parts = [constant(value) for value in node.inputs[1:5]]
        if any(part is None for part in parts) or len(node.outputs) > 1 or attribute(node, "training_mode", 0):
            return None
        gamma, beta, mean, variance = (np.asarray(part, np.float64) for part in parts)
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        return scale, beta - mean * scale
    other = other_operand(node, x)
    array, size = constant(other, limit=1 << 16), rank(x)
    if array is None or size is None or array.ndim > size:
        return None
    shape = (1,) * (size - array.ndim) + array.shape
    if any(dim != 1 for axis, dim in enumerate(shape) if axis != 1) or shape[1] not in (1, channels):
        return None
    factor = np.broadcast_to(array.reshape(-1).astype(np.float64), (channels,))
    return (factor, none) if node.op_type == "Mul" else (one, factor)
