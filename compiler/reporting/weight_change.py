"""What became of the weights: bits, zeros and bytes, place by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from ...runtime.quantization import unpack_bits
from ..graph import attribute, constant, qualified_op, weight_bytes
from .graph_change import Place
from .graph_match import Matching
from .records import WeightChange, Weights

SHOWN = 200
_SMALL = 1024  # bytes; shapes, scales and biases below are only counted
_PACKED = ("MatMulNBits", "GatherBlockQuantized")


class _Side:
    """Hands out each initializer of a graph once, to the first that asks for it."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self, nodes: Iterable[ir.Node]) -> list[tuple[ir.Value, ir.Node]]:
        """The initializers that ``nodes`` read and nobody has taken, the largest first, each with a reader."""
        found: list[tuple[ir.Value, ir.Node]] = []
        for node in nodes:
            for value in node.inputs:
                tensor = value.const_value if value is not None and value.is_initializer() else None
                if value is not None and tensor is not None and id(tensor) not in self._taken:
                    self._taken.add(id(tensor))
                    found.append((value, node))
        return sorted(found, key=lambda item: -_bytes(item[0]))


def weight_change(before: ir.Model, after: ir.Model, match: Matching, found: Sequence[Place]) -> Weights:
    """The initializers of two graphs, the largest first.

    Those of the nodes of one place belong together, as do those of a pair of nodes. Zeros of weights that stayed in
    external files are not counted, as nothing else may have read them.
    """
    old, new = _Side(), _Side()
    groups = [*((place.before, place.after) for place in found), *(([a], [b]) for a, b in match.pairs.items())]
    changes = [change for ours, theirs in groups if (change := _change(old.take(ours), new.take(theirs))) is not None]
    changes.sort(key=lambda change: -max(change.bytes_before, change.bytes_after))
    shown = [change for change in changes[:SHOWN] if max(change.bytes_before, change.bytes_after) >= _SMALL]
    listed = sum(change.bytes_before for change in shown), sum(change.bytes_after for change in shown)
    return Weights(
        shown,
        (len(changes) - len(shown), weight_bytes(before) - listed[0], weight_bytes(after) - listed[1]),
        (_by_type(before), _by_type(after)),
    )


def _change(old: Sequence[tuple[ir.Value, ir.Node]], new: Sequence[tuple[ir.Value, ir.Node]]) -> WeightChange | None:
    if not old and not new:
        return None
    main, reader = new[0] if new else old[0]
    first, first_reader = old[0] if old else new[0]
    bytes_before, bytes_after = (sum(_bytes(value) for value, _ in side) for side in (old, new))
    return WeightChange(
        name=main.name or "",
        op=qualified_op(reader),
        shape=[int(dim) for dim in _tensor(first).shape.numpy()],
        types=(_type(first, first_reader) if old else "", _type(main, reader) if new else ""),
        elements=(_elements(old), _elements(new)),
        zeros=_zeros(main, reader) if new else None,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
    )


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _bytes(value: ir.Value) -> int:
    return _tensor(value).nbytes


def _bits(value: ir.Value, reader: ir.Node) -> int | None:
    """Bits of a packed element, None where the tensor is not packed."""
    packed = reader.op_type in _PACKED and _tensor(value).dtype == ir.DataType.UINT8
    return int(attribute(reader, "bits", 4)) if packed else None


def _elements(side: Sequence[tuple[ir.Value, ir.Node]]) -> int:
    """Numbers in the matrices; where there are none, in all."""
    matrices = [item for item in side if _is_matrix(*item)]
    return sum(_tensor(value).size * 8 // (_bits(value, node) or 8) for value, node in matrices or side)


def _is_matrix(value: ir.Value, reader: ir.Node) -> bool:
    """Whether it is what a node multiplies with or looks up in, and not scales, zero points or a bias."""
    places = (0,) if reader.op_type in ("QuantizeLinear", "DequantizeLinear") else (0, 1)
    return len(_tensor(value).shape) > 1 and reader.inputs.index(value) in places


def _type(value: ir.Value, reader: ir.Node) -> str:
    bits = _bits(value, reader)
    return f"uint{bits}" if bits else _tensor(value).dtype.name.lower()


def _zeros(value: ir.Value, reader: ir.Node) -> float | None:
    tensor = _tensor(value)
    if isinstance(tensor, ir.ExternalTensor) or tensor.size == 0:
        return None
    if (bits := _bits(value, reader)) is not None:
        return _packed_zeros(tensor.numpy(), bits, reader)
    if tensor.dtype == ir.DataType.UINT8:
        return _shifted_zeros(tensor.numpy(), value, reader)
    if (tensor.dtype.is_integer() and tensor.dtype.bitwidth > 8) or not tensor.dtype.is_signed():
        return None  # indices, shapes, masks
    return 1 - int(np.count_nonzero(tensor.numpy())) / tensor.size


def _packed_zeros(packed: np.ndarray, bits: int, reader: ir.Node) -> float | None:
    """Of blocks: what is equal to the zero point, which is the middle where none is stored."""
    if 8 % bits:
        return None
    given = reader.inputs[3] if len(reader.inputs) > 3 else None
    numbers = unpack_bits(packed, bits)
    if given is None:
        return float(np.mean(numbers == 1 << (bits - 1)))
    points = constant(given)
    if points is None or points.dtype != np.uint8 or packed.ndim != 3:
        return None
    points = unpack_bits(points.reshape(packed.shape[0], -1), bits)[:, : packed.shape[1]]
    return float(np.mean(numbers == points[:, :, None]))


def _shifted_zeros(array: np.ndarray, value: ir.Value, reader: ir.Node) -> float | None:
    """Of an affine tensor whose zero point its reader has."""
    places = {"DequantizeLinear": (0, 2), "MatMulInteger": (1, 3), "MatMulIntegerToFloat": (1, 5)}
    weight, point = places.get(reader.op_type, (None, 0))
    if weight is None or len(reader.inputs) <= point or reader.inputs[weight] is not value:
        return None
    zero = constant(reader.inputs[point], limit=1)
    return None if zero is None else float(np.mean(array == zero.reshape(())))


def _by_type(model: ir.Model) -> dict[str, int]:
    total: Counter[str] = Counter()
    seen: set[int] = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is None or id(value.const_value) in seen:
                continue
            seen.add(id(value.const_value))
            readers = [use.node for use in value.uses()]
            total[_type(value, readers[0]) if readers else _tensor(value).dtype.name.lower()] += _bytes(value)
    return dict(total.most_common())
