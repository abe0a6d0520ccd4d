"""Runs a divided model as one: the files' sessions one after the other, or at once with collectives between them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import ModelError
from ..inference import owning
from ..providers import Device
from .collectives import Collective, perform

Array = np.ndarray[Any, Any]
_OF_RANK = re.compile(r"rank(\d+)::(.*)")


@dataclasses.dataclass(frozen=True)
class Step:
    """Sessions that run at once, one a rank; a stage of a pipeline has one rank.

    Attributes:
        sessions: of each rank.
        received: inputs that earlier steps made.
        sent: outputs that later steps read, or that are outputs of the whole.
        collectives: what is done with results of all ranks before the next step.
    """

    sessions: tuple[ort.InferenceSession, ...]
    received: tuple[str, ...]
    sent: tuple[str, ...]
    collectives: tuple[Collective, ...] = ()


class PartedSession:
    """Looks like an ``ort.InferenceSession`` to whoever binds inputs and outputs and runs.

    Inputs and outputs of one rank alone (its part of a key/value cache) have the names that ``of_rank`` gives.

    Args:
        steps: what runs, in order.
        outputs: outputs of the whole.
        device: where it runs.
    """

    def __init__(self, steps: Sequence[Step], outputs: Sequence[str], device: Device = "cpu") -> None:
        self.steps = list(steps)
        self.outputs = list(outputs)
        self.device: Device = device
        ranks = len(self.steps[0].sessions)
        self._pool = ThreadPoolExecutor(ranks) if ranks > 1 else None

    def io_binding(self) -> PartedBinding:
        """A binding of all sessions."""
        return PartedBinding(self)

    def run_with_iobinding(self, iobinding: PartedBinding) -> None:
        """Runs all steps."""
        for number in range(len(self.steps)):
            self.run_step(number, iobinding)

    def run_step(self, number: int, binding: PartedBinding) -> None:
        """Runs one step and hands its results on."""
        step = self.steps[number]
        if self._pool is None:
            binding.run(number, 0)
        else:
            list(self._pool.map(lambda rank: binding.run(number, rank), range(len(step.sessions))))
        for collective in step.collectives:
            results = [values[collective.value].numpy() for values in binding.values]
            result = owning(perform(collective, results))
            for values in binding.values:
                values[collective.result] = result

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the whole model on arrays.

        Raises:
            ModelError: ONNX Runtime fails.
        """
        binding = self.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        try:
            self.run_with_iobinding(binding)
        except Exception as error:  # ORT's exception classes are not public
            raise ModelError(
                f"ONNX Runtime failed while running a part: {str(error).splitlines()[0]}",
                "Check the input names, shapes and dtypes against the manifest.",
            ) from error
        return dict(zip(self.outputs, (value.numpy() for value in binding.get_outputs()), strict=True))


class PartedBinding:
    """Inputs and outputs of a ``PartedSession``, bound to the sessions that have them.

    Attributes:
        values: of each rank, by name: what steps have handed on in the last run.
    """

    def __init__(self, parted: PartedSession) -> None:
        self._parted = parted
        ranks = len(parted.steps[0].sessions)
        self.values: list[dict[str, ort.OrtValue]] = [{} for _ in range(ranks)]
        self._inputs = [[{i.name for i in s.get_inputs()} for s in step.sessions] for step in parted.steps]
        self._makes = [[{o.name for o in s.get_outputs()} for s in step.sessions] for step in parted.steps]
        self._bindings = [[session.io_binding() for session in step.sessions] for step in parted.steps]
        # In the order in which outputs were bound first, as ORT keeps them: whether the caller gave the memory.
        self._bound: list[list[dict[str, bool]]] = [[{} for _ in step.sessions] for step in parted.steps]
        self._wanted: dict[str, None] = {}
        self._held: dict[str, Any] = {}

    def bind_input(self, name: str, *where: Any) -> None:
        """Binds memory, as ``ort.IOBinding.bind_input`` does, to every session that reads it."""
        for number, rank, own in self._places(name, self._inputs):
            self._bindings[number][rank].bind_input(own, *where)

    def bind_cpu_input(self, name: str, array: Array) -> None:
        """Binds an array, and keeps it while the binding lives."""
        self._held[name] = array = np.ascontiguousarray(array)
        for number, rank, own in self._places(name, self._inputs):
            self._bindings[number][rank].bind_cpu_input(own, array)

    def give(self, name: str, array: Array) -> None:
        """Binds an input of the whole, or hands over what a step receives from somewhere else, to rank 0."""
        if any(name in step.received for step in self._parted.steps):
            self.values[0][name] = owning(array)
        else:
            self.bind_cpu_input(name, array)

    def bind_output(self, name: str, *where: Any) -> None:
        """Binds memory for an output of the whole; of equal outputs of all ranks, rank 0's."""
        self._wanted.setdefault(name, None)
        number, rank, own = self._places(name, self._makes)[0]
        self._bindings[number][rank].bind_output(own, *where)
        self._bound[number][rank][own] = True

    def get_outputs(self) -> list[ort.OrtValue]:
        """Outputs of the last run, in the order in which they were bound."""
        found: list[ort.OrtValue] = []
        for name in self._wanted:
            rank, own = _own(name)
            found.append(self.values[rank or 0][own])
        return found

    def run(self, number: int, rank: int) -> None:
        """Runs one session of one step with what the steps before made."""
        step, binding = self._parted.steps[number], self._bindings[number][rank]
        values, bound = self.values[rank], self._bound[number][rank]
        for name in step.received:
            binding.bind_ortvalue_input(name, values[name])
        for name in step.sent:
            if not bound.setdefault(name, False):  # not the caller's: made anew in each run
                binding.bind_output(name, "cpu")
        step.sessions[rank].run_with_iobinding(binding)
        values.update(zip(bound, binding.get_outputs(), strict=True))

    def _places(self, name: str, names: Sequence[Sequence[set[str]]]) -> list[tuple[int, int, str]]:
        """(step, rank, name there) of an input or output of the whole."""
        only, own = _own(name)
        return [
            (number, rank, own)
            for number, ranks in enumerate(names)
            for rank, known in enumerate(ranks)
            if own in known and (only is None or only == rank)
        ]


def of_rank(rank: int, name: str) -> str:
    """The name, for the whole, of an input or output that only ``rank`` has."""
    return f"rank{rank}::{name}"


def _own(name: str) -> tuple[int | None, str]:
    """Rank and name of what ``of_rank`` named; rank None where it is of all ranks."""
    match = _OF_RANK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)
