"""Static quantization under a budget: the worst layers are corrected, widened or left out until it holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from ...compiler import verify
from ...compiler.analyze import analyze
from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.budget import Budget, split
from ...compiler.metrics import Array
from ...compiler.variants import is_quantized
from ...runtime.calibrate import observe
from ...runtime.errors import PassError
from ...runtime.ranges import Histogram, RangeMethod, TensorRange, choose_range
from .adaround import AdaRound
from .correct_bias import CorrectBias
from .equalize_layers import EqualizeLayers
from .quantization_plan import QuantPlan, make_plan
from .sixteen_bit import widen
from .smooth_quant import SmoothQuant

if TYPE_CHECKING:
    from .quantize_static import QuantizeStatic

_METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse", "entropy")
_EXACT = 1e-5
_ANALYZED = 2
"""Samples that the layers are ranked on."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to quantize.

    Attributes:
        base: the float graph, possibly smoothed and equalized.
        method: how ranges are chosen.
        bias: whether biases are corrected.
        rounded: nodes whose weights AdaRound rounds; ``("*",)`` for all.
        wide: nodes with 16-bit activations.
        left: nodes left float.
    """

    base: ir.Model
    method: RangeMethod
    bias: bool = False
    rounded: tuple[str, ...] = ()
    wide: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()


@dataclasses.dataclass
class _Tried:
    """A choice, what came of it, and what it loses on the held-out samples."""

    choice: Choice
    model: ir.Model
    outcome: Outcome
    loss: float


def heal(step: QuantizeStatic, budget: Budget, model: ir.Model, context: PassContext) -> Outcome:
    """Quantizes ``model`` as ``step`` says, then climbs the ladder until ``budget`` holds.

    The rungs, each kept only if it loses less on the held-out samples, and said in a note of the outcome:

    1. ranges: minmax, percentile, mse, entropy;
    2. bias correction;
    3. SmoothQuant and equalization of the float graph, after a check that it computes the same;
    4. AdaRound on the worst quarter of the layers, then on all;
    5. 16-bit activations for the worst layers, as few of them as it takes, if that is enough;
    6. the worst layers left float, as few of them as it takes.

    Layers are ranked by what each adds to the error of the outputs when it alone is quantized (``analyze``).

    Raises:
        PassError: no samples.
    """
    if context.feeds == () and budget.samples is None:
        raise PassError("quality needs samples.", "Give calibration=... (--calibration x.npz).")
    return _Ladder(step, budget, model, context).climb(model)


class _Ladder:
    def __init__(self, step: QuantizeStatic, budget: Budget, model: ir.Model, context: PassContext) -> None:
        self.step, self.budget = step, budget
        calibration, held_out = split(context.feeds, budget.held_out, context.seed)
        feeds: Iterable[Mapping[str, Array]] = calibration if budget.samples is None else context.feeds
        self.context = dataclasses.replace(context, feeds=feeds, ranges={})
        self.samples = list(held_out) if budget.samples is None else [dict(sample) for sample in budget.samples]
        self.exact = verify.run_reference(model, self.samples)
        self.notes: list[str] = []
        self._seen: dict[ir.Model, dict[str, Histogram]] = {}
        self._chosen: dict[RangeMethod, dict[str, TensorRange]] = {}
        self._ranked: tuple[ir.Model, list[str]] | None = None

    def climb(self, model: ir.Model) -> Outcome:
        """Tries rung after rung; ``model`` becomes the best."""
        best = self._try("as asked", Choice(model.clone(), self.step.ranges))
        if is_quantized(best.model):
            for rung in (self._ranges, self._bias, self._smooth, self._round, self._widen, self._leave_float):
                if best.loss <= self.budget.limit:
                    break
                best = rung(best)
        if is_quantized(best.model):
            verdict = "within" if best.loss <= self.budget.limit else "NOT within"
            count = len(self.samples)
            self.notes.append(f"{self.budget.say(best.loss)} on {count} held-out samples: {verdict} the budget")
        else:
            self.notes.append("nothing is quantized" + (": no less keeps the budget" if best.choice.left else ""))
        outcome = Outcome(refusals=best.outcome.refusals)
        if is_quantized(best.model):
            model.graph, outcome = best.model.graph, best.outcome
        outcome.notes = [*self.notes, *outcome.notes]
        return outcome

    def _ranges(self, best: _Tried) -> _Tried:
        for method in _METHODS:
            if method != self.step.ranges:
                tried = self._try(f"ranges by {method}", dataclasses.replace(best.choice, method=method), best)
                best = self._better(best, tried)
        return best

    def _bias(self, best: _Tried) -> _Tried:
        return self._better(best, self._try("bias correction", dataclasses.replace(best.choice, bias=True), best))

    def _smooth(self, best: _Tried) -> _Tried:
        base = best.choice.base.clone()
        steps: tuple[Pass, ...] = (SmoothQuant(per_channel=self.step.per_channel), EqualizeLayers())
        done = [
            step(base, self.context) for step in steps if not (step.name == "equalize-layers" and self.step.per_channel)
        ]
        if not any(outcome.changed for outcome in done):
            self.notes.append("SmoothQuant and equalization: nothing to do")
            return best
        error, _ = verify.compare(self.exact, verify.run_reference(base, self.samples))
        if error > _EXACT:
            self.notes.append(f"SmoothQuant and equalization: changed the float model by {error:.1e}, left out")
            return best
        folded = sum(sum(outcome.counts.values()) for outcome in done)
        tried = self._try(
            f"SmoothQuant and equalization ({folded} places)", dataclasses.replace(best.choice, base=base), best
        )
        return self._better(best, tried)

    def _round(self, best: _Tried) -> _Tried:
        worst = self._worst(best)
        quarter = tuple(worst[: max(1, len(worst) // 4)])
        for label, names in (
            (f"AdaRound on the {len(quarter)} worst layers", quarter),
            ("AdaRound on all layers", ("*",)),
        ):
            if best.loss > self.budget.limit:
                best = self._better(best, self._try(label, dataclasses.replace(best.choice, rounded=names), best))
        return best

    def _widen(self, best: _Tried) -> _Tried:
        """Layers with 16-bit activations run in float, so the rung is only taken if the budget then holds."""

        def choose(names: frozenset[str]) -> Choice:
            return dataclasses.replace(best.choice, wide=names)

        worst = self._worst(best)
        tried = self._try("16-bit activations everywhere", choose(frozenset(worst)), best)
        if tried.loss > self.budget.limit:
            self.notes[-1] += " (not kept)"
            return best
        return self._as_few(best, "16-bit activations", choose, worst, tried)

    def _leave_float(self, best: _Tried) -> _Tried:
        def choose(names: frozenset[str]) -> Choice:
            return dataclasses.replace(best.choice, left=names)

        worst = self._worst(best)
        everything = _Tried(choose(frozenset(worst)), best.choice.base, Outcome(), 0.0)
        return self._as_few(best, "left float", choose, worst, everything)

    def _as_few(
        self, start: _Tried, label: str, choose: Callable[[frozenset[str]], Choice], worst: list[str], good: _Tried
    ) -> _Tried:
        """The least number of worst layers that ``choose`` must be applied to; ``good`` is all of them."""
        failed, enough, size = 0, len(worst), 1
        while enough - failed > 1:
            size = min(size, (failed + enough) // 2)
            tried = self._try(f"{label}: the {size} worst layers", choose(frozenset(worst[:size])), start)
            if tried.loss <= self.budget.limit:
                enough, good = size, tried
            else:
                failed, size = size, 4 * size
        return good

    def _better(self, best: _Tried, tried: _Tried) -> _Tried:
        kept = tried.loss < best.loss
        self.notes[-1] += "" if kept else " (not kept)"
        return tried if kept else best

    def _try(self, label: str, choice: Choice, before: _Tried | None = None) -> _Tried:
        self.context.progress(f"quantize-static: {label}")
        candidate, outcome = self._build(choice)
        if not is_quantized(candidate) and not choice.left:
            self.notes.append(f"{label}: nothing could be quantized so")
            return _Tried(choice, candidate, outcome, math.inf)
        got = verify.run_reference(candidate, self.samples)
        loss = self.budget.loss(self.samples, self.exact, got)
        was = "" if before is None else f"{self.budget.say(before.loss)} -> "
        self.notes.append(f"{label}: {was}{self.budget.say(loss)}")
        return _Tried(choice, candidate, outcome, loss)

    def _build(self, choice: Choice) -> tuple[ir.Model, Outcome]:
        """The quantized graph of a choice."""
        candidate = choice.base.clone()
        context = dataclasses.replace(self.context, ranges=self._known(choice))
        step = dataclasses.replace(
            self.step,
            ranges=choice.method,
            exclude=(*self.step.exclude, _Named(choice.left)) if choice.left else self.step.exclude,
            sixteen_bit=(*self.step.sixteen_bit, _Named(choice.wide)) if choice.wide else self.step.sixteen_bit,
        )
        outcome = step(candidate, context)
        corrected = dataclasses.replace(context, reference=choice.base)
        if choice.rounded and outcome.changed:
            self._correct(AdaRound(iterations=0, layers=choice.rounded), candidate, corrected, outcome)
        if choice.bias and outcome.changed:
            self._correct(CorrectBias(), candidate, corrected, outcome)
        return candidate, outcome

    def _correct(self, step: Pass, candidate: ir.Model, context: PassContext, outcome: Outcome) -> None:
        done = step(candidate, context)
        outcome.counts.update(done.counts)
        outcome.refusals += done.refusals

    def _known(self, choice: Choice) -> dict[str, TensorRange]:
        """The ranges of every value a plan may want, from one run over the calibration samples for each float graph."""
        plan = self._plan(choice.base)
        if choice.base not in self._seen:
            wanted = {name: Histogram() for name in plan.activations}
            if wanted:
                context = self.context
                observe(choice.base, wanted, context.feeds, threads=context.threads, progress=context.progress)
            self._seen, self._chosen = {choice.base: wanted}, {}
        seen, percentile = self._seen[choice.base], self.step.percentile
        if choice.method not in self._chosen:
            self._chosen[choice.method] = {
                name: choose_range(seen[name], choice.method, plan.activations[name], percentile) for name in seen
            }
        widen(choice.base, plan, [_Named(choice.wide)])
        wide = {name for name, spec in plan.activations.items() if spec.dtype in ("uint16", "int16")}
        chosen = self._chosen[choice.method]
        return {name: seen[name].range() if name in wide else chosen[name] for name in seen}

    def _plan(self, base: ir.Model) -> QuantPlan:
        return make_plan(base, self.step.plan_options(self.context), Outcome())

    def _worst(self, best: _Tried) -> list[str]:
        """Names of the quantized nodes of the float graph, the one that adds most to the error first."""
        if self._ranked is not None and self._ranked[0] is best.model:
            return self._ranked[1]
        base = best.choice.base
        planned = self._plan(base).nodes
        found = analyze(
            base,
            best.model,
            itertools.islice(self.context.feeds, _ANALYZED),
            threads=self.context.threads,
            progress=self.context.progress,
        )
        makers = {value.name: node for node in base.graph for value in node.outputs}
        names = [name for layer in found.layers for name in _planned(makers[layer.value], planned)]
        ranking = list(dict.fromkeys([*names, *sorted(planned)]))
        self._ranked = (best.model, ranking)
        return ranking


@dataclasses.dataclass(frozen=True)
class _Named:
    """A filter for nodes with certain names; names may hold the signs that globs use."""

    names: frozenset[str]

    def __call__(self, node: ir.Node) -> bool:
        return node.name in self.names


def _planned(node: ir.Node, planned: set[str]) -> list[str]:
    """The planned nodes that make the result of ``node``: itself, or those right in front; else a Gather of a table."""
    if node.name in planned:
        return [node.name or ""]
    front = [value.producer() for value in node.inputs if value is not None]
    names = [maker.name or "" for maker in front if maker is not None and maker.name in planned]
    return names or [node.name or ""]
