"""What QuantizeWeights and MixedPrecision share: which weights get which bits, their codes, and the accuracy level."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...compiler.base import Feeds, Outcome, PassContext
from ...compiler.graph import opset, remove_dead
from ...runtime.errors import ModelError, PassError
from ...runtime.feeds import make_feeds
from .blockwise import Grid, searched_grid, stored_bytes
from .hqq import hqq_grid
from .layer_by_layer import Request, awq_codes, gptq_codes
from .linear_weights import Weight, find_weights, groups_by_input
from .nbits_nodes import QDQ_OPSET, Coded, Form, Writer
from .output_effect import OutputEffect

Method = Literal["rtn", "hqq", "awq", "gptq"]
Level = Literal["auto", 0, 4]
FLOAT = 16
"""The number of bits that stands for: left as it is."""
_RULE = "constant weight -> low bits"
_EFFECT_SAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one weight becomes: bits of its products and of its lookups (16: left float), and the block size."""

    weight: Weight
    bits: int
    table_bits: int
    block_size: int
    symmetric: bool

    @property
    def bytes(self) -> int:
        """Bytes stored afterwards; one copy where lookups and products share bits."""
        weight = self.weight
        wanted = {self.bits} if weight.linears else set[int]()
        wanted |= {self.table_bits} if weight.gathers else set[int]()
        return sum(weight_bytes_at(weight, bits, self.block_size, self.symmetric) for bits in wanted)


def weight_bytes_at(weight: Weight, bits: int, block_size: int, symmetric: bool) -> int:
    """Bytes of ``weight`` at ``bits``; 16 stands for as it is."""
    if bits == FLOAT:
        tensor = weight.value.const_value
        return tensor.nbytes if tensor is not None else 0
    return stored_bytes((weight.outputs, weight.inputs), bits, block_size, symmetric)


def usable(model: ir.Model, choices: Iterable[Choice], form: Form, outcome: Outcome) -> list[Choice]:
    """The choices that can be carried out and save bytes; the others are refused by name."""
    kept: list[Choice] = []
    for choice in choices:
        weight, bits = choice.weight, min(choice.bits, choice.table_bits)
        anchor = [linear.node for linear in weight.linears] + weight.gathers
        if bits == FLOAT or not anchor:
            continue
        reason = ""
        float_bytes = weight_bytes_at(weight, FLOAT, 0, False)
        if weight_bytes_at(weight, bits, choice.block_size, choice.symmetric) >= float_bytes:
            reason = f"{weight.name} [{weight.outputs}, {weight.inputs}] would not get smaller"
        elif form == "qdq" and weight.linears and choice.bits != FLOAT and opset(model) < QDQ_OPSET[choice.bits]:
            reason = f"DequantizeLinear takes blocks of {choice.bits} bits from opset {QDQ_OPSET[choice.bits]} on: "
            reason += "run upgrade-opset first"
        elif form == "qdq" and weight.value.dtype != ir.DataType.FLOAT:
            reason = f"{weight.name} is {weight.value.dtype}: only float32 products of DequantizeLinear are fused"
        if not reason and weight.gathers and choice.table_bits != FLOAT and weight.inputs * choice.table_bits % 8:
            reason = f"the rows of {weight.name} are no whole bytes at {choice.table_bits} bits"
        if reason:
            outcome.refuse(anchor[0], _RULE, reason)
            continue
        kept.append(choice)
    return kept


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
) -> None:
    """Carries out ``choices`` on ``model``: codes by ``method``, nodes in ``form``, then the accuracy levels.

    Raises:
        PassError: GPTQ or AWQ without calibration samples.
    """
    original = model.clone() if level == "auto" else None
    coded = _codes(model, choices, context, outcome, method, target)
    writer = Writer(model, by, form, 4 if level == 4 else 0)
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
    remove_dead(model)
    if original is not None and products:
        _choose_levels(model, original, products, form, context, outcome)
    elif form == "qdq" and level == 0:
        outcome.ort_config = {"config_entries": _entry(0)}


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


