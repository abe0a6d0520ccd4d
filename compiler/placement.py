"""``Placement``: which stage, rank or device nodes are meant for, as partitioning passes write it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import onnx_ir as ir

from .graph import qualified_op

PLACEMENT_KEY = "onnxlathe.placement"
"""Metadata of a model: JSON of its ``Placement``."""
STAGE_KEY = "onnxlathe.stage"
"""Metadata of a node of the main graph: the number of its stage."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a partitioning pass decided.

    Attributes:
        kind: what the parts are.
        count: how many.
        asked: the options of the pass.
        nodes: ``fingerprint`` of the graph it was made for.
        figures: what it predicts: costs of each part, the bottleneck and its proven bound.
        edits: for ranks, how the graph of each differs (see ``compiler/ranks.py``).
    """

    kind: Literal["stages", "ranks", "devices"]
    count: int
    asked: Mapping[str, Any]
    nodes: str
    figures: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict[str, Any]())
    edits: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict[str, Any]())

    def store(self, model: ir.Model) -> None:
        """Writes it into the metadata of ``model``."""
        model.metadata_props[PLACEMENT_KEY] = json.dumps(dataclasses.asdict(self), sort_keys=True)


def read_placement(model: ir.Model) -> Placement | None:
    """The placement in the metadata of ``model``, None where there is none."""
    text = model.metadata_props.get(PLACEMENT_KEY)
    return Placement(**json.loads(text)) if text else None


def fingerprint(model: ir.Model) -> str:
    """Changes when the nodes of the main graph, their names or their connections do; their order does not matter."""
    lines = [
        "\t".join(
            [
                qualified_op(node),
                node.name or "",
                *(value.name or "" for value in (*node.inputs, *node.outputs) if value),
            ]
        )
        for node in model.graph
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def is_placed(model: ir.Model, kind: str, asked: Mapping[str, Any]) -> bool:
    """Whether ``model`` was already placed like that and has not changed since."""
    placement = read_placement(model)
    if placement is None or placement.kind != kind or placement.nodes != fingerprint(model):
        return False
    return json.dumps(placement.asked, sort_keys=True) == json.dumps(asked, sort_keys=True)
