"""Does the exported graph compute what the module computes: on the example, and on inputs of other shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ...runtime.errors import ExportError, ModelError
from ..verify import relative_error, run_reference
from .export_inputs import ExampleCall

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
TOLERANCE = 1e-4
"""Largest ``max |onnx - torch| / max |torch|`` of an fp32 output. Both sum in their own order; 1e-6 is usual."""
HALF_TOLERANCE = 1e-2
"""The same for fp16 outputs, which have 11 bits of mantissa."""


def call_module(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``module(*args, **kwargs)`` on copies of the tensors, so that a forward that writes into them does no harm."""
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, (args, dict(kwargs))
    )
    return module(*args, **kwargs)


def named_outputs(result: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors in what a module returned, named.

    A dict's (or Hugging Face ``ModelOutput``'s) keys and a dataclass's or named tuple's fields name their values; a
    bare tensor or the first of a plain tuple is ``output``, then ``output_1``...; nested ones are paths:
    ``present.0.key``.
    """
    import torch
    from torch.utils import _pytree as pytree

    def visit(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield path or "output", value
        elif isinstance(value, Mapping):
            for key, child in value.items():
                yield from visit(child, f"{path}.{key}" if path else str(key))
        elif hasattr(value, "_asdict"):  # a named tuple
            yield from visit(value._asdict(), path)
        elif isinstance(value, (list, tuple)):
            for i, child in enumerate(value):
                yield from visit(child, f"{path}.{i}" if path else f"output_{i}" if i else "output")
        elif hasattr(value, "__dataclass_fields__"):
            yield from visit(dict(vars(value)), path)

    named = list(visit(result, ""))
    flat = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if [id(tensor) for _, tensor in named] == [id(tensor) for tensor in flat]:
        return named
    return [(f"output_{i}" if i else "output", tensor) for i, tensor in enumerate(flat)]


def to_numpy(name: str, tensor: torch.Tensor) -> Array:
    """``tensor`` as an array ONNX Runtime takes or can be compared with."""
    try:
        return tensor.detach().cpu().resolve_conj().numpy()
    except TypeError as error:
        raise ExportError(
            f"{name} is {tensor.dtype}, which cannot be checked on the CPU.", "Export with check=False."
        ) from error


def check_parity(
    model: ir.Model, feeds: Mapping[str, torch.Tensor], expected: Sequence[torch.Tensor], sample: str
) -> None:
    """Runs ``model`` without ONNX Runtime's optimizations and compares it with PyTorch.

    Args:
        model: the exported model.
        feeds: its inputs by name.
        expected: what PyTorch computed, in the order of the model's outputs.
        sample: what to call these inputs in the error.

    Raises:
        ExportError: an output differs by more than the tolerance, or the model does not run.
    """
    arrays = {name: to_numpy(f"Input {name!r}", tensor) for name, tensor in feeds.items()}
    try:
        (results,) = run_reference(model, [arrays])
    except ModelError as error:
        raise ExportError(
            f"ONNX Runtime cannot run the exported model on {sample}: {error.what}",
            "Make the dimension it fails on static, try another opset, or look at the graph with check=False.",
        ) from error
    for value, tensor in zip(model.graph.outputs, expected, strict=True):
        name = value.name or ""
        compare(name, to_numpy(f"Output {name!r}", tensor), results[name], sample)


def compare(name: str, expected: Array, got: Array, sample: str) -> None:
    """Raises ExportError if ``got`` differs from ``expected`` by more than the tolerance of its type."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        raise ExportError(
            f"Output {name!r} is {got.dtype}{list(got.shape)} in the exported model and "
            f"{expected.dtype}{list(expected.shape)} in PyTorch on {sample}.",
            "A size was baked into the graph: look for Python numbers computed from shapes in forward().",
        )
    error = relative_error(expected, got)
    tolerance = HALF_TOLERANCE if expected.dtype == np.float16 else TOLERANCE
    if not error <= tolerance:
        raise ExportError(
            f"Output {name!r} differs from PyTorch on {sample}: relative error {error:.1e}, allowed {tolerance:.0e}.",
            "Look for randomness in forward(), or for Python numbers computed from tensors, which are baked into the "
            "graph; check=False exports without this check.",
        )


