"""Cuts a graph into parts that hand values on: stages of a pipeline, or what runs between two collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from ..errors import PlanError


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a graph.

    Attributes:
        model: a model of its own; it shares the weights.
        received: the inputs that earlier parts make; its other inputs are inputs of the whole.
        sent: the outputs that later parts read.
    """

    model: ir.Model
    received: tuple[str, ...]
    sent: tuple[str, ...]


def reads(node: ir.Node) -> list[ir.Value]:
    """What ``node`` and the bodies in it (If, Loop, Scan) read."""
    values = [value for value in node.inputs if value is not None]
    for item in node.attributes.values():
        bodies = {ir.AttributeType.GRAPH: lambda a: [a.as_graph()], ir.AttributeType.GRAPHS: lambda a: a.as_graphs()}
        for body in bodies.get(item.type, lambda a: [])(item):
            for inner in body:
                values += reads(inner)
            values += [value for value in body.outputs if value.producer() is None]
    return values


def cut(model: ir.Model, labels: Sequence[int], count: int) -> list[Part]:
    """Cuts the main graph of ``model`` into ``count`` parts that can run one after the other.

    Args:
        model: the model; not changed.
        labels: the part of each node, in the order of the graph.
        count: how many parts.

    Raises:
        PlanError: a part reads what a later one makes, makes nothing that anybody reads, or a value between parts has
            no type.
    """
    graph = model.graph
    part_of = dict(zip(graph, labels, strict=True))
    for value in graph.outputs:
        if value.producer() is None:
            raise PlanError(
                f"The output {value.name!r} is an input or an initializer itself: no part makes it.",
                "Compile with cleanup, or take that output away.",
            )
    needs: list[dict[ir.Value, None]] = [{} for _ in range(count)]
    sent: list[dict[ir.Value, None]] = [{} for _ in range(count)]
    for node, part in part_of.items():
        for value in reads(node):
            maker = value.producer()
            source = part_of.get(maker) if maker is not None else None
            if source is None:
                if value.is_graph_input() and value.graph is graph:
                    needs[part][value] = None
            elif source > part:
                raise PlanError(
                    f"Node {node.name} of part {part} reads {value.name}, which part {source} makes only later.",
                    "Run the partitioning pass last.",
                )
            elif source < part:
                needs[part][value] = None
                sent[source][value] = None
    for value in graph.outputs:
        sent[part_of[_maker(value)]].setdefault(value, None)
    return [_extract(model, number, list(needs[number]), list(sent[number])) for number in range(count)]


def _extract(model: ir.Model, number: int, needs: list[ir.Value], sent: list[ir.Value]) -> Part:
    if not sent:
        raise PlanError(f"Part {number} makes nothing that anybody reads.", "Compile with cleanup first.")
    received = [value for value in needs if value.producer() is not None]
    for value in received:
        if value.dtype is None:
            raise PlanError(f"The type of {value.name!r}, which is handed on, is not known.", "Infer shapes first.")
    graph = ir.convenience.extract(model.graph, needs, sent)
    graph.opset_imports.update(model.opset_imports)
    piece = ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
    return Part(piece, tuple(v.name or "" for v in received), tuple(v.name or "" for v in sent))


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # checked by `cut`
    return node
