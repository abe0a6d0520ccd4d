"""Divides the weights of a graph over ranks: tensor parallelism."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import onnx_ir as ir

from ...compiler.base import Gate, Outcome, Pass, PassContext
from ...compiler.graph import weight_bytes
from ...compiler.placement import Placement, fingerprint, is_placed
from ...runtime.errors import ModelError, PlanError
from ...runtime.feeds import make_feeds
from ...runtime.generation.causal_lm import read_causal_lm
from ...runtime.node_profile import NodeProfile, Shape, profile_nodes, set_types
from .sharder import Sharder

_RULE = "columns and rows of weights over ranks"
# Sizes that tell the dims apart. GroupQueryAttention takes several rows with a past only token by token.
_SIZES = ({"batch": 3, "sequence": 7, "past_sequence": 5}, {"batch": 3, "sequence": 1, "past_sequence": 5})


@dataclasses.dataclass(frozen=True)
class PartitionTensor(Pass):
    """Divides the weights over ``ranks``, each with a part of every layer (Megatron-LM, Shoeybi et al., 2019).

    1. Projections in front of attention: columns, by key/value groups; caches likewise. Behind: rows, then AllReduce.
    2. Gate, up or first layer of an MLP: columns. Down or second layer: rows, then AllReduce.
    3. The head: columns (vocabulary), then AllGather. Tables that are large: width, then AllGather.
    4. Quantized products likewise (MatMulNBits by whole blocks, weights behind DequantizeLinear, MatMulInteger,
       MatMulIntegerToFloat); where their sum cannot be taken in parts (QLinearMatMul rounds it, dynamic quantization
       needs the range of the whole, a block has heads of two ranks): columns, then AllGather.

    It reads what the operators mean, fused or not: MatMul, Gemm, Attention-23, MultiHeadAttention, GroupQueryAttention
    (Q, K, V packed or not), merged gate and up, rotations, reshapes. The graph itself stays as it is; what differs by
    rank goes into its metadata (``onnxlathe.placement``), and ``Compiled.save_ranks`` writes a file a rank, with the
    exchanges as com.microsoft.AllReduce and AllGather. Refusals name the weights that every rank has whole, and where a
    division ended.

    Args:
        ranks: how many.

    Raises:
        PlanError: heads that ``ranks`` does not divide, or nothing that can be divided.

    Pays where a model is too large for one device, or its weights take long to read.
    """

    name: ClassVar[str] = "partition-tensor"
    gate: ClassVar[Gate] = "off"

    ranks: int = 2

    def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
        outcome = Outcome()
        asked = dataclasses.asdict(self)
        if is_placed(model, "ranks", asked):
            return outcome
        if self.ranks < 2:
            raise PlanError(f"The number of ranks is {self.ranks}.", "Give at least 2.")
        sharder = Sharder(model, self.ranks, _shapes(model, context), _cache(model))
        edits = sharder.search()
        for node, reason in sharder.reasons.items():
            if reason.indivisible:
                raise PlanError(
                    f"At node {node.name}: {reason}.",
                    "Take a number of ranks that divides the query heads and the key/value heads.",
                )
            outcome.refuse(node, _RULE, str(reason))
        for node, value in sharder.whole_weights():
            if node not in sharder.reasons:
                outcome.refuse(node, _RULE, f"every rank has all of {value.name}: {node.op_type} is not divided")
        if not edits["collectives"]:
            raise PlanError(
                "No weight of this model can be divided over ranks.", "Tensor parallelism needs MatMul or Gemm layers."
            )
        total = weight_bytes(model)
        each = total - _saved(model, edits)
        figures = {"weight_bytes": total, "rank_weight_bytes": each, "collectives": len(edits["collectives"])}
        Placement("ranks", self.ranks, asked, fingerprint(model), figures, edits).store(model)
        outcome.counts["weights divided"] = len(edits["slices"])
        outcome.notes.append(f"each rank has {each / total:.3f} of the weights; {figures['collectives']} collectives")
        return outcome


def _shapes(model: ir.Model, context: PassContext) -> dict[str, Shape]:
    """Shapes of all values of the main graph in one run; values whose types are not known get them."""
    samples = [make_feeds(model, context.seed, 1, sizes)[0] for sizes in _SIZES]
    profiles: dict[str, NodeProfile] = {}
    for feeds in (*samples, *itertools.islice(context.feeds, 1)):
        with contextlib.suppress(ModelError):
            profiles = profile_nodes(model, feeds, threads=context.threads, runs=1)
            break
    else:
        raise PlanError("The model does not run on samples made for it.", "Give samples (calibration=...).")
    set_types(model, profiles)
    shapes: dict[str, Shape] = {name: array.shape for name, array in feeds.items()}
    for node in model.graph:
        made = [value.name or "" for value in node.outputs if value.name]
        seen = profiles.get(node.name or "")
        if seen is not None and len(seen.outputs) == len(made):
            shapes.update(zip(made, seen.outputs, strict=True))
    return shapes


def _cache(model: ir.Model) -> dict[str, str]:
    with contextlib.suppress(ModelError):  # not a language model
        return {tensor.past: tensor.present for tensor in read_causal_lm(model).cache}
    return {}


def _saved(model: ir.Model, edits: Mapping[str, Any]) -> int:
    """Bytes of weights that the fullest rank does not have; a weight read twice in different parts is kept twice."""
    nodes = {node.name: node for node in model.graph}
    parts: dict[ir.Value, dict[str, float]] = {}
    uses: Counter[ir.Value] = Counter()
    for edit in edits["slices"]:
        value = nodes[edit["node"]].inputs[edit["input"]]
        assert value is not None
        most = max(sum(stop - start for start, stop in ranges) for ranges in edit["ranges"])
        parts.setdefault(value, {})[f"{edit['axis']} {edit['ranges']}"] = most / edit["total"]
        uses[value] += 1
    saved = 0.0
    for value, kept in parts.items():
        whole = len(value.uses()) > uses[value]  # somebody still reads all of it
        size = value.const_value.nbytes if value.const_value is not None else 0
        saved += size * (1 - whole - sum(kept.values()))
    return int(saved)
