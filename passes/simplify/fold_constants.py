"""Work that needs no input is done at compile time, where that does not grow the file."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import Array, Names, add_initializer, remove_dead, subgraphs
from ...runtime.errors import ModelError
from ...runtime.inference import open_session, run_session, session_options
from ..symbolic import SymbolicShapes
from ..symbolic_dims import Dims

_RULE = "constant inputs -> initializer"
_QUANTIZATION = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_RANDOM = (
    "RandomUniform",
    "RandomNormal",
    "RandomUniformLike",
    "RandomNormalLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
)
_KEPT = frozenset([*_QUANTIZATION, *_RANDOM])
_GROWING = frozenset(["Expand", "Tile", "ConstantOfShape", "Range", "Resize", "Upsample", "Pad", "OneHot", "EyeLike"])


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Replaces nodes whose inputs are all constant by initializers.

    1. All foldable nodes are evaluated together: in one ONNX Runtime session with optimizations off, or, where a type
       has no kernel there, by onnx's reference evaluator.
    2. Never grows the file: what is written is at most ``growth_limit`` bytes larger than the initializers it frees;
       a node whose result size cannot be bounded is refused.
    3. Shape arithmetic over static dims (Shape, Gather, Concat...) is constant too (``symbolic.py``).
    4. Left alone: Q/DQ (they are the quantization), random operators, operators with subgraphs, sequences, graph
       outputs, initializers that callers may override.

    Pays on every provider; for MatMul with a transposed weight it lets ONNX Runtime pack the weight once.

    Attributes:
        growth_limit: bytes one folded result may be larger than what it frees.
    """

    name: ClassVar[str] = "fold-constants"
    tolerance: ClassVar[float] = 1e-6
    gate: ClassVar[Gate] = "off"
    growth_limit: int = 1024

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        names = Names(model)
        while (found := self._fold(model, names)).changed:  # a folded result may be what another node waited for
            outcome.counts += found.counts
            remove_dead(model)
        outcome.refusals, outcome.notes = found.refusals, found.notes
        return outcome

    def _fold(self, model: ir.Model, names: Names) -> Outcome:
        outcome, shapes = Outcome(), SymbolicShapes(model)
        for graph in model.graphs():
            self._fold_shapes(graph, shapes, names, outcome)
            self._fold_nodes(graph, model.opset_imports, shapes, names, outcome)
        return outcome

    def _fold_shapes(self, graph: ir.Graph, shapes: SymbolicShapes, names: Names, outcome: Outcome) -> None:
        for node in graph:
            value = node.outputs[0] if len(node.outputs) == 1 else None
            if value is None or value.is_graph_output() or not value.uses() or value.dtype is None:
                continue
            content, dims = shapes.content(value), shapes.dims(value)
            array = _numbers(content, dims, value.dtype)
            if array is not None:
                value.replace_all_uses_with(add_initializer(graph, names, f"{value.name}_folded", array))
                outcome.counts["shape arithmetic"] += 1

    def _fold_nodes(
        self, graph: ir.Graph, opsets: dict[str, int], shapes: SymbolicShapes, names: Names, outcome: Outcome
    ) -> None:
        folded = self._choose(graph, shapes, outcome)
        wanted = [
            value for node in folded for value in node.outputs if any(use.node not in folded for use in value.uses())
        ]
        if not wanted:
            return
        try:
            results = _evaluate(graph, opsets, wanted)
        except ModelError as error:
            outcome.notes.append(f"{len(folded)} constant nodes could not be evaluated: {error.what}")
            return
        for value, array in zip(wanted, results, strict=True):
            value.replace_all_uses_with(add_initializer(graph, names, f"{value.name}_folded", array))
        outcome.counts["folded nodes"] += len(folded)

    def _choose(self, graph: ir.Graph, shapes: SymbolicShapes, outcome: Outcome) -> dict[ir.Node, None]:
        """The nodes to fold, in order: constant inputs, bounded results, no growth."""
        folded: dict[ir.Node, None] = {}
        sizes: dict[ir.Value, int] = {}
        for node in graph:
            if not _constant_inputs(node, graph, sizes) or not _may_fold(node):
                continue
            predicted = [_predicted_bytes(value, shapes) for value in node.outputs]
            known = [size for size in predicted if size is not None]
            if len(known) != len(predicted):
                outcome.refuse(node, _RULE, "the size of its result is unknown")
                continue
            inputs = {value for value in node.inputs if value is not None}
            freed = sum(_bytes(value, sizes) for value in inputs if len({use.node for use in value.uses()}) == 1)
            if sum(known) > freed + self.growth_limit:
                outcome.refuse(node, _RULE, f"folding would write {sum(known)} bytes and free {freed}")
                continue
            folded[node] = None
            sizes.update(zip(node.outputs, known, strict=True))
        return folded


def _numbers(content: Dims | None, dims: Dims | None, dtype: ir.DataType) -> Array | None:
    if content is None or dims is None or len(dims) > 1 or dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    if any(symbols or number < 0 for number, symbols in content):  # -1 stands for "open" in a Reshape target
        return None
    array = np.array([number for number, _ in content], dtype.numpy())
    return array if dims else array.reshape(())


def _may_fold(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type in _KEPT or any(subgraphs(node)):
        return False
    if any(value.is_graph_output() for value in node.outputs):
        return False
    return all(value.type is None or isinstance(value.type, ir.TensorType) for value in node.outputs)


def _constant_inputs(node: ir.Node, graph: ir.Graph, sizes: dict[ir.Value, int]) -> bool:
    inputs = [value for value in node.inputs if value is not None]
    return bool(inputs) and all(
        value in sizes
        or (
            value.is_initializer()
            and value.graph is graph
            and not value.is_graph_input()
            and value.const_value is not None
            and value.const_value.dtype != ir.DataType.STRING
        )
        for value in inputs
    )


def _bytes(value: ir.Value, sizes: dict[ir.Value, int]) -> int:
    stored = value.const_value.nbytes if value.const_value is not None else 0
    return sizes.get(value, stored)


def _predicted_bytes(value: ir.Value, shapes: SymbolicShapes) -> int | None:
    """Bytes of a result, from its static shape; None where it is not known before running it."""
    dims = shapes.dims(value)
    if dims is None or value.dtype is None or any(symbols for _, symbols in dims):
        return None
    return math.ceil(math.prod(number for number, _ in dims) * value.dtype.itemsize)


def _evaluate(graph: ir.Graph, opsets: dict[str, int], wanted: list[ir.Value]) -> list[Array]:
    """The arrays of ``wanted``, which depend on initializers only."""
    part = ir.convenience.extract(graph, inputs=[], outputs=wanted)
    part.opset_imports.update(opsets)  # a body has none of its own
    model = ir.Model(part, ir_version=10)
    names = [value.name or "" for value in part.outputs]
    for value in part.outputs:
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.UNDEFINED)
    try:
        results: dict[str, Any] = run_session(open_session(model, session_options(optimize=False, repack=False)), {})
    except ModelError as error:
        results = _evaluate_by_reference(ir.to_proto(model), names, error)
    return [np.asarray(results[name]) for name in names]


def _evaluate_by_reference(proto: onnx.ModelProto, names: list[str], error: ModelError) -> dict[str, Any]:
    try:
        return dict(zip(names, ReferenceEvaluator(proto).run(None, {}), strict=True))  # pyright: ignore
    except Exception as second:  # the evaluator raises whatever NumPy raises
        raise ModelError(f"{error.what}; the reference evaluator: {second}") from second
