"""What ONNX Runtime needs for activations: the parts ``ort`` and ``names`` of memory.py."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

import onnxlathe as lathe
from onnxlathe.compiler.gate import measure_speed
from onnxlathe.compiler.graph import Names
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.models import zoo
from onnxlathe.passes.memory.order_bounds import least_bound, order_bound
from onnxlathe.passes.memory.order_search import best_order, proven_best
from onnxlathe.passes.memory.plan_memory import PlanMemory
from onnxlathe.passes.partition.costs import graph_costs
from onnxlathe.passes.symbolic import SymbolicShapes
from onnxlathe.passes.symbolic_dims import Dim
from onnxlathe.runtime.artifact import load, save
from onnxlathe.runtime.feeds import Feeds, make_feeds
from onnxlathe.runtime.inference import open_session, session_options
from onnxlathe.runtime.memory_stats import MemoryUse, measure_memory

BRANCHY = ("inception", "densenet", "nas-cells", "unet")
OTHERS = ("mobilenet", "convnet")
_TIMES = 3  # ORT's memory pattern and the nodes that its layout adds follow hash tables: peaks differ between processes
_FREED = {"memory_pattern": False, "memory_reuse": False}
_SIZES = {"batch": 2, "sequence": 128, "past": 16}


def exported(name: str) -> ir.Model:
    """A model of the zoo from torch's exporter, images of 192 pixels: well above the noise of the measurement."""
    import torch

    entry = zoo.build(name)
    args = tuple(torch.zeros(1, 3, 192, 192) if argument.ndim == 4 else argument for argument in entry.args)
    model = lathe.export(entry.module, args)
    infer_shapes(model)
    return model


def measured() -> dict[str, Any]:
    """Every graph: measured peak with what the pass chose (the highest of three) / without (the lowest of three), the
    least, what is held.
    """
    rows: dict[str, Any] = {}
    for name in (*BRANCHY, *OTHERS):
        model = exported(name)
        feeds = make_feeds(model, 0, 1)[0]
        before = _lowest(model, feeds, {})
        for layout in (True, False):
            out = lathe.compile(model, [PlanMemory(layout=layout)], verify=False, progress=False)
            after = _highest(out.model, feeds, out.ort_config)
            least, proven = _after_fusions(model, feeds, out.ort_config)
            label = name if layout else f"{name}, layout=False"
            rows[label] = {
                "peak / before": after.peak / before.peak,
                "least / before": least / before.peak,
                "proven": proven,
                "arena held / before": after.held / before.held,
                "bytes": after.peak,
                "chosen": out.ort_config,
                "notes": out.report.passes[0].notes,
            }
            print(label, rows[label], flush=True)
    for title, suffix in (("geometric mean of the branchy", ""), ("with layout=False", ", layout=False")):
        columns = ("peak / before", "least / before", "arena held / before")
        means = {column: _mean([rows[f"{name}{suffix}"][column] for name in BRANCHY]) for column in columns}
        print(title, means, flush=True)
    return rows


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def _lowest(model: ir.Model, feeds: Feeds, config: dict[str, Any]) -> MemoryUse:
    return min((measure_memory(model, feeds, config) for _ in range(_TIMES)), key=lambda use: use.peak)


def _highest(model: ir.Model, feeds: Feeds, config: dict[str, Any]) -> MemoryUse:
    return max((measure_memory(model, feeds, config) for _ in range(_TIMES)), key=lambda use: use.peak)


