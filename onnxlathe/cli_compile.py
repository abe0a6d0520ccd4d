"""``onnxlathe compile``: the main job on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxlathe.runtime.errors import LatheError, PassError

from .cli_goal import GoalOption, MaxDrop, Plot, Sizes, TimeBudget
from .options import Model, OptionalOutput, Target, Threads, written


def compile(
    model: Model,
    output: OptionalOutput = None,
    passes: Annotated[
        str, typer.Option(help="a preset, or pass names with options: fuse-gelu,fold-constants:growth_limit=0")
    ] = "cpu-fp32",
    target: Target = "cpu",
    threads: Threads = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", "--samples", help=".npz file (input name -> array) or a folder of them; else made"
        ),
    ] = None,
    goal: GoalOption = None,
    max_drop: MaxDrop = "1%",
    time_budget: TimeBudget = "20m",
    sizes: Sizes = None,
    plot: Plot = None,
    tolerance: Annotated[float | None, typer.Option(help="largest relative error of exact passes")] = None,
    speed_gate: Annotated[bool | None, typer.Option(help="drop what is measured slower; default: the preset's")] = None,
    on_error: Annotated[str, typer.Option(help="raise, or skip a failing pass")] = "raise",
    refusals: Annotated[bool, typer.Option(help="list every place that was not rewritten, and why")] = False,
    json: Annotated[Path | None, typer.Option(help="also write the report as JSON")] = None,
    report: Annotated[Path | None, typer.Option(help="also write the report as a page, .html")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="also time each operator and compare each layer")] = False,
    bundle: Annotated[bool, typer.Option("--bundle", help="write a folder that tests itself anywhere")] = False,
) -> None:
    """Compiles a model, prints what changed, writes the result.

    Example: onnxlathe compile model.onnx -o fast.onnx --passes cpu-fp32 --threads 4

    Example: onnxlathe compile model.onnx --for cpu --goal speed --max-drop 1% --samples texts.npz

    Example: onnxlathe compile model.onnx -o small.onnx --passes edge --calibration x.npz --target web --bundle
    """
    if goal is not None:
        from .cli_goal import compile_for_goal, refuse

        refuse(passes=passes != "cpu-fp32" or None, tolerance=tolerance, speed_gate=speed_gate, profile=profile or None)
        path = compile_for_goal(
            model, output, goal, max_drop, time_budget, samples=calibration, sizes=sizes or [], target=target,
            threads=threads, json=json, report=report, plot=plot, bundle=bundle,
        )  # fmt: skip
        typer.echo(f"wrote {written(path)}")
        return
    if output is None:
        raise LatheError("compile does not know where the result goes.", "Give -o fast.onnx (or --goal).")
    if on_error not in ("raise", "skip"):
        raise PassError(f"--on-error is {on_error!r}.", "Use raise or skip.")
    from onnxlathe.runtime.generation.tokenizer import FILE as TOKENIZER

    from .api import compile as compile_model
    from .arguments import check_writable, parse_passes
    from .chat import carry_tokenizer

    for file in (output, json, report):
        if file is not None:
            check_writable(file, [model, calibration])
    out = compile_model(
        model,
        parse_passes(passes),
        target=target,
        threads=threads,
        calibration=calibration,
        tolerance=tolerance,
        speed_gate=speed_gate,
        on_error=on_error,
        profile=profile,
    )
    tokenizer = carry_tokenizer(model, out.model, None if bundle else output)
    path = out.save(output, bundle=bundle, extra={TOKENIZER: tokenizer} if tokenizer else None)
    out.report.print(refusals=refusals)
    if json is not None:
        out.report.save_json(json)
    if report is not None:
        out.report.html(report)
        typer.echo(f"wrote {report}")
    typer.echo(f"wrote {written(path)}")
