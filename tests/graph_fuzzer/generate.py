"""Draws whole graphs with inputs to run them on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from grouped_decoders import Rotary, Spec, decoder, samples

from onnxlathe.compiler.verify import Results, run_reference
from onnxlathe.runtime.inference import session_options

from .attention import ATTENTION, CONTROL
from .builder import Array, Builder, NoSuchValue, Value
from .mutate import mutate
from .operators import OPERATORS, Step
from .patterns import PATTERNS
from .shaping import SHAPING

Feeds = dict[str, Array]
_FAMILIES: list[dict[Step, int]] = [OPERATORS, SHAPING, PATTERNS, ATTENTION, CONTROL]
_WEIGHTS = [4, 4, 4, 2, 1]
_SIZES = ({"n": 2, "s": 5}, {"n": 1, "s": 1}, {"n": 3, "s": 4}, {"n": 0, "s": 3})
_TRIES = 8
_ENDED_BY_NO_ROWS = {"Pad", "Einsum"}  # ORT 1.31's kernels divide by zero there, which ends the process


@dataclasses.dataclass
class Case:
    """A graph that runs.

    Attributes:
        proto: the model as drawn.
        feeds: inputs for several sizes of the symbolic dims.
        results: outputs of ``proto`` for ``feeds``, ORT's optimizations off.
        redrawn: graphs before it that ORT refused.
    """

    proto: onnx.ModelProto
    feeds: list[Feeds]
    results: Results
    redrawn: int = 0


def draw(random: Random, make: Callable[[Random], tuple[onnx.ModelProto, list[Feeds]]] | None = None) -> Case:
    """A random graph with at least one set of inputs on which it runs.

    Args:
        random: source of every choice.
        make: draws a graph, which need not be valid, and its inputs; None: steps of all kinds.
    """
    for redrawn in itertools.count():
        proto, feeds = (make or _any)(random)
        try:
            session = ort.InferenceSession(proto.SerializeToString(), session_options(optimize=False, repack=False))
        except Exception:  # not valid after all: ORT's exception classes are not public
            if redrawn >= 50:
                raise
            continue
        case = Case(proto, [], [], redrawn)
        names = [output.name for output in session.get_outputs()]
        deadly = _op_types(proto.graph) & _ENDED_BY_NO_ROWS
        for sample in feeds:
            if deadly and any(array.size == 0 for array in sample.values()):
                continue
            try:
                results: list[Any] = list(session.run(names, sample))
            except Exception:  # a kernel that takes no empty tensors, for one
                continue
            case.feeds.append(sample)
            case.results.append(dict(zip(names, results, strict=True)))
        if case.feeds:
            if any(name.startswith("past") for name in case.feeds[0]):  # what counts of a decoder's results
                case.results = run_reference(ir.from_proto(proto), case.feeds)
            return case
    raise AssertionError


def _any(random: Random) -> tuple[onnx.ModelProto, list[Feeds]]:
    return decoder_of(random) if random.random() < 0.03 else _graph(random)


def _graph(random: Random) -> tuple[onnx.ModelProto, list[Feeds]]:
    b = Builder(random, random.randint(11, 24))
    b.input(("n", "s", b.width)) if random.random() < 0.7 else b.input(("n", b.width))
    for _ in range(random.randint(1, 4)):
        _step(b)
    proto = b.finish(_outputs(b))
    if random.random() < 0.35:
        mutate(proto, random, random.randint(1, 2))
    rng = np.random.default_rng(random.randrange(2**32))
    return proto, [feeds_of(proto, sizes, rng, number) for number, sizes in enumerate(_SIZES)]


def _step(b: Builder) -> None:
    """One step of a random family; families without operands are drawn again."""
    for _ in range(_TRIES):
        family = b.random.choices(_FAMILIES, _WEIGHTS)[0]
        step = b.random.choices(list(family), list(family.values()))[0]
        nodes, values = len(b.nodes), len(b.values)
        try:
            step(b)
            return
        except NoSuchValue:  # half a step stays as dead nodes, unless it made nothing at all
            assert len(b.nodes) >= nodes and len(b.values) >= values


def _outputs(b: Builder) -> list[Value]:
    """Some of what nothing reads, and now and then something that others read too."""
    read = {name for node in b.nodes for name in node.input}
    made = {name for node in b.nodes for name in node.output}
    own = [value for value in b.values if value.name in made]
    leaves = [value for value in own if value.name not in read] or own[-1:]
    if not own:
        leaves = [b.op("Identity", [b.inputs[0]])]
    chosen = leaves[-b.random.randint(1, 3) :]
    if own and b.chance(0.3):
        chosen.append(b.random.choice(own))
    return list(dict.fromkeys(chosen))


def feeds_of(proto: onnx.ModelProto, sizes: dict[str, int], rng: np.random.Generator, number: int) -> Feeds:
    """Inputs for the sizes of the symbolic dims; the second sample overrides what initializers may be overridden."""
    overridable = {tensor.name: tensor for tensor in proto.graph.initializer}
    inputs = {value.name for value in proto.graph.input}
    meant = not overridable.keys() <= inputs  # all of them as inputs: an old exporter's habit, which `load` drops
    read = _read(proto.graph)
    feeds: Feeds = {}
    for value in proto.graph.input:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if value.name in overridable:
            if (
                meant and number == 1 and dtype == np.float32 and value.name in read
            ):  # ORT has no input that nothing reads
                feeds[value.name] = onnx.numpy_helper.to_array(overridable[value.name]) * np.float32(0.5)
            continue
        order = iter("ns")  # a dim without a name has the size of the dim that it was
        shape = [
            d.dim_value if d.HasField("dim_value") else sizes[d.dim_param or next(order)] for d in tensor.shape.dim
        ]
        feeds[value.name] = _array(value.name, tuple(shape), dtype, rng)
    return feeds


def _read(graph: onnx.GraphProto) -> set[str]:
    """Names that the graph's outputs depend on."""
    wanted = {value.name for value in graph.output}
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= _operands(node)
    return wanted


