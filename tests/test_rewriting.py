"""The shared assertion itself can fail."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.base import Outcome, Pass, PassContext
from rewriting import from_text, rewrite

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 4] x, float[4] w) => (float[n, 4] y) { t = Mul(x, w)  y = Relu(t) }"""


def build() -> ir.Model:
    return from_text(MODEL, w=np.arange(4, dtype=np.float32))


@dataclasses.dataclass(frozen=True)
class _Wrong(Pass):
    name: ClassVar[str] = "wrong"
    kind: str = "meaning"

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        nodes = [node for graph in model.graphs() for node in graph if node.op_type in ("Relu", "Abs")]
        if self.kind == "meaning" and nodes[0].op_type == "Relu":
            nodes[0].op_type = "Abs"
            outcome.counts["abs"] += 1
        if self.kind == "silent":
            nodes[0].name = (nodes[0].name or "") + "_"
        if self.kind == "endless":
            nodes[0].name = (nodes[0].name or "") + "_"
            outcome.counts["rename"] += 1
        return outcome


@pytest.mark.parametrize(
    ("kind", "words"), [("meaning", "differs"), ("silent", "not truthful"), ("endless", "second run")]
)
def test_wrong_passes_are_caught(kind: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        rewrite(_Wrong(kind), build())
