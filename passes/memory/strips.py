"""A front of a network written as strips of rows, one after the other: the writing half of ``tile_patches``."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from ...compiler.graph import FROM_KEY, PASS_KEY, Names, add_initializer, attribute, dims, make_node

WINDOW = frozenset(("Conv", "MaxPool"))


def rows_of(value: ir.Value) -> int | None:
    """Rows of a value [batch, channels, rows, columns]; None where it is no such value."""
    shape = dims(value)
    return shape[2] if shape is not None and len(shape) == 4 and isinstance(shape[2], int) else None


@dataclasses.dataclass(frozen=True)
class _Window:
    """How the rows of a node's output follow from those of its input."""

    kernel: int
    stride: int
    top: int

    @staticmethod
    def of(node: ir.Node) -> _Window:
        if node.op_type not in WINDOW:
            return _Window(1, 1, 0)
        shape = (
            attribute(node, "kernel_shape")
            or [size for size in dims(node.inputs[1]) or [] if isinstance(size, int)][2:]
        )
        kernel = (shape[0] - 1) * (attribute(node, "dilations") or [1])[0] + 1
        return _Window(kernel, (attribute(node, "strides") or [1])[0], (attribute(node, "pads") or [0])[0])

    def first(self, row: int) -> int:
        """The first input row that output ``row`` needs; negative is padding."""
        return row * self.stride - self.top

    def end(self, row: int) -> int:
        """The end of the input rows that outputs below ``row`` need; past the input is padding."""
        return (row - 1) * self.stride - self.top + self.kernel


