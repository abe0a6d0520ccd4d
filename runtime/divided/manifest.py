"""The manifest beside the files of a divided model: what each takes and gives, and which build they are of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from ..artifact import load
from ..errors import ModelError, PlanError
from ..files import new_folder
from ..generation.causal_lm import CacheTensor, CausalLM

MANIFEST = "manifest.json"
BUILD_KEY = "onnxlathe.build"
"""Metadata of each file: the build it belongs to."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """An input or output: ``dtype`` as ONNX names it (``FLOAT``), dims as sizes, names or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    @staticmethod
    def of(value: ir.Value) -> TensorInfo:
        """What ``value`` is."""
        dims = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        return TensorInfo(value.name or "", value.dtype.name if value.dtype is not None else "UNDEFINED", dims)

    def value(self) -> ir.Value:
        """An ``onnx_ir.Value`` like it."""
        shape = None if self.shape is None else ir.Shape(list(self.shape))
        return ir.Value(name=self.name, type=ir.TensorType(ir.DataType[self.dtype]), shape=shape)


@dataclasses.dataclass(frozen=True)
class PartFile:
    """One file.

    Attributes:
        file: its name in the folder.
        inputs: what it reads.
        outputs: what it makes.
        received: those of its inputs that come from other parts.
        cache: those of its inputs that are the past of a key/value cache, which it keeps for itself.
        weight_bytes: bytes of its initializers.
    """

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    received: tuple[str, ...]
    cache: tuple[str, ...]
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A divided model.

    Attributes:
        kind: ``"stages"`` run one after the other, ``"ranks"`` at once.
        build: changes with the graph, its weights and how it was divided.
        inputs, outputs: of the whole.
        parts: the files, in order.
        figures: what the partitioning pass predicted.
        causal_lm: how the whole generates, as ``dataclasses.asdict`` of ``CausalLM`` with dtypes by number; else None.
        ort_config: session options.
        divided: axis by which ranks divide an input or output of the whole (their caches).
    """

    kind: Literal["stages", "ranks"]
    build: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parts: tuple[PartFile, ...]
    figures: Mapping[str, Any]
    causal_lm: Mapping[str, Any] | None
    ort_config: Mapping[str, Any]
    divided: Mapping[str, int]

    def language_model(self) -> CausalLM | None:
        """How the whole generates; None if it is no language model with a cache."""
        if self.causal_lm is None:
            return None
        fields = dict(self.causal_lm)
        fields["tokens"] = {name: ir.DataType(code) for name, code in fields["tokens"].items()}
        fields["logits"] = ir.DataType(fields["logits"])
        fields["cache"] = tuple(
            CacheTensor(c["past"], c["present"], c["heads"], c["size"], ir.DataType(c["dtype"]))
            for c in fields["cache"]
        )
        fields["eos"] = tuple(fields["eos"])
        return CausalLM(**fields)


def describe_language_model(model: CausalLM) -> dict[str, Any]:
    """``model`` as plain data for a manifest."""
    return json.loads(json.dumps(dataclasses.asdict(model), default=int))


def write_folder(folder: Path, manifest: Manifest, write: Callable[[Path], None]) -> None:
    """Fills a new folder through ``write`` and the manifest, then moves it to ``folder``; an older division goes then.

    Raises:
        ModelError: the folder holds something else, or cannot be written.
    """
    with new_folder(folder, MANIFEST, "a divided model") as draft:
        write(draft)
        (draft / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ModelError(f"There is no {MANIFEST} in {folder}.", "Write the folder with save_stages or save_ranks.")
    try:
        data = json.loads(path.read_text())
        data["inputs"], data["outputs"] = _infos(data["inputs"]), _infos(data["outputs"])
        data["parts"] = tuple(
            PartFile(
                part["file"],
                _infos(part["inputs"]),
                _infos(part["outputs"]),
                tuple(part["received"]),
                tuple(part["cache"]),
                part["weight_bytes"],
            )
            for part in data["parts"]
        )
        return Manifest(**data)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}: {error}).", "Write the folder again."
        ) from error


def load_part(folder: Path, manifest: Manifest, number: int) -> ir.Model:
    """The model of one file.

    Raises:
        ModelError: the file is missing or damaged.
        PlanError: it is of another build than the manifest.
    """
    path = folder / manifest.parts[number].file
    model = load(path)
    build = model.metadata_props.get(BUILD_KEY, "none")
    if build != manifest.build:
        raise PlanError(
            f"{path} is of build {build}, the manifest of build {manifest.build}: files of different builds are mixed.",
            "Take all files from one folder that save_stages or save_ranks wrote.",
        )
    return model


def _infos(items: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(item["name"], item["dtype"], None if item["shape"] is None else tuple(item["shape"]))
        for item in items
    )
