"""Finds rotary position embedding before attention without a cache, by running it; used by ``FuseRotary``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array, attribute, constant, is_op, producer
from ...runtime.errors import ModelError
from ..probing import MASK, POSITIONS, evaluate
from ..symbolic import SymbolicShapes
from ..symbolic_dims import ONE, Dim, number
from .cached_attention import activations, source_of
from .head_layout import NotAttention, Operand
from .rotary import Rotation, fit_rotation

_BATCH, _LENGTH = 2, 7
_CLOSE = 1e-5


@dataclasses.dataclass(frozen=True)
class Angles:
    """A tensor of cosines (or sines) of the graph.

    Attributes:
        value: [..., length, width / 2] or [..., length, width].
        step: which of its last axis are the pairs' (every one, or every second); the first width / 2 of them.
        by_row: whether the rows of the batch have their own.
    """

    value: ir.Value
    step: int
    by_row: bool


@dataclasses.dataclass(frozen=True)
class Site:
    """A rotation.

    Attributes:
        operand: Q or K as attention takes it, after the rotation; its ``value`` is the result.
        source: what is rotated: [batch, length, features], or rank 4 with the heads apart.
        heads_axis: axis of the heads in a ``source`` of rank 4.
        start: the first feature of ``source`` that is rotated.
        whole: whether all features are.
        rotation: what happens to them.
        cos: the cosines; likewise ``sin``.
    """

    operand: Operand
    source: ir.Value
    heads_axis: int
    start: int
    whole: bool
    rotation: Rotation
    cos: Angles
    sin: Angles


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What probing told of one operand.

    Attributes:
        index: [heads, head_dim], the number of the feature of the source that each is; None where they are not single
            features.
        rotation: what happens to them; None for something else.
        near: float tensors that do not depend on tokens and are read on the way.
    """

    index: Array | None
    rotation: Rotation | None
    near: dict[ir.Value, Array]


