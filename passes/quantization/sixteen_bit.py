"""Single layers with 16-bit activations in an 8-bit plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from ...runtime.quantization import QuantType
from .integer_data import data_inputs
from .quantization_plan import Filter, QuantPlan, matches

_WIDE: dict[str, QuantType] = {"uint8": "uint16", "int8": "int16"}


def widen(model: ir.Model, plan: QuantPlan, filters: Sequence[Filter]) -> int:
    """Gives the activations that the picked nodes read 16 bits; values that share a scale stay together.

    Returns:
        How many values were widened.
    """
    names = {
        plan.source(value.name or "")
        for node in model.graph
        if node.name in plan.nodes and matches(node, filters)
        for value in data_inputs(node)
        if value.name in plan.activations
    }
    wide = [name for name in plan.activations if plan.source(name) in names]
    for name in wide:
        spec = plan.activations[name]
        plan.activations[name] = dataclasses.replace(spec, dtype=_WIDE.get(spec.dtype, spec.dtype))
    return len(wide)
