"""The survey's picture: claimed, allowed by arithmetic, measured."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxlathe.runtime.files import write_atomically

_SHOWN = ("mlp", "encoder", "decoder", "llama")


def draw(content: Mapping[str, Any], path: Path, claimed: Mapping[str, float]) -> None:
    """Writes an SVG: a panel a model, a group of bars a technique, one bar a workload."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = [name for name in _SHOWN if name in content]
    figure = Figure(figsize=(11.0, 3.2 * len(names)), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        timed = content[name]
        labels = list(timed["bounds"])
        rows = [row for row in claimed if timed["speed"].get(row)]
        width = 0.8 / len(labels)
        for number, label in enumerate(labels):
            places = [at + (number - (len(labels) - 1) / 2) * width for at in range(len(rows))]
            heights = [timed["speed"][row][label]["ratio"] for row in rows]
            spreads = [timed["speed"][row][label]["spread"] for row in rows]
            axes.bar(places, heights, width * 0.92, yerr=spreads, label=label, color=f"C{number}", alpha=0.8)
            limits = [timed["bounds"][label].get(row) for row in rows]
            known = [(at, limit) for at, limit in zip(places, limits, strict=True) if limit]
            if known:
                axes.scatter(*zip(*known, strict=True), marker="_", s=260 / len(labels), color="black", zorder=3)
        for at, row in enumerate(rows):
            axes.plot((at - 0.42, at + 0.42), [claimed[row]] * 2, "--", color="tab:red", linewidth=1.2)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        axes.set_xticks(range(len(rows)), rows, fontsize=8)
        axes.set_ylabel("times as fast")
        axes.set_title(f"{name} (red: the survey's claim; black: what arithmetic allows)", fontsize=9)
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomically(path, buffer.getvalue())
