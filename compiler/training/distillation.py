"""A student and its teacher on the same samples: the loss, and the judgement of what was written back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from ...runtime.errors import PassError
from ...runtime.generation.causal_lm import MASK, TOKENS
from ...runtime.inference import expose, open_session, run_session, session_options
from ...runtime.providers import Device
from ..base import Array, Feeds
from .data import LABELS
from .losses import Distance, hard_loss, match_loss, soft_loss, token_mask
from .torch_graph import TorchGraph

Tensors = Mapping[str, Tensor]
_REMEMBERED = 1 << 30
"""Bytes of the teacher's answers that are kept, so that a second epoch need not ask again."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the loss is made of: ``hard CE + soft T^2 KL + hidden (mean distance of the matched values)``.

    Attributes:
        hard: weight of the cross entropy with the labels, or with the teacher's best class where there are none.
        soft: weight of the divergence from the teacher's distribution.
        hidden: weight of the matched values.
        temperature: T.
        distance: of matched values.
        logits: name of the output that is logits, in both models; empty for none.
        matched: (value of the student, value of the teacher).
    """

    hard: float
    soft: float
    hidden: float
    temperature: float
    distance: Distance
    logits: str
    matched: tuple[tuple[str, str], ...]

    @property
    def of_student(self) -> list[str]:
        """Values that the student must give."""
        return list(dict.fromkeys([*([self.logits] if self.logits else []), *(name for name, _ in self.matched)]))

    @property
    def of_teacher(self) -> list[str]:
        """Values that the teacher must give."""
        return list(dict.fromkeys([*([self.logits] if self.logits else []), *(name for _, name in self.matched)]))

    def loss(self, student: Tensors, teacher: Tensors, sample: Tensors) -> Tensor:
        """The loss of one sample.

        Raises:
            PassError: a value of the student has another shape than the teacher's.
            ModelError: labels that do not fit.
        """
        mask = sample.get(MASK)
        parts: list[Tensor] = []
        if self.logits:
            found, wanted = student[self.logits], teacher[self.logits]
            _check(self.logits, self.logits, found, wanted)
            tokens = token_mask(mask, found)
            if self.hard:
                labels = sample[LABELS] if LABELS in sample else wanted.argmax(-1)
                parts.append(self.hard * hard_loss(found, labels, tokens))
            if self.soft:
                parts.append(self.soft * soft_loss(found, wanted, self.temperature, tokens))
        for name, other in self.matched:
            found, wanted = student[name], teacher[other]
            _check(name, other, found, wanted)
            distance = match_loss(found, wanted, self.distance, token_mask(mask, found))
            parts.append(self.hidden / len(self.matched) * distance)
        return torch.stack([part.float() for part in parts]).sum()


def _check(name: str, other: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise PassError(
            f"{name} has shape {list(found.shape)}, but the teacher's {other} has {list(wanted.shape)}.",
            "Match values of one shape (match=...), or give the teacher that the model comes from.",
        )


class Distillation:
    """Losses of a student graph.

    Args:
        student: the module to be trained.
        teacher: what it learns from; run by ONNX Runtime.
        samples: training samples, with ``labels`` or without.
        held_out: samples that are judged on.
        goal: the loss.
        device: where both compute.
        threads: of ONNX Runtime, 0 for its default.

    Raises:
        ModelError: the teacher cannot be run, or has no such value.
    """

    def __init__(
        self,
        student: TorchGraph,
        teacher: ir.Model,
        samples: Sequence[Feeds],
        held_out: Sequence[Feeds],
        goal: Goal,
        device: Device,
        threads: int,
    ) -> None:
        self.student, self.goal, self.threads = student, goal, threads
        self.device: Device = device
        self.samples, self.held_out = samples, held_out
        self._teacher = open_session(expose(teacher, goal.of_teacher), session_options(threads=threads), device)
        self._inputs = {item.name for item in self._teacher.get_inputs()}
        self._known: dict[int, dict[str, Tensor]] = {}
        self._room = _REMEMBERED

    def loss(self, index: int) -> Tensor:
        """The student's loss on training sample ``index``."""
        return self._loss(self.samples[index])

    def judge(self) -> float:
        """The student's mean loss on the held-out samples."""
        return float(np.mean([float(self._loss(sample)) for sample in self.held_out]))

    def judge_graph(self, model: ir.Model) -> float:
        """The same for a graph, run by ONNX Runtime without its optimizations."""
        names = self.goal.of_student
        session = open_session(expose(model, names), session_options(threads=self.threads, optimize=False), self.device)
        losses: list[float] = []
        for sample in self.held_out:
            inputs = {name: array for name, array in sample.items() if name != LABELS}
            found = {name: torch.tensor(array) for name, array in run_session(session, inputs, names).items()}
            taught = {name: item.cpu() for name, item in self._taught(sample).items()}
            tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in sample.items()}
            losses.append(float(self.goal.loss(found, taught, tensors)))
        return float(np.mean(losses))

    def _loss(self, sample: Feeds) -> Tensor:
        tensors = {name: torch.tensor(np.asarray(array)).to(self.device) for name, array in sample.items()}
        return self.goal.loss(self.student(tensors), self._taught(sample), tensors)

    def _taught(self, sample: Feeds) -> dict[str, Tensor]:
        key = id(sample)
        if key in self._known:
            return self._known[key]
        inputs = {name: array for name, array in sample.items() if name in self._inputs}
        found = run_session(self._teacher, inputs | _own_caches(self._teacher, sample), self.goal.of_teacher)
        answers = {name: torch.tensor(array).to(self.device) for name, array in found.items()}
        self._room -= sum(array.nbytes for array in found.values())
        if self._room >= 0:
            self._known[key] = answers
        return answers


def _own_caches(teacher: ort.InferenceSession, sample: Feeds) -> dict[str, Array]:
    """Empty caches for the teacher where those of the sample are not its own: the student lost layers or heads.

    Raises:
        PassError: the sample's caches are not empty.
    """
    found: dict[str, Array] = {}
    for value in teacher.get_inputs():
        if not value.name.startswith("past") or len(value.shape) != 4 or not {TOKENS, MASK} <= sample.keys():
            continue
        _, heads, _, size = value.shape
        given = sample.get(value.name)
        if given is not None and given.shape[1] == heads and given.shape[3] == size:
            continue
        if sample[TOKENS].shape != sample[MASK].shape:
            raise PassError(
                f"The teacher has another cache {value.name} than the samples, [batch, {heads}, length, {size}].",
                "Give samples that begin with an empty cache, or streams of tokens (data=...).",
            )
        dtype = np.float16 if "float16" in value.type else np.float32
        found[value.name] = np.zeros((len(sample[TOKENS]), heads, 0, size), dtype)
    return found
