"""Takes a model from wherever it comes: a path, a ModelProto, an ``onnx_ir.Model``; brings it into one shape."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..runtime.artifact import load
from ..runtime.errors import ModelError
from ..runtime.untrusted import check_proto
from .graph import opset

OLDEST_OPSET, NEWEST_OPSET = 7, 26


def load_model(source: ir.Model | onnx.ModelProto | str | os.PathLike[str]) -> ir.Model:
    """Reads ``source`` and normalizes a clone of it: functions inlined, constants as initializers, names unique.

    Where an old exporter listed all weights among the inputs, they are plain constants afterwards.

    Args:
        source: a model; it is never changed.

    Raises:
        ModelError: not ONNX, or an opset this compiler does not know.
    """
    if isinstance(source, ir.Model):
        model = source.clone()
    elif isinstance(source, onnx.ModelProto):
        model = _from_proto(source)
    else:
        model = load(source)
    version = opset(model)
    if version and not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise ModelError(
            f"The model uses opset {version}; supported are {OLDEST_OPSET} to {NEWEST_OPSET}.",
            "Convert it with onnx.version_converter, or export it again with another opset.",
        )
    _drop_overridable(model)
    if model.functions:
        common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.NameFixPass()(model)
    return model


def _from_proto(source: onnx.ModelProto) -> ir.Model:
    """External data is looked for in the current folder, as onnx_ir does it."""
    check_proto(source, "the model", Path.cwd())
    try:
        return ir.from_proto(source)
    except Exception as error:  # whatever a malformed message leads to
        raise ModelError(f"The model cannot be read: {error}.", "Check it with onnx.checker.check_model.") from error


def infer_shapes(model: ir.Model) -> None:
    """Fills in missing types and shapes where ``onnx.shape_inference`` knows them; never fails."""
    log = logging.getLogger("onnx_ir.passes.common.shape_inference")
    disabled, log.disabled = log.disabled, True  # a graph that cannot even be written: ``check_model`` says it
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    finally:
        log.disabled = disabled


def _drop_overridable(model: ir.Model) -> None:
    """Takes initializers off the list of inputs where that list is only an old exporter's habit.

    Below IR version 4 the format demanded it, and torch's exporter went on doing so for all of them
    (``keep_initializers_as_inputs``); as inputs they could be overridden, so nothing could be folded or fused. A model
    that lists only some of its initializers means it.
    """
    initializers = list(model.graph.initializers.values())
    if initializers and (model.ir_version < 4 or all(value.is_graph_input() for value in initializers)):
        common.RemoveInitializersFromInputsPass()(model)
        model.ir_version = max(model.ir_version, 4)
