"""A model behind HTTP, as a Ray Serve application."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import load
from ..errors import RuntimeUnavailable
from .service import Limits, Service
from .workers import connected_ray

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class _Deployment:
    """A replica: a ``Service`` in a process of its own."""

    def __init__(self, path: str, device: str, threads: int, limits: Limits) -> None:
        self._service = Service(path, device, threads, limits)

    async def __call__(self, request: Request) -> Response:
        return await self._service.answer(request)


def start_server(
    artifact: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    device: str = "cpu",
    threads: int = 1,
    limits: Limits | None = None,
) -> None:
    """Serves a model until ``stop_server``; see ``Service`` for what it answers.

    Args:
        artifact: path of a ``.onnx`` file; every machine of the cluster needs it there.
        host: address to listen at; the default is seen by this machine only.
        port: port.
        workers: replicas.
        device: ``"cpu"`` or ``"cuda"``.
        threads: intra-op threads of each.
        limits: what is accepted.

    Raises:
        ModelError: no such file, or not a model.
        RuntimeUnavailable: Ray is not installed, or somebody listens at the port.
    """
    path = Path(artifact).resolve()
    load(path)  # a clear error here rather than in a replica
    _require_free(host, port)
    connected_ray()
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    share = {"num_gpus": 1} if device == "cuda" else {"num_cpus": max(1, threads)}
    options: dict[str, Any] = {"num_replicas": workers, "ray_actor_options": share, "max_ongoing_requests": 1000}
    serve.start(http_options={"host": host, "port": port})
    deployment: Any = serve.deployment(**options)(_Deployment)
    serve.run(deployment.bind(str(path), device, threads, limits or Limits()), name="onnxlathe", route_prefix="/")


def _require_free(host: str, port: int) -> None:
    """Ray Serve would share a port that another server has, and both would answer."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            if os.name == "posix":  # connections that have just ended do not count; on Windows it means sharing
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise RuntimeUnavailable(
            f"Cannot listen at {host}:{port}: {error}.", "Give another --port or --host."
        ) from error


def stop_server() -> None:
    """Ends what ``start_server`` began."""
    from ray import serve

    serve.shutdown()
