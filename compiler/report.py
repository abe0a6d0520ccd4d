"""What was done, what was refused and why: one record a pass, printable, and stored in the artifact as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.files import write_atomically
from ..runtime.ranges import TensorRange
from .base import Refusal
from .reporting.records import GraphChange, Latency, Weights

Status = Literal["applied", "unchanged", "dropped", "failed"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """A before/after measurement on the target provider.

    Attributes:
        ratio: time before / time after (above 1: faster), the worst of the measured samples.
        noise: relative half-spread of the interleaved measurements; changes below it mean nothing.
        samples: shapes measured, each with its ratio.
    """

    ratio: float
    noise: float
    samples: dict[str, float] = dataclasses.field(default_factory=lambda: dict[str, float]())


@dataclasses.dataclass
class PassRecord:
    """What one pass did to the model.

    Attributes:
        name: name of the pass.
        options: its options, as text.
        status: ``applied``; ``unchanged`` (found nothing to do); ``dropped`` (measured slower); ``failed`` (left out).
        seconds: time of the pass itself.
        nodes: node count before and after.
        weight_bytes: bytes of initializers before and after.
        counts: how often each rule fired.
        notes: remarks of the pass and of the checks.
        refusals: near misses.
        error: largest relative error of any output against the step before, None where not measured.
        speed: before/after measurement, None where not measured.
        ranges: of a calibrating pass: value name -> low, high, smallest and largest seen; see ``known_ranges``.
    """

    name: str
    options: str = ""
    status: Status = "unchanged"
    seconds: float = 0.0
    nodes: tuple[int, int] = (0, 0)
    weight_bytes: tuple[int, int] = (0, 0)
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict[str, int]())
    notes: list[str] = dataclasses.field(default_factory=lambda: list[str]())
    refusals: list[Refusal] = dataclasses.field(default_factory=lambda: list[Refusal]())
    error: float | None = None
    speed: Speed | None = None
    ranges: dict[str, list[float]] = dataclasses.field(default_factory=lambda: dict[str, list[float]]())


@dataclasses.dataclass
class Report:
    """The whole compile.

    Attributes:
        source: where the model came from.
        device: what it was compiled for.
        passes: one record each, in order.
        ops_before: nodes by operator at the entrance.
        ops_after: nodes by operator at the end.
        weight_bytes: bytes of initializers before and after.
        error: largest relative error of the final graph against the original, None where not measured.
        speed: final graph against the original on the target, None where not measured.
        environment: versions, CPU, threads, the command and the call that make it again.
        notes: remarks about the whole.
        graph: which nodes became which, None in reports of older versions.
        weights: what became of the weights, None in reports of older versions.
        latency: time of each operator for some samples; empty where not asked for.
        analysis: error of each quantized layer, as ``Analysis.to_dict`` gives it; None where not asked for.
        pictures: SVG pictures by title, for the page. They are not stored: what they show is in the model's metadata.
        search: what ``lathe.optimize`` tried, where it chose the passes (``onnxlathe/optimizing/trials.py``).
    """

    source: str = ""
    device: str = "cpu"
    passes: list[PassRecord] = dataclasses.field(default_factory=lambda: list[PassRecord]())
    ops_before: dict[str, int] = dataclasses.field(default_factory=lambda: dict[str, int]())
    ops_after: dict[str, int] = dataclasses.field(default_factory=lambda: dict[str, int]())
    weight_bytes: tuple[int, int] = (0, 0)
    error: float | None = None
    speed: Speed | None = None
    environment: dict[str, str] = dataclasses.field(default_factory=lambda: dict[str, str]())
    notes: list[str] = dataclasses.field(default_factory=lambda: list[str]())
    graph: GraphChange | None = None
    weights: Weights | None = None
    latency: list[Latency] = dataclasses.field(default_factory=lambda: list[Latency]())
    analysis: dict[str, Any] | None = None
    pictures: dict[str, str] = dataclasses.field(default_factory=lambda: dict[str, str]())
    search: dict[str, Any] = dataclasses.field(default_factory=lambda: dict[str, Any]())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data, without the pictures."""
        return dataclasses.asdict(dataclasses.replace(self, pictures={}))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of ``to_dict``; unknown keys of newer versions are ignored."""
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["passes"] = [_record(record) for record in values.get("passes", [])]
        values["speed"] = Speed(**values["speed"]) if values.get("speed") else None
        values["weight_bytes"] = tuple(values.get("weight_bytes", (0, 0)))
        values["graph"] = GraphChange.from_dict(values["graph"]) if values.get("graph") else None
        values["weights"] = Weights.from_dict(values["weights"]) if values.get("weights") else None
        values["latency"] = [Latency.from_dict(item) for item in values.get("latency", [])]
        return cls(**values)

    def known_ranges(self) -> dict[str, TensorRange]:
        """The calibrated ranges of all passes, for a second compile of the same model without samples."""
        return {name: TensorRange.from_list(seen) for step in self.passes for name, seen in step.ranges.items()}

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, atomically."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1).encode())

    def html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one page that needs nothing else, atomically.

        Raises:
            LatheError: jinja2 is not installed.
        """
        from .reporting.page import render

        write_atomically(Path(path), render(self).encode())

    def print(self, console: Console | None = None, *, refusals: bool = False) -> None:
        """Prints tables: the passes, the operators before and after, and on demand every refusal."""
        console = console or Console()
        console.print(self._pass_table())
        print_op_table(console, self.ops_before, self.ops_after)
        console.print(self.summary(), highlight=False)
        for record in self.passes:
            for note in record.notes:
                console.print(Text.assemble((f"{record.name}: ", "bold"), note))
            if refusals:
                for refusal in record.refusals:
                    text = f"not {refusal.rule} at {refusal.node}: {refusal.reason}"
                    console.print(Text.assemble((f"{record.name}: ", "bold"), text))
        total = sum(len(record.refusals) for record in self.passes)
        if total and not refusals:
            console.print(f"{total} refusals; see report.print(refusals=True) or --refusals.", style="dim")

    def summary(self) -> str:
        """One paragraph: nodes, bytes, error, speed."""
        before, after = sum(self.ops_before.values()), sum(self.ops_after.values())
        parts = [
            f"{before} -> {after} nodes",
            f"{format_bytes(self.weight_bytes[0])} -> {format_bytes(self.weight_bytes[1])} of weights",
        ]
        if self.error is not None:
            parts.append(f"largest relative error {self.error:.1e}")
        if self.speed is not None:
            shapes = ", ".join(f"{ratio:.2f} x at {shape}" for shape, ratio in self.speed.samples.items())
            parts.append(f"speed on {self.device}: {shapes} (noise {self.speed.noise:.0%})")
        return "; ".join([*parts, *self.notes])

    def _pass_table(self) -> Table:
        table = Table(title=f"{self.source} for {self.device}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("pass", no_wrap=True)
        for column in ("nodes", "error", "speed"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("what")
        for record in self.passes:
            counts = ", ".join(f"{count} {rule}" for rule, count in record.counts.items())
            refused = f"{len(record.refusals)} refused" if record.refusals else ""
            status = "" if record.status == "applied" else f"{record.status}:" if counts else record.status
            table.add_row(
                record.name,
                str(record.nodes[1]),
                "-" if record.error is None else f"{record.error:.0e}",
                f"{record.speed.ratio:.2f} x" if record.speed else "-",
                " ".join(part for part in (status, counts, f"({refused})" if refused else "") if part),
            )
        return table


def print_op_table(console: Console, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Prints the operators whose number changed, the most changed first."""
    change = {op: after.get(op, 0) - before.get(op, 0) for op in {*before, *after}}
    changed = sorted((op for op in change if change[op]), key=lambda op: (-abs(change[op]), op))
    if not changed:
        console.print("nodes by operator: as before")
        return
    table = Table(title="nodes by operator (changed ones)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for op in changed:
        table.add_row(op, str(before.get(op, 0)), str(after.get(op, 0)), f"{change[op]:+d}")
    console.print(table)


def format_bytes(count: int) -> str:
    """``90.4 MB`` (decimal units)."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _record(data: dict[str, Any]) -> PassRecord:
    values = dict(data)
    values["refusals"] = [Refusal(**refusal) for refusal in values.get("refusals", [])]
    values["speed"] = Speed(**values["speed"]) if values.get("speed") else None
    for key in ("nodes", "weight_bytes"):
        values[key] = tuple(values[key])
    return PassRecord(**values)
