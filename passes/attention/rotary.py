"""Rotary position embedding, told by what it does to numbers (Su et al. 2021, arXiv 2104.09864).

A rotation turns pairs of a head's features: ``y_i = cos x_i - sin x_j``, ``y_j = sin x_i + cos x_j``. Pairs are the two
halves of the rotated features (GPT-NeoX, Llama) or neighbours (GPT-J, "interleaved"); features beyond the rotated ones
pass through.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ...compiler.graph import Array

# Cosines and sines are float32 numbers of angles up to thousands of radians, computed as the model does it.
_CLOSE = 1e-4


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What happens to a head's features at some positions.

    Attributes:
        width: number of rotated features, 0 for none.
        interleaved: pairs are neighbours.
        cos: [positions, width / 2], with the factor of the whole divided out; likewise ``sin``.
        scale: factor of the rotated features (of all, where none is rotated).
        rest: factor of the features that are not rotated; equal to ``scale`` where there are none.
    """

    width: int
    interleaved: bool
    cos: Array
    sin: Array
    scale: float
    rest: float

    def agrees(self, cos: Array, sin: Array) -> bool:
        """Whether these are the angles of ``cos`` and ``sin``, [positions, width / 2]."""
        return self.cos.shape == cos.shape and bool(
            np.allclose(self.cos, cos, atol=_CLOSE) and np.allclose(self.sin, sin, atol=_CLOSE)
        )


def pair(width: int, interleaved: bool) -> tuple[slice, slice]:
    """The features that are first and second of their pairs."""
    if interleaved:
        return slice(0, width, 2), slice(1, width, 2)
    return slice(0, width // 2), slice(width // 2, width)


def fit_rotation(x: Array, y: Array) -> Rotation | None:
    """The rotation that takes ``x`` to ``y``, both [batch, heads, positions, head_dim]; None if there is none."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    if x.shape != y.shape:
        return None
    factors = (x * y).sum((0, 1, 2)) / (x * x).sum((0, 1, 2))
    moved = np.abs(y - factors * x).max((0, 1, 2)) > _CLOSE * np.abs(x).max()
    width = int(np.flatnonzero(moved).max(initial=-1)) + 1
    kept = factors[width:]
    if kept.size and np.ptp(kept) > _CLOSE * np.abs(kept).max():
        return None
    if not width:
        scale, none = float(kept.mean()), np.zeros((x.shape[2], 0))
        return Rotation(0, False, none, none, scale, scale)
    for interleaved in (False, True):
        found = None if width % 2 else _fit(x, y, width, interleaved, kept)
        if found is not None:
            return found
    return None


def _fit(x: Array, y: Array, width: int, interleaved: bool, kept: Array) -> Rotation | None:
    first, second = pair(width, interleaved)
    a, b, c, d = x[..., first], x[..., second], y[..., first], y[..., second]
    norm = (a * a + b * b).sum((0, 1))
    cos, sin = (a * c + b * d).sum((0, 1)) / norm, (a * d - b * c).sum((0, 1)) / norm
    error = max(np.abs(cos * a - sin * b - c).max(), np.abs(sin * a + cos * b - d).max())
    lengths = np.hypot(cos, sin)
    scale = float(lengths.mean())
    if error > _CLOSE * np.abs(x).max() or np.ptp(lengths) > _CLOSE * scale or scale == 0.0:
        return None
    rest = float(kept.mean()) if kept.size else scale
    return Rotation(width, interleaved, cos / scale, sin / scale, scale, rest)
