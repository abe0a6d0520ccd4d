"""Which weights ranks divide among themselves: Megatron's columns and rows (Shoeybi et al., 2019), found by following
a division through the graph.

Every product with a constant weight first gives each rank a part of its columns. The division is followed from node to
node (``shard_rules``) until a product sums over the divided axis: there each rank has the rows that go with its
columns, and the ranks add their results up (AllReduce); or until an output, where they put their parts together
(AllGather). Where a node cannot work on parts, the products that its parts come from stay whole, and the following
starts again. Of a table each rank has some columns; where the table is also the head, some rows, and looks up zeros for
the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from ...compiler.graph import MICROSOFT, attribute, constant, is_op, producer, subgraphs
from ...runtime.divided.collectives import ALL_GATHER, ALL_REDUCE
from ...runtime.divided.parts import reads
from ...runtime.node_profile import Shape
from .splits import CannotSplit, Split, divide

_SMALLEST = 0.001  # of all weights: a smaller weight stays whole
_TABLE = 0.01


class _StartAgain(Exception):
    pass


@dataclasses.dataclass
class Sharder:
    """One search.

    Attributes:
        model: the model; not changed.
        ranks: how many.
        shapes: of values by name, as they were in a run whose symbolic dims have sizes of their own.
        cache: for inputs that hold a past, the output that is its present.
    """

    model: ir.Model
    ranks: int
    shapes: Mapping[str, Shape]
    cache: Mapping[str, str]

    def __post_init__(self) -> None:
        self.splits: dict[ir.Value, Split] = {}
        self.edits: dict[str, Any] = {}
        self.reasons: dict[ir.Node, CannotSplit] = {}  # where the division ended, of products that stay whole
        self._whole: set[ir.Node] = set()
        self._inputs: dict[ir.Value, tuple[Split, frozenset[ir.Node]]] = {}
        self._sources: dict[ir.Value, frozenset[ir.Node]] = {}
        weights = self.model.graph.initializers.values()
        self._bytes = sum(v.const_value.nbytes for v in weights if v.const_value is not None)

    def search(self) -> dict[str, Any]:
        """The edits that make a rank's graph, as ``compiler/ranks.py`` applies them."""
        while True:
            self._reset()
            try:
                for node in self.model.graph:
                    self._visit(node)
                self._finish_outputs()
            except _StartAgain:
                continue
            self.edits["values"] = {v.name: s.to_data() for v, s in self.splits.items()}
            return self.edits

    def shape(self, value: ir.Value) -> Shape:
        """The shape that ``value`` had."""
        if value.const_value is not None:
            return tuple(int(dim) for dim in value.const_value.shape.numpy())
        seen = self.shapes.get(value.name or "")
        if seen is None:
            raise CannotSplit(f"the shape of {value.name} is not known")
        return seen

    def slice_weight(self, node: ir.Node, index: int, split: Split) -> None:
        """Input ``index`` of ``node``, an initializer, is cut to the rank's part."""
        self.edits["slices"].append({"node": node.name, "input": index, **split.to_data()})

    def slice_factor(self, node: ir.Node, split: Split) -> None:
        """The weight of a product is cut, also where it is an initializer behind Transpose."""
        weight = node.inputs[1]
        turned = producer(weight, "Transpose")
        if weight is None or turned is None:
            self.slice_weight(node, 1, split)
            return
        self.splits[weight] = split
        self._sources[weight] = frozenset()
        self.slice_weight(turned, 0, split.on(1 - split.axis))

    def is_matrix(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is a constant matrix, or one behind Transpose that nobody else reads."""
        if value is None or len(self.shape(value)) != 2:
            return False
        turned = producer(value, "Transpose")
        if turned is None:
            return self.is_constant(value)
        return self.is_constant(turned.inputs[0]) and len(value.uses()) == 1 and not value.is_graph_output()

    def set_attribute(self, node: ir.Node, name: str, sizes: list[int]) -> None:
        """The attribute ``name`` has another number for each rank."""
        self.edits["attributes"].append({"node": node.name, "name": name, "sizes": sizes})

    def set_dim(self, node: ir.Node, split: Split, length: int, rank: int) -> None:
        """The target shape (input 1, ``length`` dims of ``rank``) of a Reshape or Expand has another size."""
        position = split.axis - (rank - length)
        if position >= 0:
            self.edits["shapes"].append({"node": node.name, "position": position, **split.to_data()})

    def set_sizes(self, node: ir.Node, splits: list[Split]) -> None:
        """A Split node cuts into other sizes."""
        sizes = [[split.sizes[rank] for split in splits] for rank in range(self.ranks)]
        self.edits["splits"].append({"node": node.name, "sizes": sizes})

    def only_on_first(self, node: ir.Node, index: int) -> None:
        """Input ``index``, a bias that is to be added once, is left out on the other ranks."""
        self.edits["first_rank"].append({"node": node.name, "input": index})

    def add_up(self, value: ir.Value) -> None:
        """Ranks have summands of ``value``."""
        self._exchange(value, ALL_REDUCE, 0, 0)

    def divide_input(self, value: ir.Value, split: Split, sources: frozenset[ir.Node]) -> None:
        """A past becomes an input of the rank's part; everything is followed again, as others may have read it."""
        if value.name not in self.cache or self.shape(value)[split.axis] != split.total:
            raise CannotSplit(f"{value.name} is whole, and the rest is not")
        self._inputs[value] = (split, sources)
        raise _StartAgain

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is an initializer that nobody overrides."""
        return value is not None and value.is_initializer() and not value.is_graph_input()

    def _reset(self) -> None:
        names = ("slices", "attributes", "shapes", "splits", "first_rank", "lookups", "collectives")
        self.edits = {**{name: [] for name in names}, "gathered": {}}
        self.splits = {value: split for value, (split, _) in self._inputs.items()}
        self._sources = {value: sources for value, (_, sources) in self._inputs.items()}

    def _visit(self, node: ir.Node) -> None:
        from .shard_rules import follow

        read = [value for value in reads(node) if value in self.splits]
        if not read or is_op(node, "Shape", "Size"):
            self._begin(node)
            return
        sources = frozenset[ir.Node]().union(*(self._sources[value] for value in read))
        try:
            if any(True for _ in subgraphs(node)):
                raise CannotSplit("a body of If, Loop or Scan reads it")
            found = follow(self, node, sources)
        except CannotSplit as reason:
            self._give_up(node, sources, reason)
        else:
            for value, split in found.items():
                self.splits[value] = split
                self._sources[value] = sources

    def _give_up(self, node: ir.Node, sources: frozenset[ir.Node], reason: CannotSplit) -> None:
        self._whole |= sources
        self._inputs.clear()
        self.reasons[node] = reason
        raise _StartAgain

    def _begin(self, node: ir.Node) -> None:
        """Lets a product with a constant weight divide its columns, or a table its width."""
        if node in self._whole or len(node.inputs) < 2:
            return
        table = is_op(node, "Gather") and attribute(node, "axis", 0) == 0
        weight = node.inputs[0 if table else 1]
        if not (table or is_op(node, "MatMul", "Gemm")) or weight is None or not self._is_large(weight, table):
            return
        try:
            if table:
                self._begin_table(node, weight)
            elif not attribute(node, "transA", 0):
                self._begin_product(node, self.shape(weight))
        except CannotSplit as reason:
            self._give_up(node, frozenset([node]), reason)

    def _is_large(self, weight: ir.Value, table: bool) -> bool:
        try:
            if not (self.is_constant(weight) if table else self.is_matrix(weight)) or weight.dtype is None:
                return False
            nbytes = math.prod(self.shape(weight)) * weight.dtype.itemsize
            return len(self.shape(weight)) == 2 and nbytes >= self._bytes * (_TABLE if table else _SMALLEST)
        except CannotSplit:  # a value whose shape is not known
            return False

    def _begin_table(self, node: ir.Node, weight: ir.Value) -> None:
        shape, output = self.shape(weight), node.outputs[0]
        if len(weight.uses()) > 1:
            split = divide(0, [shape[0]], self.ranks)
            self.slice_weight(node, 0, split)
            self.edits["lookups"].append({"node": node.name, **split.to_data()})
            self.add_up(output)
            return
        split = divide(1, [shape[1]], self.ranks)
        axis = len(self.shape(output)) - 1
        self.slice_weight(node, 0, split)
        self._exchange(output, ALL_GATHER, axis, split.total)
        self.edits["gathered"][output.name] = split.on(axis).to_data()

    def _begin_product(self, node: ir.Node, shape: Shape) -> None:
        transposed = bool(attribute(node, "transB", 0))
        output = node.outputs[0]
        width = shape[0 if transposed else 1]
        split = divide(0 if transposed else 1, _pieces(output, width), self.ranks)
        self.slice_factor(node, split)
        bias = node.inputs[2] if is_op(node, "Gemm") and len(node.inputs) > 2 else None
        if bias is not None:
            self._slice_bias(node, bias, split)
        self.splits[output] = split.on(len(self.shape(output)) - 1)
        self._sources[output] = frozenset([node])

    def _slice_bias(self, node: ir.Node, bias: ir.Value, split: Split) -> None:
        shape = self.shape(bias)
        if math.prod(shape) == 1:
            return
        if not self.is_constant(bias) or shape[-1] != split.total:
            raise CannotSplit("its bias is computed at run time")
        self.slice_weight(node, 2, split.on(len(shape) - 1))

    def _finish_outputs(self) -> None:
        """Presents stay divided; other divided outputs are put together."""
        presents = {self.cache[value.name or ""] for value in self._inputs}
        for value in self.model.graph.outputs:
            split = self.splits.get(value)
            maker = value.producer()
            if split is None or value.name in presents or maker is None:
                continue
            if value.uses() or not split.in_order:
                reason = CannotSplit(f"the output {value.name} is needed whole")
                self._give_up(maker, self._sources[value], reason)
            self._exchange(value, ALL_GATHER, split.axis, split.total)

    def _exchange(self, value: ir.Value, kind: str, axis: int, total: int) -> None:
        collective = {"value": value.name, "kind": kind, "axis": axis, "total": total, "ranks": self.ranks}
        self.edits["collectives"].append(collective)


def _pieces(value: ir.Value, width: int) -> list[int]:
    """The columns of a product by what they become: Q, K and V of one matrix, or gate and up."""
    for use in value.uses():
        node = use.node
        if is_op(node, "Add") and len(value.uses()) == 1:
            return _pieces(node.outputs[0], width)
        if is_op(node, "Split") and attribute(node, "axis", 0) in (-1, len(value.shape or ()) - 1):
            sizes = attribute(node, "split") if len(node.inputs) < 2 else constant(node.inputs[1], limit=64)
            if sizes is not None:
                return [int(size) for size in sizes]
            return [width // len(node.outputs)] * len(node.outputs)
        if is_op(node, "GroupQueryAttention", domain=MICROSOFT) and use.idx == 0 and node.inputs[1] is None:
            query, key = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
            size = width // (query + 2 * key)
            return [query * size, key * size, key * size]
    return [width]
