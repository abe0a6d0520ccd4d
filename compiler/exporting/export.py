"""``export``: a PyTorch module becomes an ``onnx_ir.Model`` that is checked against it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ...runtime.errors import ExportError
from ..graph import Names
from ..graph import opset as opset_of
from .export_check import call_module, check_other_shapes, check_parity, named_outputs
from .export_dims import name_dims
from .export_errors import explain
from .export_inputs import ExampleCall, bind
from .export_weights import tidy

if TYPE_CHECKING:
    import torch

# torch.__trace has a level of its own and passes empty records on to the root logger.
_NOISY = ("torch", "torch.__trace", "onnxscript", "onnx_ir", "transformers")


def export(
    module: torch.nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    check: bool = True,
) -> ir.Model:
    """Exports a PyTorch module through ``torch.onnx.export(dynamo=True)``, without its noise.

    Inputs are named after the parameters of ``forward`` (nested ones by path: ``past.0.key``), outputs after the keys
    of a returned dict or ``ModelOutput``, else ``output``, ``output_1``... The module is exported in eval mode and its
    training flags are restored. Weights are shared with the module, not copied: changing them changes the model. A
    weight that several layers use is one initializer.

    Args:
        module: the module to export.
        args: positional example inputs, a tensor or a tuple; None, numbers and nested containers are fine.
        kwargs: example inputs given by keyword.
        dynamic_shapes: which sizes may vary: ``{"input_ids": {0: "batch", 1: "sequence"}}`` or
            ``{"input_ids": ("batch", "sequence")}``, or anything ``torch.export.export`` takes. Inputs left out are
            static. The names become the model's ``dim_param`` names; the same name means the same size.
        opset: ONNX opset, torch's default (20 in torch 2.13) if None.
        check: compare with the module in ONNX Runtime, on the example and, if sizes may vary, on random inputs with
            other sizes. An fp32 output may differ by 1e-4 of the largest element (see ``export_check.TOLERANCE``).

    Raises:
        ExportError: the module cannot be exported, or the exported graph disagrees with it.
    """
    import torch

    if not isinstance(module, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ExportError(f"A {type(module).__name__} is not a torch.nn.Module.", "Wrap functions in a module.")
    call = bind(module, args, kwargs, dynamic_shapes)
    with quiet(), evaluating(module), torch.no_grad():
        outputs = _run_example(module, call)
        model = _trace(module, call, opset)
        tidy(model)
        _name_values(model, call.names, [name for name, _ in outputs])
        name_dims(model, call)
        model.graph.name = type(module).__name__
        if check:
            feeds = dict(zip(call.names, call.tensors, strict=True))
            check_parity(model, feeds, [tensor for _, tensor in outputs], "the example inputs")
            check_other_shapes(model, call, lambda args, kwargs: call_module(module, args, kwargs))
    return model


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Silences the warnings and log lines of torch, onnxscript and transformers; what matters is in our errors."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Generator[None]:
    """Puts ``module`` in eval mode, and each submodule back into its own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _run_example(module: torch.nn.Module, call: ExampleCall) -> list[tuple[str, torch.Tensor]]:
    """What the module itself computes, named."""
    import torch
    from torch.utils import _pytree as pytree

    name = type(module).__name__
    try:
        result = call_module(module, call.args, call.kwargs)
    except Exception as error:
        raise ExportError(
            f"{name} itself fails on the example inputs: {type(error).__name__}: {error}.", "Check args and kwargs."
        ) from error
    for leaf in pytree.tree_leaves(result):
        if leaf is not None and not isinstance(leaf, torch.Tensor):
            raise ExportError(
                f"{name} returns a {type(leaf).__name__}, which a graph cannot.",
                "Return tensors, tuples and dicts of them, or a dataclass registered with "
                "torch.export.register_dataclass. For a Hugging Face language model use export_causal_lm, or pass "
                "use_cache=False.",
            )
    return named_outputs(result)


def _trace(module: torch.nn.Module, call: ExampleCall, opset: int | None) -> ir.Model:
    import torch

    noise = io.StringIO()  # torch prints the graph of a failed attempt to stderr
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            program = torch.onnx.export(
                module,
                call.args,
                kwargs=call.kwargs,
                dynamic_shapes=call.torch_shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,  # `tidy` does it, without storing tied weights twice
                verbose=False,
            )
    except Exception as error:
        raise explain(error, type(module).__name__) from error
    assert program is not None  # None only comes from the torchscript exporter
    model = program.model
    if opset is not None and opset_of(model) != opset:
        raise ExportError(
            f"torch can export {type(module).__name__} as opset {opset_of(model)}, but not as opset {opset}.",
            f"Use opset={opset_of(model)}.",
        )
    return model


def _name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names the graph's inputs and outputs; other values that hold such a name get another."""
    graph = model.graph
    if (len(inputs), len(outputs)) != (len(graph.inputs), len(graph.outputs)):
        raise ExportError(
            f"The exported graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, the module "
            f"{len(inputs)} and {len(outputs)}.",
            "Pass and return plain tensors, or tuples and dicts of them.",
        )
    outputs = [f"{name}_out" if name in inputs else name for name in outputs]
    wanted = dict(zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True))
    names = Names(model)
    others = [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    taken = set(wanted.values())
    for value in others:
        if value.name in taken and value not in wanted:
            value.name = names.fresh(f"{value.name}_value")
    for value, name in wanted.items():
        value.name = name
