"""Duplicate weights and common subexpressions: the rules that ``Cleanup`` applies."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from ...compiler.graph import subgraphs

RANDOM_OPS = frozenset(
    ["RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike", "Multinomial", "Bernoulli", "Dropout"]
)
_COMMUTATIVE = frozenset(["Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal", "Sum"])
_SMALL_ATTRIBUTE = 1024
_SAMPLE = 1 << 16


def merge_duplicate_initializers(model: ir.Model) -> int:
    """Lets initializers with equal type, shape and bytes be one; returns how many went.

    Large tensors are first compared by a sample of their bytes, so that memory-mapped weights are read in full only
    where two really look alike. Initializers that are graph inputs or outputs keep their own.
    """
    merged = 0
    main: dict[Hashable, list[ir.Value]] = {}
    for graph in model.graphs():
        groups: dict[Hashable, list[ir.Value]] = defaultdict(list)
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or value.is_graph_output() or not value.uses():
                continue
            if tensor.dtype != ir.DataType.STRING:
                groups[(tensor.dtype, tuple(tensor.shape.numpy()))].append(value)
        for key, values in groups.items():
            candidates = [*(main.get(key, []) if graph is not model.graph else []), *values]
            merged += _merge_equal(candidates, keep=len(candidates) - len(values))
        if graph is model.graph:
            main = dict(groups)
    return merged


def _merge_equal(values: list[ir.Value], keep: int) -> int:
    """Merges equal tensors among ``values``; the first ``keep`` belong to an outer graph and only serve."""
    if len(values) < 2:
        return 0
    merged = 0
    by_sample: dict[bytes, list[ir.Value]] = defaultdict(list)
    for index, value in enumerate(values):
        alike = by_sample[_digest(value, whole=False)]
        same = next((other for other in alike if _equal(other, value)), None)
        if same is not None and index >= keep:
            value.replace_all_uses_with(same)
            merged += 1
        elif same is None:
            alike.append(value)
    return merged


def _digest(value: ir.Value, *, whole: bool) -> bytes:
    tensor = value.const_value
    if tensor is None:
        return b""
    content = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    if not whole and content.size > 2 * _SAMPLE:
        content = np.concatenate([content[:_SAMPLE], content[-_SAMPLE:]])
    return hashlib.sha256(content.data).digest()


def _equal(a: ir.Value, b: ir.Value) -> bool:
    if a.const_value is b.const_value:
        return True
    if a.const_value is None or a.const_value.nbytes <= 2 * _SAMPLE:
        return True  # the sample was everything
    return _digest(a, whole=True) == _digest(b, whole=True)


def merge_common_subexpressions(model: ir.Model) -> int:
    """Merges nodes with the same operator, attributes and inputs; bodies may use what their outer graph has.

    onnx_ir's own pass leaves subgraphs alone and knows fewer random operators. Nodes that make graph outputs stay, as
    outputs keep their names.
    """
    return _merge_nodes(model.graph, {})


def _merge_nodes(graph: ir.Graph, outer: dict[Hashable, ir.Node]) -> int:
    known, merged = dict(outer), 0
    for node in graph:
        bodies = list(subgraphs(node))
        for body in bodies:
            merged += _merge_nodes(body, known)
        key = _key(node) if not bodies and node.op_type not in RANDOM_OPS else None
        if key is None:
            continue
        first = known.setdefault(key, node)
        if first is node or any(value.is_graph_output() for value in node.outputs):
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            new.shape = new.shape if new.shape is not None else old.shape
            new.type = new.type if new.type is not None else old.type
            old.replace_all_uses_with(new)
        graph.remove(node, safe=True)
        merged += 1
    return merged


def _key(node: ir.Node) -> Hashable | None:
    attributes: list[Hashable] = []
    for name in sorted(node.attributes):
        item = node.attributes[name]
        content = item.value
        if item.type == ir.AttributeType.TENSOR:
            if content.nbytes > _SMALL_ATTRIBUTE or content.dtype == ir.DataType.STRING:
                return None
            content = (content.dtype, tuple(content.shape.numpy()), content.tobytes())
        elif isinstance(content, (list, tuple)):
            content = tuple(content)
        elif not isinstance(content, (int, float, str, bytes)):
            return None
        attributes.append((name, item.type, content))
    inputs = [id(value) for value in node.inputs]
    if node.op_type in _COMMUTATIVE and not node.domain:
        inputs.sort()
    present = tuple(bool(value.name) for value in node.outputs)
    return (node.domain, node.op_type, node.overload, tuple(inputs), present, *attributes)


def remove_unused_initializers(model: ir.Model) -> int:
    """Removes initializers that nothing reads, in all graphs; returns how many."""
    removed = 0
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
                removed += 1
    return removed
