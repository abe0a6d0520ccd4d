"""What command-line arguments mean: passes with options, the source of an export, where output may go."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxlathe.runtime.errors import LatheError, ModelError, PassError


def parse_passes(text: str) -> Any:
    """Reads ``preset`` or ``name:option=value:option=value,name``.

    Raises:
        PassError: an unknown pass or option, or text that cannot be read.
    """
    from onnxlathe.passes.presets import PRESETS, make_pass

    if text in PRESETS:
        return text
    steps: list[Any] = []
    for item in text.split(","):
        name, *options = item.strip().split(":")
        pairs = [option.partition("=") for option in options]
        if any(not separator for _, separator, _ in pairs):
            raise PassError(f"Cannot read the options in {item!r}.", "Write name:option=value:option=value.")
        steps.append(name if name in PRESETS else make_pass(name, **{key: _literal(value) for key, _, value in pairs}))
    return steps


def check_writable(output: Path, inputs: Iterable[Path | None]) -> None:
    """Refuses, before any work is done, to write over an input or into a folder that is not there.

    Raises:
        ModelError: names the file.
    """
    if not output.parent.is_dir():
        raise ModelError(f"The folder {output.parent} does not exist.", "Create it first.")
    if output.is_dir():
        raise ModelError(f"{output} is a folder.", "Give the name of a file.")
    for path in inputs:
        if path is not None and path.exists() and output.exists() and output.samefile(path):
            raise ModelError(f"{output} is the input itself.", "Write to another file; the input is never touched.")


def export_source(source: str, opset: int | None) -> ir.Model:
    """Exports ``zoo:NAME``, ``FILE.py:FUNCTION``, or a folder with a Hugging Face causal language model.

    Raises:
        ModelError: there is no such source, or it does not give a module.
        ExportError: it cannot be exported.
    """
    from onnxlathe.compiler.exporting.export import export
    from onnxlathe.compiler.exporting.export_lm import export_causal_lm

    if source.startswith("zoo:"):
        from onnxlathe.models import zoo

        name = source.removeprefix("zoo:")
        if name not in zoo.names():
            raise ModelError(f"The zoo has no {name!r}.", f"It has: {', '.join(zoo.names())}.")
        try:
            entry = zoo.build(name)
        except ImportError as error:
            raise ModelError(str(error)) from error
        if entry.kind == "causal-lm":
            return export_causal_lm(entry.module, opset=opset)
        return export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes, opset=opset)
    if Path(source).is_dir():
        return export_causal_lm(_language_model(source), opset=opset)
    module, args, shapes = _build(source)
    return export(module, args, dynamic_shapes=shapes, opset=opset)


def tokenizer_of(source: str) -> bytes | None:
    """The ``tokenizer.json`` that belongs to what ``export_source`` exports; None if there is none."""
    if source.startswith("zoo:"):
        from onnxlathe.models import zoo

        text = zoo.tokenizer(source.removeprefix("zoo:"))
        return text.encode() if text is not None else None
    file = Path(source) / "tokenizer.json"
    return file.read_bytes() if file.is_file() else None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _language_model(folder: str) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ModelError("transformers is not installed.", 'Install it with: pip install "onnxlathe[hf]"')
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no Hugging Face causal language model: {str(error).splitlines()[0]}",
            "It must have config.json and the weights, as save_pretrained writes them.",
        ) from error


def _build(source: str) -> tuple[Any, Any, Any]:
    """Calls FUNCTION of FILE.py; its own exceptions pass through, as their traceback is the user's."""
    file, separator, function = source.rpartition(":")
    if not separator or not Path(file).is_file():
        raise ModelError(f"Cannot export {source!r}.", "Give zoo:NAME, FILE.py:FUNCTION, or a model folder.")
    spec = importlib.util.spec_from_file_location("onnxlathe_user_module", file)
    if spec is None or spec.loader is None:
        raise ModelError(f"{file} is not a Python file.", "Give FILE.py:FUNCTION.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    remedy = "It must return (module, args) or (module, args, dynamic_shapes)."
    if not callable(build := getattr(module, function, None)):
        raise LatheError(f"{file} has no function {function!r}.", remedy)
    parts = build()
    if not isinstance(parts, tuple) or len(parts) not in (2, 3):  # pyright: ignore[reportUnknownArgumentType]
        raise LatheError(f"{function} in {file} returned a {type(parts).__name__}.", remedy)
    return parts if len(parts) == 3 else (*parts, None)  # pyright: ignore[reportReturnType]
