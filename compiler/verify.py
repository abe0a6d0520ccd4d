"""Checks around passes: is the graph well formed, does it compute the same, and where does it start to differ."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ..runtime.errors import ModelError, VerifyError
from ..runtime.generation.quantized_cache import cache_scales, dequantize_caches, quantize_caches
from ..runtime.inference import expose, open_session, run_session, session_options, weights_outside
from ..runtime.providers import Device
from .graph import subgraphs
from .padding import cache_names, defined_results, results_of_tokens

Array = np.ndarray[Any, Any]
Results = list[dict[str, Array]]
_MAX_PROBES = 400
_CHUNK = 1 << 20  # numbers compared at a time: logits are large


def check_structure(model: ir.Model) -> None:
    """The cheap rules that hold after every pass, linear in the size of the graph.

    1. Every value read is an input, an initializer, or made earlier (in this graph or an enclosing one).
    2. Names are present and made only once per scope.
    3. Every graph output is made by something; every initializer has data.
    4. Every operator's domain is imported.

    Raises:
        VerifyError: the rule broken, and the node or value that breaks it.
    """
    _check_graph(model.graph, set(), set(model.opset_imports) | {function[0] for function in model.functions})


def _check_graph(graph: ir.Graph, outer: set[ir.Value], domains: set[str]) -> None:
    known = set(outer)
    names: set[str] = set()

    def define(values: Iterable[ir.Value], where: str) -> None:
        for value in values:
            if not value.name:
                raise VerifyError(f"A value made by {where} has no name.")
            if value.name in names:
                raise VerifyError(f"The name {value.name!r} is made twice, the second time by {where}.")
            names.add(value.name)
            known.add(value)

    define(graph.inputs, "the graph inputs")
    define((value for value in graph.initializers.values() if value not in known), "the initializers")
    for value in graph.initializers.values():
        if value.const_value is None:
            raise VerifyError(f"The initializer {value.name!r} has no data.")
    for node in graph:
        _check_node(node, known, domains)
        for body in subgraphs(node):
            _check_graph(body, known, domains)
        define((value for value in node.outputs if value.name), f"node {node.name!r}")
    for value in graph.outputs:
        if value not in known:
            raise VerifyError(f"Nothing makes the graph output {value.name!r}.")


def _check_node(node: ir.Node, known: set[ir.Value], domains: set[str]) -> None:
    for value in node.inputs:
        if value is not None and value not in known:
            raise VerifyError(f"Node {node.name!r} ({node.op_type}) reads {value.name!r} before anything makes it.")
    if node.domain not in domains and not (node.domain == "ai.onnx" and "" in domains):
        raise VerifyError(f"Node {node.name!r} uses the domain {node.domain!r}, which the model does not import.")


@dataclasses.dataclass(frozen=True)
class Signature:
    """Names, element types and ranks of the inputs and outputs; passes must not change it."""

    inputs: tuple[tuple[str, str, int | None], ...]
    outputs: tuple[tuple[str, str, int | None], ...]

    @classmethod
    def of(cls, model: ir.Model) -> Signature:
        """The signature of ``model``."""

        def describe(values: Sequence[ir.Value]) -> tuple[tuple[str, str, int | None], ...]:
            return tuple(
                (value.name or "", str(value.dtype), None if value.shape is None else len(value.shape))
                for value in values
            )

        return cls(describe(model.graph.inputs), describe(model.graph.outputs))

    def check_kept(self, after: Signature) -> None:
        """Raises VerifyError if ``after`` has other inputs or outputs (a rank that became known is fine)."""
        for kind, old, new in (("inputs", self.inputs, after.inputs), ("outputs", self.outputs, after.outputs)):
            same = len(old) == len(new) and all(
                a[:2] == b[:2] and (a[2] is None or b[2] is None or a[2] == b[2]) for a, b in zip(old, new, strict=True)
            )
            if not same:
                raise VerifyError(f"The {kind} changed from {old} to {new}.")


def check_model(model: ir.Model) -> None:
    """Full ``onnx.checker`` run on the graph without its large weights, so that size does not matter.

    Contrib operators (``com.microsoft``) are unknown to the checker and are checked by ONNX Runtime instead.

    Raises:
        ModelError: what the checker says.
    """
    _check_sizes(model)
    try:
        with weights_outside(model):
            proto = ir.to_proto(model)
    except ir.serde.SerdeError as error:
        raise ModelError(f"The model is not valid ONNX: {_root_of(error)}", "Export or download it again.") from error
    # The checker wants external data on disk; the placeholders have none, so it sees inputs of the same type instead.
    placeholders = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    kept = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    known = {value.name for value in proto.graph.input}
    typed = [value for value in proto.graph.value_info if value.HasField("type")]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(typed)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for tensor in placeholders:
        if tensor.name not in known:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"The model is not valid ONNX: {str(error).strip().splitlines()[0]}",
            "Re-export it, or check it with onnx.checker.check_model.",
        ) from error


def _check_sizes(model: ir.Model) -> None:
    """No value with a known shape may be larger than this machine's memory: the system would end the process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 48
    for graph in model.graphs():
        for value in (value for node in graph for value in node.outputs):
            if value.shape is None or value.dtype in (None, ir.DataType.STRING) or not value.shape.is_static():
                continue
            size = math.prod(value.shape.numpy()) * value.dtype.itemsize
            if size > memory:
                raise ModelError(
                    f"The value {value.name!r} of shape {list(value.shape)} takes {size:.0f} bytes, more than this "
                    "machine has.",
                    "Compile a model of smaller sizes.",
                )


