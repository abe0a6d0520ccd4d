"""Which positions the mask of a cached attention lets tokens see, asked of the mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array, constant, producer
from ..probing import Prober, Step, plain_step
from .attention_match import NotAttention
from .cached_attention import CachedAttention

_FORBIDDEN = -1e4
_BIAS = 1e-5
_LARGEST_WINDOW = 1 << 20


class MaskReader:
    """Reads masks; one that several layers share is probed once."""

    def __init__(self, prober: Prober) -> None:
        self._prober = prober
        self._known: dict[tuple[tuple[ir.Value, ...], bool], tuple[int, bool]] = {}

    def read(self, block: CachedAttention) -> tuple[int, bool]:
        """The window (positions that a token sees, itself included; 0 for all), and whether padding is masked.

        Raises:
            NotAttention: the mask is not causal, or more than a mask.
        """
        key = (block.masks, block.filled)
        if key not in self._known:
            self._known[key] = self._probe(block)
        return self._known[key]

    def _probe(self, block: CachedAttention) -> tuple[int, bool]:
        if not block.masks:
            raise NotAttention("nothing keeps tokens from seeing later ones")
        padding = np.ones((3, 9), np.int64)
        padding[0, :2] = padding[1, 7:] = padding[2, 3:5] = 0
        window = self._window(block)
        steps = [Step(padding, 4), plain_step(2, 5, 0), plain_step(1, 1, 6), plain_step(1, 1, window + 1)]
        seen = [self._allowed(block, step) for step in steps]
        for padded in (True, False):
            expected = [_causal(step, window, padded) for step in steps]
            if all(np.array_equal(got[rows], keep[rows]) for got, (keep, rows) in zip(seen, expected, strict=True)):
                return window, padded
        raise NotAttention(f"the mask {block.masks[0].name} is not causal, or has a form of its own")

    def _window(self, block: CachedAttention) -> int:
        """How many positions a token far from the start sees; 0 for all."""
        longest = max(self._numbers(block), default=0)
        row = self._allowed(block, plain_step(1, 1, longest + 2))[0, 0]
        return 0 if row.all() else int(row.sum())

    def _numbers(self, block: CachedAttention) -> set[int]:
        """Whole constants that the mask is computed with: one of them may be a window."""
        found, seen, todo = set[int](), set[ir.Value](), list(block.masks)
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            array = constant(value, limit=1)
            if array is not None and array.size == 1 and array.dtype.kind in "iuf":
                number = abs(float(array.reshape(-1)[0]))
                if number.is_integer() and 1 < number <= _LARGEST_WINDOW:
                    found.add(int(number))
            node = producer(value)
            todo += [item for item in node.inputs if item is not None] if node is not None else []
        return found

    def _allowed(self, block: CachedAttention, step: Step) -> Array:
        """[batch, sequence, total], where the mask lets a token see a position."""
        total = step.mask.shape[1]
        result = np.ones((step.batch, 1, step.sequence, total), bool)
        for array in self._prober.run(block.masks, {}, step):
            keep = ~array if block.filled else array
            if array.dtype != np.bool_:
                if ((array > _FORBIDDEN) & (np.abs(array) > _BIAS)).any():
                    raise NotAttention(f"{block.masks[0].name} adds a bias to the scores")
                keep = array > _FORBIDDEN
            if keep.ndim == 4 and keep.shape[1] > 1 and (keep != keep[:, :1]).any():
                raise NotAttention(f"{block.masks[0].name} differs between heads")
            result = result & (keep[:, :1] if keep.ndim == 4 else keep)
        return result[:, 0]


def _causal(step: Step, window: int, padded: bool) -> tuple[Array, Array]:
    """[batch, sequence, total] of a causal mask, and [batch, sequence], which rows of it matter: those of tokens."""
    total = step.mask.shape[1]
    own = np.arange(step.past, total)[:, None]
    other = np.arange(total)[None, :]
    keep = (other <= own) & ((own - other < window) if window else True)
    result = np.broadcast_to(keep, (step.batch, *keep.shape))
    tokens = step.mask.astype(bool)
    if padded:
        result = result & tokens[:, None, :]
    return result, tokens[:, step.past :]
