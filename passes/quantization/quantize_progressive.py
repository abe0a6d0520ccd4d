"""Quantization group by group under a budget, each group calibrated on what the quantized ones before it make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import ClassVar

import onnx_ir as ir

from ...compiler import verify
from ...compiler.base import Claim, Feeds, Outcome, Pass, PassContext
from ...compiler.budget import Budget, split
from ...runtime.calibrate import collect_ranges
from ...runtime.errors import PassError
from ...runtime.ranges import TensorRange
from .quantization_plan import ANCHORS, RULE, make_plan
from .quantize_static import QuantizeStatic
from .sixteen_bit import widen


@dataclasses.dataclass(frozen=True)
class QuantizeProgressive(Pass):
    """Lowers the bits of the layers group by group, from the inputs to the outputs, while the budget holds.

    1. The layers that ``quantize-static`` would quantize are split into ``groups`` of about equal number, in the order
       of the graph; layers that read the same value stay together.
    2. Each group in turn gets 8 bits; if the budget breaks, 16-bit activations; if it still does, it stays float.
    3. The ranges of a group are collected from the graph with the groups before it already quantized, so that they
       cover the errors made there.

    The budget is judged on samples kept away from calibration. What each group got, and what it lost, is in the notes.

    Attributes:
        budget: what must hold.
        groups: number of groups; more of them waste less of the budget and take longer.
        step: the options of the quantization.
    """

    name: ClassVar[str] = "quantize-progressive"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    budget: Budget = dataclasses.field(default_factory=Budget)
    groups: int = 4
    step: QuantizeStatic = dataclasses.field(default_factory=QuantizeStatic)

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups is at least 1, not {self.groups}")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        plan = make_plan(model, self.step.plan_options(context), Outcome())
        layers = [node for node in model.graph if node.name in plan.nodes and node.op_type in ANCHORS]
        if not layers:
            return self.step(model, context)
        if context.feeds == ():
            raise PassError("quantize-progressive has no calibration samples.", "Give some (calibration=...).")
        calibration, held_out = split(context.feeds, self.budget.held_out, context.seed)
        samples = list(held_out if self.budget.samples is None else self.budget.samples)
        feeds: Iterable[Feeds] = calibration if self.budget.samples is None else context.feeds
        work = _Progress(self, model.clone(), dataclasses.replace(context, feeds=feeds), samples)
        for group in _groups(layers, self.groups):
            work.lower(group)
        model.graph = work.model.graph
        model.opset_imports.update(work.model.opset_imports)
        outcome = work.outcome
        outcome.notes = [*work.notes, *outcome.notes]
        return outcome


class _Progress:
    """The best graph so far, and how it came about."""

    def __init__(
        self,
        options: QuantizeProgressive,
        base: ir.Model,
        context: PassContext,
        samples: list[Mapping[str, verify.Array]],
    ) -> None:
        self.options, self.base, self.context, self.samples = options, base, context, samples
        self.exact = verify.run_reference(base, samples)
        self.model, self.outcome = base.clone(), Outcome()
        self.narrow: set[str] = set()
        self.wide: set[str] = set()
        self.ranges: dict[str, TensorRange] = {}
        self.notes: list[str] = []

    def lower(self, group: list[str]) -> None:
        """Gives ``group`` as few bits as the budget allows."""
        label = f"{len(group)} layers from {group[0]} on"
        budget = self.options.budget
        said: list[str] = []
        choices = ((8, self.narrow | set(group), self.wide), (16, self.narrow, self.wide | set(group)))
        for bits, narrow, wide in choices:
            self.context.progress(f"quantize-progressive: {label}, {bits} bits")
            candidate, outcome, ranges = self._build(narrow, wide)
            got = verify.run_reference(candidate, self.samples)
            loss = budget.loss(self.samples, self.exact, got)
            said.append(f"{bits} bits: {budget.say(loss)}")
            if loss <= budget.limit:
                self.model, self.outcome, self.ranges = candidate, outcome, ranges
                self.narrow, self.wide = narrow, wide
                self.notes.append(f"{label}: {', '.join(said)}")
                return
        self.notes.append(f"{label}: {', '.join(said)}: left float")
        for name in group:
            node = next(node for node in self.base.graph if node.name == name)
            self.outcome.refuse(node, RULE, f"the budget does not hold with it ({said[0]})")

    def _build(self, narrow: set[str], wide: set[str]) -> tuple[ir.Model, Outcome, dict[str, TensorRange]]:
        step = dataclasses.replace(
            self.options.step,
            include=(lambda node: node.op_type not in ANCHORS or node.name in narrow | wide,),
            sixteen_bit=(lambda node: node.name in wide,) if wide else (),
        )
        ranges = {**self.ranges, **self._collect(step, set(self.ranges))}
        candidate = self.base.clone()
        outcome = step(candidate, dataclasses.replace(self.context, ranges=ranges))
        refused = [item for item in self.outcome.refusals if "budget" in item.reason]
        outcome.refusals = [*refused, *(item for item in outcome.refusals if "include or exclude" not in item.reason)]
        return candidate, outcome, ranges

    def _collect(self, step: QuantizeStatic, known: set[str]) -> dict[str, TensorRange]:
        """Ranges of the values that are new in the plan of ``step``: in the graph as quantized so far."""
        plan = make_plan(self.base, step.plan_options(self.context), Outcome())
        widen(self.base, plan, step.sixteen_bit)
        wanted = {
            name: spec for name, spec in plan.activations.items() if name not in known and name not in plan.same_as
        }
        there = {value.name for node in self.model.graph for value in node.outputs}
        there |= {value.name for value in self.model.graph.inputs}
        found: dict[str, TensorRange] = {}
        for graph, specs in (
            (self.model, {name: spec for name, spec in wanted.items() if name in there}),
            (self.base, {name: spec for name, spec in wanted.items() if name not in there}),
        ):
            if specs:
                found |= collect_ranges(
                    graph, specs, self.context.feeds, method=step.ranges, percentile=step.percentile,
                    threads=self.context.threads, progress=self.context.progress,
                )  # fmt: skip
        return found


def _groups(layers: list[ir.Node], count: int) -> list[list[str]]:
    """Names of ``layers`` in ``count`` runs; those that read the same value are in the first one's run."""
    units: dict[ir.Value | None, list[str]] = {}
    for node in layers:
        units.setdefault(node.inputs[0], []).append(node.name or "")
    names, parts = list(units.values()), min(count, len(units))
    edges = [round(len(names) * part / parts) for part in range(parts + 1)]
    return [
        [name for unit in names[start:end] for name in unit]
        for start, end in itertools.pairwise(edges)
    ]  # fmt: skip
