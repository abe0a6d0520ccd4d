"""Finds the nodes that two graphs have in common, by what they compute and not by what they are called."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import onnx_ir as ir

from ..graph import all_nodes, qualified_op

_ROUNDS = 20  # each finds more from what the one before found
_SMALL = 1024  # bytes up to which tensors are compared by their content at once
T = TypeVar("T", bound=Hashable)


class Matching:
    """Pairs of nodes of two graphs that have the same operator, attributes and constants in the same place.

    1. A node that reads a weight which no other node reads is found by that weight.
    2. What reads the same input, or makes the same output, is the same where operator and constants are.
    3. Neighbours of a pair, at the same input or output, are a pair where operator and constants are the same.
    4. Of what is left, nodes whose surroundings occur once in each graph are pairs; then rule 3 again, until nothing
       is found. Nodes that cannot be told apart and of which both graphs have as many are paired in order.
    5. Where all around a node is new, nothing but the name of its result says which it was: the pair of that name is
       taken, if operator and constants are the same.

    Attributes:
        pairs: node of ``before`` -> node of ``after``.
        matched: the nodes of ``after`` among them.
        removed, added: the other nodes, in the order of the graphs.
    """

    def __init__(self, before: ir.Model, after: ir.Model) -> None:
        self.pairs: dict[ir.Node, ir.Node] = {}
        self.matched: dict[ir.Node, ir.Node] = {}
        old, new = list(all_nodes(before)), list(all_nodes(after))
        contents = _Contents(before, after)
        self._kinds = {node: _kind(node, contents) for node in (*old, *new)}
        self._fed = {node: [contents.fed(value) for value in node.inputs] for node in (*old, *new)}
        self._new: deque[tuple[ir.Node, ir.Node]] = deque()
        self._by_weights(old, new, contents)
        self._by_boundary(before, after)
        self._spread()
        for _ in range(_ROUNDS):
            if not self._by_surroundings(old, new):
                break
        self._by_names(old, new)
        self.removed = [node for node in old if node not in self.pairs]
        self.added = [node for node in new if node not in self.matched]

    def _pair(self, a: ir.Node | None, b: ir.Node | None) -> None:
        if a is None or b is None or a in self.pairs or b in self.matched or self._kinds[a] != self._kinds[b]:
            return
        if any(x != y for x, y in zip(self._fed[a], self._fed[b], strict=True) if x is not None and y is not None):
            return  # they read two inputs of the model
        self.pairs[a] = b
        self.matched[b] = a
        self._new.append((a, b))

    def _by_weights(self, old: Sequence[ir.Node], new: Sequence[ir.Node], contents: _Contents) -> None:
        ours, theirs = (_groups((n for n in side if contents.has_weight(n)), self._kinds.__getitem__)
                        for side in (old, new))  # fmt: skip
        for kind, nodes in ours.items():
            if len(nodes) == 1 and len(theirs.get(kind, ())) == 1:
                self._pair(nodes[0], theirs[kind][0])

    def _by_boundary(self, before: ir.Model, after: ir.Model) -> None:
        """Inputs and outputs of a model have names that mean something to others."""
        inputs = {value.name: value for value in after.graph.inputs}
        outputs = {value.name: value for value in after.graph.outputs}
        for value in before.graph.inputs:
            if value.name in inputs:
                self._readers(value, inputs[value.name])
        for value in before.graph.outputs:
            if value.name in outputs:
                self._pair(value.producer(), outputs[value.name].producer())

    def _readers(self, a: ir.Value, b: ir.Value) -> None:
        """Pairs those readers of two equal values that are alike and alone in that."""
        ours, theirs = (
            _groups((u for u in value.uses() if u.node not in done), lambda use: (use.idx, self._kinds[use.node]))
            for value, done in ((a, self.pairs), (b, self.matched))
        )
        for key, uses in ours.items():
            if len(uses) == 1 and len(theirs.get(key, ())) == 1:
                self._pair(uses[0].node, theirs[key][0].node)

    def _spread(self) -> None:
        while self._new:
            a, b = self._new.popleft()
            for x, y in zip(a.inputs, b.inputs, strict=True):
                if x is not None and y is not None and x.index() == y.index():
                    self._pair(x.producer(), y.producer())
            for x, y in zip(a.outputs, b.outputs, strict=True):
                self._readers(x, y)

    def _by_names(self, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
        made = {node.outputs[0].name: node for node in new if node not in self.matched}
        for node in old:
            self._pair(node, made.get(node.outputs[0].name))
        self._spread()

    def _by_surroundings(self, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> bool:
        """Rule 4, looking two nodes far, then one, then taking in order what is alike; whether it found anything."""
        left = [n for n in old if n not in self.pairs], [n for n in new if n not in self.matched]
        colors: dict[ir.Node, Hashable] = {}
        for number, (a, b) in enumerate(self.pairs.items()):
            colors[a] = colors[b] = number
        colors.update((node, hash((self._kinds[node], *self._fed[node]))) for side in left for node in side)
        near = {node: hash((colors[node], _around(node, colors))) for side in left for node in side}
        colors.update(near)
        far = {node: hash((colors[node], _around(node, colors))) for side in left for node in side}
        known = len(self.pairs)
        for color, in_order in ((far, False), (near, False), (far, True)):
            ours, theirs = (_groups(side, color.__getitem__) for side in left)
            for key, nodes in ours.items():
                others = theirs.get(key, [])
                if len(nodes) == len(others) and (in_order or len(nodes) == 1):
                    for a, b in zip(nodes, others, strict=True):
                        self._pair(a, b)
            self._spread()
            if len(self.pairs) > known:
                return True
        return False


class _Contents:
    """Tells tensors apart by type, shape and content.

    Graphs share the tensors that no pass rewrote: content is read only where both have tensors of one type and shape
    and they are not the same objects.
    """

    def __init__(self, before: ir.Model, after: ir.Model) -> None:
        self._keys: dict[int, Hashable] = {}
        self._main = (before.graph, after.graph)
        ours, theirs = (_tensors(all_nodes(model)) for model in (before, after))
        for form in {*ours, *theirs}:
            here, there = ours.get(form, {}), theirs.get(form, {})
            read = bool(here) and bool(there) and here.keys() != there.keys()
            for identity, tensor in {**here, **there}.items():
                self._keys[identity] = (form, _digest(tensor) if read else identity)

    def source(self, value: ir.Value | None) -> Hashable:
        """What an input of a node is: the same for equal constants, and for all that is computed or fed."""
        if value is None:
            return "nothing"
        tensor = _stored(value)
        return None if tensor is None else self._keys[id(tensor)]

    def fed(self, value: ir.Value | None) -> Hashable:
        """Which input of the model or of its body ``value`` is, None if it is none."""
        if value is None or not value.is_graph_input() or value.graph is None:
            return None
        return value.name if value.graph in self._main else value.graph.inputs.index(value)

    def has_weight(self, node: ir.Node) -> bool:
        """Whether a constant of ``node`` is large enough to know it by."""
        tensors = [_stored(value) for value in node.inputs if value is not None]
        return any(tensor is not None and tensor.size >= 16 for tensor in tensors)


def _tensors(nodes: Iterable[ir.Node]) -> dict[Hashable, dict[int, ir.TensorProtocol]]:
    """The constants that ``nodes`` read, by type and shape, then by identity."""
    found: dict[Hashable, dict[int, ir.TensorProtocol]] = defaultdict(dict)
    for node in nodes:
        for value in node.inputs:
            if value is not None and (tensor := _stored(value)) is not None:
                found[tensor.dtype, str(tensor.shape)][id(tensor)] = tensor
    return found


def _stored(value: ir.Value) -> ir.TensorProtocol | None:
    return None if value.is_graph_input() or value.producer() is not None else value.const_value


def _digest(tensor: ir.TensorProtocol) -> Hashable:
    if tensor.dtype == ir.DataType.STRING:
        return tuple(tensor.numpy().reshape(-1).tolist())
    content = tensor.tobytes()
    return content if len(content) <= _SMALL else hashlib.blake2b(content, digest_size=16).digest()


def _kind(node: ir.Node, contents: _Contents) -> Hashable:
    """Operator, attributes and what is constant among the inputs; bodies of If and Loop have nodes of their own."""
    attributes = sorted(
        (name, "" if item.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) else _text(item.value))
        for name, item in node.attributes.items()
    )
    inputs = tuple(contents.source(value) for value in node.inputs)
    return hash((qualified_op(node), tuple(attributes), inputs, len(node.outputs)))


def _text(value: object) -> str:
    if isinstance(value, ir.TensorProtocol):
        return f"{value.dtype}{value.shape}{_digest(value)!r}"
    return repr(value)


def _around(node: ir.Node, colors: dict[ir.Node, Hashable]) -> Hashable:
    """What ``node`` reads from, in order, and what reads from it."""
    makers = ((value.producer(), value.index()) for value in node.inputs if value is not None)
    above = tuple((colors[maker], index) for maker, index in makers if maker is not None)
    uses = ((index, use) for index, value in enumerate(node.outputs) for use in value.uses())
    below = sorted(hash((index, use.idx, colors[use.node])) for index, use in uses)
    return above, tuple(below)


def _groups(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups
