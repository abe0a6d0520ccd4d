"""What ``inspect --memory`` prints: how much memory the activations need, when, and for what."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.memory_plan import MemoryPlan, c_header, read_plans
from onnxlathe.compiler.report import format_bytes
from onnxlathe.passes.memory.memory_picture import plan_svg
from onnxlathe.passes.memory.plan_memory import plan_model
from onnxlathe.runtime.artifact import load
from onnxlathe.runtime.errors import PlanError
from onnxlathe.runtime.files import write_atomically

_KINDS: dict[str, Callable[[Sequence[MemoryPlan]], str]] = {
    ".svg": lambda plans: plan_svg(plans[0]),
    ".h": lambda plans: c_header(plans[0]),
    ".json": lambda plans: json.dumps([plan.to_dict() for plan in plans], indent=1),
}
_SHOWN = 10
_BARS = " ▁▂▃▄▅▆▇█"
_COLUMNS = 64


def print_memory(path: Path, bindings: Mapping[str, int], target: Path | None) -> None:
    """Peak, bound and the tensors alive at the fullest moment, from the stored plan or one made now.

    Args:
        path: the model.
        bindings: sizes of its symbolic dims; none takes the stored plan, if there is one.
        target: where to write the main graph's plan, as picture (``.svg``) or C header (``.h``), or all (``.json``).

    Raises:
        PlanError: sizes that are not known, or a file of another kind.
    """
    if target is not None and target.suffix not in _KINDS:
        raise PlanError(f"A plan cannot be written as {target.name}.", f"Take {', '.join(_KINDS)}.")
    console, source = Console(), load(path)
    plans = [] if bindings else read_plans(source.metadata_props)
    if not plans:
        model = load_model(source)
        infer_shapes(model)
        plans = plan_model(model, [bindings])
    for plan in plans:
        _print_plan(console, plan)
    if target is not None:
        write_atomically(target, _KINDS[target.suffix](plans).encode())
        console.print(f"wrote {target}", highlight=False)


def parse_bindings(text: str) -> dict[str, int]:
    """Reads ``batch=1,sequence=128``.

    Raises:
        PlanError: it cannot be read.
    """
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    if any(not size.strip().isdigit() for _, _, size in pairs):
        raise PlanError(f"Cannot read the sizes in {text!r}.", "Write batch=1,sequence=128.")
    return {name.strip(): int(size) for name, _, size in pairs}


def _print_plan(console: Console, plan: MemoryPlan) -> None:
    sizes = ", ".join(f"{name}={size}" for name, size in plan.bindings.items())
    title = f"memory of {plan.graph or 'the main graph'}" + (f" at {sizes}" if sizes else "")
    console.print(
        f"{title}: arena {format_bytes(plan.peak)}, at least {format_bytes(plan.bound)} in this order ({plan.method}); "
        f"{len(plan.order)} steps, {len(plan.buffers)} buffers",
        highlight=False,
        markup=False,
    )
    if not plan.order:
        return
    console.print(_bars(plan), highlight=False)
    step = plan.fullest_step
    table = Table(
        title=f"alive at the fullest moment, step {step}: {plan.order[step]}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("value", "size", "steps", "offset"):
        table.add_column(column, justify="left" if column == "value" else "right")
    alive = plan.alive_at(step)
    for buffer in alive[:_SHOWN]:
        more = f" (and {len(buffer.names) - 1} in its place)" if len(buffer.names) > 1 else ""
        steps = f"{buffer.start}-{buffer.end - 1}"
        table.add_row(Text(next(iter(buffer.names)) + more), format_bytes(buffer.size), steps, str(buffer.offset))
    console.print(table)
    if len(alive) > _SHOWN:
        console.print(f"... and {len(alive) - _SHOWN} smaller ones", highlight=False)


def _bars(plan: MemoryPlan) -> str:
    """Bytes alive over time, one character for a few steps each."""
    live, most = plan.live_bytes, max(plan.bound, 1)
    count = min(_COLUMNS, len(live))
    parts = [max(live[len(live) * i // count : len(live) * (i + 1) // count]) for i in range(count)]
    return "".join(_BARS[-(-part * (len(_BARS) - 1) // most)] for part in parts)
