"""Pictures of the report as SVG text that stretches to its box; colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .records import Weights

_BITS = {"float64": 64, "double": 64, "int64": 64, "float": 32, "int32": 32, "float16": 16, "bfloat16": 16}
_HEIGHT = 100


def weight_map(weights: Weights) -> str:
    """A box for each place that has weights: as wide as it has elements, as high as an element has bits now.

    So areas are bytes. Gray behind a box is what it was before; the light part at its top is its share of zeros.
    """
    shown = [item for item in weights.changes if 0 < max(item.bits_before, item.bits_after) <= 65]  # else no matrices
    total = sum(max(item.elements) for item in shown)
    shown = [item for item in shown if max(item.elements) >= total / 500]
    high = max((max(item.bits_before, item.bits_after) for item in shown), default=0)
    parts, left = list[str](), 0.0
    for item in shown:
        width, was, now = (1000 * count / total for count in (max(item.elements), *item.elements))
        title = escape(f"{item.name}: {item.bits_before:.3g} bits, then {item.bits_after:.3g}")
        parts.append(_box("was", left, was, item.bits_before / high))
        parts.append(_box(bits_class(item.types[1]), left, now, item.bits_after / high, title))
        if item.zeros:
            top = item.bits_after / high
            parts.append(_box("zeros", left, now, top * item.zeros, bottom=top * (1 - item.zeros)))
        left += width
    text = (
        f"{len(shown)} places with weights, as wide as they have elements and as high as elements have bits: together "
        f"{sum(item.bytes_before for item in shown)} bytes before, {sum(item.bytes_after for item in shown)} after."
    )
    axis = [f"{high:.3g} bits", f"{high / 2:.3g}", "0"]
    return _chart(axis, "".join(parts), text)


def bits_class(kind: str) -> str:
    """Class of the color of an element type: ``bits-8`` for int8."""
    digits = "".join(character for character in kind if character.isdigit())
    bits = _BITS.get(kind) or int(digits or 8)
    return f"bits-{next(step for step in (4, 8, 16, 32, 64) if bits <= step or step == 64)}"


def error_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Signal to noise of each layer in the order of the graph: dots for the layer alone, a line for all so far."""
    ordered = sorted(layers, key=lambda layer: layer["position"])
    values = [layer[key] for layer in ordered for key in ("local_sqnr", "cumulative_sqnr") if layer[key] is not None]
    if not values:
        return ""
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil((max(values) + 1) / 10)
    step = 1000 / max(len(ordered), 1)

    def y(value: float) -> float:
        return _HEIGHT * (high - value) / (high - low)

    line = " ".join(
        f"{(index + 0.5) * step:.1f},{y(layer['cumulative_sqnr']):.1f}"
        for index, layer in enumerate(ordered)
        if layer["cumulative_sqnr"] is not None
    )
    dots = "".join(
        f"M{(index + 0.5) * step:.1f} {y(layer['local_sqnr']):.1f}h0"
        for index, layer in enumerate(ordered)
        if layer["local_sqnr"] is not None
    )
    middle = (low + high) / 2
    text = (
        f"Signal to noise ratio of {len(ordered)} layers in the order of the graph, from {min(values):.0f} to "
        f"{max(values):.0f} dB; the table below has the figures."
    )
    drawn = f'<polyline class="line" points="{line}"/><path class="dots" d="{dots}"/>'
    return _chart([f"{high:g} dB", f"{middle:g}", f"{low:g}"], drawn, text)


def search_chart(search: Mapping[str, Any]) -> str:
    """Each pipeline tried, by its speed and by what it loses; the original lies at speed 1, loss 0."""
    done = [trial for trial in search["trials"] if trial["drop"] is not None and trial["speed"] > 0]
    limit = search["limit"]
    points = [(1.0, 0.0, search["chosen"] == "original")]
    points += [(trial["speed"], max(trial["drop"], 0.0), trial["name"] == search["chosen"]) for trial in done]
    most, high = max(speed for speed, _, _ in points), 1.25 * limit or 1.0  # what loses more lies at the top
    drawn = f'<path class="limit" d="M0 {_HEIGHT * (1 - limit / high):.1f}H1000"/>'
    for taken, kind in ((False, "dots others"), (True, "dots taken")):
        path = "".join(
            f"M{980 * speed / most:.1f} {_HEIGHT * (1 - min(drop / high, 0.97)):.1f}h0"
            for speed, drop, chosen in points
            if chosen is taken
        )
        drawn += f'<path class="{kind}" d="{path}"/>' if path else ""
    text = f"{len(points)} pipelines by speed, up to {most:.2f} times the original, and by what they lose."
    return _chart([f"{high:.2g}", f"{high / 2:.2g}", "0"], drawn, text)


def _chart(axis: Sequence[str], drawn: str, text: str) -> str:
    """A picture 1000 wide and ``_HEIGHT`` high that stretches, with the ends and the middle of its axis beside it."""
    labels = "".join(f"<span>{label}</span>" for label in axis)
    grid = "".join(f'<path class="grid" d="M0 {_HEIGHT * part:g}H1000"/>' for part in (0, 0.5, 1))
    return (
        f'<div class="chart"><div class="axis" aria-hidden="true">{labels}</div>'
        f'<svg viewBox="0 0 1000 {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(text)}">'
        f"{grid}{drawn}</svg></div>"
    )


def _box(kind: str, left: float, width: float, height: float, title: str = "", bottom: float = 0) -> str:
    """A rectangle; heights are shares of the picture's."""
    top = _HEIGHT * (1 - bottom - height)
    inside = f"<title>{title}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{left:.1f}" y="{top:.2f}" width="{max(width - 0.6, 0.4):.1f}" '
        f'height="{_HEIGHT * height:.2f}">{inside}</rect>'
    )
