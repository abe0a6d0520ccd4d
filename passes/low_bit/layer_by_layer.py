"""GPTQ and AWQ over a whole model: layer by layer, each on the inputs that calibration samples give it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds
from ...compiler.graph import Array, Names
from .awq import Upstream, awq_scales, fold_into_constants
from .blockwise import minmax_grid, searched_grid
from .gptq import Fit, Inputs, asymmetric_target, fit
from .linear_weights import Weight
from .nbits_nodes import Coded
from .streams import MASK, Stream, same_values, stage_order, token_rows

_MEMORY = 64 << 20  # bytes of activations kept in memory per stream
_LARGE = 1 << 18
_ROUNDS = 2  # of new scales and coordinate descent after GPTQ; more gained nothing on held-out text


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted of one weight."""

    weight: Weight
    bits: int
    block_size: int
    symmetric: bool


@dataclasses.dataclass
class Losses:
    """Layer losses against plain rounding, for the report.

    Attributes:
        ratios: weight name -> loss / loss of plain rounding on the calibration samples.
        thin: names of weights with fewer tokens than inputs.
        tokens: calibration tokens.
    """

    ratios: dict[str, float] = dataclasses.field(default_factory=lambda: dict[str, float]())
    thin: list[str] = dataclasses.field(default_factory=lambda: list[str]())
    tokens: int = 0

    def notes(self) -> list[str]:
        """Lines for the report."""
        if not self.ratios:
            return []
        values = sorted(self.ratios.values())
        worst = max(self.ratios, key=self.ratios.__getitem__)
        kept = sum(value >= 1 for value in values)
        lines = [
            f"layer loss / that of plain rounding on {self.tokens} calibration tokens: median "
            f"{values[len(values) // 2]:.2f}, largest {values[-1]:.2f} ({worst}); "
            f"plain rounding kept in {kept} of {len(values)}"
        ]
        if self.thin:
            lines.append(
                f"{len(self.thin)} layers have fewer calibration tokens ({self.tokens}) than inputs, {self.thin[0]} "
                "for one: their Hessians are damped; more samples would help"
            )
        return lines


def gptq_codes(
    model: ir.Model,
    groups: Mapping[ir.Value, Sequence[Request]],
    feeds: Iterable[Feeds],
    target: float,
    threads: int,
    progress: Callable[[str], None],
) -> tuple[dict[Weight, Coded], Losses]:
    """Codes for the weights in ``groups``, in the order in which the graph runs.

    Inputs come from the prefix as it is after quantization; where ``target`` is above 0 the original's inputs are
    collected beside them, and the weight aims at the original's outputs. One Hessian at a time; activations between
    two layers are all that is kept of the samples.

    Args:
        model: the model; not changed.
        groups: input value -> what is wanted of the weights that multiply it.
        feeds: calibration samples.
        target: 0 aims at ``W x'`` on the quantized prefix, 1 at the original's ``W x``.
        threads: intra-op threads, 0 for ONNX Runtime's default.
        progress: called for each layer.
    """
    masks = [{name: sample[name] for name in sample if name == MASK} for sample in feeds]
    stages = stage_order(model, groups)
    work = model.clone()
    quantized = Stream(work, same_values(work, stages), feeds, _MEMORY, threads)
    original = Stream(model, stages, feeds, _MEMORY, threads) if target > 0 else None
    initializers = work.graph.initializers
    coded: dict[Weight, Coded] = {}
    losses = Losses()
    for number, x in enumerate(stages):
        progress(f"GPTQ {number + 1}/{len(stages)}: {groups[x][0].weight.name}")
        hessian, cross, tokens = _moments(quantized.advance(number), original and original.advance(number), masks)
        inputs = Inputs(hessian)
        losses.tokens = max(losses.tokens, tokens)
        for request in groups[x]:
            weight = request.weight
            found = _fit(weight.matrix(), inputs, cross, target, request)
            coded[weight] = Coded(found.codes, found.grid)
            losses.ratios[weight.name] = found.loss / found.rounded if found.rounded > 0 else 1.0
            if tokens < weight.inputs:
                losses.thin.append(weight.name)
            if x is not stages[-1]:  # nothing is run behind that
                initializers[weight.name].const_value = weight.stored(found.grid.decode(found.codes))
        for request in groups[stages[number - 1]] if number else ():  # behind the frontier: nobody reads it any more
            initializers[request.weight.name].const_value = request.weight.value.const_value
    return coded, losses


