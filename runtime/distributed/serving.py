"""A model behind HTTP, as a Ray Serve application."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import load
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
        RuntimeUnavailable: Ray is not installed.
    """
    path = Path(artifact).resolve()
    load(path)  # a clear error here rather than in a replica
    connected_ray()
    from ray import serve

    share = {"num_gpus": 1} if device == "cuda" else {"num_cpus": max(1, threads)}
    options: dict[str, Any] = {"num_replicas": workers, "ray_actor_options": share, "max_ongoing_requests": 1000}
    serve.start(http_options={"host": host, "port": port})
    deployment: Any = serve.deployment(**options)(_Deployment)
    serve.run(deployment.bind(str(path), device, threads, limits or Limits()), name="onnxlathe", route_prefix="/")


def stop_server() -> None:
    """Ends what ``start_server`` began."""
    from ray import serve

    serve.shutdown()
