"""Small pure helpers on ``onnx_ir`` that passes and checks share."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"
PASS_KEY = "onnxlathe.pass"
FROM_KEY = "onnxlathe.from"
Array = np.ndarray[Any, Any]


def opset(model: ir.Model) -> int:
    """Version of the default ONNX opset that ``model`` imports."""
    return model.opset_imports.get("", 0) or model.opset_imports.get("ai.onnx", 0)


def require_domain(model: ir.Model, domain: str, version: int = 1) -> None:
    """Declares ``domain`` in the model's opset imports if it is not there yet."""
    model.opset_imports.setdefault(domain, version)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph and of all subgraphs (If, Loop, Scan bodies); safe while mutating."""
    for graph in list(model.graphs()):
        yield from graph


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The bodies of ``node`` (If, Loop, Scan)."""
    for item in node.attributes.values():
        if item.type == ir.AttributeType.GRAPH:
            yield item.as_graph()
        elif item.type == ir.AttributeType.GRAPHS:
            yield from item.as_graphs()


def count_ops(model: ir.Model) -> Counter[str]:
    """Nodes by operator; contrib operators carry their domain, e.g. ``com.microsoft.MultiHeadAttention``."""
    return Counter(qualified_op(node) for node in all_nodes(model))


def qualified_op(node: ir.Node) -> str:
    """``Add`` or ``com.microsoft.FastGelu``."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included; a tensor shared by two initializers counts once."""
    seen: dict[int, int] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                seen[id(value.const_value)] = value.const_value.nbytes
    return sum(seen.values())


def is_op(node: ir.Node | None, *ops: str, domain: str = "") -> bool:
    """Whether ``node`` is one of ``ops`` in ``domain``."""
    return node is not None and node.op_type in ops and node.domain == domain


def producer(value: ir.Value | None, *ops: str, domain: str = "") -> ir.Node | None:
    """The node that makes ``value`` if it is one of ``ops`` (any operator when none is named), else None."""
    node = value.producer() if value is not None else None
    if node is None or (ops and not is_op(node, *ops, domain=domain)):
        return None
    return node


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The single node that reads ``value`` once, or None if it has other readers or is a graph output."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None, limit: int | None = None) -> Array | None:
    """The array of a constant ``value`` (initializer or Constant node), or None.

    Initializers that are also graph inputs can be overridden by the caller and so are not constant.

    Args:
        value: the value to look at.
        limit: give up on tensors with more elements than this (they stay on disk).
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or (limit is not None and tensor.size > limit) or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


def is_fixed(value: ir.Value | None) -> bool:
    """Whether ``value`` is an initializer that callers cannot replace; unlike ``constant`` it reads no data."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def unmap(tensor: ir.TensorProtocol | None) -> None:
    """Closes the mapping of an external tensor, whose pages would stay in memory, unless somebody has a view of it."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):
            tensor.release()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant with exactly one element (any rank), or None."""
    array = constant(value, limit=1)
    if array is None or array.size != 1:
        return None
    return float(array.reshape(-1)[0])


def is_scalar(value: ir.Value | None, expected: float, relative: float = 1e-3) -> bool:
    """Whether ``value`` is a one-element constant close to ``expected``."""
    number = scalar(value)
    return number is not None and math.isclose(number, expected, rel_tol=relative, abs_tol=1e-30)


