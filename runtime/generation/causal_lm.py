"""What ``generate`` needs to know of a graph: tokens in, logits out, and how the key/value cache goes round."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping

import onnx_ir as ir

from ..errors import ModelError
from ..feeds import index_limits

EOS_KEY = "onnxlathe.eos_token_ids"
"""Metadata: JSON list of the token ids that end a text."""
_PAST = re.compile(r"past_key_values\.(\d+\.(?:key|value))")
_CONTRACT = (
    "Generating takes a causal language model with a cache: inputs input_ids, attention_mask, position_ids (optional) "
    "and past_key_values.N.key/value, outputs logits and present.N.key/value, as onnxlathe.export_causal_lm writes it."
)
TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
"""The inputs that exporters of language models agree on (transformers, optimum, onnxruntime-genai)."""
_TOKEN_INPUTS = (TOKENS, MASK, POSITIONS)
# Which input is [positions, head_dim / 2].
_TABLES = {
    ("com.microsoft", "GroupQueryAttention"): 7,
    ("com.microsoft", "RotaryEmbedding"): 2,
    ("", "RotaryEmbedding"): 1,
}
_ATTENTION_BIAS = 10  # index of this input of GroupQueryAttention


@dataclasses.dataclass(frozen=True)
class CacheTensor:
    """One key or value cache, [batch, heads, length, size]; layers may differ in heads and sizes."""

    past: str
    present: str
    heads: int
    size: int
    dtype: ir.DataType

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.numpy().itemsize


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """A graph that continues a text.

    Attributes:
        tokens: dtypes of the inputs ``input_ids``, ``attention_mask`` and, if there, ``position_ids``.
        cache: the cache's tensors.
        in_place: every past is read only by a GroupQueryAttention that returns it as present: both may be one buffer,
            in which row r's tokens lie from slot 0 on.
        batched: rows of one length can run together (the graph's batch is not fixed to 1).
        ragged: rows of different lengths can run together.
        logits: dtype of the logits.
        logits_size: their last dim; None: unknown.
        last_only: the logits are those of the last position only; None: unknown.
        vocabulary: token ids are smaller than this; None: unknown.
        positions: tokens a text can have, by the model's table of positions; None: unlimited or unknown.
        eos: the token ids that end a text, as the artifact says.
    """

    tokens: Mapping[str, ir.DataType]
    cache: tuple[CacheTensor, ...]
    in_place: bool
    batched: bool
    ragged: bool
    logits: ir.DataType
    logits_size: int | None
    last_only: bool | None
    vocabulary: int | None
    positions: int | None
    eos: tuple[int, ...]


def read_causal_lm(model: ir.Model) -> CausalLM:
    """Reads the contract off the graph; kinds of cache are told by what reads them, not by names.

    Raises:
        ModelError: it is not a causal language model with a cache, or one of a kind that cannot be run.
    """
    inputs = {value.name or "": value for value in model.graph.inputs if not value.is_initializer()}
    outputs = {value.name or "": value for value in model.graph.outputs}
    if "use_cache_branch" in inputs:
        raise ModelError(
            "This model has an input use_cache_branch: optimum's merged kind, which is not supported.",
            "Export decoder_with_past as a file of its own, or the model with onnxlathe.export_causal_lm.",
        )
    past = {name: f"present.{match[1]}" for name in inputs if (match := _PAST.fullmatch(name))}
    missing = [name for name in _TOKEN_INPUTS[:2] if name not in inputs]
    missing += [name for name in ("logits", *past.values()) if name not in outputs]
    if missing or not past:
        raise ModelError(f"This model cannot generate: it has no {', '.join(missing) or 'past_key_values'}.", _CONTRACT)
    if unknown := [name for name in inputs if name not in past and name not in _TOKEN_INPUTS]:
        raise ModelError(f"This model cannot generate: nobody says what its inputs {unknown} are.", _CONTRACT)
    batch, sequence = _dims(inputs["input_ids"], 2)
    if isinstance(sequence, int) or (isinstance(batch, int) and batch != 1):
        raise ModelError(
            f"This model cannot generate: input_ids has the fixed shape {inputs['input_ids'].shape}.",
            "Export it with the dims batch and sequence dynamic.",
        )
    cache = tuple(_cache_tensor(inputs[name], present) for name, present in past.items())
    readers = {name: _cache_reader(inputs[name], outputs[present]) for name, present in past.items()}
    in_place = all(node is not None for node in readers.values())
    grouped = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    # In place, GroupQueryAttention goes by each row's length; an attention bias goes by the columns of the mask.
    biased = any(len(node.inputs) > _ATTENTION_BIAS and node.inputs[_ATTENTION_BIAS] for node in grouped)
    # Otherwise rows are padded on the left, which needs positions of their own, and attention that reads the mask.
    ragged = not biased if in_place else "position_ids" in inputs and not grouped
    limits = index_limits(model)
    _, positions, size = _dims(outputs["logits"], 3)
    last_only = True if positions == 1 else False if positions == sequence is not None else None
    logits_size = size if isinstance(size, int) else None
    sizes = [limit for limit in (limits.get("input_ids"), logits_size) if limit is not None]
    tables = [limits.get("position_ids"), *(_table_rows(node) for node in model.graph)]
    return CausalLM(
        tokens={name: _dtype(inputs[name]) for name in _TOKEN_INPUTS if name in inputs},
        cache=cache,
        in_place=in_place,
        batched=not isinstance(batch, int),
        ragged=ragged,
        logits=_dtype(outputs["logits"]),
        logits_size=logits_size,
        last_only=last_only,
        vocabulary=min(sizes, default=None),
        positions=min((rows for rows in tables if rows is not None), default=None),
        eos=_eos(model.metadata_props.get(EOS_KEY, "[]")),
    )


def _eos(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(token) for token in json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"The model's {EOS_KEY} is no list of token ids: {text[:60]}.", "Export it again.") from error


def _cache_tensor(value: ir.Value, present: str) -> CacheTensor:
    _, heads, _, size = _dims(value, 4)
    if not isinstance(heads, int) or not isinstance(size, int):
        raise ModelError(
            f"This model cannot generate: the shape of {value.name} is {value.shape}, not [batch, heads, past, size] "
            "with fixed heads and size.",
            "Export it with those dims fixed.",
        )
    return CacheTensor(value.name or "", present, heads, size, _dtype(value))


def _cache_reader(past: ir.Value, present: ir.Value) -> ir.Node | None:
    """The GroupQueryAttention that is the only reader of ``past`` and makes ``present`` of it, if there is one."""
    uses = list(past.uses())
    if len(uses) != 1 or past.is_graph_output():
        return None
    node, index = uses[0].node, uses[0].idx
    if (node.domain, node.op_type) != ("com.microsoft", "GroupQueryAttention") or index not in (3, 4):
        return None
    return node if present.producer() is node and present.index() == index - 2 else None


def _table_rows(node: ir.Node) -> int | None:
    """Rows of the table of cosines that a node reads by position."""
    index = _TABLES.get((node.domain, node.op_type), len(node.inputs))
    table = node.inputs[index] if index < len(node.inputs) else None
    size = table.shape[0] if table is not None and table.shape is not None and len(table.shape) == 2 else None
    return size if isinstance(size, int) else None


def _dims(value: ir.Value, rank: int) -> list[int | str | None]:
    """Dims as numbers, names, or None where nothing is known."""
    if value.shape is None:
        return [None] * rank
    if len(value.shape) != rank:
        raise ModelError(f"This model cannot generate: {value.name} has the shape {value.shape}.", _CONTRACT)
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ModelError(f"This model cannot generate: {value.name} has no type.", "Check the file with onnx.checker.")
    return value.dtype
