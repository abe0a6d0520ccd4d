"""Weights clipped where the finer steps that a smaller range gives are worth more than the outliers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Outcome, Pass, PassContext
from ...compiler.graph import Array, Names, add_initializer, all_nodes
from ..linear_layers import LinearLayer, float_weight, linear_layer, watch
from .channel_scale import set_input

_RULE = "W -> clip(W, -c, c)"
_KEY = "onnxlathe.clipped"
_SHRINKS = np.linspace(1.0, 0.3, 71)
_WORTH = 0.98
"""A layer is clipped if at most this part of its error is left."""


class _Power:
    """Mean square of each of a layer's inputs: how much an error in the weight that reads it counts."""

    def __init__(self, layer: LinearLayer) -> None:
        self.layer = layer
        self.total: Array | None = None

    def update(self, array: Array) -> None:
        """Takes in the layer's input of one sample."""
        power = np.square(self.layer.rows(array.astype(np.float32, copy=False)), dtype=np.float64).sum(axis=1)
        self.total = power if self.total is None else self.total + power


@dataclasses.dataclass(frozen=True)
class ClipOutliers(Pass):
    """Clips the weights of MatMul, Gemm and Conv before they are quantized by their smallest and largest value.

    1. For each output channel (or weight, without ``per_channel``) the c of 71 fractions of ``max|w|``, 1 to 0.3, with
       the least ``sum_j E[x_j^2] (w_j - w_hat_j)^2``, w_hat being rounded to ``bits`` within [-c, c]; without samples
       all inputs count the same. A layer is clipped if its error falls by 2 %.

    Outliers of activations are the business of the range method (``QuantizeStatic(ranges="mse")``). Layers are clipped
    once (their nodes say so). Refused: weights with other readers or in half precision.

    Pays in accuracy for weights of few bits; at 8 bits with one scale per channel it finds little to do.

    Attributes:
        bits: of the weights, as they will be quantized, symmetric.
        per_channel: whether each output channel will have its scale.
    """

    name: ClassVar[str] = "clip-outliers"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    bits: int = 8
    per_channel: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}, it must lie in 2..8")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        layers = [layer for node in all_nodes(model) if (layer := linear_layer(node)) and self._usable(layer, outcome)]
        powers = self._powers(model, layers, context)
        names = Names(model)
        for layer in layers:
            weight, graph = float_weight(layer), layer.node.graph
            if weight is None or not isinstance(graph, ir.Graph):
                continue
            context.progress(f"{self.name}: {layer.node.name}")
            clipped, left = self._clip(layer, weight, powers.get(layer.node))
            if left > _WORTH:
                outcome.refuse(layer.node, _RULE, f"it does not pay: {left:.0%} of the error would stay")
                continue
            new = add_initializer(graph, names, f"{layer.weight.name}_clipped", clipped.astype(weight.dtype))
            set_input(layer.node, 1, new, self.name)
            layer.node.metadata_props[_KEY] = f"{self.bits} bits"
            outcome.counts["weights clipped"] += 1
            outcome.notes.append(f"{layer.node.name}: {left:.0%} of the rounding error at {self.bits} bits")
        return outcome

    def _usable(self, layer: LinearLayer, outcome: Outcome) -> bool:
        if layer.dequantize is not None or _KEY in layer.node.metadata_props:
            return False
        if float_weight(layer) is None or len(layer.weight.uses()) != 1:
            outcome.refuse(layer.node, _RULE, f"{layer.weight.name} is not float32, or is also used elsewhere")
            return False
        return True

    def _powers(self, model: ir.Model, layers: list[LinearLayer], context: PassContext) -> dict[ir.Node, _Power]:
        """What the samples say of each layer's inputs; layers in subgraphs have none."""
        if context.feeds == ():
            return {}
        seen = {value for node in model.graph for value in node.outputs} | set(model.graph.inputs)
        powers = {layer.node: _Power(layer) for layer in layers if layer.node.inputs[0] in seen}
        watch(model, {power.layer: power for power in powers.values()}, context)
        return powers

    def _clip(self, layer: LinearLayer, weight: Array, power: _Power | None) -> tuple[Array, float]:
        """The clipped weight, and the part of the rounding error that it leaves."""
        rows = layer.matrix(weight.astype(np.float64))
        worth = np.ones((len(rows), 1, rows.shape[-1]))
        if power is not None and power.total is not None and power.total.any():
            worth = power.total[:, None, :]
        size = np.abs(rows).max(axis=-1, keepdims=True) if self.per_channel else np.abs(rows).max(keepdims=True)
        top = 2 ** (self.bits - 1) - 1
        best, limit, first = np.full(size.shape, np.inf), size.copy(), 0.0
        for shrink in _SHRINKS:
            step = np.maximum(size * shrink / top, 1e-30)
            back = np.clip(np.rint(rows / step), -top, top) * step
            error = (worth * np.square(back - rows)).sum(axis=-1, keepdims=True)
            error = error if self.per_channel else error.sum(keepdims=True)
            if shrink == 1.0:
                first = float(error.sum())
            better = error < best
            best, limit = np.where(better, error, best), np.where(better, size * shrink, limit)
        left = float(best.sum()) / first if first > 0 else 1.0
        return layer.unmatrix(np.clip(rows, -limit, limit), weight.shape), left
