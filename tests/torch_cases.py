"""The operators of the training table with inputs and attributes: one node a line, for test_torch_ops.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxlathe.compiler.graph import MICROSOFT

RNG = np.random.default_rng(0)
F4 = np.float32


@dataclasses.dataclass
class Case:
    """One node: its inputs (None: left out), attributes, domain, opset, and how many outputs it has."""

    op: str
    inputs: Sequence[Any]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    domain: str = ""
    opset: int = 23
    outputs: int = 1
    dtypes: tuple[str, ...] = ("float32",)
    skipped: tuple[int, ...] = ()
    """Outputs without a name."""

    def model(self, dtype: str, constants: bool = False) -> tuple[ir.Model, dict[str, np.ndarray]]:
        """The model of this node alone and its feeds; floats have ``dtype``."""
        feeds: dict[str, np.ndarray] = {}
        values: list[ir.Value | None] = []
        for number, item in enumerate(self.inputs):
            if item is None:
                values.append(None)
                continue
            array = np.asarray(item)
            array = array.astype(dtype) if array.dtype.kind == "f" else array
            name = f"x{number}"
            shape, kind = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
            values.append(ir.Value(name=name, shape=shape, type=kind))
            feeds[name] = array
        outputs = [ir.Value(name="" if n in self.skipped else f"y{n}") for n in range(self.outputs)]
        node = ir.node(self.op, values, attributes=self.attributes, domain=self.domain, outputs=outputs, name="node")
        named = [value for value in outputs if value.name]
        graph = ir.Graph(
            [value for value in values if value], named, nodes=[node], name="g", opset_imports={"": self.opset}
        )
        model = ir.Model(graph, ir_version=10)
        model.opset_imports[MICROSOFT] = 1
        if constants:
            for value in list(graph.inputs):
                value.const_value = ir.tensor(feeds[value.name or ""], name=value.name)
                graph.register_initializer(value)
            graph.inputs.clear()
        return model, feeds


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(F4)


def i8(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


ALL = ("float32", "float64", "float16")
X = f(2, 3, 4, 5)
UNARY = {
    "Abs": X, "Ceil": X, "Cos": X, "Erf": X, "Exp": X, "Floor": X, "HardSwish": 3 * X, "Log": np.abs(X) + 0.1, "Mish": X,
    "Neg": X, "Reciprocal": X + 5 * np.sign(X), "Relu": X, "Round": 4 * X, "Sigmoid": X, "Sign": X, "Sin": X,
    "Softplus": X, "Softsign": X, "Sqrt": np.abs(X), "Tanh": X, "Elu": X, "Selu": X, "HardSigmoid": 3 * X, "LeakyRelu": X,
    "Identity": X, "IsNaN": np.where(X > 0, np.nan, X),
}  # fmt: skip
HEADS = 4
q3, k3, v3 = f(2, 5, 32), f(2, 5, 32), f(2, 5, 32)
grouped = f(2, 6, (4 + 2 * 2) * 16)
cos, sin = (fn(np.arange(32)[:, None] * 0.3 ** np.arange(8)).astype(F4) for fn in (np.cos, np.sin))
int8 = RNG.integers(-128, 128, (6, 8)).astype(np.int8)
BOOL = RNG.random((2, 3, 4, 5)) > 0.5

CASES: list[Case] = [
    *[Case(op, [x], dtypes=ALL) for op, x in UNARY.items()],
    Case("Round", [np.array([0.5, 1.5, 2.5, -0.5], F4)]),
    Case("Elu", [X], {"alpha": 0.5}), Case("LeakyRelu", [X], {"alpha": 0.3}), Case("Selu", [X], {"alpha": 1.5, "gamma": 0.9}),
    Case("HardSigmoid", [X], {"alpha": 0.3, "beta": 0.4}),
    Case("Not", [BOOL]),
    *[Case(op, [X, f(4, 1)], dtypes=ALL) for op in ("Add", "Sub", "Mul")],
    *[Case(op, [X, f(4, 1)]) for op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")],
    *[Case(op, [BOOL, BOOL[:1]]) for op in ("And", "Or", "Xor")],
    Case("Equal", [i8(1, 2, 3), i8(1, 5, 3)]),
    Case("Div", [X, X + 5], dtypes=ALL), Case("Div", [i8(7, -7, 6), i8(2, 2, -4)]),
    Case("Mod", [i8(7, -7, 6), i8(3, 3, -4)]), Case("Mod", [X, X + 5], {"fmod": 1}),
    Case("Pow", [np.abs(X), np.array(2.5, F4)]), Case("Pow", [X, i8(2)], opset=15), Case("Pow", [i8(2, 3), i8(3, 2)]),
    *[Case(op, [X, f(4, 1), f(5)], dtypes=ALL[:2]) for op in ("Max", "Min", "Sum", "Mean")],
    Case("Where", [BOOL, X, f(5)], dtypes=ALL),
    Case("Clip", [X, np.array(-0.5, F4), np.array(0.5, F4)], dtypes=ALL), Case("Clip", [X, None, np.array(0.1, F4)]),
    Case("Clip", [X], {"min": -0.2, "max": 0.3}, opset=9), Case("Clip", [i8(1, 9, -3), np.array(0), np.array(5)]),
    *[Case("Cast", [3 * X], {"to": int(to)}) for to in (ir.DataType.INT64, ir.DataType.FLOAT16, ir.DataType.BOOL)],
    Case("Cast", [i8(0, 3)], {"to": 1}), Case("CastLike", [X, i8(1)]),
    Case("Dropout", [X]),
    Case("PRelu", [X, np.abs(f(3, 1, 1))]),
    Case("Gelu", [X], dtypes=ALL[:2]), Case("Gelu", [X], {"approximate": "tanh"}), Case("Gelu", [X], domain=MICROSOFT),
    Case("BiasGelu", [X, f(5)], domain=MICROSOFT), Case("FastGelu", [X, f(5)], domain=MICROSOFT),
    Case("FastGelu", [X], domain=MICROSOFT), Case("QuickGelu", [X], {"alpha": 1.0}, MICROSOFT), Case("QuickGelu", [X], domain=MICROSOFT),
    *[Case(op, [X], {"axis": 1}, opset=o) for op in ("Softmax", "LogSoftmax") for o in (11, 13)],
    Case("Softmax", [X], dtypes=ALL), Case("Softmax", [X], opset=11), Case("LogSoftmax", [X]),
    Case("Softmax", [np.where(np.arange(4)[:, None] == 1, -np.inf, f(4, 5)).astype(F4)]),
    *[Case(op, [X], {"axis": 2, "keepdims": keep}) for op in ("ArgMax", "ArgMin") for keep in (0, 1)],
    Case("CumSum", [X, i8(1)]), Case("CumSum", [X, np.array(-1)], {"reverse": 1, "exclusive": 1}),
    *[
        Case(op, [np.abs(X), i8(1, -1)], {"keepdims": keep})
        for keep in (0, 1)
        for op in ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare")
    ],
    Case("ReduceMean", [X], {"axes": [1]}, opset=13), Case("ReduceSum", [X]), Case("ReduceSum", [X, i8()], {"noop_with_empty_axes": 1}),
    Case("ReduceSum", [np.arange(6, dtype=np.int32)]), Case("ReduceMean", [X, i8(-1)], dtypes=ALL),
    # shapes
    Case("Shape", [X]), Case("Shape", [X], {"start": 1, "end": -1}), Case("Size", [X]),
    Case("Reshape", [X, i8(0, -1, 5)]), Case("Reshape", [f(0, 3), i8(3, 0)], {"allowzero": 1}),
    Case("Flatten", [X]), Case("Flatten", [X], {"axis": -1}), Case("Flatten", [X], {"axis": 0}),
    Case("Squeeze", [f(1, 3, 1), i8(0)]), Case("Squeeze", [f(1, 3, 1)]), Case("Squeeze", [f(1, 3, 1)], {"axes": [2]}, opset=11),
    Case("Unsqueeze", [X, i8(-1, 1)]), Case("Unsqueeze", [X], {"axes": [0, 2]}, opset=11),
    Case("Transpose", [X], {"perm": [0, 2, 3, 1]}), Case("Transpose", [X]),
    Case("Concat", [X, X[:, :1]], {"axis": 1}), Case("Concat", [X, X], {"axis": -1}),
    Case("Split", [X, i8(1, 3)], {"axis": 2}, outputs=2), Case("Split", [X], {"axis": 3, "num_outputs": 2}, outputs=2),
    Case("Split", [X], {"axis": 2, "split": [3, 1]}, opset=11, outputs=2), Case("Split", [X], {"axis": 2}, opset=11, outputs=2),
    Case("Slice", [X, i8(1, -3), i8(100, -1), i8(2, 3)]), Case("Slice", [X, i8(-1), i8(-100), i8(3), i8(-2)]),
    Case("Slice", [X], {"starts": [1], "ends": [3], "axes": [2]}, opset=9), Case("Slice", [X, i8(0, 1), i8(1, 3)]),
    Case("Slice", [X, i8(3), i8(1), i8(2)]), Case("Slice", [X, i8(10), i8(0), i8(3), i8(-1)]), Case("Slice", [X, i8(0), i8(5), i8(3), i8(2)]),
    Case("Gather", [X, i8(0, -1)], {"axis": 1}), Case("Gather", [X, np.array([[0, 1], [1, 0]], np.int32)]), Case("Gather", [i8(4, 5, 6), np.array(-1)]),
    Case("GatherElements", [X, RNG.integers(-4, 4, (2, 3, 2, 5))], {"axis": 2}),
    Case("GatherND", [X, RNG.integers(-2, 2, (6, 2))]), Case("GatherND", [X, RNG.integers(-3, 3, (2, 4, 1))], {"batch_dims": 1}),
    Case("Expand", [f(3, 1), i8(2, 1, 4)]), Case("Expand", [X, i8(1)]), Case("Tile", [f(2, 3), i8(2, 1)]),
    Case("ConstantOfShape", [i8(2, 3)]), Case("ConstantOfShape", [i8(2)], {"value": ir.tensor(np.array([7]))}),
    Case("Range", [np.array(1), np.array(9), np.array(3)]), Case("Range", [np.array(5.0, F4), np.array(0, F4), np.array(-1.5, F4)]),
    Case("Trilu", [X, np.array(1)]), Case("Trilu", [X], {"upper": 0}),
    Case("TopK", [np.round(X), i8(3)], outputs=2), Case("TopK", [np.round(X), i8(2)], {"largest": 0, "axis": 1}, outputs=2),
    Case("Einsum", [f(2, 3, 4), f(2, 4, 5)], {"equation": "bij,bjk->bik"}),
    Case("Pad", [X, i8(0, 1, 0, 2, 0, 0, 3, 0), np.array(2.0, F4)]), Case("Pad", [X, i8(1, 2), None, i8(-1)]),
    Case("Pad", [X], {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 1.5}, opset=10), Case("Pad", [X, i8(0, 0, -1, 0, 0, 0, 0, 1)]),
    # layers
    Case("MatMul", [X, f(5, 6)], dtypes=ALL), Case("MatMul", [f(5), f(5, 2)]), Case("MatMul", [f(2, 1, 3, 5), f(4, 5, 2)]),
    Case("FusedMatMul", [X, f(2, 3, 6, 5)], {"transB": 1, "alpha": 0.5}, MICROSOFT), Case("FusedMatMul", [f(4, 3), f(4, 2)], {"transA": 1}, MICROSOFT),
    Case("Gemm", [f(3, 4), f(4, 5), f(5)], dtypes=ALL), Case("Gemm", [f(4, 3), f(5, 4), f(3, 1)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [f(3, 4), f(4, 5)]), Case("Gemm", [f(3, 4), f(4, 5), f(1, 5)], opset=7),
    Case("Conv", [f(2, 4, 9, 8), f(6, 4, 3, 3), f(6)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    Case("Conv", [f(2, 4, 9, 8), f(6, 2, 3, 2)], {"group": 2, "dilations": [2, 1]}), Case("Conv", [f(1, 4, 9), f(3, 4, 4)], {"auto_pad": "SAME_UPPER", "strides": [2]}),
    Case("Conv", [f(1, 2, 9, 7), f(3, 2, 4, 2)], {"auto_pad": "SAME_LOWER"}), Case("Conv", [f(1, 2, 9, 7), f(3, 2, 4, 2)], {"auto_pad": "VALID"}),
    Case("Conv", [f(1, 2, 5, 5, 5), f(3, 2, 3, 3, 3)]),
    Case("ConvTranspose", [f(2, 4, 5, 6), f(4, 3, 3, 3), f(3)], {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
    Case("ConvTranspose", [f(2, 4, 6), f(4, 3, 3)], {"group": 2}),
    Case("MaxPool", [f(2, 3, 9, 8)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", [-np.abs(f(2, 3, 9))], {"kernel_shape": [3], "auto_pad": "SAME_UPPER", "strides": [2]}), Case("MaxPool", [f(2, 3, 9)], {"kernel_shape": [3], "strides": [2], "ceil_mode": 1, "dilations": [2]}),
    Case("AveragePool", [f(2, 3, 9, 8)], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    Case("AveragePool", [f(2, 3, 9, 8)], {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    Case("GlobalAveragePool", [X]), Case("GlobalMaxPool", [X]),
    Case("BatchNormalization", [X, f(3), f(3), f(3), np.abs(f(3)) + 0.1], {"epsilon": 1e-3}, dtypes=ALL[:2]),
    Case("InstanceNormalization", [X, f(3), f(3)]),
    Case("GroupNormalization", [f(2, 6, 4), f(6), f(6)], {"num_groups": 3}), Case("GroupNormalization", [f(2, 6, 4), f(3), f(3)], {"num_groups": 3}, opset=18),
    Case("LayerNormalization", [X, f(5), f(5)], dtypes=ALL[:2]), Case("LayerNormalization", [X, f(4, 5)], {"axis": 2, "epsilon": 1e-3}), Case("LayerNormalization", [X, f(1, 5), f(5)]),
    Case("RMSNormalization", [X, f(5)], {"epsilon": 1e-2}), Case("SimplifiedLayerNormalization", [X, f(5)], {"epsilon": 1e-2}, opset=22),
    Case("SkipLayerNormalization", [f(2, 3, 8), f(2, 3, 8), f(8), f(8), f(8)], {"epsilon": 1e-3}, MICROSOFT, outputs=4, skipped=(1, 2)), Case("SkipLayerNormalization", [f(2, 3, 8), f(2, 3, 8), f(8)], domain=MICROSOFT),
    Case("SkipSimplifiedLayerNormalization", [f(2, 3, 8), f(2, 3, 8), f(8), f(8)], {"epsilon": 1e-3}, MICROSOFT, outputs=4, skipped=(1, 2)), Case("SkipSimplifiedLayerNormalization", [f(2, 3, 8), f(2, 3, 8), f(8)], domain=MICROSOFT),
    # attention
    Case("MultiHeadAttention", [q3, k3, v3, f(96)], {"num_heads": HEADS}, MICROSOFT), Case("MultiHeadAttention", [q3, k3, v3], {"num_heads": HEADS, "scale": 0.2}, MICROSOFT),
    Case("MultiHeadAttention", [q3, k3, v3, None, np.array([[1, 1, 1, 0, 0], [1] * 5], np.int32)], {"num_heads": HEADS}, MICROSOFT),
    Case("MultiHeadAttention", [q3, k3, v3, f(96), None, f(2, 1, 5, 5)], {"num_heads": HEADS}, MICROSOFT), Case("MultiHeadAttention", [q3, k3, v3], {"num_heads": HEADS, "unidirectional": 1}, MICROSOFT),
    Case("MultiHeadAttention", [q3, f(2, HEADS, 7, 8), f(2, HEADS, 7, 8)], {"num_heads": HEADS}, MICROSOFT), Case("MultiHeadAttention", [q3, f(2, 7, 32), f(2, 7, 16)], {"num_heads": HEADS}, MICROSOFT),
    Case("Attention", [q3, k3, v3], {"q_num_heads": 4, "kv_num_heads": 4}), Case("Attention", [q3, f(2, 7, 16), f(2, 7, 16), f(2, 1, 5, 7)], {"q_num_heads": 4, "kv_num_heads": 2, "scale": 0.3}),
    Case("Attention", [f(2, 4, 5, 8), f(2, 2, 5, 8), f(2, 2, 5, 8)], {"is_causal": 1}), Case("Attention", [f(2, 4, 5, 8), f(2, 4, 7, 8), f(2, 4, 7, 8), np.tri(5, 7, 2) > 0]),
    Case("Attention", [f(2, 4, 5, 8), f(2, 4, 5, 8), f(2, 4, 5, 8), None, f(2, 4, 3, 8), f(2, 4, 3, 8)], {"is_causal": 1}, outputs=3, opset=24),
    Case("Attention", [f(2, 4, 5, 8), f(2, 4, 5, 8), f(2, 4, 5, 8)], {"softcap": 2.0}),
    Case("RotaryEmbedding", [f(2, 4, 6, 16), cos, sin, RNG.integers(0, 32, (2, 6))]), Case("RotaryEmbedding", [f(2, 6, 64), cos, sin, RNG.integers(0, 32, (2, 6))], {"num_heads": 4, "interleaved": 1}),
    Case("RotaryEmbedding", [f(2, 4, 6, 16), np.stack([cos[:6]] * 2), np.stack([sin[:6]] * 2)]), Case("RotaryEmbedding", [f(2, 4, 6, 24), cos, sin, RNG.integers(0, 32, (2, 6))], {"rotary_embedding_dim": 16}),
    Case("RotaryEmbedding", [f(2, 4, 6, 16), RNG.integers(0, 32, (2, 6)), cos, sin], domain=MICROSOFT), Case("RotaryEmbedding", [f(2, 6, 64), i8(3), cos, sin], {"interleaved": 1}, MICROSOFT),
    Case("GroupQueryAttention", [grouped, None, None, f(2, 2, 0, 16), f(2, 2, 0, 16), np.array([5, 5], np.int32), np.array(6, np.int32), cos, sin], {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1}, MICROSOFT, outputs=3),
    Case("GroupQueryAttention", [f(2, 6, 64), f(2, 6, 32), f(2, 6, 32), f(2, 2, 0, 16), f(2, 2, 0, 16), np.array([5, 5], np.int32), np.array(6, np.int32)], {"num_heads": 4, "kv_num_heads": 2, "local_window_size": 3, "scale": 0.3}, MICROSOFT, outputs=3),
    Case("GroupQueryAttention", [grouped[:1, :3], None, None, f(1, 2, 4, 16), f(1, 2, 4, 16), np.array([6], np.int32), np.array(7, np.int32), cos, sin], {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "rotary_interleaved": 1}, MICROSOFT, outputs=3),
    Case("GroupQueryAttention", [grouped[:, :1], None, None, f(2, 2, 4, 16), f(2, 2, 4, 16), np.array([4, 4], np.int32), np.array(5, np.int32), cos, sin], {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "softcap": 3.0}, MICROSOFT, outputs=3),
    # quantization
    Case("QuantizeLinear", [4 * X, np.array(0.02, F4), np.array(120, np.uint8)]), Case("QuantizeLinear", [X, np.abs(f(3)) + 0.01, np.zeros(3, np.int8)], {"axis": 1}), Case("QuantizeLinear", [X, np.array(0.02, F4)]),
    Case("QuantizeLinear", [X, np.array(0.001, F4), np.array(300, np.uint16)], domain=MICROSOFT), Case("QuantizeLinear", [f(4, 8), np.abs(f(2, 8)) + 0.1, np.zeros((2, 8), np.int8)], {"axis": 0, "block_size": 2}),
    Case("DequantizeLinear", [int8, np.array(0.02, F4), np.array(3, np.int8)]), Case("DequantizeLinear", [int8, np.abs(f(6)), RNG.integers(-9, 9, 6).astype(np.int8)], {"axis": 0}),
    Case("DequantizeLinear", [int8, np.abs(f(6, 2)), np.ones((6, 2), np.int8)], {"axis": 1, "block_size": 4}), Case("DequantizeLinear", [int8, np.array(0.1, F4)], domain=MICROSOFT),
    Case("DequantizeLinear", [int8.astype(np.int32), np.array(0.1, F4)]),
]  # fmt: skip
