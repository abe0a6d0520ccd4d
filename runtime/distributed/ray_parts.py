"""Stages and ranks of a divided model as Ray actors, each with its file only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..divided.collectives import perform
from ..divided.manifest import Manifest, load_part, read_manifest
from ..divided.parted import of_rank
from ..divided.ranks import divide_inputs, join_outputs, segments
from ..errors import LatheError, ModelError, PlanError, RuntimeUnavailable
from ..feeds import check_feeds
from ..inference import open_session, run_session, session_options
from .workers import connected_ray

Array = np.ndarray[Any, Any]
_AHEAD = 2  # samples in flight for each stage


class _StageActor:
    """One stage: takes what is alive, gives what later stages and the caller need."""

    def __init__(self, folder: str, number: int, device: Any, threads: int) -> None:
        manifest = read_manifest(Path(folder))
        part = manifest.parts[number]
        load_part(Path(folder), manifest, number)
        options = session_options(threads=threads, ort_config=manifest.ort_config)
        self._session = open_session(Path(folder) / part.file, options, device)
        self._inputs = [info.name for info in part.inputs]
        later = {info.name for other in manifest.parts[number + 1 :] for info in other.inputs}
        self._kept = later | {info.name for info in manifest.outputs}

    def run(self, values: Mapping[str, Array]) -> dict[str, Array]:
        made = run_session(self._session, {name: values[name] for name in self._inputs})
        return {name: array for name, array in {**values, **made}.items() if name in self._kept}


class _RankActor:
    """One rank: runs segment after segment and keeps what it hands on to itself."""

    def __init__(self, folder: str, number: int, device: Any, threads: int) -> None:
        manifest = read_manifest(Path(folder))
        pieces = segments(load_part(Path(folder), manifest, number))
        options = [session_options(threads=threads, ort_config=manifest.ort_config) for _ in pieces]
        self._sessions = [open_session(p.part.model, o, device) for p, o in zip(pieces, options, strict=True)]
        self._collectives = [piece.collectives for piece in pieces]
        self._values: dict[str, Array] = {}

    def exchanges(self) -> list[Any]:
        return self._collectives

    def run(self, number: int, values: Mapping[str, Array], wanted: list[str]) -> dict[str, Array]:
        """Runs a segment with what others sent; returns ``wanted``."""
        self._values = {**(self._values if number else {}), **values}
        session = self._sessions[number]
        feeds = {item.name: self._values[item.name] for item in session.get_inputs()}
        self._values.update(run_session(session, feeds))
        return {name: self._values[name] for name in wanted}


class _Parts:
    """Actors for the files of a folder."""

    def __init__(self, folder: str | os.PathLike[str], kind: str, actor: Any, device: str, threads: int) -> None:
        self._ray = connected_ray()
        self.manifest: Manifest = read_manifest(Path(folder))
        if self.manifest.kind != kind:
            raise PlanError(f"{folder} holds {self.manifest.kind}, not {kind}.", f"Write it with save_{kind}.")
        for number in range(len(self.manifest.parts)):
            load_part(Path(folder), self.manifest, number)
        self.inputs = [info.value() for info in self.manifest.inputs]
        share = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 0}  # stages wait for each other most of the time
        remote = self._ray.remote(actor).options(**share)
        path = str(Path(folder).resolve())
        self.actors = [remote.remote(path, n, device, threads) for n in range(len(self.manifest.parts))]

    def close(self) -> None:
        """Ends the actors."""
        for actor in self.actors:
            self._ray.kill(actor)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _get(self, refs: Any) -> Any:
        try:
            return self._ray.get(refs)
        except LatheError as error:
            raise ModelError(error.what, error.remedy) from error
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeUnavailable(f"An actor of the divided model is gone: {reason}", "Start it again.") from error


class Pipeline(_Parts):
    """A folder of ``save_stages``, a Ray actor for each stage.

    Values go from actor to actor through Ray's object store, not through the caller. ``StagedSession`` is the same in
    one process, and generates.

    Args:
        folder: stages and manifest, under the same path on every machine.
        device: ``"cpu"`` or ``"cuda"``: a GPU for each stage.
        threads: intra-op threads of each stage.

    Raises:
        ModelError: no such folder, or a damaged one.
        PlanError: files of different builds, or no stages.
        RuntimeUnavailable: Ray is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", threads: int = 1) -> None:
        super().__init__(folder, "stages", _StageActor, device, threads)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs one sample."""
        return self.run_many([inputs])[0]

    def run_many(self, samples: Iterable[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Runs samples, each stage on another one at a time; results are in the order of the samples."""
        results: list[dict[str, Array]] = []
        flying: list[Any] = []
        for sample in samples:
            check_feeds(self.inputs, sample, "a sample of run_many()")
            if len(flying) >= _AHEAD * len(self.actors):
                results.append(self._get(flying.pop(0)))
            ref: Any = self._ray.put(dict(sample))
            for actor in self.actors:
                ref = actor.run.remote(ref)
            flying.append(ref)
        return [*results, *(self._get(ref) for ref in flying)]


class TensorParallel(_Parts):
    """A folder of ``save_ranks``, a Ray actor for each rank; the caller adds up and puts together.

    ``RankedSession`` is the same in one process, and generates.

    Args:
        folder: ranks and manifest, under the same path on every machine.
        device: ``"cpu"`` or ``"cuda"``: a GPU for each rank.
        threads: intra-op threads of each rank.

    Raises:
        ModelError: no such folder, or a damaged one.
        PlanError: files of different builds, or no ranks.
        RuntimeUnavailable: Ray is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", threads: int = 1) -> None:
        super().__init__(folder, "ranks", _RankActor, device, threads)
        self._exchanges = self._get(self.actors[0].exchanges.remote())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs one sample."""
        check_feeds(self.inputs, inputs, "the inputs of run()")
        divided = divide_inputs(self.manifest, inputs)
        own = self.manifest.divided
        each = [
            {name: divided[of_rank(rank, name)] if name in own else divided[name] for name in inputs}
            for rank in range(len(self.actors))
        ]
        shared: dict[str, Array] = {}
        outputs = [info.name for info in self.manifest.outputs]
        parts: list[dict[str, Array]] = []
        for number, collectives in enumerate(self._exchanges):
            last = number == len(self._exchanges) - 1
            wanted = outputs if last else [collective.value for collective in collectives]
            given = each if number == 0 else [shared] * len(self.actors)
            runs = [actor.run.remote(number, given[rank], wanted) for rank, actor in enumerate(self.actors)]
            parts = self._get(runs)
            shared = {c.result: perform(c, [part[c.value] for part in parts]) for c in collectives}
        found = {of_rank(rank, name): part[name] for rank, part in enumerate(parts) for name in own if name in part}
        return join_outputs(self.manifest, {**parts[0], **found})