class RotaryProbe:
    """Asks parts of the main graph whether they rotate.

    Args:
        model: the model.
        shapes: its symbolic shapes.
    """

    def __init__(self, model: ir.Model, shapes: SymbolicShapes) -> None:
        self._model, self._shapes = model, shapes
        self._tainted = activations(model)

    def find(self, operands: Sequence[Operand], refuse: Callable[[ir.Value, str], None]) -> list[Site]:
        """The rotations among ``operands`` of rank 4; ``refuse`` hears of those that cannot be told."""
        sources = {item.value: source_of(item.value, self._tainted, self._shapes) for item in operands}
        known = [item for item in operands if sources[item.value] is not item.value]
        sites: list[Site] = []
        for sizes, group in self._by_sizes(known, sources, refuse).items():
            try:
                results = self._probe(group, [sources[item.value] for item in group], sizes)
            except ModelError as error:
                refuse(group[0].value, f"a part of it does not run by itself: {error.what}")
                continue
            for item, result in zip(group, results, strict=True):
                try:
                    site = self._site(item, sources[item.value], result)
                except NotAttention as refusal:
                    refuse(item.value, str(refusal))
                    continue
                if site is not None:
                    sites.append(site)
        order = {item.value: number for number, item in enumerate(operands)}
        return sorted(sites, key=lambda site: order[site.operand.value])

    def _probe(self, operands: list[Operand], sources: list[ir.Value], sizes: tuple[Dim, Dim]) -> list[_Finding]:
        batch, length = (_size(dim, default) for dim, default in zip(sizes, (_BATCH, _LENGTH), strict=True))
        environment = {dim[1][0]: size for dim, size in zip(sizes, (batch, length), strict=True) if dim[1]}
        wanted = [item.value for item in operands]
        shapes = {source: self._concrete(source, environment) for source in sources}
        rng = np.random.default_rng(0)
        ones = {source: np.ones(shape, np.float32) for source, shape in shapes.items()}
        axes = {s: self._heads_axis(s, item) for s, item in zip(sources, operands, strict=True)}
        numbers = {source: _numbers(shape, axes[source]) for source, shape in shapes.items()}
        noise = {source: rng.standard_normal(shape).astype(np.float32) for source, shape in shapes.items()}
        known = self._surroundings(environment)
        factors, features, noisy = (
            evaluate(self._model, wanted, {**known, **given}, {}) for given in (ones, numbers, noise)
        )
        results: list[_Finding] = []
        for item, source, factor, feature, after in zip(operands, sources, factors, features, noisy, strict=True):
            before = _by_feature(noise[source], axes[source])
            one, own = (array.transpose(item.order)[0, 0] for array in (factor, feature))
            with np.errstate(all="ignore"):
                index = np.rint(own / one)
            if not np.isfinite(index).all() or index.min() < 0 or index.max() >= before.shape[-1]:
                results.append(_Finding(None, None, {}))
                continue
            index = index.astype(np.int64)
            x, y = before[:, :, index], after.transpose(item.order)  # [batch, length, heads, head_dim]
            rotation = fit_rotation(x.swapaxes(1, 2), y.swapaxes(1, 2))
            rotated = rotation is not None and rotation.width > 0
            near = self._values(self._frontier(item.value, source), known) if rotated else {}
            results.append(_Finding(index, rotation, near))
        return results

    def _site(self, item: Operand, source: ir.Value, found: _Finding) -> Site | None:
        index, rotation = found.index, found.rotation
        flat = index.reshape(-1) if index is not None else np.zeros(0)
        if index is None or rotation is None or not np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)):
            raise NotAttention("it is no rotation of consecutive features of one projection")
        if not rotation.width:
            return None
        if rotation.width < index.shape[1] and abs(rotation.rest - 1) > _CLOSE:
            raise NotAttention("features that are not rotated are scaled")
        cos, sin = (_match(found.near, rotation.scale * table, rotation) for table in (rotation.cos, rotation.sin))
        if cos is None or sin is None or cos.by_row != sin.by_row:
            raise NotAttention("its cosines and sines are no tensors of the graph")
        axis = self._heads_axis(source, item)
        dims = self._shapes.dims(source)
        if dims is None:
            raise NotAttention(f"the shape of {source.name} is not known")
        width = dims[-1][0] * (dims[axis][0] if axis else 1)
        return Site(item, source, axis, int(flat[0]), flat.size == width, rotation, cos, sin)

    def _surroundings(self, environment: Mapping[str, int]) -> dict[ir.Value, Array]:
        """What a rotation may depend on besides its source: shapes, positions, the mask."""
        known: dict[ir.Value, Array] = {}
        for node in self._model.graph:
            dims = self._shapes.dims(node.inputs[0]) if is_op(node, "Shape") else None
            sizes = [_evaluated(dim, environment) for dim in dims or ()]
            if dims is not None and None not in sizes:
                part = sizes[slice(attribute(node, "start", 0), attribute(node, "end"))]
                known[node.outputs[0]] = np.array(part, np.int64)
        for value in self._model.graph.inputs:
            dims = self._shapes.dims(value) if value.name in (POSITIONS, MASK) else None
            sizes = [_evaluated(dim, environment) for dim in dims or ()]
            if dims is not None and value.dtype is not None and None not in sizes:
                shape = [size for size in sizes if size is not None]
                array = np.ones(shape) if value.name == MASK else np.broadcast_to(np.arange(shape[-1]), shape)
                known[value] = array.astype(value.dtype.numpy())
        return known

    def _frontier(self, result: ir.Value, source: ir.Value) -> list[ir.Value]:
        """The values that do not depend on tokens and meet those that do between ``source`` and ``result``."""
        found, seen, todo = dict[ir.Value, None](), set[ir.Value](), [result]
        while todo:
            value = todo.pop()
            if value in seen or value is source:
                continue
            seen.add(value)
            node = producer(value)
            for operand in node.inputs if node is not None else ():
                if operand is not None and operand in self._tainted:
                    todo.append(operand)
                elif operand is not None and operand.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                    found[operand] = None
        return list(found)

    def _values(self, candidates: list[ir.Value], known: dict[ir.Value, Array]) -> dict[ir.Value, Array]:
        arrays = {value: constant(value, limit=1 << 20) for value in candidates}
        found = {value: array for value, array in arrays.items() if array is not None}
        computed = [value for value in candidates if value not in found and producer(value) is not None]
        if computed:
            found |= dict(zip(computed, evaluate(self._model, computed, known, {}), strict=True))
        return found

    def _concrete(self, source: ir.Value, environment: Mapping[str, int]) -> list[int]:
        sizes = [_evaluated(dim, environment) for dim in self._shapes.dims(source) or ()]
        known = [size for size in sizes if size is not None]
        if len(known) != len(sizes) or len(known) not in (3, 4):
            raise ModelError(f"The shape of {source.name} is not known.", "Please report it.")
        return known

    def _heads_axis(self, source: ir.Value, operand: Operand) -> int:
        """The axis of the heads in a source of rank 4, 0 for rank 3."""
        dims = self._shapes.dims(source) or ()
        if len(dims) == 3:
            return 0
        found = [axis for axis in (1, 2) if len(dims) == 4 and dims[axis] == number(operand.heads)]
        if len(found) != 1:
            raise NotAttention(f"cannot tell the heads of {source.name} from its positions")
        return found[0]

    def _by_sizes(
        self, operands: Sequence[Operand], sources: Mapping[ir.Value, ir.Value], refuse: Callable[[ir.Value, str], None]
    ) -> dict[tuple[Dim, Dim], list[Operand]]:
        """``operands`` by batch and length of their sources; those that cannot be told apart are refused."""
        groups: dict[tuple[Dim, Dim], list[Operand]] = {}
        for item in operands:
            source = sources[item.value]
            dims = self._shapes.dims(source)
            try:
                length = 2 if self._heads_axis(source, item) == 1 else 1
            except NotAttention as refusal:
                refuse(item.value, str(refusal))
                continue
            sizes = (dims[0], dims[length]) if dims is not None else (ONE, ONE)
            if all(len(dim[1]) <= 1 and (dim[0] == 1 or not dim[1]) for dim in sizes):
                groups.setdefault(sizes, []).append(item)
            else:
                refuse(item.value, f"batch and length of {source.name} are not sizes of their own")
        return groups


