"""Readable and consistent names for the dynamic dimensions of an exported graph.

torch calls them ``s18``, ``s64``; ONNX Runtime's memory planner reuses a buffer only for values whose symbolic shapes
are the same text, so each size must have one spelling everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir

from ...runtime.errors import ExportError
from .export_inputs import ExampleCall

_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


def name_dims(model: ir.Model, call: ExampleCall) -> None:
    """Gives the dynamic dims the names the user chose; others get ``<input>_dim_<axis>``, ``<output>_dim_<axis>``.

    Raises:
        ExportError: a dim that was to be dynamic became static, or two names turned out to be one size.
    """
    names: dict[str, str] = {}
    expressions: dict[str, str] = {}
    for value, wanted in zip(model.graph.inputs, call.dims, strict=True):
        for axis, label in wanted.items():
            dim = value.shape[axis] if value.shape is not None else None
            if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
                raise ExportError(
                    f"Dimension {axis} of input {value.name} ({label or 'unnamed'}) was asked to be dynamic, but the "
                    f"module only works with {dim}.",
                    "Leave it out of dynamic_shapes, or remove what ties it to that number: a parameter of that "
                    "size, `int(x.shape[i])`, or an example size of 1.",
                )
            known = names if dim.value.isidentifier() else expressions
            label = label or known.get(dim.value) or f"{value.name}_dim_{axis}"
            if known.setdefault(dim.value, label) != label:
                raise ExportError(
                    f"The dimensions {known[dim.value]!r} and {label!r} (input {value.name}, axis {axis}) must be "
                    "equal in this module.",
                    "Give them one name.",
                )
    _name_output_dims(model, names)
    rename_dims(model, names, expressions)


def _name_output_dims(model: ir.Model, names: dict[str, str]) -> None:
    """Names sizes that depend on data and first show up in an output (torch's ``u0``)."""
    for value in model.graph.outputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value and re.fullmatch(r"[su]\d+", dim.value):
                names.setdefault(dim.value, f"{value.name}_dim_{axis}")


def rename_dims(model: ir.Model, names: Mapping[str, str], expressions: Mapping[str, str]) -> None:
    """Renames dims in the shapes of all values.

    Args:
        model: modified in place.
        names: symbol -> new name, also replaced inside expressions.
        expressions: expression, in the old symbols -> name; spellings that are equal count as the same.
    """
    cache: dict[str, str] = {}

    def substitute(text: str) -> str:
        renamed = _IDENTIFIER.sub(lambda match: names.get(match[0], match[0]), text)
        return renamed if renamed.isidentifier() else str(ir.SymbolicDim(renamed).simplify().value)

    known = {substitute(expression): name for expression, name in expressions.items()}

    def rename(text: str) -> str:
        if text not in cache:
            renamed = substitute(text)
            cache[text] = known.get(renamed, renamed)
        return cache[text]

    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.shape is None or value.shape.is_static():
                continue
            value.shape = ir.Shape(
                [rename(dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value else dim for dim in value.shape]
            )
