"""Builds one random graph: values with known element types and symbolic shapes, nodes, constants, bodies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import onnx

Array = np.ndarray[Any, Any]
Shape = tuple[int | str, ...]
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "And", "Or", "Xor", "Where")
FLOATS = ("float32", "float16", "float64")
_MICROSOFT = ("com.microsoft", 1)
_IR_VERSIONS = {11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11}


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph: ``dtype`` is NumPy's name, a dim is a number or a symbol."""

    name: str
    dtype: str
    shape: Shape


class NoSuchValue(Exception):
    """A step found nothing to work on; another step is drawn."""


class Builder:
    """Collects a graph.

    Args:
        random: source of every choice, so that Hypothesis can shrink and a seed can repeat a graph.
        opset: version of the default domain.

    Attributes:
        flags: an input [n, s] that says which tokens are padding; None: attention makes itself one where it wants to.
        as_nodes: share of constants that are Constant nodes.
        shared: share of weights that another node uses already.
    """

    def __init__(self, random: Random, opset: int) -> None:
        self.random = random
        self.opset = opset
        self.width = random.choice([8, 16, 32, 32])
        self.values: list[Value] = []
        self.inputs: list[Value] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.outputs: list[Value] = []
        self.depth = 0
        self.flags: Value | None = None
        self.as_nodes, self.shared = 0.2, 0.12
        self._constants: list[tuple[Value, Array]] = []
        self._number = 0
        self._arrays = np.random.default_rng(random.randrange(2**32))

    def chance(self, probability: float) -> bool:
        """True with ``probability``."""
        return self.random.random() < probability

    def fresh(self, base: str) -> str:
        """A name not used yet."""
        self._number += 1
        return f"{base}_{self._number}"

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        """Random float32 numbers."""
        return (self._arrays.standard_normal(shape) * scale).astype(np.float32)

    def input(self, shape: Shape, dtype: str = "float32", name: str = "") -> Value:
        """A new graph input; inside of a body a value of the outer graph has to do."""
        if self.depth:
            return self.pick(dtype=dtype, shape=shape)
        value = Value(name or self.fresh("x"), dtype, shape)
        self.inputs.append(value)
        self.values.append(value)
        return value

    def constant(self, array: Any, dtype: str = "") -> Value:
        """A constant: an initializer, now and then a Constant node, or one that is already there."""
        array = np.asarray(array, dtype or None)
        for value, other in self._constants:
            if other.shape == array.shape and other.dtype == array.dtype and np.array_equal(other, array):
                if self.chance(0.6):
                    return value
                break
        value = Value(self.fresh("c"), str(array.dtype), array.shape)
        tensor = onnx.numpy_helper.from_array(array, value.name)
        if self.depth or self.chance(self.as_nodes):
            self.nodes.append(onnx.helper.make_node("Constant", [], [value.name], value=tensor))
        else:
            self.initializers.append(tensor)
        if not self.depth:
            self._constants.append((value, array))
        return value

    def weight(self, *shape: int, scale: float | None = None, dtype: str = "float32") -> Value:
        """A random constant, sometimes one that another node uses already."""
        alike = [value for value, _ in self._constants if value.shape == shape and value.dtype == dtype]
        if alike and self.chance(self.shared):
            return self.random.choice(alike)
        scale = 1 / max(1, shape[0]) ** 0.5 if scale is None else scale
        return self.constant(self.normal(*shape, scale=scale), dtype)

    def number(self, value: float, like: Value) -> Value:
        """A constant scalar, in one of the shapes in which exporters write it."""
        shape = self.random.choice([(), (), (1,), (1,) * max(1, len(like.shape))])
        return self.constant(np.full(shape, value), like.dtype)

    def ints(self, *values: int) -> Value:
        """A constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def op(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        shape: Shape | None = None,
        dtype: str = "",
        *,
        domain: str = "",
        more: Sequence[Value] = (),
        **attributes: Any,
    ) -> Value:
        """Adds a node; where not given, its output has the dtype and shape of its first input, or the broadcast one."""
        first = inputs[0] if inputs else None
        if shape is None or not dtype:
            if first is None:
                raise ValueError(op_type)
            shape = _result_shape(op_type, first, inputs) if shape is None else shape
            dtype = dtype or first.dtype
        value = Value(self.fresh(op_type.lower()), dtype, shape)
        names = [item.name if item is not None else "" for item in inputs]
        outputs = [value.name, *(item.name for item in more)]
        name = self.fresh("node")
        self.nodes.append(onnx.helper.make_node(op_type, names, outputs, name=name, domain=domain, **attributes))
        self.values += [value, *more]
        return value

    def node(self, op_type: str, inputs: Sequence[Value | None], outputs: Sequence[Value], **attributes: Any) -> None:
        """Adds a node with several outputs."""
        first, *rest = outputs
        made = self.op(op_type, inputs, first.shape, first.dtype, more=rest, **attributes)
        self.nodes[-1].output[0] = first.name
        self.values[self.values.index(made)] = first

    def pick(
        self,
        dtype: str | Sequence[str] = "float32",
        rank: int | Sequence[int] | None = None,
        shape: Shape | None = None,
        where: Callable[[Value], bool] | None = None,
    ) -> Value:
        """A value of the graph, rather one of the newest.

        Raises:
            NoSuchValue: there is none.
        """
        dtypes = (dtype,) if isinstance(dtype, str) else dtype
        ranks = (rank,) if isinstance(rank, int) else rank
        fitting = [
            value
            for value in self.values
            if value.dtype in dtypes
            and (ranks is None or len(value.shape) in ranks)
            and (shape is None or value.shape == shape)
            and (where is None or where(value))
        ]
        if not fitting:
            raise NoSuchValue
        return self.random.choice(fitting[-4:] if self.chance(0.7) else fitting)

    def stream(self) -> Value:
        """A value [n, s, width], as between the layers of a transformer."""
        shape: Shape = ("n", "s", self.width)
        try:
            return self.pick(shape=shape)
        except NoSuchValue:
            return self.input(shape)

    def rows(self) -> Value:
        """A value [n, features] with known features."""
        try:
            return self.pick(rank=2, where=lambda value: isinstance(value.shape[1], int) and value.shape[1] <= 64)
        except NoSuchValue:
            return self.input(("n", self.width))

    def body(self, fill: Callable[[], list[Value]], inputs: Sequence[Value] = ()) -> onnx.GraphProto:
        """A subgraph whose outputs are what ``fill`` returns; it may read values of the graphs around it."""
        nodes, values = self.nodes, list(self.values)
        self.nodes = []
        self.values = [*values, *inputs]
        self.depth += 1
        try:
            outputs = fill()
            made = {name for node in self.nodes for name in node.output}
            for index, value in enumerate(outputs):
                if value.name not in made:  # a body's output is made in the body
                    outputs[index] = self.op("Identity", [value])
            return onnx.helper.make_graph(
                self.nodes, self.fresh("body"), [type_of(value) for value in inputs], [type_of(v) for v in outputs]
            )
        finally:
            self.depth -= 1
            self.nodes, self.values = nodes, values

    def finish(self, outputs: Sequence[Value]) -> onnx.ModelProto:
        """The model with the given outputs."""
        graph = onnx.helper.make_graph(
            self.nodes,
            "fuzz",
            [type_of(value) for value in self.inputs],
            [type_of(value) for value in outputs],
            self.initializers,
        )
        imports = [onnx.helper.make_opsetid("", self.opset), onnx.helper.make_opsetid(*_MICROSOFT)]
        return onnx.helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSIONS[self.opset])


def broadcast(left: Shape, right: Shape) -> Shape | None:
    """The shape of an elementwise operation, or None where the shapes do not fit."""
    rank = max(len(left), len(right))
    result: list[int | str] = []
    for a, c in zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True):
        if a != c and 1 not in (a, c):
            return None
        result.append(c if a == 1 else a)
    return tuple(result)


def _result_shape(op_type: str, first: Value, inputs: Sequence[Value | None]) -> Shape:
    if op_type not in _BROADCAST:
        return first.shape
    shape = first.shape
    for value in inputs[1:]:
        shape = (broadcast(shape, value.shape) if value is not None else None) or shape
    return shape


def type_of(value: Value) -> onnx.ValueInfoProto:
    """The declaration of ``value``; compound dims such as ``n*s`` are left open."""
    dims = [None if isinstance(dim, str) and not dim.isalpha() else dim for dim in value.shape]
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    return onnx.helper.make_tensor_value_info(value.name, dtype, dims)
