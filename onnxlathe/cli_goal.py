"""Options of ``compile`` that let it choose the passes, and what it then does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxlathe.runtime.errors import LatheError

GoalOption = Annotated[
    str | None, typer.Option("--goal", help="speed, size or balanced: try pipelines and keep the best")
]
MaxDrop = Annotated[
    str, typer.Option(help='with --goal: the most that may be lost, "1%" or "cosine<=0.01" (docs/goal.md)')
]
TimeBudget = Annotated[str, typer.Option(help="with --goal: 90s, 20m, 1h; Ctrl-C keeps the best so far")]
Sizes = Annotated[
    list[str] | None,
    typer.Option(help="with --goal: time these sizes, batch=1,sequence=128, may be given again; default: the samples'"),
]
Plot = Annotated[
    Path | None, typer.Option(help="with --goal: where the picture goes; default: beside the output, as .svg")
]


def refuse(**given: object) -> None:
    """Refuses options of ``compile`` that say what a search is to find out; those not given are None.

    Raises:
        LatheError: names them.
    """
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names:
        raise LatheError(f"--goal goes without {', '.join(names)}.", "Leave out one or the other.")


def compile_for_goal(
    model: Path,
    output: Path | None,
    goal: str,
    max_drop: str,
    time_budget: str,
    *,
    samples: Path | None,
    sizes: list[str],
    target: str,
    threads: int,
    json: Path | None,
    report: Path | None,
    plot: Path | None,
    bundle: bool,
) -> Path:
    """Searches, prints the table, writes model, picture and report; returns what holds the model: a file or a folder.

    Raises:
        LatheError: an option cannot be read, or as of ``lathe.optimize``.
    """
    from onnxlathe.runtime.generation.tokenizer import FILE as TOKENIZER

    from .arguments import check_writable
    from .chat import carry_tokenizer
    from .look_memory import parse_bindings
    from .optimizing.optimize import optimize
    from .options import status

    output = output or model.with_name(f"{model.stem}.{goal}.onnx")
    picture = plot or output.with_suffix(".svg")
    for path in (output, picture, json, report):
        if path is not None:
            check_writable(path, [model, samples])
    with status("onnxlathe: searching") as line:
        out = optimize(
            model,
            goal,  # pyright: ignore[reportArgumentType]  # checked there
            max_drop,
            samples=samples,
            sizes=[parse_bindings(text) for text in sizes],
            time_budget=time_budget,
            target=target,
            threads=threads,
            progress=lambda text: line.update(f"onnxlathe: {text}"),
        )
    tokenizer = carry_tokenizer(model, out.model, None if bundle else output)
    written = out.save(output, bundle=bundle, extra={TOKENIZER: tokenizer} if tokenizer else None)
    out.search.print()
    try:
        out.search.plot(picture)
        typer.echo(f"wrote {picture}")
    except LatheError as error:  # the picture is an extra
        typer.echo(f"no picture: {error}", err=True)
    if json is not None:
        out.report.save_json(json)
    if report is not None:
        out.report.html(report)
        typer.echo(f"wrote {report}")
    return written
