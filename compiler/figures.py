"""Pictures by matplotlib, which the extra ``report`` brings."""

from __future__ import annotations

from typing import Any

from ..runtime.errors import LatheError


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches, that is saved as SVG and never looks for a window.

    Raises:
        LatheError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LatheError("matplotlib is not installed.", 'Install it with: pip install "onnxlathe[report]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure
