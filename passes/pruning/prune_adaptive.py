"""How much of each part goes, chosen by what it costs the output and what it saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Feeds, Gate, Outcome, Pass, PassContext
from ...compiler.budget import Budget, split
from ...compiler.graph import Array, remove_dead, weight_bytes
from ...runtime.errors import PassError
from ...runtime.feeds import make_feeds
from ...runtime.inference import open_session, run_session, session_options
from ..low_bit.mixed_precision import solve
from ..low_bit.output_effect import OutputEffect, effect_samples
from ..low_bit.streams import PATIENT
from .blocks import Half, residual_stream
from .bypass import drop_caches
from .choices import Losses, Module, leave_bias, modules_of, shrunk
from .coupling_rules import coupling_of
from .cut import cut, drop_unused
from .fit import refit
from .module_times import relative_time
from .obs import Ranking
from .part_costs import part_bytes, part_times
from .prune_width import WIDTH_KEY, PruneWidth
from .statistics import needs_samples

_TRIES = 5
_EXACT = 0.01
_SHARES = (1.0, 0.75, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class PruneAdaptive(Pass):
    """Leaves out units and whole branches, of each part as much as costs the output least for the speed or size wanted.

    1. Parts are the dimensions that ``prune-width`` cuts: hidden units, heads, channels. Each may lose a tenth, two
       tenths, ...; heads one by one; and all, where that leaves of a branch of the residual stream only its bias.
    2. What an option costs is measured on the model's own output (``OutputEffect``), only that part cut and fitted.
    3. What it saves is measured: seconds of the part in ONNX Runtime on this provider, or bytes.
    4. ``minimise the sum of costs, subject to the sum of times`` is solved exactly (scipy.optimize.milp); the time of
       the whole is then measured, as parts run faster alone, and the bound moved either way until it is what was asked
       for within a hundredth, five times at most. Then all is cut and fitted as in ``prune-width``.

    The report has the speed predicted and real, and the cost predicted and real.

    Refused: see ``prune-width``. Pays by what is asked for. Sources: Kurtic et al., ZipLM (2302.04089).

    Attributes:
        speedup: time as it is over time wanted.
        bytes: instead of ``speedup``: the bytes of weights wanted, as a share of those of the model as it is.
        quality: what must hold on samples kept away from the fit; where it does not, less goes, or nothing.
        what: kinds of units, as in ``prune-width``.
        multiple: as in ``prune-width``.
        sizes: sizes of the inputs' symbolic dims for which times are measured; None: those of the first sample.
    """

    name: ClassVar[str] = "prune-adaptive"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    changes_signature: ClassVar[bool] = True
    speedup: float = 1.5
    bytes: float | None = None
    quality: Budget | None = None
    what: tuple[str, ...] = ("ffn", "heads", "channels")
    multiple: int = 16
    sizes: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.speedup <= 1:
            raise ValueError(f"speedup is above 1, not {self.speedup}")
        if self.bytes is not None and not 0 < self.bytes < 1:
            raise ValueError(f"bytes lies between 0 and 1, not {self.bytes}")
        PruneWidth(what=self.what, multiple=self.multiple)  # refuses what it would

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        found = PruneWidth(what=self.what, multiple=self.multiple).dimensions(coupling_of(model), outcome)
        if not found:
            return outcome
        needs_samples(context, self.name)
        held: Sequence[Feeds] = ()
        if self.quality is not None:
            rest, part = split(context.feeds, self.quality.held_out, context.seed)
            held = list(self.quality.samples or part)  # type: ignore[arg-type]
            context = context if self.quality.samples else dataclasses.replace(context, feeds=rest)
        plan = _Plan(model, modules_of(found, residual_stream(model), self.multiple), self, context)
        picked: list[int] = []
        result, lines = model, list[str]()
        for share in _SHARES:
            picked = plan.solve(share)
            result, lines = plan.applied(picked)
            if self.quality is None:
                break
            loss = _loss(self.quality, model, result, held, context)
            if loss <= self.quality.limit:
                lines.append(f"on samples kept away: {self.quality.say(loss)}")
                break
            outcome.notes.append(f"{plan.words(picked)}: {self.quality.say(loss)}, too much")
        else:
            outcome.refuse(found[0].makers[0], "choice", "no choice tried keeps the quality asked for")
            return outcome
        if not any(picked):
            return outcome
        outcome.notes += lines
        for module, option in zip(plan.modules, picked, strict=True):
            if option:
                everything = module.counts[option] == len(module.dimension.units)
                outcome.counts["branches left out" if everything else "parts cut"] += 1
        _become(model, result)
        return outcome


class _Plan:
    """The table of options of one model."""

    def __init__(self, model: ir.Model, modules: Sequence[Module], step: PruneAdaptive, context: PassContext) -> None:
        self._model, self.modules, self._step, self._context = model, modules, step, context
        self._sample = _timed_sample(model, step, context)
        if step.bytes is None:
            self._costs, self._whole = part_times(model, modules, self._sample, context, step.name)
        else:
            self._costs, self._whole = part_bytes(model, modules, step.name)
        self._effect = OutputEffect(model, effect_samples(model, context), context.device, context.threads)
        self._effects, self._rankings = Losses(model, modules, self._effect, context).table()

    def solve(self, share: float) -> list[int]:
        """The option of each module, for ``share`` of what is to be saved.

        Raises:
            PassError: it cannot be saved.
        """
        wanted = self._step.bytes if self._step.bytes is not None else 1 / self._step.speedup
        wanted = 1 - share * (1 - wanted)
        limit = wanted if self._step.bytes is not None else wanted * (1 + _EXACT)
        options = max(len(costs) for costs in self._costs)
        full = float(sum(costs[0] for costs in self._costs))
        effects, costs = (np.stack([_padded(row, options) for row in rows]) for rows in (self._effects, self._costs))
        aim = wanted
        picked: list[int] = []
        best: list[int] = []
        for _ in range(_TRIES):
            budget = full - (1 - aim) * self._whole
            if costs.min(axis=1).sum() > budget or budget <= 0:
                if picked:
                    break
                least = 1 - (full - costs.min(axis=1).sum()) / self._whole
                raise PassError(
                    f"{self._step.name} can bring the model to {least:.2f} of what it is, not to {wanted:.2f}.",
                    "Ask for less, or allow more kinds of units (what=...).",
                )
            picked = solve(effects, costs, budget)
            real = self.relative(picked)
            if real <= limit and (not best or self._effect_of(picked) < self._effect_of(best)):
                best = picked
            if wanted * (1 - _EXACT) <= real <= limit:
                break
            aim = 1 - (1 - aim) * (1 - wanted) / max(1 - real, 0.1 * (1 - wanted))
            if self._step.bytes is not None and real > limit:  # or the same would be picked again
                aim = min(aim, self.predicted(picked) - 1e-9)
        return best or picked

    def _effect_of(self, picked: Sequence[int]) -> float:
        return sum(float(row[option]) for row, option in zip(self._effects, picked, strict=True))

    def relative(self, picked: Sequence[int]) -> float:
        """Time, or bytes, of the whole model with these options over what it takes as it is."""
        counts, silent = self._chosen(picked)
        smaller = shrunk(self._model, counts, silent, self._step.name)
        if self._step.bytes is not None:
            return weight_bytes(smaller) / weight_bytes(self._model)
        return relative_time(self._model, smaller, self._sample, self._context)

    def predicted(self, picked: Sequence[int]) -> float:
        """The share of the model that the table says is left."""
        saved = sum(float(costs[0] - costs[option]) for costs, option in zip(self._costs, picked, strict=True))
        return 1 - saved / self._whole

    def words(self, picked: Sequence[int]) -> str:
        """What the options leave, in words."""
        return f"{self.predicted(picked):.2f} of the {'bytes' if self._step.bytes is not None else 'time'}"

    def applied(self, picked: Sequence[int]) -> tuple[ir.Model, list[str]]:
        """A copy of the model with the options, fitted, and lines for the report."""
        copy = self._model.clone()
        coupling = coupling_of(copy)
        twins = {item.name: item for item in coupling.dimensions()}
        halves = {half.add.name: half for half in residual_stream(copy)}
        gone: list[Array] = []
        cuts: list[Array] = []
        silent: list[Half] = []
        for module, option, ranking in zip(self.modules, picked, self._rankings, strict=True):
            count, item = module.counts[option], twins[module.name]
            units = _units(item.units, ranking, count)
            gone.append(units)
            if count == len(item.units) and module.half is not None:
                silent.append(halves[module.half.add.name])
            elif count:
                cuts.append(units)
                for consumer in item.consumers:
                    left = f"{len(item.units) - count} of {len(item.units)}"
                    consumer.layer.node.metadata_props[WIDTH_KEY] = left
        changed = [twins[m.name] for m, option in zip(self.modules, picked, strict=True) if option]
        consumers = list({c.layer.node: c for item in changed for c in item.consumers}.values())
        fits = refit(copy, consumers, np.concatenate([*gone, np.zeros(0, np.int64)]), self._context, self._step.name)
        real_loss = self._effect(copy)
        cut(coupling, np.concatenate([*cuts, np.zeros(0, np.int64)]), self._step.name)
        leave_bias(copy, silent, self._step.name)
        drop_caches(copy, silent)
        remove_dead(copy)
        for value in list(copy.graph.initializers.values()):
            drop_unused(value)
        expected = self._effect_of(picked)
        lines = [
            f"{m.name}: {len(m.dimension.units) - m.counts[option]} of {len(m.dimension.units)}"
            for m, option in zip(self.modules, picked, strict=True)
        ]
        report = ["left of each part: " + "; ".join(lines)]
        if self._step.bytes is None:
            real = self.relative(picked)
            report.append(f"speed: predicted {1 / self.predicted(picked):.2f} x, real {1 / real:.2f} x")
        share = weight_bytes(copy) / weight_bytes(self._model)
        report.append(f"bytes of weights: {share:.0%} of before")
        report.append(f"effect on {self._effect.output!r}: predicted {expected:.3g}, real {real_loss:.3g}")
        if fits:
            median = float(np.median([item.fitted for item in fits]))
            report.append(f"error of the layers' outputs, median after the fit: {median:.3g}")
        return copy, report

    def _chosen(self, picked: Sequence[int]) -> tuple[dict[str, int], dict[str, Half]]:
        counts = {m.name: m.counts[option] for m, option in zip(self.modules, picked, strict=True)}
        silent = {
            m.name: m.half for m in self.modules if m.half is not None and counts[m.name] == len(m.dimension.units)
        }
        return counts, silent


def _units(units: Array, ranking: Ranking, count: int) -> Array:
    return units if count == len(units) else units[ranking.order[:count]]


def _padded(row: Array, length: int) -> Array:
    """The row with options nobody takes at its end: as dear as the dearest, twice as harmful as the worst."""
    return np.concatenate([row, np.full(length - len(row), 2 * max(float(row.max()), 1e-30))])


def _timed_sample(model: ir.Model, step: PruneAdaptive, context: PassContext) -> Feeds:
    if step.sizes is not None:
        return make_feeds(model, context.seed, 1, step.sizes)[0]
    return next(iter(context.feeds))


def _loss(quality: Budget, model: ir.Model, result: ir.Model, held: Sequence[Feeds], context: PassContext) -> float:
    """What is lost on samples kept away; outputs that the result does not have any more are not compared."""
    outputs: list[list[dict[str, Array]]] = []
    names = [value.name or "" for value in result.graph.outputs]
    for item in (model, result):
        session = open_session(item, session_options(threads=context.threads, ort_config=PATIENT), context.device)
        known = {value.name for value in session.get_inputs()}
        outputs.append([run_session(session, {k: v for k, v in s.items() if k in known}, names) for s in held])
    return quality.loss(held, outputs[0], outputs[1])


def _become(model: ir.Model, other: ir.Model) -> None:
    """Gives ``model`` the graph of ``other``."""
    model.graph = other.graph
    model.metadata_props.update(other.metadata_props)
    model.opset_imports.update(other.opset_imports)
