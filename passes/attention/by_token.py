"""Whether all of a decoder but its attentions treats each token by itself, so that tokens may change their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...compiler.graph import Array
from ...runtime.feeds import index_limits
from ..probing import POSITIONS, TOKENS, Prober, Step
from .attention_match import NotAttention

# For each new slot of two texts the one whose token it gets.
_ORDER = np.array([[3, 0, 4, 2, 1], [2, 4, 1, 0, 3]])
_PAST = 3
_CLOSE = 1e-3


def check_by_token(
    model: ir.Model,
    prober: Prober,
    results: Mapping[ir.Value, tuple[int, int]],
    sources: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> None:
    """Checks that ``sources`` and ``outputs`` hold one row a token, [batch, sequence, ...], made of it alone.

    All but the attentions runs on two texts, and on the same with their tokens in other slots beside another attention
    mask. Everything must move with the tokens, and nothing else may change: positions counted by slot or from the
    mask, convolutions over the text, or logits of the last slot would be other numbers where a row is padded.

    Args:
        model: the decoder.
        prober: runs its parts.
        results: what the attentions make, with rank and width: [batch, sequence, hidden], or the first two axes joined.
        sources: what they read.
        outputs: outputs of the model.

    Raises:
        NotAttention: something looks at more than one token, at its slot, or at the mask.
        ModelError: a part does not run by itself.
    """
    rng = np.random.default_rng(0)
    rows, new = _ORDER.shape
    inputs = {value.name or "": value for value in model.graph.inputs}
    mask = rng.integers(0, 2, (2 * rows, _PAST + new))
    mask[:rows] = 1
    step = Step(mask, new)
    ids = rng.integers(0, index_limits(model).get(TOKENS, 2), (rows, new))
    given = {inputs[TOKENS]: _twice(ids)}
    if POSITIONS in inputs:
        given[inputs[POSITIONS]] = _twice(step.positions[:rows])
    for value, (rank, hidden) in results.items():
        array = _twice(rng.standard_normal((rows, new, hidden)))
        given[value] = array if rank == 3 else array.reshape(-1, hidden)
    wanted = list(dict.fromkeys([*sources, *outputs]))
    found = dict(zip(wanted, prober.run(wanted, given, step), strict=True))
    for value in wanted:
        axes = (1, 2) if value in sources else (1,)  # [batch, heads, sequence, head_dim]
        if not any(_moves(found[value], axis) for axis in axes):
            raise NotAttention(
                f"{value.name} depends on slots or padding beside the attentions: positions that are no input, logits "
                "of one slot only, or another use of the attention mask"
            )


def _twice(array: Array) -> Array:
    """``array`` [rows, new, ...], and below it the same with its tokens in other slots."""
    moved = np.stack([row[order] for row, order in zip(array, _ORDER, strict=True)])
    return np.concatenate([array, moved])


def _moves(array: Array, axis: int) -> bool:
    """Whether the second half of ``array`` is the first with its tokens moved."""
    rows, new = _ORDER.shape
    if array.ndim <= axis or array.shape[0] != 2 * rows or array.shape[axis] != new:
        return False
    array = np.moveaxis(array, axis, 1).astype(np.float64)
    wanted = _twice(array[:rows])
    return bool(np.abs(wanted - array).max() <= _CLOSE * np.abs(wanted).max())
