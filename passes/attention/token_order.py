"""Puts the tokens of each row before its padding, and the results back, for kernels that know padding only at the end.

GroupQueryAttention counts positions from the start of a row: its tokens are contiguous from slot 0. Callers pad where
they like (Hugging Face: on the left). So inside the graph new tokens come first, padding last; what padding computes is
nobody's business and later steps overwrite it in the cache, whose layout is the graph's own affair.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...compiler.graph import PASS_KEY, Names, add_initializer, constant, is_op, make_node, producer
from ..probing import MASK, POSITIONS, TOKENS

_AFTER_HEAD = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")


class TokenOrder:
    """Nodes at the start of a decoder's graph that all of its attentions share.

    Attributes:
        lengths: int32 [batch], cached and new positions of each row minus one (``seqlens_k``).
        total: int32 [], width of the attention mask (``total_sequence_length``).
        positions: int64 [batch, sequence], the position ids in the new order.
    """

    def __init__(self, model: ir.Model, names: Names, by: str) -> None:
        self._graph, self._names, self._by = model.graph, names, by
        self._nodes: list[ir.Node] = []
        self._restored: dict[ir.Value, ir.Value] = {}
        inputs = {value.name: value for value in model.graph.inputs}
        self._tokens, mask = inputs[TOKENS], inputs[MASK]
        readers = [(use.node, use.idx) for use in self._tokens.uses()]
        given = inputs.get(POSITIONS)
        position_readers = [(use.node, use.idx) for use in given.uses()] if given is not None else []
        self._build(mask, given)
        for node, index in readers:
            if not is_op(node, "Shape"):
                node.replace_input_with(index, self._ids)
        for node, index in position_readers:
            node.replace_input_with(index, self.positions)
        first = next(iter(self._graph))
        self._graph.insert_before(first, self._nodes)

    def _build(self, mask: ir.Value, given: ir.Value | None) -> None:
        i64, i32 = ir.DataType.INT64, ir.DataType.INT32
        batch = mask.shape[0] if mask.shape is not None else None
        sequence = self._tokens.shape[1] if self._tokens.shape is not None else None
        shape = [batch, sequence]
        if mask.dtype != i64:
            mask = self._op("Cast", [mask], "mask", i64, mask.shape, to=int(i64))
        zero, one = self._constant("zero", [0]), self._constant("one", [1])
        total = self._op("Shape", [mask], "total", i64, [1], start=1, end=2)
        new = self._op("Shape", [self._tokens], "new", i64, [1], start=1, end=2)
        past = self._op("Sub", [total, new], "past", i64, [1])
        # What the kernel counts as cached: the tokens of the past, and all new positions, padding too.
        cached = self._op("Slice", [mask, zero, past, one], "cached", i64, None)
        counted = self._op("ReduceSum", [cached, one], "cached_tokens", i64, [batch], keepdims=0)
        last = self._op("Sub", [new, one], "last_new", i64, [1])
        lengths = self._op("Add", [counted, last], "lengths", i64, [batch])
        self.lengths = self._op("Cast", [lengths], "seqlens_k", i32, [batch], to=int(i32))
        flat = self._op("Squeeze", [total], "total_length", i64, [])
        self.total = self._op("Cast", [flat], "total_sequence_length", i32, [], to=int(i32))
        # Sorting ones before zeros; TopK keeps equals in their order (ONNX operator TopK-11).
        mine = self._op("Slice", [mask, past, total, one], "new_tokens", i64, shape)
        order = self._sorted(mine, new, "order", largest=1)
        back = self._sorted(order, new, "given_order", largest=0)
        self._back = self._op("Unsqueeze", [back, self._constant("last_axis", [-1])], "rows", i64, [*shape, 1])
        self._ids = self._op("GatherElements", [self._tokens, order], "ordered_ids", self._tokens.dtype, shape, axis=1)
        if given is not None:
            self.positions = self._op("GatherElements", [given, order], "ordered_positions", given.dtype, shape, axis=1)
            return
        zero_axis, by = self._constant("from", 0), self._constant("by", 1)
        end = self._op("Squeeze", [new], "new_length", i64, [])
        ahead = self._op("Range", [zero_axis, end, by], "ahead", i64, [sequence])
        start = self._op("Unsqueeze", [counted, one], "start", i64, [batch, 1])
        self.positions = self._op("Add", [start, ahead], "positions", i64, shape)

    def _sorted(self, value: ir.Value, count: ir.Value, base: str, *, largest: int) -> ir.Value:
        """The positions of the numbers of each row in sorted order."""
        name = self._names.fresh(f"token_order/{base}")
        outputs = [
            ir.Value(name=f"{name}_{word}", shape=value.shape, type=ir.TensorType(ir.DataType.INT64))
            for word in ("values", "indices")
        ]
        attributes = {"axis": 1, "largest": largest, "sorted": 1}
        self._add(ir.node("TopK", [value, count], attributes=attributes, outputs=outputs, name=name))
        return outputs[1]

    def restore(self, output: ir.Value) -> None:
        """Puts the rows of the graph output ``output`` back into the caller's order; other readers keep the new one.

        As far up as only the output depends on the rows: before the language model's head, whose input is narrower.
        """
        head = head_product(output)
        if head is not None:
            head.replace_input_with(0, self._in_given_order(head.inputs[0]))
            return
        restored = self._in_given_order(output)
        outputs = self._graph.outputs
        outputs[list(outputs).index(output)] = restored
        output.name, restored.name = self._names.fresh(f"{output.name}_ordered"), output.name

    def _in_given_order(self, value: ir.Value | None) -> ir.Value:
        if value is None or (maker := value.producer()) is None:
            raise ValueError("a graph input is no result of a token")
        if value not in self._restored:
            name = self._names.fresh(f"{value.name}_given_order")
            node = make_node(
                "GatherND", [value, self._back], name=name, output=name, like=value, attributes={"batch_dims": 1}
            )
            node.metadata_props[PASS_KEY] = self._by
            self._graph.insert_after(maker, node)
            self._restored[value] = node.outputs[0]
        return self._restored[value]

    def _constant(self, base: str, numbers: list[int] | int) -> ir.Value:
        return add_initializer(self._graph, self._names, f"tokens_{base}", np.array(numbers, np.int64))

    def _op(
        self,
        op: str,
        inputs: list[ir.Value],
        base: str,
        dtype: ir.DataType | None,
        shape: object,
        **attributes: int,
    ) -> ir.Value:
        name = self._names.fresh(f"token_order/{base}")
        node = make_node(
            op,
            inputs,
            name=name,
            output=name,
            shape=shape,  # pyright: ignore[reportArgumentType]
            dtype=dtype if dtype is not None else inputs[0].dtype,
            attributes=attributes,
        )
        self._add(node)
        return node.outputs[0]

    def _add(self, node: ir.Node) -> None:
        node.metadata_props[PASS_KEY] = self._by
        self._nodes.append(node)


def head_product(output: ir.Value) -> ir.Node | None:
    """The last product that makes ``output`` and nothing else, if its rows are those of its first operand."""
    value = output
    for _ in range(8):
        node = producer(value)
        if node is None or len(value.uses()) != (value is not output):
            return None
        if is_op(node, "MatMul", "MatMulNBits"):
            source, weight = node.inputs[:2]
            by_row = source is not None and source.producer() is not None and len(source.shape or ()) == 3
            constant_weight = weight is not None and (is_op(node, "MatMulNBits") or len(weight.shape or ()) == 2)
            return node if by_row and constant_weight else None
        operands = [item for item in node.inputs if item is not None and constant(item, limit=1) is None]
        if node.op_type not in _AFTER_HEAD or len(operands) != 1:
            return None
        value = operands[0]
    return None
