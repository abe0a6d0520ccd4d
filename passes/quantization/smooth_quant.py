"""SmoothQuant: outliers of activations moved into the weights that read them, before quantizing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import PASS_KEY, Array, Names, add_initializer, all_nodes, make_node
from ...runtime.calibrate import observe
from ...runtime.errors import PassError
from ...runtime.quantization import QuantSpec
from ...runtime.quantization_support import has_vnni
from ..linear_layers import LinearLayer, float_weight, linear_layer
from .channel_scale import CannotFold, Place, divide, find_places, set_input

_RULE = "x W -> (x / s) (s W)"
_GRID = tuple(step / 10 for step in range(11))
_ROWS = 256
_SMALLEST, _LARGEST = 1e-5, 1e5
_GAIN = 0.99
"""A fold must leave at most this part of the error."""
_PAYS = 0.8
"""A Mul of its own must leave at most this part of the error."""


@dataclasses.dataclass
class _Shared:
    """One value and the layers that read it, which share one s."""

    value: ir.Value
    layers: list[LinearLayer]
    places: list[Place] | None
    reason: str


class _Seen:
    """Bounds per channel of what the samples showed, and some rows of them."""

    def __init__(self, seed: int) -> None:
        self.low: Array = np.zeros(0, np.float32)
        self.high: Array = np.zeros(0, np.float32)
        self.rows: Array = np.zeros((0, 0), np.float32)
        self._rng = np.random.default_rng(seed)

    def update(self, array: Array) -> None:
        """Takes in the value of one sample, [..., channels]."""
        rows = array.reshape(-1, array.shape[-1])
        if not rows.size:
            return
        low, high = rows.min(axis=0), rows.max(axis=0)
        if not self.rows.size:
            self.low, self.high, self.rows = low, high, rows[:0]
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        # Up to 64 rows of a sample; beyond 256 in all, some of those kept so far give way.
        self.rows = np.concatenate([self.rows, self._pick(rows, _ROWS // 4)])
        self.rows = self._pick(self.rows, _ROWS)

    def _pick(self, rows: Array, count: int) -> Array:
        return rows if len(rows) <= count else rows[np.sort(self._rng.permutation(len(rows))[:count])]


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Pass):
    """Divides activations by s per channel and multiplies the weights behind them by s: ``x W = (x / s) (s W)``.

    1. ``s_j = max|x_j|^alpha / max_o|W_oj|^(1 - alpha)``, one s for all the MatMul and Gemm that read the same x, with
       the largest of their weights (Xiao et al., "SmoothQuant", 2022, equation 4).
    2. 1 / s goes into the constants that x is proportional to: scale and bias of the LayerNormalization,
       RMSNormalization or Skip*Normalization that makes it, the columns of the layer in front (through Relu,
       LeakyRelu, biases), or the linear factor of a gated product, ``silu(g) * u``: the columns of u's projection.
    3. Where it cannot, ``multiply="where-it-pays"`` puts one Mul in front of the layers, if the error falls by a fifth.

    The error is that of the layers' outputs with 8-bit activations and weights (7-bit ones without VNNI), on up to 256
    rows of the calibration samples. Only what lowers it is done. Refused: x that others read too (the
    residual behind a post-normalization), weights in half precision or with other readers, layers in subgraphs (their
    inputs cannot be observed), layers that a former run smoothed (each run moves what the samples of that run show).

    Pays nothing by itself: it lets int8 quantization behind it lose less, at no cost for rules 1 and 2.

    Attributes:
        alpha: 0 leaves the activations' outliers, 1 moves them all into the weights; None takes the best of
            0, 0.1 ... 1 for each x.
        multiply: ``"never"``, or ``"where-it-pays"``.
        per_channel: whether the quantization behind it has one weight scale per output channel.
    """

    name: ClassVar[str] = "smooth-quant"
    alpha: float | None = None
    multiply: Literal["never", "where-it-pays"] = "never"
    per_channel: bool = True

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha}, it must lie in 0..1")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        shared = self._candidates(model, outcome)
        if not shared:
            return outcome
        if not context.feeds:
            raise PassError("smooth-quant needs calibration samples.", "Give calibration=... (--calibration x.npz).")
        seen = {item.value.name or "": _Seen(context.seed) for item in shared}
        observe(model, seen, context.feeds, threads=context.threads, progress=context.progress)
        empty = next((name for name, what in seen.items() if not what.rows.size), None)
        if empty is not None:
            raise PassError(f"The calibration samples leave {empty} empty.", "Give samples with at least one row.")
        names = Names(model)
        # From the end: what is folded into the columns of a layer changes the rows that an earlier s is made for.
        for number, item in enumerate(reversed(shared)):
            context.progress(f"{self.name}: {number + 1} of {len(shared)}")
            self._smooth(item, seen[item.value.name or ""], names, outcome)
        return outcome

    def _candidates(self, model: ir.Model, outcome: Outcome) -> list[_Shared]:
        found: dict[ir.Value, list[LinearLayer]] = {}
        for node in all_nodes(model):
            layer = linear_layer(node)
            value = node.inputs[0] if node.inputs else None
            if layer is None or value is None or node.op_type == "Conv":
                continue
            if node.graph is not model.graph or value.graph is not model.graph:
                outcome.refuse(node, _RULE, "it lies in a subgraph, where its input cannot be observed")
            elif float_weight(layer) is None:
                outcome.refuse(node, _RULE, f"the weight {layer.weight.name} is not float32")
            elif len(layer.weight.uses()) != 1:
                outcome.refuse(node, _RULE, f"the weight {layer.weight.name} is also used elsewhere")
            else:
                found.setdefault(value, []).append(layer)
        shared: list[_Shared] = []
        for value, layers in found.items():
            if any(layer.node.metadata_props.get(PASS_KEY) == self.name for layer in layers):
                outcome.refuse(layers[0].node, _RULE, "it is smoothed already")
                continue
            places, reason = _foldable(value, layers)
            if places is None and self.multiply == "never":
                outcome.refuse(layers[0].node, _RULE, f"{reason} (multiply='where-it-pays' may add a Mul)")
                continue
            shared.append(_Shared(value, layers, places, reason))
        return shared

    def _smooth(self, item: _Shared, seen: _Seen, names: Names, outcome: Outcome) -> None:
        weights = [layer.by_input(_weight(layer)).astype(np.float32) for layer in item.layers]
        before = self._error(np.ones_like(seen.low), weights, seen)
        best, s, chosen = before, None, 0.0
        for alpha in _GRID if self.alpha is None else (self.alpha,):
            candidate = _smoothing(alpha, weights, seen)
            error = self._error(candidate, weights, seen)
            if error < best:
                best, s, chosen = error, candidate, alpha
        wanted = _GAIN if item.places is not None else _PAYS
        if s is None or best > wanted * before:
            left = f"{best / before:.0%} of the error would stay" if before > 0 else "there is no error"
            outcome.refuse(item.layers[0].node, _RULE, f"it does not pay: {left}")
            return
        if item.places is not None:
            divide(item.places, s, -1, names, self.name)
            rule = "folded into " + item.places[0].node.op_type
        else:
            self._multiply(item, s, names)
            rule = "Mul in front"
        for layer in item.layers:
            graph = layer.node.graph
            if isinstance(graph, ir.Graph):
                scaled = layer.times_inputs(_weight(layer), s).astype(layer.weight.dtype.numpy())  # type: ignore[union-attr]
                new = add_initializer(graph, names, f"{layer.weight.name}_smoothed", scaled)
                set_input(layer.node, 1, new, self.name)
        outcome.counts[rule] += 1
        outcome.notes.append(
            f"{item.value.name}: alpha {chosen:.1f}, {best / before:.0%} of the int8 error of {len(item.layers)} layers"
        )

    def _error(self, s: Array, weights: Sequence[Array], seen: _Seen) -> float:
        """Squared error of the layers' outputs, both operands rounded to 8 bits after smoothing with ``s``."""
        activation = QuantSpec("uint8")
        parameters = activation.parameters((seen.low / s).min(), (seen.high / s).max())
        rounded = activation.round_trip(seen.rows / s, *parameters)
        spec = QuantSpec("int8", symmetric=True, axis=1 if self.per_channel else None, reduced=not has_vnni())
        total = 0.0
        for weight in weights:
            scaled = weight * s[:, None]
            difference = rounded @ spec.round_trip(scaled, *spec.weight_parameters(scaled)) - seen.rows @ weight
            total += float(np.square(difference, dtype=np.float64).sum())
        return total

    def _multiply(self, item: _Shared, s: Array, names: Names) -> None:
        value, first = item.value, item.layers[0].node
        graph = first.graph
        if not isinstance(graph, ir.Graph):
            return
        inverse = add_initializer(graph, names, f"{value.name}_smoothing", (1.0 / s).astype(np.float32))
        name, output = names.fresh(f"{first.name}/smooth"), names.fresh(f"{value.name}_smoothed")
        node = make_node("Mul", [value, inverse], name=name, output=output, like=value)
        node.metadata_props[PASS_KEY] = self.name
        graph.insert_before(first, node)
        for layer in item.layers:
            layer.node.replace_input_with(0, node.outputs[0])


def _foldable(value: ir.Value, layers: Sequence[LinearLayer]) -> tuple[list[Place] | None, str]:
    readers = {layer.node for layer in layers}
    others = [use.node for use in value.uses() if use.node not in readers]
    if others or value.is_graph_output():
        reader = f"{others[0].op_type} {others[0].name}" if others else "the caller"
        return None, f"{value.name} is also read by {reader}, which must see it as it is"
    try:
        return find_places(value, -1), ""
    except CannotFold as error:
        return None, str(error)


def _weight(layer: LinearLayer) -> Array:
    array = float_weight(layer)
    if array is None:
        raise PassError(f"The weight {layer.weight.name} cannot be read.", "Please report it.")
    return array


def _smoothing(alpha: float, weights: Sequence[Array], seen: _Seen) -> Array:
    """s for one alpha; 1 where a channel or its weights are all zero."""
    x = np.maximum(np.abs(seen.low), np.abs(seen.high))
    w = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    alive = (x > 0) & (w > 0)
    s = np.ones_like(x)
    s[alive] = np.clip(x[alive] ** alpha / w[alive] ** (1.0 - alpha), _SMALLEST, _LARGEST)
    return s
