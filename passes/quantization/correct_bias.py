"""Bias correction: the mean shift that quantization gives a layer's output, taken out of its bias."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import Array, Names, add_initializer, constant, producer, remove_dead
from ...runtime.calibrate import observe
from ...runtime.errors import PassError
from ..linear_layers import LinearLayer, bias_of, result_of
from .quantized_layers import mark, quantized_layers, reference_model, store

_RULE = "b -> b - E[y_quantized - y_float]"
_WORTH = 1e-3
"""A shift smaller than this part of the output's size is left alone."""


class _Mean:
    """Mean and mean square of each channel over all samples and positions."""

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0
        self.total: Array = np.zeros(0)
        self.square = 0.0

    def update(self, array: Array) -> None:
        """Takes in the value of one sample."""
        rows = np.moveaxis(array, self.axis, -1).reshape(-1, array.shape[self.axis])
        total = rows.sum(axis=0, dtype=np.float64)
        self.total = total if not self.count else self.total + total
        self.square += float(np.square(rows, dtype=np.float64).sum())
        self.count += len(rows)

    @property
    def mean(self) -> Array:
        """Mean of each channel."""
        return self.total / max(self.count, 1)

    @property
    def size(self) -> float:
        """Root of the mean squared length of a row."""
        return float(np.sqrt(self.square / max(self.count, 1)))


@dataclasses.dataclass(frozen=True)
class CorrectBias(Pass):
    """Takes the mean shift of each quantized layer's output out of its bias.

    1. ``b' = b - E[y_quantized - y_float]`` for each output channel, over all samples and positions, with y of the
       quantized graph after the layers in front have been corrected. Where only weights are quantized this is
       ``b - (W_hat - W) E[x]`` (Nagel et al., "Data-Free Quantization", 2019, section 4.2); measured on the layer's own
       output it also takes in activations that saturate, and the padding of a Conv.
    2. The bias is the third input of Conv or Gemm, or a constant vector added behind MatMul; float, or int32 behind
       DequantizeLinear, where it is rounded to that scale.

    Shifts below a thousandth of the output's size are left alone. Refused: layers without a bias or with one that
    others read, layers whose output the float model does not have under the same name.

    Pays in accuracy at no cost at run time. Takes one run over the samples for each depth of the graph.

    Attributes:
        reference: the float model; None: the graph before quantization in the same compile.
    """

    name: ClassVar[str] = "correct-bias"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    reference: ir.Model | None = dataclasses.field(default=None, repr=False)

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        found = list(quantized_layers(model))
        if not found:
            return outcome
        reference = reference_model(self.reference, context, self.name)
        if context.feeds == ():
            raise PassError("correct-bias needs calibration samples.", "Give calibration=... (--calibration x.npz).")
        made = {value.name for node in reference.graph for value in node.outputs}
        layers = [layer for layer in found if self._usable(layer, made, outcome)]
        if not layers:
            return outcome
        exact = _means(reference, layers, context)
        names = Names(model)
        for level in _levels(model, layers):
            shifted = _means(model, level, context)
            for layer in level:
                name = result_of(layer).name or ""
                shift = shifted[name].mean - exact[name].mean
                if float(np.linalg.norm(shift)) > _WORTH * exact[name].size:
                    self._correct(layer, shift, names)
                    outcome.counts["biases corrected"] += 1
        return outcome

    def _usable(self, layer: LinearLayer, made: set[str | None], outcome: Outcome) -> bool:
        bias = bias_of(layer)
        reason = ""
        if bias is None:
            reason = "it has no bias"
        elif result_of(layer).name not in made:
            reason = f"the float model has no value {result_of(layer).name}"
        else:
            dequantize = producer(bias[0].inputs[bias[1]], "DequantizeLinear")
            if dequantize is not None and len(dequantize.outputs[0].uses()) != 1:
                reason = "its bias is also used elsewhere"
        if reason:
            outcome.refuse(layer.node, _RULE, reason)
        return not reason

    def _correct(self, layer: LinearLayer, shift: Array, names: Names) -> None:
        bias = bias_of(layer)
        if bias is None:
            return
        node, index = bias
        value = node.inputs[index]
        dequantize = producer(value, "DequantizeLinear")
        if dequantize is not None and dequantize.inputs[0] is not None:
            codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
            if codes is not None and scale is not None:
                limits = np.iinfo(codes.dtype)
                moved = np.rint(codes.astype(np.float64) - shift / scale.astype(np.float64))
                store(dequantize.inputs[0], np.clip(moved, limits.min, limits.max))
        else:
            array, graph = constant(value), node.graph
            if value is None or array is None or not isinstance(graph, ir.Graph):
                return
            fixed = np.broadcast_to(array, shift.shape) - shift
            new = add_initializer(graph, names, f"{value.name}_corrected", fixed.astype(array.dtype))
            node.replace_input_with(index, new)
            if not value.uses() and not value.is_graph_output() and value.graph is graph:
                graph.initializers.pop(value.name or "", None)
        mark(node, self.name)


def _means(model: ir.Model, layers: Sequence[LinearLayer], context: PassContext) -> dict[str, _Mean]:
    """Means of the layers' outputs in ``model``, by name."""
    means = {result_of(layer).name or "": _Mean(layer.channel_axis) for layer in layers}
    front = _front(model, set(means))
    observe(front, means, context.feeds, threads=context.threads, progress=context.progress)
    return means


def _front(model: ir.Model, names: set[str]) -> ir.Model:
    """The part of ``model`` that makes the values called ``names``, so that no more is run."""
    front = model.clone()
    wanted = [value for node in front.graph for value in node.outputs if value.name in names]
    front.graph.outputs.clear()
    front.graph.outputs.extend(wanted)
    remove_dead(front)
    for name, value in list(front.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            front.graph.initializers.pop(name)
    return front


def _levels(model: ir.Model, layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """The layers by how many of them lie in front at most: those of one level do not read each other."""
    by_node = {layer.node: layer for layer in layers}
    depth: dict[ir.Node, int] = {}
    levels: dict[int, list[LinearLayer]] = {}
    for node in model.graph:
        makers = [value.producer() for value in node.inputs if value is not None]
        before = max((depth.get(maker, 0) for maker in makers if maker is not None), default=0)
        if node in by_node:
            levels.setdefault(before, []).append(by_node[node])
        depth[node] = before + (node in by_node)
    return [levels[key] for key in sorted(levels)]
