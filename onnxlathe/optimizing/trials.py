"""What a search tried and found: as a table, as a picture, as data."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from onnxlathe.compiler.figures import new_figure
from onnxlathe.compiler.report import format_bytes
from onnxlathe.runtime.files import write_atomically

ORIGINAL = "original"


@dataclasses.dataclass
class Trial:
    """One candidate.

    Attributes:
        name: of the candidate.
        passes: its passes with their options.
        exact: whether it claims the same meaning, and was held to it.
        drop: what it loses on the judged samples, in the metric's unit, smaller is better; None: not known.
        speeds: times as fast as the original, by shape.
        weights: how many samples each shape stands for.
        noise: the largest of the shapes, relative.
        bytes: of its weights.
        seconds: what trying it took.
        confirmed: measured a second time, as the best of all.
        kept: taken from the cache of an earlier search.
        status: why it is not the answer; empty while it may be.
    """

    name: str
    passes: str = ""
    exact: bool = False
    drop: float | None = None
    speeds: dict[str, float] = dataclasses.field(default_factory=lambda: dict[str, float]())
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict[str, float]())
    noise: float = 0.0
    bytes: int = 0
    seconds: float = 0.0
    confirmed: bool = False
    kept: bool = False
    status: str = ""

    @property
    def speed(self) -> float:
        """Geometric mean of the speeds over the samples; 0 where nothing was measured."""
        total = sum(self.weights.values())
        if not self.speeds or total <= 0:
            return 0.0
        logs = (self.weights[shape] * math.log(max(ratio, 1e-9)) for shape, ratio in self.speeds.items())
        return math.exp(sum(logs) / total)

    @property
    def finite(self) -> float | None:
        """The drop; None where it is not known, or where the results were NaN or infinite."""
        return self.drop if self.drop is not None and math.isfinite(self.drop) else None


@dataclasses.dataclass
class Search:
    """A search, whole.

    Attributes:
        goal: what was wanted.
        metric: what ``drop`` is.
        limit: the largest drop allowed.
        trials: in the order tried.
        chosen: name of the one returned; ``"original"`` for the model as it was.
        bytes: weights of the original.
        judged: samples that decided on quality.
        made: these were made up, as none were given.
        seconds: what the search took.
        notes: remarks.
    """

    goal: str
    metric: str
    limit: float
    trials: list[Trial] = dataclasses.field(default_factory=lambda: list[Trial]())
    chosen: str = ORIGINAL
    bytes: int = 0
    judged: int = 0
    made: bool = False
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=lambda: list[str]())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data, with the geometric means and who lies on the Pareto front."""
        front = {trial.name for trial in self.front()}
        rows = [
            {**dataclasses.asdict(trial), "drop": trial.finite, "speed": trial.speed, "front": trial.name in front}
            for trial in self.trials
        ]
        return {**dataclasses.asdict(self), "trials": rows}

    def front(self) -> list[Trial]:
        """The trials that no other one beats in speed, drop and bytes at once."""
        done = self._done()
        return [trial for trial in done if not any(_beats(other, trial) for other in done)]

    def print(self, console: Console | None = None) -> None:
        """Prints the table, best first, and the notes."""
        console = console or Console()
        shapes = list(dict.fromkeys(shape for trial in self.trials for shape in trial.speeds))
        title = f"goal {self.goal}, at most {self.limit:.3g} of {self.metric} on {self.judged} samples"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("pipeline")
        for column in (*shapes, "speed", "drop", "bytes"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("")
        front = {trial.name for trial in self.front()}
        table.add_row(
            ORIGINAL, *["1.00 x"] * len(shapes), "1.00 x", "0", format_bytes(self.bytes), self._mark(ORIGINAL)
        )
        for trial in sorted(self.trials, key=lambda trial: -trial.speed):
            speeds = [f"{trial.speeds[shape]:.2f} x" if shape in trial.speeds else "-" for shape in shapes]
            mark = self._mark(trial.name) or trial.status or ("on the front" if trial.name in front else "")
            table.add_row(
                trial.name,
                *speeds,
                f"{trial.speed:.2f} x" if trial.speeds else "-",
                "-" if trial.drop is None else f"{trial.drop:.2g}",
                format_bytes(trial.bytes) if trial.bytes else "-",
                mark,
            )
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes an SVG: drop against speed, the area of a point is the size of the weights.

        Raises:
            LatheError: matplotlib is not installed.
        """
        write_atomically(Path(path), self.svg())

    def svg(self) -> bytes:
        """The picture that ``plot`` writes.

        Raises:
            LatheError: matplotlib is not installed.
        """
        done = self._done()
        figure = new_figure(8.0, 5.0)
        axes = figure.subplots()
        points = [(1.0, 0.0, self.bytes, ORIGINAL)]
        points += [(trial.speed, max(trial.drop or 0.0, 0.0), trial.bytes, trial.name) for trial in done]
        middle = (min(points)[0] + max(points)[0]) / 2
        for number, (speed, drop, size, name) in enumerate(sorted(points)):
            colour = "tab:green" if name == self.chosen else "tab:blue" if drop <= self.limit else "tab:red"
            axes.scatter(speed, drop, 40 + 360 * size / max(self.bytes, 1), colour, alpha=0.5)
            place, side = ((-10, "right") if speed > middle else (10, "left")), (8, -14)[number % 2]
            axes.annotate(
                name, (speed, drop), textcoords="offset points", xytext=(place[0], side), ha=place[1], fontsize=8
            )
        front = sorted((trial.speed, max(trial.drop or 0.0, 0.0)) for trial in self.front())
        axes.plot(*zip(*front, strict=True), "--", color="grey", linewidth=1) if front else None
        axes.axhline(self.limit, color="tab:red", linewidth=1)
        axes.set_yscale("symlog", linthresh=max(self.limit, 1e-6) / 10)
        axes.set_ylim(bottom=-max(self.limit, 1e-6) / 20)
        axes.set_xlabel("times as fast as the original (geometric mean of the shapes)")
        axes.set_ylabel(f"{self.metric}; the line is the limit")
        axes.set_title(f"goal {self.goal}: {self.chosen}; area: bytes of the weights", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    def _done(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.finite is not None and trial.speeds]

    def _mark(self, name: str) -> str:
        return "<- taken" if name == self.chosen else ""


def _beats(one: Trial, other: Trial) -> bool:
    a, b = ((-trial.speed, trial.drop or 0.0, trial.bytes) for trial in (one, other))
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
