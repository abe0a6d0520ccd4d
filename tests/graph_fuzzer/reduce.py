"""Makes a failing graph small: other outputs, and values computed once that become inputs."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir

from onnxlathe.compiler.graph import remove_dead
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import run_reference
from onnxlathe.passes.simplify.duplicates import remove_unused_initializers
from onnxlathe.runtime.inference import expose

from .generate import Case


def reduce(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The smallest case found for which ``fails`` still holds."""
    shrunk = True
    while shrunk:
        shrunk = False
        for smaller in _smaller(case.proto):
            candidate = _case(case, smaller)
            if candidate is not None and _holds(fails, candidate):
                case, shrunk = candidate, True
                break
    return case


def _holds(fails: Callable[[Case], bool], case: Case) -> bool:
    try:
        return fails(case)
    except Exception:  # a candidate that cannot even be loaded is none
        return False


def _smaller(proto: onnx.ModelProto):
    """Models with fewer nodes: one output only, or one value made an input."""
    names = [value.name for value in ir.from_proto(proto).graph.outputs]
    made = [value.name for node in ir.from_proto(proto).graph for value in node.outputs if value.name]
    if len(names) > 1:
        yield from (_with_outputs(proto, [name]) for name in names)
    yield from (_with_outputs(proto, [name]) for name in made if [name] != names)
    yield from (_cut(proto, name) for name in reversed(made) if name not in names)


def _with_outputs(proto: onnx.ModelProto, names: list[str | None]) -> ir.Model:
    model = ir.from_proto(proto)
    infer_shapes(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[name] for name in names)
    return _trimmed(model)


def _cut(proto: onnx.ModelProto, name: str) -> ir.Model:
    model = ir.from_proto(proto)
    infer_shapes(model)
    value = next(value for node in model.graph for value in node.outputs if value.name == name)
    source = ir.Value(name=f"{name}_in", shape=value.shape, type=value.type)
    model.graph.inputs.append(source)
    value.replace_all_uses_with(source)
    return _trimmed(model)


def _trimmed(model: ir.Model) -> ir.Model:
    remove_dead(model)
    remove_unused_initializers(model)
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)
    return model


def _case(old: Case, model: ir.Model) -> Case | None:
    """``model`` with the feeds it needs; what was cut off is computed by the old model."""
    before = ir.from_proto(old.proto)
    if sum(graph.num_nodes() for graph in model.graphs()) >= sum(graph.num_nodes() for graph in before.graphs()):
        return None
    inputs = [value.name or "" for value in model.graph.inputs]
    cut = [name.removesuffix("_in") for name in inputs if name.endswith("_in")]
    try:
        made = {value.name for node in before.graph for value in node.outputs}
        computed = run_reference(expose(before, [name for name in cut if name in made]), old.feeds)
        feeds = []
        for sample, values in zip(old.feeds, computed, strict=True):
            known = {**sample, **{f"{name}_in": values[name] for name in cut if name in values}}
            feeds.append({name: known[name] for name in inputs if name in known})
        return Case(ir.to_proto(model), feeds, run_reference(model, feeds))
    except Exception:  # not a graph that runs
        return None
