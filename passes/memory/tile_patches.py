"""Runs the front of a convolutional network strip by strip, so that its large activations never exist as a whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import PASS_KEY, attribute, dims, opset, rank
from ...runtime.errors import PlanError
from .lifetimes import Sizes, flow_of
from .order_bounds import order_bound
from .strips import WINDOW, rows_of, tile

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
    that need at most ``peak_bytes``, or those that need the least. Bodies of If and Loop have arenas of their own, and
    so fronts of their own.

    Refused: dynamic rows or columns, opsets below 13, fronts with nothing to gain, budgets that cannot be reached,
    graphs that have strips, sizes that are not known.

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
        for number, graph in enumerate(list(model.graphs())):
            ends = _ends(graph)
            anchor = ends[0].producer() if ends else None
            if anchor is None:
                continue
            try:
                self._graph(model, number, anchor, [end.name or "" for end in ends], context, outcome)
            except PlanError as error:  # of one graph; another can be planned all the same
                outcome.refuse(anchor, _RULE, str(error))
        return outcome

    def _graph(
        self, model: ir.Model, number: int, anchor: ir.Node, ends: list[str], context: PassContext, outcome: Outcome
    ) -> None:
        """Tiles the front of one graph, the main one or a body, which has an arena of its own."""
        if opset(model) < 13:
            outcome.refuse(anchor, _RULE, "Slice and Concat as needed here have opset 13: run upgrade-opset first")
            return
        graph = _nth(model, number)
        if any(node.metadata_props.get(PASS_KEY) == self.name for node in graph):
            outcome.refuse(anchor, _RULE, "it has strips already")
            return
        before = self._bound(model, graph)
        budget = self.peak_bytes
        if budget is not None and before <= budget:
            outcome.notes.append(f"the activations need {before} bytes, within the budget of {budget}")
            return
        tried = self._try_all(model, number, ends, context)
        fitting = [item for item in tried if budget is not None and item[0] <= budget]
        if budget is not None and not fitting:
            least = min((bound for bound, _, _ in tried), default=before)
            outcome.refuse(anchor, _RULE, f"the budget is {budget} bytes; the best strips still need {least}")
            return
        if fitting:
            bound, count, end = min(fitting, key=lambda item: (item[1], item[0]))
        else:
            bound, count, end = min(tried, key=lambda item: (round(item[0] / before * 20), item[1], item[0]))
        if bound >= before:
            outcome.refuse(anchor, _RULE, f"no strips need less than the {before} bytes of the whole")
            return
        nodes = len(list(graph))
        tile(model, _value(graph, end), count, self.name)
        outcome.counts["strips"] += count
        outcome.notes.append(
            f"{count} strips up to {end}: at least {bound} bytes instead of {before} ({bound / before:.2f} x), "
            f"0 % more multiplications, {len(list(graph)) - nodes} more nodes"
        )

    def _try_all(
        self, model: ir.Model, number: int, ends: list[str], context: PassContext
    ) -> list[tuple[int, int, str]]:
        """(bound, strips, end of the front) of every choice."""
        tried: list[tuple[int, int, str]] = []
        for end in ends:
            context.progress(f"strips up to {end}")
            for count in _STRIPS:
                trial = model.clone()
                graph = _nth(trial, number)
                if tile(trial, _value(graph, end), count, self.name):
                    tried.append((self._bound(trial, graph), count, end))
        return tried

    def _bound(self, model: ir.Model, graph: ir.Graph) -> int:
        first = {(dims(value) or [1])[0] for value in (*model.graph.inputs, *graph.inputs)}
        flow = flow_of(graph, Sizes(model, {dim: self.batch for dim in first if isinstance(dim, str)}))
        return order_bound(flow, range(len(flow.before)))


def _nth(model: ir.Model, number: int) -> ir.Graph:
    """The same graph in every clone of a model."""
    return next(itertools.islice(model.graphs(), number, None))


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
        windows = any(item.op_type in WINDOW for item in front)
        if windows and needed == {output} and (rows_of(output) or 0) > 1 and (not ends or size <= ends[-1][0]):
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
    return node.op_type in WINDOW and plain and constant


def _same_rows(value: ir.Value | None, output: ir.Value) -> bool:
    return value is not None and not value.is_initializer() and dims(value) == dims(output)


def _by_channel(value: ir.Value | None) -> bool:
    """A constant that is the same in all rows."""
    shape = dims(value)
    return value is not None and value.is_initializer() and shape is not None and all(d == 1 for d in shape[-2:])


def _value(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for node in graph for value in node.outputs if value.name == name)