def _op_types(graph: onnx.GraphProto) -> set[str]:
    """Operators of a graph and of the bodies in it."""
    bodies = [item.g for node in graph.node for item in node.attribute if item.HasField("g")]
    return {node.op_type for node in graph.node}.union(*map(_op_types, bodies))


def _operands(node: onnx.NodeProto) -> set[str]:
    bodies = [item.g for item in node.attribute if item.HasField("g")]
    return set(node.input) | {name for body in bodies for inner in body.node for name in _operands(inner)}


def _array(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator) -> Array:
    if name.startswith(("mask", "attention_mask")):
        mask = np.ones(shape, dtype)
        if mask.size and shape[1] > 2:
            mask[-1, -2:] = 0
        return mask
    if dtype.kind in "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return rng.integers(0, 16, shape).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def decoder_of(random: Random, layers: int = 2) -> tuple[onnx.ModelProto, list[Feeds]]:
    """A decoder with a cache, put together from the parts that ``grouped_decoders`` has."""
    width = random.choice([16, 16, 8])
    rotary = random.choice(
        [None, Rotary(width), Rotary(width, interleaved=True), Rotary(8), Rotary(16, angles="range")]
    )
    heads, kv_heads = random.choice([(4, 2), (4, 4), (4, 1)])
    spec = Spec(
        heads=heads,
        kv_heads=kv_heads,
        rotary=(rotary,) * layers,
        windows=(random.choice([0, 0, 3]),) * layers,
        repeat="none" if heads == kv_heads else random.choice(["expand", "tile"]),
        scale=random.choice(["scores", "divided", "q", "k", "both", "none"]),
        softcap=random.choice([0.0, 0.0, 5.0]),
        norm=random.random() < 0.3,
        mask=random.choice(["where", "add", "fill"]),
        packed=random.choice(["no", "slice", "split"]),
        learned=random.random() < 0.2,
    )
    proto = ir.to_proto(decoder(spec))
    if random.random() < 0.3:
        mutate(proto, random, 1)
    return proto, samples(spec)
