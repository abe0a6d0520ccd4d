"""How sparse each weight shall be, so that all of them together have the share of zeros asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import PassContext
from ...compiler.graph import Array
from ..low_bit.mixed_precision import solve
from ..low_bit.output_effect import OutputEffect, Swap, effect_samples
from .sparse_layers import Prunable
from .sparse_solvers import Goal, shares
from .sparse_walk import Solve, original_moments, solve_groups

_MEASURED = (0.5, 0.75, 1.0, 1.25, 1.5)  # of the share of zeros asked for: where effects are measured
EFFECT_SAMPLES = 32
"""Effects of single weights are small: fewer samples than this, and noise decides between the weights."""
_STEP = 0.025
_MOST = 0.95


def uniform(weights: Sequence[Prunable], share: float) -> dict[Prunable, list[int]]:
    """The same share of zeros everywhere: weight -> how many zeros in each group."""
    return {weight: _by_group(weight, share) for weight in weights}


def below(weights: Sequence[Prunable], threshold: float) -> dict[Prunable, list[int]]:
    """As many zeros as there are weights smaller than ``threshold``."""
    return {weight: [int((np.abs(group) < threshold).sum()) for group in weight.matrix()] for weight in weights}


def by_magnitude(weights: Sequence[Prunable], share: float) -> dict[Prunable, list[int]]:
    """As many zeros as the weight has of the smallest numbers of all weights together; one number a group stays."""
    total = sum(weight.size for weight in weights)
    everything = np.concatenate([_protected(group) for weight in weights for group in weight.matrix()])
    smallest = np.argpartition(everything, max(round(share * total) - 1, 0))[: round(share * total)]
    chosen = np.zeros(total, bool)
    chosen[smallest] = True
    found: dict[Prunable, list[int]] = {}
    start = 0
    for weight in weights:
        groups = weight.matrix().shape[0]
        own = chosen[start : start + weight.size].reshape(groups, -1)
        found[weight] = [int(count) for count in own.sum(axis=1)]
        start += weight.size
    return found


def _protected(group: Array) -> Array:
    """Magnitudes of a group's numbers, the largest infinite, as something has to be left."""
    found = np.abs(group).reshape(-1)
    found[found.argmax()] = np.inf
    return found


def by_effect(
    model: ir.Model, weights: Sequence[Prunable], share: float, solver: Solve, context: PassContext
) -> tuple[dict[Prunable, list[int]], float]:
    """The shares for which the sum of the single weights' effects on the model's output is least, solved exactly.

    Effects are measured at five shares, with only that weight sparse, and interpolated between (their logarithm is
    nearly linear in the share); ``minimise sum of effects, subject to sum of zeros >= share``, by scipy.optimize.milp.

    Returns:
        weight -> how many zeros in each group, and the sum of effects predicted.
    """
    measured = np.array([min(share * factor, share + (factor - 1) * (1 - share)) for factor in _MEASURED])
    effect = OutputEffect(model, effect_samples(model, context, EFFECT_SAMPLES), context.device, context.threads)
    values = [value for weight in weights for value in (weight.value, weight.bias) if value is not None]
    swap = Swap(model, values, effect, context.threads)
    options = np.unique(np.append(np.arange(0, _MOST + _STEP / 2, _STEP), share))
    effects: dict[Prunable, Array] = {}
    for weight, moments in original_moments(model, weights, context):
        context.progress(f"effect of {len(effects) + 1}/{len(weights)}: {weight.name}")
        figures: list[float] = []
        for part in measured:
            goals = [Goal(zeros) for zeros in _by_group(weight, part)]
            changes = solve_groups(weight, goals, moments, solver, 0.0).tensors(weight)
            figures.append(swap({value.name or "": tensor.numpy() for value, tensor in changes.items()}))
        effects[weight] = _interpolated(measured, figures, options)
    table = np.array([effects[weight] for weight in weights])
    sizes = np.array([weight.size for weight in weights])
    nonzero = np.ceil(sizes[:, None] * (1 - options))
    picked = solve(table, nonzero, float(np.ceil((1 - share) * sizes).sum()))
    found = {weight: _by_group(weight, options[index]) for weight, index in zip(weights, picked, strict=True)}
    return found, float(sum(table[row, index] for row, index in enumerate(picked)))


def _interpolated(measured: Array, figures: Sequence[float], options: Array) -> Array:
    """Effects at ``options``: their logarithm piecewise linear, going on as it did at the ends; 0 without zeros."""
    logs = np.log(np.maximum.accumulate(np.maximum(figures, 1e-12)))
    found = np.interp(options, measured, logs)
    for end, inner, outside in ((0, 1, options < measured[0]), (-1, -2, options > measured[-1])):
        slope = (logs[end] - logs[inner]) / (measured[end] - measured[inner])
        found[outside] = logs[end] + slope * (options[outside] - measured[end])
    return np.where(options > 0, np.exp(found), 0.0)


def _by_group(weight: Prunable, share: float) -> list[int]:
    return shares(round(share * weight.size), weight.layers[0].groups)


def zeros_already(weight: Prunable) -> list[int]:
    """How many zeros each group of the weight has."""
    return [int((group == 0).sum()) for group in weight.matrix()]
