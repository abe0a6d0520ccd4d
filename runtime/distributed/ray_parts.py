"""Stages and ranks of a divided model as Ray actors, each with its file only."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ..divided.collectives import perform
from ..divided.manifest import load_part
from ..divided.opening import Divided, part_caches
from ..divided.parted import of_rank
from ..divided.ranks import divide_inputs, join_outputs
from ..errors import LatheError, ModelError, RuntimeUnavailable
from ..feeds import check_feeds
from ..generation.causal_lm import CausalLM
from ..generation.generate import Runnable
from ..generation.kv_cache import make_cache
from ..memory import BufferPool
from ..providers import Device
from .part_actor import Grown, PartActor
from .remote_cache import RemoteCache, RemoteRunnable
from .workers import SEE_LOGS, cause, connected_ray

Array = np.ndarray[Any, Any]
_AHEAD = 2  # samples in flight for each stage


class Parts(Divided):
    """A folder of ``save_stages`` or ``save_ranks``, a Ray actor for each file; they are spread over the machines.

    Raises what ``Divided`` does.

    Args:
        folder: the files and their manifest, under the same path on every machine.
        device: ``"cpu"`` or ``"cuda"``: a GPU for each.
        threads: intra-op threads of each.

    Attributes:
        actors: in the order of the files.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", threads: int = 1) -> None:
        super().__init__(folder)
        self.device = "cpu"  # tokens and logits are here
        numbers = range(len(self.manifest.parts))
        for number in numbers:
            load_part(Path(folder), self.manifest, number)  # a clear error here rather than in an actor
        self._ray = connected_ray()
        share = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 0}  # parts wait for each other most of the time
        remote, path = self._ray.remote(PartActor), str(Path(folder).resolve())
        places = self._places(len(numbers), device)
        options = [{"scheduling_strategy": place, **share} for place in places]
        self.actors = [remote.options(**options[n]).remote(path, n, device, threads) for n in numbers]
        model = self.manifest.language_model()
        self.counts: Sequence[int] = [
            0 if model is None else len(part_caches(self.manifest, model, number)) for number in numbers
        ]
        self._numbers = itertools.count()
        self._caches = self._new_cache

    def close(self) -> None:
        """Ends the actors."""
        for actor in self.actors:
            self._ray.kill(actor)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def nodes(self) -> list[str]:
        """Ray's ids of the machines that the actors are on."""
        return self.each("node", [()] * len(self.actors))

    def number(self) -> int:
        """A number for a run or a cache."""
        return next(self._numbers)

    def each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Calls a method of every actor, with arguments of its own, and waits.

        Raises:
            ModelError: ONNX Runtime failed in one.
            RuntimeUnavailable: one is gone.
        """
        calls = zip(self.actors, arguments, strict=True)
        return self._get([getattr(actor, method).remote(*own) for actor, own in calls])

    def forget(self, number: int) -> None:
        """Lets all drop a cache, and does not wait."""
        if self._ray.is_initialized():
            for actor in self.actors:
                actor.drop.remote(number)

    def _places(self, count: int, device: str) -> list[Any]:
        """A machine for each part if there is room: equal shares of the parts, neighbours together."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = [node for node in self._ray.nodes() if node["Alive"]]
        fit = [node for node in alive if device != "cuda" or node["Resources"].get("GPU")] or alive
        numbers = (number * len(fit) // count for number in range(count))
        return [NodeAffinitySchedulingStrategy(fit[number]["NodeID"], soft=False) for number in numbers]

    def _new_cache(
        self, model: CausalLM, batch: int, capacity: int, width: int, device: Device, pool: BufferPool | None
    ) -> RemoteCache:
        number = self.number()
        self.each("open_cache", [(number, batch, capacity, width)] * len(self.actors))
        return RemoteCache(self, number, make_cache(model, batch, capacity, width, device, pool))

    def _generator(self) -> tuple[Runnable, CausalLM]:
        return RemoteRunnable(self._step), dataclasses.replace(self._language_model(), cache=(), logits_size=None)

    def _step(self, inputs: Mapping[str, Array], cache: int, grown: Grown) -> Array:
        """Logits of one run with a cache."""
        raise NotImplementedError

    def _get(self, refs: Any) -> Any:
        try:
            return self._ray.get(refs)
        except LatheError as error:
            raise ModelError(error.what, error.remedy) from error
        except self._ray.exceptions.RayActorError as error:
            reason = cause(error)
            raise RuntimeUnavailable(f"An actor of the divided model is gone: {reason}", "Start it again.") from error
        except self._ray.exceptions.RayError as error:
            raise RuntimeUnavailable(f"An actor of the divided model failed: {cause(error)}", SEE_LOGS) from error


class Pipeline(Parts):
    """A folder of ``save_stages``, a Ray actor for each stage; ``StagedSession`` is the same in one process.

    Values go from actor to actor through Ray's object store, not through the caller. For the arguments see ``Parts``.
    """

    kind: ClassVar[Literal["stages", "ranks"]] = "stages"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs one sample."""
        return self.run_many([inputs])[0]

    def run_many(self, samples: Iterable[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """Runs samples, each stage on another one at a time; results are in the order of the samples.

        Raises:
            ModelError: wrong names, dtypes or shapes, or a failure inside ONNX Runtime.
            RuntimeUnavailable: an actor is gone.
        """
        results: list[dict[str, Array]] = []
        flying: list[Any] = []
        for sample in samples:
            check_feeds(self.inputs, sample, "a sample of run_many()")
            if len(flying) >= _AHEAD * len(self.actors):
                results.append(self._get(flying.pop(0)))
            flying.append(self._send(self.number(), sample, self.outputs))
        return [*results, *(self._get(ref) for ref in flying)]

    def _step(self, inputs: Mapping[str, Array], cache: int, grown: Grown) -> Array:
        return self._get(self._send(cache, inputs, ["logits"], grown))["logits"]

    def _send(self, number: int, values: Mapping[str, Array], wanted: Sequence[str], grown: Grown = (0, 0, 0)) -> Any:
        ref: Any = self._ray.put(dict(values))
        for actor in self.actors:
            ref = actor.run.remote(number, 0, ref, wanted, grown)
        return ref


class TensorParallel(Parts):
    """A folder of ``save_ranks``, a Ray actor for each rank; ``RankedSession`` is the same in one process.

    The caller adds up and puts together. For the arguments see ``Parts``.
    """

    kind: ClassVar[Literal["stages", "ranks"]] = "ranks"

    def __init__(self, folder: str | os.PathLike[str], device: str = "cpu", threads: int = 1) -> None:
        super().__init__(folder, device, threads)
        self._exchanges = self._get(self.actors[0].exchanges.remote())

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs one sample.

        Raises:
            ModelError: wrong names, dtypes or shapes, or a failure inside ONNX Runtime.
            RuntimeUnavailable: an actor is gone.
        """
        check_feeds(self.inputs, inputs, "the inputs of run()")
        divided, own = divide_inputs(self.manifest, inputs), self.manifest.divided
        each = [
            {name: divided[of_rank(rank, name)] if name in own else divided[name] for name in inputs}
            for rank in range(len(self.actors))
        ]
        parts = self._run(self.number(), each, self.outputs)
        found = {of_rank(rank, name): part[name] for rank, part in enumerate(parts) for name in own if name in part}
        return join_outputs(self.manifest, {**parts[0], **found})

    def _step(self, inputs: Mapping[str, Array], cache: int, grown: Grown) -> Array:
        return self._run(cache, [inputs] * len(self.actors), ["logits"], grown)[0]["logits"]

    def _run(
        self, number: int, each: Sequence[Mapping[str, Array]], outputs: Sequence[str], grown: Grown = (0, 0, 0)
    ) -> list[dict[str, Array]]:
        """What each rank makes of ``outputs``, given the inputs of each."""
        given: Sequence[Any] = each
        parts: list[dict[str, Array]] = []
        for step, collectives in enumerate(self._exchanges):
            last = step == len(self._exchanges) - 1
            wanted = outputs if last else [collective.value for collective in collectives]
            parts = self.each("run", [(number, step, values, wanted, grown) for values in given])
            shared = {c.result: perform(c, [part[c.value] for part in parts]) for c in collectives}
            given = [self._ray.put(shared)] * len(self.actors)
        return parts
