"""Moments of what layers read, with samples streaming through the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds, PassContext
from ...compiler.graph import Array, is_op
from ...runtime.errors import PassError
from ..linear_layers import LinearLayer
from ..low_bit.streams import MASK, ArrayStore, Stream, stage_order, token_rows

_MEMORY = 192 << 20  # bytes of activations kept in memory per stream


class Moments:
    """First and second moments of a layer's input x [K] and, if there is one, of a target t [N]."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Array = np.zeros(())
        self._target: Array = np.zeros(())
        self._square: Array = np.zeros(())
        self._cross: Array = np.zeros(())
        self._power = 0.0

    def update(self, x: Array, target: Array | None = None) -> None:
        """Takes in rows of x [rows, K] and of t [rows, N]."""
        # Squared in float32, deviations that are small beside their mean would end as negative variances.
        x = x.astype(np.float64)
        self.count += len(x)
        self._sum = self._sum + x.sum(axis=0)
        self._square = self._square + x.T @ x
        if target is not None:
            self._target = self._target + target.sum(axis=0, dtype=np.float64)
            self._cross = self._cross + target.T.astype(np.float64) @ x
            self._power += float(np.square(target, dtype=np.float64).sum())

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        both = Moments()
        both.count = self.count + other.count
        both._sum, both._square = self._sum + other._sum, self._square + other._square
        both._target, both._cross = self._target + other._target, self._cross + other._cross
        both._power = self._power + other._power
        return both

    def mean(self) -> Array:
        """E x."""
        return self._sum / self.count

    def target_mean(self) -> Array:
        """E t."""
        return self._target / self.count

    def covariance(self, centred: bool) -> Array:
        """E x x^T, about the mean where ``centred``."""
        square = self._square / self.count
        return square - np.outer(self.mean(), self.mean()) if centred else square

    def cross(self, centred: bool) -> Array:
        """E t x^T, likewise."""
        cross = self._cross / self.count
        return cross - np.outer(self.target_mean(), self.mean()) if centred else cross

    def power(self, centred: bool) -> float:
        """E |t|^2, likewise."""
        power = self._power / self.count
        return power - float(np.square(self.target_mean()).sum()) if centred else power


def require_finite(name: str | None, *sums: Array | float | None) -> None:
    """Raises PassError where what was summed up over a layer's inputs or targets is NaN or infinite."""
    if not all(np.isfinite(item).all() for item in sums if item is not None):
        raise PassError(
            f"What the layer of {name} reads, or what it is to give, is NaN or infinite on the calibration samples.",
            "Leave out those samples, or the layers behind what makes them (exclude=...).",
        )


def needs_samples(context: PassContext, name: str) -> None:
    """Raises PassError where there are no calibration samples."""
    if next(iter(context.feeds), None) is None:
        raise PassError(f"{name} needs calibration samples.", "Give calibration=... (--calibration x.npz).")


def masks_of(context: PassContext) -> list[Feeds]:
    """Of each sample what says which tokens are padding."""
    return [{name: sample[name] for name in sample if name == MASK} for sample in context.feeds]


def moments_of(
    model: ir.Model, layers: Sequence[tuple[ir.Value, LinearLayer]], context: PassContext
) -> Iterator[tuple[ir.Value, Moments]]:
    """The moments of the distinct inputs of layers, one after the other, in the order of the graph.

    Args:
        model: the model.
        layers: each layer with its input.
        context: samples.
    """
    reader = dict(layers)
    stages = stage_order(model, reader)
    masks = masks_of(context)
    stream = Stream(model, stages, context.feeds, _MEMORY, context.threads)
    for number, x in enumerate(stages):
        context.progress(f"statistics {number + 1}/{len(stages)}: {x.name}")
        moments = Moments()
        for mask, array in zip(masks, stream.advance(number), strict=True):
            moments.update(input_rows(reader[x], array, mask))
        require_finite(reader[x].weight.name, moments.covariance(False))
        yield x, moments


class Walk:
    """Samples on their way through a model, of which the values that steps ask for are kept until their last step.

    Args:
        model: the model; its weights may change behind the point reached.
        needs: for each step the values it looks at.
        context: samples.
    """

    def __init__(self, model: ir.Model, needs: Sequence[Sequence[ir.Value]], context: PassContext) -> None:
        self._needs = [{value.name or "" for value in values} for values in needs]
        stages = stage_order(model, dict.fromkeys(value for values in needs for value in values))
        self._stages = [value.name or "" for value in stages]
        self._stream = Stream(model, stages, context.feeds, _MEMORY, context.threads)
        self._store = ArrayStore(_MEMORY)
        self._reached = 0

    def reach(self, step: int) -> None:
        """Goes on until everything that ``step`` looks at was seen."""
        ahead = set[str]().union(*self._needs[step:])
        self._store.keep_only(ahead)
        while not self._needs[step] <= set(self._stages[: self._reached]):
            name = self._stages[self._reached]
            for sample, array in enumerate(self._stream.advance(self._reached)):
                if name in ahead:
                    self._store.put(sample, name, array)
            self._reached += 1

    def get(self, sample: int, value: ir.Value) -> Array:
        """What ``value`` (of this model, or of one with the same names) is for a sample."""
        return self._store.get(sample, value.name or "")


def input_rows(layer: LinearLayer, array: Array, mask: Feeds) -> Array:
    """What the layer multiplies: [rows, inputs], padding left out; patches for a Conv."""
    return layer.rows(array)[0] if is_op(layer.node, "Conv") else token_rows(array, mask)


def output_rows(layer: LinearLayer, array: Array, mask: Feeds) -> Array:
    """What the layer makes, or something of that shape: [rows, outputs], in the order of ``input_rows``."""
    if is_op(layer.node, "Conv"):
        return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])
    return token_rows(array, mask)
