"""Attention and rotary embedding, as the operators that fusions write define them."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ..graph import MICROSOFT, attribute, rank
from .elementwise import masked_softmax
from .table import Call, given, only, operator


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, softcap: float = 0.0) -> Tensor:
    """``softmax(softcap(scale q k^T) + bias) v``; heads of k and v are repeated where q has more of them.

    Args:
        q: [batch, heads, sequence, size].
        k: [batch, kv heads, total, size].
        v: [batch, kv heads, total, value size].
        bias: added to the scores, broadcast over [batch, heads, sequence, total].
        scale: None for 1 / sqrt(size).
        softcap: scores become ``softcap tanh(scores / softcap)``; 0 for none.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (item.repeat_interleave(q.shape[1] // item.shape[1], 1) for item in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return masked_softmax(scores if bias is None else scores + bias) @ v


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, sequence, heads * size] -> [batch, heads, sequence, size]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """The inverse of ``_heads``."""
    return x.transpose(1, 2).flatten(2)


def _forbid(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``allowed``, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, float("-inf"))


def _refuse_multi_head(node: ir.Node) -> str:
    names = {6: "past_key", 7: "past_value", 8: "past_sequence_length", 9: "cache_indirection"}
    unused = [names[index] for index in given(node, *names)]
    if unused or len(given(node, 1, 2)) < 2:
        return f"the input {unused[0]}" if unused else "packed query, key and value"
    if given(node, 4) and rank(node.inputs[4]) != 2:
        return "a key_padding_mask that is not [batch, total]"
    return "outputs beyond the first" if any(output.name for output in node.outputs[1:]) else ""


@operator("MultiHeadAttention", domain=MICROSOFT, refuse=_refuse_multi_head)
def _multi_head(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """com.microsoft.MultiHeadAttention; k and v are [batch, total, hidden] or split by heads already."""
    count = call.get("num_heads")
    if bias is not None:
        parts = bias.split([q.shape[-1], q.shape[-1], bias.numel() - 2 * q.shape[-1]])
        q = q + parts[0]
        k = k + (parts[1] if k.dim() == 3 else _heads(parts[1][None, None], count))
        v = v + (parts[2] if v.dim() == 3 else _heads(parts[2][None, None], count))
    query = _heads(q, count)
    key, value = (_heads(item, count) if item.dim() == 3 else item for item in (k, v))
    if padding is not None:
        masked = torch.where(padding[:, None, None] > 0, 0.0, call.get("mask_filter_value", -10000.0)).to(q.dtype)
        scores = masked if scores is None else scores + masked
    if call.get("unidirectional", 0):
        size, total = query.shape[2], key.shape[2]
        causal = torch.ones(size, total, dtype=torch.bool, device=q.device).tril(total - size)
        barred = torch.zeros_like(causal, dtype=q.dtype).masked_fill(~causal, torch.finfo(q.dtype).min)
        scores = barred if scores is None else scores + barred
    return _joined(attend(query, key, value, scores, call.get("scale")))


def _refuse_attention(node: ir.Node) -> str:
    if given(node, 6):
        return "the input nonpad_kv_seqlen"
    return "the output qk_matmul_output" if any(output.name for output in node.outputs[3:]) else ""


@operator("Attention", refuse=_refuse_attention)
def _attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """ai.onnx Attention-23; three dims with heads as attributes, or four."""
    flat = q.dim() == 3
    if flat:
        q = _heads(q, call.get("q_num_heads"))
        k, v = (_heads(item, call.get("kv_num_heads")) for item in (k, v))
    past = 0
    if past_k is not None and past_v is not None:
        past = past_k.shape[2]
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    size, total = q.shape[2], k.shape[2]
    bias = None
    if mask is not None:
        bias = _forbid(mask, q.dtype) if mask.dtype == torch.bool else mask
        if bias.shape[-1] < total:
            bias = torch.nn.functional.pad(bias, [0, total - bias.shape[-1]], value=float("-inf"))
    if call.get("is_causal", 0):
        causal = _forbid(torch.ones(size, total, dtype=torch.bool, device=q.device).tril(past), q.dtype)
        bias = causal if bias is None else bias + causal
    mixed = attend(q, k, v, bias, call.get("scale"), call.get("softcap", 0.0))
    return _joined(mixed) if flat else mixed, k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int) -> Tensor:
    """Turns pairs of the first ``size`` channels of x by their angles.

    Args:
        x: [batch, heads, sequence, channels].
        cos, sin: [batch, sequence, size / 2].
        interleaved: pairs are neighbours; else a channel of the first half and one of the second.
        size: channels that turn; 0 for all.
    """
    turned, rest = (x[..., :size], x[..., size:]) if size else (x, None)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        result = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        result = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return result if rest is None else torch.cat([result, rest], -1)


def _rotary(call: Call, x: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int) -> Tensor:
    interleaved = bool(call.get("interleaved", 0))
    if x.dim() == 4:
        return rotate(x, cos, sin, interleaved, size)
    return _joined(rotate(_heads(x, heads), cos, sin, interleaved, size))


@operator("RotaryEmbedding")
def _rotary_embedding(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """ai.onnx RotaryEmbedding-23; without positions the caches are [batch, sequence, size / 2]."""
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    return _rotary(call, x, cos, sin, call.get("num_heads", 0), call.get("rotary_embedding_dim", 0))


def _refuse_rotary(node: ir.Node) -> str:
    return only(scale=1.0, is_packed_batching=0)(node)


@operator("RotaryEmbedding", domain=MICROSOFT, refuse=_refuse_rotary)
def _rotary_microsoft(call: Call, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """com.microsoft.RotaryEmbedding; positions [batch, sequence], or the first one alone."""
    length = x.shape[1] if x.dim() == 3 else x.shape[2]
    if positions.numel() == 1:
        positions = (positions.reshape(1, 1) + torch.arange(length, device=x.device)).expand(x.shape[0], -1)
    size = call.get("rotary_embedding_dim", 0)
    heads = call.get("num_heads", 0) or (0 if size or x.dim() == 4 else x.shape[-1] // (2 * cos.shape[-1]))
    return _rotary(call, x, cos[positions.long()], sin[positions.long()], heads, size)


def _refuse_grouped(node: ir.Node) -> str:
    names = {9: "position_ids", 11: "head_sink", 12: "k_scale", 13: "v_scale"}
    unused = [names[index] for index in given(node, *names)]
    if unused:
        return f"the input {unused[0]}"
    if attribute(node, "smooth_softmax", 0) > 0:
        return "smooth_softmax"
    return "outputs beyond present_value" if any(output.name for output in node.outputs[3:]) else ""


@operator("GroupQueryAttention", domain=MICROSOFT, host=(6,), refuse=_refuse_grouped)
def _grouped(
    call: Call,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    last: Tensor,
    total: Any,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """com.microsoft.GroupQueryAttention; row b's tokens lie from slot 0 on, ``last[b] + 1`` of them.

    A step whose sequence is the total length starts from nothing, whatever the rows' lengths; padding lies behind.
    """
    heads, groups = call.get("num_heads"), call.get("kv_num_heads")
    total = total if isinstance(total, int) else total[0]
    if k is None or v is None:
        size = q.shape[-1] // (heads + 2 * groups)
        q, k, v = q.split([heads * size, groups * size, groups * size], -1)
    query, key, value = _heads(q, heads), _heads(k, groups), _heads(v, groups)
    new = query.shape[2]
    lengths = last.reshape(-1).long() + 1
    past = torch.zeros_like(lengths) if new == total else lengths - new
    at = past[:, None] + torch.arange(new, device=q.device)
    if call.get("do_rotary", 0) and cos is not None and sin is not None:
        size = 0 if 2 * cos.shape[-1] == query.shape[-1] else 2 * cos.shape[-1]
        angles = cos[at.clamp(min=0)], sin[at.clamp(min=0)], bool(call.get("rotary_interleaved", 0)), size
        query, key = rotate(query, *angles), rotate(key, *angles)
    slots = max(total, past_k.shape[2]) if past_k is not None else total
    key, value = _appended(past_k, key, past, slots), _appended(past_v, value, past, slots)
    slot = torch.arange(slots, device=q.device)
    allowed = slot <= at[..., None]
    window = call.get("local_window_size", -1)
    if window > 0:
        allowed = allowed & (slot > at[..., None] - window)
    barred = _forbid(allowed, q.dtype)[:, None]
    if bias is not None:
        barred = barred + torch.nn.functional.pad(bias, [0, slots - bias.shape[-1]])
    mixed = attend(query, key, value, barred, call.get("scale") or None, call.get("softcap", 0.0))
    return _joined(mixed), key, value


def _appended(past: Tensor | None, new: Tensor, counts: Tensor, slots: int) -> Tensor:
    """Row b of ``past`` up to slot ``counts[b]``, then ``new``; what lies behind is arbitrary."""
    if past is None:
        return new
    both = torch.cat([past, new], 2)
    slot = torch.arange(slots, device=new.device)
    behind = (past.shape[2] + slot - counts[:, None]).clamp(min=0, max=both.shape[2] - 1)
    source = torch.where(slot < counts[:, None], slot, behind)
    return both.gather(2, source[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))