def _root_of(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{error}"[:200]


def run_reference(model: ir.Model, feeds: Sequence[Mapping[str, Array]], device: Device = "cpu") -> Results:
    """Runs ``model`` on every sample with ORT's own optimizations and weight repacking off.

    Of a decoder's sample with padding, what counts is the results of tokens and those of the step after
    (``padding.py``). Samples and results have float caches also where the model's are int8.
    """
    session = open_session(model, session_options(optimize=False, repack=False), device)
    caches, scales = cache_names(model), cache_scales(model)
    feeds = [quantize_caches(sample, scales) for sample in feeds] if scales else feeds
    results = [run_session(session, sample) for sample in feeds]
    if caches:
        results = [
            defined_results(session, sample, found, caches) for sample, found in zip(feeds, results, strict=True)
        ]
    return [dequantize_caches(found, scales) for found in results] if scales else results


def relative_error(reference: Array, got: Array) -> float:
    """``max |reference - got| / max |reference|`` over finite elements; infinite if shapes, NaNs or infinities differ.

    Integer, bool and string outputs must be equal: the error is 0 or infinite.
    """
    if reference.shape != got.shape or reference.dtype != got.dtype:
        return float("inf")
    if reference.size == 0:
        return 0.0
    if reference.dtype.kind not in "fc":
        return 0.0 if np.array_equal(reference, got) else float("inf")
    difference = largest = 0.0
    left, right = reference.reshape(-1), got.reshape(-1)
    for start in range(0, left.size, _CHUNK):
        a, b = (array[start : start + _CHUNK].astype(np.float64) for array in (left, right))
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return float("inf")
        a, b = a[finite], b[finite]
        difference = max(difference, float(np.abs(a - b).max(initial=0.0)))
        largest = max(largest, float(np.abs(a).max(initial=0.0)))
    return difference / max(largest, 1e-30) if difference else 0.0


def compare(reference: Results, got: Results) -> tuple[float, str]:
    """The largest relative error over all samples and outputs, and the output that has it."""
    worst, name = 0.0, ""
    for before, after in zip(reference, got, strict=True):
        for output in before:
            error = relative_error(before[output], after[output])
            if error > worst:
                worst, name = error, output
    return worst, name


def compare_tokens(samples: Sequence[Mapping[str, Array]], reference: Results, got: Results) -> tuple[float, str]:
    """``compare``, without positions that ``attention_mask`` leaves out: what is rounded drifts there, unheeded."""
    left, right = (
        [results_of_tokens(sample, result) for sample, result in zip(samples, results, strict=True)]
        for results in (reference, got)
    )
    return compare(left, right)


def first_difference(
    before: ir.Model, after: ir.Model, feeds: Sequence[Mapping[str, Array]], tolerance: float
) -> tuple[str, float] | None:
    """Finds where two versions of a model start to differ.

    Values that both graphs have under the same name are exposed as outputs of both; the first one in the order of
    ``after`` that differs beyond ``tolerance`` is returned as ``(node, error)``, or None if none does.
    """
    made_before = {value.name: value for node in before.graph for value in node.outputs if value.name}
    common = [
        (value.name or "", node)
        for node in after.graph
        for value in node.outputs
        if value.name in made_before
        and isinstance(value.type, ir.TensorType)
        and made_before[value.name].type == value.type
    ]
    step = max(1, len(common) // _MAX_PROBES)
    probes = common[::step]
    names = [name for name, _ in probes]
    left, right = expose(before, names), expose(after, names)
    results = zip(run_reference(left, feeds[:1]), run_reference(right, feeds[:1]), strict=True)
    for old, new in results:
        for name, node in probes:
            error = relative_error(old[name], new[name])
            if error > tolerance:
                return f"{node.name} ({node.op_type}), value {name}", error
    return None
