"""Which values need memory, how much, and from when to when: the facts that order and offsets are planned from."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ...compiler.memory_plan import PlannedBuffer
from ...runtime.divided.parts import reads
from ...runtime.errors import PlanError
from ..symbolic import SymbolicShapes
from ..symbolic_dims import is_own_symbol

ALIGNMENT = 64  # bytes; ORT's CPU allocator aligns to the same
# Only the shape differs: the output is the input's memory.
_VIEWS = frozenset(["Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"])
# Element by element: the output may overwrite an input of the same size that nobody reads afterwards.
_IN_PLACE = frozenset(
    [
        "Abs",
        "Add",
        "Ceil",
        "Clip",
        "Cos",
        "Div",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
        "Mul",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Tanh",
        "ThresholdedRelu",
    ]
)


@dataclasses.dataclass
class Tensor:
    """Memory that one node fills, under all the names that views give it.

    Attributes:
        names: the value that is made, then its views.
        size: bytes, aligned.
        producer: position of the node that makes it, in the order of the graph.
        consumers: positions of the nodes that read it or a view of it, bodies of If and Loop included.
        kept: whether it is a graph output, so alive to the end.
    """

    names: list[str]
    size: int
    producer: int
    consumers: set[int] = dataclasses.field(default_factory=lambda: set[int]())
    kept: bool = False


@dataclasses.dataclass
class Flow:
    """A graph, as far as its memory is concerned.

    Attributes:
        before: for each node the nodes it needs results of.
        tensors: the memory that nodes fill. Graph inputs and initializers are not in it: they have memory already.
        in_place: for each node the tensors (indices) that its output may overwrite, if nobody reads them afterwards.
    """

    before: list[set[int]]
    tensors: list[Tensor]
    in_place: list[list[int]]

    @property
    def made(self) -> list[list[int]]:
        """For each node the tensors it makes."""
        made: list[list[int]] = [[] for _ in self.before]
        for index, tensor in enumerate(self.tensors):
            made[tensor.producer].append(index)
        return made


class Sizes:
    """Bytes of the values of a model, with its symbolic dims bound.

    Args:
        model: the model.
        bindings: ``{dim name: size}``.
    """

    def __init__(self, model: ir.Model, bindings: Mapping[str, int]) -> None:
        self._shapes = SymbolicShapes(model)
        self._bindings = bindings
        self._sizes: dict[str, int | None] = {}
        self.missing: dict[str, None] = {}  # a set that keeps the order
        self.unknown: dict[str, str] = {}

    def bytes_of(self, value: ir.Value) -> int:
        """Bytes of ``value``; 0 where they are not known: then ``missing`` names the dims to bind, and ``unknown`` the
        dims and values that no binding makes known, with the reason.
        """
        dims = self._shapes.dims(value)
        if dims is None or value.dtype is None:
            self.unknown[value.name or ""] = "its shape or type is not known"
            return 0
        elements = 1
        for coefficient, symbols in dims:
            elements *= coefficient
            for symbol in symbols:
                elements *= self._bound(symbol)
        return math.ceil(elements * value.dtype.bitwidth / 8)

    def _bound(self, symbol: str) -> int:
        if symbol not in self._sizes:
            self._sizes[symbol] = evaluate(symbol, self._bindings)
        size = self._sizes[symbol]
        if size is not None:
            return size
        names = _missing(symbol, self._bindings)
        self.missing |= dict.fromkeys(names)
        if not names:
            self.unknown[symbol] = "no size follows from the inputs"
        return 0


def evaluate(symbol: str, bindings: Mapping[str, int]) -> int | None:
    """The size of a symbolic dim: bound by name, or an expression of such names (``Min(512, past + new)``)."""
    if symbol in bindings:
        return bindings[symbol]
    try:
        size = ir.SymbolicDim(symbol).evaluate(bindings)
    except ValueError:  # a name of its own, no expression
        return None
    return size if isinstance(size, int) else None


def _missing(symbol: str, bindings: Mapping[str, int]) -> list[str]:
    """The names to bind so that ``symbol`` has a size; none where it is the size of something computed."""
    try:
        return sorted(set(ir.SymbolicDim(symbol).free_symbols()) - set(bindings))
    except ValueError:
        return [] if is_own_symbol(symbol) else [symbol]


def flow_of(graph: ir.Graph, sizes: Sizes) -> Flow:
    """The flow of one graph; what bodies of its nodes read of it counts as read by the node.

    Raises:
        PlanError: sizes that are not known; the message asks for the dims by name.
    """
    nodes = list(graph)
    position = {node: index for index, node in enumerate(nodes)}
    read = [reads(node) for node in nodes]
    home: dict[ir.Value, int] = {}  # value -> its tensor
    flow = Flow([set() for _ in nodes], [], [[] for _ in nodes])
    for index, node in enumerate(nodes):
        for value in read[index]:
            maker = value.producer()
            if maker is not None and maker in position:
                flow.before[index].add(position[maker])
            if value in home:
                flow.tensors[home[value]].consumers.add(index)
        source = node.inputs[0] if node.inputs else None
        if node.op_type in _VIEWS and not node.domain and _is_view(source, node.outputs[0], home):
            if source in home:
                home[node.outputs[0]] = home[source]
                flow.tensors[home[source]].names.append(node.outputs[0].name or "")
                flow.tensors[home[source]].kept |= node.outputs[0].is_graph_output()
            continue
        for value in node.outputs:
            if value.name:
                home[value] = len(flow.tensors)
                size = -(-sizes.bytes_of(value) // ALIGNMENT) * ALIGNMENT
                flow.tensors.append(Tensor([value.name], size, index, kept=value.is_graph_output()))
        if node.op_type in _IN_PLACE and not node.domain:
            out = flow.tensors[home[node.outputs[0]]]
            candidates = {home[value] for value in node.inputs if value is not None and value in home}
            flow.in_place[index] = [i for i in sorted(candidates) if flow.tensors[i].size == out.size]
    _require_known(sizes)
    return flow


def _is_view(source: ir.Value | None, output: ir.Value, home: Mapping[ir.Value, int]) -> bool:
    """A graph output cannot be the memory of an input or an initializer: it is copied."""
    return source is not None and (source in home or not output.is_graph_output())


def _require_known(sizes: Sizes) -> None:
    if sizes.missing:
        raise PlanError(
            f"The memory cannot be planned: no size was given for {', '.join(sizes.missing)}.",
            f"Give bindings={{{', '.join(f'{name!r}: 1' for name in sizes.missing)}}} with the sizes you run.",
        )
    if sizes.unknown:
        name, why = next(iter(sizes.unknown.items()))
        raise PlanError(
            f"The memory cannot be planned: the size of {name!r} depends on the data ({why}).",
            "Plan a model whose shapes follow from its inputs, or fix that dim.",
        )


def buffers_in_order(flow: Flow, order: Sequence[int]) -> list[PlannedBuffer]:
    """Buffers and their lifetimes when the nodes run in ``order``, offsets still 0.

    A tensor that is written over an input joins the input's buffer.
    """
    step = {node: index for index, node in enumerate(order)}
    joined: dict[int, int] = {}
    taken: set[int] = set()
    made = flow.made
    for node in order:
        over = next((i for i in flow.in_place[node] if i not in taken and _dies_at(flow.tensors[i], node, step)), None)
        if over is None:
            continue
        taken.add(over)
        joined[made[node][0]] = joined.get(over, over)
    groups: defaultdict[int, list[Tensor]] = defaultdict(list)
    for index, tensor in enumerate(flow.tensors):
        groups[joined.get(index, index)].append(tensor)
    buffers: list[PlannedBuffer] = []
    for tensors in groups.values():
        names = tuple(name for tensor in tensors for name in tensor.names)
        start = min(step[tensor.producer] for tensor in tensors)
        end = max(_end(tensor, step, len(order)) for tensor in tensors)
        buffers.append(PlannedBuffer(names, tensors[0].size, start, end, 0))
    return buffers


def _dies_at(tensor: Tensor, node: int, step: Mapping[int, int]) -> bool:
    return not tensor.kept and max(step[consumer] for consumer in tensor.consumers) == step[node]


def _end(tensor: Tensor, step: Mapping[int, int], steps: int) -> int:
    if tensor.kept:
        return steps
    return max((step[consumer] for consumer in tensor.consumers), default=step[tensor.producer]) + 1
