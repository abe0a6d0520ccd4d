"""Graphs of any size, deterministic by seed: the mix of useful and useless nodes that exporters leave."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

WIDTH = 16


def synthetic(nodes: int, seed: int = 0) -> ir.Model:
    """A graph of about ``nodes`` nodes: MatMul + Add + Tanh chains with identities, duplicates, cancelling transposes,
    constants to fold and dead ends between.

    Args:
        nodes: nodes wanted.
        seed: seed of the weights and of the mix.
    """
    rng = np.random.default_rng(seed)
    x = ir.Value(name="x", shape=ir.Shape(["n", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [_weight(f"w{i}", rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5) for i in range(8)]
    biases = [_weight(f"b{i}", rng.standard_normal(WIDTH) * 0.1) for i in range(8)]
    made: list[ir.Node] = []

    def node(op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        value = ir.Value(name=f"v{len(made)}", shape=ir.Shape(["n", WIDTH]), type=x.type)
        made.append(ir.node(op, inputs, attributes=attributes, outputs=[value], name=f"n{len(made)}"))  # type: ignore[arg-type]
        return value

    current = x
    while len(made) < nodes - 1:
        weight, bias = weights[rng.integers(8)], biases[rng.integers(8)]
        current = node("Add", node("MatMul", current, weight), bias)
        choice = rng.integers(6)
        if choice == 0:
            current = node("Identity", current)
        elif choice == 1:  # the same twice
            current = node("Add", node("Tanh", current), node("Tanh", current))
        elif choice == 2:
            current = node("Transpose", node("Transpose", current, perm=[1, 0]), perm=[1, 0])
        elif choice == 3:  # constants only
            folded = node("Neg", node("Add", bias, biases[rng.integers(8)]))
            folded.shape = folded.producer().inputs[0].shape = ir.Shape([WIDTH])  # type: ignore[union-attr]
            current = node("Add", current, folded)
        elif choice == 4:  # a dead end
            node("Exp", node("Neg", current))
        current = node("Tanh", current)
    y = ir.Value(name="y", shape=ir.Shape(["n", WIDTH]), type=x.type)
    made.append(ir.node("Relu", [current], outputs=[y], name="last"))
    graph = ir.Graph([x], [y], nodes=made, initializers=[*weights, *biases], opset_imports={"": 20}, name="synthetic")
    return ir.Model(graph, ir_version=10)


def _weight(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array.astype(np.float32), name=name)
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
