"""Hidden units, heads and channels left out, so that products become smaller."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import Array, weight_bytes
from ...runtime.errors import PassError
from .coupling import Coupling
from .coupling_rules import coupling_of
from .cut import cut
from .fit import Refit, bias_place, mask, problem_of, refit
from .module_times import relative_time
from .obs import Problem, Ranking, activation_scores, magnitude_scores, rank_by, rank_by_obs
from .statistics import Moments, moments_of, needs_samples
from .units import Dimension, Kind

Method = Literal["obs", "magnitude", "activation"]
WIDTH_KEY = "onnxlathe.width"
"""Metadata of a layer whose inputs were cut: ``"768 of 1536"``; it is not cut again."""
_RULE = "width"
_STEPS = 6
_MOST = 0.9
_WORDS: dict[Kind, str] = {"ffn": "hidden units", "heads": "heads", "channels": "channels"}


@dataclasses.dataclass(frozen=True)
class PruneWidth(Pass):
    """Leaves out the hidden units, heads and channels that matter least; what is left makes up for them.

    1. Feed-forward layers, plain and gated: columns of the last product, with the rows of those before that make them.
    2. Attention: whole heads, with grouped queries whole key/value heads with the query heads that read them; fused
       (MultiHeadAttention, GroupQueryAttention, Attention) or as exported. The caches become as narrow.
    3. Convolutions: output channels with all that read them, through residual additions, Concat and depthwise layers.

    What belongs together is found by following axes from node to node (``coupling.py``), before or after fusion, with
    no kind of model known. Without ``refit`` the result computes what the model computes with the columns of what was
    left out set to zero.

    ``"obs"`` removes one unit after the other, each time that of least loss after all others made up for it
    (``obs.py``); ``"activation"`` ranks by the variance that a unit adds to the output; ``"magnitude"`` by the length
    of its columns. The refit is least squares on the samples, layer by layer on what the cut layers before give, about
    the means where there is a bias to take these up; an error in the residual stream is part of the target.

    Refused: axes that cannot be cut, by the node that stands in the way (a normalization over it, an output of the
    model, an operator that is not known); bodies of If and Loop. A layer that was cut is not cut again.

    Pays in bytes and time everywhere: products become smaller.

    Attributes:
        ratio: share of each layer's units that go.
        latency_target: instead of ``ratio``: the time wanted, as a share of that of the model as it is, measured with
            the first sample; the same share of all layers goes.
        bytes_target: instead of ``ratio``: the bytes of weights wanted, as a share of those of the model as it is.
        what: kinds of units.
        method: see above.
        refit: whether the weights that are left make up for what is gone.
        multiple: widths of feed-forward layers and channels are rounded up to multiples of it, where they have as many.
        exclude: names of weights (patterns of fnmatch) whose outputs stay.
    """

    name: ClassVar[str] = "prune-width"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    ratio: float = 0.2
    latency_target: float | None = None
    bytes_target: float | None = None
    what: tuple[str, ...] = ("ffn", "heads", "channels")
    method: Method = "obs"
    refit: bool = True
    multiple: int = 16
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        targets = {"ratio": self.ratio, "latency_target": self.latency_target, "bytes_target": self.bytes_target}
        for name, value in targets.items():
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} lies between 0 and 1, not {value}")
        if self.latency_target is not None and self.bytes_target is not None:
            raise ValueError("give latency_target or bytes_target, not both")
        unknown = set(self.what) - set(_WORDS)
        if unknown or not self.what:
            raise ValueError(f"what is some of {', '.join(_WORDS)}, not {', '.join(sorted(unknown)) or 'nothing'}")
        if self.multiple < 1:
            raise ValueError(f"multiple is at least 1, not {self.multiple}")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        coupling = coupling_of(model)
        found = self.dimensions(coupling, outcome)
        if not found:
            return outcome
        if self.method != "magnitude" or self.refit:
            needs_samples(context, self.name)
        ratio = self._ratio(model, found, context, outcome)
        searched = self.latency_target is not None or self.bytes_target is not None
        counts = [removed(item, ratio, self.multiple, keep_one=searched) for item in found]
        whole = [item for item, count in zip(found, counts, strict=True) if not count]
        found, counts = _nonempty(found, counts, outcome)
        if not found:
            return outcome
        if searched:  # a second run would ask for another share of what is left
            _mark_whole(whole)
        rankings = rank(model, found, counts, self.method, context)
        gone = np.concatenate([item.units[r.order[:n]] for item, r, n in zip(found, rankings, counts, strict=True)])
        before = weight_bytes(model)
        fits = apply(coupling, found, gone, context, self.name, self.refit)
        outcome.notes += notes(found, counts, fits)
        outcome.notes.append(f"bytes of weights: {weight_bytes(model) / before:.0%} of before")
        for item in found:
            outcome.counts[f"{_WORDS[item.kind]} of a layer cut"] += 1
        return outcome

    def dimensions(self, coupling: Coupling, outcome: Outcome) -> list[Dimension]:
        """What this pass would cut; near misses are refused."""
        for node, reason in coupling.obstacles():
            outcome.refuse(node, _RULE, reason)
        found: list[Dimension] = []
        for item in coupling.dimensions():
            done = any(WIDTH_KEY in consumer.layer.node.metadata_props for consumer in item.consumers)
            left_out = any(fnmatch.fnmatch(item.name, pattern) for pattern in self.exclude)
            if item.kind in self.what and not left_out and not done and len(item.units) > 1:
                found.append(item)
        return found

    def _ratio(self, model: ir.Model, found: Sequence[Dimension], context: PassContext, outcome: Outcome) -> float:
        """The ratio, or the smallest one found with which the target is met."""
        target = self.latency_target or self.bytes_target
        if target is None:
            return self.ratio
        names = {item.name for item in found}

        def reached(ratio: float) -> float:
            smaller = narrowed(model, names, ratio, self.multiple)
            if self.bytes_target is not None:
                return weight_bytes(smaller) / weight_bytes(model)
            context.progress(f"{self.name}: time with {ratio:.0%} left out")
            return relative_time(model, smaller, next(iter(context.feeds)), context)

        low, high = 0.0, _MOST
        if (least := reached(high)) > target:
            raise PassError(
                f"{self.name} reaches {least:.2f} of the model at most, not {target:.2f}.",
                "Ask for less, or prune the depth too (prune-depth, prune-adaptive).",
            )
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(middle) > target else (low, middle)
        outcome.notes.append(f"{high:.0%} of each layer's units go: {target:.2f} of the model was asked for")
        return high


def removed(item: Dimension, ratio: float, multiple: int, keep_one: bool = False) -> int:
    """How many units of a dimension go at this ratio.

    Raises:
        PassError: none would be left, and ``keep_one`` does not say that then one is.
    """
    count = len(item.units)
    left = round(count * (1 - ratio))
    if item.kind != "heads" and count >= 2 * multiple:
        left = math.ceil(count * (1 - ratio) / multiple - 1e-9) * multiple
    left = max(left, int(keep_one))
    if left < 1:
        raise PassError(
            f"A ratio of {ratio:g} leaves none of the {count} {_WORDS[item.kind]} made by {item.name}.",
            "Lower it, or exclude this layer (exclude=...).",
        )
    return count - min(left, count)


def narrowed(model: ir.Model, names: set[str], ratio: float, multiple: int) -> ir.Model:
    """A copy of the model as small as with this ratio; any units go."""
    copy = model.clone()
    coupling = coupling_of(copy)
    found = [item for item in coupling.dimensions() if item.name in names]
    gone = [item.units[: removed(item, ratio, multiple, keep_one=True)] for item in found]
    cut(coupling, np.concatenate(gone), PruneWidth.name)
    return copy


def rank(
    model: ir.Model,
    found: Sequence[Dimension],
    most: Sequence[int],
    method: Method,
    context: PassContext,
) -> list[Ranking]:
    """Each dimension's units from the most dispensable on, ``most`` of them."""
    if method == "magnitude":
        problems = [[problem_of(c, item.units, np.zeros((0, 0))) for c in item.consumers] for item in found]
        return [rank_by(magnitude_scores(items)) for items in problems]
    waiting: dict[ir.Value, Moments] = {}
    rankings: dict[str, Ranking] = {}
    layers = [(consumer.x, consumer.layer) for item in found for consumer in item.consumers]
    for x, moments in moments_of(model, layers, context):
        waiting[x] = moments
        for item, count in zip(found, most, strict=True):
            if item.name not in rankings and all(consumer.x in waiting for consumer in item.consumers):
                context.progress(f"ranking {count} of {len(item.units)}: {item.name}")
                problems = _problems(item, waiting)
                rankings[item.name] = (
                    rank_by_obs(problems, count) if method == "obs" else rank_by(activation_scores(problems))
                )
        needed = {c.x for item in found if item.name not in rankings for c in item.consumers}
        waiting = {value: kept for value, kept in waiting.items() if value in needed}
    return [rankings[item.name] for item in found]


