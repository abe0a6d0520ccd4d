"""What ``lathe.optimize`` returns: a compiled model, and the search that chose it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx_ir as ir

from onnxlathe.compiler.compiled import Compiled
from onnxlathe.compiler.report import Report
from onnxlathe.runtime.artifact import REPORT_KEY, load, read_config

from .trials import Search


@dataclasses.dataclass(kw_only=True)
class Optimized(Compiled):
    """The best pipeline's model, with everything a compiled model can do.

    Attributes:
        search: what was tried, and why this one was taken.
    """

    search: Search

    @classmethod
    def read(cls, path: Path, search: Search) -> Optimized:
        """From an artifact that ``compile`` saved; its weights stay readable when the file is gone."""
        model = load(path)
        report, config = read_report(model), read_config(model.metadata_props)
        for graph in model.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = ir.external_data.convert_tensors_from_external([value.const_value])[0]
        return cls(model, report, config, search=search)


def read_report(model: ir.Model) -> Report:
    """The report that an artifact carries; an empty one for a model of others."""
    return Report.from_dict(json.loads(model.metadata_props.get(REPORT_KEY, "{}")))
