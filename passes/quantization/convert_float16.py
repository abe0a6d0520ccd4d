"""float32 to float16 (or bfloat16) where that is safe: for CUDA, never a gain on the CPU."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ...compiler.base import Claim, Outcome, Pass, PassContext
from ...compiler.graph import (
    FROM_KEY,
    MICROSOFT,
    PASS_KEY,
    Names,
    add_initializer,
    constant,
    make_node,
    qualified_op,
    remove_dead,
)
from ...runtime.calibrate import observe
from ...runtime.ranges import MinMax
from .quantization_plan import Filter, matches

_LARGEST = 65504.0  # of float16
_RULE = "float32 -> half"
# Operators whose CUDA kernels take float16 and add up in float32. What is not here stays float32: sums and means over
# long axes, powers, exponentials and logarithms written out, positions and angles, random numbers, resizing.
_STANDARD = (
    "MatMul Gemm Conv ConvTranspose Add Sub Mul Div Neg Abs Relu LeakyRelu Clip Gelu Sigmoid Tanh Erf Sqrt Softmax "
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization InstanceNormalization GroupNormalization "
    "Attention RotaryEmbedding MaxPool AveragePool GlobalAveragePool Transpose Reshape Squeeze Unsqueeze Flatten "
    "Concat Split Slice Gather Expand Where Pad Identity"
)
_CONTRIB = (
    "MultiHeadAttention GroupQueryAttention RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization "
    "Gelu FastGelu QuickGelu BiasGelu FusedMatMul"
)
_HALF = {*_STANDARD.split(), *(f"{MICROSOFT}.{op}" for op in _CONTRIB.split())}
# Where an additive mask goes in: what is below float16's range becomes its lowest number, which masks as well.
_MASKS = {"com.microsoft.MultiHeadAttention": 5, "Attention": 3, "com.microsoft.GroupQueryAttention": 10}


@dataclasses.dataclass(frozen=True)
class ConvertFloat16(Pass):
    """Converts weights and computation to half precision; inputs and outputs of the model stay as they are.

    1. Operators with half-precision kernels that add up in float32 are converted; a Cast stands where the types meet.
    2. All others stay float32 (the list is in the source), and so does what ``keep`` names.
    3. Around a value beyond 65504 on the calibration samples, and at a weight beyond it, nodes stay float32, so that
       no infinity or NaN appears. Additive masks are clipped to the range instead. bfloat16 has float32's range.

    Nodes in subgraphs stay float32. Pays on CUDA. The CPU provider computes MatMul, Gemm and attention in float32 and
    would cast around each: there it is smaller, never faster, and the pass says so.

    Attributes:
        dtype: ``float16`` or ``bfloat16`` (CUDA only: the CPU provider has no kernels, so ``verify=False`` is needed).
        keep: operator types, name globs or callables that stay float32.
    """

    name: ClassVar[str] = "convert-float16"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    dtype: Literal["float16", "bfloat16"] = "float16"
    keep: tuple[Filter, ...] = ()

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        chosen = [node for node in model.graph if self._can(node, outcome)]
        large = self._too_large(model, chosen, context, outcome)
        chosen = [node for node in chosen if not self._overflows(node, large, outcome)]
        if not any(value.dtype == ir.DataType.FLOAT for node in chosen for value in node.outputs):
            outcome.notes.clear()
            return outcome
        if context.device == "cpu":
            outcome.notes.append("the CPU provider computes in float32 and casts around it: smaller, never faster")
        _Converter(self, model, chosen).run()
        for node in chosen:
            outcome.counts[f"{qualified_op(node)} in {self.dtype}"] += 1
        return outcome

    def _can(self, node: ir.Node, outcome: Outcome) -> bool:
        if not any(value is not None and value.dtype == ir.DataType.FLOAT for value in (*node.inputs, *node.outputs)):
            return False
        if qualified_op(node) not in _HALF:
            outcome.refuse(node, _RULE, f"{node.op_type} is kept in float32 for accuracy, or has no half kernel")
            return False
        if any(value is not None and value.name and value.dtype is None for value in (*node.inputs, *node.outputs)):
            outcome.refuse(node, _RULE, "the types of its operands or results are not known")
            return False
        if matches(node, self.keep):
            outcome.refuse(node, _RULE, "kept in float32 by the option keep")
            return False
        return True

    def _too_large(
        self, model: ir.Model, chosen: list[ir.Node], context: PassContext, outcome: Outcome
    ) -> set[ir.Value]:
        """Values beyond float16's range on the samples, and constants beyond it."""
        if self.dtype == "bfloat16":
            return set()
        values = {
            value
            for node in chosen
            for value in (*node.inputs, *node.outputs)
            if value is not None and value.dtype == ir.DataType.FLOAT
        }
        large: set[ir.Value] = set()
        for value in values:
            array = constant(value)
            if array is not None and np.abs(array[np.isfinite(array)]).max(initial=0.0) > _LARGEST:
                large.add(value)
        computed = {value.name or "": value for value in values if not value.is_initializer()}
        if context.feeds == ():
            outcome.notes.append("no calibration samples: whether activations stay within 65504 was not checked")
            return large
        seen = {name: MinMax() for name in computed}
        observe(model, seen, context.feeds, threads=context.threads, progress=context.progress)
        large |= {computed[name] for name, item in seen.items() if max(-item.low, item.high) > _LARGEST}
        return large

    def _overflows(self, node: ir.Node, large: set[ir.Value], outcome: Outcome) -> bool:
        mask = _MASKS.get(qualified_op(node))
        read = [value for index, value in enumerate(node.inputs) if index != mask]
        found = [value for value in (*read, *node.outputs) if value in large]
        if found:
            outcome.refuse(node, _RULE, f"{found[0].name} goes beyond 65504, the largest float16 number")
        return bool(found)


