"""The table of operators that torch executes, and how an operator gets into it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One node, as the function of its operator sees it.

    Attributes:
        node: the node; its values give element types and say which outputs are wanted.
        opset: version of the node's domain.
    """

    node: ir.Node
    opset: int

    @functools.cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Attributes as Python values."""
        return {name: item.value for name, item in self.node.attributes.items()}

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute ``name``, or ``default``."""
        return self.attributes.get(name, default)


Function = Callable[..., "Tensor | tuple[Tensor | None, ...]"]


def accept(node: ir.Node) -> str:
    """Refuses nothing."""
    return ""


@dataclasses.dataclass(frozen=True)
class Operator:
    """How torch executes one operator.

    Attributes:
        run: ``run(call, *inputs)``; None for inputs that are left out at the end or in between.
        host: indices of inputs that are read as Python numbers or lists: shapes, axes, sizes.
        refuse: says why a node of this operator cannot be executed; empty if it can.
    """

    run: Function
    host: frozenset[int] = frozenset()
    refuse: Callable[[ir.Node], str] = accept


TABLE: dict[tuple[str, str], Operator] = {}
"""(domain, operator) -> how torch executes it."""


def operator(
    *names: str, domain: str = "", host: tuple[int, ...] = (), refuse: Callable[[ir.Node], str] = accept
) -> Callable[[Function], Function]:
    """Enters a function into the table under ``names``; may be used several times on one function."""

    def enter(function: Function) -> Function:
        for name in names:
            TABLE[domain, name] = Operator(function, frozenset(host), refuse)
        return function

    return enter


def only(**allowed: Any) -> Callable[[ir.Node], str]:
    """Refuses nodes with an attribute among ``allowed`` that has another value than the one given."""

    def refuse(node: ir.Node) -> str:
        for name, expected in allowed.items():
            found = node.attributes.get(name)
            if found is not None and found.value != expected:
                return f"{name}={found.value!r}"
        return ""

    return refuse


def given(node: ir.Node, *indices: int) -> list[int]:
    """Those of the inputs ``indices`` that ``node`` has."""
    return [index for index in indices if index < len(node.inputs) and node.inputs[index] is not None]
