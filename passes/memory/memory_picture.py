"""A memory plan as a picture: time to the right, addresses upwards, one rectangle a buffer. Plain SVG text."""

from __future__ import annotations

import html

from ...compiler.memory_plan import MemoryPlan

_WIDTH, _HEIGHT, _MARGIN = 960, 480, 48


def plan_svg(plan: MemoryPlan) -> str:
    """The picture as SVG text; hovering over a rectangle shows its names, size, steps and offset."""
    steps, peak = max(len(plan.order), 1), max(plan.peak, 1)
    x, y = _WIDTH / steps, _HEIGHT / peak
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 2 * _MARGIN} {_HEIGHT + 2 * _MARGIN}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{_WIDTH}" height="{_HEIGHT}" fill="#f4f4f4"/>',
    ]
    for number, buffer in enumerate(plan.buffers):
        left, width = _MARGIN + buffer.start * x, (buffer.end - buffer.start) * x
        top, height = _MARGIN + _HEIGHT - (buffer.offset + buffer.size) * y, buffer.size * y
        title = html.escape(
            f"{', '.join(buffer.names)}: {buffer.size} bytes at {buffer.offset}, steps {buffer.start}-{buffer.end - 1}"
        )
        parts.append(
            f'<rect x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}" '
            f'fill="hsl({number * 137 % 360}, 60%, 70%)" stroke="#444" stroke-width="0.5"><title>{title}</title></rect>'
        )
    live = plan.live_bytes
    points = " ".join(
        f"{_MARGIN + (i + 0.5) * x:.2f},{_MARGIN + _HEIGHT - bytes_ * y:.2f}" for i, bytes_ in enumerate(live)
    )
    parts.append(f'<polyline points="{points}" fill="none" stroke="black" stroke-width="1.5"/>')
    parts.append(
        f'<text x="{_MARGIN}" y="{_MARGIN - 12}">{plan.peak} bytes, at least {plan.bound}; '
        f"{len(plan.order)} steps; the line is what is alive</text>"
    )
    return "\n".join([*parts, "</svg>", ""])
