"""Operators that move, cut, index and make tensors."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from .table import DTYPES, Call, operator


@operator("Shape")
def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[call.get("start", 0) : call.get("end")], dtype=torch.int64)


@operator("Size")
def _size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@operator("Reshape", host=(1,))
def _reshape(call: Call, x: Tensor, shape: list[int]) -> Tensor:
    if not call.get("allowzero", 0):
        shape = [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    return x.reshape(shape)


@operator("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, x[0:1].numel())


@operator("Squeeze", host=(1,))
def _squeeze(call: Call, x: Tensor, axes: list[int] | None = None) -> Tensor:
    chosen = call.get("axes") if axes is None else axes
    return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))


@operator("Unsqueeze", host=(1,))
def _unsqueeze(call: Call, x: Tensor, axes: Any = None) -> Tensor:
    chosen = call.get("axes") if axes is None else axes
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    rank = x.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(list(call.get("perm") or range(x.dim())[::-1]))


@operator("Concat")
def _concat(call: Call, *items: Tensor) -> Tensor:
    return torch.cat(items, call.get("axis"))


@operator("Split", host=(1,))
def _split(call: Call, x: Tensor, sizes: list[int] | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    sizes = call.get("split") if sizes is None else sizes
    if sizes is None:
        return torch.split(x, -(-x.shape[axis] // len(call.node.outputs)), axis)
    return torch.split(x, list(sizes), axis)


@operator("Slice", host=(1, 2, 3, 4))
def _slice(
    call: Call,
    x: Tensor,
    starts: list[int] | None = None,
    ends: list[int] | None = None,
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    """Below opset 10 everything is an attribute."""
    starts = list(call.get("starts") if starts is None else starts)
    ends = list(call.get("ends") if ends is None else ends)
    axes = list((call.get("axes") if axes is None else axes) or range(len(starts)))
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        size = x.shape[axis]
        low, high = (0, size) if step > 0 else (-1, size - 1)
        first = min(max(start + size if start < 0 else start, max(low, 0)), high)
        last = min(max(end + size if end < 0 else end, low), high)
        if step == 1:
            x = x.narrow(axis, first, max(last - first, 0))
        else:
            x = x.index_select(axis, torch.tensor(range(first, last, step), dtype=torch.int64, device=x.device))
    return x


@operator("Gather")
def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.dim()
    found = x.index_select(axis, positive(indices, x.shape[axis]).reshape(-1))
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def positive(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the start, int64."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@operator("GatherElements")
def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return x.gather(axis, positive(indices, x.shape[axis]))


@operator("GatherND")
def _gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    batch = call.get("batch_dims", 0)
    parts = indices.unbind(-1)
    leading = [
        torch.arange(x.shape[axis], device=x.device).reshape([-1 if at == axis else 1 for at in range(parts[0].dim())])
        for axis in range(batch)
    ]
    found = [positive(part, x.shape[batch + number]) for number, part in enumerate(parts)]
    return x[tuple([*leading, *found])]


@operator("Expand", host=(1,))
def _expand(call: Call, x: Tensor, shape: list[int]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


@operator("Tile", host=(1,))
def _tile(call: Call, x: Tensor, repeats: list[int]) -> Tensor:
    return x.repeat(repeats)


@operator("ConstantOfShape", host=(0,))
def _constant_of_shape(call: Call, shape: list[int]) -> Tensor:
    value = call.get("value")
    if value is None:
        return torch.zeros(shape)
    return torch.full(shape, value.numpy().reshape(-1)[0].item(), dtype=DTYPES[value.dtype])


@operator("Range")
def _range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


@operator("Trilu", host=(1,))
def _trilu(call: Call, x: Tensor, k: Any = None) -> Tensor:
    number = k if isinstance(k, int) else (k[0] if k else 0)
    return x.triu(number) if call.get("upper", 1) else x.tril(number)


@operator("TopK", host=(1,))
def _top_k(call: Call, x: Tensor, k: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Of equal ones the first, as ONNX wants it; torch.topk takes any."""
    count = call.get("k") if k is None else k[0]
    axis = call.get("axis", -1)
    values, indices = torch.sort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@operator("Einsum")
def _einsum(call: Call, *items: Tensor) -> Tensor:
    return torch.einsum(call.get("equation"), *items)


def _refuse_pad(node: ir.Node) -> str:
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    return "" if mode == "constant" else f"mode={mode!r}"


@operator("Pad", host=(1, 3), refuse=_refuse_pad)
def _pad(
    call: Call, x: Tensor, pads: list[int] | None = None, value: Tensor | None = None, axes: list[int] | None = None
) -> Tensor:
    """Below opset 11 pads and value are attributes."""
    pads = list(call.get("pads") if pads is None else pads)
    filler = call.get("value", 0.0) if value is None else value.reshape(-1)[0].item()
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    amounts = [[0, 0] for _ in range(x.dim())]
    for number, axis in enumerate(axes):
        amounts[axis] = [pads[number], pads[len(axes) + number]]
    return F.pad(x, [amount for pair in reversed(amounts) for amount in pair], value=filler)
