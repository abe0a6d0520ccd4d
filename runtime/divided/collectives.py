"""Collectives: what ranks do with their results together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
ALL_REDUCE, ALL_GATHER = "AllReduce", "AllGather"
"""Operators of ``com.microsoft`` that stand for them in the file of a rank."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
        kind: ``AllReduce``: every rank gets the sum; ``AllGather``: the parts one after the other along ``axis``.
        value: what each rank gives.
        result: what each gets.
        axis: of an AllGather.
    """

    kind: Literal["AllReduce", "AllGather"]
    value: str
    result: str
    axis: int = 0


def perform(collective: Collective, parts: Sequence[Array]) -> Array:
    """What every rank gets for the ``parts`` that they give, in the order of the ranks.

    The sum is taken in that order, so it does not depend on who was ready first.
    """
    if collective.kind == ALL_GATHER:
        return np.concatenate(parts, axis=collective.axis)
    total = parts[0] + parts[1] if len(parts) > 1 else parts[0]
    for part in parts[2:]:
        total += part
    return total
