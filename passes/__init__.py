"""The passes, one a file, and the table name -> class. Adding a pass is one line here."""

from __future__ import annotations

from ..compiler.base import Pass
from .cleanup import Cleanup

PASSES: dict[str, type[Pass]] = {kind.name: kind for kind in (Cleanup,)}

__all__ = ["PASSES", "Cleanup"]
