"""Workers that run a model: threads that share one session, or Ray actors with a session each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import LatheError, ModelError, RuntimeUnavailable
from ..session import Session

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Engine = Literal["auto", "ray", "threads"]
_GET_RAY = 'Install it with: pip install "onnxlathe[distributed]", or use engine="threads".'


SEE_LOGS = "See Ray's logs."


class WorkerDied(Exception):
    """A worker is gone; what it was doing can be done by another one."""


class Workers(Protocol):
    """A number of workers, each of which runs one thing after another."""

    count: int

    def submit(self, worker: int, feeds: Feeds) -> Future[dict[str, Array]]:
        """Lets ``worker`` run ``feeds``; the future may raise ``WorkerDied``."""
        ...

    def restart(self, worker: int) -> None:
        """Puts a new worker in the place of a dead one."""
        ...

    def close(self) -> None:
        """Ends them."""
        ...


def have_ray() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


def connected_ray() -> Any:
    """The module ``ray``, connected: to the cluster of ``RAY_ADDRESS`` or this process's, else to a new local one.

    Raises:
        RuntimeUnavailable: Ray is not installed.
    """
    if not have_ray():
        raise RuntimeUnavailable("Ray is not installed.", _GET_RAY)
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=40)
    return ray


def resolve_engine(engine: str) -> Literal["ray", "threads"]:
    """``"auto"`` is Ray where a cluster is there already, else threads: one machine needs no cluster.

    Raises:
        RuntimeUnavailable: no such engine.
    """
    if engine == "ray" or engine == "threads":
        return engine
    if engine != "auto":
        raise RuntimeUnavailable(f"There is no engine {engine!r}.", "Use 'ray', 'threads' or 'auto'.")
    if not have_ray():
        return "threads"
    import ray

    return "ray" if ray.is_initialized() or os.environ.get("RAY_ADDRESS") else "threads"


class ThreadWorkers:
    """Threads of this process. They share one session, so the weights are in memory once: ONNX Runtime runs a session
    for several threads at once, and Python's lock is not held meanwhile."""

    def __init__(self, session: Session, count: int) -> None:
        self.count = count
        self._session = session
        self._pools = [ThreadPoolExecutor(1) for _ in range(count)]

    def submit(self, worker: int, feeds: Feeds) -> Future[dict[str, Array]]:
        return self._pools[worker].submit(self._session.run, feeds)

    def run_all(self, shards: Sequence[Feeds]) -> list[dict[str, Array]]:
        """Runs shards at once, at most one for each worker; the last in the caller's thread, which would only wait."""
        others = [self.submit(worker, shard) for worker, shard in enumerate(shards[:-1])]
        last = self._session.run(shards[-1])
        return [*(future.result() for future in others), last]

    def restart(self, worker: int) -> None:
        pass  # a thread does not die alone

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)


class SessionActor:
    """What a Ray actor runs: a session of its own. Weights in an external data file are mapped, so that all actors of
    a machine share the pages."""

    def __init__(self, path: str, device: str, threads: int) -> None:
        self._session = Session(path, device, threads)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """As ``Session.run``."""
        return self._session.run(feeds)

    def process(self) -> int:
        """Its process id."""
        return os.getpid()


class RayWorkers:
    """Ray actors, on any machines of the cluster that have the file under the same path."""

    def __init__(self, path: Path, count: int, device: str, threads: int) -> None:
        self._ray = connected_ray()
        self.count = count
        share = {"num_gpus": 1} if device == "cuda" else {"num_cpus": max(1, threads)}
        self._kind = self._ray.remote(SessionActor).options(**share)
        self._arguments = (str(path.resolve()), device, threads)
        self.actors = [self._kind.remote(*self._arguments) for _ in range(count)]
        try:
            self._ray.get([actor.process.remote() for actor in self.actors], timeout=120)
        except self._ray.exceptions.GetTimeoutError as error:
            self.close()
            raise RuntimeUnavailable(
                f"{count} workers with {share} each did not start within two minutes.",
                f"The cluster has {self._ray.cluster_resources()}: take fewer workers or threads.",
            ) from error
        except self._ray.exceptions.RayError as error:
            self.close()
            raise RuntimeUnavailable(
                f"A worker did not start: {cause(error)}", "Every machine needs the file."
            ) from error

    def submit(self, worker: int, feeds: Feeds) -> Future[dict[str, Array]]:
        wanted: Future[dict[str, Array]] = Future()
        done: Future[Any] = self.actors[worker].run.remote(dict(feeds)).future()
        done.add_done_callback(lambda future: self._settle(future, wanted))
        return wanted

    def restart(self, worker: int) -> None:
        self.actors[worker] = self._kind.remote(*self._arguments)

    def close(self) -> None:
        for actor in self.actors:
            self._ray.kill(actor)

    def _settle(self, done: Future[Any], wanted: Future[dict[str, Array]]) -> None:
        error = done.exception()
        if error is None:
            wanted.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayActorError):
            wanted.set_exception(WorkerDied(str(error).splitlines()[0]))
        elif isinstance(error, LatheError):
            wanted.set_exception(ModelError(error.what, error.remedy))
        else:
            wanted.set_exception(RuntimeUnavailable(f"A worker failed: {cause(error)}", SEE_LOGS))


def cause(error: BaseException) -> str:
    """The last line of what Ray says."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
