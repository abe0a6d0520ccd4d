"""What the face adds to a report: pictures of what passes left in the model, and the call that makes it again."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxlathe.compiler.base import Pass
from onnxlathe.compiler.memory_plan import MemoryPlan, read_plans
from onnxlathe.compiler.report import format_bytes
from onnxlathe.passes.memory.memory_picture import plan_svg

_PLANS = 4  # pictures
_BUFFERS = 400  # of a picture: 200 bytes each


def memory_pictures(model: ir.Model) -> dict[str, str]:
    """Pictures of the memory plans stored in a model, for its report: the main graph's and the largest."""
    plans = sorted(read_plans(model.metadata_props), key=lambda plan: (plan.graph != "", -plan.peak))
    return {_plan_title(plan): plan_svg(_largest(plan)) for plan in plans[:_PLANS]}


def _plan_title(plan: MemoryPlan) -> str:
    sizes = ", ".join(f"{name} = {size}" for name, size in plan.bindings.items())
    what = f"{plan.graph or 'Main graph'}{f' at {sizes}' if sizes else ''}"
    return (
        f"{what}: {format_bytes(plan.peak)} in {len(plan.buffers)} buffers over {len(plan.order)} steps; "
        f"no plan for this order needs less than {format_bytes(plan.bound)}"
    )


def _largest(plan: MemoryPlan) -> MemoryPlan:
    """``plan`` with as many buffers as a page can hold, the largest in space and time."""
    if len(plan.buffers) <= _BUFFERS:
        return plan
    ranked = sorted(plan.buffers, key=lambda buffer: -buffer.size * (buffer.end - buffer.start))
    return dataclasses.replace(plan, buffers=tuple(ranked[:_BUFFERS]))


def call_text(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """A call of ``function`` as a line of Python: ``lathe.compile('model.onnx', 'cpu-int8', threads=2)``.

    Arguments that are as by default are left out; what has no short form is ``...``.
    """
    parts: list[str] = []
    for name, item in inspect.signature(function).parameters.items():
        value = arguments[name]
        if value is item.default or value == item.default:
            continue
        parts.append(_said(value) if item.kind is item.POSITIONAL_OR_KEYWORD else f"{name}={_said(value)}")
    return f"lathe.{function.__name__}({', '.join(parts)})"


def _said(value: Any) -> str:
    if isinstance(value, Path):
        return repr(str(value))
    plain = (str, bool, int, float, Pass)
    if isinstance(value, (list, tuple)) and all(isinstance(item, plain) for item in value):
        return f"[{', '.join(map(repr, value))}]"
    return repr(value) if isinstance(value, plain) else "..."
