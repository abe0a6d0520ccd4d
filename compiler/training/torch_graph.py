"""An ONNX graph as a torch module: the same operators in the same order, its weights as parameters."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from ...runtime.errors import PassError
from ..graph import MICROSOFT, Array, opset
from .roles import FLOATS, is_constant, kind_of
from .table import DTYPES, Call, Operator
from .torch_ops import find, require
from .weights import CodedWeight, FloatWeight, as_tensor, nearest_float, read_stored, unreshaped


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    call: Call
    entry: Operator
    inputs: tuple[ir.Value | None, ...]
    done: tuple[ir.Value, ...]
    """Values that nobody reads after this step."""


class TorchGraph(nn.Module):
    """The main graph of a model as a module.

    Trained are the constants that are weights by their place: matrices, tables, filters, biases, gains; also those
    behind DequantizeLinear, in MatMulNBits and GatherBlockQuantized. Not trained: single numbers, masks, tables of
    angles, running statistics, scales of activations. Zeros of matrices stay zero.

    Integer tensors are computed where shapes are needed: on the CPU, except what depends on an input.

    Args:
        model: the model; ``write`` changes it.
        outputs: names of the values that ``forward`` returns; empty: the graph's outputs.
        exclude: patterns of initializers that are not trained.
        origin: a model that the integer weights of ``model`` may have been rounded from.
        device: where to compute.

    Raises:
        PassError: an operator that torch does not execute, or no such value.
    """

    def __init__(
        self,
        model: ir.Model,
        outputs: Sequence[str] = (),
        *,
        exclude: Sequence[str] = (),
        origin: ir.Model | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.model, self.device = model, device
        self.outputs = _values(model, outputs) if outputs else list(model.graph.outputs)
        self._weight_of: dict[ir.Value, int] = {}
        self._constants: dict[ir.Value, Tensor] = {}
        self.weights = nn.ModuleList()
        nodes = self._needed()
        require(nodes)
        self._make_weights(nodes, exclude, origin)
        self._steps = list(self._plan(nodes))
        self.to(device)

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name. Names that are no inputs are ignored."""
        known: dict[ir.Value, Tensor] = {
            value: feeds[value.name or ""] for value in self.model.graph.inputs if (value.name or "") in feeds
        }
        for step in self._steps:
            arguments = [self._read(value, known) for value in step.inputs]
            results = step.entry.run(step.call, *_placed(arguments, step.entry.host))
            made = (results,) if isinstance(results, Tensor) else results
            for value, result in zip(step.call.node.outputs, made, strict=False):
                if result is not None:
                    known[value] = result
            for value in step.done:
                known.pop(value, None)
        found = {value.name or "": (value, self._read(value, known)) for value in self.outputs}
        return {name: _typed(value, result) for name, (value, result) in found.items() if result is not None}

    def write(self) -> int:
        """Writes the trained weights back into the model's initializers; returns how many there are."""
        weights = list(self.trained())
        for weight in weights:
            for value, tensor in weight.tensors().items():
                value.const_value = tensor
        return len(weights)

    def trained(self) -> Iterator[FloatWeight | CodedWeight]:
        """The weights that are trained, in the order of the graph."""
        for weight in self.weights:
            if isinstance(weight, (FloatWeight, CodedWeight)) and weight.latent.requires_grad:
                yield weight

    def _read(self, value: ir.Value | None, known: dict[ir.Value, Tensor]) -> Tensor | None:
        if value is None or value in known:
            return None if value is None else known[value]
        if value in self._weight_of:
            known[value] = self.weights[self._weight_of[value]]()
            return known[value]
        return self._constants[value]

    def _needed(self) -> list[ir.Node]:
        """The nodes that the outputs depend on, in order; those that only unpack constants left out."""
        wanted = set(self.outputs)
        kept: list[ir.Node] = []
        for node in reversed(list(self.model.graph)):
            if not any(value in wanted for value in node.outputs) or node.op_type == "Constant":
                continue
            if node.op_type == "DequantizeLinear" and read_stored(node) is not None:
                continue
            kept.append(node)
            wanted.update(value for value in _inputs(node) if value is not None)
        return kept[::-1]

    def _make_weights(self, nodes: list[ir.Node], exclude: Sequence[str], origin: ir.Model | None) -> None:
        read = dict.fromkeys(value for node in nodes for value in _inputs(node) if value is not None)
        coded_before: dict[tuple[ir.Value, ir.Value], int] = {}
        floats: list[Array] | None = None
        for value in [*read, *self.outputs]:
            if value in self._weight_of or value in self._constants:
                continue
            maker = value.producer()
            coded = (
                maker if maker is not None and maker.op_type == "DequantizeLinear" else _reader_of_codes(value, nodes)
            )
            stored = read_stored(coded) if coded is not None else None
            name = (stored.values[0].name if stored is not None else value.name) or ""
            excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
            if stored is not None and stored.values in coded_before:
                self._weight_of[value] = coded_before[stored.values]
                continue
            if stored is not None:
                excluded = excluded or not _read_together(stored.values)
                floats = _floats_of(origin) if floats is None else floats
                near = nearest_float(stored, floats)
                weight: nn.Module = CodedWeight(stored, near, not excluded and _owned(stored.values))
                coded_before[stored.values] = len(self.weights)
            elif is_constant(value) and not excluded and (kind := kind_of(value)):
                weight = FloatWeight(value, kind == "matrix")
            else:
                if is_constant(value) or value.is_initializer():  # the default of an input that need not be fed
                    tensor = as_tensor(ir.convenience.get_const_tensor(value))
                    self._constants[value] = tensor.to(self.device) if tensor.is_floating_point() else tensor
                continue
            weight.requires_grad_(not excluded)
            self._weight_of[value] = len(self.weights)
            self.weights.append(weight)

    def _plan(self, nodes: list[ir.Node]) -> Iterator[_Step]:
        """Steps with what each of them reads last."""
        last: dict[ir.Value, int] = {}
        for number, node in enumerate(nodes):
            last |= {value: number for value in _inputs(node) if value is not None}
        kept = set(self.outputs)
        for number, node in enumerate(nodes):
            entry = find(node)
            if entry is None:
                raise PassError(f"Training cannot execute {node.op_type}.")
            version = self.model.opset_imports.get(node.domain, 0) if node.domain else opset(self.model)
            inputs = _inputs(node)
            done = tuple({value for value in inputs if value is not None and last[value] == number} - kept)
            yield _Step(Call(node, version), entry, inputs, done)


