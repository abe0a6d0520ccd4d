"""Recovery training of the graph itself: it learns from the model that it was made of."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import onnx
import onnx_ir as ir

from ..compiler.base import Claim, Feeds, Gate, Outcome, Pass, PassContext
from ..compiler.budget import split
from ..compiler.load import load_model
from ..compiler.padding import cache_names
from ..runtime.errors import PassError, RuntimeUnavailable
from ..runtime.feeds import FeedSource
from ..runtime.providers import resolve_device

if TYPE_CHECKING:
    from ..compiler.training.distillation import Goal

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LOGITS = "logits"


@dataclasses.dataclass(frozen=True)
class Distill(Pass):
    """Trains the weights of a pruned or quantized graph to give what the original gives.

    The graph is executed in torch, operator by operator, with its weights as parameters, trained with Adam, and the
    weights are written back into the same graph: no node, shape or type changes. What it minimizes:

    1. ``hard``: cross entropy with the labels of the data, or with the teacher's best class where they have none;
    2. ``soft``: ``T^2 KL(softmax(teacher / T) || softmax(student / T))`` (Hinton et al., 1503.02531);
    3. ``hidden``: distance of outputs that are not logits, and of the values in ``match``, from the teacher's
       (Sanh et al., 1910.01108); without a loss given: 2 where there is an output called logits, else 3.

    Tokens count, padding does not. What a former pass decided stays:

    4. zeros of a matrix stay zero (pruned weights), widths and layers are as they are;
    5. integer weights stay on their grid and are trained through their rounding (straight-through, Bengio et al.,
       1308.3432); of weights of at most four levels the scales follow; QuantizeLinear passes derivatives within its
       range.

    A part of the data is held out. The best weights by it are kept, and only if ONNX Runtime's results with them are
    better on it than with the ones given; otherwise nothing changes and a note says so. Ctrl-C ends training with the
    best so far, and so does a loss that is not finite. A second run trains on from what the first one left.

    Refused (PassError, before training): operators that torch does not execute here, by name; If, Loop and Scan.

    Needs a GPU or patience for more than some ten million weights. No effect on speed.

    Attributes:
        teacher: what to learn from: a model or its path; None: the model as ``compile`` got it.
        data: samples ``{input name: array}``, each a batch, optionally with ``labels``; or streams of tokens (integers)
            for a language model; None: the calibration samples.
        steps: updates, one sample each.
        hard, soft, hidden: weights of the losses above.
        temperature: T of ``soft``.
        distance: ``mse``: squared error over the teacher's square; ``cosine``: 1 - cosine by token.
        match: further values for ``hidden``: names that both graphs have, or pairs (name here, name in the teacher).
        lr: highest learning rate, relative to the size of each weight.
        held_out: part of the samples that is judged on and not trained on.
        exclude: patterns (``*``) of initializers that are left as they are.
        window, batch: how streams are cut: tokens of a row, rows of a sample.
        checkpoint: a file from which an interrupted training goes on, with the same result.
        device: ``cpu``, ``cuda`` or ``auto``; None: the target of the compile.
    """

    name: ClassVar[str] = "distill"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    gate: ClassVar[Gate] = "off"
    teacher: ir.Model | onnx.ModelProto | str | os.PathLike[str] | None = dataclasses.field(default=None, repr=False)
    data: FeedSource | Iterable[Sequence[int]] | None = dataclasses.field(default=None, repr=False)
    steps: int = 1000
    hard: float = 0.0
    soft: float = 0.0
    hidden: float = 0.0
    temperature: float = 2.0
    distance: Literal["mse", "cosine"] = "mse"
    match: tuple[str | tuple[str, str], ...] = ()
    lr: float = 5e-3
    held_out: float = 0.1
    exclude: tuple[str, ...] = ()
    window: int = 128
    batch: int = 8
    checkpoint: str | os.PathLike[str] | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.window < 2 or self.batch < 1:
            raise ValueError("steps and batch are at least 1, window at least 2")
        if min(self.hard, self.soft, self.hidden) < 0 or self.temperature <= 0 or self.lr <= 0:
            raise ValueError("weights of losses are not negative, temperature and lr are positive")
        if self.match and not self.hidden:
            raise ValueError("match needs a weight: give hidden=...")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out lies between 0 and 1, not {self.held_out}")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        # Importing torch takes seconds, which only those who train should wait for.
        from ..compiler.training.data import training_samples

        if self.checkpoint is not None and not Path(self.checkpoint).parent.is_dir():
            raise PassError(f"There is no folder for the checkpoint {self.checkpoint}.", "Create it first.")
        teacher = self._teacher(context)
        source = self.data if self.data is not None else context.feeds
        samples = training_samples(source, model, self.window, self.batch)
        if len(samples) < 2:
            raise PassError("Training needs at least two samples: one is held out.", "Give more, smaller ones.")
        rest, held = (list(part) for part in split(samples, self.held_out, context.seed))
        return self._train(model, teacher, rest, held, context)

    def _train(
        self, model: ir.Model, teacher: ir.Model, rest: list[Feeds], held: list[Feeds], context: PassContext
    ) -> Outcome:
        import torch

        from ..compiler.training.distillation import Distillation
        from ..compiler.training.loop import Plan, train
        from ..compiler.training.torch_graph import TorchGraph

        goal = self._goal(model, teacher)
        device = context.device if self.device is None else resolve_device(self.device)
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailable(
                "This torch cannot use CUDA.", "Install one that can, or give Distill(device='cpu')."
            )
        student = TorchGraph(model, goal.of_student, exclude=self.exclude, origin=teacher, device=device)
        trainer = Distillation(student, teacher, rest, held, goal, device, context.threads)
        context.progress("distill: judging the model given")
        given = trainer.judge_graph(model)
        plan = Plan(
            self.steps,
            self.lr,
            context.seed,
            None if self.checkpoint is None else Path(self.checkpoint),
            f"{goal} {self.exclude} {len(rest)} {len(held)}",
        )
        began, threads = time.monotonic(), torch.get_num_threads()
        torch.set_num_threads(context.threads or threads)
        try:
            done = train(
                student, trainer.loss, trainer.judge, len(rest), plan, lambda text: context.progress(f"distill: {text}")
            )
        finally:
            torch.set_num_threads(threads)
        outcome = Outcome()
        if done.stopped:
            outcome.notes.append(f"ended after {done.steps} of {self.steps} steps: {done.stopped}")
        before = [(value, value.const_value) for value in model.graph.initializers.values()]
        written = student.write()
        reached = trainer.judge_graph(model)
        if not reached < given:
            for value, tensor in before:
                value.const_value = tensor
            outcome.notes.append(
                f"nothing changed: held-out loss {given:.4g}, trained {reached:.4g}, which is no better"
            )
            return outcome
        outcome.counts["weights trained"] = written
        outcome.notes.append(
            f"held-out loss {given:.4g} -> {reached:.4g} (best after step {done.best_step} of {self.steps}; "
            f"{len(rest)} samples, {len(held)} held out; {time.monotonic() - began:.0f} s)"
        )
        return outcome

    def _teacher(self, context: PassContext) -> ir.Model:
        if self.teacher is not None:
            return load_model(self.teacher)
        if context.original is None:
            raise PassError("Distill has no teacher.", "Give Distill(teacher=...), or run it through compile().")
        return context.original

    def _goal(self, model: ir.Model, teacher: ir.Model) -> Goal:
        """What the losses apply to.

        Raises:
            PassError: soft or hard without an output of logits, or a value that a graph does not make.
        """
        from ..compiler.training.distillation import Goal

        caches = set(cache_names(model).values())
        floats = [v.name or "" for v in model.graph.outputs if v.dtype in _FLOATS and v.name not in caches]
        usual = not (self.hard or self.soft or self.hidden)
        soft = 1.0 if usual and _LOGITS in floats else self.soft
        hidden = 1.0 if usual and not soft else self.hidden
        logits = ""
        if soft or self.hard:
            if _LOGITS not in floats and len(floats) != 1:
                raise PassError(
                    f"Which of the outputs {', '.join(floats)} is logits?",
                    "hard and soft take the one called logits, or the only one; use hidden for the others.",
                )
            logits = _LOGITS if _LOGITS in floats else floats[0]
        pairs = [(name, name) for name in floats if name != logits]
        pairs += [(item, item) if isinstance(item, str) else (item[0], item[1]) for item in self.match]
        matched = tuple(pairs) if hidden else ()
        self._check(model, "model", [name for name, _ in matched])
        self._check(teacher, "teacher", [*([logits] if logits else []), *(name for _, name in matched)])
        if not logits and not matched:
            raise PassError("There is nothing to learn.", "Give match=..., as the model has no float output.")
        return Goal(self.hard, soft, hidden, self.temperature, self.distance, logits, matched)

    def _check(self, model: ir.Model, which: str, names: Sequence[Any]) -> None:
        known = {value.name for node in model.graph for value in node.outputs}
        missing = [name for name in names if name not in known]
        if missing:
            raise PassError(f"The {which} does not make {', '.join(missing[:5])}.", "Check match=... and the outputs.")
