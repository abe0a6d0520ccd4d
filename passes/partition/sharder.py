"""Which weights ranks divide among themselves: Megatron's columns and rows (Shoeybi et al., 2019), found by following
a division through the graph.

Every product with a constant weight first gives each rank a part of its columns. The division is followed from node to
node (``shard_rules``) until a product sums over the divided axis: there each rank has the rows that go with its
columns, and the ranks add their results up (AllReduce); or until an output, where they put their parts together
(AllGather). Where a node cannot work on parts, the products that its parts come from stay whole, and the following
starts again; of quantized products the ranks put the parts together there (AllGather), as many of those cannot sum in
parts. Of a table each rank has some columns; where the table is also the head, some rows, and looks up zeros for the
others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from ...compiler.graph import attribute, is_op, subgraphs
from ...runtime.divided.collectives import ALL_GATHER, ALL_REDUCE
from ...runtime.divided.parts import reads
from ...runtime.node_profile import Shape
from .shard_products import LARGE, begin, is_quantized
from .shard_rules import follow
from .splits import CannotSplit, Sources, Split


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
        self._stops: set[ir.Value] = set()  # where ranks put their parts together
        self._units: dict[ir.Node, int] = {}  # columns of products that stay together; 0: not even blocks
        self._inputs: dict[ir.Value, tuple[Split, Sources]] = {}
        self._sources: dict[ir.Value, Sources] = {}
        self._following: Sources = frozenset()
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

    def whole_weights(self) -> list[tuple[ir.Node, ir.Value]]:
        """After the search: large weights that every rank has whole, with who reads them."""
        cut = {(edit["node"], edit["input"]) for edit in self.edits["slices"]}
        read = [(node, index, value) for node in self.model.graph for index, value in enumerate(node.inputs)]
        return [
            (node, value)
            for node, index, value in read
            if value is not None and self.is_constant(value) and self.share(value) >= LARGE
            if (node.name, index) not in cut
        ]

    def shape(self, value: ir.Value) -> Shape:
        """The shape that ``value`` had."""
        if value.const_value is not None:
            return tuple(int(dim) for dim in value.const_value.shape.numpy())
        seen = self.shapes.get(value.name or "")
        if seen is None:
            raise CannotSplit(f"the shape of {value.name} is not known")
        return seen

    def share(self, value: ir.Value | None) -> float:
        """Bytes of a weight, as a part of those of all; 0 where its type is not known."""
        if value is None or value.dtype is None:
            return 0.0
        return math.prod(self.shape(value)) * value.dtype.itemsize / max(1, self._bytes)

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is an initializer that nobody overrides."""
        return value is not None and value.is_initializer() and not value.is_graph_input()

    def is_stored(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is a constant, or one behind Transpose or DequantizeLinear that nobody else reads."""
        maker = value.producer() if value is not None else None
        if value is None or maker is None:
            return self.is_constant(value)
        if not is_op(maker, "Transpose", "DequantizeLinear") or len(value.uses()) != 1 or value.is_graph_output():
            return False
        return all(self.is_stored(item) for item in maker.inputs if item is not None)

    def is_matrix(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is stored and has two dims."""
        return self.is_stored(value) and value is not None and len(self.shape(value)) == 2

    def slice_weight(
        self, node: ir.Node, index: int, split: Split, *, rows: int | None = None, bits: int | None = None
    ) -> None:
        """Input ``index`` of ``node``, an initializer, is cut to the rank's part.

        Args:
            node: who reads it.
            index: which input.
            split: what each rank has.
            rows: it is stored flat and has so many rows.
            bits: its last dim is bytes, and the elements in them have so many bits.
        """
        how = {name: number for name, number in (("rows", rows), ("bits", bits)) if number is not None}
        self.edits["slices"].append({"node": node.name, "input": index, **how, **split.to_data()})

    def cut(self, node: ir.Node, index: int, split: Split) -> None:
        """Input ``index`` of ``node``, which is stored, is cut to the rank's part."""
        value = node.inputs[index]
        maker = value.producer() if value is not None else None
        if value is None or maker is None:
            self.slice_weight(node, index, split)
            return
        self.splits[value], self._sources[value] = split, frozenset()
        if is_op(maker, "Transpose"):
            before = list(reversed(range(len(self.shape(value)))))
            self.cut(maker, 0, split.on(attribute(maker, "perm", before)[split.axis]))
            return
        self.cut(maker, 0, split)
        axis = attribute(maker, "axis", 1) % max(1, len(self.shape(value)))
        for other, parameter in enumerate(maker.inputs[1:], start=1):
            if parameter is None or math.prod(self.shape(parameter)) == 1:
                continue
            if axis == split.axis:
                vector = len(self.shape(parameter)) == 1
                part = split.on(0) if vector else self.blocks(split, attribute(maker, "block_size", 1))
                self.cut(maker, other, part)
            elif len(self.shape(parameter)) > 1:
                self.cut(maker, other, split)

    def cut_vector(self, node: ir.Node, index: int, split: Split) -> None:
        """Input ``index`` of ``node``, if there and not one number, has a number for each place that is divided."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or math.prod(self.shape(value)) == 1:
            return
        shape = self.shape(value)
        if not self.is_stored(value) or shape[-1] != split.total:
            raise CannotSplit(f"{value.name} has no constant number for each column")
        self.cut(node, index, split.on(len(shape) - 1))

    def unit(self, node: ir.Node) -> int:
        """Columns of a product that stay together."""
        return self._units.get(node) or 1

    def blocks(self, split: Split, size: int) -> Split:
        """The blocks that ranks have of an axis; where two have parts of one, its products get whole blocks.

        Raises:
            CannotSplit: that is no way.
        """
        found = split.blocks(size)
        if found is not None:
            return found
        if not self._following or any(self._units.get(source, 1) % size == 0 for source in self._following):
            raise CannotSplit(f"a block of {size} weights would lie on two ranks")
        for source in self._following:
            self._units[source] = math.lcm(self._units.get(source, 1), size)
        self._inputs.clear()
        raise _StartAgain

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

    def gather(self, value: ir.Value, split: Split) -> None:
        """Ranks put their parts of ``value`` together.

        Raises:
            CannotSplit: they are not in order.
        """
        if not split.in_order:
            raise CannotSplit(f"the parts of {value.name} are not in order")
        self._exchange(value, ALL_GATHER, split.axis, split.total)
        self.edits["gathered"][value.name] = split.to_data()

    def look_up(self, node: ir.Node, split: Split) -> None:
        """Each rank has rows of a table, and zeros for others."""
        self.edits["lookups"].append({"node": node.name, **split.to_data()})
        self.add_up(node.outputs[0])

    def divide(self, value: ir.Value, split: Split, sources: Sources) -> None:
        """Ranks have parts of ``value``, unless the division is to end there."""
        if value in self._stops:
            self.gather(value, split)
        else:
            self.splits[value], self._sources[value] = split, sources

    def divide_input(self, value: ir.Value, split: Split, sources: Sources) -> None:
        """A past becomes an input of the rank's part; everything is followed again, as others may have read it."""
        if value.name not in self.cache or self.shape(value)[split.axis] != split.total:
            raise CannotSplit(f"{value.name} is whole, and the rest is not")
        self._inputs[value] = (split, sources)
        raise _StartAgain

    def _reset(self) -> None:
        names = ("slices", "attributes", "shapes", "splits", "first_rank", "lookups", "collectives")
        self.edits = {**{name: [] for name in names}, "gathered": {}}
        self.splits = {value: split for value, (split, _) in self._inputs.items()}
        self._sources = {value: sources for value, (_, sources) in self._inputs.items()}

    def _visit(self, node: ir.Node) -> None:
        read = [value for value in reads(node) if value in self.splits]
        begins = not read or is_op(node, "Shape", "Size")
        sources = frozenset([node]) if begins else frozenset[ir.Node]().union(*(self._sources[v] for v in read))
        self._following = sources
        try:
            if begins:
                if node not in self._whole:
                    begin(self, node)
                return
            if any(True for _ in subgraphs(node)):
                raise CannotSplit("a body of If, Loop or Scan reads it")
            for value, split in follow(self, node, sources).items():
                self.divide(value, split, sources)
        except CannotSplit as reason:
            self._give_up(node, sources, reason)

    def _give_up(self, node: ir.Node, sources: Sources, reason: CannotSplit) -> None:
        """What ``node`` needs whole: its products are, or ranks put it together."""
        self._inputs.clear()
        in_blocks = [source for source in sources if self._units.get(source)]
        if in_blocks:  # whole blocks do not help: as without
            self._units.update(dict.fromkeys(in_blocks, 0))
            raise _StartAgain
        read = {value for value in reads(node) if value in self.splits and self._sources[value]}
        gathers = all(self.splits[v].in_order and v.producer() is not None for v in read) and not read <= self._stops
        if gathers and (is_quantized(node) or all(is_quantized(source) for source in sources)):
            self._stops |= read
        else:
            self._whole |= sources
        self.reasons[node] = reason
        raise _StartAgain

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
