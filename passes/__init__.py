"""The passes, one a file, and the table name -> class. Adding a pass is one line here."""

from __future__ import annotations

from ..compiler.base import Pass
from .attention.fuse_attention import FuseAttention
from .attention.fuse_group_query_attention import FuseGroupQueryAttention
from .attention.fuse_rotary import FuseRotary
from .attention.keep_last_logits import KeepLastLogits
from .distill import Distill
from .fusion.fuse_conv import FuseConv
from .fusion.fuse_gate_up import FuseGateUp
from .fusion.fuse_gelu import FuseGelu
from .fusion.fuse_integer_product import FuseIntegerProduct
from .fusion.fuse_linear import FuseLinear
from .fusion.fuse_normalization import FuseNormalization
from .fusion.fuse_qkv import FuseQKV
from .fusion.fuse_skip_normalization import FuseSkipNormalization
from .fusion.pack_qkv import PackQKV
from .fusion.split_skip_normalization import SplitSkipNormalization
from .low_bit.few_level_weights import FewLevelWeights
from .low_bit.mixed_precision import MixedPrecision
from .low_bit.quantize_weights import QuantizeWeights
from .memory.chain_variadic import ChainVariadic
from .memory.plan_memory import PlanMemory
from .memory.tile_patches import TilePatches
from .partition.partition_devices import PartitionDevices
from .partition.partition_stages import PartitionStages
from .partition.partition_tensor import PartitionTensor
from .pruning.prune_adaptive import PruneAdaptive
from .pruning.prune_depth import PruneDepth
from .pruning.prune_sparse import PruneSparse
from .pruning.prune_width import PruneWidth
from .quantization.adaround import AdaRound
from .quantization.clip_outliers import ClipOutliers
from .quantization.convert_float16 import ConvertFloat16
from .quantization.correct_bias import CorrectBias
from .quantization.equalize_layers import EqualizeLayers
from .quantization.quantize_dynamic import QuantizeDynamic
from .quantization.quantize_kv_cache import QuantizeKVCache
from .quantization.quantize_progressive import QuantizeProgressive
from .quantization.quantize_static import QuantizeStatic
from .quantization.smooth_quant import SmoothQuant
from .simplify.cleanup import Cleanup
from .simplify.fold_constants import FoldConstants
from .simplify.simplify_shapes import SimplifyShapes
from .simplify.upgrade_opset import UpgradeOpset

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        AdaRound,
        ChainVariadic,
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
