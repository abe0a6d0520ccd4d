"""Which operators torch executes: the whole table, and what a graph has that is not in it."""

from __future__ import annotations

import onnx_ir as ir

from ...runtime.errors import PassError
from ..graph import qualified_op, subgraphs

# Imported for what they enter into the table.
from . import attention, elementwise, fake_quant, layers, shaping
from .table import TABLE, Operator

__all__ = ["TABLE", "attention", "elementwise", "fake_quant", "find", "layers", "shaping", "unsupported"]
_STANDARD = ("", "ai.onnx")


def find(node: ir.Node) -> Operator | None:
    """How torch executes ``node``; None if it does not."""
    return TABLE.get(("" if node.domain in _STANDARD else node.domain, node.op_type))


def unsupported(nodes: list[ir.Node]) -> list[str]:
    """What torch cannot execute among ``nodes``, in words: operator, node, and why."""
    found: list[str] = []
    for node in nodes:
        name = f"{qualified_op(node)} ({node.name})"
        entry = find(node)
        if any(True for _ in subgraphs(node)):
            found.append(f"{name}: has bodies of its own")
        elif entry is None:
            found.append(name)
        elif reason := entry.refuse(node):
            found.append(f"{name}: {reason}")
    return found


def require(nodes: list[ir.Node]) -> None:
    """Checks that torch executes all of ``nodes``.

    Raises:
        PassError: names the first ones that it does not.
    """
    names = unsupported(nodes)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise PassError(
            f"Training cannot execute {'; '.join(names[:5])}{more}.",
            "Train before the pass that writes such nodes, or leave it out.",
        )
