"""What passes that prune promise, told again without them: the original with zeros for what went, and true figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxlathe.compiler.base import Outcome, Pass
from onnxlathe.compiler.budget import split
from onnxlathe.compiler.graph import PASS_KEY, weight_bytes
from onnxlathe.compiler.padding import cache_names, results_of_tokens
from onnxlathe.passes import Distill, PruneAdaptive, PruneDepth, PruneSparse, PruneWidth
from onnxlathe.passes.linear_layers import LinearLayer, linear_layer
from onnxlathe.passes.pruning.blocks import residual_stream
from onnxlathe.passes.pruning.prune_width import WIDTH_KEY
from onnxlathe.runtime.inference import open_session, run_session, session_options

from .builder import Array
from .generate import Feeds


def masked(step: Pass, before: ir.Model, after: ir.Model) -> ir.Model | None:
    """The graph before with what went set to zero, which ``after`` must equal; None where weights were fitted."""
    if isinstance(step, PruneWidth) and not step.refit:
        return _without_columns(before, after)
    if isinstance(step, PruneDepth) and step.method != "replace":
        return _without_halves(before, after)
    if isinstance(step, PruneSparse) and not step.refit and step.method in ("magnitude", "wanda"):
        return _without_weights(before, after)
    return None


def false_claim(
    step: Pass, before: ir.Model, after: ir.Model, outcome: Outcome, teacher: ir.Model, feeds: Sequence[Feeds]
) -> str:
    """What the pass reports, or was told to do, and is not so; empty if there is nothing."""
    notes = [note.removeprefix("bytes of weights: ") for note in outcome.notes if note.startswith("bytes of weights")]
    share = weight_bytes(after) / max(weight_bytes(before), 1)
    if notes and notes[-1] != f"{share:.0%} of before":
        return f"says that {notes[-1]} of the bytes are left, and {share:.1%} are"
    wanted = step.bytes if isinstance(step, PruneAdaptive) and step.quality is None else None
    wanted = step.bytes_target if isinstance(step, PruneWidth) else wanted
    if wanted is not None and share > wanted:
        return f"{share:.3f} of the bytes are left, {wanted} were asked for"
    if isinstance(step, PruneSparse):
        return _zeros(step, after)
    if isinstance(step, Distill):
        return _learned(step, before, after, teacher, feeds)
    return ""


def _without_weights(before: ir.Model, after: ir.Model) -> ir.Model:
    """The weights of ``before`` with the zeros of ``after``."""
    model, small = before.clone(), _arrays(after)
    for name, array in _arrays(before).items():
        other = small.get(name)
        if other is not None and other.shape == array.shape and array.dtype.kind == "f":
            zeroed = np.where(other == 0, other, array)
            model.graph.initializers[name].const_value = ir.Tensor(zeroed, name=name)
    return model


def _without_columns(before: ir.Model, after: ir.Model) -> ir.Model | None:
    """The layers that were cut with zeros for the columns that are not there any more, found by their numbers."""
    model = before.clone()
    nodes = {node.name: node for node in model.graph}
    arrays = _arrays(before)
    for node in after.graph:
        old = nodes.get(node.name)
        if old is None or WIDTH_KEY not in node.metadata_props or WIDTH_KEY in old.metadata_props:
            continue
        layer, cut = linear_layer(old), linear_layer(node)
        if layer is None or cut is None:
            return None
        array = arrays[layer.weight.name or ""]
        matrix = layer.matrix(array)[0]
        kept = _columns(matrix, cut.matrix(_array(cut))[0])
        if kept is None:
            return None
        zeroed = np.zeros_like(matrix)
        zeroed[:, kept] = matrix[:, kept]
        layer.weight.const_value = ir.Tensor(layer.unmatrix(zeroed, array.shape), name=layer.weight.name)
    return model


def _columns(whole: Array, part: Array) -> list[int] | None:
    """The columns of ``whole`` that ``part``, which may lack rows too, has; None where that cannot be told."""
    sets = [set(column.tolist()) for column in whole.T]
    found: list[int] = []
    for column in part.T:
        fitting = [number for number, numbers in enumerate(sets) if set(column.tolist()) <= numbers]
        if len(fitting) != 1:
            return None
        found += fitting
    return found


def _without_halves(before: ir.Model, after: ir.Model) -> ir.Model:
    """The halves whose addition is gone add nothing; where they normalized the stream, they do that no more."""
    left = {node.name for node in after.graph}
    proto = ir.to_proto(before)
    nodes = {node.name: node for node in proto.graph.node}
    for half in residual_stream(before):
        if half.add.name in left:
            continue
        node, skip = nodes[(half.norm or half.add).name or ""], half.skip.name or ""
        if half.norm is None and node.op_type != "Add":  # fused with the normalization of the next half
            zero = onnx.helper.make_node("Sub", [skip, skip], [f"{node.name}_zero"])
            node.input[list(node.input).index(half.branch.name or "")] = zero.output[0]
            del node.input[4 if node.op_type == "SkipLayerNormalization" else 3 :]  # the branch's bias
            proto.graph.node.insert(list(proto.graph.node).index(node), zero)
        else:
            node.CopyFrom(onnx.helper.make_node("Identity", [skip], [half.out.name or ""], name=node.name))
    return ir.from_proto(proto)


def _zeros(step: PruneSparse, after: ir.Model) -> str:
    """Whether each weight has the zeros asked for."""
    for node in after.graph:
        layer = linear_layer(node)
        if layer is None or node.metadata_props.get(PASS_KEY) != step.name:
            continue
        array = _array(layer)
        if step.pattern is not None:
            most, of = (int(part) for part in step.pattern.split(":"))
            inputs = np.moveaxis(array, 1 if layer.out_axis == 0 else 0, -1)
            if (inputs != 0).reshape(-1, of).sum(axis=1).max() > most:
                return f"{layer.weight.name} has more than {step.pattern}"
        elif step.threshold is None and step.allocation == "uniform":
            share = float((array == 0).mean())
            if share <= step.sparsity - layer.groups / array.size:
                return f"{layer.weight.name} has {share:.3f} zeros, {step.sparsity} were asked for"
    return ""


def _learned(step: Distill, before: ir.Model, after: ir.Model, teacher: ir.Model, feeds: Sequence[Feeds]) -> str:
    """Whether zeros of matrices are zero still, and the samples held out show no loss."""
    small = _arrays(after)
    for name, array in _arrays(before).items():
        if array.ndim == 2 and array.dtype.kind == "f" and (small[name][array == 0] != 0).any():
            return f"zeros of {name} are not zero any more"
    held = list(split(feeds, step.held_out, 0)[1])
    caches = set(cache_names(before).values())
    taught, old, new = (_of_tokens(model, held, caches) for model in (teacher, before, after))
    lost, loss = (_distance(found, taught) for found in (old, new))
    return f"the held-out loss rose from {lost:.4g} to {loss:.4g}" if loss > lost * 1.001 else ""


def _of_tokens(model: ir.Model, feeds: Sequence[Feeds], caches: set[str]) -> list[dict[str, Array]]:
    """Outputs, padding and caches left out."""
    session = open_session(model, session_options(optimize=False))
    known = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs() if value.name not in caches]
    found = [run_session(session, {k: v for k, v in sample.items() if k in known}, names) for sample in feeds]
    return [results_of_tokens(sample, one) for sample, one in zip(feeds, found, strict=True)]


def _distance(found: list[dict[str, Array]], taught: list[dict[str, Array]]) -> float:
    """The mean over samples and float outputs of ``|y - t|^2 / |t|^2``."""
    parts: list[float] = []
    for one, other in zip(found, taught, strict=True):
        pairs = [(one[n].astype(np.float64), other[n].astype(np.float64)) for n in one if one[n].dtype.kind == "f"]
        parts.append(float(np.mean([np.square(y - t).sum() / max(np.square(t).sum(), 1e-30) for y, t in pairs])))
    return float(np.mean(parts))


def _arrays(model: ir.Model) -> dict[str, Array]:
    found = model.graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in found if value.const_value is not None}


def _array(layer: LinearLayer) -> Array:
    tensor = layer.weight.const_value
    assert tensor is not None
    return tensor.numpy()
