"""What zeros in weights are worth in a file."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import onnx_ir as ir

from ...compiler.graph import Array

_SAMPLE = 1 << 20  # bytes of a tensor that are compressed to see how small it gets
_COO_INDEX = 8  # bytes of an index in ONNX's SparseTensorProto


def size_notes(changes: Iterable[tuple[ir.TensorProtocol | None, ir.TensorProtocol | None]]) -> list[str]:
    """Lines for the report: bytes of the tensors before and after, dense, compressed, and as ONNX sparse tensors."""
    dense = zeros = numbers = coordinates = 0
    packed_before = packed_after = 0.0
    for before, after in changes:
        if before is None or after is None:
            continue
        array = after.numpy()
        missing = int(array.size - (array != 0).sum())
        dense += array.nbytes
        numbers += array.size
        zeros += missing
        coordinates += (array.size - missing) * (array.itemsize + _COO_INDEX)
        packed_before += _compressed(before.numpy())
        packed_after += _compressed(array)
    if not numbers:
        return []
    return [
        f"{zeros / numbers:.2%} of {numbers} weights are zero. No gain in speed: ONNX Runtime multiplies with zeros at "
        "full cost",
        f"file size: {dense} bytes as .onnx, as before; about {packed_after:.0f} ({packed_after / dense:.3f} x) saved "
        f"as .onnx.gz, where they took {packed_before:.0f} before; ONNX sparse initializers, with their 64-bit "
        f"indices, would take {coordinates} ({coordinates / dense:.2f} x)",
    ]


def _compressed(array: Array) -> float:
    """About how many bytes gzip makes of ``array``, from its first megabyte."""
    content = array.reshape(-1)[: _SAMPLE // array.itemsize].tobytes()
    return len(zlib.compress(content)) * array.nbytes / max(len(content), 1)