def _size(dim: Dim, default: int) -> int:
    return default if dim[1] else dim[0]


def _evaluated(dim: Dim, environment: Mapping[str, int]) -> int | None:
    size = dim[0]
    for name in dim[1]:
        if name not in environment:
            return None
        size *= environment[name]
    return size


def _numbers(shape: list[int], heads_axis: int) -> Array:
    """Every feature its own number."""
    if not heads_axis:
        return np.broadcast_to(np.arange(shape[2], dtype=np.float32), shape).copy()
    order = [1, shape[heads_axis], shape[3]]
    numbers = np.arange(order[1] * order[2], dtype=np.float32).reshape(order)
    return np.broadcast_to(np.expand_dims(numbers, 3 - heads_axis), shape).copy()


def _by_feature(array: Array, heads_axis: int) -> Array:
    """[batch, length, features]."""
    if not heads_axis:
        return array
    by_token = array if heads_axis == 2 else array.swapaxes(1, 2)
    return by_token.reshape(*by_token.shape[:2], -1)


def _match(near: dict[ir.Value, Array], table: Array, rotation: Rotation) -> Angles | None:
    """The tensor among ``near`` that holds ``table``, [length, width / 2]."""
    length, half = table.shape
    for value, array in near.items():
        width = array.shape[-1] if array.ndim >= 2 else 0
        if width not in (half, 2 * half) or array.size not in (length * width, _BATCH * length * width):
            continue
        rows = array.reshape(-1, length, width)
        step = 2 if rotation.interleaved and width == 2 * half else 1
        if np.allclose(rows[..., : half * step : step], table, atol=_CLOSE):
            return Angles(value, step, by_row=len(rows) > 1)
    return None
