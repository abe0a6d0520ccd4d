"""Runs the front of a convolutional network strip by strip, so that its large activations never exist as a whole."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import FROM_KEY, PASS_KEY, Names, add_initializer, attribute, dims, make_node, opset, rank
from .lifetimes import Sizes, flow_of
from .order_bounds import order_bound

_UNARY = frozenset(
    [
        "Relu",
        "Clip",
        "LeakyRelu",
        "Sigmoid",
        "Tanh",
        "HardSwish",
        "HardSigmoid",
        "Elu",
        "Mish",
        "Softplus",
        "BatchNormalization",
    ]
)
_BINARY = frozenset(["Add", "Mul", "Sub"])
_WINDOW = frozenset(("Conv", "MaxPool"))
_STRIPS = (2, 3, 4, 6, 8, 12, 16)
_RULE = "front of convolutions -> strips of rows"


@dataclasses.dataclass(frozen=True)
class TilePatches(Pass):
    """Computes the front of a convolutional network strip by strip (as MCUNetV2's patches, Lin et al., 2021).

    1. ``y = front(x)`` of Conv, MaxPool, BatchNormalization and element-wise operators ->
       ``y = Concat(strip_1, ..., strip_n)`` along the rows. A strip computes its new rows only; the rows of the strip
       before that a kernel reaches back to are kept, not computed again, so there are no more multiplications than
       before. Padding is applied at the borders of the image only; the results are the same.

    Where the front ends and how many strips there are is chosen by the memory plan of the result: the fewest strips
    that need at most ``peak_bytes``, or those that need the least.

    Refused: dynamic rows or columns, opsets below 13, fronts with nothing to gain, budgets that cannot be reached.

    Args:
        peak_bytes: bytes of activations there are; None: as few as possible.
        batch: size that a dynamic first dim is planned with.

    Pays in memory only: many small kernels run slower than few large ones. Combine with ``plan-memory``.
    """

    name: ClassVar[str] = "tile-patches"
    gate: ClassVar[Gate] = "off"

    peak_bytes: int | None = None
    batch: int = 1

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        ends = _ends(model.graph)
        if not ends:
            return outcome
        anchor = ends[0].producer()
        assert anchor is not None
        if opset(model) < 13:
            outcome.refuse(anchor, _RULE, "Slice and Concat as needed here have opset 13: run upgrade-opset first")
            return outcome
        before = self._bound(model)
        budget = self.peak_bytes
        if budget is not None and before <= budget:
            outcome.notes.append(f"the activations need {before} bytes, within the budget of {budget}")
            return outcome
        tried = self._try_all(model, [end.name or "" for end in ends], context)
        fitting = [item for item in tried if budget is not None and item[0] <= budget]
        if budget is not None and not fitting:
            least = min((bound for bound, _, _ in tried), default=before)
            outcome.refuse(anchor, _RULE, f"the budget is {budget} bytes; the best strips still need {least}")
            return outcome
        if fitting:
            bound, count, end = min(fitting, key=lambda item: (item[1], item[0]))
        else:
            bound, count, end = min(tried, key=lambda item: (round(item[0] / before * 20), item[1], item[0]))
        if bound >= before:
            outcome.refuse(anchor, _RULE, f"no strips need less than the {before} bytes of the whole")
            return outcome
        nodes = len(list(model.graph))
        _tile(model, _value(model.graph, end), count, self.name)
        outcome.counts["strips"] = count
        outcome.notes.append(
            f"{count} strips up to {end}: at least {bound} bytes instead of {before} ({bound / before:.2f} x), "
            f"0 % more multiplications, {len(list(model.graph)) - nodes} more nodes"
        )
        return outcome

    def _try_all(self, model: ir.Model, ends: list[str], context: PassContext) -> list[tuple[int, int, str]]:
        """(bound, strips, end of the front) of every choice."""
        tried: list[tuple[int, int, str]] = []
        for end in ends:
            context.progress(f"strips up to {end}")
            for count in _STRIPS:
                trial = model.clone()
                if _tile(trial, _value(trial.graph, end), count, self.name):
                    tried.append((self._bound(trial), count, end))
        return tried

    def _bound(self, model: ir.Model) -> int:
        first = {(dims(value) or [1])[0] for value in model.graph.inputs}
        flow = flow_of(model.graph, Sizes(model, {dim: self.batch for dim in first if isinstance(dim, str)}))
        return order_bound(flow, range(len(flow.before)))


def _ends(graph: ir.Graph) -> list[ir.Value]:
    """Values up to which all is tileable, and past which nothing reads what lies before them; each smaller than the
    one before, as a larger one further back is never a better end.
    """
    front: set[ir.Node] = set()
    needed: set[ir.Value] = set()  # made in the front, and read by what is not in it yet
    ends: list[tuple[int, ir.Value]] = []
    for node in graph:
        if not _tileable(node):
            if any(value in needed for value in node.inputs if value is not None):
                break  # past the first reader that cannot be tiled there is no front
            continue
        front.add(node)
        output = node.outputs[0]
        needed.add(output)
        needed -= {value for value in node.inputs if value in needed and all(use.node in front for use in value.uses())}
        if any(value.is_graph_output() for value in needed):
            break
        size = math.prod(size for size in dims(output) or [] if isinstance(size, int))
        windows = any(item.op_type in _WINDOW for item in front)
        if windows and needed == {output} and (_rows(output) or 0) > 1 and (not ends or size <= ends[-1][0]):
            ends = [item for item in ends if item[0] > size] + [(size, output)]
    return [value for _, value in ends]


def _tileable(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    static = all(
        isinstance(size, int) for value in (source, node.outputs[0]) for size in (dims(value) or [None] * 4)[1:]
    )
    if node.domain or len(node.outputs) != 1 or rank(node.outputs[0]) != 4 or rank(source) != 4 or not static:
        return False
    if node.op_type in _UNARY:
        return all(value is None or value.is_initializer() for value in node.inputs[1:])
    if node.op_type in _BINARY:
        return all(_same_rows(value, node.outputs[0]) or _by_channel(value) for value in node.inputs)
    plain = attribute(node, "auto_pad", "NOTSET") == "NOTSET" and not attribute(node, "ceil_mode", 0)
    constant = all(value is None or value.is_initializer() for value in node.inputs[1:])
    return node.op_type in _WINDOW and plain and constant


def _same_rows(value: ir.Value | None, output: ir.Value) -> bool:
    return value is not None and not value.is_initializer() and dims(value) == dims(output)


def _by_channel(value: ir.Value | None) -> bool:
    """A constant that is the same in all rows."""
    shape = dims(value)
    return value is not None and value.is_initializer() and shape is not None and all(d == 1 for d in shape[-2:])


def _rows(value: ir.Value) -> int | None:
    shape = dims(value)
    return shape[2] if shape is not None and len(shape) == 4 and isinstance(shape[2], int) else None


def _value(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for node in graph for value in node.outputs if value.name == name)


@dataclasses.dataclass(frozen=True)
class _Window:
    """How the rows of a node's output follow from those of its input."""

    kernel: int
    stride: int
    top: int

    @staticmethod
    def of(node: ir.Node) -> _Window:
        if node.op_type not in _WINDOW:
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


def _tile(model: ir.Model, end: ir.Value, count: int, by: str) -> bool:
    """Replaces the nodes before ``end`` by ``count`` strips; False where there are too few rows."""
    rows = _rows(end) or 0
    if rows < count:
        return False
    front = _ancestors(end)
    strips = _Strips(model, front, by)
    results = [strips.run(end, rows * (number + 1) // count) for number in range(count)]
    joined = strips.make("Concat", [value for value in results if value is not None], end, rows, {"axis": 2})
    last = end.producer()
    assert last is not None
    graph = model.graph
    graph.insert_before(last, strips.nodes)
    ir.convenience.replace_all_uses_with(end, joined)
    name = end.name
    for node in reversed(front):
        graph.remove(node, safe=True)
    joined.name = name
    return True


def _ancestors(end: ir.Value) -> list[ir.Node]:
    """The nodes that ``end`` needs, in the order of the graph."""
    found: set[ir.Node] = set()
    todo = [end]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            todo += [value for value in node.inputs if value is not None]
    graph = next(iter(found)).graph
    assert graph is not None
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
                    wanted[value] = max(wanted[value], min(_rows(value) or 0, window.end(wanted[output])))
        return wanted

    def _compute(self, node: ir.Node, start: int, stop: int) -> None:
        window, output = _Window.of(node), node.outputs[0]
        inputs = [
            value if value is None or value.is_initializer() else self._rows_of(value, window, start, stop)
            for value in node.inputs
        ]
        attributes: dict[str, Any] = {name: item.value for name, item in node.attributes.items()}
        if node.op_type in _WINDOW:
            rows = _rows(node.inputs[0]) or 0  # type: ignore[arg-type]
            _, left, _, right = attributes.get("pads", (0, 0, 0, 0))
            pads = [max(0, -window.first(start)), left, max(0, window.end(stop) - rows), right]
            attributes["pads"] = pads
        result = self.make(node.op_type, inputs, output, stop - start, attributes)
        self._new[output] = (start, stop, result)

    def _rows_of(self, value: ir.Value, window: _Window, start: int, stop: int) -> ir.Value:
        """The input rows for the output rows from ``start`` to ``stop``."""
        rows = _rows(value) or 0
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
        firsts = [_Window.of(node).first(done) for node, done in readers if done < (_rows(node.outputs[0]) or 0)]
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
