"""Attention over a key/value cache, however it is spelled, to GroupQueryAttention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...compiler.base import Outcome, Pass, PassContext
from ...compiler.graph import (
    MICROSOFT,
    Array,
    Names,
    add_initializer,
    dims,
    make_node,
    remove_dead,
    replace,
    require_domain,
)
from ...runtime.artifact import MAX_LENGTH_KEY
from ..probing import MASK, TOKENS
from ..symbolic import SymbolicShapes
from .attention_match import NotAttention
from .attention_probe import Meaning, Projection, Table, read_meanings
from .cached_attention import find_caches, match_cached
from .token_order import TokenOrder

_RULE = "attention over a cache -> GroupQueryAttention"
_DEFAULT_LENGTH, _LONGEST = 4096, 32768


@dataclasses.dataclass(frozen=True)
class FuseGroupQueryAttention(Pass):
    """Replaces every attention of a decoder with a key/value cache by ``com.microsoft.GroupQueryAttention``.

    What a block means is asked of the block: its parts are run on made inputs (``attention_probe.py``), so that no
    spelling, exporter or model name matters. Recognized are

    1. caches ``present = Concat(past, new)``; attention written out, or ONNX Attention-23;
    2. fewer key/value heads than query heads, repeated in any way;
    3. rotary embedding, half-rotated or interleaved, of all or the first features: cosines and sines become a table,
       and the kernel rotates. Head sizes that it cannot rotate (no multiple of 16) get RotaryEmbedding nodes;
    4. constant scales on Q, K or the scores, the cap ``c tanh(s / c)``, norms of Q and K before the rotation;
    5. the mask: causal, with or without padding, with or without a local window. It shrinks to ``seqlens_k`` and
       ``total_sequence_length``, computed once;
    6. Q, K and V that are parts of one product go to the kernel packed.

    The cache's layout becomes the graph's own affair: each row's tokens lie from slot 0 on, wherever the caller pads
    (``token_order.py``); logits and the next step are the same. Past and present may be one buffer of any length, and
    nothing is copied then. Position ids are the kernel's: it counts the tokens of each row. It refuses more than one
    row with several new tokens and a cache at once ("batch_size must be 1 when sequence_length > 1").

    All or nothing, as the tokens are reordered for all. Refused: biases on the scores (ALiBi, T5), angles that depend
    on the length of the input, masks that are not causal, caches that other nodes read, head sizes no multiple of 8,
    and anything beside the attentions that is not done token by token (``by_token.py``).

    Positions and windows count tokens. A model without position_ids, and any window, counts slots: those are the same
    unless padding lies between tokens (a prompt padded on the right, then continued), where the answers are others.

    Pays on CPU (no repeated heads, no mask, no copy of the cache) and CUDA (flash attention). Contract: onnxruntime
    docs/ContribOperators.md; rotary embedding: Su et al. 2021 (arXiv 2104.09864).

    Attributes:
        max_length: positions that rotation tables cover, and so the longest text; 0 takes what the model was exported
            with (at most 32768), else 4096.
    """

    name: ClassVar[str] = "fuse-group-query-attention"
    max_length: int = 0

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        if not find_caches(model):
            return outcome
        shapes = SymbolicShapes(model)
        stored = int(model.metadata_props.get(MAX_LENGTH_KEY, "0"))
        length = self.max_length or min(stored or _DEFAULT_LENGTH, _LONGEST)
        try:
            _check_inputs(model)
            blocks = match_cached(model, shapes)
            meanings = read_meanings(model, blocks, shapes, length, context.progress)
            for meaning in meanings:
                _check_kernel(meaning)
        except NotAttention as refusal:
            node = find_caches(model)[0].present.producer() or next(iter(model.graph))
            outcome.refuse(node, _RULE, str(refusal) or "what follows the cache is no attention that is known here")
            return outcome
        builder = _Builder(model, shapes, self.name)
        for meaning in meanings:
            builder.write(meaning)
        builder.restore_outputs()
        require_domain(model, MICROSOFT)
        remove_dead(model)
        outcome.counts["GroupQueryAttention"] = len(meanings)
        if builder.tables:
            length = min(len(meaning.table.cos) for meaning in meanings if meaning.table is not None)
            model.metadata_props[MAX_LENGTH_KEY] = str(length)
            outcome.notes.append(f"rotary angles are tabulated for {length} positions")
        if builder.rotated_outside:
            outcome.notes.append(
                "the head size is no multiple of 16: rotated by RotaryEmbedding nodes before the kernel"
            )
        return outcome


def _check_inputs(model: ir.Model) -> None:
    names = {value.name for value in model.graph.inputs}
    missing = [name for name in (TOKENS, MASK) if name not in names]
    if missing:
        raise NotAttention(f"the model has no input {missing[0]}, so the lengths of its rows are not known")


def _heads(meaning: Meaning) -> tuple[int, int, int]:
    """Query heads, key/value heads, head size."""
    heads, size = meaning.query.index.shape
    return heads, meaning.key.index.shape[0], size


def _check_kernel(meaning: Meaning) -> None:
    heads, kv_heads, size = _heads(meaning)
    if size % 8:
        raise NotAttention(f"the head size {size} is no multiple of 8, which the kernel demands")
    if heads % kv_heads:
        raise NotAttention(f"{heads} query heads are no multiple of {kv_heads} key/value heads")
    if meaning.value.index.shape[1] != size:
        raise NotAttention(f"keys have {size} features a head, values {meaning.value.index.shape[1]}")
    if not meaning.padded:
        raise NotAttention("the attention mask has no effect on it")


class _Builder:
    """Writes the fused nodes."""

    def __init__(self, model: ir.Model, shapes: SymbolicShapes, by: str) -> None:
        self._model, self._shapes, self._by = model, shapes, by
        self._names = Names(model)
        self._rows = [
            value for value in model.graph.outputs if value not in {cache.present for cache in find_caches(model)}
        ]
        self._order = TokenOrder(model, self._names, by)
        self.tables: dict[int, tuple[ir.Value, ir.Value]] = {}
        self.rotated_outside = False

    def write(self, meaning: Meaning) -> None:
        """Replaces one block."""
        block = meaning.block
        heads, kv_heads, size = _heads(meaning)
        new: list[ir.Node] = []
        base = self._names.fresh(f"{block.nodes[0].name or 'attention'}/gqa")
        parts = (meaning.query, meaning.key, meaning.value)
        table = meaning.table
        inside = table is not None and size % 16 == 0 and table.cos.shape[1] % 8 == 0
        packed = _is_packed(parts) and (table is None or inside)
        operands: list[ir.Value | None] = (
            [meaning.query.source, None, None] if packed else [self._flat(part, new) for part in parts]
        )
        caches = self._table(table) if table is not None else (None, None)
        if table is not None and not inside:
            for position, count in ((0, heads), (1, kv_heads)):
                operands[position] = self._rotate(operands[position], count, size, table, caches, new)
            self.rotated_outside = True
        inputs = [*operands, block.key.past, block.value.past, self._order.lengths, self._order.total]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
        if inside and table is not None:
            inputs += caches
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(table.interleaved)}
        if not math.isclose(meaning.scale, size**-0.5, rel_tol=1e-6):
            attributes["scale"] = meaning.scale
        if block.softcap:
            attributes["softcap"] = block.softcap
        if meaning.window:
            attributes["local_window_size"] = meaning.window
        result = block.last.outputs[0]
        outputs = [ir.Value(name=self._names.fresh(f"{result.name}_attention"), shape=result.shape, type=result.type)]
        for cache in (block.key, block.value):
            name = self._names.fresh(f"{cache.present.name}_concat")
            outputs.append(ir.Value(name=cache.present.name, shape=cache.present.shape, type=cache.present.type))
            position = list(self._model.graph.outputs).index(cache.present)
            self._model.graph.outputs[position] = outputs[-1]
            cache.present.name = name
        new.append(
            ir.node("GroupQueryAttention", inputs, attributes=attributes, domain=MICROSOFT, outputs=outputs, name=base)
        )
        if len(result.shape or ()) == 2:  # both axes joined, for a Gemm: the old target does it again
            outputs[0].shape = None
            target = block.last.inputs[1]
            name = self._names.fresh(f"{base}/reshape")
            new.append(make_node("Reshape", [outputs[0], target], name=name, output=f"{name}_out", like=result))
        replace(block.last, new, by=self._by, gone=block.nodes)

    def restore_outputs(self) -> None:
        """Gives logits and other results by token back in the caller's order."""
        for output in self._rows:
            self._order.restore(output)

    def _flat(self, part: Projection, new: list[ir.Node]) -> ir.Value:
        """The heads of one projection as [batch, sequence, heads * head_dim]."""
        heads, size = part.index.shape
        value, known = part.source, self._shapes.dims(part.source)
        tokens = part.source.shape
        if known is None or tokens is None:
            raise ValueError(f"{value.name} has no shape")
        if len(known) == 4:
            if not known[1][1]:
                value = self._append("Transpose", [value], f"{value.name}_by_token", new, None, perm=[0, 2, 1, 3])
            target = add_initializer(
                self._model.graph, self._names, "flat_heads", np.array([0, 0, heads * size], np.int64)
            )
            value = self._append(
                "Reshape", [value, target], f"{part.source.name}_flat", new, [None, None, heads * size]
            )
        index = part.index.reshape(-1)
        width = known[-1][0] if len(known) == 3 else heads * size
        if np.array_equal(index, np.arange(width)):
            return value
        shape = [tokens[0], tokens[1], index.size] if len(known) == 3 else [None, None, index.size]
        if np.array_equal(index, np.arange(index[0], index[0] + index.size)):
            bounds = [[int(index[0])], [int(index[-1]) + 1], [-1]]
            arrays = [self._integers("bound", numbers) for numbers in bounds]
            return self._append("Slice", [value, *arrays], f"{value.name}_part", new, shape)
        return self._append(
            "Gather", [value, self._integers("features", index.tolist())], f"{value.name}_part", new, shape, axis=-1
        )

    def _rotate(
        self,
        value: ir.Value | None,
        heads: int,
        size: int,
        table: Table,
        caches: tuple[ir.Value | None, ir.Value | None],
        new: list[ir.Node],
    ) -> ir.Value:
        attributes: dict[str, Any] = {"num_heads": heads, "interleaved": int(table.interleaved)}
        if 2 * table.cos.shape[1] != size:
            attributes["rotary_embedding_dim"] = 2 * table.cos.shape[1]
        if value is None:
            raise ValueError("a packed product cannot be rotated outside of the kernel")
        inputs = [value, self._order.positions, *caches]
        return self._append(
            "RotaryEmbedding", inputs, f"{value.name}_rotated", new, value.shape, MICROSOFT, **attributes
        )

    def _table(self, table: Table) -> tuple[ir.Value, ir.Value]:
        if id(table) not in self.tables:
            graph, suffix = self._model.graph, f"_{len(self.tables)}" if self.tables else ""

            def store(name: str, array: Array) -> ir.Value:
                return add_initializer(graph, self._names, f"{name}{suffix}", array)

            self.tables[id(table)] = (store("cos_cache", table.cos), store("sin_cache", table.sin))
        return self.tables[id(table)]

    def _integers(self, base: str, numbers: list[int]) -> ir.Value:
        return add_initializer(self._model.graph, self._names, base, np.array(numbers, np.int64))

    def _append(
        self,
        op: str,
        inputs: list[ir.Value | None],
        base: str,
        new: list[ir.Node],
        shape: Any,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        name = self._names.fresh(base)
        dtype = inputs[0].dtype if inputs[0] is not None else None
        new.append(
            make_node(
                op, inputs, name=name, output=name, shape=shape, dtype=dtype, attributes=attributes, domain=domain
            )
        )
        return new[-1].outputs[0]


def _is_packed(parts: tuple[Projection, Projection, Projection]) -> bool:
    """Whether Q, K and V are, in this order, all the features of one product."""
    if len({part.source for part in parts}) != 1 or len(parts[0].source.shape or ()) != 3:
        return False
    index = np.concatenate([part.index.reshape(-1) for part in parts])
    return index.size == (dims(parts[0].source) or [None])[-1] and np.array_equal(index, np.arange(index.size))
