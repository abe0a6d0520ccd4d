"""Divides a graph into stages of a pipeline."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.placement import STAGE_KEY, Placement, fingerprint, is_placed
from ...runtime.errors import PlanError
from ..memory.plan_memory import reorder
from .costs import NOT_TO_CUT, CostModel, graph_costs
from .stage_costs import Balance, OrderCosts, StageProblem, Stages
from .stage_search import find_stages


@dataclasses.dataclass(frozen=True)
class PartitionStages(Pass):
    """Divides the main graph into ``k`` stages of a pipeline, the slowest as fast as possible.

    1. Nodes get the number of their stage in their metadata (``onnxlathe.stage``) and stand stage after stage. No stage
       reads what a later one makes. ``Compiled.save_stages`` writes a file a stage.
    2. The cuts are exact for an order of the nodes (dynamic programming on seconds and bytes that cross, Archer's
       SliceGraph), the order is the best that a local search finds; notes give the bottleneck over its proven bound.

    A stage's time is that of its nodes and of what enters and leaves it; a value that a later stage needs crosses all
    stages between. Weights that two stages read are in both. Fuse first: a pattern across a cut is no longer fused.

    Args:
        k: number of stages.
        balance: ``"time"``: the slowest stage counts; ``"memory"``: the one with most weights and activations.
        memory_cap: bytes of weights and activations that a stage may have.
        cost: seconds of nodes, ``"measured"`` on the first sample, or ``"roofline"``.
        link: bytes a second between two stages; 0: they share memory.

    Raises:
        PlanError: more stages than nodes, or a cap that no partition holds; the smallest that one does is said.

    Pays where several devices, or requests at once, keep all stages busy.
    """

    name: ClassVar[str] = "partition-stages"
    gate: ClassVar[Gate] = "off"

    k: int = 2
    balance: Balance = "time"
    memory_cap: int | None = None
    cost: CostModel = "measured"
    link: float = 0.0

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        asked = dataclasses.asdict(self)
        if is_placed(model, "stages", asked):
            return outcome
        nodes = list(model.graph)
        if not 1 <= self.k <= len(nodes):
            raise PlanError(
                f"The graph has {len(nodes)} nodes and cannot be divided into {self.k} stages.",
                f"Take k from 1 to {len(nodes)}.",
            )
        costs = graph_costs(model, self.cost, context)
        cap = float("inf") if self.memory_cap is None else self.memory_cap
        transfer = 1 / self.link if self.link else 1e-15  # enough that sequences are not cut, and nothing else minds
        problem = StageProblem.of(costs, transfer, cap, self.balance)
        stages, bound = find_stages(problem, self.k, context.progress)
        self._require(stages, problem)
        figures = _figures(problem, stages, bound)
        reorder(model.graph, stages.order)
        labels = stages.labels
        for node, label in zip(nodes, labels, strict=True):
            node.metadata_props[STAGE_KEY] = str(label)
        Placement("stages", self.k, asked, fingerprint(model), figures).store(model)
        outcome.counts["stages"] = self.k
        outcome.notes.append(
            f"the costliest stage is {stages.bottleneck / bound if bound else 1:.3f} x the proven bound, "
            f"{figures['balance']:.2f} of it is the mean; bytes of weights: {figures['weight_bytes']}"
        )
        return outcome

    def _require(self, stages: Stages, problem: StageProblem) -> None:
        if stages.bottleneck < NOT_TO_CUT * problem.transfer:
            return
        if self.memory_cap is None:
            raise PlanError(
                f"The graph cannot be divided into {self.k} stages: each cut would pass a value that is no tensor.",
                "Take fewer stages.",
            )
        smallest, _ = find_stages(dataclasses.replace(problem, balance="memory", cap=float("inf")), self.k)
        raise PlanError(
            f"No division into {self.k} stages keeps each within {self.memory_cap} bytes.",
            f"The smallest cap found to hold is {int(smallest.bottleneck)}; else take more stages.",
        )


def _figures(problem: StageProblem, stages: Stages, bound: float) -> dict[str, Any]:
    costs = OrderCosts(problem, stages.order)
    ranges = list(itertools.pairwise(stages.cuts))
    each = [costs.cost(start, end) for start, end in ranges]
    weights = [
        {name: size for node in stages.order[start:end] for name, size in problem.weights[node].items()}
        for start, end in ranges
    ]
    return {
        "seconds": [costs.seconds(start, end) for start, end in ranges],
        "memory_bytes": [costs.memory(start, end) for start, end in ranges],
        "weight_bytes": [sum(held.values()) for held in weights],
        "bottleneck": stages.bottleneck,
        "bound": bound,
        "balance": sum(each) / len(each) / max(each) if max(each) else 1.0,
    }
