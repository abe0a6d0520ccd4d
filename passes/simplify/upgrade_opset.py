"""A newer opset, for the operators that came with it."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import detach_removed, opset
from ...compiler.verify import Signature
from ...runtime.errors import ModelError, VerifyError
from ...runtime.inference import open_session, session_options

# Node metadata, which carries our notes to Netron, came with this version of the IR.
_METADATA_IR_VERSION = 10


@dataclasses.dataclass(frozen=True)
class UpgradeOpset(Pass):
    """Converts the model to opset ``to`` with onnxscript's version converter (onnx's own below opset 18).

    1. A model at or above ``to`` is left alone.
    2. A model that this onnxruntime cannot execute afterwards is refused: opset 22 made new versions of about thirty
       operators (RandomNormal, Multinomial...), and not every provider has kernels for them. A clone is tried first.
       So is one whose inputs or outputs the converter changes (Scan of opset 8).
    3. The IR version is raised to 10 at least, so that nodes may carry metadata.

    Why: the CPU provider's Attention-23 kernel beats MultiHeadAttention for short inputs (``runtime/capabilities.py``
    measures it), and RMSNormalization-23 is the standard form of what decoders normalize with.

    Attributes:
        to: the opset wanted.
    """

    name: ClassVar[str] = "upgrade-opset"
    tolerance: ClassVar[float] = 1e-6  # ONNX Runtime's kernels of two versions may round differently (AveragePool)
    gate: ClassVar[Gate] = "off"
    to: int = 23

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        version = opset(model)
        if version >= self.to:
            return outcome
        trial = model.clone()
        try:
            self._convert(trial)
            Signature.of(model).check_kept(Signature.of(trial))
            open_session(trial, session_options(optimize=False, repack=False), context.device)
        except (ModelError, VerifyError) as error:
            anchor = next(iter(model.graph))
            outcome.refuse(anchor, f"opset {version} -> {self.to}", f"it would not be the same model: {error.what}")
            return outcome
        self._convert(model)
        model.ir_version = max(model.ir_version, _METADATA_IR_VERSION)
        outcome.counts[f"opset {version} -> {self.to}"] += 1
        return outcome

    def _convert(self, model: ir.Model) -> None:
        from onnxscript import version_converter

        logger = logging.getLogger("onnxscript.version_converter")
        level = logger.level
        logger.setLevel(logging.ERROR)  # the choice between its two converters is no news to the user
        try:
            version_converter.convert_version(model, self.to, fallback=True)
        finally:
            logger.setLevel(level)
        detach_removed(model)
        if opset(model) != self.to:
            raise ModelError(
                f"the version converter could not bring it to opset {self.to}", "Export it with a newer opset."
            )
