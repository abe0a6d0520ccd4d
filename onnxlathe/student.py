"""``lathe.make_student``: a smaller copy of a model, for distillation to bring its quality back."""

from __future__ import annotations

import os

import onnx
import onnx_ir as ir

from onnxlathe.api import Calibration, compile
from onnxlathe.compiler.base import Pass
from onnxlathe.passes.pruning.prune_depth import PruneDepth
from onnxlathe.passes.pruning.prune_width import PruneWidth
from onnxlathe.runtime.errors import PassError


def make_student(
    model: ir.Model | onnx.ModelProto | str | os.PathLike[str],
    *,
    depth: float = 0.0,
    width: float = 0.0,
    calibration: Calibration,
    threads: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> ir.Model:
    """A copy of ``model`` with fewer blocks and narrower layers, initialised from it as well as samples allow.

    Depth first (``PruneDepth``, the layers in front fitted), then width (``PruneWidth``, OBS and refit). Inputs and
    outputs are those of the model, but for the caches of layers and heads that went.

    Args:
        model: the teacher; not changed.
        depth: share of the blocks that go, 0 to 1.
        width: share of each layer's hidden units, heads and channels that go, 0 to 1.
        calibration: samples, as for ``compile``.
        threads: intra-op threads, 0 for ONNX Runtime's default.
        seed: seed of anything random.
        progress: show what is being done on a terminal.

    Returns:
        The student, an ``onnx_ir.Model``.

    Raises:
        PassError: nothing was asked for, or it would leave a layer empty.
        ModelError: the model or the samples cannot be used.
    """
    for name, value in (("depth", depth), ("width", width)):
        if not 0 <= value < 1:
            raise PassError(f"{name}={value:g} is no share.", f"Give {name} from 0 to below 1.")
    steps: list[Pass] = [PruneDepth(ratio=depth)] if depth else []
    steps += [PruneWidth(ratio=width)] if width else []
    if not steps:
        raise PassError("A student with depth=0 and width=0 is the teacher.", "Give depth=..., width=... or both.")
    return compile(
        model,
        ["cleanup", "simplify-shapes", "fold-constants", *steps, "cleanup"],
        calibration=calibration,
        threads=threads,
        seed=seed,
        progress=progress,
        speed_gate=False,
    ).model
