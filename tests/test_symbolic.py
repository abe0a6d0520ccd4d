"""Symbolic dims and views, held against NumPy on random shapes."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxlathe.passes.attention.views import follow_view, origins, regroup, whole_view
from onnxlathe.passes.symbolic import SymbolicShapes, reshaped
from onnxlathe.passes.symbolic_dims import ONE, divide, multiply, number
from rewriting import from_text

BATCH = (1, ("batch",))
SEQ = (1, ("seq",))


def test_arithmetic() -> None:
    assert multiply([number(12), BATCH, number(2), SEQ]) == (24, ("batch", "seq"))
    assert divide((24, ("batch", "seq")), (12, ("seq",))) == (2, ("batch",))
    assert divide(number(10), number(4)) is None
    assert divide(BATCH, SEQ) is None
    assert divide(BATCH, number(0)) is None


def test_reshaped_solves_and_copies() -> None:
    source = (BATCH, SEQ, number(24))
    zero, rest = number(0), number(-1)
    assert reshaped(source, (zero, zero, rest, number(6)), False) == (BATCH, SEQ, number(4), number(6))
    assert reshaped(source, (rest, number(24)), False) == ((1, ("batch", "seq")), number(24))
    assert reshaped(source, (rest, number(5)), False) is None, "24 is not divisible by 5"
    assert reshaped(None, (zero, number(5)), False) is None


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_views_agree_with_numpy(shape: list[int], data: st.DataObject) -> None:
    """A random chain of Reshape and Transpose: what the factors say is where the elements really are."""
    model = from_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x, int64[k] t) => (y, z) '
        "{ y = Reshape(x, t) z = Transpose(x) }"
    )
    template = {node.op_type: node for node in model.graph}
    shapes = SymbolicShapes(model)
    array = np.arange(math.prod(shape)).reshape(shape)
    view = whole_view(tuple(number(size) for size in shape))
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            perm = data.draw(st.permutations(range(array.ndim)))
            template["Transpose"].attributes["perm"] = ir.AttrInt64s("perm", perm)
            followed = follow_view(view, template["Transpose"], shapes)
            array = array.transpose(perm)
        else:
            sizes = list(array.shape)
            cut = data.draw(st.integers(1, max(1, len(sizes) - 1)))
            target = [math.prod(sizes[:cut]), *sizes[cut:]]
            followed = regroup([factor for axis in view for factor in axis], tuple(map(number, target)))
            array = array.reshape(target)
        if followed is None:
            return  # "cannot prove" is always allowed
        view = followed
    assert [multiply([dim for dim, _ in axis])[0] for axis in view] == list(array.shape)
    order = [origin[0] for axis in origins(view) for origin in axis]
    if all(len(origin) == 1 for axis in origins(view) for origin in axis):
        kept = [axis for axis, size in enumerate(shape) if size != 1]
        expected = np.arange(math.prod(shape)).reshape([shape[axis] for axis in kept])
        expected = expected.transpose([kept.index(axis) for axis in order]) if kept else expected
        assert np.array_equal(expected.reshape(-1), array.reshape(-1))


def test_regroup_tells_equal_sizes_apart() -> None:
    view = regroup([(number(36), (2,))], (number(6), number(6)))
    assert view is not None and origins(view) == [[(2, 0)], [(2, 1)]]


CHAIN = """<ir_version: 10, opset_import: ["" : 20]>
g (float[batch, seq, 24] x, int64[1] i0, int64[1] i1, int64[1] m1, int64[1] six, int64[] zero, int64[] one) => (y) {
  s = Shape(x)  b = Gather(s, i0)  n = Slice(s, i1, last)
  target = Concat<axis=0>(b, n, m1, six)  r = Reshape(x, target)  y = Transpose<perm=[0,2,1,3]>(r)
  span = Gather(s, one)  positions = Range(zero, span, one)
  ones = ConstantOfShape<value: tensor = int64[1] {1}>(four)  minus = Mul(ones, m1)
  open = Equal(target, minus)  expand = Where(open, ones, target)  wide = Expand(small, expand)
}"""


def test_shape_arithmetic_is_followed() -> None:
    text = CHAIN.replace("int64[] one)", "int64[] one, int64[1] last, int64[1] four, float[1] small)")
    model = from_text(
        text,
        i0=np.array([0]),
        i1=np.array([1]),
        m1=np.array([-1]),
        six=np.array([6]),
        zero=np.array(0),
        one=np.array(1),
        last=np.array([2]),
        four=np.array([4]),
        small=np.array([1.0], np.float32),
    )
    shapes = SymbolicShapes(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert shapes.content(values["target"]) == (BATCH, SEQ, number(-1), number(6))
    assert shapes.dims(values["r"]) == (BATCH, SEQ, number(4), number(6))
    assert shapes.dims(values["y"]) == (BATCH, number(4), SEQ, number(6))
    assert shapes.dims(values["positions"]) == (SEQ,)
    assert shapes.content(values["expand"]) == (BATCH, SEQ, ONE, number(6))
    assert shapes.dims(values["wide"]) == (BATCH, SEQ, ONE, number(6))


@pytest.mark.parametrize(("op", "inputs"), [("Add", "x, z"), ("NonZero", "x")])
def test_what_is_unknown_stays_unknown(op: str, inputs: str) -> None:
    model = from_text(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[a, b] x, float[c, d] z) => (y) {{ y = {op}({inputs}) }}'
    )
    dims = SymbolicShapes(model).dims(model.graph.outputs[0])
    assert dims is None or not {name for dim in dims for name in dim[1]} & {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = ReduceMean<keepdims=1>(x, last)", (BATCH, SEQ, ONE)),
        ("y = ReduceSum<keepdims=0>(x, last)", (BATCH, SEQ)),
        ("y = ReduceMax<keepdims=0>(x)", None),
    ],
)
def test_reductions(body: str, expected: object) -> None:
    """What an exporter's shape inference leaves open (behind contrib operators) is derived."""
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[batch, seq, 8] x, int64[1] last) => (y) {{ {body} }}'
    model = from_text(text, last=np.array([-1]))
    model.graph.outputs[0].shape = None
    assert SymbolicShapes(model).dims(model.graph.outputs[0]) == expected
