"""A newer opset, for the operators that came with it."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import onnx_ir as ir

from ..compiler.base import Gate, Outcome, Pass, PassContext
from ..compiler.graph import opset
from ..runtime.errors import PassError

# Node metadata, which carries our notes to Netron, came with this version of the IR.
_METADATA_IR_VERSION = 10


@dataclasses.dataclass(frozen=True)
class UpgradeOpset(Pass):
    """Converts the model to opset ``to`` with onnxscript's version converter (onnx's own below opset 18).

    1. A model at or above ``to`` is left alone.
    2. The IR version is raised to 10 at least, so that nodes may carry metadata.

    Why: the CPU provider's Attention-23 kernel beats MultiHeadAttention for short inputs (``runtime/capabilities.py``
    measures it), and RMSNormalization-23 is the standard form of what decoders normalize with.

    Attributes:
        to: the opset wanted.
    """

    name: ClassVar[str] = "upgrade-opset"
    tolerance: ClassVar[float] = 0.0
    gate: ClassVar[Gate] = "off"
    to: int = 23

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        from onnxscript import version_converter

        outcome = Outcome()
        version = opset(model)
        if version >= self.to:
            return outcome
        logger = logging.getLogger("onnxscript.version_converter")
        level = logger.level
        logger.setLevel(logging.ERROR)  # the choice between its two converters is no news to the user
        try:
            version_converter.convert_version(model, self.to, fallback=True)
        finally:
            logger.setLevel(level)
        if opset(model) != self.to:
            raise PassError(
                f"The model could not be converted from opset {version} to {self.to}.",
                "Export it with a newer opset, or leave upgrade-opset out.",
            )
        model.ir_version = max(model.ir_version, _METADATA_IR_VERSION)
        outcome.counts[f"opset {version} -> {self.to}"] += 1
        return outcome
