"""Whole layers left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Gate, Outcome, Pass, PassContext
from ...compiler.graph import Array, weight_bytes
from ...runtime.errors import PassError
from ...runtime.inference import expose, open_session, run_session, session_options
from ..linear_layers import LinearLayer
from ..low_bit.output_effect import OutputEffect, effect_samples
from ..low_bit.streams import PATIENT, token_rows
from .blocks import Half, blocks_of, residual_stream, runs
from .bypass import bypass, drop_caches
from .fit import Refit, Task, fit, outside_bias, weight_matrix
from .statistics import needs_samples

DEPTH_KEY = "onnxlathe.depth"
"""Metadata of a model whose depth was cut: ``"4 of 6 blocks"``; it is not cut again."""
Method = Literal["influence", "greedy", "replace"]
What = Literal["blocks", "attention", "ffn"]


@dataclasses.dataclass(frozen=True)
class PruneDepth(Pass):
    """Leaves out the blocks that change the output least, or only their attention or feed-forward halves.

    1. ``s1 = s0 + branch(s0) -> s1 = s0``, where only the addition reads the branch; with normalization behind the
       addition (post-normalization) this goes too. Fused residual normalizations likewise.
    2. Caches of attention that went are inputs and outputs no more; those of the layers left are numbered anew.
    3. ``"replace"``: the last layer in front of what went is fitted, by least squares on the samples, to give the
       stream behind it; the normalization in front takes over the scale and bias of the last one that went.

    Blocks are found by their residual stream, with no names and no kind of model known. ``"influence"`` leaves out what
    turns the stream least, ``1 - E cos(s0, s1)``; ``"greedy"`` and ``"replace"`` one after the other what changes the
    output least (``OutputEffect``), measured again each time.

    Refused: models without a chain of residual additions. A model that was cut is not cut again.

    Pays in bytes and time everywhere, by what went. Sources: Men et al., ShortGPT (2403.03853); Sandri et al., 2SSP
    (2501.17771); Shopkhoev et al., ReplaceMe (2505.02819), whose linear map is folded into the last layer here, all of
    which is fitted.

    Attributes:
        layers: how many blocks (or halves) go.
        ratio: where ``layers`` is None: the share of them that goes.
        method: see above.
        what: whole blocks, or only their attention, or only their feed-forward halves.
    """

    name: ClassVar[str] = "prune-depth"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    changes_signature: ClassVar[bool] = True
    layers: int | None = None
    ratio: float = 1 / 6
    method: Method = "replace"
    what: What = "blocks"

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers is at least 1, not {self.layers}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio lies between 0 and 1, not {self.ratio}")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        if DEPTH_KEY in model.metadata_props:
            return outcome
        halves = residual_stream(model)
        units = units_of(halves, self.what)
        if len(units) < 2:
            node = next(iter(model.graph), None)
            if node is not None:
                outcome.refuse(node, "depth", f"there is no chain of two or more {self.what} on a residual stream")
            return outcome
        needs_samples(context, self.name)
        count = self.layers if self.layers is not None else max(1, round(self.ratio * len(units)))
        if count >= len(units):
            raise PassError(
                f"Leaving out {count} of {len(units)} {self.what} leaves none.", "Lower layers or ratio of prune-depth."
            )
        before = weight_bytes(model)
        picked = self._picked(model, halves, units, count, context)
        gone = {half for unit in picked for half in units[unit]}
        fits = leave_out(model, halves, gone, context, self.name, self.method == "replace")
        model.metadata_props[DEPTH_KEY] = f"{len(units) - count} of {len(units)} {self.what}"
        outcome.counts[f"{self.what} left out"] = count
        outcome.notes.append(f"{self.what} left out, counted from 0: {', '.join(map(str, sorted(picked)))}")
        if fits:
            lines = [f"{item.name}: {item.dropped:.2g} -> {item.fitted:.2g}" for item in fits]
            outcome.notes.append(f"error of the stream, without and with the fit: {'; '.join(lines)}")
        outcome.notes.append(f"bytes of weights: {weight_bytes(model) / before:.0%} of before")
        return outcome

    def _picked(
        self, model: ir.Model, halves: Sequence[Half], units: Sequence[Sequence[Half]], count: int, context: PassContext
    ) -> list[int]:
        if self.method == "influence":
            order = np.argsort(influence(model, units, context), kind="stable")
            return [int(unit) for unit in order[:count]]
        effect = OutputEffect(model, effect_samples(model, context), context.device, context.threads)
        picked: list[int] = []
        for number in range(count):
            effects: dict[int, float] = {}
            for unit in range(len(units)):
                if unit in picked:
                    continue
                context.progress(f"{self.name}: {number + 1} of {count}, effect of {unit + 1}/{len(units)}")
                gone = [half for one in (*picked, unit) for half in units[one]]
                effects[unit] = effect(without(model, halves, gone))
            picked.append(min(effects, key=effects.__getitem__))
        return picked


def units_of(halves: Sequence[Half], what: What) -> list[list[Half]]:
    """What can be left out: blocks as lists of halves, or single halves of one kind."""
    if what == "blocks":
        return blocks_of(halves)
    return [[half] for half in halves if half.kind == what]


def without(model: ir.Model, halves: Sequence[Half], gone: Sequence[Half]) -> ir.Model:
    """A copy of the model in which the stream passes by ``gone``; it takes and gives what the model does."""
    copy = model.clone()
    twins = dict(zip(halves, residual_stream(copy), strict=True))
    for run in list(runs(list(twins.values()), {twins[half] for half in gone})):
        bypass(copy, run, PruneDepth.name)
    return copy


def influence(model: ir.Model, units: Sequence[Sequence[Half]], context: PassContext) -> Array:
    """How much each unit turns the stream: 1 - the mean cosine between before and after it, over all tokens."""
    pairs = [(unit[0].skip.name or "", unit[-1].out.name or "") for unit in units]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    options = session_options(threads=context.threads, ort_config=PATIENT)
    session = open_session(expose(model, names), options, context.device)
    total, count = np.zeros(len(units)), 0
    for number, sample in enumerate(context.feeds):
        context.progress(f"{PruneDepth.name}: influence of blocks, sample {number + 1}")
        rows = {name: token_rows(array, sample) for name, array in run_session(session, sample, names).items()}
        for unit, (before, after) in enumerate(pairs):
            a, b = rows[before], rows[after]
            lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            total[unit] += float(((a * b).sum(axis=1) / np.maximum(lengths, 1e-30)).sum())
        count += len(rows[names[0]])
    return 1.0 - total / max(count, 1)


def leave_out(
    model: ir.Model, halves: Sequence[Half], gone: set[Half], context: PassContext, by: str, fitting: bool
) -> list[Refit]:
    """Takes halves out of the model, in place.

    Args:
        model: the model.
        halves: its ``residual_stream``.
        gone: which of them go.
        context: samples.
        by: name of the pass.
        fitting: whether the layers before them are fitted to what went.
    """
    original = model.clone() if fitting else model
    made = {value.name: value for node in original.graph for value in node.outputs}
    planned: list[tuple[Half, LinearLayer, tuple[ir.Value, ir.Value], Array | None]] = []
    for run in list(runs(halves, gone)):
        index, last = halves.index(run[0]), run[-1]
        previous = halves[index - 1] if index else None
        layer = previous.layer if previous is not None and fitting else None
        if previous is not None and layer is not None:
            offset = outside_bias(last.layer) if last.layer is not None else None
            planned.append((previous, layer, (made[last.skip.name], made[last.branch.name]), offset))
        bypass(model, run, by, previous.norm if previous is not None and layer is not None else None)
    tasks: list[Task] = []
    for previous, layer, target, offset in planned:
        x, skip = layer.node.inputs[0], previous.add.inputs[int(previous.add.inputs[0] is previous.branch)]
        if x is not None:
            tasks.append(Task(layer, x, np.arange(weight_matrix(layer).shape[1]), target, skip, offset))
    fits = fit(original, model, tasks, context, by)
    drop_caches(model, gone)
    return fits
