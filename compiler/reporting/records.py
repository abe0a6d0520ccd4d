"""Records of the report that describe the whole change; plain data, stored as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Replacement:
    """Nodes that were replaced by other nodes, alike in several places.

    Attributes:
        before: operators of the nodes that went, with their numbers; empty where nodes were added.
        after: operators of the nodes that came; empty where nodes were removed.
        passes: passes that wrote the new nodes, in the order of the graph.
        places: in how many places.
        example: name of a node of one of them.
    """

    before: dict[str, int]
    after: dict[str, int]
    passes: list[str]
    places: int
    example: str


@dataclasses.dataclass(frozen=True)
class GraphChange:
    """Two graphs, compared by what their nodes compute.

    Attributes:
        unchanged: nodes that are in both, whatever their names.
        removed: nodes of the first graph only.
        added: nodes of the second graph only.
        replacements: what became what, the largest first; at most ``SHOWN``.
        more: places that are not listed.
    """

    unchanged: int
    removed: int
    added: int
    replacements: list[Replacement]
    more: int = 0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GraphChange:
        """The inverse of ``dataclasses.asdict``."""
        values: dict[str, Any] = {**data, "replacements": [Replacement(**item) for item in data["replacements"]]}
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """The initializers that belong together: of one place where weights are used, or one shared initializer.

    Attributes:
        name: the largest initializer.
        op: the operator that reads it.
        shape: its shape before, or after where it is new.
        types: its element type before and after, ``int4`` for packed ones; "" where there is none.
        elements: how many numbers the matrices have, before and after; scales, zero points and biases are not counted.
        zeros: share of zeros among those after, None where that is unknown.
        bytes_before, bytes_after: of all of them.
    """

    name: str
    op: str
    shape: list[int]
    types: tuple[str, str]
    elements: tuple[int, int]
    zeros: float | None
    bytes_before: int
    bytes_after: int

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> WeightChange:
        """The inverse of ``dataclasses.asdict``."""
        values: dict[str, Any] = {**data, "types": tuple(data["types"]), "elements": tuple(data["elements"])}
        return cls(**values)

    @property
    def bits_before(self) -> float:
        """Bits of an element before, with its share of scales and biases."""
        return 8 * self.bytes_before / max(self.elements[0], 1)

    @property
    def bits_after(self) -> float:
        """Bits of an element after, with its share of scales, zero points and biases."""
        return 8 * self.bytes_after / max(self.elements[1], 1)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of two graphs.

    Attributes:
        changes: the largest; at most ``SHOWN``.
        more: how many others, with their bytes before and after.
        bytes_by_type: bytes of all initializers by element type, before and after.
    """

    changes: list[WeightChange]
    more: tuple[int, int, int]
    bytes_by_type: tuple[dict[str, int], dict[str, int]]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Weights:
        """The inverse of ``dataclasses.asdict``."""
        changes = [WeightChange.from_dict(item) for item in data["changes"]]
        before, after = data["bytes_by_type"]
        count, old, new = data["more"]
        return cls(changes, (count, old, new), (before, after))


@dataclasses.dataclass(frozen=True)
class NodeTime:
    """One node as ONNX Runtime ran it.

    Attributes:
        name: its name, which may be one that ONNX Runtime gave.
        op: its operator.
        seconds: median of its runs.
    """

    name: str
    op: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Latency:
    """Where the time of a run goes, before and after, measured in turns by ONNX Runtime's profiler.

    Attributes:
        sample: shape of the sample.
        ops: operator -> seconds before and after.
        nodes: the slowest nodes of each side.
    """

    sample: str
    ops: dict[str, tuple[float, float]]
    nodes: tuple[list[NodeTime], list[NodeTime]]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Latency:
        """The inverse of ``dataclasses.asdict``."""
        before, after = ([NodeTime(**item) for item in side] for side in data["nodes"])
        ops = {op: (old, new) for op, (old, new) in data["ops"].items()}
        return cls(data["sample"], ops, (before, after))
