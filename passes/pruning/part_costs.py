"""What the parts of a model take in time or bytes, at each of their options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds, PassContext
from ...compiler.graph import Array, constant, give_types, weight_bytes
from ...compiler.kept_caches import KeptCaches
from ...compiler.padding import cache_names
from ...runtime.benchmark import interleaved
from ...runtime.inference import expose, open_session, run_session, session_options
from ..low_bit.streams import PATIENT, reads
from .choices import Module, shrunk
from .units import Dimension

_SECONDS = 0.25


def part_times(
    model: ir.Model, modules: Sequence[Module], sample: Feeds, context: PassContext, by: str
) -> tuple[list[Array], float]:
    """Seconds of each module's part of the model at each option, and of the whole model, in ORT as it will run.

    A part is the branch of the residual stream that the module is in, or else the nodes between the layers that make
    and those that sum over its units. Parts that look the same are timed once.
    """
    caches = {name for pair in cache_names(model).items() for name in pair}
    seconds: list[Array] = []
    known: dict[str, Array] = {}
    for number, module in enumerate(modules):
        context.progress(f"times of {number + 1}/{len(modules)}: {module.name}")
        part, feeds = _part(model, module, sample, context)
        key = _signature(part, module, feeds)
        if key not in known:
            silent = {module.name: module.half} if module.half is not None else {}
            variants = [
                shrunk(part, {module.name: count}, silent if count == len(module.dimension.units) else {}, by, caches)
                for count in module.counts
            ]
            known[key] = np.minimum.accumulate(_seconds(variants, feeds, context))  # less takes no longer: noise
        seconds.append(known[key])
    whole = _seconds([model], sample, context)[0]
    return seconds, float(whole)


def part_bytes(model: ir.Model, modules: Sequence[Module], by: str) -> tuple[list[Array], float]:
    """Bytes of weights of each module at each option, and of the whole model: what an option takes away is exact."""
    whole = weight_bytes(model)
    sizes: list[Array] = []
    for module in modules:
        units = len(module.dimension.units)
        one = whole - weight_bytes(shrunk(model, {module.name: 1}, {}, by))
        sizes.append(np.array([(units - count) * one for count in module.counts], np.float64))
    return sizes, float(whole)


def _part(model: ir.Model, module: Module, sample: Feeds, context: PassContext) -> tuple[ir.Model, Feeds]:
    """The nodes around a dimension as a model of their own, with inputs as they are in ``sample``."""
    copy = model.clone()
    nodes = {node.name: node for node in copy.graph}
    if module.half is not None:
        inside = {nodes[node.name] for node in (*module.half.nodes, module.half.add)}
        inside |= {nodes[module.half.norm.name]} if module.half.norm is not None else set()
    else:
        inside = _between_layers(nodes, module.dimension)
    wanted = [
        value
        for node in copy.graph
        if node in inside
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]
    outside = dict.fromkeys(
        value
        for node in copy.graph
        if node in inside
        for value in reads(node)
        if value.producer() not in inside and constant(value, limit=0) is None and not value.is_initializer()
    )
    names = [value.name or "" for value in outside]
    given = {name: sample[name] for name in names if name in sample}
    made = [name for name in names if name not in given]
    if made:
        session = open_session(expose(model, made), session_options(threads=context.threads, ort_config=PATIENT))
        given |= run_session(session, sample, made)
    graph = ir.convenience.extract(copy.graph, list(outside), wanted)
    part = ir.Model(graph, ir_version=model.ir_version)
    part.graph.opset_imports.update(model.opset_imports)
    give_types(part.graph.inputs, given)
    used = {value.name for value in part.graph.inputs if not value.is_initializer()}
    return part, {name: array for name, array in given.items() if name in used}


def _between_layers(nodes: Mapping[str | None, ir.Node], item: Dimension) -> set[ir.Node]:
    """The layers that make the units, those that sum over them, and all nodes on the ways between."""
    makers = [nodes[node.name] for node in item.makers]
    ends = [nodes[consumer.layer.node.name] for consumer in item.consumers]
    after, before = set(makers), set(ends)
    pending = list(makers)
    while pending:
        following = [use.node for value in pending.pop().outputs for use in value.uses()]
        pending += [node for node in following if node not in after]
        after.update(following)
    pending = list(ends)
    while pending:
        previous = [p for value in reads(pending.pop()) if (p := value.producer()) is not None]
        pending += [node for node in previous if node not in before]
        before.update(previous)
    return (after & before) | set(makers) | set(ends)


def _signature(part: ir.Model, module: Module, feeds: Feeds) -> str:
    ops = [f"{node.op_type}{[str(value.shape) for value in node.inputs if value is not None]}" for node in part.graph]
    shapes = sorted(str(array.shape) for array in feeds.values())
    return f"{ops}{shapes}{module.counts}"


def _seconds(models: Sequence[ir.Model], feeds: Feeds, context: PassContext) -> Array:
    """Seconds of a run of each, in turns."""
    runs: list[Callable[[], object]] = []
    for item in models:
        kept = KeptCaches.take(item)
        arrays = kept.of(feeds, item) if kept is not None else feeds
        session = open_session(item, session_options(threads=context.threads), context.device)
        runs.append(functools.partial(session.run, None, {i.name: arrays[i.name] for i in session.get_inputs()}))
    timings = interleaved(runs, budget=_SECONDS * len(runs))
    return np.array([min(timing.rounds) for timing in timings])
