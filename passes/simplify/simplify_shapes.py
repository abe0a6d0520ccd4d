"""Shape arithmetic that exporters leave behind, replaced by what it provably amounts to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import (
    Names,
    add_initializer,
    attribute,
    constant,
    is_op,
    make_node,
    opset,
    remove_dead,
    replace,
)
from ..symbolic import SymbolicShapes, reshaped
from ..symbolic_dims import Dims
from .index_grids import grid_axes


@dataclasses.dataclass(frozen=True)
class SimplifyShapes(Pass):
    """Removes Reshape and Expand that change nothing, and gives Reshape a constant shape where one says the same.

    Dims are followed symbolically through Shape, Gather, Slice, Concat and the operators between (``symbolic.py``).

    1. Reshape or Expand whose output provably has the dims of its input: removed (unless its output is a graph output).
    2. Reshape whose target is computed at run time: each dim is a number, the input's dim at the same axis (0), or the
       one that is left over (-1). The Shape/Gather/Concat chain behind it dies if nothing else needs it.
    3. GatherND over all positions of a tensor in order (transformers' attention masks): Unsqueeze (``index_grids.py``).

    Pays on every provider: fewer nodes on the critical path of short inputs, and on CUDA no round trips of shape
    tensors to the CPU. Contract: ONNX operators Reshape-14 (0 copies a dim, -1 is inferred) and Expand-13.
    """

    name: ClassVar[str] = "simplify-shapes"
    tolerance: ClassVar[float] = 0.0
    gate: ClassVar[Gate] = "off"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        nodes = [node for graph in model.graphs() for node in graph if is_op(node, "Reshape", "Expand", "GatherND")]
        if not nodes:
            return outcome
        shapes, names = SymbolicShapes(model), Names(model)
        for node in nodes:
            axes = grid_axes(node, shapes) if opset(model) >= 13 else None
            if axes is not None and isinstance(node.graph, ir.Graph):
                positions = add_initializer(node.graph, names, f"{node.name}_axes", np.array(axes, np.int64))
                result, name = node.outputs[0], names.fresh(f"{node.name}/unsqueeze")
                operands = [node.inputs[0], positions]
                new = make_node("Unsqueeze", operands, name=name, output=names.fresh(f"{name}_out"), like=result)
                replace(node, [new], by=self.name)
                outcome.counts["GatherND of everything"] += 1
        targets: dict[tuple[ir.Graph, tuple[int, ...]], ir.Value] = {}
        for node in nodes:
            source, result = node.inputs[0], node.outputs[0]
            if source is None or is_op(node, "GatherND") or not isinstance(node.graph, ir.Graph):
                continue
            before, after = shapes.dims(source), shapes.dims(result)
            if before is not None and before == after and not result.is_graph_output():
                result.replace_all_uses_with(source)
                outcome.counts[f"no-op {node.op_type}"] += 1
                continue
            if is_op(node, "Expand") or constant(node.inputs[1]) is not None:
                continue
            target = constant_target(before, shapes.content(node.inputs[1]))
            if target is None:
                continue
            if target.count(0) and attribute(node, "allowzero", 0):
                node.attributes.pop("allowzero")  # no dim of this target is a literal zero: 0 may mean "copy" again
            key = (node.graph, target)
            if key not in targets:
                targets[key] = add_initializer(
                    node.graph, names, "shape_" + "_".join(map(_word, target)), np.array(target)
                )
            node.replace_input_with(1, targets[key])
            outcome.counts["constant Reshape target"] += 1
        if outcome.changed:
            remove_dead(model)
        return outcome


def constant_target(source: Dims | None, target: Dims | None) -> tuple[int, ...] | None:
    """A constant Reshape target equal to ``target`` for an input of dims ``source``; None if there is none.

    Copied dims (0) and an inferred one (-1) are not mixed: with an empty batch ONNX Runtime cannot infer.
    """
    target = reshaped(source, target, allowzero=True)
    if target is None or (0, ()) in target:
        return None
    axes = range(len(target))
    copied = [source is not None and axis < len(source) and source[axis] == target[axis] for axis in axes]
    left = [axis for axis in axes if target[axis][1] and not copied[axis]]
    if not left:
        return tuple(0 if target[axis][1] else target[axis][0] for axis in axes)
    if len(left) == 1 and all(not target[axis][1] for axis in axes if axis != left[0]):
        return tuple(-1 if target[axis][1] else target[axis][0] for axis in axes)
    return None


def _word(size: int) -> str:
    return "rest" if size == -1 else "same" if size == 0 else str(size)