def tile(model: ir.Model, end: ir.Value, count: int, by: str) -> bool:
    """Replaces the nodes before ``end`` by ``count`` strips; False where there are too few rows."""
    rows = rows_of(end) or 0
    if rows < count:
        return False
    front = _ancestors(end)
    strips = _Strips(model, front, by)
    results = [strips.run(end, rows * (number + 1) // count) for number in range(count)]
    joined = strips.make("Concat", [value for value in results if value is not None], end, rows, {"axis": 2})
    last = end.producer()
    assert last is not None and isinstance(last.graph, ir.Graph)
    graph = last.graph
    graph.insert_before(last, strips.nodes)
    ir.convenience.replace_all_uses_with(end, joined)
    name = end.name
    for node in reversed(front):
        graph.remove(node, safe=True)
    joined.name = name
    return True


def _ancestors(end: ir.Value) -> list[ir.Node]:
    """The nodes of the graph of ``end`` that it needs, in the order of the graph."""
    graph = end.graph
    assert graph is not None
    found: set[ir.Node] = set()
    todo = [end]
    while todo:
        node = todo.pop().producer()
        if node is not None and node.graph is graph and node not in found:
            found.add(node)
            todo += [value for value in node.inputs if value is not None]
    return [node for node in graph if node in found]


class _Strips:
    """Makes the nodes of one strip after the other; keeps between strips the rows that later ones reach back to."""

    def __init__(self, model: ir.Model, front: list[ir.Node], by: str) -> None:
        self._model, self._front, self._by = model, front, by
        self._names = Names(model)
        self._made = {node.outputs[0] for node in front}
        self._done = dict.fromkeys(self._made, 0)  # rows computed so far
        self._kept: dict[ir.Value, tuple[int, ir.Value]] = {}  # the first row kept, and the tensor
        self._numbers: dict[int, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def run(self, end: ir.Value, until: int) -> ir.Value | None:
        """Makes the rows of ``end`` up to ``until`` that are not there yet, and returns them."""
        wanted = self._wanted(end, until)
        self._new: dict[ir.Value, tuple[int, int, ir.Value]] = {}
        for node in self._front:
            output = node.outputs[0]
            if wanted[output] > self._done[output]:
                self._compute(node, self._done[output], wanted[output])
        for value, (_, stop, _) in self._new.items():
            self._keep(value, stop, wanted)
        self._done.update(wanted)
        return self._new[end][2] if end in self._new else None

    def _wanted(self, end: ir.Value, until: int) -> dict[ir.Value, int]:
        """For each value the end of the rows that this strip needs."""
        wanted = {**self._done, end: max(until, self._done[end])}
        for node in reversed(self._front):
            window, output = _Window.of(node), node.outputs[0]
            for value in node.inputs:
                if value in self._made and wanted[output] > self._done[output]:
                    wanted[value] = max(wanted[value], min(rows_of(value) or 0, window.end(wanted[output])))
        return wanted

    def _compute(self, node: ir.Node, start: int, stop: int) -> None:
        window, output = _Window.of(node), node.outputs[0]
        inputs = [
            value if value is None or value.is_initializer() else self._rows_of(value, window, start, stop)
            for value in node.inputs
        ]
        attributes: dict[str, Any] = {name: item.value for name, item in node.attributes.items()}
        if node.op_type in WINDOW:
            rows = rows_of(node.inputs[0]) or 0  # type: ignore[arg-type]
            _, left, _, right = attributes.get("pads", (0, 0, 0, 0))
            pads = [max(0, -window.first(start)), left, max(0, window.end(stop) - rows), right]
            attributes["pads"] = pads
        result = self.make(node.op_type, inputs, output, stop - start, attributes)
        self._new[output] = (start, stop, result)

    def _rows_of(self, value: ir.Value, window: _Window, start: int, stop: int) -> ir.Value:
        """The input rows for the output rows from ``start`` to ``stop``."""
        rows = rows_of(value) or 0
        first, end = max(0, window.first(start)), min(rows, window.end(stop))
        if value not in self._made:
            return self._slice(value, value, first, 0, end, rows)
        begin, finish, tensor = self._new.get(value, (self._done[value], self._done[value], value))
        if first < begin:
            kept_from, kept = self._kept[value]
            if finish > begin:
                tensor = self.make("Concat", [kept, tensor], value, finish - kept_from, {"axis": 2})
                self._new[value] = (kept_from, finish, tensor)
            else:
                tensor = kept
            begin = kept_from
        return self._slice(tensor, value, first, begin, end, finish)

    def _keep(self, value: ir.Value, stop: int, wanted: dict[ir.Value, int]) -> None:
        """Cuts off the rows that the next strip reaches back to, so that the others can go."""
        readers = [(use.node, wanted[use.node.outputs[0]]) for use in value.uses() if use.node.outputs[0] in self._made]
        firsts = [_Window.of(node).first(done) for node, done in readers if done < (rows_of(node.outputs[0]) or 0)]
        first = max(0, min(firsts, default=stop))
        if first >= stop:
            self._kept.pop(value, None)
            return
        begin, _, tensor = self._new[value]
        if first < begin:
            kept_from, kept = self._kept[value]
            tensor = self.make("Concat", [kept, tensor], value, stop - kept_from, {"axis": 2})
            begin = kept_from
        self._kept[value] = (first, self._slice(tensor, value, first, begin, stop, stop))

    def _slice(self, tensor: ir.Value, like: ir.Value, first: int, begin: int, end: int, finish: int) -> ir.Value:
        """Rows ``first`` to ``end`` of ``tensor``, which holds rows ``begin`` to ``finish``."""
        if (first, end) == (begin, finish):
            return tensor
        bounds = [self._number(item) for item in (first - begin, end - begin, 2)]
        return self.make("Slice", [tensor, *bounds], like, end - first, {})

    def _number(self, value: int) -> ir.Value:
        if value not in self._numbers:
            array = np.array([value], np.int64)
            self._numbers[value] = add_initializer(self._model.graph, self._names, f"strip_row_{value}", array)
        return self._numbers[value]

    def make(
        self, op: str, inputs: list[ir.Value | None], like: ir.Value, rows: int, attributes: dict[str, Any]
    ) -> ir.Value:
        """A new node with the rows of ``like``."""
        shape = dims(like) or []
        node = make_node(
            op,
            inputs,
            name=self._names.fresh(f"{like.name}_{op.lower()}_strip"),
            output=self._names.fresh(f"{like.name}_strip"),
            shape=[shape[0], shape[1], rows, shape[3]],
            dtype=like.dtype,
            attributes=attributes,
        )
        node.metadata_props[PASS_KEY] = self._by
        maker = like.producer()
        node.metadata_props[FROM_KEY] = f"{maker.op_type}:{maker.name}" if maker is not None else like.name or ""
        self.nodes.append(node)
        return node.outputs[0]