def awq_codes(
    model: ir.Model,
    groups: Mapping[ir.Value, Sequence[Request]],
    feeds: Iterable[Feeds],
    threads: int,
    progress: Callable[[str], None],
) -> tuple[dict[Weight, Coded], list[str]]:
    """Codes for the weights in ``groups``, and notes. Scales are folded into ``model`` where something can take them.

    Where the layer in front takes them (the up projection in front of the down projection) its codes stay and its
    scales are divided, which is exact; if it is not quantized, its weight is divided.
    """
    masks = [{name: sample[name] for name in sample if name == MASK} for sample in feeds]
    stages = stage_order(model, groups)
    untouched = model.clone()
    stream = Stream(untouched, same_values(untouched, stages), feeds, _MEMORY, threads)
    names = Names(model)
    coded: dict[Weight, Coded] = {}
    owners = {linear.node.outputs[0]: r.weight for rs in groups.values() for r in rs for linear in r.weight.linears}
    reasons: list[str] = []
    for number, x in enumerate(stages):
        requests = groups[x]
        progress(f"AWQ {number + 1}/{len(stages)}: {requests[0].weight.name}")
        hessian, magnitude = _second_and_first(stream.advance(number), masks)
        matrices = [request.weight.matrix() for request in requests]
        readers = {linear.node for request in requests for linear in request.weight.linears}
        upstream = Upstream(x, readers)
        owner = owners.get(upstream.product) if upstream.product is not None else None
        if upstream.product is not None and (owner is None or len(owner.linears) > 1 or owner.others or owner.gathers):
            upstream.reason = f"the layer in front of {x.name} is not quantized, or its weight is shared"
        if len({(r.bits, r.block_size, r.symmetric) for r in requests}) > 1 or any(r.weight.others for r in requests):
            upstream.reason = f"the weights of {x.name} are also read by others, or have different bits"
        if any(r.weight.gathers for r in requests):
            upstream.reason = f"{requests[0].weight.name} is also the embedding"
        first = requests[0]
        if upstream.reason:
            reasons.append(upstream.reason)
            scales = np.ones(len(magnitude), np.float32)
        else:
            scales = awq_scales(matrices, hessian, magnitude, first.bits, first.block_size, first.symmetric)
        for request, matrix in zip(requests, matrices, strict=True):
            scaled = matrix * scales
            importance = np.diagonal(hessian) / scales**2
            grid = searched_grid(scaled, request.bits, request.block_size, request.symmetric, importance)
            coded[request.weight] = Coded(grid.round(scaled), grid)
        if (scales == 1).all():
            continue
        fold_into_constants(upstream.constants, scales, names)
        if owner is not None:
            grid = coded[owner].grid
            grid = dataclasses.replace(grid, scales=grid.scales / scales[:, None])
            coded[owner] = Coded(coded[owner].codes, grid)
    notes = [f"{len(stages) - len(reasons)} of {len(stages)} inputs scaled"]
    if reasons:
        notes.append(f"not scaled, for one: {reasons[0]}")
    return coded, notes


def _second_and_first(arrays: Iterable[Array], masks: Sequence[Feeds]) -> tuple[Array, Array]:
    """X X^T and the mean |x_j|."""
    hessian = magnitude = np.zeros(())
    tokens = 0
    for mask, array in zip(masks, arrays, strict=True):
        rows = token_rows(array, mask)
        tokens += len(rows)
        hessian = hessian + (rows.T @ rows).astype(np.float64)
        magnitude = magnitude + np.abs(rows).sum(axis=0, dtype=np.float64)
    return hessian, magnitude / max(tokens, 1)


def _fit(matrix: Array, inputs: Inputs, cross: Array | None, target: float, request: Request) -> Fit:
    """From the grid of least error weighted by the inputs; small weights also from that of plain rounding."""
    bits, size, symmetric = request.bits, request.block_size, request.symmetric
    if cross is not None:
        matrix = asymmetric_target(matrix, inputs, cross, target)
    plain = minmax_grid(matrix, bits, size, symmetric)
    starts = [searched_grid(matrix, bits, size, symmetric, np.diagonal(inputs.damped))]
    return fit(matrix, inputs, plain, starts if matrix.size > _LARGE else [*starts, plain], _ROUNDS)


def _moments(
    quantized: Iterable[Array], original: Iterable[Array] | None, masks: Sequence[Feeds]
) -> tuple[Array, Array | None, int]:
    """Xq Xq^T, (Xf - Xq) Xq^T (None without originals) and the number of tokens, summed sample by sample."""
    hessian = cross = None
    tokens = 0
    others = iter(original) if original is not None else None
    for mask, array in zip(masks, quantized, strict=True):
        rows = token_rows(array, mask)
        tokens += len(rows)
        product = (rows.T @ rows).astype(np.float64)
        hessian = product if hessian is None else hessian + product
        if others is not None:
            difference = ((token_rows(next(others), mask) - rows).T @ rows).astype(np.float64)
            cross = difference if cross is None else cross + difference
    if hessian is None:
        raise ValueError("no samples")
    return hessian, cross, tokens
