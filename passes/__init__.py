"""The passes, one a file, and the table name -> class. Adding a pass is one line here."""

from __future__ import annotations

from ..compiler.base import Pass
from .adaround import AdaRound
from .cleanup import Cleanup
from .clip_outliers import ClipOutliers
from .convert_float16 import ConvertFloat16
from .correct_bias import CorrectBias
from .distill import Distill
from .equalize_layers import EqualizeLayers
from .few_level_weights import FewLevelWeights
from .fold_constants import FoldConstants
from .fuse_attention import FuseAttention
from .fuse_conv import FuseConv
from .fuse_gate_up import FuseGateUp
from .fuse_gelu import FuseGelu
from .fuse_group_query_attention import FuseGroupQueryAttention
from .fuse_integer_product import FuseIntegerProduct
from .fuse_linear import FuseLinear
from .fuse_normalization import FuseNormalization
from .fuse_qkv import FuseQKV
from .fuse_rotary import FuseRotary
from .fuse_skip_normalization import FuseSkipNormalization
from .keep_last_logits import KeepLastLogits
from .mixed_precision import MixedPrecision
from .pack_qkv import PackQKV
from .partition.partition_devices import PartitionDevices
from .partition.partition_stages import PartitionStages
from .partition.partition_tensor import PartitionTensor
from .plan_memory import PlanMemory
from .pruning.prune_adaptive import PruneAdaptive
from .pruning.prune_depth import PruneDepth
from .pruning.prune_sparse import PruneSparse
from .pruning.prune_width import PruneWidth
from .quantize_dynamic import QuantizeDynamic
from .quantize_kv_cache import QuantizeKVCache
from .quantize_progressive import QuantizeProgressive
from .quantize_static import QuantizeStatic
from .quantize_weights import QuantizeWeights
from .simplify_shapes import SimplifyShapes
from .smooth_quant import SmoothQuant
from .split_skip_normalization import SplitSkipNormalization
from .tile_patches import TilePatches
from .upgrade_opset import UpgradeOpset

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        AdaRound,
        Cleanup,
        ClipOutliers,
        ConvertFloat16,
        CorrectBias,
        Distill,
        EqualizeLayers,
        FewLevelWeights,
        FoldConstants,
        FuseAttention,
        FuseGateUp,
        FuseConv,
        FuseGelu,
        FuseGroupQueryAttention,
        FuseIntegerProduct,
        FuseLinear,
        FuseNormalization,
        FuseQKV,
        FuseRotary,
        FuseSkipNormalization,
        KeepLastLogits,
        MixedPrecision,
        PackQKV,
        PartitionDevices,
        PartitionStages,
        PartitionTensor,
        QuantizeDynamic,
        QuantizeProgressive,
        QuantizeStatic,
        PlanMemory,
        PruneAdaptive,
        PruneDepth,
        PruneWidth,
        PruneSparse,
        QuantizeKVCache,
        QuantizeWeights,
        SimplifyShapes,
        SmoothQuant,
        SplitSkipNormalization,
        TilePatches,
        UpgradeOpset,
    )
}

__all__ = ["PASSES", *sorted(kind.__name__ for kind in PASSES.values())]  # pyright: ignore[reportUnsupportedDunderAll]
