"""Small changes to a finished graph that turn patterns into near misses. The graph need not stay valid."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import onnx

_COMMUTATIVE = ("Add", "Mul", "Max", "Min", "And", "Or")


def mutate(model: onnx.ModelProto, random: Random, count: int) -> None:
    """Applies ``count`` random changes to the main graph, in place."""
    for _ in range(count):
        random.choice(_MUTATIONS)(model.graph, random)


def _swap_operands(graph: onnx.GraphProto, random: Random) -> None:
    nodes = [node for node in graph.node if node.op_type in _COMMUTATIVE and len(node.input) == 2]
    if nodes:
        node = random.choice(nodes)
        node.input[:] = list(node.input)[::-1]


def _identity_between(graph: onnx.GraphProto, random: Random) -> None:
    index = random.randrange(len(graph.node))
    node = graph.node[index]
    places = [at for at, name in enumerate(node.input) if name]
    if not places:
        return
    at = random.choice(places)
    name = f"{node.input[at]}_again_{len(graph.node)}"
    graph.node.insert(index, onnx.helper.make_node("Identity", [node.input[at]], [name], name=name))
    graph.node[index + 1].input[at] = name


def _other_constant(graph: onnx.GraphProto, random: Random) -> None:
    """Another number, or the same number in another shape."""
    scalars = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) == 1]
    if not scalars:
        return
    tensor = random.choice(scalars)
    array = onnx.numpy_helper.to_array(tensor)
    new = array * np.float32(random.choice([1.01, 0.5, 2.0])) if random.random() < 0.5 else array.reshape(1, 1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))


def _runtime_constant(graph: onnx.GraphProto, random: Random) -> None:
    """An initializer that callers may override."""
    if graph.initializer:
        tensor = random.choice(graph.initializer)
        if tensor.name not in {value.name for value in graph.input}:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def _other_operand(graph: onnx.GraphProto, random: Random) -> None:
    """An operand of one node becomes that of another."""
    nodes = [node for node in graph.node if node.op_type in ("Add", "Mul", "Sub", "Div", "MatMul")]
    if len(nodes) > 1:
        first, second = sorted(random.sample(range(len(nodes)), 2))
        nodes[second].input[random.randrange(2)] = nodes[first].input[random.randrange(2)]


def _drop_last_operand(graph: onnx.GraphProto, random: Random) -> None:
    nodes = [node for node in graph.node if node.op_type in ("Gemm", "Conv", "LayerNormalization", "Clip")]
    if nodes:
        node = random.choice(nodes)
        if len(node.input) == 3:
            del node.input[2]


def _renamed_dim(graph: onnx.GraphProto, random: Random) -> None:
    """An input declares a dim of unknown size."""
    value = random.choice(graph.input)
    dims = [dim for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    if dims:
        random.choice(dims).ClearField("dim_param")


_MUTATIONS: list[Callable[[onnx.GraphProto, Random], None]] = [
    _swap_operands,
    _identity_between,
    _identity_between,
    _other_constant,
    _runtime_constant,
    _other_operand,
    _drop_last_operand,
    _renamed_dim,
]
