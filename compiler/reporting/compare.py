"""Two graphs compared, for the report."""

from __future__ import annotations

import onnx_ir as ir

from .graph_change import graph_change, places
from .graph_match import Matching
from .records import GraphChange, Weights
from .weight_change import weight_change


def compare_graphs(before: ir.Model, after: ir.Model) -> tuple[GraphChange, Weights]:
    """Which nodes became which, and what became of their weights; neither model is changed."""
    match = Matching(before, after)
    found = places(match)
    return graph_change(match, found), weight_change(before, after, match, found)
