"""Takes units out of a model: weights, attributes, shape operands and the shapes of all values between."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from ...compiler.graph import (
    FROM_KEY,
    PASS_KEY,
    Array,
    Names,
    add_initializer,
    attribute,
    constant,
    dims,
    integers,
    opset,
    remove_dead,
)
from ...compiler.kept_caches import KeptCaches
from .coupling import Coupling, kept_indices
from .moving_rules import gathered
from .shape_operands import sliced, target_parts
from .units import Reader

_HEAD_COUNTS = ("num_heads", "kv_num_heads", "q_num_heads")
Kept = dict[tuple[ir.Value, Reader | None], dict[int, Array]]


def cut(coupling: Coupling, gone: Array, by: str) -> None:
    """Removes the units ``gone`` (labels) from the coupling's model, in place.

    What is computed is what the model computes with the units' rows in the weights of their consumers set to zero.

    Args:
        coupling: of the model; weights may have other numbers since, nothing else may have changed.
        gone: labels of units without an obstacle.
        by: name of the pass, for the metadata.
    """
    model = coupling.model
    kept: Kept = {}
    for place, axis, labels in coupling.places():
        if np.isin(labels, gone).any():
            kept.setdefault((place.value, place.reader), {})[axis] = kept_indices(labels, gone)
    heads = {
        value.name or "": [int(head) for head in axes[1]]
        for (value, _), axes in kept.items()
        if 1 in axes and not value.is_initializer() and (value.is_graph_input() or value.is_graph_output())
    }
    _Cutter(coupling, kept, by).run()
    if heads:
        KeptCaches(None, heads).write(model)
    remove_dead(model)


def drop_unused(value: ir.Value | None) -> None:
    """Takes an initializer that nobody reads any more out of its graph."""
    needed = value is None or value.uses() or value.is_graph_output() or value.is_graph_input()
    if value is not None and value.is_initializer() and not needed:
        graph = value.graph
        if graph is not None:
            graph.initializers.pop(value.name or "", None)


class _Cutter:
    def __init__(self, coupling: Coupling, kept: Kept, by: str) -> None:
        self._model, self._shapes = coupling.model, coupling.shapes
        self._kept, self._by = kept, by
        self._names = Names(self._model)
        self._version = opset(self._model)

    def run(self) -> None:
        """Nodes first, as they look at the old shapes; then weights and shapes."""
        fixes: dict[str, Callable[[ir.Node], None]] = {
            "Reshape": self._target,
            "Expand": self._target,
            "Split": self._split,
            "Slice": self._slice,
            "Gather": self._gather,
            "Conv": self._conv,
        }
        touched = {value for value, _ in self._kept}
        for node in list(self._model.graph):
            if not any(value in touched for value in (*node.inputs, *node.outputs)):
                continue
            fix = fixes.get(node.op_type) if not node.domain else None
            if fix is not None:
                fix(node)
            self._heads(node)
            node.metadata_props.setdefault(FROM_KEY, f"{node.op_type}:{node.name}")
            node.metadata_props[PASS_KEY] = self._by
        for (value, reader), axes in self._kept.items():
            if reader is not None:
                self._vector(reader, axes)
            elif value.is_initializer() and not value.is_graph_input():
                self._weight(value, axes)
            else:
                self._shape(value, axes)

    def _axes(self, node: ir.Node, value: ir.Value | None, index: int | None = None) -> dict[int, Array]:
        if value is None:
            return {}
        reader = (node, index) if index is not None and (value, (node, index)) in self._kept else None
        return self._kept.get((value, reader), {})

    def _set(self, node: ir.Node, index: int, array: Array) -> None:
        """Gives ``node`` a constant input of its own."""
        old, graph = node.inputs[index] if index < len(node.inputs) else None, node.graph
        if not isinstance(graph, ir.Graph):
            raise ValueError(f"{node.name} is in no graph")
        base = old.name if old is not None and old.name else f"{node.name}_{index}"
        new = add_initializer(graph, self._names, f"{base}_cut", array)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)
        drop_unused(old)

    def _target(self, node: ir.Node) -> None:
        """The numbers in the shape operand of Reshape and Expand that stand for axes that were cut."""
        axes = {axis: len(kept) for axis, kept in self._axes(node, node.outputs[0]).items()}
        changed: dict[int, Array] = {}
        parts = target_parts(node.inputs[1]) or []
        for axis, size in axes.items():
            number = max((n for n, part in enumerate(parts) if part[1] <= axis), default=-1)
            numbers = integers(parts[number][0]) if number >= 0 else None
            if numbers is None or numbers[axis - parts[number][1]] < 2:
                continue  # it follows from a Shape, or is -1 or 0
            array = changed.setdefault(number, np.array(numbers, np.int64))
            array[axis - parts[number][1]] = size
        if not changed:
            return
        if len(parts) == 1:
            self._set(node, 1, changed[0])
            return
        join, graph = node.inputs[1].producer() if node.inputs[1] is not None else None, node.graph
        if join is None or not isinstance(graph, ir.Graph):
            raise ValueError(f"{node.name} has no shape operand")
        name = self._names.fresh(f"{join.name}_cut")
        old = join.outputs[0]
        output = ir.Value(name=self._names.fresh(f"{old.name}_cut"), shape=old.shape, type=old.type)
        own = ir.node("Concat", list(join.inputs), attributes={"axis": 0}, outputs=[output], name=name)
        graph.insert_before(node, own)
        node.replace_input_with(1, output)
        for number, array in changed.items():
            self._set(own, number, array)

    def _sizes(self, value: ir.Value | None) -> list[int | None]:
        """Sizes of the axes before the cut, None where unknown."""
        return [None if symbols else size for size, symbols in self._shapes.dims(value) or ()]

    def _split(self, node: ir.Node) -> None:
        axis = attribute(node, "axis", 0) % len(self._sizes(node.inputs[0]))
        if axis not in self._axes(node, node.inputs[0], 0):
            return
        sizes: list[int] = []
        for value in node.outputs:
            kept = self._axes(node, value).get(axis)
            sizes.append(len(kept) if kept is not None else self._sizes(value)[axis] or 0)
        if self._version >= 13:
            self._set(node, 1, np.array(sizes, np.int64))
            node.attributes.pop("num_outputs", None)
        else:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)

    def _slice(self, node: ir.Node) -> None:
        axes = self._axes(node, node.inputs[0], 0)
        bounds = sliced(node, self._sizes(node.inputs[0])) or {}
        changed = [axis for axis in axes if axis in bounds]
        if not changed:
            return
        starts, ends = (list(integers(node.inputs[index]) or []) for index in (1, 2))
        for number, axis in enumerate(bounds):
            if axis in changed:
                start, end, _ = bounds[axis]
                starts[number] = int((axes[axis] < start).sum())
                ends[number] = int((axes[axis] < end).sum())
        self._set(node, 1, np.array(starts, np.int64))
        self._set(node, 2, np.array(ends, np.int64))

    def _gather(self, node: ir.Node) -> None:
        axis = attribute(node, "axis", 0) % len(self._sizes(node.inputs[0]))
        kept, indices = self._axes(node, node.inputs[0], 0).get(axis), gathered(node)
        if kept is None or indices is None:
            return
        position = {int(old): new for new, old in enumerate(kept)}
        self._set(node, 1, np.array([position[int(i)] for i in indices if int(i) in position], indices.dtype))

    def _conv(self, node: ir.Node) -> None:
        kept = self._axes(node, node.inputs[0]).get(1)
        if kept is not None and attribute(node, "group", 1) > 1:
            node.attributes["group"] = ir.AttrInt64("group", len(kept))

    def _heads(self, node: ir.Node) -> None:
        """Attention and rotary embeddings count their heads in attributes."""
        names = [name for name in _HEAD_COUNTS if attribute(node, name, 0)]
        axes = self._axes(node, node.outputs[0])
        if not names or not axes:
            return
        axis, kept = next(iter(axes.items()))
        old = self._sizes(node.outputs[0])[axis] or len(kept)
        for name in names:
            node.attributes[name] = ir.AttrInt64(name, attribute(node, name) * len(kept) // old)
        sizes = attribute(node, "qkv_hidden_sizes")
        if sizes:
            node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s(
                "qkv_hidden_sizes", [size * len(kept) // old for size in sizes]
            )

    def _vector(self, reader: Reader, axes: Mapping[int, Array]) -> None:
        node, index = reader
        array = constant(node.inputs[index])
        if array is not None:
            self._set(node, index, _taken(array, axes))

    def _weight(self, value: ir.Value, axes: Mapping[int, Array]) -> None:
        array = constant(value)
        if array is None:
            raise ValueError(f"{value.name} has no data")
        new = ir.Tensor(_taken(array, axes), name=value.name)
        value.const_value = new
        value.shape = ir.Shape(new.shape)

    def _shape(self, value: ir.Value, axes: Mapping[int, Array]) -> None:
        if value.shape is None:
            return
        sizes = dims(value) or []
        for axis, kept in axes.items():  # 12 * batch: the name that shape inference made of it would now be wrong
            sizes[axis] = len(kept) if isinstance(sizes[axis], int) else None
        value.shape = ir.Shape(sizes)


def _taken(array: Array, axes: Mapping[int, Array]) -> Array:
    for axis, kept in axes.items():
        array = np.take(array, kept, axis=axis)
    return np.ascontiguousarray(array)
