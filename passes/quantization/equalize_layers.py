"""Cross-layer equalization: channels between two layers get the same range on both sides."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import Array, Names, add_initializer, all_nodes
from ..linear_layers import LinearLayer, float_weight, linear_layer
from ..matching import next_node
from .channel_scale import CannotFold, Place, divide, find_places, set_input

_RULE = "W2 f(W1 x + b1) -> (W2 s) f(W1 x / s + b1 / s)"
_ROUNDS = 40
_CONVERGED = 1e-4
_WORTH = 1e-2
"""Factors closer to 1 than this are left alone, so that a second run finds nothing to do."""
_SMALLEST, _LARGEST = 1e-4, 1e4


@dataclasses.dataclass
class _Pair:
    """Two layers with a positively homogeneous f between, and what the channels between are divided by so far."""

    first: LinearLayer
    second: LinearLayer
    places: list[Place]
    factor: Array


@dataclasses.dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Gives every channel between two layers the same weight range in both of them.

    ``s_i = sqrt(max|W1_i| / max|W2_i|)`` with row i of W1 and column i of W2; ``W1_i / s_i``, ``b1_i / s_i``,
    ``W2_i * s_i``, over all pairs in turn until no factor moves by more than 1e-4 (Nagel et al., "Data-Free
    Quantization", 2019, section 4.1).

    1. Conv, Gemm and MatMul pairs (grouped and depthwise Conv too), through biases and f with ``f(s x) = s f(x)``:
       Relu, LeakyRelu, PRelu, Clip(0, no upper bound), pooling, none.
    2. Channels whose weights are all zero keep their scale; factors stay in 1e-4..1e4.

    Refused: Relu6 (Clip with an upper bound, which would need one bound per channel), an intermediate or a weight with
    other readers, weights in half precision. BatchNormalization must be folded first. Needs no samples.

    Pays nothing by itself: it is for quantization with one scale per weight tensor, where the smallest channel
    otherwise has few of the levels; with one scale per channel it changes little.
    """

    name: ClassVar[str] = "equalize-layers"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        pairs = [pair for node in all_nodes(model) if (pair := _pair(node, outcome)) is not None]
        _equalize(pairs)
        names = Names(model)
        kept = [pair for pair in pairs if np.abs(np.log(pair.factor)).max(initial=0.0) > _WORTH]
        for pair in kept:
            self._apply(pair, names)
            outcome.counts[f"{pair.first.node.op_type} and {pair.second.node.op_type}"] += 1
        return outcome

    def _apply(self, pair: _Pair, names: Names) -> None:
        node = pair.second.node
        divide(pair.places, pair.factor, pair.first.channel_axis, names, self.name)
        weight, graph = float_weight(pair.second), node.graph
        if weight is None or not isinstance(graph, ir.Graph):
            return
        scaled = pair.second.times_inputs(weight.astype(np.float64), pair.factor).astype(weight.dtype)
        new = add_initializer(graph, names, f"{pair.second.weight.name}_equalized", scaled)
        set_input(node, 1, new, self.name)


def _pair(node: ir.Node, outcome: Outcome) -> _Pair | None:
    """The pair that ``node`` is the second layer of."""
    second = linear_layer(node)
    value = node.inputs[0] if node.inputs else None
    if second is None or value is None:
        return None
    try:
        places = find_places(value, second.channel_axis)
    except CannotFold as error:
        if value.producer() is not None:
            outcome.refuse(node, _RULE, str(error))
        return None
    first = next((place.layer for place in places if place.layer is not None), None)
    if first is None:
        return None  # a normalization or a constant in front: no pair
    if next_node(value) is not node:
        outcome.refuse(node, _RULE, f"{value.name} is also used elsewhere")
        return None
    for layer in (first, second):
        if float_weight(layer) is None or len(layer.weight.uses()) != 1:
            outcome.refuse(node, _RULE, f"the weight {layer.weight.name} is not float32, or is also used elsewhere")
            return None
    channels = len(second.by_input(float_weight(second)))  # type: ignore[arg-type]
    return _Pair(first, second, places, np.ones(channels))


def _equalize(pairs: list[_Pair]) -> None:
    """Finds the factors of all pairs; a layer in the middle of a chain belongs to two."""
    weights = {layer.node: float_weight(layer) for pair in pairs for layer in (pair.first, pair.second)}
    arrays = {node: array.astype(np.float64) for node, array in weights.items() if array is not None}
    for _ in range(_ROUNDS):
        moved = 0.0
        for pair in pairs:
            first, second = pair.first, pair.second
            r1 = np.abs(first.by_output(arrays[first.node])).max(axis=1)
            r2 = np.abs(second.by_input(arrays[second.node])).max(axis=1)
            alive = (r1 > 0) & (r2 > 0)
            step = np.ones_like(r1)
            step[alive] = np.sqrt(r1[alive] / r2[alive])
            step = np.clip(pair.factor * step, _SMALLEST, _LARGEST) / pair.factor
            pair.factor *= step
            arrays[first.node] = first.times_outputs(arrays[first.node], 1.0 / step)
            arrays[second.node] = second.times_inputs(arrays[second.node], step)
            moved = max(moved, float(np.abs(step - 1.0).max(initial=0.0)))
        if moved < _CONVERGED:
            break
