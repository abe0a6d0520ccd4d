"""Commands for more than one device: ``serve``, ``plan``, ``place``, ``split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxlathe.runtime.errors import PlanError

from .options import Device, Model, Output, Samples, Threads, status


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 for everybody")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="replicas")] = 1,
    target: Device = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="intra-op threads of each")] = 1,
    max_bytes: Annotated[int, typer.Option(min=1, help="of a request's body")] = 1_000_000,
    token: Annotated[
        str | None, typer.Option(envvar="ONNXLATHE_TOKEN", help="what requests must carry: Authorization: Bearer TOKEN")
    ] = None,
) -> None:
    """Serves a model over HTTP with Ray Serve, until Ctrl-C.

    POST /predict {"inputs": {name: nested lists}}, POST /generate {"prompt": text or ids, "stream": true}, GET /health,
    GET /metrics.

    Example: onnxlathe serve model.onnx --port 8000
    """
    import time

    from onnxlathe.runtime.distributed import Limits, start_server, stop_server

    with status("onnxlathe: starting Ray Serve"):
        limits = Limits(max_bytes=max_bytes, token=token)
        start_server(model, host=host, port=port, workers=workers, device=target, threads=threads, limits=limits)
    typer.echo(f"serving {model} at http://{host}:{port}")
    try:
        while True:
            time.sleep(3600)
    finally:
        stop_server()


def plan(
    params: Annotated[float, typer.Option(help="weights of the decoder, e.g. 70e9")],
    layers: Annotated[int, typer.Option(min=1, help="layers")],
    hidden: Annotated[int, typer.Option(min=1, help="width of the residual stream")],
    kv_heads: Annotated[int, typer.Option(min=1, help="key/value heads")],
    devices: Annotated[int, typer.Option(min=1, help="devices, all alike")],
    hbm: Annotated[float, typer.Option(help="GB of memory of each")],
    bandwidth: Annotated[float, typer.Option(help="GB/s of each device's memory")],
    link: Annotated[float, typer.Option(help="GB/s between two devices")],
    tflops: Annotated[float, typer.Option(help="TFLOP/s of each, in the type of the weights")],
    head_size: Annotated[int, typer.Option(min=1, help="elements of a head")] = 128,
    weight_bits: Annotated[float, typer.Option(help="bits of a weight, scales included")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="texts at once on a copy")] = 1,
    context: Annotated[int, typer.Option(min=1, help="tokens of each")] = 4096,
) -> None:
    """Says how a decoder can be spread over devices, and how fast it can be at best.

    Example: onnxlathe plan --params 70e9 --layers 80 --hidden 8192 --kv-heads 8 --devices 8 --hbm 141 --bandwidth 4800
    --link 900 --tflops 990
    """
    from .planner import Decoder, Hardware
    from .planner import plan as plan_splits

    model = Decoder(params, layers, hidden, kv_heads, head_size, weight_bits)
    hardware = Hardware(devices, hbm * 1e9, bandwidth * 1e9, link * 1e9, tflops * 1e12)
    typer.echo("stages  ranks  copies  GB a device  tokens/s of a text  tokens/s of all  exchanges")
    for split in plan_splits(model, hardware, batch, context)[:10]:
        typer.echo(
            f"{split.stages:6}  {split.ranks:5}  {split.copies:6}  {split.device_bytes / 1e9:11.1f}  "
            f"{1 / split.step_seconds:18.1f}  {split.tokens_per_second:15.1f}  {split.exchange_share:9.0%}"
        )
    typer.echo("Upper bounds: weights and caches are read once a step, nothing else takes time (docs/scaling.md).")


def place(
    model: Model,
    output: Output,
    machine: Annotated[
        list[str], typer.Option(help="another device: NAME=TFLOP/s,GB/s of its memory,microseconds a kernel")
    ],
    link: Annotated[float, typer.Option(min=1e-6, help="GB/s between the devices")] = 20,
    latency: Annotated[float, typer.Option(min=0, help="microseconds that a transfer takes at least")] = 10,
    memory: Annotated[list[str] | None, typer.Option(help="room for weights: NAME=GB")] = None,
    cost: Annotated[str, typer.Option(help="seconds on the CPU: measured, or roofline")] = "measured",
    samples: Samples = None,
    threads: Threads = 0,
) -> None:
    """Places every node of a model on the CPU or another device, so that compute and transfers take the least time.

    Example: onnxlathe place model.onnx -o placed.onnx --machine cuda=60,3350,5 --link 25 --memory cuda=80
    """
    from onnxlathe.passes.presets import make_pass

    from .api import compile as compile_model
    from .arguments import check_writable

    check_writable(output, [model, samples])
    scales = (1e12, 1e9, 1e-6)
    given = _constants(machine, 3)
    machines = {name: tuple(a * b for a, b in zip(numbers, scales, strict=True)) for name, numbers in given.items()}
    options = {
        "devices": ("cpu", *machines),
        "machines": machines,
        "links": link * 1e9,
        "latency": latency * 1e-6,
        "memory": {name: int(gigabytes * 1e9) for name, (gigabytes,) in _constants(memory or [], 1).items()},
        "cost": cost,
    }
    placed = compile_model(model, [make_pass("partition-devices", **options)], calibration=samples, threads=threads)
    placed.save(output)
    placed.report.print()


def _constants(texts: list[str], count: int) -> dict[str, list[float]]:
    """``["cuda=1,2"] -> {"cuda": [1.0, 2.0]}``."""
    found: dict[str, list[float]] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        try:
            found[name] = [float(number) for number in numbers.split(",")]
        except ValueError:
            found[name] = []
        if len(found[name]) != count or not all(number > 0 for number in found[name]):
            form = "NAME=GB" if count == 1 else "NAME=TFLOP/s,GB/s,microseconds"
            raise PlanError(f"Cannot read {text!r}.", f"Write {form}, all above 0.")
    return found


def split(
    model: Model,
    folder: Annotated[Path, typer.Option("-o", "--output", help="the folder to write", show_default=False)],
) -> None:
    """Writes the stages or ranks of a model that partition-stages or partition-tensor divided.

    Example: onnxlathe split divided.onnx -o stages
    """
    from onnxlathe.compiler.placement import read_placement
    from onnxlathe.compiler.ranks import save_ranks
    from onnxlathe.compiler.save_parts import save_stages
    from onnxlathe.runtime.artifact import load, read_config

    graph = load(model)
    placement = read_placement(graph)
    save = save_ranks if placement is not None and placement.kind == "ranks" else save_stages
    save(graph, folder, ort_config=read_config(graph.metadata_props))
    typer.echo(f"wrote {len(list(folder.glob('*.onnx')))} files and manifest.json into {folder}")
