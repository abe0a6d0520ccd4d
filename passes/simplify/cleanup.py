"""Removes what does nothing, and keeps one of what is there twice."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import PASS_KEY, all_nodes, remove_dead
from .duplicates import merge_common_subexpressions, merge_duplicate_initializers, remove_unused_initializers
from .no_ops import same_as, shorten


@dataclasses.dataclass(frozen=True)
class Cleanup(Pass):
    """Same operators, less of them; bit for bit the same results.

    1. Nodes that do nothing (``no_ops.same_as``): Identity, Dropout outside training, Cast to the same type, Concat or
       Sum of one, Transpose / Reshape / Expand / Squeeze / Pad / Slice without effect, x * 1, x + 0, x and True.
    2. Chains that are one node (``no_ops.shorten``): Transpose of Transpose, Reshape of Reshape, lossless Cast of Cast.
    3. Initializers with the same content become one; so do nodes with the same operator, attributes and inputs.
    4. Nodes whose results nobody reads, and initializers that nothing reads, go.

    Graph outputs keep their names and their nodes where needed. Works on subgraphs; linear in the size of the graph,
    repeated until nothing changes. Pays on every provider.
    """

    name: ClassVar[str] = "cleanup"
    tolerance: ClassVar[float] = 0.0
    gate: ClassVar[Gate] = "off"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        while found := +self._sweep(model):
            outcome.counts += found
        return outcome

    def _sweep(self, model: ir.Model) -> Counter[str]:
        counts: Counter[str] = Counter()
        for node in all_nodes(model):
            rule = shorten(node)
            if rule is not None:
                node.metadata_props[PASS_KEY] = self.name
                counts[rule] += 1
            same = same_as(node)
            if same is not None and _bypass(node, same[0]):
                counts[same[1]] += 1
        counts["duplicate initializers"] = merge_duplicate_initializers(model)
        counts["common subexpressions"] = merge_common_subexpressions(model)
        counts["dead nodes"] = remove_dead(model) - sum(count for rule, count in counts.items() if "no-op" in rule)
        counts["unused initializers"] = remove_unused_initializers(model) - counts["duplicate initializers"]
        return counts


def _bypass(node: ir.Node, value: ir.Value) -> bool:
    """Lets the readers of ``node``'s output read ``value``; False where the output's name would be lost."""
    result = node.outputs[0]
    if not result.is_graph_output():
        if not result.uses():
            return False  # dead already
        result.replace_all_uses_with(value)
        return True
    maker = value.producer()
    if maker is None or maker.graph is not node.graph or value.is_graph_output() or value.is_graph_input():
        return False
    name = result.name
    result.replace_all_uses_with(value, replace_graph_outputs=True)
    result.name = f"{name}_bypassed"
    value.name = name
    value.shape = result.shape if result.shape is not None else value.shape
    value.type = result.type if result.type is not None else value.type
    return True
