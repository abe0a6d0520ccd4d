"""Pictures of the report as SVG text that stretches to its box; colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .records import Weights

_BITS = {"float64": 64, "double": 64, "int64": 64, "float": 32, "int32": 32, "float16": 16, "bfloat16": 16}
_HEIGHT = 100


def type_strip(weights: Weights) -> str:
    """Two bars, before and after, to one scale: bytes by element type."""
    totals = [sum(side.values()) for side in weights.bytes_by_type]
    most = max(*totals, 1)
    parts: list[str] = []
    for row, side in enumerate(weights.bytes_by_type):
        left = 0.0
        for kind, count in side.items():
            width = 1000 * count / most
            box = f'x="{left:.1f}" y="{row * 30}" width="{max(width, 1):.1f}" height="24"'
            title = escape(f"{kind}: {count} bytes")
            parts.append(f'<rect class="{bits_class(kind)}" {box}><title>{title}</title></rect>')
            left += width
    text = escape(f"Bytes of weights by element type: {_said(weights.bytes_by_type)}")
    return (
        f'<svg class="strip" viewBox="0 0 1000 54" preserveAspectRatio="none" role="img" aria-label="{text}">'
        f"{''.join(parts)}</svg>"
    )


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
    grid = "".join(f'<path class="grid" d="M0 {y(value):.1f}H1000"/>' for value in (low, middle, high))
    text = (
        f"Signal to noise ratio of {len(ordered)} layers in the order of the graph, from {min(values):.0f} to "
        f"{max(values):.0f} dB; the table below has the figures."
    )
    return (
        f'<div class="chart"><div class="axis" aria-hidden="true"><span>{high:g} dB</span><span>{middle:g}</span>'
        f"<span>{low:g}</span></div>"
        f'<svg viewBox="0 0 1000 {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(text)}">{grid}'
        f'<polyline class="line" points="{line}"/><path class="dots" d="{dots}"/></svg></div>'
    )


def _said(sides: tuple[Mapping[str, int], Mapping[str, int]]) -> str:
    texts = [", ".join(f"{count} bytes {kind}" for kind, count in side.items()) or "none" for side in sides]
    return f"before {texts[0]}; after {texts[1]}."
