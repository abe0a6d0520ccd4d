"""A pass of your own: ``x * HardSigmoid(x)`` becomes ``HardSwish``, and the compiler checks it like every other pass.

    python examples/custom_pass.py

More on rules, refusals and tests: docs/writing-a-pass.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import onnx.parser
import onnx_ir as ir

import onnxlathe as lathe
from onnxlathe.compiler.graph import (
    Names,
    all_nodes,
    attribute,
    is_op,
    make_node,
    only_consumer,
    opset,
    remove_dead,
    replace,
)


@dataclasses.dataclass(frozen=True)
class FuseHardSwish(lathe.Pass):
    """``x * HardSigmoid(x, alpha=1/6, beta=1/2)`` -> ``HardSwish(x)`` (ONNX HardSwish-14).

    Refused: another alpha or beta, a HardSigmoid that others read.
    """

    name: ClassVar[str] = "fuse-hard-swish"

    def __call__(self, model: ir.Model, context: lathe.PassContext) -> lathe.Outcome:
        outcome = lathe.Outcome()
        names = Names(model)
        for sigmoid in [node for node in all_nodes(model) if is_op(node, "HardSigmoid")]:
            x, product = sigmoid.inputs[0], only_consumer(sigmoid.outputs[0])
            if opset(model) < 14 or product is None or not is_op(product, "Mul") or x not in product.inputs:
                outcome.refuse(sigmoid, "HardSwish", "its result is not only multiplied by its input")
                continue
            alpha, beta = attribute(sigmoid, "alpha", 0.2), attribute(sigmoid, "beta", 0.5)
            if not (math.isclose(alpha, 1 / 6, rel_tol=1e-6) and beta == 0.5):
                outcome.refuse(sigmoid, "HardSwish", f"alpha is {alpha:.4f} and beta {beta:.4f}, not 1/6 and 1/2")
                continue
            result = product.outputs[0]
            fused = make_node(
                "HardSwish", [x], name=names.fresh(f"{product.name}/swish"), output=names.fresh("swish"), like=result
            )
            replace(product, [fused], by=self.name, gone=[sigmoid])
            outcome.counts["HardSwish"] += 1
        remove_dead(model)
        return outcome


def mobile_block() -> ir.Model:
    """A graph with two candidates, of which one has another slope."""
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[n, 4] x) => (float[n, 4] y) {
        gate = HardSigmoid<alpha = 0.1666666667, beta = 0.5>(x)
        a = Mul(x, gate)
        other = HardSigmoid<alpha = 0.2>(a)
        y = Mul(other, a)
    }"""
    return ir.from_proto(onnx.parser.parse_model(text))


def main() -> None:
    out = lathe.compile(mobile_block(), ["cleanup", FuseHardSwish()], progress=False)
    out.report.print(refusals=True)
    out.save("mobile.onnx")
    assert out.report.ops_after == {"HardSwish": 1, "HardSigmoid": 1, "Mul": 1}


if __name__ == "__main__":
    main()
