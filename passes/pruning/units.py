"""What a coupling speaks of: tensors as nodes see them, units, and the layers that sum over units."""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from ...compiler.graph import Array
from ..linear_layers import LinearLayer
from ..symbolic_dims import Dim, Dims

Kind = Literal["ffn", "heads", "channels"]
Reader = tuple[ir.Node, int]


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor as a node reads or makes it.

    Attributes:
        value: the tensor.
        dims: its symbolic dims; None if the rank is unknown.
        reader: for a constant vector the node and input that read it: readers of one vector may be cut differently.
    """

    value: ir.Value
    dims: Dims | None
    reader: Reader | None = None

    @property
    def rank(self) -> int:
        """Rank, 0 if unknown."""
        return len(self.dims or ())

    def dim(self, axis: int) -> Dim:
        """The size of an axis."""
        return (self.dims or ())[axis]


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A layer that sums over units: the place where leaving them out is felt.

    Attributes:
        layer: the MatMul, Gemm or Conv with its constant weight.
        x: its input.
        units: for each channel of x its unit (a label of the coupling).
    """

    layer: LinearLayer
    x: ir.Value
    units: Array


@dataclasses.dataclass(frozen=True)
class Dimension:
    """Units of one kind that are interchangeable: each has as many elements in the same axes as any other.

    Attributes:
        name: of the first weight that makes them.
        kind: hidden units of a feed-forward layer, heads, or channels of convolutions.
        units: their labels, in the order of their elements.
        consumers: the layers that sum over them, in the order of the graph.
        makers: the nodes whose weights make them.
    """

    name: str
    kind: Kind
    units: Array
    consumers: tuple[Consumer, ...]
    makers: tuple[ir.Node, ...]
