"""Cuts the graph of a rank at its exchanges."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from .collectives import ALL_GATHER, ALL_REDUCE, Collective
from .parts import Part, cut, reads


@dataclasses.dataclass(frozen=True)
class Segment:
    """What a rank runs between two exchanges.

    Attributes:
        part: the graph. ``part.received`` also names results of exchanges.
        collectives: the exchanges behind it.
    """

    part: Part
    collectives: tuple[Collective, ...]


def segments(model: ir.Model) -> list[Segment]:
    """Cuts the graph of a rank at its AllReduce and AllGather nodes, as early as each node can run.

    Args:
        model: the graph of a rank; it is taken apart.
    """
    graph = model.graph
    level: dict[ir.Value, int] = {}
    found: list[tuple[int, Collective]] = []
    labels: list[int] = []
    for node in list(graph):
        at = max((level.get(value, 0) for value in reads(node)), default=0)
        if node.op_type not in (ALL_REDUCE, ALL_GATHER):
            labels.append(at)
            level.update(dict.fromkeys(node.outputs, at))
            continue
        value, result = node.inputs[0], node.outputs[0]
        assert value is not None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        kind = ALL_GATHER if node.op_type == ALL_GATHER else ALL_REDUCE
        found.append((at, Collective(kind, value.name or "", result.name or "", axis)))
        received = ir.Value(name=result.name, type=result.type, shape=result.shape)
        result.replace_all_uses_with(received)
        graph.remove(node, safe=True)
        graph.inputs.append(received)
        level[received] = at + 1
        if not value.is_graph_output():
            graph.outputs.append(value)
    results = {collective.result for _, collective in found}
    pieces: list[Segment] = []
    for number, part in enumerate(cut(model, labels, max(labels) + 1)):
        taken = [value.name or "" for value in part.model.graph.inputs if value.name in results]
        part = dataclasses.replace(part, received=(*part.received, *taken))
        pieces.append(Segment(part, tuple(collective for at, collective in found if at == number)))
    return pieces
