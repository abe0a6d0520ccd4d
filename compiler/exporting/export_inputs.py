"""The example call that is exported: how its tensors are named, which dims are dynamic, and other inputs like it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...runtime.errors import ExportError

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class ExampleCall:
    """``module(*args, **kwargs)``, taken apart.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments, in the order of ``forward``'s signature (the order of the ONNX inputs).
        names: the tensors' names, in order: the parameter's name, and for a nested one the path, ``past.0.key``.
        tensors: the tensors themselves, in the same order.
        dims: for each tensor, axis -> wanted name of its dynamic dims; ``""`` where the user gave none.
        bounds: smallest and largest size of a named dim, where the user gave a ``torch.export.Dim`` with limits.
        torch_shapes: ``dynamic_shapes`` in the form torch wants, or None if everything is static.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    dims: tuple[dict[int, str], ...]
    bounds: dict[str, tuple[int, int]]
    torch_shapes: dict[str, Any] | None

    def rebuilt(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with ``tensors`` in place of the example's; nothing is shared with the example's containers."""
        import torch
        from torch.utils import _pytree as pytree

        remaining = iter(tensors)
        return pytree.tree_map(
            lambda leaf: next(remaining) if isinstance(leaf, torch.Tensor) else leaf, (self.args, self.kwargs)
        )


def bind(module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any] | None, dynamic_shapes: Any) -> ExampleCall:
    """Matches the arguments and ``dynamic_shapes`` with the signature of ``module.forward``.

    Raises:
        ExportError: the arguments or ``dynamic_shapes`` do not fit the signature.
    """
    import torch
    from torch.utils import _pytree as pytree

    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    args, kwargs = _without_aliases(args, kwargs or {})
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(
            f"The arguments do not fit {type(module).__name__}.forward{signature}: {error}.",
            "Give positional arguments as a tuple in `args` and the others in `kwargs`.",
        ) from error
    ordered = {name: kwargs[name] for name in _keyword_order(signature, kwargs)}
    if dynamic_shapes is not None and hasattr(dynamic_shapes, "dynamic_shapes"):  # torch's ShapesCollection and kin
        dynamic_shapes = dynamic_shapes.dynamic_shapes(module, args, ordered)

    walk = _Walk()
    arguments = _unpack_var_keyword(signature, bound.arguments)
    specs = _by_name(dynamic_shapes, arguments)
    shapes = {name: walk.visit(name, value, specs.get(name)) for name, value in arguments.items()}
    flat = [leaf for leaf in pytree.tree_leaves((args, ordered)) if isinstance(leaf, torch.Tensor)]
    if [id(tensor) for tensor in flat] != [id(tensor) for tensor in walk.tensors]:
        raise ExportError(
            "The arguments hold tensors in a container that cannot be taken apart.",
            "Pass tensors, or tuples, lists and dicts of tensors; put a module around yours that builds the rest.",
        )
    return ExampleCall(
        args,
        ordered,
        tuple(walk.names),
        tuple(walk.tensors),
        tuple(walk.dims),
        walk.bounds,
        shapes if dynamic_shapes is not None else None,
    )


def _without_aliases(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies a tensor that is given twice.

    Else torch traces the module as if the two inputs were always one: ``nn.MultiheadAttention(x, x, x)`` would become a
    graph that ignores its inputs ``key`` and ``value``.
    """
    import torch
    from torch.utils import _pytree as pytree

    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in seen:
            return leaf.detach().clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map(once, (args, dict(kwargs)))


class _Walk:
    """Visits the arguments together with their dynamic-shape specifications."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        self.dims: list[dict[int, str]] = []
        self.bounds: dict[str, tuple[int, int]] = {}

    def visit(self, name: str, value: Any, spec: Any) -> Any:
        """Records the tensors in ``value``; returns ``spec`` in torch's form."""
        import torch

        if isinstance(value, torch.Tensor):
            return self._tensor(name, value, spec)
        if isinstance(value, Mapping):
            specs = _by_name(spec, value, f"{name}.")
            return {key: self.visit(f"{name}.{key}", child, specs.get(key)) for key, child in value.items()}
        if isinstance(value, (list, tuple)):
            specs = [None] * len(value) if spec is None else list(spec)
            if len(specs) != len(value):
                raise ExportError(
                    f"dynamic_shapes has {len(specs)} entries for {name}, which has {len(value)} items.",
                    "Give one entry for each item, None for a static one.",
                )
            items = [self.visit(f"{name}.{i}", *pair) for i, pair in enumerate(zip(value, specs, strict=True))]
            return items if isinstance(value, list) else tuple(items)
        return None

    def _tensor(self, name: str, tensor: torch.Tensor, spec: Any) -> dict[int, Any]:
        axes: dict[int, Any] = dict(enumerate(spec)) if isinstance(spec, (list, tuple)) else dict(spec or {})
        wrong = [axis for axis in axes if not -tensor.dim() <= axis < tensor.dim()]
        if wrong:
            raise ExportError(
                f"dynamic_shapes names axis {wrong[0]} of {name}, whose shape is {list(tensor.shape)}.",
                "Number the axes from 0.",
            )
        shapes: dict[int, Any] = {}
        wanted: dict[int, str] = {}
        for axis, dim in axes.items():
            if dim is not None and not isinstance(dim, int):
                axis %= tensor.dim()
                shapes[axis], label = self._dim(dim)
                if label is not None:
                    wanted[axis] = label
        self.names.append(name)
        self.tensors.append(tensor)
        self.dims.append(wanted)
        return shapes

    def _dim(self, dim: Any) -> tuple[Any, str | None]:
        """torch's object for ``dim`` and its label: a name, ``""`` for dynamic without a name, None for static."""
        from torch.export import Dim

        if isinstance(dim, str):
            if not dim.isidentifier():
                raise ExportError(f"{dim!r} cannot name a dimension.", "Use a plain name such as 'batch'.")
            # DYNAMIC, not Dim(name): it accepts dims that depend on others (total = past + new), and still refuses
            # to make the dim static behind our back.
            return Dim.DYNAMIC, dim
        if isinstance(dim, Dim):
            name = str(getattr(dim, "__name__", ""))
            if not name.isidentifier():  # a derived dim such as 2 * batch is named by what it derives from
                return dim, ""
            largest = getattr(dim, "max", None)  # torch's own infinity where there is no limit
            self.bounds[name] = (getattr(dim, "min", 0), largest if isinstance(largest, int) else 2**31)
            return dim, name
        return dim, None if dim is Dim.STATIC else ""


def _by_name(spec: Any, arguments: Mapping[str, Any], path: str = "") -> Mapping[str, Any]:
    """``spec``, which may be a mapping with some keys or a sequence with all, as a mapping."""
    if spec is None:
        return {}
    if not isinstance(spec, Mapping):
        return dict(zip(arguments, spec, strict=False))
    unknown = [key for key in spec if key not in arguments]
    if unknown:
        raise ExportError(
            f"dynamic_shapes names {path}{unknown[0]}, which is not among the inputs: "
            f"{', '.join(f'{path}{name}' for name in arguments)}.",
            "Use the names of forward()'s parameters.",
        )
    return spec


def _keyword_order(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> Iterator[str]:
    yield from (name for name in signature.parameters if name in kwargs)
    yield from (name for name in kwargs if name not in signature.parameters)


def _unpack_var_keyword(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` by parameter, with what ``**kwargs`` took lifted to the top."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        else:
            flat[name] = value
    return flat
