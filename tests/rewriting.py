"""What every test of a pass asserts: same meaning, expected graph, idempotent, also inside a subgraph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.base import Outcome, Pass, PassContext
from onnxlathe.compiler.graph import count_ops
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.verify import Signature, check_model, check_structure, compare, run_reference
from onnxlathe.runtime.artifact import load, save
from onnxlathe.runtime.feeds import make_feeds


def from_text(text: str, **initializers: Any) -> ir.Model:
    """A model from ONNX text (``<ir_version: 10, opset_import: ["" : 20]> graph (float[n, 8] x) => (...) {...}``).

    ``initializers`` are registered by name and need not be declared in the text beyond their use as inputs:
    list them as graph inputs there, they are turned into initializers here.
    """
    model = ir.from_onnx_text(text)
    for name, array in initializers.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(np.asarray(array), name=name)
        model.graph.register_initializer(value)
    return load_model(model)


def rewrite(
    step: Pass,
    model: ir.Model,
    *,
    feeds: list[dict[str, np.ndarray]] | None = None,
    context: PassContext | None = None,
    tolerance: float | None = None,
    nested: bool = True,
) -> tuple[ir.Model, Outcome]:
    """Runs ``step`` on a clone and asserts what holds for every pass; returns the new model and the outcome.

    Asserted: valid structure, ``onnx.checker``, signature kept, outputs equal within the tolerance with ORT's
    optimizations off on both sides, truthful ``changed``, a second run changes nothing, and the same rules fire the
    same number of times when the whole graph lies in a branch of an If.
    """
    context = context or PassContext()
    before = load_model(model)
    infer_shapes(before)
    after = before.clone()
    outcome = step(after, context)
    check_structure(after)
    check_model(after)
    Signature.of(before).check_kept(Signature.of(after))
    assert outcome.changed == (ir.to_proto(before) != ir.to_proto(after)), "`changed` is not truthful"
    samples = feeds if feeds is not None else make_feeds(before, seed=1)
    error, output = compare(run_reference(before, samples), run_reference(after, samples))
    allowed = step.tolerance if tolerance is None else tolerance
    assert error <= allowed, f"{output} differs by {error:.2e}"
    again = after.clone()
    second = step(again, context)
    assert not second.changed, f"a second run changed the graph again: {dict(second.counts)}"
    if nested:
        inner = inside_if(before)
        deep = step(inner.clone(), context)
        assert Counter(deep.counts) == Counter(outcome.counts), "other counts inside a subgraph"
        deep_model = inner.clone()
        step(deep_model, context)
        check_structure(deep_model)
        deep_samples = [{**sample, "take": np.array([True])} for sample in samples]
        error, output = compare(run_reference(inner, deep_samples), run_reference(deep_model, deep_samples))
        assert error <= allowed, f"{output} differs by {error:.2e} inside a subgraph"
    return after, outcome


def refused(step: Pass, model: ir.Model, reason: str = "", **options: Any) -> Outcome:
    """Asserts that ``step`` changes nothing in ``model`` and, if given, that a refusal's reason holds ``reason``."""
    _, outcome = rewrite(step, model, **options)
    assert not outcome.changed, f"rewritten, but must not be: {dict(outcome.counts)}"
    if reason:
        reasons = [refusal.reason for refusal in outcome.refusals]
        assert any(reason in text for text in reasons), f"no refusal says {reason!r}: {reasons}"
    return outcome


def ops(model: ir.Model) -> dict[str, int]:
    """Nodes by operator."""
    return dict(count_ops(model))


def inside_if(model: ir.Model) -> ir.Model:
    """``model`` with its nodes and initializers in the then-branch of an If; the else-branch is a filler."""
    outer = model.clone()
    graph = outer.graph
    branch_outputs = list(graph.outputs)
    initializers = list(graph.initializers.values())
    nodes = list(graph)
    names = [value.name or "" for value in branch_outputs]
    graph.outputs.clear()
    graph.initializers.clear()
    graph.remove(nodes)
    then = ir.Graph([], branch_outputs, nodes=nodes, initializers=initializers, name="then")
    take = ir.Value(name="take", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    graph.inputs.append(take)
    fillers, filled = _fillers(branch_outputs, take)
    otherwise = ir.Graph([], filled, nodes=fillers, name="else")
    results = [ir.Value(name=f"{name}_if", type=value.type) for name, value in zip(names, branch_outputs, strict=True)]
    choose = ir.node(
        "If", [take], attributes={"then_branch": then, "else_branch": otherwise}, outputs=results, name="choose"
    )
    graph.append(choose)
    graph.outputs.extend(results)
    return outer


def with_external_data(model: ir.Model, folder: Path) -> ir.Model:
    """``model`` saved with its weights in an external file, and loaded back (weights memory-mapped)."""
    path = folder / "external.onnx"
    save(model, path, external_data=True)
    return load(path)


def _fillers(values: list[ir.Value], take: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that make something of the right types from ``take``, and that no pass can simplify."""
    sources: dict[ir.DataType, ir.Value] = {}
    nodes: list[ir.Node] = []
    results: list[ir.Value] = []
    for number, value in enumerate(values):
        dtype = value.dtype or ir.DataType.FLOAT
        if dtype not in sources:
            sources[dtype] = ir.Value(name=f"source_{number}", type=ir.TensorType(dtype))
            cast = {} if dtype == ir.DataType.BOOL else {"to": int(dtype)}
            op = "Cast" if cast else "Not"
            nodes.append(ir.node(op, [take], attributes=cast, outputs=[sources[dtype]], name=f"source_{number}"))
        results.append(ir.Value(name=f"{value.name}_filler", type=ir.TensorType(dtype)))
        parts = [sources[dtype]] * (number + 2)
        name = f"{value.name}_filler"
        nodes.append(ir.node("Concat", parts, attributes={"axis": 0}, outputs=[results[-1]], name=name))
    return nodes, results
