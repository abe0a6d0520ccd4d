"""What the fusing passes share: walking from a node to its only reader, and operands in either order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from ..compiler.base import Outcome
from ..compiler.graph import MICROSOFT, Names, add_initializer, all_nodes, constant, is_op, only_consumer, rank
from ..runtime.capabilities import ROWS

MORE_AXES = "a constant of higher rank gives the result more axes than the input has"
# Normalizations: operator, domain -> inputs that the result is proportional to (scale, and bias)
NORMALIZATIONS = {
    ("LayerNormalization", ""): (1, 2),
    ("RMSNormalization", ""): (1,),
    ("SimplifiedLayerNormalization", ""): (1,),
    ("SkipLayerNormalization", MICROSOFT): (2, 3),
    ("SkipSimplifiedLayerNormalization", MICROSOFT): (2,),
}


def deciding_rows(model: ir.Model) -> tuple[int, ...]:
    """The numbers of rows that decide between forms of a normalization: one for decoders, which run token by token."""
    decodes = any(is_op(node, "GroupQueryAttention", domain=MICROSOFT) for node in all_nodes(model))
    return ROWS[:1] if decodes else ROWS[1:]


def until_nothing_fires(outcome: Outcome, sweep: Callable[[], None]) -> None:
    """Repeats ``sweep`` as long as it counts rules in ``outcome``: one rewrite may make the next one possible.

    The refusals that stay are those of the last sweep.
    """
    fired = -1
    while fired != outcome.counts.total():
        fired = outcome.counts.total()
        outcome.refusals.clear()
        sweep()


def next_node(value: ir.Value) -> ir.Node | None:
    """The only reader of ``value``, if it lies in the same graph.

    A reader in the body of an If or Loop does not count: fused there, a product computed once would be computed in
    every iteration.
    """
    node = only_consumer(value)
    return node if node is not None and node.graph is value.graph else None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary ``node`` that is not ``value``; None if ``node`` has one operand."""
    first, second = (*node.inputs, None)[:2]
    return second if first is value else first


def operands(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two operands of a binary ``node``, in the order they stand in and, if it commutes, in the other."""
    first, second = (*node.inputs, None)[:2]
    if first is None or second is None:
        return
    yield first, second
    if node.op_type in ("Add", "Mul"):
        yield second, first


def grows_rank(x: ir.Value, result: ir.Value) -> bool:
    """Whether constants of a higher rank ([1, 1, 1] for a number) give ``result`` axes that ``x`` does not have."""
    before, after = rank(x), rank(result)
    return before is not None and after is not None and before != after


def as_vector(value: ir.Value, graph: ir.Graph, names: Names) -> ir.Value:
    """``value`` as a 1-D tensor: a constant [1, 1, D] is written anew as [D]; what is no constant stays."""
    array = constant(value) if rank(value) != 1 else None
    return value if array is None else add_initializer(graph, names, f"{value.name}_vector", array.reshape(-1))