def integers(value: ir.Value | None) -> list[int] | None:
    """A small constant integer tensor as a flat list, or None."""
    array = constant(value, limit=64)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(item) for item in array.reshape(-1)]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or ``default`` where it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """Shape as a list of ints, symbolic names, or None for unknown dims; None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def give_types(values: Iterable[ir.Value], arrays: Mapping[str, Array]) -> None:
    """Gives those of ``values`` whose element type is not known (contrib operators make such) that of their array."""
    for value in values:
        if value.dtype is None and (value.name or "") in arrays:
            value.dtype = ir.DataType.from_numpy(arrays[value.name or ""].dtype)


def rank(value: ir.Value | None) -> int | None:
    """Rank of ``value``, or None if unknown."""
    return None if value is None or value.shape is None else len(value.shape)


class Names:
    """Hands out value and node names that are not used anywhere in the model yet."""

    def __init__(self, model: ir.Model) -> None:
        self._used: set[str] = set()
        for graph in model.graphs():
            self._used.update(graph.initializers)
            self._used.update(value.name or "" for value in graph.inputs)
            for node in graph:
                self._used.add(node.name or "")
                self._used.update(value.name or "" for value in node.outputs)

    def fresh(self, base: str) -> str:
        """``base`` if it is free, else ``base_1``, ``base_2``..."""
        name, number = base, 0
        while name in self._used:
            number += 1
            name = f"{base}_{number}"
        self._used.add(name)
        return name


def add_initializer(graph: ir.Graph, names: Names, base: str, array: Array) -> ir.Value:
    """Registers ``array`` as a new initializer of ``graph`` under a fresh name derived from ``base``."""
    name = names.fresh(base)
    tensor = ir.Tensor(np.asarray(array, order="C"), name=name)  # ascontiguousarray makes [1] of a scalar
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str,
    output: str,
    like: ir.Value | None = None,
    shape: Iterable[int | str | None] | None = None,
    dtype: ir.DataType | None = None,
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
) -> ir.Node:
    """A node with one named, typed and shaped output, not yet in a graph.

    Args:
        op_type: operator.
        inputs: input values; None for an omitted optional input.
        name: node name (unique: take it from ``Names``).
        output: name of the output value.
        like: value whose type and shape the output has, unless given by ``shape`` and ``dtype``.
        shape: shape of the output.
        dtype: element type of the output.
        attributes: attributes as Python values.
        domain: operator domain.
    """
    final_shape = ir.Shape(list(shape)) if shape is not None else (like.shape if like is not None else None)
    element = dtype if dtype is not None else (like.dtype if like is not None else None)
    value = ir.Value(
        name=output,
        shape=final_shape.copy() if final_shape is not None else None,
        type=ir.TensorType(element) if element is not None else None,
    )
    return ir.node(op_type, inputs, attributes=dict(attributes or {}), domain=domain, outputs=[value], name=name)


def replace(old: ir.Node, new: Sequence[ir.Node], *, by: str, gone: Iterable[ir.Node] = ()) -> None:
    """Puts ``new`` where ``old`` stands and gives the last new node's output the place and name of ``old``'s.

    The nodes that only ``old`` needed stay behind without consumers; ``remove_dead`` takes them away.

    Args:
        old: the last node of the pattern (one output used).
        new: replacement nodes in topological order.
        by: name of the pass, written into the metadata of the new nodes for Netron.
        gone: the other nodes of the pattern, named in the metadata; of those that a pass made, what they come from.
    """
    graph = old.graph
    if graph is None:
        raise ValueError(f"{old.name} is not in a graph")
    origins = (node.metadata_props.get(FROM_KEY, f"{node.op_type}:{node.name}") for node in (*gone, old))
    origin = ", ".join(dict.fromkeys(name for text in origins for name in text.split(", ")))
    for node in new:
        node.metadata_props[PASS_KEY] = by
        node.metadata_props[FROM_KEY] = origin
        for key, text in old.metadata_props.items():  # keeps exporter scopes and device annotations
            node.metadata_props.setdefault(key, text)
    target = new[-1].outputs[0]
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, [old.outputs[0]], [target])


def remove_dead(model: ir.Model) -> int:
    """Removes nodes whose outputs nobody reads, in all graphs; returns how many.

    One backward sweep per graph, linear in its size. Unused initializers are left to ``Cleanup``.
    """
    removed = 0
    for graph in reversed(list(model.graphs())):  # inner graphs first: they read values of outer ones
        for node in reversed(graph):
            if any(value.uses() or value.is_graph_output() for value in node.outputs):
                continue
            for body in subgraphs(node):
                _stop_reading(body)
            graph.remove(node, safe=True)
            removed += 1
    return removed


def detach_removed(model: ir.Model) -> None:
    """Lets nodes that other libraries took out of the graphs read nothing: else they count as readers."""
    inside = set(all_nodes(model))
    for graph in model.graphs():
        made = (value for node in graph for value in node.outputs)
        for value in (*graph.inputs, *graph.initializers.values(), *made):
            for node, index in [(use.node, use.idx) for use in value.uses() if use.node not in inside]:
                node.replace_input_with(index, None)


def _stop_reading(body: ir.Graph) -> None:
    """Lets the nodes of a body that goes read nothing: else they count as readers of the graphs around it."""
    for node in body:
        for inner in subgraphs(node):
            _stop_reading(inner)
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
