"""Static quantization: scales of activations from calibration, QuantizeLinear / DequantizeLinear where they pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import onnx_ir as ir

from ..compiler.base import Claim, Outcome, Pass, PassContext
from ..runtime.calibrate import collect_ranges
from ..runtime.quantization import QuantSpec, QuantType
from ..runtime.quantization_support import has_vnni
from ..runtime.ranges import RangeMethod, TensorRange
from .quantization_plan import Filter, PlanOptions, QuantPlan, make_plan
from .quantize_insert import Form, insert


@dataclasses.dataclass(frozen=True)
class QuantizeStatic(Pass):
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
    include: tuple[Filter, ...] = ()
    exclude: tuple[Filter, ...] = ()
    form: Form = "qdq"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        plan = make_plan(model, self._plan_options(context), outcome)
        if not plan.nodes:
            return outcome
        ranges = self._ranges(model, plan, context, outcome)
        for node in model.graph:
            if node.name in plan.nodes:
                outcome.counts[f"{node.op_type} on integers"] += 1
        insert(model, plan, ranges, self.name, self.form)
        return outcome

    def _plan_options(self, context: PassContext) -> PlanOptions:
        reduced = self.reduced if self.reduced is not None else not has_vnni()
        return PlanOptions(
            activation=QuantSpec(self.activation, self.symmetric),
            weight=QuantSpec(self.weight, symmetric=True, reduced=reduced),
            per_channel=self.per_channel,
            products=self.products,
            include=self.include,
            exclude=self.exclude,
            device=context.device,
        )

    def _ranges(
        self, model: ir.Model, plan: QuantPlan, context: PassContext, outcome: Outcome
    ) -> Mapping[str, TensorRange]:
        wanted = {name: spec for name, spec in plan.activations.items() if name not in plan.same_as}
        return collect_ranges(
            model, wanted, context.feeds, method=self.ranges, percentile=self.percentile,
            device="cpu", threads=context.threads, progress=context.progress,
        )  # fmt: skip