def _choose_levels(
    model: ir.Model,
    original: ir.Model,
    products: Sequence[ir.Node],
    form: Form,
    context: PassContext,
    outcome: Outcome,
) -> None:
    """accuracy_level 4 (int8 activations, more than twice as fast on CPU) wherever its effect on the output is small.

    Small: all of it together at most 5 % of what the low bits themselves do to the output, or 1e-4 nats (relative
    squared error for outputs that are not logits). Where that is too much, halves of the products are tried, and halves
    of those.
    """
    context.progress("measuring accuracy_level 4")
    try:
        samples = effect_samples(model, context)
        by_bits = OutputEffect(original, samples, context.device, context.threads)(model)
        effect = OutputEffect(model, samples, context.device, context.threads)
    except ModelError as error:
        if next(iter(context.feeds), None) is not None:
            raise
        outcome.notes.append(
            f"accuracy_level stays 0, the slow one: without calibration samples its effect is unknown ({error.what})"
        )
        return
    budget = max(0.05 * by_bits, 1e-4)
    unit = "nats a token" if effect.is_logits else "relative squared error"
    summary = f"the low bits change {effect.output!r} by {by_bits:.2g} {unit}"
    if form == "qdq":  # one level for all, a session option
        levels = [OutputEffect(original, samples, context.device, context.threads)(model, _entry(n)) for n in (0, 4)]
        level = 4 if levels[1] - levels[0] <= max(0.05 * levels[0], 1e-4) else 0
        outcome.ort_config = {"config_entries": _entry(level)}
        outcome.notes.append(
            f"the low bits change {effect.output!r} by {levels[0]:.2g} {unit}, at accuracy_level 4 by "
            f"{levels[1]:.2g}: {level} is taken, for all products"
        )
        return

    def changed(nodes: Sequence[ir.Node]) -> float:
        _set_level(nodes, 4)
        try:
            return effect(model)
        finally:
            _set_level(nodes, 0)

    fast = [node for node in products if has_integer_kernel(node)]
    chosen = list(_affordable(fast, budget, changed))
    together = changed(chosen) if chosen else 0.0
    _set_level(chosen, 4)
    outcome.notes.append(
        f"{summary}; accuracy_level 4 in {len(chosen)} of {len(products)} products changes it by another {together:.2g}"
    )
    slow = len(products) - len(fast)
    if slow:
        outcome.notes.append(f"{slow} products have no integer kernel (2 bits in blocks of 16 or 256)")


def _affordable(
    nodes: Sequence[ir.Node], budget: float, changed: Callable[[Sequence[ir.Node]], float]
) -> Iterator[ir.Node]:
    if not nodes:
        return
    if changed(nodes) <= budget:
        yield from nodes
    elif len(nodes) > 1:
        middle = len(nodes) // 2
        yield from _affordable(nodes[:middle], budget / 2, changed)
        yield from _affordable(nodes[middle:], budget / 2, changed)


def has_integer_kernel(node: ir.Node) -> bool:
    """Whether the CPU provider has an int8 kernel for this MatMulNBits (onnxruntime 1.31: probed in the tests)."""
    bits, block_size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
    return bits != 2 or block_size not in (16, 256)


def _set_level(nodes: Sequence[ir.Node], level: int) -> None:
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)


def _entry(level: int) -> dict[str, str]:
    """The session option for products that ONNX Runtime makes of DequantizeLinear + MatMul."""
    return {"session.qdq_matmulnbits_accuracy_level": str(level)}


def effect_samples(model: ir.Model, context: PassContext, count: int = _EFFECT_SAMPLES) -> list[Feeds]:
    """The samples on which effects are measured: the first ``count`` given, else made ones."""
    samples = list(itertools.islice(context.feeds, count))
    return samples or make_feeds(model, context.seed)


def choices_of(
    model: ir.Model,
    outcome: Outcome,
    bits: Callable[[Weight], int],
    table_bits: Callable[[Weight], int],
    block_size: int,
    symmetric: bool,
) -> list[Choice]:
    """One choice for each weight of the model, by its role."""
    return [
        Choice(
            weight,
            bits(weight) if weight.linears else FLOAT,
            table_bits(weight) if weight.gathers else FLOAT,
            block_size,
            symmetric,
        )
        for weight in find_weights(model, outcome)
    ]
