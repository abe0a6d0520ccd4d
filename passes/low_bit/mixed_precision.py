"""Bits chosen weight by weight, within a budget."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import Array
from ...runtime.errors import PassError
from .accuracy_levels import Level
from .blockwise import searched_grid
from .choices import FLOAT, Choice, usable
from .linear_weights import Weight, find_weights, groups_by_input
from .low_bit import Method, quantize
from .output_effect import OutputEffect, Swap, effect_samples
from .product_times import product_seconds
from .stored_scales import Scales

Unit = Literal["bits", "bytes", "latency"]


@dataclasses.dataclass(frozen=True)
class Option:
    """What a weight may become; 16 bits stand for float."""

    bits: int
    block_size: int


@dataclasses.dataclass(frozen=True)
class MixedPrecision(Pass):
    """Gives each weight the bits that cost the output least, within a budget; then works as QuantizeWeights does.

    1. The effect of each weight at each number of bits is measured on the model's own output, with only that weight
       quantized: mean Kullback-Leibler divergence for logits, relative squared error for other outputs.
    2. ``minimise sum of effects, subject to sum of costs <= budget, one option a weight`` is solved exactly
       (scipy.optimize.milp).
    3. Weights with the same input (Q, K, V; gate, up) share bits, so that fusions may merge them, and so do an
       embedding and the head tied to it.

    Pays like QuantizeWeights: at the size of uniform 4 bits the output is closer to the original. Latency is that of
    single products for one row, measured on this machine.

    Refused: weights in the bodies of If and Loop (left float).

    Attributes:
        budget: in units of ``unit``.
        unit: bits a weight, scales and zero points included; bytes of all weights together; or latency, as a share of
            the float products' time.
        options: bits to choose from; 16 leaves a weight float.
        block_sizes: sizes of blocks to choose from.
        symmetric: as in QuantizeWeights.
        method: as in QuantizeWeights.
        accuracy_level: as in QuantizeWeights.
        scales: as in QuantizeWeights; with a byte each smaller blocks and more bits fit into the budget. Symmetric
            weights keep float ones.
        target: as in QuantizeWeights.
    """

    name: ClassVar[str] = "mixed-precision"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    budget: float = 5.25
    unit: Unit = "bits"
    options: tuple[int, ...] = (2, 4, 8, 16)
    block_sizes: tuple[int, ...] = (16, 32, 64, 128)
    symmetric: bool = False
    method: Method = "rtn"
    accuracy_level: Level = "auto"
    scales: Scales = "uint8"
    target: float = 0.5

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        groups = self._groups(model, outcome)
        if not groups:
            return outcome
        options = [Option(bits, size) for bits in self.options if bits != FLOAT for size in self.block_sizes]
        options += [Option(FLOAT, 0)] if FLOAT in self.options else []
        costs = np.array([[self._cost(group, option, context) for option in options] for group in groups])
        numbers = sum(weight.outputs * weight.inputs for group in groups for weight in group)
        scale = {"bits": numbers / 8, "bytes": 1.0, "latency": self._float_time(groups, context)}[self.unit]
        if costs.min(axis=1).sum() > self.budget * scale:
            raise PassError(
                f"The budget of {self.budget:g} ({self.unit}) is below the cheapest options together, "
                f"{costs.min(axis=1).sum() / scale:.3g}.",
                "Raise it, or allow fewer bits or larger blocks.",
            )
        effect = OutputEffect(model, effect_samples(model, context), context.device, context.threads)
        effects = _effects(model, groups, options, self.symmetric, effect, context)
        picked = solve(effects, costs, self.budget * scale)
        choices = [
            self._choice(weight, options[index])
            for group, index in zip(groups, picked, strict=True)
            for weight in group
        ]
        choices = usable(model, choices, "operator", outcome)
        if not choices:
            return outcome
        predicted = sum(effects[row, index] for row, index in enumerate(picked))
        spent = sum(costs[row, index] for row, index in enumerate(picked)) / scale
        tally = Counter(_words(options[index]) for index in picked)
        outcome.notes.append(
            f"{spent:.4g} of {self.budget:.4g} ({self.unit}); groups of weights: "
            + ", ".join(f"{count} x {words}" for words, count in sorted(tally.items()))
        )
        quantize(
            model,
            choices,
            context,
            outcome,
            by=self.name,
            method=self.method,
            form="operator",
            target=self.target,
            level=self.accuracy_level,
            scales=self._scales,
        )
        outcome.notes.append(f"effect on {effect.output!r}: predicted {predicted:.3g}, measured {effect(model):.3g}")
        return outcome

    def _groups(self, model: ir.Model, outcome: Outcome) -> list[list[Weight]]:
        """Weights that share bits."""
        weights = [weight for weight in find_weights(model, outcome) if weight.linears or weight.gathers]
        outside = [weight for weight in weights if weight.value.graph is not model.graph]
        for weight in outside:
            anchor = [linear.node for linear in weight.linears] + weight.gathers
            outcome.refuse(anchor[0], "bits by effect", f"{weight.name} lies in the body of an If or Loop")
        weights = [weight for weight in weights if weight not in outside]
        groups = [group for _, group in groups_by_input([w for w in weights if w.linears], model.graph)]
        grouped = {weight for group in groups for weight in group}
        return groups + [[weight] for weight in weights if weight not in grouped]

    def _cost(self, group: Sequence[Weight], option: Option, context: PassContext) -> float:
        if self.unit != "latency":
            return sum(self._choice(weight, option).bytes for weight in group)
        device, threads = context.device, context.threads
        return sum(
            product_seconds(weight.outputs, weight.inputs, option.bits, option.block_size, device, threads)
            for weight in group
            for _ in weight.linears
        )

    def _float_time(self, groups: Sequence[Sequence[Weight]], context: PassContext) -> float:
        if self.unit != "latency":
            return 1.0
        return sum(self._cost(group, Option(FLOAT, 0), context) for group in groups)

    @property
    def _scales(self) -> Scales:
        return "float" if self.symmetric else self.scales

    def _choice(self, weight: Weight, option: Option) -> Choice:
        bits = option.bits if weight.linears else FLOAT
        table = option.bits if weight.gathers else FLOAT
        return Choice(weight, bits, table, option.block_size, self.symmetric, self._scales)


def solve(effects: Array, costs: Array, budget: float) -> list[int]:
    """For each row the option (column) such that the sum of effects is least and that of costs within the budget.

    Args:
        effects: [rows, options]; what is not finite is worse than all that is.
        costs: [rows, options].
        budget: at least the sum of the rows' smallest costs.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    rows, options = effects.shape
    one_each = np.kron(np.eye(rows), np.ones(options))
    finite = np.isfinite(effects)
    scale = max(float(np.abs(effects[finite]).max(initial=0.0)), 1e-30)
    effects = np.where(finite, effects, 2 * rows * scale)
    found = milp(
        effects.reshape(-1) / scale,
        integrality=np.ones(rows * options),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs.reshape(1, -1) / budget, -np.inf, 1)],
    )
    if found.x is None:
        raise PassError(f"No choice was found within the budget: {found.message}", "Raise the budget.")
    return [int(index) for index in found.x.reshape(rows, options).argmax(axis=1)]


def _effects(
    model: ir.Model,
    groups: Sequence[Sequence[Weight]],
    options: Sequence[Option],
    symmetric: bool,
    effect: OutputEffect,
    context: PassContext,
) -> Array:
    """The output's change with one group of weights at one option, [groups, options].

    One session with the weights as inputs serves all, so that nothing is loaded or packed again.
    """
    swap = Swap(model, [weight.value for group in groups for weight in group], effect, context.threads)
    table = np.zeros((len(groups), len(options)))
    for row, group in enumerate(groups):
        context.progress(f"effect of {row + 1}/{len(groups)}: {group[0].name}")
        for column, option in enumerate(options):
            if option.bits == FLOAT:
                continue
            changes: dict[str, Array] = {}
            for weight in group:
                matrix = weight.matrix()
                grid = searched_grid(matrix, option.bits, option.block_size, symmetric)
                changes[weight.name] = weight.stored(grid.decode(grid.round(matrix))).numpy()
            table[row, column] = swap(changes)
    return table


def _words(option: Option) -> str:
    return "float" if option.bits == FLOAT else f"{option.bits} bits in blocks of {option.block_size}"
