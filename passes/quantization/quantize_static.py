"""Static quantization: scales of activations from calibration, QuantizeLinear / DequantizeLinear where they pay."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import onnx_ir as ir

from ...compiler.base import Claim, Outcome, Pass, PassContext
from ...compiler.budget import Budget
from ...compiler.graph import opset
from ...runtime.calibrate import collect_ranges
from ...runtime.errors import PassError
from ...runtime.quantization import QuantSpec, QuantType
from ...runtime.quantization_support import has_vnni
from ...runtime.ranges import RangeMethod, TensorRange
from ..simplify.upgrade_opset import UpgradeOpset
from .heal import heal
from .quantization_plan import ANCHORS, Filter, PlanOptions, QuantPlan, make_plan
from .quantize_insert import insert
from .quantize_tables import quantize_tables
from .sixteen_bit import widen


@dataclasses.dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Quantizes weights and activations with scales from calibration, where ONNX Runtime has integer kernels.

    1. ``MatMul(x, W)`` -> ``MatMul(DQ(Q(x)), DQ(W8))``, which ONNX Runtime runs as MatMulIntegerToFloat; the result
       stays float unless something quantized reads it. Gemm and Conv likewise (QGemm, QLinearConv), the bias as int32.
    2. Add, Mul, Concat, pooling, Sigmoid, LeakyRelu and Where run on integers where all their inputs do anyway and
       something quantized reads them. Data movement between two of them shares one scale.
    3. Relu, or Clip from 0 on, in front of QuantizeLinear goes: the quantized range starts at zero and clips by itself
       (for int8 too, where ONNX Runtime does not do it).
    4. ``MatMul + b`` in 2-D becomes Gemm with an int32 bias; with static 3-D shapes b gets the shape [1, 1, N]. Written
       otherwise, ONNX Runtime would fuse a float Gemm first and dequantize the weights in every run.
    5. Float tables that Gather reads: see ``quantize_tables.py``.

    Normalization, Gelu, Softmax, attention and all else stay float: there Q and DQ would be pure overhead
    (``runtime/quantization_support.py``, held against ONNX Runtime's own graphs by a test). Refused: what an integer
    kernel does not take, weights with NaN, nodes in subgraphs (their values cannot be calibrated), quantized models.

    Pays on the CPU provider; the CUDA provider has no int8 kernels for it. x86 CPUs without VNNI lose one bit of the
    weights (``reduced``) so that their 16-bit sums do not saturate. 16-bit activations are for accuracy, never speed.

    Attributes:
        activation: type of activations; int8 has no fast kernel on x86 without VNNI.
        weight: type of weights.
        per_channel: one scale for each output channel.
        symmetric: zero in the middle of the range of activations.
        ranges: how the range is chosen (``runtime/ranges.py``).
        percentile: percent of values kept by ``ranges="percentile"``.
        reduced: 7-bit weights; None: where the CPU needs it.
        products: also products of two activations, i.e. attention that is written out.
        embeddings: also the tables that Gather reads.
        include: only nodes of these operator types, name globs or callables; empty: all.
        exclude: none of these.
        sixteen_bit: nodes whose activations get 16 bits, as in ``include``.
        quality: how much may be lost; the worst layers are corrected, widened or left float until it holds (``heal``).
    """

    name: ClassVar[str] = "quantize-static"
    claims: ClassVar[Claim] = Claim.APPROXIMATE
    activation: QuantType = "uint8"
    weight: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    symmetric: bool = False
    ranges: RangeMethod = "minmax"
    percentile: float = 99.99
    reduced: bool | None = None
    products: bool = False
    embeddings: bool = True
    include: tuple[Filter, ...] = ()
    exclude: tuple[Filter, ...] = ()
    sixteen_bit: tuple[Filter, ...] = ()
    quality: Budget | None = None

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile is between 50 and 100, not {self.percentile}")

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        if context.device != "cpu":
            outcome.notes.append("nothing done: the CUDA provider has no int8 kernels for QDQ graphs (convert-float16)")
            return outcome
        if not self._upgraded(model, context, outcome):
            return outcome
        if self.quality is not None:
            return heal(dataclasses.replace(self, quality=None), self.quality, model, context)
        plan = make_plan(model, self.plan_options(context), outcome)
        widen(model, plan, self.sixteen_bit)
        if plan.nodes:
            outcome.ranges = self.calibrate(model, plan, context)
            for node in model.graph:
                if node.name in plan.nodes:
                    outcome.counts[f"{node.op_type} on integers"] += 1
            insert(model, plan, outcome.ranges, self.name)
            self._remark(plan, outcome)
        if self.embeddings:
            quantize_tables(model, self.include, self.exclude, self.name, outcome)
        return outcome

    def plan_options(self, context: PassContext) -> PlanOptions:
        """What ``make_plan`` needs of the options."""
        return PlanOptions(
            activation=QuantSpec(self.activation, self.symmetric),
            weight=QuantSpec(self.weight, symmetric=True, reduced=self._reduced),
            per_channel=self.per_channel,
            products=self.products,
            include=self.include,
            exclude=self.exclude,
            device=context.device,
        )

    def calibrate(self, model: ir.Model, plan: QuantPlan, context: PassContext) -> dict[str, TensorRange]:
        """The ranges that ``plan`` needs: those known from an earlier compile, else from the samples.

        Raises:
            PassError: there are no samples and not all ranges are known.
            ModelError: a value is NaN or infinite on a sample.
        """
        wanted = {name: spec for name, spec in plan.activations.items() if name not in plan.same_as}
        if context.ranges and all(name in context.ranges for name in wanted):
            return {name: context.ranges[name] for name in wanted}
        if context.feeds == ():
            unknown = [name for name in wanted if name not in context.ranges]
            raise PassError(
                f"quantize-static has no calibration samples, and the ranges of {len(unknown)} values are not known "
                f"({', '.join(unknown[:3])} ...).",
                "Give samples (calibration=..., --calibration x.npz), or use quantize-dynamic, which needs none.",
            )
        return collect_ranges(
            model, wanted, context.feeds, method=self.ranges, percentile=self.percentile,
            threads=context.threads, progress=context.progress,
        )  # fmt: skip

    @property
    def _reduced(self) -> bool:
        return self.reduced if self.reduced is not None else not has_vnni()

    def _upgraded(self, model: ir.Model, context: PassContext, outcome: Outcome) -> bool:
        """Brings the model to the opset that the quantized form needs."""
        needed = 21 if self.sixteen_bit or self.activation in ("int16", "uint16") else 13 if self.per_channel else 10
        if opset(model) >= needed or not any(node.op_type in ANCHORS for node in model.graph):
            return True
        upgrade = UpgradeOpset(to=max(needed, 13))(model, context)
        outcome.counts.update(upgrade.counts)
        for refusal in upgrade.refusals:
            outcome.refusals.append(dataclasses.replace(refusal, reason=f"needs opset {needed}: {refusal.reason}"))
        return upgrade.changed

    def _remark(self, plan: QuantPlan, outcome: Outcome) -> None:
        empty = [name for name, seen in outcome.ranges.items() if seen.low == seen.high == 0.0]
        if empty:
            outcome.notes.append(f"always zero on the samples, quantized with scale 1: {', '.join(sorted(empty)[:5])}")
        if self._reduced:
            outcome.notes.append("7-bit weights: this CPU has no VNNI, and its 16-bit sums would saturate with 8 bits")
        elif not has_vnni() and self.weight == "int8":
            outcome.notes.append("8-bit weights on a CPU without VNNI: its 16-bit sums can saturate (reduced=True)")
        if self.activation in ("int8",) and not has_vnni():
            outcome.notes.append("int8 activations have no fast kernel on this CPU: uint8 is several times as fast")
        if self.activation in ("int16", "uint16"):
            outcome.notes.append("16-bit activations run in float between Q and DQ: more accurate, never faster")
