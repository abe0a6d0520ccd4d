"""What ``analyze`` found: errors of outputs and layers as a table, a plot and JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..runtime.files import write_atomically
from .figures import new_figure


@dataclasses.dataclass
class OutputError:
    """Error of a graph output over all samples.

    Attributes:
        name: the output.
        sqnr: signal to noise in dB, infinite where equal.
        cosine: cosine with the float output.
        relative_error: ``max |float - quantized| / max |float|``.
        weights_sqnr: dB with only the weights quantized, None where that cannot be separated.
        activations_sqnr: dB with only the activations quantized.
    """

    name: str
    sqnr: float
    cosine: float
    relative_error: float
    weights_sqnr: float | None = None
    activations_sqnr: float | None = None


@dataclasses.dataclass
class LayerError:
    """Error of one layer: the quantized nodes between values that both graphs have.

    Attributes:
        name: name of the node of the float graph that makes the value.
        op: its operator.
        value: the value compared.
        position: place among the layers in the order of the graph, from 0.
        contribution: energy of the error over energy of the output when only this layer is quantized; of several
            outputs the sum.
        local_sqnr: dB of the layer on the float graph's inputs.
        local_cosine: cosine of the same.
        cumulative_sqnr: dB of the layer's result in the quantized graph, errors of all layers before included.
        cumulative_cosine: cosine of the same.
        weights_sqnr: local dB with only the weights quantized; None where that cannot be separated, infinite where the
            layer has no quantized weights.
        activations_sqnr: local dB with only the activations quantized.
        saturation: percent of the layer's quantized activations that lie outside their range, None where it has none.
    """

    name: str
    op: str
    value: str
    position: int
    contribution: float
    local_sqnr: float
    local_cosine: float
    cumulative_sqnr: float
    cumulative_cosine: float
    weights_sqnr: float | None = None
    activations_sqnr: float | None = None
    saturation: float | None = None


@dataclasses.dataclass
class Analysis:
    """Where the error of a quantized model comes from.

    Attributes:
        outputs: error of each float output.
        layers: the layers, the one that contributes most first.
        samples: how many samples were run.
        notes: what could not be compared, and why.
    """

    outputs: list[OutputError]
    layers: list[LayerError]
    samples: int
    notes: list[str] = dataclasses.field(default_factory=lambda: list[str]())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data; infinite ratios are None."""
        return _finite(dataclasses.asdict(self))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the analysis as JSON, atomically."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())

    def print(self, console: Console | None = None, *, rows: int = 20) -> None:
        """Prints the outputs and the ``rows`` layers that contribute most."""
        console = console or Console()
        outputs = _table("error of the outputs", "output", "SQNR dB", "cosine", "max error", "weights", "activ.")
        for item in self.outputs:
            outputs.add_row(
                Text(item.name),
                _decibel(item.sqnr),
                f"{item.cosine:.5f}",
                f"{item.relative_error:.1e}",
                _decibel(item.weights_sqnr),
                _decibel(item.activations_sqnr),
            )
        console.print(outputs)
        total = sum(layer.contribution for layer in self.layers if math.isfinite(layer.contribution))
        title = f"layers by what they add to the error of the outputs ({self.samples} samples; SQNR in dB)"
        table = _table(title, "layer", "op", "share", "local", "cumul.", "weights", "activ.", "outside")
        for layer in self.layers[:rows]:
            share = layer.contribution / total if total > 0 and math.isfinite(layer.contribution) else math.nan
            table.add_row(
                Text(layer.name, overflow="ellipsis", no_wrap=True),
                layer.op,
                "-" if math.isnan(share) else f"{share:.1%}",
                _decibel(layer.local_sqnr),
                _decibel(layer.cumulative_sqnr),
                _decibel(layer.weights_sqnr),
                _decibel(layer.activations_sqnr),
                "-" if layer.saturation is None else f"{layer.saturation:.2f}%",
            )
        console.print(table)
        if len(self.layers) > rows:
            console.print(f"... and {len(self.layers) - rows} more layers", style="dim")
        for note in self.notes:
            console.print(note, highlight=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes an SVG: local and cumulative SQNR of every layer in the order of the graph, and the contributions.

        Raises:
            LatheError: matplotlib is not installed.
        """
        layers = sorted(self.layers, key=lambda layer: layer.position)
        figure = new_figure(max(7.0, 0.22 * len(layers)), 6.5)
        above, below = figure.subplots(2, 1, sharex=True)
        x = range(len(layers))
        for label, values, style in (
            ("local", [layer.local_sqnr for layer in layers], "o"),
            ("cumulative", [layer.cumulative_sqnr for layer in layers], "-"),
            ("weights only", [layer.weights_sqnr for layer in layers], "^"),
            ("activations only", [layer.activations_sqnr for layer in layers], "v"),
        ):
            finite = [value if value is not None and math.isfinite(value) else math.nan for value in values]
            above.plot(x, finite, style, label=label, markersize=4)
        above.set_ylabel("SQNR (dB), higher is better")
        above.legend(fontsize="small")
        below.bar(x, [layer.contribution if math.isfinite(layer.contribution) else math.nan for layer in layers])
        below.set_ylabel("error of the outputs\nwith only this layer quantized")
        below.set_xticks(list(x), [layer.name[-40:] for layer in layers], rotation=90, fontsize=5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg")
        write_atomically(Path(path), buffer.getvalue())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "op" else "right")
    return table


def _decibel(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if math.isfinite(value) else "exact" if value > 0 else "broken"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
