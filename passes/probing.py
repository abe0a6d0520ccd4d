"""Runs parts of a graph on made inputs: what a subgraph means is asked of the subgraph, not read off its spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..compiler.graph import Array, attribute, is_op
from ..runtime.errors import ModelError
from ..runtime.generation.causal_lm import MASK, POSITIONS, TOKENS
from ..runtime.inference import open_session, run_session, session_options


@dataclasses.dataclass(frozen=True)
class Step:
    """The inputs of one run of a decoder.

    Attributes:
        mask: [batch, past + sequence], 1 for tokens and 0 for padding.
        sequence: number of new tokens.
    """

    mask: Array
    sequence: int

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.mask.shape[0]

    @property
    def past(self) -> int:
        """Number of cached positions."""
        return self.mask.shape[1] - self.sequence

    @property
    def positions(self) -> Array:
        """[batch, sequence]: how many tokens of its row come before each."""
        return np.maximum(self.mask.cumsum(1) - 1, 0)[:, self.past :]


def plain_step(batch: int, sequence: int, past: int) -> Step:
    """A step without padding."""
    return Step(np.ones((batch, past + sequence), np.int64), sequence)


class Prober:
    """Evaluates values of the main graph of a decoder.

    Shapes of graph inputs are computed, not measured, so that a long past costs nothing.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._shapes = [node for node in model.graph if is_op(node, "Shape") and _is_input(node.inputs[0])]

    def run(self, wanted: Sequence[ir.Value], given: Mapping[ir.Value, Array], step: Step) -> list[Array]:
        """The arrays of ``wanted`` where the values ``given`` are replaced by arrays and the inputs follow ``step``.

        Raises:
            ModelError: the part cannot be evaluated; it needs an input that is not one of a decoder's, for one.
        """
        cut = {value: array for value, array in given.items() if value not in wanted}
        for node in self._shapes:
            dims = _dims(node.inputs[0], step)
            if dims is not None and node.outputs[0] not in wanted:
                dims = dims[slice(attribute(node, "start", 0), attribute(node, "end"))]
                cut.setdefault(node.outputs[0], np.array(dims, np.int64))
        inputs = [value for value in self._model.graph.inputs if value not in cut and not value.is_initializer()]
        return evaluate(self._model, wanted, cut, {value: step for value in inputs})


def evaluate(
    model: ir.Model, wanted: Sequence[ir.Value], given: Mapping[ir.Value, Array], steps: Mapping[ir.Value, Step]
) -> list[Array]:
    """Extracts what ``wanted`` needs, down to ``given`` and to graph inputs that follow a step, and runs it.

    Raises:
        ModelError: it needs something else, or ONNX Runtime cannot run it.
    """
    known = [value for value in wanted if value in given]
    if known:
        raise ValueError(f"{known[0].name} is asked for and given")
    try:
        part = ir.convenience.extract(model.graph, inputs=[*given, *steps], outputs=list(wanted))
    except ValueError as error:
        raise ModelError(f"The part cannot be cut out of the graph: {error}", "Please report it.") from error
    part.opset_imports.update(model.opset_imports)
    feeds: dict[str, Array] = {}
    for inner, outer in list(zip(part.inputs, [*given, *steps], strict=True)):
        if not inner.uses():
            part.inputs.remove(inner)
            continue
        inner.shape = None
        array = given[outer] if outer in given else _array(outer, steps[outer])
        feeds[inner.name or ""] = array.astype(outer.dtype.numpy()) if outer.dtype is not None else array
    for value in part.outputs:
        value.shape = None
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.UNDEFINED)
    session = open_session(ir.Model(part, ir_version=10), session_options(optimize=False, repack=False))
    results = run_session(session, feeds)
    return [np.asarray(results[value.name or ""]) for value in wanted]


def _is_input(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and not value.is_initializer()


def _dims(value: ir.Value | None, step: Step) -> list[int] | None:
    """The shape of a decoder's input in ``step``; None where it is no such input."""
    if value is None or value.shape is None:
        return None
    if value.name in (TOKENS, POSITIONS):
        return [step.batch, step.sequence]
    if value.name == MASK:
        return list(step.mask.shape)
    fixed = [dim for dim in value.shape if isinstance(dim, int)]
    if len(value.shape) == 4 and len(fixed) >= 2:
        return [step.batch, fixed[-2], step.past, fixed[-1]]
    return None


def _array(value: ir.Value, step: Step) -> Array:
    if value.name == MASK:
        found = step.mask
    elif value.name == POSITIONS:
        found = step.positions
    else:
        dims = _dims(value, step)
        if dims is None:
            raise ModelError(f"{value.name} is not an input of a decoder as it is known here.", "Please report it.")
        found = np.zeros(dims)
    return found.astype(value.dtype.numpy() if value.dtype is not None else np.float32)
