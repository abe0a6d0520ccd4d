"""Takes halves of blocks out of a model, with the caches that only they have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from ...compiler.graph import MICROSOFT, PASS_KEY, Names, attribute, is_op, make_node, opset, remove_dead
from ...compiler.kept_caches import KeptCaches
from ...compiler.padding import cache_names
from ...runtime.errors import PassError
from .blocks import Half
from .cut import drop_unused

_NUMBER = re.compile(r"\.(\d+)\.")
_GAMMA = {"SkipLayerNormalization": (2, 3), "SkipSimplifiedLayerNormalization": (2,)}


def bypass(model: ir.Model, halves: Sequence[Half], by: str, adopt: ir.Node | None = None) -> None:
    """Lets the residual stream pass by ``halves``, which follow each other. Caches are left to ``drop_caches``.

    Args:
        model: changed in place.
        halves: consecutive ones of ``residual_stream(model)``.
        by: name of the pass.
        adopt: where the stream is normalized (post-normalization), the node that normalized it before the first of
            them: it takes over the scale and bias of the last one's. None: it stays as it is.
    """
    first, last = halves[0], halves[-1]
    if adopt is not None and last.norm is not None:
        _take_over(adopt, last.norm, by)
    nodes = {node for half in halves for node in half.nodes}
    for value in [value for node in nodes for value in node.outputs]:
        for use in list(value.uses()):
            if is_op(use.node, "Shape") and use.node not in nodes:  # it asks for a size that the stream has too
                use.node.replace_input_with(use.idx, first.skip)
    names = Names(model)
    for half in halves:  # others may read the stream between them
        if half.norm is None and is_op(half.add, *_GAMMA, domain=MICROSOFT) and _is_read(half.add.outputs[0], nodes):
            _unfused(half, first.skip, nodes, opset(model), names, by)
        forward(half.out, first.skip, names, by)
    remove_dead(model)
    for value in list(model.graph.initializers.values()):
        drop_unused(value)


def _is_read(value: ir.Value, gone: set[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in gone for use in value.uses())


def _take_over(target: ir.Node, source: ir.Node, by: str) -> None:
    """Gives a normalization the scale and bias of another one."""
    for old, new in zip(_GAMMA.get(target.op_type, (1, 2)), _GAMMA.get(source.op_type, (1, 2)), strict=False):
        if new < len(source.inputs) and old < len(target.inputs):
            target.replace_input_with(old, source.inputs[new])
    target.metadata_props[PASS_KEY] = by


def _unfused(half: Half, stream: ir.Value, gone: set[ir.Node], version: int, names: Names, by: str) -> None:
    """Skip*Normalization whose sum goes on: what reads the normalized stream reads the stream before, normalized.

    By the fused node that makes that stream, if nothing that stays reads what it normalizes; else by a node of its own.
    """
    node, normalized = half.add, half.add.outputs[0]
    before = stream.producer()
    fused = before if is_op(before, node.op_type, domain=MICROSOFT) else None
    free = fused is not None and all(use.node in gone for use in fused.outputs[0].uses())
    if fused is not None and free and not fused.outputs[0].is_graph_output() and fused.outputs[0] is not stream:
        _take_over(fused, node, by)
        forward(normalized, fused.outputs[0], names, by)
        return
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    op = "LayerNormalization"
    if simplified:
        op = "RMSNormalization" if version >= 23 else "SimplifiedLayerNormalization"
    inputs = [stream, *(node.inputs[index] for index in _GAMMA[node.op_type])]
    attributes = {"axis": -1, "epsilon": attribute(node, "epsilon", 1e-5)}
    name = names.fresh(f"{node.name}/norm")
    new = make_node(op, inputs, name=name, output=f"{name}_out", like=normalized, attributes=attributes)
    new.metadata_props[PASS_KEY] = by
    graph = node.graph
    if graph is not None:
        graph.insert_before(node, new)
    forward(normalized, new.outputs[0], names, by)


def forward(old: ir.Value, new: ir.Value, names: Names, by: str) -> None:
    """Everybody who reads ``old`` reads ``new``; an output of the model keeps its name."""
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    node, graph = old.producer(), old.graph
    if node is None or not isinstance(graph, ir.Graph):
        raise ValueError(f"{old.name} is made by nothing")
    name = names.fresh(f"{node.name}/passed")
    same = make_node("Identity", [new], name=name, output=f"{name}_out", like=old)
    same.metadata_props[PASS_KEY] = by
    graph.insert_after(node, same)
    graph.outputs[list(graph.outputs).index(old)] = same.outputs[0]
    old.replace_all_uses_with(new)
    text, old.name = old.name, names.fresh(f"{old.name}_before")
    same.outputs[0].name = text


def drop_caches(model: ir.Model, halves: Iterable[Half]) -> None:
    """Takes the caches of halves that were passed by out of inputs and outputs, and numbers the others anew.

    Raises:
        PassError: something else reads such a cache.
    """
    pairs = cache_names(model)
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    nodes = {node for half in halves for node in half.nodes}
    gone = {past for past, present in pairs.items() if outputs[present].producer() in nodes}
    if not gone:
        return
    for past in gone:
        model.graph.outputs.remove(outputs[pairs[past]])
    remove_dead(model)
    for past in gone:
        _redirect(inputs[past], [inputs[name] for name in pairs if name not in gone])
    remove_dead(model)
    for past in gone:
        if inputs[past].uses():
            node = next(iter(inputs[past].uses())).node
            raise PassError(
                f"The cache {past} goes with its layer, but {node.op_type} {node.name} reads it too.",
                "Run simplify-shapes first, or keep that layer.",
            )
        model.graph.inputs.remove(inputs[past])
    _renumber(model, {past: present for past, present in pairs.items() if past not in gone})


def _redirect(past: ir.Value, others: Sequence[ir.Value]) -> None:
    """What asks for the length of a cache asks another one of the same length."""
    for use in list(past.uses()):
        same = next((value for value in others if value.shape == past.shape and value.dtype == past.dtype), None)
        if is_op(use.node, "Shape") and same is not None:
            use.node.replace_input_with(use.idx, same)


def _renumber(model: ir.Model, pairs: dict[str, str]) -> None:
    values = {value.name or "": value for value in [*model.graph.inputs, *model.graph.outputs]}
    numbers = sorted({int(match[1]) for name in pairs if (match := _NUMBER.search(name))})
    sources: dict[str, str] = {}
    for past, present in sorted(pairs.items(), key=lambda pair: int((_NUMBER.search(pair[0]) or ["", "0"])[1])):
        match = _NUMBER.search(past)
        if match is None:
            continue
        for name in (past, present):
            new = _NUMBER.sub(f".{numbers.index(int(match[1]))}.", name, count=1)
            values[name].name = new
            sources[new] = name
    KeptCaches(sources, {}).write(model)
