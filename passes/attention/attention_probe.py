"""What each cached attention computes, asked of the graph: layout, rotation, scale, repeated heads, mask, window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array
from ...runtime.errors import ModelError
from ..probing import Prober, Step, plain_step
from ..symbolic import SymbolicShapes
from .attention_match import NotAttention
from .by_token import check_by_token
from .cached_attention import CachedAttention, activations, source_of
from .causal_mask import MaskReader
from .repeated_heads import repeat_factors
from .rotary import Rotation, fit_rotation, pair

# Far from the start, so that slowly turning pairs show; nearer for models whose table of positions ends before.
_PROBED_AT = (1000, 100, 10)
_CHUNK = 1024
_CLOSE = 1e-5


@dataclasses.dataclass(frozen=True)
class Projection:
    """Where the heads of Q, K or V come from.

    Attributes:
        source: [batch, sequence, features], or rank 4 with the heads apart.
        index: [heads, head_dim], the number of the feature of ``source`` that each is.
    """

    source: ir.Value
    index: Array


@dataclasses.dataclass(frozen=True)
class Table:
    """Cosines and sines by position, [positions, width / 2] float32."""

    cos: Array
    sin: Array
    interleaved: bool


@dataclasses.dataclass(frozen=True)
class Meaning:
    """A cached attention as GroupQueryAttention would say it.

    Attributes:
        block: where it is.
        query: Q before rotation; likewise ``key`` and ``value``.
        table: rotation of Q and K; None where they are not rotated.
        scale: factor of the scores.
        window: number of positions a token sees, itself included; 0 for all.
        padded: whether the attention mask matters.
    """

    block: CachedAttention
    query: Projection
    key: Projection
    value: Projection
    table: Table | None
    scale: float
    window: int
    padded: bool


def read_meanings(
    model: ir.Model,
    blocks: Sequence[CachedAttention],
    shapes: SymbolicShapes,
    max_length: int,
    progress: Callable[[str], None],
) -> list[Meaning]:
    """The meaning of every block.

    Args:
        model: the model.
        blocks: its cached attentions.
        shapes: its symbolic shapes.
        max_length: positions that rotation tables cover.
        progress: called before slow steps.

    Raises:
        NotAttention: one of them is something else than a causal attention that the kernel computes.
    """
    try:
        return _Reader(model, blocks, shapes, max_length, progress).read()
    except ModelError as error:
        raise NotAttention(f"a part of it does not run by itself: {error.what}") from error


class _Reader:
    def __init__(
        self,
        model: ir.Model,
        blocks: Sequence[CachedAttention],
        shapes: SymbolicShapes,
        max_length: int,
        progress: Callable[[str], None],
    ) -> None:
        self._model, self._blocks, self._shapes = model, blocks, shapes
        self._prober = Prober(model)
        self._max_length = max_length
        self._progress = progress
        self._tainted = activations(model)
        # One value a head group: Q, K and V of all blocks, and where each comes from.
        self._results = [value for block in blocks for value in (block.query, block.key.new, block.value.new)]
        self._sources = [source_of(value, self._tainted, shapes) for value in self._results]
        self._tables: list[Table] = []

    def read(self) -> list[Meaning]:
        self._progress("probing attentions")
        indices = self._layout()
        rotations, start, steps = self._rotations(indices)
        repeats = repeat_factors(self._blocks, self._prober, self._shapes)
        masks = MaskReader(self._prober)
        meanings: list[Meaning] = []
        for number, block in enumerate(self._blocks):
            q, k, v = range(3 * number, 3 * number + 3)
            projections = [Projection(self._sources[i], indices[i]) for i in (q, k, v)]
            if rotations[v].width or abs(rotations[v].scale - 1) > _CLOSE:
                raise NotAttention("V is rotated or scaled")
            table, factor = self._table(rotations[q], rotations[k], k, indices[k], start, steps)
            scale = block.scale * factor * repeats[number]
            window, padded = masks.read(block)
            meanings.append(
                Meaning(block, projections[0], projections[1], projections[2], table, scale, window, padded)
            )
        self._progress("probing what lies between the attentions")
        presents = {cache.present for block in self._blocks for cache in (block.key, block.value)}
        outputs = [value for value in self._model.graph.outputs if value not in presents]
        results = {block.last.outputs[0]: self._result_shape(block) for block in self._blocks}
        check_by_token(self._model, self._prober, results, self._sources, outputs)
        return meanings

    def _result_shape(self, block: CachedAttention) -> tuple[int, int]:
        """Rank and number of features."""
        dims = self._shapes.dims(block.last.outputs[0])
        if dims is None or dims[-1][1]:
            raise NotAttention(f"the shape of {block.last.outputs[0].name} is not known")
        return len(dims), dims[-1][0]

    def _evaluate(self, make: Callable[[ir.Value], Array], step: Step, wanted: Sequence[ir.Value]) -> list[Array]:
        """``wanted`` of the results where each source is what ``make`` says."""
        given = {source: make(source) for source in self._sources}
        asked = [value for value in dict.fromkeys(wanted) if value not in given]
        found = dict(zip(asked, self._prober.run(asked, given, step), strict=True)) if asked else {}
        return [found[value] if value in found else given[value] for value in wanted]

    def _shape(self, source: ir.Value, step: Step) -> list[int]:
        """The shape of ``source`` in ``step``."""
        dims = self._shapes.dims(source)
        if dims is None or any(symbols for _, symbols in dims[-1:]):
            raise NotAttention(f"the shape of {source.name} is not known")
        if len(dims) == 3:
            return [step.batch, step.sequence, dims[2][0]]
        if len(dims) != 4:
            raise NotAttention(f"{source.name} has rank {len(dims)}")
        if dims[2][1] and not dims[1][1]:
            return [step.batch, dims[1][0], step.sequence, dims[3][0]]
        if dims[1][1] and not dims[2][1]:
            return [step.batch, step.sequence, dims[2][0], dims[3][0]]
        raise NotAttention(f"{source.name} is not [batch, sequence, heads, head_dim] in any order")

    def _features(self, source: ir.Value, rows: Array, step: Step) -> Array:
        """``rows`` [batch, sequence, features] in the layout of ``source``."""
        shape = self._shape(source, step)
        if len(shape) == 3:
            return rows.astype(np.float32)
        dims = self._shapes.dims(source)
        if dims is not None and dims[1][1]:
            return rows.reshape(shape).astype(np.float32)
        heads_last = rows.reshape(shape[0], shape[2], shape[1], shape[3])
        return np.ascontiguousarray(heads_last.transpose(0, 2, 1, 3)).astype(np.float32)

    def _width(self, source: ir.Value) -> int:
        step = plain_step(1, 1, 0)
        return int(np.prod(self._shape(source, step)))

    def _layout(self) -> list[Array]:
        """For each result the features of its source that its heads are, [heads, head_dim]."""
        step = plain_step(1, 1, 0)

        def ones(source: ir.Value) -> Array:
            return self._features(source, np.ones((1, 1, self._width(source))), step)

        def numbers(source: ir.Value) -> Array:
            return self._features(source, np.arange(self._width(source), dtype=float).reshape(1, 1, -1), step)

        factors = self._evaluate(ones, step, self._results)
        found = self._evaluate(numbers, step, self._results)
        indices: list[Array] = []
        for value, factor, result in zip(self._results, factors, found, strict=True):
            with np.errstate(all="ignore"):
                index = (result / factor)[0, :, 0, :]
            whole = np.rint(index)
            if not np.isfinite(index).all() or np.abs(index - whole).max() > 0.1:
                raise NotAttention(f"{value.name} is not made of single features of one projection")
            indices.append(whole.astype(np.int64))
        return indices

    def _rotations(self, indices: list[Array]) -> tuple[list[Rotation], int, int]:
        """What happens to each result between its source and the attention; the first position probed; how many."""
        sequence = 3
        starts = [start for start in _PROBED_AT if start + sequence <= self._max_length] or [0]
        for start in starts:
            step, rng = plain_step(2, sequence, start), np.random.default_rng(0)
            rows = {s: rng.standard_normal((2, sequence, self._width(s))) for s in dict.fromkeys(self._sources)}
            try:
                found = self._evaluate(lambda s, r=rows, t=step: self._features(s, r[s], t), step, self._results)
            except ModelError:  # a table of positions that ends before
                if start == starts[-1]:
                    raise
                continue
            rotations: list[Rotation] = []
            for value, source, index, result in zip(self._results, self._sources, indices, found, strict=True):
                before = rows[source][:, :, index].transpose(0, 2, 1, 3)
                rotation = fit_rotation(before, result)
                if rotation is None:
                    raise NotAttention(f"what happens to {source.name} before {value.name} is no rotary embedding")
                rotations.append(rotation)
            return rotations, start, sequence
        raise NotAttention("no positions to probe")

    def _table(
        self, query: Rotation, key: Rotation, number: int, index: Array, start: int, steps: int
    ) -> tuple[Table | None, float]:
        """The rotation table of a block, and the factor that its Q brings to the scores."""
        if query.width != key.width or (query.width and query.interleaved != key.interleaved):
            raise NotAttention("Q and K are rotated differently")
        if not query.width:
            return None, query.scale * key.scale
        factor = query.scale / key.scale
        if abs(key.rest / key.scale - 1) > _CLOSE and key.width < index.shape[1] and abs(key.rest - 1) > _CLOSE:
            raise NotAttention("the features of K that are not rotated are scaled")
        if query.width < index.shape[1] and abs(query.rest / factor - key.rest) > _CLOSE:
            raise NotAttention("rotated and other features of Q are scaled differently")
        at = slice(start, start + steps)
        if not query.agrees(key.cos, key.sin):
            raise NotAttention("Q and K are rotated by different angles")
        for table in self._tables:
            if _matches(table, key, at):
                return table, factor
        table = self._tabulate(key, number, index)
        if not _matches(table, key, at):
            raise NotAttention("the rotary angles depend on the length of the input")
        self._check_angles(table, number, index)
        self._tables.append(table)
        return table, factor

    def _tabulate(self, rotation: Rotation, number: int, index: Array) -> Table:
        """K's rotation at all positions; fewer where the model's own table of positions ends before."""
        cos: list[Array] = []
        sin: list[Array] = []
        for start in range(0, self._max_length, _CHUNK):
            self._progress(f"tabulating rotary angles, position {start}")
            length = min(_CHUNK, self._max_length - start)
            found = self._angles_within(plain_step(1, length, start), number, index, rotation)
            cos.append(found[0][0])
            sin.append(found[1][0])
            if len(cos[-1]) < length:
                break
        return Table(np.concatenate(cos), np.concatenate(sin), rotation.interleaved)

    def _angles_within(self, step: Step, number: int, index: Array, like: Rotation) -> tuple[Array, Array]:
        """``_angles`` of as many positions of ``step`` as the model knows."""
        try:
            return self._angles(step, number, index, like)
        except ModelError:
            if step.past == 0 and step.sequence < 2:
                raise
        known, unknown = 0, step.sequence
        empty = np.zeros((1, 0, like.width // 2), np.float32)
        found = (empty, empty)
        while unknown - known > 1:
            middle = (known + unknown) // 2
            try:
                found, known = self._angles(plain_step(1, middle, step.past), number, index, like), middle
            except ModelError:
                unknown = middle
        return found

    def _angles(self, step: Step, number: int, index: Array, like: Rotation | Table) -> tuple[Array, Array]:
        """Cosines and sines [batch, sequence, width / 2]: K where the first of each pair is one, the second zero."""
        width = like.width if isinstance(like, Rotation) else 2 * like.cos.shape[1]
        first, second = pair(width, like.interleaved)
        source, result = self._sources[number], self._results[number]
        rows = np.zeros(self._width(source))
        rows[index[:, first]] = 1.0
        repeated = np.broadcast_to(rows, (step.batch, step.sequence, rows.size))
        found = self._prober.run([result], {source: self._features(source, repeated, step)}, step)[0]
        return found[:, 0, :, first], found[:, 0, :, second]

    def _check_angles(self, table: Table, number: int, index: Array) -> None:
        """Checks that the angles of a position are the same in texts of other lengths (dynamic NTK, LongRoPE)."""
        length, few = len(table.cos), min(3, len(table.cos))
        mask = np.ones((2, length), np.int64)
        mask[1, : length - few] = 0  # the first positions beside the last ones
        checks = [(Step(mask, few), 0, length - few), (Step(mask, few), 1, 0)]
        cos, sin = self._angles(checks[0][0], number, index, table)
        counts = not (np.array_equal(cos[0], cos[1]) and np.array_equal(sin[0], sin[1]))
        if not counts:  # by slot: the first positions are in the same run only in one long run
            checks = [(plain_step(1, length, 0), 0, 0)]
            cos, sin = self._angles(checks[0][0], number, index, table)
        for _, row, start in checks:
            at = slice(start, start + cos.shape[1])
            if not (_close(cos[row], table.cos[at]) and _close(sin[row], table.sin[at])):
                raise NotAttention("the rotary angles depend on the length of the input")


def _close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.allclose(a, b, atol=1e-4)


def _matches(table: Table, rotation: Rotation, at: slice) -> bool:
    scale = rotation.scale
    return table.interleaved == rotation.interleaved and rotation.agrees(table.cos[at] / scale, table.sin[at] / scale)
