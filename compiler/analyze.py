"""Compares a quantized model with the float one it was made from, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..runtime.errors import ModelError
from ..runtime.inference import expose, open_session, run_session, session_options
from .analysis import Analysis, LayerError, OutputError
from .base import no_progress
from .graph import is_op, scalar
from .metrics import Array, Distance
from .variants import (
    Segment,
    absorbed,
    cut,
    cut_input,
    injected,
    is_quantized,
    segments,
    with_injection,
    without_activations,
    without_weights,
)

_RANGES = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}


@dataclasses.dataclass
class _Layer:
    """What is gathered of one layer."""

    segment: Segment
    local: Distance = dataclasses.field(default_factory=Distance)
    cumulative: Distance = dataclasses.field(default_factory=Distance)
    weights: Distance = dataclasses.field(default_factory=Distance)
    activations: Distance = dataclasses.field(default_factory=Distance)
    effects: dict[str, Distance] = dataclasses.field(default_factory=lambda: dict[str, Distance]())
    outside: int = 0
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class _Range:
    """What the QuantizeLinear in front of a layer can represent of the value ``name``."""

    name: str
    low: float
    high: float


class _Runner:
    """A session of a model; nothing where there is no model."""

    def __init__(self, model: ir.Model | None, outputs: Sequence[str], threads: int) -> None:
        self.names = list(dict.fromkeys(outputs))
        self.session = None
        self.inputs: list[str] = []
        if model is not None and self.names:
            self.session = open_session(model, session_options(threads=threads, optimize=False, repack=False))
            self.inputs = [item.name for item in self.session.get_inputs()]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self.session is None:
            return {}
        return run_session(self.session, {name: feeds[name] for name in self.inputs if name in feeds}, self.names)


class Analyzer:
    """The sessions of an analysis, opened once; ``update`` takes in one sample at a time.

    Memory holds the intermediate values of one sample, in the float and in four forms of the quantized graph.
    """

    def __init__(self, reference: ir.Model, quantized: ir.Model, threads: int = 0, effects: int = 1) -> None:
        if is_quantized(reference):
            raise ModelError("The first model is quantized itself.", "Give the float graph first, then the quantized.")
        self.outputs = _common_outputs(reference, quantized)
        parts = [part for part in segments(reference, quantized) if part.quantized]
        if not parts:
            raise ModelError(
                "No layer of the second model is quantized, or the two have no values of the same name.",
                "Give the float graph that was quantized, and the quantized one, in this order.",
            )
        self.layers = {part.value: _Layer(part) for part in parts}
        self.effects, self.samples = effects, 0
        makers = {value.name: node for node in reference.graph for value in node.outputs}
        self._makers = makers
        inputs = {value.name for value in quantized.graph.inputs}
        boundaries = [name for part in parts for name in part.inputs if name not in inputs]
        self._boundaries = list(dict.fromkeys(boundaries))
        have = {value.name for node in quantized.graph for value in node.outputs}
        self._ranges = {part.value: _ranges(part, reference, have) for part in parts}
        inner = [item.name for ranges in self._ranges.values() for item in ranges if item.name not in inputs]
        layers, wanted = list(self.layers), [*self._boundaries, *self.layers, *self.outputs]
        self._float = _Runner(expose(reference, _computed(reference, wanted)), wanted, threads)
        shown = [*layers, *inner, *self.outputs]
        self._quantized = _Runner(expose(quantized, _computed(quantized, shown)), shown, threads)
        pairs = [part for part in parts if part.only_pairs]
        only = [part.value for part in pairs]
        single = cut(reference, quantized, parts)
        weights, activations = without_activations(quantized, reference), without_weights(quantized, reference)
        self._local = _Runner(single, layers, threads)
        self._local_weights = _Runner(cut(reference, weights, _same(reference, weights, only)), only, threads)
        self._local_activations = _Runner(
            cut(reference, activations, _same(reference, activations, only)), only, threads
        )
        separable = len(pairs) == len(parts)
        self._weights = _Runner(weights if separable else None, self.outputs, threads)
        self._activations = _Runner(activations if separable else None, self.outputs, threads)
        self._injected = _Runner(with_injection(reference, layers), self.outputs, threads)
        self._totals = {name: (Distance(), Distance(), Distance()) for name in self.outputs}
        self._separable = separable

    def update(self, sample: Mapping[str, Array]) -> None:
        """Runs all variants on one sample."""
        exact, got = self._float(sample), self._quantized(sample)
        for name, distances in self._totals.items():
            for results, distance in zip(
                (got, self._weights(sample), self._activations(sample)), distances, strict=True
            ):
                if name in results:
                    distance.update(exact[name], results[name])
        feeds = {**sample, **{cut_input(name): exact[name] for name in self._boundaries}}
        local, weights, activations = self._local(feeds), self._local_weights(feeds), self._local_activations(feeds)
        for name, layer in self.layers.items():
            layer.local.update(exact[name], local[name])
            layer.cumulative.update(exact[name], got[name])
            if name in weights:
                layer.weights.update(exact[name], weights[name])
                layer.activations.update(exact[name], activations[name])
            for item in self._ranges[name]:
                x = got[item.name] if item.name in got else sample[item.name]
                layer.outside += int(np.count_nonzero((x < item.low) | (x > item.high)))
                layer.seen += x.size
        if self.samples < self.effects:
            self._measure_effects(sample, exact, local)
        self.samples += 1

    def result(self) -> Analysis:
        """What was found so far."""
        rows = [self._row(layer, position) for position, layer in enumerate(self.layers.values())]
        rows.sort(key=lambda row: -row.contribution)
        outputs = [self._output(name) for name in self.outputs]
        notes: list[str] = []
        if not self._separable:
            notes.append("Some layers are not written as QuantizeLinear and DequantizeLinear: weights and activations "
                         "cannot be separated there.")  # fmt: skip
        return Analysis(outputs, rows, self.samples, notes)

    def _measure_effects(
        self, sample: Mapping[str, Array], exact: Mapping[str, Array], local: dict[str, Array]
    ) -> None:
        """The error of the outputs with only one layer quantized, for each layer."""
        nothing = {injected(name): np.zeros((), exact[name].dtype) for name in self.layers}
        for name, layer in self.layers.items():
            error = {injected(name): local[name] - exact[name]}
            results = self._injected({**sample, **nothing, **error})
            for output in self.outputs:
                layer.effects.setdefault(output, Distance()).update(exact[output], results[output])

    def _row(self, layer: _Layer, position: int) -> LayerError:
        node = self._makers[layer.segment.value]
        separable = layer.segment.only_pairs
        return LayerError(
            name=node.name or layer.segment.value,
            op=node.op_type,
            value=layer.segment.value,
            position=position,
            contribution=sum(distance.ratio for distance in layer.effects.values()),
            local_sqnr=layer.local.sqnr,
            local_cosine=layer.local.cosine,
            cumulative_sqnr=layer.cumulative.sqnr,
            cumulative_cosine=layer.cumulative.cosine,
            weights_sqnr=layer.weights.sqnr if separable else None,
            activations_sqnr=layer.activations.sqnr if separable else None,
            saturation=100.0 * layer.outside / layer.seen if layer.seen else None,
        )

    def _output(self, name: str) -> OutputError:
        both, weights, activations = self._totals[name]
        return OutputError(
            name=name,
            sqnr=both.sqnr,
            cosine=both.cosine,
            relative_error=both.relative_error,
            weights_sqnr=weights.sqnr if self._separable else None,
            activations_sqnr=activations.sqnr if self._separable else None,
        )


def analyze(
    reference: ir.Model,
    quantized: ir.Model,
    feeds: Iterable[Mapping[str, Array]],
    *,
    threads: int = 0,
    effects: int = 1,
    progress: Callable[[str], None] = no_progress,
) -> Analysis:
    """Compares ``quantized`` with ``reference`` on ``feeds``; see ``Analysis`` for what comes out.

    Args:
        reference: the float graph.
        quantized: the same graph quantized, in any form; layers are matched by the names of the values they make.
        feeds: samples, read once, one at a time.
        threads: intra-op threads, 0 for ONNX Runtime's default.
        effects: on how many samples the contribution of each layer to the error of the outputs is measured; each takes
            one run of the float graph for each layer.
        progress: told which sample is run.

    Raises:
        ModelError: no common values, no samples, or a model that does not run on them.
    """
    progress("analyze: opening the variants")
    analyzer = Analyzer(reference, quantized, threads, effects)
    for number, sample in enumerate(feeds):
        progress(f"analyze: sample {number + 1}")
        analyzer.update(sample)
    if not analyzer.samples:
        raise ModelError("There are no samples.", "Give at least one.")
    return analyzer.result()


def _same(reference: ir.Model, variant: ir.Model, names: Sequence[str]) -> list[Segment]:
    """The segments of a variant that end in ``names``."""
    wanted = set(names)
    return [part for part in segments(reference, variant) if part.value in wanted]


def _common_outputs(reference: ir.Model, quantized: ir.Model) -> list[str]:
    have = {value.name for value in quantized.graph.outputs}
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, None)
    return [value.name or "" for value in reference.graph.outputs if value.name in have and value.dtype in floats]


def _computed(model: ir.Model, names: Sequence[str]) -> list[str]:
    inputs = {value.name for value in model.graph.inputs}
    return [name for name in dict.fromkeys(names) if name not in inputs]


def _ranges(part: Segment, reference: ir.Model, have: Collection[str | None]) -> list[_Range]:
    """Ranges of the activations that are quantized inside a segment."""
    found: list[_Range] = []
    for node in part.nodes:
        if not is_op(node, "QuantizeLinear") or len(node.inputs) < 3 or node.inputs[0] is None:
            continue
        x, scale, zero = node.inputs[0], scalar(node.inputs[1]), scalar(node.inputs[2])
        kind = node.inputs[2].dtype if node.inputs[2] is not None else None
        if x.is_initializer() or scale is None or zero is None or kind is None or kind not in _RANGES:
            continue
        low, high = ((end - zero) * scale for end in _RANGES[kind])
        limits = absorbed(x.name, reference, have)
        if limits is not None:  # what lies below is cut off on purpose, and with an upper bound what lies above too
            low, high = -math.inf, high if is_op(limits, "Relu") else math.inf
        found.append(_Range(x.name or "", low - scale / 2, high + scale / 2))
    return found


__all__ = ["Analysis", "Analyzer", "LayerError", "OutputError", "analyze"]