def _after_fusions(model: ir.Model, feeds: Feeds, config: dict[str, Any]) -> tuple[int, bool]:
    """Bytes alive at the fullest step of the graph that ORT makes of ``model``, in the best order that is found, and
    whether no order of that graph needs less. Kernels' scratch memory is not in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads=1, ort_config=config)
        options.optimized_model_filepath = str(Path(folder) / "fused.onnx")
        open_session(save(model, Path(folder) / "model.onnx"), options)
        fused = load(options.optimized_model_filepath)
        names = Names(fused)
        for node in fused.graph:  # several of ORT's own have one name
            node.name = names.fresh(f"fused_{node.op_type}")
        context = lathe.PassContext(threads=1, feeds=[feeds])
        flow = graph_costs(fused, "roofline", context).flow
    made = {name: index for index, tensor in enumerate(flow.tensors) for name in tensor.names}
    for index, node in enumerate(fused.graph):  # ORT's convolutions add to their fourth input in place
        if node.op_type not in ("Conv", "FusedConv") or not node.domain or len(node.inputs) < 4:
            continue
        over, out = made.get(getattr(node.inputs[3], "name", None) or ""), made[node.outputs[0].name or ""]
        if over is not None and flow.tensors[over].size == flow.tensors[out].size:
            flow.in_place[index].append(over)
    order = best_order(flow)
    bound = order_bound(flow, order)
    return bound, proven_best(flow, order) or bound == least_bound(flow)


def names() -> dict[str, Any]:
    """Measured peak / the exported graph's, with dims as exported, none at all, and all that are provably equal named
    alike; as ORT runs it, and with buffers freed at once.
    """
    rows: dict[str, Any] = {}
    for name in ("minilm", "encoder", "decoder-tiny", "stories260k"):
        entry = zoo.build(name)
        lm = entry.kind == "causal-lm"
        model = (
            lathe.export_causal_lm(entry.module, check=False)
            if lm
            else lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
        )
        infer_shapes(model)
        feeds = make_feeds(model, 0, 1, _SIZES)[0]
        bare = model.clone()
        for value in _made(bare):
            value.shape = None
        inferred = bare.clone()
        infer_shapes(inferred)
        variants = {"as exported": model, "no shapes": bare, "onnx's": inferred, "named alike": _named_alike(inferred)}
        configs = {"": {}, ", no pattern": {"memory_pattern": False}, ", freed": _FREED}
        peaks = {
            variant + suffix: _lowest(graph, feeds, config).peak
            for variant, graph in variants.items()
            for suffix, config in configs.items()
        }
        rows[name] = {variant: peak / peaks["as exported"] for variant, peak in peaks.items()}
        print(name, rows[name], flush=True)
    return rows


def speed() -> dict[str, Any]:
    """How many times faster ONNX Runtime is when it frees every buffer at once, in turns with how it runs by itself."""
    rows: dict[str, Any] = {}
    entry = zoo.build("minilm")
    minilm = lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
    for name, model in (("minilm", minilm), *((name, exported(name)) for name in BRANCHY[:3])):
        feeds = make_feeds(model, 0, 1, {"batch": 1, "sequence": 32})
        how = measure_speed(
            model, model, feeds, device="cpu", threads=1, config_before={}, config_after=_FREED, budget=5.0
        )
        rows[name] = {"speed, freed / before": how.ratio, "noise": how.noise}
        print(name, rows[name], flush=True)
    return rows


def _made(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph for value in node.outputs if not value.is_graph_output()]


def _named_alike(model: ir.Model) -> ir.Model:
    """A copy with one name for dims that are provably equal."""
    copy = model.clone()
    shapes = SymbolicShapes(copy)
    for value in _made(copy):
        if (dims := shapes.dims(value)) is not None:
            value.shape = ir.Shape([_name(dim) for dim in dims])
    return copy


def _name(dim: Dim) -> int | str:
    coefficient, symbols = dim
    if not symbols:
        return coefficient
    return "*".join(([str(coefficient)] if coefficient != 1 else []) + [*symbols])


_UNARY = """Abs Ceil Clip Cos Elu Erf Exp Floor Gelu HardSigmoid LeakyRelu Log Neg Reciprocal Relu Selu Sigmoid Sin
    Softmax Softplus Softsign Sqrt Tanh ThresholdedRelu"""
_BINARY = "Add Sub Mul Div Max Sum"
_SIDE = 1 << 11


def kernels() -> dict[str, Any]:
    """Buffers of one size that are alive when a kernel runs whose inputs nobody reads afterwards: as many as it has
    inputs where it writes over one of them, one more where it does not.
    """
    rows: dict[str, Any] = {}
    for count, operators in ((1, _UNARY), (2, _BINARY)):
        for operator in operators.split():
            made = ["a = Sigmoid(x)", "b = Tanh(x)"][:count]
            body = " ".join([*made, f"e = {operator}({'a, b' if count == 2 else 'a'}) y = ReduceMax<keepdims=0>(e)"])
            head = '<ir_version: 10, opset_import: ["" : 20]>'
            model = ir.from_onnx_text(f"{head} g (float[{_SIDE},{_SIDE}] x) => (float y) {{ {body} }}")
            infer_shapes(model)
            plain = {**_FREED, "graph_optimization_level": "disable", "execution_order": "priority"}
            peak = measure_memory(model, make_feeds(model, 0, 1)[0], plain).peak
            buffers = round(peak / (4 * _SIDE * _SIDE))
            rows[operator] = {"inputs": count, "buffers": buffers, "in place": buffers == count}
            print(operator, rows[operator], flush=True)
    return rows
