"""AdaRound: the weights of a quantized graph rounded anew, for the least error of each layer's output."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import Array
from ...runtime.errors import PassError
from ..linear_layers import LinearLayer, watch
from .quantized_layers import QuantizedWeight, mark, quantized_layers, quantized_weight, reference_model, store
from .rounding import Grid, adaround, output_error

_RULE = "round(W) -> AdaRound(W)"
_TOGETHER = 400_000_000
"""Bytes of Gram matrices held at a time; more layers take more runs over the samples."""
_JUDGES = 4
"""One sample in four is kept for judging."""
_DAMPING = 0.01
_WORTH = 0.99


class _Gram:
    """``X^T X`` of a layer's inputs, over the samples to fit and over those to judge; [groups, inputs, inputs]."""

    def __init__(self, layer: LinearLayer) -> None:
        self.layer = layer
        self.fit: Array | None = None
        self.judge: Array | None = None
        self.count = 0

    def update(self, array: Array) -> None:
        """Takes in the layer's input of one sample."""
        rows = self.layer.rows(array.astype(np.float32, copy=False))
        gram = rows.transpose(0, 2, 1) @ rows
        self.count += 1
        if self.count % _JUDGES == 0:
            self.judge = gram if self.judge is None else self.judge + gram
        else:
            self.fit = gram if self.fit is None else self.fit + gram


@dataclasses.dataclass(frozen=True)
class AdaRound(Pass):
    """Rounds quantized weights up or down by what that does to the layer's output, instead of to the nearest.

    1. For each MatMul, Gemm and Conv whose weight is an integer initializer behind DequantizeLinear (int8, int4, by
       tensor, channel or block): ``min ||X (W - W_hat)^T||^2`` over W_hat on the grid below or above each weight, X
       being the layer's input in the quantized graph on the calibration samples (Nagel et al., "Up or down?", 2020;
       the method is in ``passes/quantization/rounding.py``).
    2. A layer is changed only if its error also falls by 1 % on samples that the rounding has not seen (one in four).

    Scales and zero points stay. Refused: weights with other readers, and without a float weight of the same shape.

    Pays in accuracy at no cost at run time; most at 4 bits, little at 8 with one scale per channel.

    Attributes:
        iterations: steps of gradient descent before the flips; 0: flips only (a thirtieth of the time; on correlated
            inputs they left 26 % of the error of the nearest, with 300 steps 19 %).
        layers: names or globs of the nodes to do; empty: all.
        reference: the float model; None: the graph before quantization in the same compile.
    """

    name: ClassVar[str] = "adaround"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    iterations: int = 100
    layers: tuple[str, ...] = ()
    reference: ir.Model | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}, it must be 0 or more")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        found = [layer for layer in quantized_layers(model) if self._selects(layer.node.name or "")]
        if not found:
            return outcome
        reference = reference_model(self.reference, context, self.name)
        if context.feeds == ():
            raise PassError("adaround needs calibration samples.", "Give calibration=... (--calibration x.npz).")
        kept: list[LinearLayer] = []
        for layer in found:
            weight = quantized_weight(layer, reference)
            if isinstance(weight, str):
                outcome.refuse(layer.node, _RULE, weight)
            else:
                kept.append(layer)
        unjudged = False
        for group in _groups(kept):
            grams = {layer.node: _Gram(layer) for layer in group}
            watch(model, {gram.layer: gram for gram in grams.values()}, context)
            for layer in group:
                weight = quantized_weight(layer, reference)
                if not isinstance(weight, str):
                    unjudged |= grams[layer.node].judge is None
                    self._round(layer, weight, grams[layer.node], context, outcome)
        if unjudged:
            outcome.notes.append(f"fewer than {_JUDGES} samples: the rounding was judged on those it was made for")
        return outcome

    def _selects(self, name: str) -> bool:
        return not self.layers or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers)

    def _round(
        self, layer: LinearLayer, weight: QuantizedWeight, gram: _Gram, context: PassContext, outcome: Outcome
    ) -> None:
        context.progress(f"{self.name}: {layer.node.name}")
        if gram.fit is None:
            outcome.refuse(layer.node, _RULE, "the samples leave its input empty")
            return
        judge = gram.fit if gram.judge is None else gram.judge
        exact, codes = layer.matrix(weight.exact), layer.matrix(weight.codes)
        scale, zero = layer.matrix(weight.scale), layer.matrix(weight.zero)
        result, before, after = codes.copy(), 0.0, 0.0
        for group in range(len(codes)):
            grid = Grid(scale[group], zero[group], int(weight.codes.min()), int(weight.codes.max()))
            start = codes[group]
            fit = gram.fit[group].astype(np.float64)
            fit += _DAMPING * np.diagonal(fit).mean() * np.eye(len(fit))
            result[group] = adaround(exact[group], grid, fit, iterations=self.iterations, start=start)
            before += float(output_error(grid.back(start) - exact[group], judge[group]).sum())
            after += float(output_error(grid.back(result[group]) - exact[group], judge[group]).sum())
        if not after < _WORTH * before:
            outcome.refuse(layer.node, _RULE, "on samples it has not seen the new rounding is no better")
            return
        store(layer.stored, layer.unmatrix(result, weight.codes.shape))
        mark(layer.node, self.name)
        outcome.counts["weights rounded anew"] += 1
        outcome.notes.append(f"{layer.node.name}: {after / before:.0%} of the weights' error on unseen samples")


def _groups(layers: Sequence[LinearLayer]) -> Iterator[list[LinearLayer]]:
    """Layers whose Gram matrices fit into memory together."""
    group: list[LinearLayer] = []
    total = 0
    for layer in layers:
        shape = [size for size in layer.stored.shape or () if isinstance(size, int)]
        elements = int(np.prod(shape))
        width = elements // shape[layer.out_axis]
        size = 2 * 4 * layer.groups * width**2
        if group and total + size > _TOGETHER:
            yield group
            group, total = [], 0
        group.append(layer)
        total += size
    if group:
        yield group
