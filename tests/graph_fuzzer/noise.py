"""A graph in which every float value is off by a few units of its last place, to tell rounding from error."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.graph import Names, make_node

_NOISE = {ir.DataType.FLOAT: 2.0**-22, ir.DataType.DOUBLE: 2.0**-22, ir.DataType.FLOAT16: 2.0**-10}


def with_noise(model: ir.Model, seed: int, level: float = 0.0) -> ir.Model:
    """A copy of ``model`` in which each float value, weights included, is multiplied by random numbers close to 1.

    Args:
        model: the graph.
        seed: of the numbers.
        level: how far from 1; 0: a few units of the last place of the value's type.
    """
    noisy = model.clone()
    names = Names(noisy)
    for graph in list(noisy.graphs()):
        values = [value for node in graph for value in node.outputs]
        values += [*graph.inputs, *graph.initializers.values()] if graph is noisy.graph else []
        for value in values:
            place = _NOISE.get(value.dtype) if value.dtype is not None else None
            if place is None or not value.name:
                continue
            _disturb(graph, names, value, level or place, seed := seed + 3)
    return noisy


def _disturb(graph: ir.Graph, names: Names, value: ir.Value, level: float, seed: int) -> None:
    """Lets the readers of ``value`` read ``value * (1 + level * sin(1234.5 value + seed))``."""
    users = [(use.node, use.idx) for use in value.uses()]
    base = names.fresh(f"{value.name}/noise")
    new: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], dtype: ir.DataType = ir.DataType.FLOAT, **attributes: object) -> ir.Value:
        name = f"{base}_{len(new)}"
        new.append(make_node(op, inputs, name=name, output=name, like=value, dtype=dtype, attributes=attributes))
        return new[-1].outputs[0]

    def number(what: float) -> ir.Value:
        return add("Constant", [], value=ir.tensor(np.float32(what)))

    x = add("Clip", [add("Cast", [value], to=1), number(-1e6), number(1e6)])
    wave = add("Sin", [add("Add", [add("Mul", [x, number(1234.5)]), number(seed)])])
    factor = add("Add", [add("Mul", [wave, number(level)]), number(1.0)])
    dtype = value.dtype or ir.DataType.FLOAT
    times = add("Mul", [value, add("Cast", [factor], dtype, to=int(dtype))], dtype)
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, new)
    elif len(graph):
        graph.insert_before(graph[0], new)
    else:
        graph.extend(new)
    for user, index in users:
        user.replace_input_with(index, times)
    if value.is_graph_output() and producer is not None:
        old = value.name
        for index, output in enumerate(list(graph.outputs)):
            if output is value:
                graph.outputs[index] = times
        value.name, times.name = names.fresh(f"{old}_exact"), old