def _inputs(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """What the step of ``node`` reads; a packed weight stands for itself, scales and zero points."""
    if node.domain == MICROSOFT and node.op_type == "MatMulNBits":
        return node.inputs[0], unreshaped(node.inputs[1]), node.inputs[5] if len(node.inputs) > 5 else None
    if node.domain == MICROSOFT and node.op_type == "GatherBlockQuantized":
        return unreshaped(node.inputs[0]), node.inputs[1]
    return tuple(node.inputs)


def _reader_of_codes(value: ir.Value, nodes: list[ir.Node]) -> ir.Node | None:
    """The MatMulNBits or GatherBlockQuantized that reads ``value`` as its codes."""
    if value.const_value is None or value.dtype != ir.DataType.UINT8:
        return None
    for node in nodes:
        if node.domain == MICROSOFT and node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            index = 1 if node.op_type == "MatMulNBits" else 0
            if unreshaped(node.inputs[index]) is value:
                return node
    return None


def _owned(values: tuple[ir.Value, ir.Value]) -> bool:
    """Whether the scales belong to these codes alone."""
    codes, scales = values
    return all(codes in [unreshaped(value) for value in use.node.inputs[:2]] for use in scales.uses())


def _read_together(values: tuple[ir.Value, ir.Value]) -> bool:
    """Whether the codes are read with these scales everywhere."""
    codes, scales = values
    readers = [use.node for use in codes.uses()]
    readers += [use.node for node in readers if node.op_type == "Reshape" for use in node.outputs[0].uses()]
    return all(scales in node.inputs for node in readers if node.op_type != "Reshape")


def _placed(arguments: list[Tensor | None], host: frozenset[int]) -> list[object]:
    """Host inputs as Python numbers; the others on one device."""
    devices = {item.device for at, item in enumerate(arguments) if item is not None and at not in host}
    target = next((device for device in devices if device.type != "cpu"), None) if len(devices) > 1 else None
    placed: list[object] = []
    for at, item in enumerate(arguments):
        if item is None:
            placed.append(None)
        elif at in host:
            placed.append(item.tolist())
        else:
            placed.append(item if target is None else item.to(target))
    return placed


def _typed(value: ir.Value, result: Tensor) -> Tensor:
    """Codes are floats on the way; an output has the type that the graph says."""
    wanted = DTYPES.get(value.dtype) if value.dtype is not None else None
    return result if wanted is None or wanted == result.dtype else result.to(wanted)


def _values(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    known = {value.name: value for node in model.graph for value in node.outputs}
    missing = [name for name in names if name not in known]
    if missing:
        raise PassError(f"The graph does not make {', '.join(missing[:5])}.", "Check the names of the values.")
    return [known[name] for name in names]


def _floats_of(model: ir.Model | None) -> list[Array]:
    """The float matrices and filters of a model."""
    found: list[Array] = []
    for value in model.graph.initializers.values() if model is not None else ():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in FLOATS and len(tensor.shape) >= 2:
            found.append(np.asarray(tensor.numpy(), np.float32))
    return found
