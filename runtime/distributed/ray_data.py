"""Files too big for memory, through Ray Data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import load
from ..session import Session
from .workers import connected_ray

Array = np.ndarray[Any, Any]


class _Predictor:
    """What an actor of Ray Data does with each block of rows."""

    def __init__(self, path: str, device: str, threads: int) -> None:
        self._session = Session(path, device, threads)

    def __call__(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        names = [value.name or "" for value in self._session.inputs]
        feeds = {name: np.stack(list(batch[name])) if batch[name].dtype == object else batch[name] for name in names}
        rest = {name: column for name, column in batch.items() if name not in names}
        return {**rest, **self._session.run(feeds)}


def map_batches(
    dataset: Any,
    artifact: str | os.PathLike[str],
    *,
    batch_size: int = 256,
    workers: int = 1,
    device: str = "cpu",
    threads: int = 1,
) -> Any:
    """A ``ray.data.Dataset`` with the outputs of a model in place of its inputs; nothing runs before it is read.

    Args:
        dataset: a ``ray.data.Dataset`` with a column for each input of the model; other columns are kept.
        artifact: path of a ``.onnx`` file; every machine needs it there.
        batch_size: rows that run at once.
        workers: actors.
        device: ``"cpu"`` or ``"cuda"``.
        threads: intra-op threads of each.

    Raises:
        ModelError: no such file, or not a model.
        RuntimeUnavailable: Ray is not installed.
    """
    connected_ray()
    path = Path(artifact).resolve()
    load(path)  # a clear error here rather than in an actor
    import ray.data

    share = {"num_gpus": 1} if device == "cuda" else {"num_cpus": max(1, threads)}
    return dataset.map_batches(
        _Predictor,
        fn_constructor_args=(str(path), device, threads),
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        **share,
    )
