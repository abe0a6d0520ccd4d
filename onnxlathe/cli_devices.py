"""Commands for more than one device: ``serve``, ``plan``, ``split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Model, status


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
