"""Which indices of which axes of a model belong together, so that they can only be cut together.

Every index of every axis is an element. A node links the elements of its inputs and outputs that mean the same (a
channel before and after an activation, the columns of a weight and the features they make), or freezes an axis that it
does not let be cut (a normalization over it, a graph output, an operator nobody here knows). What is linked, through
any number of nodes, is one *unit*: a hidden unit of a feed-forward layer, a head with its columns in Q, K, V and the
output, a channel through residual additions. No names and no kinds of models are known here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import scipy.sparse
from scipy.sparse.csgraph import connected_components

from ...compiler.graph import Array, subgraphs
from ...compiler.padding import cache_names
from ..linear_layers import LinearLayer, linear_layer
from ..low_bit.streams import reads
from ..symbolic import SymbolicShapes
from ..symbolic_dims import ONE
from .units import Consumer, Dimension, Kind, Place, Reader

_NOTHING = np.zeros(0, np.int64)


class Coupling:
    """The units of a model's main graph.

    Args:
        model: the model; not changed.
        rules: (domain, operator) -> what it links and freezes; all others freeze what they touch.
        caches: names of inputs and outputs that are key/value caches, besides those that the names of a decoder's say.
    """

    def __init__(
        self,
        model: ir.Model,
        rules: Mapping[tuple[str, str], Callable[[Coupling, ir.Node], None]],
        caches: Collection[str] = (),
    ) -> None:
        self.model = model
        self._caches = {*caches, *(name for pair in cache_names(model).items() for name in pair)}
        self.shapes = SymbolicShapes(model)
        self._starts: dict[tuple[ir.Value, Reader | None], list[int]] = {}
        self._places: list[tuple[Place, int]] = []  # of each axis with elements
        self._axis_of: list[Array] = []
        self._size = 0
        self._links: list[tuple[Array, Array]] = []
        self._frozen: list[tuple[Array, str]] = []
        self._kinds: list[tuple[Array, Kind]] = []
        self._sums: list[tuple[LinearLayer, Place, Array]] = []
        self._makes: list[tuple[ir.Node, Array]] = []
        self._read_signature()
        for node in model.graph:
            rule = rules.get((node.domain, node.op_type))
            values = [*node.inputs, *(value for value in node.outputs if _is_used(value))]
            if any(True for _ in subgraphs(node)):
                for value in reads(node):
                    self._freeze_place(Place(value, self.shapes.dims(value)), f"{node.name} is an {node.op_type}")
                self.freeze_node(node, f"{node.name} is an {node.op_type}")
            elif rule is None:
                self.freeze_node(node, f"{node.op_type} {node.name} cannot be followed")
            elif any(value is not None and self.shapes.dims(value) is None for value in values):
                self.freeze_node(node, f"the rank of what {node.op_type} {node.name} reads or makes is unknown")
            else:
                rule(self, node)
        self.labels = self._solve()
        self.reasons = self._reasons()

    # what rules use

    def operand(self, node: ir.Node, index: int) -> Place | None:
        """What ``node`` reads as its input ``index``; None where it is left out."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        dims = self.shapes.dims(value)
        small = value.is_initializer() and not value.is_graph_input() and sum(dim != ONE for dim in dims or ()) <= 1
        return Place(value, dims, (node, index) if small else None)

    def result(self, node: ir.Node, index: int = 0) -> Place | None:
        """What ``node`` makes as its output ``index``; None where it is not used."""
        value = node.outputs[index] if index < len(node.outputs) else None
        return Place(value, self.shapes.dims(value)) if value is not None and _is_used(value) else None

    def elements(self, place: Place, axis: int) -> Array:
        """The elements of an axis; none for an axis of size 1 or one of which only a symbol is known.

        An axis of the size 12 * batch has 12 elements; ``Reshape`` sees to it that they are the inner factor.
        """
        starts = self._starts.get((place.value, place.reader))
        if starts is None:
            starts = self._register(place)
        start, count = starts[axis], place.dim(axis)[0]
        return np.arange(start, start + count) if start >= 0 else _NOTHING

    def link(self, a: Array, b: Array) -> None:
        """Elements that can only be cut together, pair by pair."""
        if len(a):
            self._links.append((a, b))

    def link_axes(self, a: Place, i: int, b: Place, j: int) -> None:
        """All elements of two axes, which must be of one size."""
        if i >= a.rank or j >= b.rank:
            for place in (a, b):
                self._freeze_place(place, f"{a.value.name} and {b.value.name} differ in rank")
            return
        left, right = self.elements(a, i), self.elements(b, j)
        if len(left) == len(right) and a.dim(i) == b.dim(j):
            self.link(left, right)
        else:
            self.freeze(np.concatenate([left, right]), f"{a.value.name} and {b.value.name} differ in shape")

    def freeze(self, elements: Array, reason: str) -> None:
        """Elements that stay."""
        if len(elements):
            self._frozen.append((elements, reason))

    def freeze_axis(self, place: Place | None, axis: int, reason: str) -> None:
        """All elements of an axis stay."""
        if place is not None and place.rank:
            self.freeze(self.elements(place, axis % place.rank), reason)

    def freeze_node(self, node: ir.Node, reason: str) -> None:
        """Everything a node reads and makes stays."""
        places = [self.operand(node, index) for index in range(len(node.inputs))]
        places += [self.result(node, index) for index in range(len(node.outputs))]
        for place in places:
            if place is not None:
                self._freeze_place(place, reason)

    def mark(self, elements: Array, kind: Kind) -> None:
        """Says what kind of units these elements are in."""
        if len(elements):
            self._kinds.append((elements, kind))

    def sum_over(self, node: ir.Node, x: Place, axis: int, weight: Place, weight_axis: int, out_axis: int) -> None:
        """``node`` multiplies x with a weight and sums over ``axis``."""
        elements, rows = self.elements(x, axis), self.elements(weight, weight_axis)
        self.link_axes(x, axis, weight, weight_axis)
        layer = linear_layer(node)
        if layer is None or layer.dequantize is not None:
            self.freeze(np.concatenate([elements, rows]), f"{node.op_type} {node.name} has no constant float weight")
            return
        self._sums.append((layer, x, elements))
        self.made_by(node, self.elements(weight, out_axis))

    def made_by(self, node: ir.Node, elements: Array) -> None:
        """``elements`` count the outputs of a weight that ``node`` multiplies with."""
        self._makes.append((node, elements))

    # what passes use

    def unit_labels(self, place: Place, axis: int) -> Array:
        """The unit of each element of an axis."""
        return self.labels[self.elements(place, axis)]

    def places(self) -> Iterable[tuple[Place, int, Array]]:
        """Every axis that has elements, with their units."""
        for place, axis in self._places:
            yield place, axis, self.unit_labels(place, axis)

    def dimensions(self) -> list[Dimension]:
        """All dimensions that can be cut, in the order of their first consumers."""
        frozen = np.zeros(int(self.labels.max(initial=-1)) + 1, bool)
        frozen[list(self.reasons)] = True
        used = [np.unique(self.labels[elements]) for _, _, elements in self._sums]
        candidates = np.unique(np.concatenate([*used, _NOTHING]))
        grouped = self._by_signature(candidates[~frozen[candidates]])
        found: list[tuple[int, Dimension]] = []
        for units in grouped:
            consumers: list[Consumer] = []
            first = len(self._sums)
            for number, (layer, x, elements) in enumerate(self._sums):
                labels = self.labels[elements]
                if np.isin(labels, units).any():
                    consumers.append(Consumer(layer, x.value, labels))
                    first = min(first, number)
            makers = [node for node, elements in self._makes if np.isin(self.labels[elements], units).any()]
            if makers:
                name = makers[0].inputs[1].name if makers[0].inputs[1] is not None else makers[0].name
                found.append((first, Dimension(name or "", self._kind(units), units, tuple(consumers), tuple(makers))))
        return [dimension for _, dimension in sorted(found, key=lambda item: item[0])]

    def obstacles(self) -> list[tuple[ir.Node, str]]:
        """Layers whose outputs cannot be cut, with the reason; one layer a reason."""
        found: dict[str, ir.Node] = {}
        for node, elements in self._makes:
            for label in np.unique(self.labels[elements]):
                if int(label) in self.reasons:
                    found.setdefault(self.reasons[int(label)], node)
        return [(node, reason) for reason, node in found.items()]

    def _register(self, place: Place) -> list[int]:
        starts: list[int] = []
        for axis, (count, _) in enumerate(place.dims or ()):
            starts.append(self._size if count > 1 else -1)
            if count > 1:
                self._axis_of.append(np.full(count, len(self._places)))
                self._places.append((place, axis))
                self._size += count
        self._starts[place.value, place.reader] = starts
        return starts

    def _freeze_place(self, place: Place, reason: str) -> None:
        for axis in range(place.rank):
            self.freeze(self.elements(place, axis), reason)

    def _read_signature(self) -> None:
        """Inputs and outputs stay as they are, but for the number of heads of a key/value cache."""
        for kind, values in (("input", self.model.graph.inputs), ("output", self.model.graph.outputs)):
            for value in values:
                place = Place(value, self.shapes.dims(value))
                for axis in range(place.rank):
                    if value.name not in self._caches or axis != 1:
                        self.freeze(self.elements(place, axis), f"{value.name} is an {kind} of the model")

    def _solve(self) -> Array:
        if not self._size:
            return _NOTHING
        rows = np.concatenate([a for a, _ in self._links] or [_NOTHING])
        columns = np.concatenate([b for _, b in self._links] or [_NOTHING])
        size = (self._size, self._size)
        matrix = scipy.sparse.coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=size)
        return connected_components(matrix, directed=False)[1].astype(np.int64)

    def _reasons(self) -> dict[int, str]:
        """Why units stay: label -> the first reason met."""
        reasons: dict[int, str] = {}
        for elements, reason in self._frozen:
            for label in np.unique(self.labels[elements]):
                reasons.setdefault(int(label), reason)
        return reasons

    def _by_signature(self, candidates: Array) -> list[Array]:
        """Units by the axes they have elements in, and how many."""
        axis_of = np.concatenate([*self._axis_of, _NOTHING])
        inside = np.isin(self.labels, candidates)
        pairs = np.stack([self.labels[inside], axis_of[inside]], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        first: dict[int, int] = {}
        signatures: dict[int, list[tuple[int, int]]] = {}
        for (label, axis), count in zip(found.tolist(), counts.tolist(), strict=True):
            signatures.setdefault(label, []).append((axis, count))
        for element, label in zip(np.flatnonzero(inside).tolist(), self.labels[inside].tolist(), strict=True):
            first.setdefault(label, element)
        groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for label, signature in signatures.items():
            groups.setdefault(tuple(signature), []).append(label)
        return [np.array(sorted(labels, key=first.__getitem__)) for labels in groups.values()]

    def _kind(self, units: Array) -> Kind:
        kinds = {kind for elements, kind in self._kinds if np.isin(self.labels[elements], units).any()}
        return "heads" if "heads" in kinds else "channels" if "channels" in kinds else "ffn"


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def kept_indices(labels: Array, gone: Sequence[int] | Array) -> Array:
    """The positions of an axis that stay when the units ``gone`` are cut."""
    return np.flatnonzero(~np.isin(labels, gone))
