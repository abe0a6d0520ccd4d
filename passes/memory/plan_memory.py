"""Orders the nodes so that the least memory is needed, and plans where in one arena every result lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from ...compiler.base import Feeds, Gate, Outcome, Pass, PassContext
from ...compiler.graph import subgraphs
from ...compiler.memory_plan import PLAN_KEY, MemoryPlan, pack_plans, read_plans
from ...compiler.memory_verify import verify_plan
from ...runtime.errors import LatheError, PlanError
from ...runtime.feeds import make_feeds
from ...runtime.memory_stats import can_measure, measure_memory
from .lifetimes import Flow, Sizes, buffers_in_order, flow_of
from .offset_search import Progress
from .offsets import plan_offsets
from .order_bounds import order_bound
from .order_search import best_order

Bindings = Mapping[str, int]
_NOISE = 0.02  # of the memory measured before
_PRIORITY: dict[str, Any] = {"execution_order": "priority"}
# Every buffer is freed after its last reader. By default a dead one waits for a later value of its shape, and one block
# for everything is laid out as the first run went: both hold more than is alive.
_FREED: dict[str, Any] = {"memory_pattern": False, "memory_reuse": False}
_NO_LAYOUT: dict[str, Any] = {
    "config_entries": {"optimization.disable_specified_optimizers": "NchwcTransformer"},
}


@dataclasses.dataclass(frozen=True)
class PlanMemory(Pass):
    """Orders nodes for the least memory, and plans offsets in one arena.

    1. The order of the nodes of each graph becomes the best that ``order_search`` finds; never one that needs more.
       ONNX Runtime is asked to keep it (``execution_order``). With ``measure``, what it needs is measured for the
       planned order and the given one, each as a file it runs in order and as one it orders itself (its fusions and its
       blocked layout make new nodes, which stand elsewhere), with every buffer freed once nobody needs it
       (``memory_pattern`` and ``memory_reuse`` off); the least is taken. Where nothing is measured to be lower, order
       and options stay as they were, and the notes say so.
    2. A ``MemoryPlan`` of each graph (bodies of If and Loop are arenas of their own) and each set of sizes goes into
       the model's metadata (``onnxlathe.memory_plan``); ``onnxlathe inspect --memory`` shows it, ``c_header`` exports
       it. ORT cannot load offsets: it plans its own; they are for runtimes with a static arena.

    Args:
        bindings: sizes of the symbolic dims, one set or several; the order is searched for the first. None given: those
            of the first sample.
        peak_bytes: the arena there is; a plan that needs more is an error that says why.
        measure: run the model in ONNX Runtime to see what it really needs (Linux, a few seconds).
        layout: False also tries without ORT's blocked convolution layout, which reorders nodes but is faster.
        time_limit: seconds for each search of offsets.

    Pays on the CPU provider in graphs with branches. Sources: ``order_search``, ``offset_search``.
    """

    name: ClassVar[str] = "plan-memory"
    tolerance: ClassVar[float] = 0.0
    gate: ClassVar[Gate] = "off"

    bindings: Bindings | Sequence[Bindings] = ()
    peak_bytes: int | None = None
    measure: bool = True
    layout: bool = True
    time_limit: float = 10.0

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        sets = self._sets(model, context)
        orders = [self._order(model, graph, sets, context.progress) for _, graph in named_graphs(model)]
        moved = {id(graph): order for (_, graph), order in zip(named_graphs(model), orders, strict=True) if order}
        if self.measure and can_measure() and context.device == "cpu":
            moved = self._measured(model, moved, sets[0], context, outcome)
        elif moved:
            outcome.ort_config = dict(_PRIORITY)
            outcome.notes.append("the memory was not measured: the order is the one with the lower bound")
        for _, graph in named_graphs(model):
            if id(graph) in moved:
                reorder(graph, moved[id(graph)])
                outcome.counts["graphs reordered"] += 1
        self._store(model, sets, context.progress, outcome)
        return outcome

    def _sets(self, model: ir.Model, context: PassContext) -> list[Bindings]:
        if isinstance(self.bindings, Mapping):
            return [self.bindings]
        return list(self.bindings) or [_sizes_of(model, next(iter(context.feeds), {}))]

    def _order(self, model: ir.Model, graph: ir.Graph, sets: list[Bindings], progress: Progress) -> list[int] | None:
        """A better order for all sets of sizes, or None."""
        flows = [flow_of(graph, Sizes(model, bindings)) for bindings in sets]
        given = list(range(len(flows[0].before)))
        order = best_order(flows[0], progress)
        better = [order_bound(flow, order) - order_bound(flow, given) for flow in flows]
        return order if min(better) < 0 and max(better) <= 0 else None

    def _measured(
        self, model: ir.Model, moved: dict[int, list[int]], sizes: Bindings, context: PassContext, outcome: Outcome
    ) -> dict[int, list[int]]:
        """What of ``moved`` is kept after asking ONNX Runtime; sets ``outcome.ort_config``."""
        feeds = _sample(model, sizes, context.feeds)
        planned = model.clone() if moved else None
        if planned is not None:
            for (_, graph), (_, twin) in zip(named_graphs(model), named_graphs(planned), strict=True):
                if id(graph) in moved:
                    reorder(twin, moved[id(graph)])
        tries: list[tuple[str, ir.Model, dict[str, Any]]] = [("as it was", model, {})]
        for order, graph in (("given order", model), ("planned order", planned)):
            if graph is None:
                continue
            layouts = [("", _FREED)] if self.layout else [("", _FREED), (", plain layout", {**_FREED, **_NO_LAYOUT})]
            for layout, config in layouts:
                tries.append((f"{order} run ORT's way{layout}", graph, config))
                tries.append((f"{order}{layout}", graph, {**config, **_PRIORITY}))
        results: dict[str, int] = {}
        for name, graph, config in tries:
            context.progress(f"measuring memory: {name}")
            results[name] = measure_memory(graph, feeds, config).peak
        before = results["as it was"]
        # Within the noise the first of them: the least is changed.
        best, graph, config = min(tries, key=lambda item: round(results[item[0]] / max(before, 1) / _NOISE))
        measured = ", ".join(f"{name} {peak / max(before, 1):.2f} x" for name, peak in results.items())
        outcome.notes.append(f"measured peak of activations in ONNX Runtime: {measured}")
        if results[best] >= before * (1 - _NOISE):
            outcome.notes.append("nothing lowers the measured peak: order and session options stay as they were")
            return {}
        outcome.notes.append(f"taken: {best}")
        outcome.ort_config = dict(config)
        return moved if graph is planned else {}

    def _store(self, model: ir.Model, sets: list[Bindings], progress: Progress, outcome: Outcome) -> None:
        plans = plan_model(model, sets, self.time_limit, progress)
        stored = {(plan.graph, tuple(plan.bindings.items())): plan for plan in read_plans(model.metadata_props)}
        for number, plan in enumerate(plans):
            old = stored.get((plan.graph, tuple(plan.bindings.items())))
            if old is not None and old.order == plan.order and old.peak <= plan.peak:
                plans[number] = plan = old
            where = f"{plan.graph}: " if plan.graph else ""
            outcome.notes.append(f"{where}arena {plan.peak} bytes, at least {plan.bound} ({plan.method})")
            if self.peak_bytes is not None and plan.peak > self.peak_bytes:
                raise PlanError(*_over_budget(plan, self.peak_bytes))
        text = pack_plans(plans)
        if model.metadata_props.get(PLAN_KEY) != text:
            model.metadata_props[PLAN_KEY] = text
            outcome.counts["plans"] += len(plans)


def plan_model(
    model: ir.Model, sets: Sequence[Bindings], time_limit: float = 10.0, progress: Progress | None = None
) -> list[MemoryPlan]:
    """Plans of all graphs of ``model``, nodes in the order they are in, verified.

    Args:
        model: the model, shapes inferred.
        sets: sizes of the symbolic dims; one plan of each graph for each set.
        time_limit: seconds for each search of offsets.
        progress: told what is being done.

    Raises:
        PlanError: sizes that are not known.
    """
    plans: list[MemoryPlan] = []
    for bindings in sets:
        for name, graph in named_graphs(model):
            flow = flow_of(graph, Sizes(model, bindings))
            plan = plan_flow(flow, graph, name, bindings, time_limit, progress)
            verify_plan(plan, graph)
            plans.append(plan)
    return plans


def plan_flow(
    flow: Flow, graph: ir.Graph, name: str, bindings: Bindings, time_limit: float, progress: Progress | None
) -> MemoryPlan:
    """The plan of one graph in the order its nodes are in."""
    order = list(range(len(flow.before)))
    buffers = buffers_in_order(flow, order)
    lifetimes = [(buffer.start, buffer.end) for buffer in buffers]
    options = {} if progress is None else {"progress": progress}
    found = plan_offsets(lifetimes, [buffer.size for buffer in buffers], None, time_limit, **options)
    placed = [dataclasses.replace(b, offset=offset) for b, offset in zip(buffers, found.offsets, strict=True)]
    names = tuple(node.name or "" for node in graph)
    return MemoryPlan(name, dict(bindings), names, tuple(placed), found.method)


def named_graphs(model: ir.Model) -> Iterator[tuple[str, ir.Graph]]:
    """The main graph as "", then every body as ``node/number``, nested ones as ``node/number/node/number``."""
    yield from _named("", model.graph)


def _named(path: str, graph: ir.Graph) -> Iterator[tuple[str, ir.Graph]]:
    yield path, graph
    for node in graph:
        for number, body in enumerate(subgraphs(node)):
            prefix = f"{path}/" if path else ""
            yield from _named(f"{prefix}{node.name}/{number}", body)


def reorder(graph: ir.Graph, order: Sequence[int]) -> None:
    """Puts the nodes of ``graph`` in ``order`` (positions now)."""
    nodes = list(graph)
    graph.remove(nodes)
    graph.extend(nodes[position] for position in order)


def _sizes_of(model: ir.Model, sample: Feeds) -> Bindings:
    """The sizes that the symbolic dims of the inputs have in ``sample``."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        if (array := sample.get(value.name or "")) is not None and value.shape is not None:
            pairs = zip(value.shape, array.shape, strict=False)
            sizes |= {dim.value: size for dim, size in pairs if isinstance(dim, ir.SymbolicDim) and dim.value}
    return sizes


def _sample(model: ir.Model, sizes: Bindings, feeds: Iterable[Feeds]) -> Feeds:
    """A made sample with the sizes planned for; the first of the user's where that cannot be made."""
    try:
        return make_feeds(model, 0, 1, sizes)[0]
    except LatheError:
        given = next(iter(feeds), None)
        if given is None:
            raise
        return given


def _over_budget(plan: MemoryPlan, budget: int) -> tuple[str, str]:
    step = plan.fullest_step
    largest = ", ".join(f"{buffer.names[0]} ({buffer.size})" for buffer in plan.alive_at(step)[:5])
    what = f"The activations need {plan.peak} bytes (at least {plan.bound}), the budget is {budget}."
    return what, f"The most is alive at node {plan.order[step]}: {largest}. Try tile-patches, or smaller inputs."
