"""Which pipelines are worth trying for a model: made of the presets, by what the model consists of.

1. The presets that fit the device and the parts: products and convolutions with constant weights for int8, products for
   weights in 8 and 4 bits (for decoders, and where size counts), float16 on CUDA.
2. Then what the results suggest: int8 held to the limit layer by layer where it lost too much; units left out
   (``prune-adaptive``), more each time it still fits; bits mixed where 8 fit and 4 do not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import onnx_ir as ir

from onnxlathe.compiler.base import Claim, Outcome, Pass
from onnxlathe.compiler.budget import Budget
from onnxlathe.compiler.graph import all_nodes, constant, is_op
from onnxlathe.compiler.variants import is_quantized
from onnxlathe.passes import MixedPrecision, PruneAdaptive, QuantizeStatic, QuantizeWeights, SmoothQuant
from onnxlathe.passes.low_bit.linear_weights import find_weights
from onnxlathe.passes.presets import PRESETS, resolve_passes
from onnxlathe.runtime.providers import Device

from .trials import Trial

Goal = Literal["speed", "size", "balanced"]
FUSED = {"cpu": "cpu-fp32", "cuda": "fused"}
"""The exact pipeline of each device."""
_PRUNE_FROM = 32  # rows that a refit needs to be worth its time
_STEPS = (1.25, 1.5, 2.0)
_GENTLE = 1.1
_MIXED_BITS = 6.5
_PRUNED = "pruned"
_NOISE = 0.05
_ROUNDING = 1e-9  # one wrong answer in a hundred is 1 %, not 1.0000000000000009 %
_DECIBEL = 1.0
_ROOM = 0.8  # of the limit, for what is judged on other samples than those that decide


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A pipeline to try.

    Attributes:
        name: short; a preset's own where it is one.
        passes: as of ``compile``.
        gate: whether each pass is measured while compiling.
    """

    name: str
    passes: tuple[Pass, ...]
    gate: bool = False

    @property
    def exact(self) -> bool:
        """Whether every pass claims the same meaning; ``compile`` holds them to it."""
        return all(step.claims is Claim.EXACT for step in self.passes)

    @property
    def text(self) -> str:
        """The passes with their options; equal pipelines have equal texts."""
        return ", ".join(map(repr, self.passes))


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is known of the model and the task before anything is tried.

    Attributes:
        products: it has products with constant weights.
        convolutions: it has convolutions with constant weights.
        decoder: it continues texts.
        quantized: it has been quantized before: only exact pipelines make sense.
        device: execution provider.
        samples: rows of the calibration samples; 0: none are real.
    """

    products: bool
    convolutions: bool
    decoder: bool
    quantized: bool
    device: Device
    samples: int

    @classmethod
    def of(cls, model: ir.Model, decoder: bool, device: Device, samples: int) -> Subject:
        """Reads it off the graph."""
        products = any(weight.linears for weight in find_weights(model, Outcome()))
        convolutions = any(is_op(node, "Conv") and constant(node.inputs[1]) is not None for node in all_nodes(model))
        return cls(products, convolutions, decoder, is_quantized(model), device, samples)


def first_candidates(subject: Subject, goal: Goal, budget: Budget) -> Iterator[Candidate]:
    """The presets worth trying, the exact one first."""
    exact = Candidate(FUSED[subject.device], _passes("cpu-fp32"), gate=True)
    yield exact
    if subject.quantized or (budget.metric != "sqnr" and budget.limit <= 0):
        return
    small = subject.decoder or goal != "speed"
    if subject.device == "cuda":
        yield _preset("cuda-fp16")
    elif subject.products or subject.convolutions:
        if subject.samples:
            yield _preset("cpu-int8")
        if subject.products and not subject.decoder:
            smoothed = _smoothed(_passes("cpu-int8-dynamic"), subject)
            yield Candidate("cpu-int8-dynamic", smoothed)
    if subject.products and small:
        yield Candidate("8-bit weights", (*exact.passes, QuantizeWeights(bits=8)))
        yield _preset("cpu-int4")
        if subject.samples:
            yield Candidate("cpu-int4, gptq", (*exact.passes, QuantizeWeights(bits=4, method="gptq")))


@dataclasses.dataclass
class Progress:
    """A search as far as it has come.

    Attributes:
        subject: the model.
        goal: what is wanted.
        budget: what may be lost.
        bytes: of the original's weights.
        tried: all candidates so far, by name.
        done: the trials of those that came to a result.
    """

    subject: Subject
    goal: Goal
    budget: Budget
    bytes: int
    tried: dict[str, Candidate] = dataclasses.field(default_factory=lambda: dict[str, Candidate]())
    done: dict[str, Trial] = dataclasses.field(default_factory=lambda: dict[str, Trial]())

    def within(self, trial: Trial) -> bool:
        """Whether it loses no more than allowed."""
        return trial.exact or (trial.drop is not None and trial.drop <= self.budget.limit + _ROUNDING)

    def fits(self, trial: Trial) -> bool:
        """Whether it may be the answer: within the limit, and not slower than the original.

        Where size is the goal, a speed that is 1 within its noise (5 % at most) is not slower.
        """
        slack = min(trial.noise, _NOISE) if self.goal == "size" else 0.0
        return self.within(trial) and trial.speed >= 1.0 - slack

    def score(self, trial: Trial) -> float:
        """How good it is, higher is better: times as fast, times as small, or the geometric mean of both."""
        smaller = self.bytes / max(trial.bytes, 1)
        if self.goal == "balanced":
            return math.sqrt(trial.speed * smaller)
        return trial.speed if self.goal == "speed" else smaller

    def ranked(self) -> list[Trial]:
        """What may be the answer, the best first."""
        return sorted(filter(self.fits, self.done.values()), key=self.score, reverse=True)

    def next(self) -> Candidate | None:
        """What the trials so far suggest, None when nothing is left."""
        for make in (self._healed, self._pruned, self._mixed):
            found = make()
            if found is not None and found.name not in self.tried:
                return found
        return None

    def _healed(self) -> Candidate | None:
        """int8 that lost too much but is fast, with its worst layers healed."""
        int8, metric = self.done.get("cpu-int8"), self.budget.metric
        if int8 is None or self.within(int8) or int8.speed <= 1.0 or callable(metric) or metric == "accuracy":
            return None  # layers are judged on samples without labels
        held = self.budget.max_drop + _DECIBEL if metric == "sqnr" else _ROOM * self.budget.max_drop
        careful = dataclasses.replace(self.budget, max_drop=held, samples=None)
        steps = [
            dataclasses.replace(step, quality=careful) if isinstance(step, QuantizeStatic) else step
            for step in self.tried["cpu-int8"].passes
        ]
        return Candidate("cpu-int8, healed", tuple(steps))

    def _pruned(self) -> Candidate | None:
        """Units left out of the best so far, more each time it fits; a little if it did not."""
        subject = self.subject
        if subject.samples < _PRUNE_FROM or subject.quantized or subject.device != "cpu" or self.budget.limit <= 0:
            return None
        bases = [trial for trial in self.ranked() if _PRUNED not in trial.name]
        if not bases:
            return None
        base = self.tried[bases[0].name]
        for speedup in _STEPS:
            step = _with_pruning(base, speedup, subject)
            trial = self.done.get(step.name)
            if trial is None:
                return step
            if not self.within(trial):
                return _with_pruning(base, _GENTLE, subject) if speedup == _STEPS[0] else None
        return None

    def _mixed(self) -> Candidate | None:
        """Bits between 8 and 4, each where it hurts least."""
        eight, four = self.done.get("8-bit weights"), self.done.get("cpu-int4, gptq") or self.done.get("cpu-int4")
        if self.goal == "speed" or eight is None or four is None or not self.fits(eight) or self.within(four):
            return None
        step = MixedPrecision(_MIXED_BITS, options=(4, 8), method="gptq" if self.subject.samples else "rtn")
        base = self.tried["8-bit weights"]
        return Candidate("4 and 8-bit weights", (*base.passes[: _first_lossy(base.passes)], step))


def without(candidate: Candidate, dropped: Collection[str]) -> Candidate:
    """``candidate`` without the exact passes that were measured not to pay."""
    kept = tuple(step for step in candidate.passes if step.name not in dropped or step.claims is not Claim.EXACT)
    return dataclasses.replace(candidate, passes=kept)


def _with_pruning(base: Candidate, speedup: float, subject: Subject) -> Candidate:
    """Pruned after fusing and before quantizing; heads of a decoder stay, as its caches have their shape."""
    what = ("ffn",) if subject.decoder else ("ffn", "heads", "channels")
    at = _first_lossy(base.passes)
    steps = (*base.passes[:at], PruneAdaptive(speedup=speedup, what=what), *_passes("basic"), *base.passes[at:])
    return Candidate(f"{base.name}, {_PRUNED} {speedup:g} x", steps)


def _smoothed(steps: Sequence[Pass], subject: Subject) -> tuple[Pass, ...]:
    """With outliers of activations moved into the weights, where samples show them."""
    if not subject.samples:
        return tuple(steps)
    at = _first_lossy(steps)
    return (*steps[:at], SmoothQuant(alpha=0.5, multiply="where-it-pays"), *steps[at:])


def _first_lossy(steps: Sequence[Pass]) -> int:
    lossy = [at for at, step in enumerate(steps) if step.claims is Claim.APPROXIMATE or isinstance(step, SmoothQuant)]
    return lossy[0] if lossy else len(steps)


def _preset(name: str) -> Candidate:
    return Candidate(name, _passes(name))


def _passes(name: str) -> tuple[Pass, ...]:
    return tuple(resolve_passes([*PRESETS[name].passes])[0])