class _Converter:
    def __init__(self, step: ConvertFloat16, model: ir.Model, chosen: list[ir.Node]) -> None:
        self.step, self.model, self.graph = step, model, model.graph
        self.names = Names(model)
        self.nodes = set(chosen)
        self.half = ir.DataType.FLOAT16 if step.dtype == "float16" else ir.DataType.BFLOAT16
        self.numpy = np.dtype(np.float16) if step.dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
        self.made: dict[tuple[ir.Value, bool], ir.Value] = {}

    def run(self) -> None:
        nodes = [node for node in self.graph if node in self.nodes]
        for node in nodes:
            mask = _MASKS.get(qualified_op(node))
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == ir.DataType.FLOAT and value.producer() not in self.nodes:
                    node.replace_input_with(index, self._to_half(value, index == mask))
            node.metadata_props[PASS_KEY] = self.step.name
            node.metadata_props.setdefault(FROM_KEY, f"{node.op_type}:{node.name}")
        for node in nodes:
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT:
                    self._output(value, node)
        remove_dead(self.model)

    def _to_half(self, value: ir.Value, mask: bool) -> ir.Value:
        if (value, mask) in self.made:
            return self.made[value, mask]
        array = constant(value)
        if array is not None:
            if mask and self.half == ir.DataType.FLOAT16:
                array = np.clip(array, -_LARGEST, _LARGEST)
            result = add_initializer(self.graph, self.names, f"{value.name}_half", array.astype(self.numpy))
        else:
            result = self._cast(value, mask)
        self.made[value, mask] = result
        return result

    def _cast(self, value: ir.Value, mask: bool) -> ir.Value:
        new: list[ir.Node] = []
        source = value
        if mask and self.half == ir.DataType.FLOAT16:
            limits = [
                add_initializer(self.graph, self.names, f"{value.name}_{name}", np.array(limit, np.float32))
                for name, limit in (("lowest", -_LARGEST), ("highest", _LARGEST))
            ]
            name = self.names.fresh(f"{value.name}/clip")
            new.append(make_node("Clip", [value, *limits], name=name, output=f"{name}_out", like=value))
            source = new[-1].outputs[0]
        name = self.names.fresh(f"{value.name}/half")
        attributes = {"to": int(self.half)}
        output = self.names.fresh(f"{value.name}_half")
        new.append(
            make_node("Cast", [source], name=name, output=output, like=value, dtype=self.half, attributes=attributes)
        )
        self._place(value.producer(), new)
        return new[-1].outputs[0]

    def _output(self, value: ir.Value, node: ir.Node) -> None:
        """The output becomes half; readers that stay float32, and the model's output, get it cast back."""
        others = [use for use in value.uses() if use.node not in self.nodes]
        needed = bool(others) or value.is_graph_output()
        value.type = ir.TensorType(self.half)
        if not needed:
            return
        name = self.names.fresh(f"{value.name}/float")
        attributes = {"to": int(ir.DataType.FLOAT)}
        output = self.names.fresh(f"{value.name}_float")
        cast = make_node(
            "Cast", [value], name=name, output=output, like=value, dtype=ir.DataType.FLOAT, attributes=attributes
        )
        restored = cast.outputs[0]
        for use in others:
            use.node.replace_input_with(use.idx, restored)
        self._place(node, [cast])
        if value.is_graph_output():
            graph_outputs = self.graph.outputs
            for index, output_value in enumerate(graph_outputs):
                if output_value is value:
                    graph_outputs[index] = restored
            value.name, restored.name = restored.name, value.name

    def _place(self, maker: ir.Node | None, new: list[ir.Node]) -> None:
        for node in new:
            node.metadata_props[PASS_KEY] = self.step.name
        if maker is not None and maker.graph is self.graph:
            self.graph.insert_after(maker, new)
        else:
            self.graph.insert_before(self.graph[0], new)
