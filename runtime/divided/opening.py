"""Opens the folder of a divided model: its manifest, checked, and the sessions of its files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
import onnxruntime as ort

from ..errors import ModelError, PlanError
from ..generation.causal_lm import CacheTensor, CausalLM
from ..generation.generates import Generates
from ..inference import open_session, session_options
from ..memory import BufferPool
from ..providers import Device
from .manifest import Manifest, load_part, read_manifest
from .parted import Step
from .segments import segments


class Divided(Generates):
    """A folder of ``save_stages`` or ``save_ranks``.

    Args:
        folder: the files and their manifest.

    Attributes:
        kind: what the folder must hold.
        manifest: what it does hold.
        inputs, outputs: of the whole model.

    Raises:
        ModelError: no such folder, or a damaged one.
        PlanError: files of different builds, or of another kind.
        RuntimeUnavailable: the device, or Ray, is not there.
    """

    kind: ClassVar[Literal["stages", "ranks"]]

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._buffers = BufferPool()
        self.manifest: Manifest = read_manifest(Path(folder))
        if self.manifest.kind != self.kind:
            raise PlanError(
                f"{folder} holds {self.manifest.kind}, not {self.kind}.", f"Write it with save_{self.kind}."
            )
        self.inputs = [info.value() for info in self.manifest.inputs]
        self.outputs = [info.name for info in self.manifest.outputs]

    def _language_model(self) -> CausalLM:
        """How the whole generates.

        Raises:
            ModelError: it is no language model.
        """
        model = self.manifest.language_model()
        if model is None:
            raise ModelError(
                f"These {self.kind} cannot generate.", "Divide a language model that has a key/value cache."
            )
        return model


def open_part(folder: Path, manifest: Manifest, number: int, device: Device, threads: int) -> list[Step]:
    """The sessions of one file: one of a stage; of a rank one for each segment between two exchanges.

    Raises:
        ModelError: the file is missing or damaged.
        PlanError: it is of another build than the manifest.
    """
    part = manifest.parts[number]
    model = load_part(folder, manifest, number)

    def opened(source: ir.Model | Path) -> tuple[ort.InferenceSession]:
        return (open_session(source, session_options(threads=threads, ort_config=manifest.ort_config), device),)

    if manifest.kind == "stages":
        return [Step(opened(folder / part.file), part.received, tuple(info.name for info in part.outputs))]
    pieces = segments(model)
    return [Step(opened(p.part.model), p.part.received, p.part.sent, p.collectives) for p in pieces]


def part_caches(manifest: Manifest, model: CausalLM, number: int) -> list[CacheTensor]:
    """The caches that file ``number`` keeps: those of a stage's layers, or a rank's heads of all layers."""
    part = manifest.parts[number]
    heads = {info.name: info.shape[1] for info in part.inputs if info.shape is not None and len(info.shape) > 1}
    return [
        dataclasses.replace(tensor, heads=heads.get(tensor.past) or tensor.heads)
        for tensor in model.cache
        if tensor.past in part.cache
    ]


def seen_caches(manifest: Manifest, model: CausalLM, number: int) -> list[CacheTensor]:
    """The caches that file ``number`` reads and another one keeps."""
    part = manifest.parts[number]
    names = {info.name for info in part.inputs} - set(part.cache)
    return [tensor for tensor in model.cache if tensor.past in names]
