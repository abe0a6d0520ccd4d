"""Errors of onnxlathe. Each message says what went wrong, where, and what to do about it."""

from __future__ import annotations


class LatheError(Exception):
    """Root of every error that onnxlathe raises on purpose.

    Args:
        what: what went wrong and where (a sentence, without the remedy).
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what} {remedy}".strip())


class ExportError(LatheError):
    """A PyTorch module could not be exported, or the exported graph disagrees with it."""


class ModelError(LatheError):
    """An ONNX model, an artifact or the data given for it cannot be used."""


class PassError(LatheError):
    """A pass failed, is unknown, or got an option it does not take."""


class VerifyError(LatheError):
    """A rewritten graph is malformed, or computes something else than before."""


class PlanError(LatheError):
    """A memory plan or placement could not be made or does not hold."""


class RuntimeUnavailable(LatheError):
    """The device or execution provider asked for is not there."""
