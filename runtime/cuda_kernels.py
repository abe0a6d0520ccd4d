"""Which operators the CUDA provider has kernels for, as data, so that it can be planned for without a GPU.

Read off docs/OperatorKernels.md of onnxruntime (main, 2026), newest opset of each operator. What is not there runs on
the CPU, with copies around it.
"""

from __future__ import annotations

import onnx_ir as ir

_HALVES = frozenset([ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
_FLOAT_ONLY = frozenset([ir.DataType.FLOAT])
_FLOATING = frozenset([ir.DataType.FLOAT, ir.DataType.DOUBLE, *_HALVES])
_EIGHT = frozenset([ir.DataType.INT8, ir.DataType.UINT8])


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Kernels for float, double and float16 at least, and for the integers that the operator is used with.
_ONNX = _names("""
    Abs Add Affine And ArgMax ArgMin Attention AveragePool BatchNormalization Cast Ceil Clip Compress Concat
    ConcatFromSequence ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div Dropout
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity If
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    MatMul MatMulInteger Max MaxPool Min Mod Mul Neg NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear
    RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round ScaledTanh Scan Scatter ScatterElements
    ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape
    Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split
    Sqrt Squeeze Sub Sum Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where
    Xor
""")
_MICROSOFT = _names("""
    Attention BeamSearch BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BitmaskBiasDropout
    BitmaskDropout ComplexMul ComplexMulConj ConvTransposeWithDynamicPads DecoderAttention
    DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention DequantizeLinear DequantizeWithOrder
    DynamicTimeWarping EmbedLayerNormalization FastGelu FusedConv FusedMatMul GatedRelativePositionBias
    GatherBlockQuantized Gelu GemmFloat8 GemmaRotaryEmbedding GreedySearch GridSample GroupNorm
    GroupQueryAttention Inverse Irfft LongformerAttention MatMulBnb4 MatMulNBits MoE MultiHeadAttention
    NGramRepeatBlock NhwcConv PackedAttention PackedMultiHeadAttention PagedAttention QAttention QMoE
    QOrderedAttention QOrderedGelu QOrderedLayerNormalization QOrderedLongformerAttention QOrderedMatMul
    QuantizeLinear QuantizeWithOrder QuickGelu RelativePositionBias RemovePadding RestorePadding Rfft
    RotaryEmbedding Sampling SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization
    SparseAttention TransposeMatMul Trilu UnfoldTensor WhisperBeamSearch
""")
# (domain, operator) -> the only types of its first input.
_TYPES = {
    ("com.microsoft", "GroupQueryAttention"): _HALVES,
    ("com.microsoft", "SparseAttention"): _HALVES,
    ("com.microsoft", "PagedAttention"): _HALVES,
    ("com.microsoft", "QMoE"): _HALVES,
    ("com.microsoft", "FusedConv"): _FLOAT_ONLY,
    ("com.microsoft", "ConvTransposeWithDynamicPads"): _FLOAT_ONLY,
    ("com.microsoft", "QAttention"): frozenset([ir.DataType.INT8]),
    ("", "MatMulInteger"): frozenset([ir.DataType.INT8]),
    ("", "GridSample"): _FLOAT_ONLY,
    ("", "Relu"): _FLOATING,
    ("", "AveragePool"): _FLOATING,
    ("", "Conv"): _FLOATING,
    ("", "MatMul"): _FLOATING,
    ("", "Gemm"): _FLOATING,
    ("", "Softmax"): _FLOATING,
    ("", "ArgMax"): _FLOATING,
    ("", "Tile"): _FLOATING | {ir.DataType.INT32, ir.DataType.INT64},
    ("", "MaxPool"): _FLOATING | _EIGHT,
}


def has_cuda_kernel(node: ir.Node) -> bool:
    """Whether the CUDA provider runs ``node``; strings never, and types as far as the table knows them."""
    known = {"": _ONNX, "ai.onnx": _ONNX, "com.microsoft": _MICROSOFT}.get(node.domain, frozenset[str]())
    if node.op_type not in known:
        return False
    first = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    if first == ir.DataType.STRING:
        return False
    types = _TYPES.get((node.domain.removeprefix("ai.onnx"), node.op_type))
    return types is None or first is None or first in types
