"""The weights that low-bit passes quantize: constant matrices of MatMul and Gemm, and tables that Gather reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome
from ...compiler.graph import (
    Array,
    all_nodes,
    attribute,
    constant,
    dims,
    integers,
    is_op,
    only_consumer,
    producer,
    rank,
    unmap,
)

_RULE = "constant weight -> low bits"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A product with a constant weight, ``y = x W^T (+ bias)``.

    Attributes:
        node: the MatMul or Gemm.
        x: what is multiplied, [..., K].
        bias: the Gemm's third input, None without.
    """

    node: ir.Node
    x: ir.Value
    bias: ir.Value | None


@dataclasses.dataclass(eq=False)
class Weight:
    """One constant matrix W [N, K] and everything that reads it.

    Attributes:
        value: the initializer.
        outputs, inputs: N and K.
        by_outputs: whether the initializer is stored [N, K]; else [K, N].
        linears: the products that use it.
        gathers: the Gather nodes that read rows of it (a table, stored [N, K]).
    """

    value: ir.Value
    outputs: int
    inputs: int
    by_outputs: bool
    linears: list[Linear] = dataclasses.field(default_factory=lambda: list[Linear]())
    gathers: list[ir.Node] = dataclasses.field(default_factory=lambda: list[ir.Node]())

    @property
    def name(self) -> str:
        """The initializer's name."""
        return self.value.name or ""

    @property
    def is_head(self) -> bool:
        """Whether a product with it is a graph output, directly or with a bias added: the logits of a model."""
        return any(_is_output(linear.node.outputs[0]) for linear in self.linears)

    @property
    def others(self) -> list[ir.Node]:
        """Readers that would keep the float weight alive."""
        known = {linear.node for linear in self.linears} | set(self.gathers)
        found: list[ir.Node] = []
        for use in self.value.uses():
            readers = (
                [inner.node for inner in use.node.outputs[0].uses()] if is_op(use.node, "Transpose") else [use.node]
            )
            found += [node for node in readers if node not in known]
        return found

    def matrix(self) -> Array:
        """W, float32 [N, K]."""
        array, tensor = constant(self.value), self.value.const_value
        if array is None:
            raise ValueError(f"{self.name} has no data")
        matrix = np.ascontiguousarray(array if self.by_outputs else array.T, np.float32)
        del array
        unmap(tensor)
        return matrix

    def stored(self, matrix: Array) -> ir.TensorProtocol:
        """``matrix`` [N, K] as a tensor laid out and typed as the initializer is."""
        array = matrix if self.by_outputs else matrix.T
        dtype = self.value.dtype or ir.DataType.FLOAT
        return ir.Tensor(np.ascontiguousarray(array, dtype.numpy()), name=self.name)


def find_weights(model: ir.Model, outcome: Outcome) -> list[Weight]:
    """All constant weights, in the order in which the graph uses them; near misses are refused by name.

    A matrix that some products use as it is and others transposed stays as it is: two codes of it would be needed.
    """
    found: dict[ir.Value, Weight] = {}
    both: dict[ir.Value, None] = {}  # a set in order
    for node in all_nodes(model):
        if is_op(node, "MatMul", "Gemm"):
            _linear(node, found, both, outcome)
        elif is_op(node, "Gather"):
            _table(node, found)
    for value in both:
        for linear in found.pop(value).linears:
            outcome.refuse(linear.node, _RULE, f"the weight {value.name} is also used transposed")
    return list(found.values())


def _linear(node: ir.Node, found: dict[ir.Value, Weight], both: dict[ir.Value, None], outcome: Outcome) -> None:
    x, right = node.inputs[0], node.inputs[1]
    if x is None or right is None or rank(right) != 2:
        return  # a product of two activations: nothing to report
    reason = _unfit(node, x)
    transpose = producer(right, "Transpose")
    value = (
        transpose.inputs[0] if transpose is not None and list(attribute(transpose, "perm", (1, 0))) == [1, 0] else right
    )
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        reason = f"the weight {right.name} is not a constant"
    elif value.dtype not in _FLOATS:
        return  # integers, or quantized already
    if reason or value is None:
        outcome.refuse(node, _RULE, reason)
        return
    by_outputs = (value is not right) != bool(attribute(node, "transB", 0))
    shape = [int(dim) for dim in dims(value) or () if isinstance(dim, int)]
    outputs, inputs = shape if by_outputs else shape[::-1]
    weight = found.setdefault(value, Weight(value, outputs, inputs, by_outputs))
    if weight.by_outputs != by_outputs:
        both[value] = None
    bias = node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None
    weight.linears.append(Linear(node, x, bias))


def _unfit(node: ir.Node, x: ir.Value) -> str:
    """Why MatMulNBits cannot do what ``node`` does; empty if it can."""
    size = rank(x)
    if size is None or size < 2:
        return f"the rank of {x.name} is unknown" if size is None else f"{x.name} is a vector"
    if is_op(node, "MatMul"):
        return ""
    if attribute(node, "transA", 0):
        return "the Gemm transposes its input"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if attribute(node, "alpha", 1.0) != 1.0 or (bias is not None and attribute(node, "beta", 1.0) != 1.0):
        return "the Gemm scales its product: run fuse-linear first"
    if bias is not None and (rank(bias) != 1 or dims(bias) != (dims(node.outputs[0]) or [None])[-1:]):
        return "the Gemm's bias is not one number per output"
    return ""


def _table(node: ir.Node, found: dict[ir.Value, Weight]) -> None:
    """A Gather of rows, from the initializer or, as genai's builder ties it to the head, from its Transpose."""
    table = node.inputs[0]
    transpose = producer(table, "Transpose")
    value = transpose.inputs[0] if transpose is not None else table
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return
    shape = dims(value)
    if value.dtype not in _FLOATS or shape is None or len(shape) != 2 or attribute(node, "axis", 0) != 0:
        return
    if producer(node.inputs[1], "Constant") is not None or integers(node.inputs[1]) is not None:
        return  # a constant row, which constant folding takes
    by_outputs = transpose is None
    rows, width = (int(dim) for dim in (shape if by_outputs else shape[::-1]) if isinstance(dim, int))
    weight = found.setdefault(value, Weight(value, rows, width, by_outputs))
    if weight.by_outputs == by_outputs:
        weight.gathers.append(node)


def _is_output(value: ir.Value) -> bool:
    if value.is_graph_output():
        return True
    reader = only_consumer(value)
    return is_op(reader, "Add", "Cast") and reader is not None and reader.outputs[0].is_graph_output()


def groups_by_input(weights: list[Weight], graph: ir.Graph) -> Iterator[tuple[ir.Value, list[Weight]]]:
    """The weights whose products have one input in ``graph`` each, together with those of the same input.

    Products in the bodies of If and Loop, and weights used with several inputs, are in no group.
    """
    groups: dict[ir.Value, list[Weight]] = {}
    for weight in weights:
        inputs = {linear.x for linear in weight.linears}
        if len(inputs) == 1 and all(linear.node.graph is graph for linear in weight.linears):
            groups.setdefault(inputs.pop(), []).append(weight)
    yield from groups.items()
