"""Key and value heads that serve several query heads: how the graph repeats them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array
from ..probing import Prober, Step, plain_step
from ..symbolic import SymbolicShapes
from .attention_match import NotAttention
from .cached_attention import CachedAttention

_CLOSE = 1e-5


def repeat_factors(blocks: Sequence[CachedAttention], prober: Prober, shapes: SymbolicShapes) -> list[float]:
    """Checks that each key/value head serves its group of query heads.

    Returns:
        For each block the factor that K's copies carry.

    Raises:
        NotAttention: heads are repeated in another way, or V is scaled.
    """
    step, rng = plain_step(2, 3, 4), np.random.default_rng(1)
    presents = [cache.present for block in blocks for cache in (block.key, block.value)]
    operands = [value for block in blocks for value in (block.key_operand, block.value_operand)]
    given = {
        value: rng.standard_normal((2, *_cache_dims(value, step, shapes))).astype(np.float32) for value in presents
    }
    asked = [value for value in operands if value not in given]
    found = dict(zip(asked, prober.run(asked, given, step), strict=True)) if asked else {}
    factors: list[float] = []
    for block in blocks:
        factor = 1.0
        heads = shapes.dims(block.query)
        for cache, operand in ((block.key, block.key_operand), (block.value, block.value_operand)):
            before, after = given[cache.present], found.get(operand, given[cache.present])
            scale = _repeated(before, after, heads[1][0] if heads is not None else 0)
            if scale is None or (cache is block.value and abs(scale - 1) > _CLOSE):
                raise NotAttention(f"the heads of {cache.present.name} are not repeated group by group")
            factor *= scale
        factors.append(factor)
    return factors


def _cache_dims(value: ir.Value, step: Step, shapes: SymbolicShapes) -> tuple[int, int, int]:
    dims = shapes.dims(value)
    if dims is None or dims[1][1] or dims[3][1]:
        raise NotAttention(f"heads and head size of {value.name} are not known")
    return dims[1][0], step.mask.shape[1], dims[3][0]


def _repeated(before: Array, after: Array, heads: int) -> float | None:
    """c where ``after`` is c times ``before``, its heads repeated group by group, maybe transposed; else None."""
    if after.shape[1] not in (before.shape[1], heads) or not after.shape[1] or after.shape[1] % before.shape[1]:
        return None
    wide = before.repeat(after.shape[1] // before.shape[1], 1)
    if after.shape != wide.shape:
        wide = wide.swapaxes(2, 3)
    if after.shape != wide.shape:
        return None
    factor = float((wide * after).sum() / (wide * wide).sum())
    return factor if np.allclose(factor * wide, after, atol=_CLOSE) else None
