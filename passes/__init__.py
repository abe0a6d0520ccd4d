"""The passes, one a file, and the table name -> class. Adding a pass is one line here."""

from __future__ import annotations

from ..compiler.base import Pass
from .cleanup import Cleanup
from .fold_constants import FoldConstants
from .fuse_attention import FuseAttention
from .fuse_gelu import FuseGelu
from .fuse_linear import FuseLinear
from .fuse_normalization import FuseNormalization
from .fuse_qkv import FuseQKV
from .fuse_skip_normalization import FuseSkipNormalization
from .plan_memory import PlanMemory
from .simplify_shapes import SimplifyShapes
from .split_skip_normalization import SplitSkipNormalization
from .tile_patches import TilePatches
from .upgrade_opset import UpgradeOpset

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        Cleanup,
        FoldConstants,
        FuseAttention,
        FuseGelu,
        FuseLinear,
        FuseNormalization,
        FuseQKV,
        FuseSkipNormalization,
        PlanMemory,
        SimplifyShapes,
        SplitSkipNormalization,
        TilePatches,
        UpgradeOpset,
    )
}

__all__ = ["PASSES", *sorted(kind.__name__ for kind in PASSES.values())]  # pyright: ignore[reportUnsupportedDunderAll]
