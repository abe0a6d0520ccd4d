"""The training loop: best so far kept, interruptible, resumable to the same result."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.errors import ModelError, PassError
from ...runtime.files import write_atomically

_WARM = 0.05
"""Part of the steps in which the learning rate rises."""
_JUDGED = 20
"""How often the held-out part is looked at, and a checkpoint written."""
_NORM = 1.0
"""Derivatives are scaled down to this norm."""
_SMALLEST = 1e-3
"""Weights smaller than this learn as if they were of this size: biases that begin at zero."""
_SECONDS = 1.0
"""Between two lines of progress."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: updates of the weights.
        lr: the highest learning rate of Adam, relative to the root mean square of each weight (as in Adafactor,
            1804.04235), as passes fold scales into weights; it rises for 5 % of the steps, then falls along a cosine.
        seed: seed of the order of the samples.
        checkpoint: file to write the state to and to go on from, None for none.
        purpose: what else identifies the run, so that a checkpoint of another one is refused.
    """

    steps: int
    lr: float
    seed: int
    checkpoint: Path | None
    purpose: str


@dataclasses.dataclass
class Finished:
    """What came of it; the module holds the best weights.

    Attributes:
        start: held-out loss of the weights it began with.
        best: held-out loss of the best ones.
        best_step: the step after which they were reached; 0 for those it began with.
        steps: steps done.
        stopped: why it ended early, empty if it did not.
    """

    start: float
    best: float
    best_step: int = 0
    steps: int = 0
    stopped: str = ""


def train(
    module: nn.Module,
    loss: Callable[[int], Tensor],
    judge: Callable[[], float],
    count: int,
    plan: Plan,
    progress: Callable[[str], None],
) -> Finished:
    """Trains ``module`` with Adam and leaves the weights in it that the held-out part likes best.

    Ctrl-C ends it with the best so far; a loss or a derivative that is not finite ends it too. With a checkpoint, a run
    that was cut off goes on from the last twentieth of its steps, with the result it would have had.

    Args:
        module: what is trained: its parameters that require derivatives.
        loss: loss of training sample ``i``.
        judge: loss of the held-out part; smaller is better.
        count: number of training samples.
        plan: steps, rate, seed, checkpoint.
        progress: told step and loss about once a second.

    Raises:
        PassError: the checkpoint is of another run, or nothing can be trained.
        ModelError: the checkpoint cannot be read.
    """
    run = _Run(module, plan, judge)
    try:
        run.begin()
        run.work(loss, count, progress)
    except KeyboardInterrupt:
        if run.finished is None:
            raise
        run.finished.stopped = "interrupted"
    finished = run.finished
    if finished is None:
        raise PassError("Training did not begin.")
    run.restore()
    return finished


class _Run:
    def __init__(self, module: nn.Module, plan: Plan, judge: Callable[[], float]) -> None:
        self.module, self.plan, self.judge = module, plan, judge
        self.parameters = [item for item in module.parameters() if item.requires_grad]
        if not self.parameters:
            raise PassError("No weight can be trained.", "Check exclude=..., and that the graph has float weights.")
        self.sizes = [max(float(item.detach().square().mean().sqrt()), _SMALLEST) for item in self.parameters]
        self.optimizer = torch.optim.Adam([{"params": [item]} for item in self.parameters], lr=plan.lr)
        self.identity = self._identity()
        self.best_weights: dict[str, Tensor] = {}
        self.finished: Finished | None = None

    def begin(self) -> None:
        """Takes up the checkpoint, or judges what there is."""
        if self.plan.checkpoint is not None and self.plan.checkpoint.exists():
            self._load(self.plan.checkpoint)
            return
        self.best_weights = self._weights()
        start = self._judged()
        self.finished = Finished(start, start)

    def work(self, loss: Callable[[int], Tensor], count: int, progress: Callable[[str], None]) -> None:
        """Steps until there are enough, or something is not finite."""
        done = self.finished
        if done is None:
            return
        every = max(1, self.plan.steps // _JUDGED)
        said = began = time.monotonic()
        first = done.steps
        while done.steps < self.plan.steps:
            value = self._step(loss, count, done.steps)
            if not math.isfinite(value):
                done.stopped = f"the loss or its derivative was not finite in step {done.steps + 1}"
                return
            done.steps += 1
            if done.steps % every == 0 or done.steps == self.plan.steps:
                held_out = self._judged()
                if held_out < done.best:
                    done.best, done.best_step, self.best_weights = held_out, done.steps, self._weights()
                self._save()
            now = time.monotonic()
            if now - said >= _SECONDS:
                left = (now - began) / (done.steps - first) * (self.plan.steps - done.steps)
                progress(
                    f"step {done.steps}/{self.plan.steps}, loss {value:.4g}, held out {done.best:.4g} "
                    f"(at first {done.start:.4g}), {left:.0f} s left"
                )
                said = now

    def restore(self) -> None:
        """Puts the best weights into the module."""
        self.module.load_state_dict(self.best_weights)
        self.module.eval()

    def _step(self, loss: Callable[[int], Tensor], count: int, step: int) -> float:
        for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
            group["lr"] = rate(self.plan, step) * size
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss(sample_of(step, count, self.plan.seed))
        if not bool(value.isfinite()):
            return math.nan
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, _NORM)
        if not bool(norm.isfinite()):
            return math.nan
        self.optimizer.step()
        return float(value.detach())

    def _judged(self) -> float:
        self.module.eval()
        with torch.no_grad():
            value = self.judge()
        return value if math.isfinite(value) else math.inf

    def _weights(self) -> dict[str, Tensor]:
        return {name: item.detach().clone() for name, item in self.module.state_dict().items()}

    def _identity(self) -> str:
        """Options and the weights it began with."""
        digest = hashlib.sha256(f"{self.plan.steps} {self.plan.lr} {self.plan.seed} {self.plan.purpose}".encode())
        for name, item in self.module.state_dict().items():
            digest.update(name.encode() + item.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        if self.plan.checkpoint is None or self.finished is None:
            return
        buffer = io.BytesIO()
        state = {
            "identity": self.identity,
            "weights": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_weights": self.best_weights,
            "finished": dataclasses.asdict(self.finished),
        }
        torch.save(state, buffer)
        write_atomically(self.plan.checkpoint, buffer.getvalue())

    def _load(self, path: Path) -> None:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            same = state["identity"] == self.identity
        except Exception as error:  # whatever unpickling finds
            raise ModelError(
                f"{path} is no checkpoint: {type(error).__name__}.", "Remove it, or name another."
            ) from error
        if not same:
            raise PassError(
                f"The checkpoint {os.fspath(path)} is of another run: model, data or options differ.",
                "Remove it, or name another file.",
            )
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.parameters[0].device
        self.best_weights = {name: item.to(device) for name, item in state["best_weights"].items()}
        self.finished = Finished(**state["finished"])


def rate(plan: Plan, step: int) -> float:
    """The relative learning rate of a step, counted from 0."""
    warm = min(1.0, (step + 1) / max(1.0, _WARM * plan.steps))
    return plan.lr * warm * 0.5 * (1.0 + math.cos(math.pi * step / plan.steps))


def sample_of(step: int, count: int, seed: int) -> int:
    """Which of ``count`` samples a step takes: every one once an epoch, in an order of its own."""
    epoch, position = divmod(step, count)
    return int(np.random.default_rng([seed, epoch]).permutation(count)[position])
