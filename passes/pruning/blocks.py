"""Repeated blocks of a model, found by their residual stream: ``stream + branch(stream)``, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import onnx_ir as ir

from ...compiler.graph import MICROSOFT, attribute, is_op, only_consumer, producer
from ...compiler.padding import cache_names
from ..linear_layers import LinearLayer, linear_layer, result_of
from ..low_bit.streams import reads
from ..symbolic import SymbolicShapes
from ..symbolic_dims import ONE, Dims

BranchKind = Literal["attention", "ffn"]
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_ATTENTION = ("Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention")
_SUM = 3  # output of Skip*Normalization that is the stream before the normalization


@dataclasses.dataclass(frozen=True, eq=False)
class Half:
    """One addition to the residual stream.

    Attributes:
        kind: whether the branch has attention in it.
        skip: the stream before.
        branch: what is added to it.
        out: the stream after; behind the normalization where that is part of the stream (post-normalization).
        add: the node that adds: Add, or Skip*Normalization.
        norm: the node that normalizes the stream (post-normalization), None where the stream itself goes on.
        nodes: the nodes of the branch.
    """

    kind: BranchKind
    skip: ir.Value
    branch: ir.Value
    out: ir.Value
    add: ir.Node
    norm: ir.Node | None
    nodes: frozenset[ir.Node]

    @property
    def layer(self) -> LinearLayer | None:
        """The layer whose result the branch ends with, None if it ends with something else."""
        node = producer(self.branch)
        for candidate in (node, *(producer(value) for value in (node.inputs if node is not None else ()))):
            layer = linear_layer(candidate) if candidate is not None and candidate in self.nodes else None
            if layer is not None and layer.dequantize is None and result_of(layer) is self.branch:
                return layer
        return None


def residual_stream(model: ir.Model) -> list[Half]:
    """The longest chain of additions to one stream in the main graph, in order."""
    shapes = SymbolicShapes(model)
    presents = set(cache_names(model).values())
    by_skip: dict[ir.Value, Half] = {}
    for node in model.graph:
        half = _half(node, shapes, presents)
        if half is not None:  # of two with one stream before them the outer counts
            by_skip[half.skip] = half
    outs = {half.out for half in by_skip.values()}
    chains: list[list[Half]] = []
    for start in [half for skip, half in by_skip.items() if skip not in outs]:
        chain = [start]
        while (following := by_skip.get(chain[-1].out)) is not None:
            chain.append(following)
        chains.append(chain)
    return max(chains, key=len, default=[])


def blocks_of(halves: Sequence[Half]) -> list[list[Half]]:
    """The halves by block: one begins with attention that follows something else; without attention each is one."""
    blocks: list[list[Half]] = []
    for half in halves:
        begins = half.kind == "attention" and (not blocks or blocks[-1][-1].kind != "attention")
        if begins or not blocks or not any(item.kind == "attention" for item in blocks[-1]):
            blocks.append([half])
        else:
            blocks[-1].append(half)
    return blocks


def _half(node: ir.Node, shapes: SymbolicShapes, presents: set[str]) -> Half | None:
    fused = is_op(node, *_SKIPS, domain=MICROSOFT)
    if not fused and not is_op(node, "Add"):
        return None
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or first.producer() is None or second.producer() is None:
        return None
    if not alike(shapes.dims(first), shapes.dims(second)):
        return None
    for skip, branch in ((first, second), (second, first)):
        nodes = _branch_nodes(skip, branch, node, shapes, presents)
        if _has_layer(nodes):
            kind: BranchKind = "attention" if any(item.op_type in _ATTENTION for item in nodes) else "ffn"
            out, norm = _stream_after(node)
            return Half(kind, skip, branch, out, node, norm, frozenset(nodes))
    return None


def alike(a: Dims | None, b: Dims | None) -> bool:
    """Whether two shapes can be equal: no axis of one is repeated, and what is known of both is the same."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(x == y or (ONE not in (x, y) and (x[1] or y[1])) for x, y in zip(a, b, strict=True))


def _stream_after(node: ir.Node) -> tuple[ir.Value, ir.Node | None]:
    if not is_op(node, "Add"):
        total = node.outputs[_SUM] if len(node.outputs) > _SUM else None
        if total is not None and (total.uses() or total.is_graph_output()):
            return total, None
        return node.outputs[0], node
    reader = only_consumer(node.outputs[0])
    if reader is not None and reader.op_type in _NORMS and reader.inputs[0] is node.outputs[0]:
        return reader.outputs[0], reader
    return node.outputs[0], None


def _branch_nodes(
    skip: ir.Value, branch: ir.Value, add: ir.Node, shapes: SymbolicShapes, presents: set[str]
) -> set[ir.Node]:
    """The nodes of a branch from which nothing but the addition reads, or none if there is no such branch.

    Others may ask for sizes that the stream has too: ``bypass`` then lets them ask the stream.
    """
    for through_shapes in (True, False):
        nodes = _between(skip, branch, through_shapes)
        if nodes and _only_there(nodes, skip, branch, add, shapes, presents):
            return nodes
    return set()


def _between(skip: ir.Value, branch: ir.Value, through_shapes: bool) -> set[ir.Node]:
    """The nodes on the ways from ``skip``, or what a fused node normalizes of it, to ``branch``."""
    maker = producer(skip)
    fused = is_op(maker, *_SKIPS, domain=MICROSOFT)
    sources = list(maker.outputs) if maker is not None and fused else [skip]
    behind: set[ir.Node] = set()
    pending = [branch]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value not in sources and node is not None and node not in behind:
            behind.add(node)
            pending += list(reads(node))
    found: set[ir.Node] = set()
    waiting = list(sources)
    while waiting:
        for use in waiting.pop().uses():
            if use.node in behind and use.node not in found and (through_shapes or not is_op(use.node, "Shape")):
                found.add(use.node)
                waiting += list(use.node.outputs)
    return found


def _only_there(
    nodes: set[ir.Node], skip: ir.Value, branch: ir.Value, add: ir.Node, shapes: SymbolicShapes, presents: set[str]
) -> bool:
    """Whether nothing but the addition, and the caller as a cache, reads what the branch makes, sizes apart."""
    for node in nodes:
        for value in node.outputs:
            if value.is_graph_output() and value.name not in presents:
                return False
            for use in value.uses():
                known = use.node in nodes or (value is branch and use.node is add)
                if not known and not _asks_for_common_sizes(use.node, shapes.dims(value), shapes.dims(skip)):
                    return False
    return True


def _asks_for_common_sizes(node: ir.Node, dims: Dims | None, stream: Dims | None) -> bool:
    if not is_op(node, "Shape") or dims is None or stream is None or len(dims) != len(stream):
        return False
    asked = slice(attribute(node, "start", 0), attribute(node, "end"))
    return dims[asked] == stream[asked]


def _has_layer(nodes: Iterable[ir.Node]) -> bool:
    return any(linear_layer(node) is not None for node in nodes)


def runs(halves: Sequence[Half], gone: set[Half]) -> Iterator[list[Half]]:
    """The halves in ``gone`` that follow each other in ``halves``, as lists."""
    run: list[Half] = []
    for half in halves:
        if half in gone:
            run.append(half)
        elif run:
            yield run
            run = []
    if run:
        yield run
