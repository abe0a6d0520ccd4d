"""Arguments and options that several commands share, and how long work shows that it goes on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[Path, typer.Argument(help="an .onnx file", show_default=False)]
Output = Annotated[Path, typer.Option("-o", "--output", help="the .onnx file to write", show_default=False)]
OptionalOutput = Annotated[
    Path | None, typer.Option("-o", "--output", help="the .onnx file to write; with --goal default: MODEL.GOAL.onnx")
]
Device = Annotated[str, typer.Option("--target", help="cpu, cuda or auto")]
Target = Annotated[str, typer.Option("--target", "--for", help="cpu, cuda, auto; or web, mobile: as cpu, and checked")]
Threads = Annotated[int, typer.Option(min=0, help="intra-op threads, 0 for ONNX Runtime's default")]
Samples = Annotated[
    Path | None, typer.Option("--samples", help=".npz file (input name -> array) or a folder of them; else made")
]


@functools.cache
def console() -> Any:
    """What goes to stderr."""
    from rich.console import Console

    return Console(stderr=True)


def status(text: str) -> Any:
    """A line that moves while the block under it runs."""
    return console().status(text)


def written(path: Path) -> str:
    """A file or a folder that was written, and its size, data files included."""
    from onnxlathe.compiler.report import format_bytes

    files = path.rglob("*") if path.is_dir() else [path, *path.parent.glob(f"{path.name}.*data")]
    return f"{path} ({format_bytes(sum(file.stat().st_size for file in files if file.is_file()))})"