def check_other_shapes(model: ir.Model, call: ExampleCall, run: Callable[..., Any]) -> None:
    """Checks parity on random inputs whose dynamic dims all have other sizes than the example's.

    Some modules take only some sizes (a multiple of 4, at most 512): several choices are tried until ``run``, the
    PyTorch module, accepts one.

    Raises:
        ExportError: the graph disagrees with the module, or the module accepts no other sizes.
    """
    example = _example_sizes(model, call)
    if not example:
        return
    refusal: Exception | None = None
    for sizes in _other_sizes(example, call.bounds):
        tensors = [
            _like(tensor, [_size(*pair, sizes) for pair in zip(value.shape or (), tensor.shape, strict=True)], seed)
            for seed, (value, tensor) in enumerate(zip(model.graph.inputs, call.tensors, strict=True))
        ]
        try:
            result = run(*call.rebuilt(tensors))
        except Exception as error:
            refusal = refusal or error
            continue
        names = [value.name or "" for value in model.graph.inputs]
        expected = [tensor for _, tensor in named_outputs(result)]
        sample = "random inputs with " + ", ".join(f"{name}={size}" for name, size in sizes.items())
        check_parity(model, dict(zip(names, tensors, strict=True)), expected, sample)
        _correct_shapes(model, expected, sizes)
        return
    raise ExportError(
        f"The module itself accepts no other sizes than the example's {example}, so dynamic shapes cannot be "
        f"checked; the first refusal was: {refusal}.",
        "Make the dimensions that cannot change static, give their limits by torch.export.Dim(name, min=, max=), or "
        "export with check=False.",
    ) from refusal


def _correct_shapes(model: ir.Model, outputs: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> None:
    """Infers all shapes anew if an output does not have the shape the graph declares.

    torch 2.13 does that to an ``nn.LSTM`` of dynamic length: the numbers are right, the declared length is the
    example's. A pass that believed it would break the model.
    """
    for value, tensor in zip(model.graph.outputs, outputs, strict=True):
        declared = [_size(*pair, sizes) for pair in zip(value.shape or (), tensor.shape, strict=True)]
        if declared != list(tensor.shape):
            break
    else:
        return
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    common.ShapeInferencePass()(model)


def _example_sizes(model: ir.Model, call: ExampleCall) -> dict[str, int]:
    """The example's size of each symbol in the input shapes (symbols that only appear in expressions excluded)."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(model.graph.inputs, call.tensors, strict=True):
        for dim, size in zip(value.shape or (), tensor.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value and dim.value.isidentifier():
                sizes.setdefault(dim.value, size)
    return sizes


def _other_sizes(example: dict[str, int], bounds: Mapping[str, tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Choices of sizes, all dims changed at first, each by another amount so that a mix-up shows."""
    number = {name: i for i, name in enumerate(example)}
    larger = {name: size + 1 + number[name] for name, size in example.items()}
    smaller = {name: max(1, size - 1 - number[name]) for name, size in example.items()}
    double = {name: 2 * size for name, size in example.items()}
    alone = [{**example, name: choice[name]} for choice in (larger, smaller) for name in example]
    seen = [example]
    for choice in (larger, smaller, double, *alone):
        within = {
            name: min(max(size, bounds[name][0]), bounds[name][1]) if name in bounds else size
            for name, size in choice.items()
        }
        if within not in seen:
            seen.append(within)
            yield within


def _size(dim: int | ir.SymbolicDim, example: int, sizes: Mapping[str, int]) -> int:
    """The value of ``dim`` (a name or an expression such as ``2*n``) under ``sizes``; the example's if it has none."""
    value = dim if isinstance(dim, int) else dim.evaluate(sizes)
    return value if isinstance(value, int) else example


def _like(example: torch.Tensor, shape: Sequence[int], seed: int) -> torch.Tensor:
    """A random tensor of ``shape`` in the manner of ``example``.

    Integers are drawn from the example's own, so that token ids stay within the embedding; floats lie between two of
    the example's. Two-valued tensors (masks) are repeated instead: drawing could leave a row with nothing to attend
    to. A float tensor of zeros is a placeholder, and becomes normal noise.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    values = example.detach().cpu().flatten()
    if not values.any():  # also an empty one
        noise = torch.randn(*shape, generator=generator) if values.is_floating_point() else torch.zeros(*shape)
        return noise.to(example.dtype).to(example.device)
    if torch.unique(values).numel() <= 2:
        repeats = [-(-new // old) for new, old in zip(shape, example.shape, strict=True)]
        return example.detach().repeat(repeats)[tuple(slice(size) for size in shape)].clone()
    first, second = (values[torch.randint(values.numel(), tuple(shape), generator=generator)] for _ in range(2))
    if values.is_floating_point() and values.isfinite().all():
        first = torch.lerp(first.double(), second.double(), torch.rand(*shape, generator=generator).double())
    return first.to(example.dtype).to(example.device)
