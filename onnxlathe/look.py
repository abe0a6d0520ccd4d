"""What ``run``, ``inspect``, ``diff`` and ``passes`` print."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxlathe.compiler.graph import PASS_KEY, count_ops, opset, qualified_op, weight_bytes
from onnxlathe.compiler.load import infer_shapes, load_model
from onnxlathe.compiler.report import Report, format_bytes, print_op_table
from onnxlathe.compiler.reporting.graph_change import graph_change, places
from onnxlathe.compiler.reporting.graph_match import Matching
from onnxlathe.compiler.reporting.records import GraphChange
from onnxlathe.compiler.verify import relative_error, run_reference
from onnxlathe.passes import PASSES
from onnxlathe.passes.presets import PRESETS
from onnxlathe.runtime.artifact import REPORT_KEY, VERSION_KEY, load, read_config
from onnxlathe.runtime.errors import LatheError, ModelError
from onnxlathe.runtime.feeds import check_feeds, load_feeds, make_feeds
from onnxlathe.runtime.files import write_atomically
from onnxlathe.runtime.session import Session
from onnxlathe.runtime.targets import check_target, describe, facts, read_target

from .arguments import check_writable
from .reporting import memory_pictures

_SHOWN = 10
# What serves a second model.
_SERVE = """import sys, netron
netron.start(sys.argv[1], ("localhost", int(sys.argv[2])), browse=sys.argv[3] == "1")
netron.wait()"""


def print_run(model: Path, samples: Path | None, output: Path | None, target: str, threads: int) -> None:
    """Outputs of one run: dtypes, shapes and ranges; all of them into ``output``, if given."""
    if output is not None:
        check_writable(output, [model, samples])
    feeds = load_feeds(samples) if samples is not None else make_feeds(load(model), count=1)
    session = Session(model, device=target, threads=threads)
    results = session.run(feeds[0])
    table = Table(title=f"{model} on {session.device}" + ("" if samples else ", made inputs"), title_justify="left")
    for column in ("output", "dtype", "shape", "min", "mean", "max"):
        table.add_column(column, justify="left" if column == "output" else "right")
    for name, array in results.items():
        numbers = [
            f"{f(array):.4g}" if array.size and array.dtype.kind in "fiu" else "-" for f in (np.min, np.mean, np.max)
        ]
        table.add_row(Text(name), str(array.dtype), Text(str(list(array.shape))), *numbers)
    Console().print(table)
    if output is not None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **results)
        write_atomically(output, buffer.getvalue())
        Console().print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)


def print_check(path: Path, target: str) -> None:
    """Prints what is known of the model on ``target``.

    Raises:
        ModelError: it cannot run there; or there is no such target.
    """
    place = read_target(target)
    model = load_model(path)
    infer_shapes(model)
    check_target(model, place)
    console = Console()
    console.print(f"{path.name} runs on {place}: {describe(place)}", highlight=False, markup=False)
    for fact in facts(model, place):
        console.print(fact, highlight=False, markup=False)


def print_inspect(path: Path) -> None:
    """Inputs, outputs, opset, operators, weights, session options and the stored report."""
    console, model = Console(), load(path)
    initializers = {value.name for value in model.graph.initializers.values()}
    table = Table(title=str(path), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "name", "dtype", "shape"):
        table.add_column(column)
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if kind == "output" or value.name not in initializers:
                table.add_row(kind, Text(value.name or ""), str(value.dtype), Text(str(value.shape)))
    console.print(table)
    others = ", ".join(f"{name} {version}" for name, version in model.opset_imports.items() if name)
    console.print(
        f"opset {opset(model)}{' and ' + others if others else ''}, IR {model.ir_version}, "
        f"made by {model.producer_name or 'unknown'} {model.producer_version or ''}; "
        f"{sum(count_ops(model).values())} nodes, {format_bytes(weight_bytes(model))} of weights",
        highlight=False,
    )
    counts = Table(title="nodes by operator", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    counts.add_column("operator")
    counts.add_column("nodes", justify="right")
    for op, count in count_ops(model).most_common():
        counts.add_row(op, str(count))
    console.print(counts)
    if config := read_config(model.metadata_props):
        console.print(f"session options: {json.dumps(config)}", highlight=False)
    if REPORT_KEY in model.metadata_props:
        console.print(f"compiled by onnxlathe {model.metadata_props.get(VERSION_KEY, '')}:", highlight=False)
        _stored_report(path, model).print(console)


def write_page(path: Path, page: Path) -> None:
    """Writes the report stored in an artifact as a page.

    Raises:
        ModelError: the model holds no report.
        LatheError: jinja2 is not installed.
    """
    check_writable(page, [path])
    model = load(path)
    report = _stored_report(path, model)
    report.pictures = memory_pictures(model)
    report.html(page)
    Console().print(f"wrote {page}", highlight=False, markup=False, soft_wrap=True)


def _stored_report(path: Path, model: ir.Model) -> Report:
    if REPORT_KEY not in model.metadata_props:
        raise ModelError(f"{path} holds no report of onnxlathe.", "Compile it with `onnxlathe compile`.")
    try:
        return Report.from_dict(json.loads(model.metadata_props[REPORT_KEY]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"The report in {path} cannot be read ({error}).", "Compile the model again.") from error


def view_models(paths: Sequence[Path], port: int, browser: bool) -> None:
    """Serves models in Netron, each at a port of its own from ``port`` on, until Ctrl-C.

    Netron keeps one model a process: the first is served by this one, the others by children.

    Raises:
        LatheError: Netron is not installed, or a port is taken.
        ModelError: a file is no model.
    """
    if importlib.util.find_spec("netron") is None:
        raise LatheError("Netron is not installed.", 'Install it with: pip install "onnxlathe[view]"')
    import netron

    for number, path in enumerate(paths):
        load(path)  # a clear error instead of an empty page
        _check_free(port + number)
    children: list[subprocess.Popen[bytes]] = []
    try:
        for number, path in enumerate(paths[1:], 1):
            arguments = [str(path), str(port + number), str(int(browser))]
            children.append(subprocess.Popen([sys.executable, "-c", _SERVE, *arguments]))
        netron.start(str(paths[0]), ("localhost", port), browse=browser)  # says the address
        netron.wait()
    finally:
        for child in children:
            child.terminate()
            child.wait()


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("localhost", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise LatheError(f"Cannot serve at port {port}: {reason}.", "Use --port.") from error


def print_diff(before: Path, after: Path, samples: Path | None) -> None:
    """Operators, weights and numbers of two models."""
    console = Console()
    old, new = load(before), load(after)
    print_op_table(console, count_ops(old), count_ops(new))
    match = Matching(old, new)
    _print_change(console, graph_change(match, places(match)))
    _print_nodes(console, "-", match.removed, before.name)
    _print_nodes(console, "+", match.added, after.name)
    console.print(f"weights: {format_bytes(weight_bytes(old))} -> {format_bytes(weight_bytes(new))}", highlight=False)
    feeds = load_feeds(samples) if samples is not None else make_feeds(old)
    for number, sample in enumerate(feeds):
        for model in (old, new):
            check_feeds(model.graph.inputs, sample, f"sample {number}")
    shared = [value.name for value in old.graph.outputs if value.name in {item.name for item in new.graph.outputs}]
    if not shared:
        raise ModelError("The two models have no output of the same name.", "Compare models with the same outputs.")
    results = zip(run_reference(old, feeds), run_reference(new, feeds), strict=True)
    worst = dict.fromkeys(shared, 0.0)
    for a, b in results:
        for name in shared:
            worst[name] = max(worst[name], relative_error(a[name or ""], b[name or ""]))
    for name, error in worst.items():
        console.print(f"output {name}: largest relative error {error:.1e} over {len(feeds)} samples", highlight=False)


def print_passes() -> None:
    """Passes with options and first lines, then presets."""
    console = Console()
    table = Table(title="passes", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for column in ("claims", "what it does"):
        table.add_column(column)
    for name, kind in PASSES.items():
        options = [f"{name}:{field.name}={field.default}" for field in dataclasses.fields(kind)]
        first = (kind.__doc__ or "").strip().splitlines()[0].replace("``", "`")
        table.add_row(name, kind.claims.value, Text("\n".join([first, *options])))
    console.print(table)
    presets = Table(title="presets", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    presets.add_column("name", no_wrap=True)
    presets.add_column("what")
    for name, preset in PRESETS.items():
        gate = "with" if preset.speed_gate else "without"
        steps = [step if isinstance(step, str) else step.name for step in preset.passes]
        presets.add_row(name, f"{preset.description} {gate.capitalize()} speed gate.\n{', '.join(steps)}")
    console.print(presets)


def _print_change(console: Console, change: GraphChange) -> None:
    """How many nodes are the same, and what became of the others, alike places together."""
    console.print(
        f"{change.unchanged} nodes are the same, {change.removed} went, {change.added} came:", highlight=False
    )
    for item in change.replacements[:_SHOWN]:
        before, after = (
            ", ".join(f"{count} {op}" if count > 1 else op for op, count in ops.items()) or "nothing"
            for ops in (item.before, item.after)
        )
        by = f"  ({', '.join(item.passes)})" if item.passes else ""
        text = f"  {item.places} x  {before} -> {after}{by}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    others = change.more + sum(item.places for item in change.replacements[_SHOWN:])
    if others:
        console.print(f"  ... and {others} smaller places", highlight=False)


def _print_nodes(console: Console, sign: str, only: Sequence[ir.Node], where: str) -> None:
    """The first of the nodes that are in one model only."""
    if not only:
        return
    console.print(f"{len(only)} nodes only in {where}:", highlight=False, markup=False)
    for node in only[:_SHOWN]:
        by = node.metadata_props.get(PASS_KEY)
        text = f"  {sign} {qualified_op(node)} -> {node.outputs[0].name}" + (f"  ({by})" if by else "")
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    if len(only) > _SHOWN:
        console.print(f"  {sign} ... and {len(only) - _SHOWN} more", highlight=False)
