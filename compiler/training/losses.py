"""What a student is trained for: the teacher's distribution, labels, and values inside; padding never counts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...runtime.errors import ModelError
from .data import IGNORED

Distance = Literal["mse", "cosine"]


def token_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Which positions of ``like`` [batch, sequence, ...] are tokens, bool [batch, sequence]; None for all.

    Args:
        mask: [batch, total], non-zero for tokens; total counts a cache too, whose positions come first.
        like: an output.
    """
    if mask is None or like.dim() < 3 or mask.dim() != 2:
        return None
    batch, sequence = like.shape[:2]
    if mask.shape[0] != batch or mask.shape[1] < sequence:
        return None
    return mask[:, mask.shape[1] - sequence :] != 0


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of one number a position over those that count."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over positions, in nats.

    T^2 keeps the derivatives' size whatever the temperature (Hinton et al., 1503.02531).

    Args:
        student, teacher: logits [..., classes].
        temperature: T.
        mask: positions that count, [...]; None for all.
    """
    p = F.log_softmax(teacher.float() / temperature, -1)
    q = F.log_softmax(student.float() / temperature, -1)
    divergence = (p.exp() * (p - q)).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def hard_loss(student: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy in nats, the mean over positions whose label is not ``IGNORED``.

    Raises:
        ModelError: labels of another shape than the logits without their last axis, or beyond the classes.
    """
    if labels.shape != student.shape[:-1]:
        raise ModelError(
            f"Labels of shape {list(labels.shape)} do not fit logits of shape {list(student.shape)}.",
            "Give one integer for each row of logits (and for each token, if there are tokens).",
        )
    counted = labels != IGNORED
    if bool(((labels < 0) | (labels >= student.shape[-1]))[counted].any()):
        raise ModelError(
            f"Labels reach from {int(labels[counted].min())} to {int(labels[counted].max())}, but there are "
            f"{student.shape[-1]} classes.",
            f"Labels count from 0; {IGNORED} is for what does not count.",
        )
    each = F.cross_entropy(
        student.float().flatten(0, -2), labels.long().flatten(), ignore_index=IGNORED, reduction="none"
    )
    return _mean(each.reshape(labels.shape), counted if mask is None else counted & mask)


def match_loss(student: Tensor, teacher: Tensor, distance: Distance, mask: Tensor | None = None) -> Tensor:
    """How far a value of the student is from the teacher's: 0 for equal ones, about 1 for unrelated ones.

    ``mse``: squared error over the teacher's square, over all positions; ``cosine``: 1 - cosine of each position's
    channels (the last axis; axis 1 of images), the mean over positions.
    """
    student, teacher = student.float(), teacher.float()
    axis = 1 if student.dim() > 3 else -1
    if distance == "cosine":
        return _mean(1 - F.cosine_similarity(student, teacher, dim=axis), mask)
    error, size = (student - teacher).square().sum(axis), teacher.square().sum(axis)
    if mask is not None:
        error, size = error[mask], size[mask]
    return error.sum() / size.sum().clamp(min=torch.finfo(torch.float32).tiny)
