"""What QuantizeWeights and MixedPrecision share: the codes of their weights, and how they get into the graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, PassContext
from ...compiler.graph import remove_dead
from ...runtime.errors import PassError
from .accuracy_levels import Level, choose_levels, level_entry
from .blockwise import Grid, searched_grid
from .choices import FLOAT, Choice
from .hqq import hqq_grid
from .layer_by_layer import Request, awq_codes, gptq_codes
from .linear_weights import Weight, groups_by_input
from .nbits_nodes import Coded, Form, Writer
from .stored_scales import Scales

Method = Literal["rtn", "hqq", "awq", "gptq"]


def quantize(
    model: ir.Model,
    choices: Sequence[Choice],
    context: PassContext,
    outcome: Outcome,
    *,
    by: str,
    method: Method,
    form: Form,
    target: float,
    level: Level,
    scales: Scales = "float",
) -> None:
    """Carries out ``choices`` on ``model``: codes by ``method``, nodes in ``form``, then the accuracy levels.

    Raises:
        PassError: GPTQ or AWQ without calibration samples; scales of a byte where they have no zero points, or in qdq.
    """
    if scales == "uint8" and (form == "qdq" or any(choice.symmetric for choice in choices)):
        raise PassError(
            "scales='uint8' goes with form='operator' and symmetric=False only.",
            "Symmetric scales may be negative, and DequantizeLinear's are not fused if they are computed.",
        )
    original = model.clone() if level == "auto" else None
    coded = _codes(model, choices, context, outcome, method, target)
    writer = Writer(model, by, form, 4 if level == 4 else 0, scales)
    products: list[ir.Node] = []
    for choice in choices:
        weight = choice.weight
        same = choice.bits == choice.table_bits
        if weight.linears and choice.bits != FLOAT:
            products += writer.write(weight, coded[weight], linears=True, gathers=same)
            outcome.counts[f"{choice.bits}-bit products"] += len(weight.linears)
            if weight.others:
                outcome.notes.append(f"{weight.name} stays as well: {weight.others[0].name} reads it")
        if weight.gathers and choice.table_bits != FLOAT:
            if not (same and weight.linears):
                matrix = weight.matrix()
                grid = searched_grid(matrix, choice.table_bits, choice.block_size, choice.symmetric)
                writer.write(weight, Coded(grid.round(matrix), grid), linears=False, gathers=True)
            outcome.counts[f"{choice.table_bits}-bit tables"] += len(weight.gathers)
    coded.clear()  # a byte each, and written by now
    remove_dead(model)
    if original is not None and products:
        choose_levels(model, original, products, form, context, outcome)
    elif form == "qdq" and level == 0:
        outcome.ort_config = {"config_entries": level_entry(0)}


def _codes(
    model: ir.Model,
    choices: Sequence[Choice],
    context: PassContext,
    outcome: Outcome,
    method: Method,
    target: float,
) -> dict[Weight, Coded]:
    wanted = [choice for choice in choices if choice.weight.linears and choice.bits != FLOAT]
    requests = {c.weight: Request(c.weight, c.bits, c.block_size, c.symmetric) for c in wanted}
    coded: dict[Weight, Coded] = {}
    if method in ("awq", "gptq"):
        if next(iter(context.feeds), None) is None:
            raise PassError(
                f"{method.upper()} needs calibration samples.",
                "Give compile(..., calibration=...) (--calibration), or choose method='hqq' or 'rtn', which need none.",
            )
        grouped = groups_by_input(list(requests), model.graph)
        groups = {x: [requests[weight] for weight in weights] for x, weights in grouped}
        if method == "gptq":
            coded, losses = gptq_codes(model, groups, context.feeds, target, context.threads, context.progress)
            outcome.notes += losses.notes()
        else:
            coded, notes = awq_codes(model, groups, context.feeds, context.threads, context.progress)
            outcome.notes += notes
        gc.collect()  # the parts of graphs that samples ran through: cycles, whose collector a compile pauses
        rest = [weight.name for weight in requests if weight not in coded]
        if rest:
            outcome.notes.append(
                f"{len(rest)} weights rounded instead, {rest[0]} for one: in a body, or with several inputs"
            )
    for number, (weight, request) in enumerate(requests.items()):
        if weight not in coded:
            context.progress(f"{number + 1}/{len(requests)}: {weight.name}")
            coded[weight] = _without_samples(request, "hqq" if method == "hqq" else "rtn")
    return coded


def _without_samples(request: Request, method: Literal["rtn", "hqq"]) -> Coded:
    matrix = request.weight.matrix()
    make: Callable[[np.ndarray, int, int, bool], Grid] = hqq_grid if method == "hqq" else searched_grid
    grid = make(matrix, request.bits, request.block_size, request.symmetric)
    return Coded(grid.round(matrix), grid)
