"""Zeros in the weights of linear layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import PASS_KEY, Array, Names, is_op
from ...runtime.errors import PassError
from ..low_bit.output_effect import OutputEffect, effect_samples
from ..quantization.quantization_plan import Filter
from ..quantization.quantized_layers import mark
from .sparse_bias import give_bias
from .sparse_goals import EFFECT_SAMPLES, below, by_effect, by_magnitude, uniform, zeros_already
from .sparse_layers import RULE, Prunable, find_prunable
from .sparse_size import size_notes
from .sparse_solvers import Goal, Method, Second, prune
from .sparse_walk import Solution, prune_in_order

Allocation = Literal["uniform", "global", "sensitivity"]


@dataclasses.dataclass(frozen=True)
class PruneSparse(Pass):
    """Sets the weights of linear layers to zero that their output misses least, and fits the others to it.

    1. MatMul, Gemm and Conv with a constant W [N, K] keep a support S:
       ``min tr((W - W') H (W - W')^T)`` over W' on S, with H = X X^T of the layer's calibration inputs (a Conv
       unfolded, one H a group), which come from the graph as pruned so far.
    2. Given S every row is the exact least squares solution, ``w_S = w H_:S H_SS^-1`` (``refit``).
    3. Where the layer has a bias, ``b' = b + E[W x - W' x]``, and H in 1 and 2 is that of the centred inputs.
    4. Shares of zeros differ between weights with ``allocation``; all weights together have ``sparsity``.

    ONNX Runtime multiplies with zeros at full cost: this makes no model faster. It makes the file smaller: save to
    ``.onnx.gz``. The methods and their sources are in ``passes/pruning/sparse_solvers.py``.

    Refused: weights that are not constant, are quantized, are read by others (a table tied to the head), would be left
    empty; inside If and Loop all but magnitude without refit; N:M where the inputs are no multiple of M.

    Attributes:
        sparsity: share of zeros.
        threshold: instead, as many zeros in each weight as it has numbers smaller than this.
        method: how the support is chosen. magnitude: the largest weights. wanda: times the size of their inputs.
            sparsegpt: one after the other, the next making up for the last. admm: all together, the best. Only the
            first needs no calibration samples, and only without refit.
        pattern: "n:m", such as "2:4": instead, at most n of m consecutive inputs (of a Conv: input channels) non-zero.
        refit: whether the weights that are left are fitted to the layer's output.
        allocation: uniform: every weight has this sparsity. global: the smallest numbers of all weights together decide
            each one's share. sensitivity: shares of least effect on the model's output, measured weight by weight.
        add_bias: also MatMuls without a bias get one for what their mean output loses, as an Add.
        target: 0 aims at each layer's output on the pruned prefix, 1 at the original model's; magnitude and wanda
            without refit leave the other weights as they are.
        include: only nodes that match one of these: operator types, globs over names, callables; empty: all.
        exclude: none of these.
    """

    name: ClassVar[str] = "prune-sparse"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    sparsity: float = 0.5
    threshold: float | None = None
    method: Method = "admm"
    pattern: str | None = None
    refit: bool = True
    allocation: Allocation = "uniform"
    add_bias: bool = False
    target: float = 0.75
    include: tuple[Filter, ...] = ()
    exclude: tuple[Filter, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity}, it must lie between 0 and 1")
        if self.threshold is not None and self.threshold <= 0:
            raise ValueError(f"threshold is {self.threshold}, it must be above 0")
        if not 0 <= self.target <= 1:
            raise ValueError(f"target is {self.target}, it must lie in 0..1")
        if self.pattern is not None:
            parts = re.fullmatch(r"(\d+):(\d+)", self.pattern)
            if parts is None or not 0 < int(parts[1]) < int(parts[2]):
                raise ValueError(f"pattern is {self.pattern!r}, it must be n:m with 0 < n < m, such as 2:4")
        if self.allocation != "uniform" and (self.pattern is not None or self.threshold is not None):
            raise ValueError("a pattern or a threshold fixes each weight's share of zeros: allocation must be uniform")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        found = find_prunable(model, self.include, self.exclude, outcome)
        weights = [weight for weight in found if self._usable(weight, model, outcome)]
        if not weights or self._done(weights):
            return outcome
        if self._needs_samples and next(iter(context.feeds), None) is None:
            raise PassError(
                f"{self.name} with method={self.method!r} and refit={self.refit} needs calibration samples.",
                "Give compile(..., calibration=...) (--calibration), or take method='magnitude' and refit=False.",
            )
        original = model.clone() if self.allocation == "sensitivity" else None
        if original is not None:  # effects are measured with biases
            self._give_biases(model, weights, outcome)
        goals = self._goals(model, weights, context, outcome)
        if not goals:
            return outcome
        self._give_biases(model, goals, outcome)
        result = self._prune(model, goals, context)
        outcome.notes += _loss_notes(result)
        before = {weight: weight.value.const_value for weight in result}
        for weight, solution in result.items():
            for value, tensor in solution.tensors(weight).items():
                value.const_value = tensor
            for layer in weight.layers:
                mark(layer.node, self.name)
            outcome.counts["weights made sparse"] += 1
        outcome.notes += size_notes((tensor, weight.value.const_value) for weight, tensor in before.items())
        if original is not None:
            samples = effect_samples(original, context, EFFECT_SAMPLES)
            effect = OutputEffect(original, samples, context.device, context.threads)
            outcome.notes.append(f"effect on {effect.output!r} of all together, measured: {effect(model):.3g}")
        return outcome

    @property
    def _needs_samples(self) -> bool:
        return self.method != "magnitude" or self.refit or self.allocation == "sensitivity"

    @property
    def _pattern(self) -> tuple[int, int] | None:
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    def _usable(self, weight: Prunable, model: ir.Model, outcome: Outcome) -> bool:
        node, pattern, reason = weight.layers[0].node, self._pattern, ""
        inputs = weight.shape[1] if is_op(node, "Conv") else weight.matrix().shape[-1]
        if self._needs_samples and any(layer.node.graph is not model.graph for layer in weight.layers):
            reason = "it lies in the body of an If or Loop, where its inputs cannot be watched: there only magnitude "
            reason += "without refit works"
        elif pattern is not None and inputs % pattern[1]:
            reason = f"its {inputs} inputs are no multiple of {pattern[1]}"
        elif self.threshold is not None and node.metadata_props.get(PASS_KEY) == self.name:
            reason = "it was pruned before: a threshold is for dense weights"
        if reason:
            outcome.refuse(node, RULE, reason)
        return not reason

    def _done(self, weights: Iterable[Prunable]) -> bool:
        """Whether shares that are chosen for all weights together are reached already."""
        if self.allocation == "uniform":
            return False
        zeros = sum(sum(zeros_already(weight)) for weight in weights)
        return zeros >= sum(int(self.sparsity * weight.size) for weight in weights)

    def _goals(
        self, model: ir.Model, weights: list[Prunable], context: PassContext, outcome: Outcome
    ) -> dict[Prunable, list[Goal]]:
        """How sparse each weight becomes, without those that are already and those that nothing would be left of."""
        pattern = self._pattern
        if pattern is not None:
            goals = {weight: [Goal(pattern=pattern)] * weight.layers[0].groups for weight in weights}
            return {weight: goal for weight, goal in goals.items() if not _has_pattern(weight, goal[0])}
        if self.threshold is not None:
            zeros = below(weights, self.threshold)
        elif self.allocation == "global":
            zeros = by_magnitude(weights, self.sparsity)
        elif self.allocation == "sensitivity":
            zeros, predicted = by_effect(model, weights, self.sparsity, self._solve, context)
            shares = sorted(sum(counts) / weight.size for weight, counts in zeros.items())
            outcome.notes.append(
                f"shares of zeros from {shares[0]:.3f} to {shares[-1]:.3f}; sum of the effects, predicted: "
                f"{predicted:.3g}"
            )
        else:
            zeros = uniform(weights, self.sparsity)
        found: dict[Prunable, list[Goal]] = {}
        for weight, counts in zeros.items():
            size = weight.size // len(counts)
            if any(count >= size for count in counts):
                outcome.refuse(weight.layers[0].node, RULE, f"nothing would be left of the weight {weight.name}")
            elif any(count > have for count, have in zip(counts, zeros_already(weight), strict=True)):
                found[weight] = [Goal(count) for count in counts]
        return found

    def _give_biases(self, model: ir.Model, weights: Iterable[Prunable], outcome: Outcome) -> None:
        names = Names(model)
        for weight in weights if self.refit else ():
            if give_bias(weight, names, add=self.add_bias, by=self.name):
                outcome.counts["biases made"] += 1

    def _prune(
        self, model: ir.Model, goals: dict[Prunable, list[Goal]], context: PassContext
    ) -> dict[Prunable, Solution]:
        if self._needs_samples:
            stays = not self.refit and self.method in ("magnitude", "wanda")
            return prune_in_order(model, goals, self._solve, context, 0.0 if stays else self.target)
        found: dict[Prunable, Solution] = {}
        for weight, parts in goals.items():
            pairs = zip(weight.matrix(), parts, strict=True)
            pruned = np.array([prune(matrix, None, goal, "magnitude", False) for matrix, goal in pairs])
            found[weight] = Solution(pruned, np.zeros(0), 0.0, 0.0, 0)
        return found

    def _solve(self, target: Array, second: Second, goal: Goal) -> Array:
        return prune(target, second, goal, self.method, self.refit)


def _has_pattern(weight: Prunable, goal: Goal) -> bool:
    matrix = weight.matrix()
    return all((goal.keep(np.abs(group)) | (group == 0)).all() for group in matrix)


def _loss_notes(found: dict[Prunable, Solution]) -> list[str]:
    errors = {weight: part.lost / part.whole for weight, part in found.items() if part.whole > 0}
    if not errors:
        return []
    values, worst = sorted(errors.values()), max(errors, key=errors.__getitem__)
    lines = [
        f"squared error of the layers' outputs on the calibration samples: median {values[len(values) // 2]:.2%}, "
        f"largest {values[-1]:.2%} ({worst.name})"
    ]
    thin = [weight.name for weight, part in found.items() if part.rows < part.matrix.shape[-1]]
    if thin:
        lines.append(
            f"{len(thin)} layers have fewer calibration rows than inputs, {thin[0]} for one: more samples would help"
        )
    return lines
