"""The passes, one a file, and the table name -> class. Adding a pass is one line here."""

from __future__ import annotations

from ..compiler.base import Pass
from .cleanup import Cleanup
from .fold_constants import FoldConstants
from .fuse_attention import FuseAttention
from .fuse_qkv import FuseQKV
from .simplify_shapes import SimplifyShapes
from .upgrade_opset import UpgradeOpset

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        Cleanup,
        FoldConstants,
        FuseAttention,
        FuseQKV,
        SimplifyShapes,
        UpgradeOpset,
    )
}

__all__ = ["PASSES", "Cleanup", "FoldConstants", "FuseAttention", "FuseQKV", "SimplifyShapes", "UpgradeOpset"]