def _problems(item: Dimension, moments: Mapping[ir.Value, Moments]) -> list[Problem]:
    return [problem_of(c, item.units, moments[c.x].covariance(bias_place(c.layer) is not None)) for c in item.consumers]


def apply(
    coupling: Coupling, found: Sequence[Dimension], gone: Array, context: PassContext, by: str, fitting: bool
) -> list[Refit]:
    """Masks or refits the consumers of ``found``, then cuts the units ``gone`` out of the coupling's model."""
    consumers = list({consumer.layer.node: consumer for item in found for consumer in item.consumers}.values())
    fits: list[Refit] = []
    if fitting:
        fits = refit(coupling.model, consumers, gone, context, by)
    else:
        mask(consumers, gone)
    for item in found:
        left = int((~np.isin(item.units, gone)).sum())
        for consumer in item.consumers:
            consumer.layer.node.metadata_props[WIDTH_KEY] = f"{left} of {len(item.units)}"
    cut(coupling, gone, by)
    return fits


def notes(found: Sequence[Dimension], counts: Sequence[int], fits: Sequence[Refit]) -> list[str]:
    """Lines for the report: how many units are left, and what the layers lost."""
    lines: list[str] = []
    for kind, words in _WORDS.items():
        items = [(len(d.units), n) for d, n in zip(found, counts, strict=True) if d.kind == kind]
        if items:
            total, less = sum(n for n, _ in items), sum(n for _, n in items)
            lines.append(f"{words}: {total - less} of {total} left in {len(items)} layers")
    if fits:
        drop, fit = (float(np.median([getattr(item, name) for item in fits])) for name in ("dropped", "fitted"))
        lines.append(f"error of the layers' outputs, median: {drop:.3g} of their energy dropped, {fit:.3g} refitted")
    return lines


def _mark_whole(dimensions: Sequence[Dimension]) -> None:
    """Marks layers of which nothing goes, so that a second run leaves them alone too."""
    for item in dimensions:
        for consumer in item.consumers:
            consumer.layer.node.metadata_props.setdefault(WIDTH_KEY, f"{len(item.units)} of {len(item.units)}")


def _nonempty(found: Sequence[Dimension], counts: Sequence[int], outcome: Outcome) -> tuple[list[Dimension], list[int]]:
    """Without the dimensions of which nothing goes."""
    for item, count in zip(found, counts, strict=True):
        if not count:
            outcome.refuse(item.makers[0], _RULE, f"its {len(item.units)} {_WORDS[item.kind]} are too few to cut")
    left = [(item, count) for item, count in zip(found, counts, strict=True) if count]
    return [item for item, _ in left], [count for _, count in left]
