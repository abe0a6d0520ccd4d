"""Logits of the last position only: what generating needs of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import PASS_KEY, Array, Names, add_initializer, dims, make_node
from .token_order import head_product

_RULE = "logits [batch, sequence, vocabulary] -> [batch, 1, vocabulary]"


@dataclasses.dataclass(frozen=True)
class KeepLastLogits(Pass):
    """Cuts everything but the last position before the language model's head.

    1. ``logits = head(x)`` with x [batch, sequence, hidden] -> ``logits = head(x[:, -1:])``, [batch, 1, vocabulary].

    Changes the output ``logits`` on purpose: for prompts padded on the right the last position is padding. Pays for
    prompts on every provider: the head of a small model with a large vocabulary costs as much as several layers, and
    its result is the largest tensor of all. Leaves a model whose logits have one position alone.

    Attributes:
        output: the output to cut.
    """

    name: ClassVar[str] = "keep-last-logits"
    gate: ClassVar[Gate] = "off"
    changes_signature: ClassVar[bool] = True
    output: str = "logits"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        logits = next((value for value in model.graph.outputs if value.name == self.output), None)
        known = dims(logits)
        if logits is None or known is None or len(known) != 3 or known[1] == 1:
            return outcome
        head = head_product(logits)
        value = head.inputs[0] if head is not None else None
        maker = value.producer() if value is not None else None
        if head is None or value is None or maker is None:
            node = logits.producer()
            if node is not None:
                outcome.refuse(node, _RULE, "it is not made, row by row, by a product with a constant matrix")
            return outcome
        names = Names(model)
        bounds = [
            add_initializer(model.graph, names, f"last_position_{word}", np.array([number], np.int64))
            for word, number in (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1))
        ]
        shape = dims(value)
        name = names.fresh(f"{value.name}_last")
        cut = [shape[0], 1, shape[2]] if shape is not None else None
        node = make_node("Slice", [value, *bounds], name=name, output=name, dtype=value.dtype, shape=cut)
        node.metadata_props[PASS_KEY] = self.name
        model.graph.insert_after(maker, node)
        head.replace_input_with(0, node.outputs[0])
        _set_length(head, logits)
        outcome.counts["last position only"] += 1
        return outcome

    def expected(self, results: Mapping[str, Array]) -> dict[str, Array]:
        """The last position of what the graph before gave."""
        return {
            name: array[:, -1:] if name.startswith(self.output) and array.ndim == 3 else array
            for name, array in results.items()
        }


def _set_length(first: ir.Node, logits: ir.Value) -> None:
    """Writes the new length into the shapes from the head to ``logits``."""
    node: ir.Node | None = first
    while node is not None:
        value = node.outputs[0]
        if value.shape is not None and len(value.shape) == 3:
            value.shape[1] = 1
        if value is logits:
            return
        node = next((use.node for use in value.uses()), None)
