"""MatMulNBits' accuracy_level, product by product, by its effect on the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import onnx_ir as ir

from ...compiler.base import Outcome, PassContext
from ...runtime.errors import ModelError
from .nbits_nodes import Form
from .output_effect import OutputEffect, effect_samples

Level = Literal["auto", 0, 4]


def choose_levels(
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
        levels = [
            OutputEffect(original, samples, context.device, context.threads)(model, level_entry(n)) for n in (0, 4)
        ]
        level = 4 if levels[1] - levels[0] <= max(0.05 * levels[0], 1e-4) else 0
        outcome.ort_config = {"config_entries": level_entry(level)}
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


def level_entry(level: int) -> dict[str, str]:
    """The session option for products that ONNX Runtime makes of DequantizeLinear + MatMul."""
    return {"session.qdq_matmulnbits_accuracy_level": str(level)}
