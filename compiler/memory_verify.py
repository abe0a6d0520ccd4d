"""Judges a memory plan from the model alone. Shares no code with the planner on purpose: a mistake there shows here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ..runtime.errors import PlanError
from .memory_plan import MemoryPlan


def verify_plan(plan: MemoryPlan, graph: ir.Graph) -> None:
    """Checks that ``plan`` can run ``graph``.

    Every node runs once, after what it reads; every value a node makes has a place, unless it is only another view of
    an input or initializer; from the step that makes it to the last that reads it nothing else is written there; the
    arena is not smaller than the most that is alive at one step.

    Raises:
        PlanError: names the first thing that is wrong.
    """
    nodes = {node.name: node for node in graph}
    if sorted(plan.order) != sorted(name or "" for name in nodes):
        raise PlanError("The plan's order does not hold every node of the graph once.", "Plan the model again.")
    made_at: dict[ir.Value, int] = {}
    last_read: dict[ir.Value, int] = {}
    for step, name in enumerate(plan.order):
        for value in _all_reads(nodes[name], set()):
            last_read[value] = step
            maker = value.producer()
            if maker is not None and maker.graph is graph and value not in made_at:
                raise PlanError(f"Node {name!r} runs before {value.name!r} is made.", "Plan the model again.")
        for value in nodes[name].outputs:
            made_at[value] = step
    for value in graph.outputs:
        last_read[value] = len(plan.order) - 1
    _check_places(plan, made_at, last_read)
    _check_disjoint(plan)


def _all_reads(node: ir.Node, inner: set[ir.Value]) -> set[ir.Value]:
    """Values from outside that the node reads, also from within its bodies."""
    found = {value for value in node.inputs if value is not None and value not in inner}
    for attribute in node.attributes.values():
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        for body in [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs():
            known = inner | set(body.inputs) | set(body.initializers.values())
            for item in body:
                found |= _all_reads(item, known)
                known |= set(item.outputs)
            found |= {value for value in body.outputs if value not in known}
    return found


def _check_places(plan: MemoryPlan, made_at: dict[ir.Value, int], last_read: dict[ir.Value, int]) -> None:
    place = {name: buffer for buffer in plan.buffers for name in buffer.names}
    for value, made in made_at.items():
        if not value.name:
            continue
        buffer = place.get(value.name)
        if buffer is None:
            if _is_outside(value, place):
                continue
            raise PlanError(f"The plan has no place for {value.name!r}.", "Plan the model again.")
        if buffer.start > made or buffer.end <= last_read.get(value, made):
            raise PlanError(
                f"{value.name!r} is needed from step {made} to {last_read.get(value, made)}, "
                f"its buffer lives from {buffer.start} to {buffer.end - 1}.",
                "Plan the model again.",
            )


def _is_outside(value: ir.Value, place: Mapping[str, object]) -> bool:
    """Whether ``value`` is a view, perhaps of a view, of something that has memory of its own."""
    home = value.graph
    while True:
        maker = value.producer()
        if maker is None or maker.graph is not home:  # of an outer graph, which has its own arena
            return True
        first = maker.inputs[0] if maker.inputs else None
        if maker.op_type not in ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity") or first is None:
            return False
        if first.name in place:
            return False
        value = first


def _check_disjoint(plan: MemoryPlan) -> None:
    """A sweep over the steps; in each, the buffers alive, by offset, must not reach into each other."""
    if not plan.buffers:
        return
    table = np.array([(b.start, b.end, b.offset, b.offset + b.size) for b in plan.buffers], np.int64)
    most = 0
    for step in range(len(plan.order)):
        alive = np.flatnonzero((table[:, 0] <= step) & (step < table[:, 1]) & (table[:, 3] > table[:, 2]))
        ranges = table[alive][np.argsort(table[alive, 2], kind="stable")]
        most = max(most, int((ranges[:, 3] - ranges[:, 2]).sum()))
        wrong = np.flatnonzero(ranges[1:, 2] < ranges[:-1, 3])
        if len(wrong):
            offset = int(ranges[wrong[0] + 1, 2])
            names = [b.names[0] for b in plan.alive_at(step) if b.offset <= offset < b.offset + b.size]
            raise PlanError(f"At step {step} {' and '.join(names)} overlap at byte {offset}.", "Plan the model again.")
    if int(table[:, 3].max()) < most or int(table[:, 2].min()) < 0:
        raise PlanError(f"The arena is smaller than the {most} bytes alive at one step.", "Plan the model again.")
