"""Q, K and V of a grouped-query attention as one matrix product that the kernel takes as it is."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...compiler.base import Gate
from ...compiler.graph import MICROSOFT, is_op
from .fuse_qkv import FuseQKV


@dataclasses.dataclass(frozen=True)
class PackQKV(FuseQKV):
    """Merges the projections in front of ``GroupQueryAttention``, rule 2 of ``fuse-qkv``: nothing is copied.

    One product instead of three reads the same weights with fewer calls, which pays for one token and costs nothing for
    many, on CPU and CUDA.
    """

    name: ClassVar[str] = "pack-qkv"
    gate: ClassVar[Gate] = "not-slower"

    def anchors(self, model: ir.Model) -> list[ir.Node]:
        """The attentions whose projections are merged."""
        return [node for node in super().anchors(model) if is_op(node, "GroupQueryAttention", domain=MICROSOFT)]
