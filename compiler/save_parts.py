"""Writes a divided model: one file a part, and a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.artifact import save
from ..runtime.divided.manifest import BUILD_KEY, Manifest, PartFile, TensorInfo, describe_language_model, write_folder
from ..runtime.divided.parts import Part, cut
from ..runtime.errors import ModelError, PlanError
from ..runtime.generation.causal_lm import read_causal_lm
from ..runtime.inference import weights_outside
from .graph import weight_bytes
from .placement import PLACEMENT_KEY, STAGE_KEY, Placement, read_placement


def save_stages(
    model: ir.Model,
    folder: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    ort_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the stages that ``PartitionStages`` marked: ``stage0.onnx``, ... and ``manifest.json``.

    Args:
        model: the model; not changed.
        folder: the folder to write; one with an older division is replaced.
        metadata: extra ``metadata_props`` of each file.
        ort_config: session options, for the manifest.

    Raises:
        PlanError: the model has no stages, or passes ran afterwards that broke them.
        ModelError: the folder holds something else, or cannot be written.
    """
    placement = placement_of(model, "stages")
    labels = [node.metadata_props.get(STAGE_KEY, "") for node in model.graph]
    if not all(label.isdigit() and int(label) < placement.count for label in labels):
        lost = next(node.name for node, label in zip(model.graph, labels, strict=True) if not label.isdigit())
        raise PlanError(f"Node {lost} belongs to no stage.", "Run partition-stages last.")
    parts = cut(model, [int(label) for label in labels], placement.count)
    return write_parts(model, placement, "stage", parts, Path(folder), metadata or {}, ort_config or {})


def placement_of(model: ir.Model, kind: str) -> Placement:
    """The placement in ``model``.

    Raises:
        PlanError: there is none of that kind.
    """
    placement = read_placement(model)
    if placement is None or placement.kind != kind:
        name = {"stages": "partition-stages", "ranks": "partition-tensor"}[kind]
        raise PlanError(f"The model is not divided into {kind}.", f"Compile it with the pass {name}.")
    return placement


def write_parts(
    model: ir.Model,
    placement: Placement,
    prefix: str,
    parts: Sequence[Part],
    folder: Path,
    metadata: Mapping[str, str],
    ort_config: Mapping[str, Any],
    divided: Mapping[str, int] | None = None,
) -> Path:
    """Writes ``parts`` of ``model`` and their manifest into ``folder``."""
    build = build_hash(model)
    causal = None
    with contextlib.suppress(ModelError):  # not a language model
        causal = read_causal_lm(model)
    past = {tensor.past: tensor.present for tensor in causal.cache} if causal is not None else {}
    files: list[PartFile] = []
    for number, part in enumerate(parts):
        graph = part.model.graph
        inputs = tuple(TensorInfo.of(value) for value in graph.inputs)
        outputs = tuple(TensorInfo.of(value) for value in graph.outputs)
        makes = {info.name for info in outputs}
        cache = tuple(info.name for info in inputs if past.get(info.name) in makes)  # others only look at its shape
        files.append(
            PartFile(f"{prefix}{number}.onnx", inputs, outputs, part.received, cache, weight_bytes(part.model))
        )
    assert placement.kind != "devices"
    manifest = Manifest(
        placement.kind,
        build,
        tuple(TensorInfo.of(value) for value in model.graph.inputs if not value.is_initializer()),
        tuple(TensorInfo.of(value) for value in model.graph.outputs),
        tuple(files),
        placement.figures,
        describe_language_model(causal) if causal is not None else None,
        ort_config,
        divided or {},
    )
    write_folder(folder, manifest, _writer(parts, files, {**metadata, BUILD_KEY: build}))
    return folder


def _writer(parts: Sequence[Part], files: Sequence[PartFile], metadata: Mapping[str, str]) -> Callable[[Path], None]:
    def write(draft: Path) -> None:
        for part, file in zip(parts, files, strict=True):
            save(part.model, draft / file.file, metadata=metadata)

    return write


def build_hash(model: ir.Model) -> str:
    """Of the graph, its division and its weights: files of equal hash belong together."""
    digest = hashlib.sha256(model.metadata_props.get(PLACEMENT_KEY, "").encode())
    for graph in model.graphs():
        for name, value in sorted(graph.initializers.items()):
            if value.const_value is not None:
                digest.update(name.encode())
                digest.update(memoryview(value.const_value.tobytes()))
    with weights_outside(model):
        digest.update(ir.to_proto(model).graph.SerializeToString(deterministic=True))
    return digest.hexdigest()[:32]
