"""FuseConv: scales, shifts and batch normalizations behind a Conv."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxlathe.compiler.load import infer_shapes
from onnxlathe.passes.fusion.fuse_conv import FuseConv
from rewriting import from_text, ops, refused, rewrite

_RNG = np.random.default_rng(0)
_ARRAYS = {
    "w": (4, 3, 3, 3), "b": (4,), "c": (4, 1, 1), "d": (1, 4, 1, 1), "e": (), "row": (6,), "map": (4, 6, 6),
    "g": (4,), "h": (4,), "m": (4,),
}  # fmt: skip


def build(body: str, outputs: str = "float[n, 4, 6, 6] y", **extra: Any) -> ir.Model:
    arrays = {name: _RNG.standard_normal(shape).astype(np.float32) for name, shape in _ARRAYS.items()}
    arrays["v"] = _RNG.uniform(0.5, 2, 4).astype(np.float32)
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    used = {name: array for name, array in {**arrays, **extra}.items() if name in words}
    names = "".join(f", float{list(array.shape) or ''} {name}" for name, array in used.items())
    header = '<ir_version: 10, opset_import: ["" : 20]>'
    model = from_text(f"{header} g (float[n, 3, 8, 8] x{names}) => ({outputs}) {{ {body} }}", **used)
    infer_shapes(model)
    return model


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv(x, w, b) y = Add(a, c)",
        "a = Conv(x, w) y = Add(d, a)",
        "a = Conv(x, w, b) s = Mul(a, c) y = Add(s, e)",
        "a = Conv(x, w, b) y = BatchNormalization(a, g, h, m, v)",
        "a = Conv(x, w) s = BatchNormalization<epsilon=0.1>(a, g, h, m, v) t = Mul(s, d) y = Add(t, c)",
    ],
)
def test_folds(body: str) -> None:
    after, _ = rewrite(FuseConv(), build(body))
    assert ops(after) == {"Conv": 1}


def test_constants_that_differ_within_a_channel_stay() -> None:
    for name in ("row", "map"):
        refused(FuseConv(), build(f"a = Conv(x, w, b) y = Add(a, {name})"), "not one per channel")


def test_other_readers_stay() -> None:
    refused(FuseConv(), build("a = Conv(x, w, b) y = Add(a, c)", "float[n, 4, 6, 6] y, float[n, 4, 6, 6] a"))


def test_shared_weights_stay() -> None:
    refused(FuseConv(), build("a = Conv(x, w, b) s = Add(a, c) r = Conv(x, w) y = Sum(s, r)"), "shared")
