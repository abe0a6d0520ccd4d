"""Removes what does nothing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ..compiler.base import Outcome, Pass, PassContext
from ..compiler.graph import remove_dead


@dataclasses.dataclass(frozen=True)
class Cleanup(Pass):
    """Removes dead nodes."""

    name: ClassVar[str] = "cleanup"
    tolerance: ClassVar[float] = 0.0
    gated: ClassVar[bool] = False

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        outcome.counts["dead nodes"] += remove_dead(model)
        outcome.counts = +outcome.counts
        return outcome
