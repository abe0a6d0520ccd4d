"""What compile returns: the graph, its report, and the ways to save and run it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.artifact import REPORT_KEY, VERSION_KEY, config_metadata, save
from ..runtime.generation.genai_folder import save_genai
from ..runtime.session import Session
from .base import Feeds
from .bundle import save_bundle
from .ranks import save_ranks
from .report import Report
from .save_parts import save_stages


@dataclasses.dataclass
class Compiled:
    """A compiled model.

    Attributes:
        model: the rewritten graph.
        report: what was done.
        ort_config: session options the graph wants; saved with it and applied by ``Session``.
        sample: inputs that the model was checked on; None if it was not.
    """

    model: ir.Model
    report: Report
    ort_config: dict[str, Any]
    sample: Feeds | None = dataclasses.field(default=None, kw_only=True)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        external_data: bool | None = None,
        bundle: bool = False,
        extra: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> Path:
        """Writes the artifact: one ``.onnx`` below 2 GB, weights in ``<name>.data`` beside it above.

        With ``bundle`` it is the folder ``m.bundle`` for ``m.onnx``, with the model and all that it takes to run and to
        test it elsewhere (see ``compiler.bundle``); ``extra`` are files to put into it, ``{name: path}``.

        Returns:
            What was written: the file, or the folder.
        """
        if not bundle:
            return save(self.model, path, metadata=self._metadata(), external_data=external_data)
        return save_bundle(
            self.model,
            path,
            report=self.report,
            metadata=self._metadata(),
            ort_config=self.ort_config,
            sample=self.sample,
            external_data=external_data,
            extra=extra,
        )

    def save_genai(self, folder: str | os.PathLike[str], **options: Any) -> Path:
        """Writes the artifact as an onnxruntime-genai folder; options as in ``runtime.genai_folder.save_genai``."""
        return save_genai(self.model, folder, metadata=self._metadata(), ort_config=self.ort_config, **options)

    def save_stages(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the stages of ``partition-stages``, a file each, and ``manifest.json``."""
        return save_stages(self.model, folder, metadata=self._metadata(), ort_config=self.ort_config)

    def save_ranks(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the ranks of ``partition-tensor``, a file each, and ``manifest.json``."""
        return save_ranks(self.model, folder, metadata=self._metadata(), ort_config=self.ort_config)

    def session(self, device: str = "cpu", threads: int = 0) -> Session:
        """Opens the compiled model without saving it."""
        return Session(self.model, device=device, threads=threads, ort_config=self.ort_config)

    def _metadata(self) -> dict[str, str]:
        return {
            VERSION_KEY: self.report.environment.get("onnxlathe", ""),
            REPORT_KEY: json.dumps(self.report.to_dict()),
            **config_metadata(self.ort_config),
        }
