"""Strips of rows: equal results, less memory, every kind of window, near misses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import onnxlathe as lathe
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.models import zoo
from onnxlathe.passes.memory.plan_memory import plan_model
from onnxlathe.passes.memory.tile_patches import TilePatches
from rewriting import from_text, ops, refused, rewrite

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((16, 3, 3, 3)).astype(np.float32),
    "d": RNG.standard_normal((16, 1, 5, 5)).astype(np.float32),
    "p": RNG.standard_normal((4, 16, 1, 1)).astype(np.float32),
    "q": RNG.standard_normal((16, 4, 1, 1)).astype(np.float32),
}


def build(body: str, rows: int = 33, opset: int = 20, outputs: str = "float[1, c, h, v] y") -> ir.Model:
    declared = ", ".join(f"float[{', '.join(map(str, array.shape))}] {name}" for name, array in WEIGHTS.items())
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[1, 3, {rows}, 20] x, {declared}) => ({outputs})'
    return from_text(f"{text} {{ {body} }}", **WEIGHTS)


def bound(model: ir.Model) -> int:
    clone = model.clone()
    infer_shapes(clone)
    return plan_model(clone, [{}])[0].bound


TAIL = "m = GlobalAveragePool(e) y = Flatten(m)"
OUT = "float[1, c] y"
FRONTS = {
    "chain": """a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[2,2,2,2], strides=[2,2], group=16>(b, d)
        e = Conv(c, p) """,
    "pool": """a = Conv<pads=[1,1,1,1]>(x, w) b = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(a)
        e = Conv(b, p) """,
    "no padding": "a = Conv(x, w) c = Conv<strides=[3,3], group=16>(a, d) e = Conv(c, p) ",
    "uneven padding": """a = Conv<pads=[0,1,2,1]>(x, w) c = Conv<pads=[3,2,1,2], group=16, strides=[2,1]>(a, d)
        e = Conv(c, p) """,
    "dilation": "a = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, w) b = Relu(a) e = Conv<strides=[2,2]>(b, p) ",
    "shortcut": """a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) n = Conv(a, p) q1 = Conv(n, q)
        r = Conv<pads=[2,2,2,2], group=16>(q1, d) s = Conv(r, p) e = Add(n, s) """,
    "skipped rows": "a = Conv<pads=[1,1,1,1]>(x, w) b = Conv<strides=[2,2]>(a, p) e = Relu(b) ",
}


@pytest.mark.parametrize("name", list(FRONTS))
def test_every_kind_of_front_gives_the_same(name: str) -> None:
    model = build(FRONTS[name] + TAIL, outputs=OUT)
    after, outcome = rewrite(TilePatches(), model)
    assert outcome.counts["strips"] > 1
    assert bound(after) < bound(model)
    assert ops(after)["Conv"] > ops(model)["Conv"]


def multiplications(model: ir.Model) -> int:
    total = 0
    for node in model.graph:
        if node.op_type == "Conv":
            weight = node.inputs[1].shape  # type: ignore[union-attr]
            total += int(np.prod(node.outputs[0].shape.numpy())) * int(np.prod(weight.numpy()[1:]))  # type: ignore[union-attr]
    return total


def test_the_front_of_a_mobilenet_needs_a_quarter() -> None:
    entry = zoo.build("mobilenet")
    model = lathe.export(entry.module, entry.args)
    infer_shapes(model)
    out = lathe.compile(model, ["tile-patches"], progress=False)
    assert bound(out.model) <= 0.25 * bound(model)
    assert multiplications(out.model) == multiplications(model)
    assert out.report.passes[0].error is not None and out.report.passes[0].error <= 1e-5


def test_a_budget_takes_the_fewest_strips_that_keep_it() -> None:
    model = build(FRONTS["chain"] + TAIL, outputs=OUT)
    budget = int(0.7 * bound(model))
    after, outcome = rewrite(TilePatches(peak_bytes=budget), model)
    smallest, most = rewrite(TilePatches(), model)
    assert bound(smallest) < bound(after) <= budget
    assert outcome.counts["strips"] < most.counts["strips"]
    refused(TilePatches(peak_bytes=100), model, "the best strips still need")
    assert not TilePatches(peak_bytes=bound(model))(model.clone(), lathe.PassContext()).changed


def test_near_misses() -> None:
    front = FRONTS["chain"]
    refused(TilePatches(), build(front + TAIL, opset=11, outputs=OUT), "upgrade-opset")
    other = "z = GlobalAveragePool(a) "  # reads what would no longer be there as a whole
    refused(TilePatches(), build(front + other + TAIL, outputs=OUT + ", float[1, 16, 1, 1] z"))
    late = 'a = Conv<auto_pad="SAME_UPPER">(x, w) e = Softmax(a) '
    refused(TilePatches(), build(late + TAIL, outputs=OUT))


def test_a_front_in_the_body_of_a_loop() -> None:
    """A body is an arena of its own; its weights and its image may be values of the graph around it."""
    body = FRONTS["chain"].replace("(x, w)", "(seen, w)") + "m = GlobalAveragePool(e) s = ReduceSum<keepdims=0>(m) "
    body += "k = Identity(go) t = Add(sum, s)"
    model = build(
        f"""seen = Sigmoid(x) zero = Constant<value_float = 0.0>() start = Constant<value_float = 0.0>()
        trips = Constant<value_int = 3>() go0 = Constant<value_int = 1>() go1 = Cast<to=9>(go0)
        y = Loop(trips, go1, start)
            <body = b (int64 i, bool go, float sum) => (bool k, float t) {{ {body} }}>""",
        outputs="float y",
    )
    after, outcome = rewrite(TilePatches(), model, nested=False)
    assert outcome.counts["strips"] > 1 and ops(after)["Conv"] > ops(model)["Conv"]
    infer_shapes(model)
    (_, before), (_, now) = (plan_model(item, [{}]) for item in (model, after))
    assert now.bound < before.bound


def test_sizes_that_are_not_known_are_refused_by_name() -> None:
    late = "f = NonZero(x) h = Cast<to=1>(f) m = GlobalAveragePool(e) y = Flatten(m) "
    outcome = refused(TilePatches(), build(FRONTS["chain"] + late, outputs=OUT + ", float[4, n] h"), nested=False)
    assert outcome.refusals


def test_strips_are_not_cut_again() -> None:
    model = build(FRONTS["chain"] + TAIL, outputs=OUT)
    after, _ = rewrite(TilePatches(peak_bytes=int(0.7 * bound(model))), model, nested=False)
    refused(TilePatches(), after, "strips already", nested=False)
