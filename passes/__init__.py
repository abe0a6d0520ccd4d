"""The passes, one a file, and the table name -> class. Adding a pass is one line here."""

from __future__ import annotations

from ..compiler.base import Pass
from .cleanup import Cleanup
from .few_level_weights import FewLevelWeights
from .fold_constants import FoldConstants
from .fuse_attention import FuseAttention
from .fuse_gate_up import FuseGateUp
from .fuse_gelu import FuseGelu
from .fuse_group_query_attention import FuseGroupQueryAttention
from .fuse_linear import FuseLinear
from .fuse_normalization import FuseNormalization
from .fuse_qkv import FuseQKV
from .fuse_skip_normalization import FuseSkipNormalization
from .keep_last_logits import KeepLastLogits
from .mixed_precision import MixedPrecision
from .pack_qkv import PackQKV
from .quantize_kv_cache import QuantizeKVCache
from .quantize_weights import QuantizeWeights
from .simplify_shapes import SimplifyShapes
from .split_skip_normalization import SplitSkipNormalization
from .upgrade_opset import UpgradeOpset

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        Cleanup,
        FewLevelWeights,
        FoldConstants,
        FuseAttention,
        FuseGateUp,
        FuseGelu,
        FuseGroupQueryAttention,
        FuseLinear,
        FuseNormalization,
        FuseQKV,
        FuseSkipNormalization,
        KeepLastLogits,
        MixedPrecision,
        PackQKV,
        QuantizeKVCache,
        QuantizeWeights,
        SimplifyShapes,
        SplitSkipNormalization,
        UpgradeOpset,
    )
}

__all__ = ["PASSES", *sorted(kind.__name__ for kind in PASSES.values())]  # pyright: ignore[reportUnsupportedDunderAll]
