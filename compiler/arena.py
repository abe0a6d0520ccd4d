"""Runs a small model inside ONE buffer by its memory plan, to prove the plan: what is not alive is NaN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir

from ..runtime.errors import PlanError
from .graph import subgraphs
from .memory_plan import MemoryPlan, PlannedBuffer

Array = np.ndarray[Any, Any]
_POISON = 0xFF  # NaN as float of any width, -1 as a signed integer


def run_in_arena(model: ir.Model, plan: MemoryPlan, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Runs ``model`` node by node in the plan's order with ``onnx.reference``; every result is copied into the arena.

    A buffer that is no longer needed is filled with NaN, so that a plan that frees too early gives NaN.

    Args:
        model: a small model with the standard operators; large ones take long.
        plan: the plan of its main graph for the shapes of ``feeds``.
        feeds: ``{input name: array}``.

    Returns:
        ``{output name: array}``, read from the arena at the end.

    Raises:
        PlanError: a value does not fit its buffer.
    """
    arena = np.full(plan.peak, _POISON, np.uint8)
    place = {name: buffer for buffer in plan.buffers for name in buffer.names}
    nodes = {node.name: node for node in model.graph}
    values: dict[str, Array] = {**_initializers(model), **feeds}
    for step, name in enumerate(plan.order):
        node = nodes[name]
        for value, result in zip(node.outputs, _run_node(model, node, values), strict=False):
            if value.name:
                buffer = place.get(value.name)
                values[value.name] = result if buffer is None else _store(arena, buffer, value.name, result)
        for buffer in plan.buffers:
            if buffer.end == step + 1 and buffer.end < len(plan.order):
                arena[buffer.offset : buffer.offset + buffer.size] = _POISON
    return {value.name or "": np.array(values[value.name or ""]) for value in model.graph.outputs}


def _initializers(model: ir.Model) -> dict[str, Array]:
    tensors = {value.name: value.const_value for graph in model.graphs() for value in graph.initializers.values()}
    return {name or "": tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def _store(arena: Array, buffer: PlannedBuffer, name: str, result: Array) -> Array:
    """Copies ``result`` into its place and returns it as a view of the arena."""
    array = np.ascontiguousarray(result)
    if array.nbytes > buffer.size:
        raise PlanError(f"{name!r} has {array.nbytes} bytes, its buffer {buffer.size}.", "Plan with these sizes.")
    content = array.copy()  # a view of an input that lies there already must not be overwritten while it is read
    arena[buffer.offset : buffer.offset + array.nbytes] = content.reshape(-1).view(np.uint8)
    return arena[buffer.offset : buffer.offset + array.nbytes].view(array.dtype).reshape(array.shape)


def _run_node(model: ir.Model, node: ir.Node, values: Mapping[str, Array]) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    names = list(dict.fromkeys([value.name or "" for value in node.inputs if value is not None] + _captured(node)))
    inputs = [oh.make_tensor_value_info(name, oh.np_dtype_to_tensor_dtype(values[name].dtype), None) for name in names]
    outputs = [onnx.ValueInfoProto(name=value.name) for value in node.outputs if value.name]
    graph = oh.make_graph([ir.to_proto(node)], "one", inputs, outputs)
    imports = [oh.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    single = oh.make_model(graph, opset_imports=imports, ir_version=model.ir_version)
    results: list[Any] = ReferenceEvaluator(single).run(None, {name: values[name] for name in names})  # type: ignore[assignment]
    found = iter(results)
    return [np.asarray(next(found)) if value.name else np.zeros(0) for value in node.outputs]


def _captured(node: ir.Node) -> list[str]:
    """Names that the bodies of ``node`` read from outside."""
    names: list[str] = []
    for body in subgraphs(node):
        own = {value.name for value in (*body.inputs, *body.initializers.values())}
        for item in body:
            read = [value.name or "" for value in item.inputs if value is not None] + _captured(item)
            names += [name for name in read if name not in own]
            own |= {value.name for value in item.outputs}
        names += [value.name or "" for value in body.outputs if value.name not in own]
    return names
