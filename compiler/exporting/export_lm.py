"""``export_causal_lm``: a Hugging Face decoder becomes one graph that serves both prefill and decoding."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ...runtime.artifact import MAX_LENGTH_KEY
from ...runtime.errors import ExportError, ModelError
from ...runtime.generation.causal_lm import EOS_KEY
from ...runtime.inference import open_session, run_session, session_options
from .export import evaluating, export, quiet
from .export_check import compare, to_numpy
from .export_dims import rename_dims

if TYPE_CHECKING:
    import torch

# Sizes of the traced example. None is 0 or 1, which torch would take for constants, and no two are equal.
_BATCH, _SEQUENCE, _PAST = 2, 5, 3
# (heads, size) of the key and of the value of each layer
_Layers = list[tuple[tuple[int, int], tuple[int, int]]]


def export_causal_lm(model: Any, *, opset: int | None = None, check: bool = True) -> ir.Model:
    """Exports a Hugging Face causal language model with its key/value cache as inputs and outputs.

    Works for every model whose cache is one key and one value tensor per layer (transformers' ``DynamicCache``): Llama,
    Qwen, GPT-2, Phi, Gemma, Mistral and their relatives. Layers with a sliding window keep their whole cache; the
    window is in the attention mask.

    Inputs:
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, total_sequence], 1 for tokens and 0 for padding, past tokens included.
        position_ids: int64 [batch, sequence]; absent if the model takes none.
        past_key_values.N.key, past_key_values.N.value: [batch, kv_heads, past_sequence, head_dim]; past_sequence may
            be 0, and total_sequence = past_sequence + sequence.

    Outputs:
        logits: [batch, sequence, vocabulary].
        present.N.key, present.N.value: [batch, kv_heads, total_sequence, head_dim], the next step's past.

    The token ids that end a text are in the metadata, where ``Session.generate`` looks for them.

    Args:
        model: a ``transformers`` model such as ``LlamaForCausalLM``. Weights are shared with it, not copied.
        opset: ONNX opset, torch's default if None.
        check: compare with the model in ONNX Runtime: prefill and a second step, for one sequence and for two of which
            one is padded on the left. Tolerance as in ``export``.

    Raises:
        ExportError: transformers is missing, the model is of another kind, cannot be exported, or the graph disagrees
            with it.
    """
    import torch

    try:
        import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ExportError(
            "Exporting a language model needs transformers 5.", 'Install it: pip install "onnxlathe[hf]".'
        ) from error
    if not _cache_argument(model) or not hasattr(model, "config"):
        raise ExportError(
            f"{type(model).__name__} is not a Hugging Face causal language model with a key/value cache.",
            "Use onnxlathe.export for other modules.",
        )
    with quiet(), evaluating(model), torch.no_grad():
        layers = _cache_shapes(model)
    inputs, dims = _example(layers, model)
    graph = export(_decoder(model), (), inputs, dynamic_shapes=dims, opset=opset, check=False)
    rename_dims(graph, {}, {"past_sequence + sequence": "total_sequence"})
    _unwrap_names(graph)
    graph.graph.name = type(model).__name__
    if eos := _eos(model):
        graph.metadata_props[EOS_KEY] = json.dumps(eos)
    if longest := getattr(model.config, "max_position_embeddings", None):
        graph.metadata_props[MAX_LENGTH_KEY] = str(longest)
    if check:
        with quiet(), evaluating(model), torch.no_grad():
            _check(graph, model, layers)
    return graph


def _eos(model: Any) -> list[int]:
    """The token ids that end a text, as the model's configuration has them."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]
    return []


def _cache_argument(model: Any) -> str:
    """What ``forward`` calls its cache: ``past_key_values``, from transformers 5.24 on ``cache``; empty without one."""
    takes = inspect.signature(model.forward).parameters if hasattr(model, "forward") else {}
    return next((name for name in ("past_key_values", "cache") if name in takes), "")


def _decoder(model: Any) -> torch.nn.Module:
    """``model`` with its cache as plain tensors: they are what an ONNX graph can take and return.

    A ``DynamicCache`` without a config has the same kind of layer everywhere, which grows by concatenation; with one,
    layers with a sliding window would drop tokens and their size would depend on data (see also pytorch#172903).
    """
    import torch
    from transformers import DynamicCache

    argument = _cache_argument(model)

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = model

        def forward(
            self, input_ids: Any, attention_mask: Any, position_ids: Any = None, past_key_values: Any = ()
        ) -> dict[str, Any]:
            cache = DynamicCache([(layer["key"], layer["value"]) for layer in past_key_values])
            given = {argument: cache} if position_ids is None else {argument: cache, "position_ids": position_ids}
            result = self.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **given)
            layers: Any = cache.layers
            present = [{"key": layer.keys, "value": layer.values} for layer in layers]
            return {"logits": result.logits, "present": present}

    Decoder.__name__ = Decoder.__qualname__ = type(model).__name__  # for error messages
    return Decoder()


def _cache_shapes(model: Any) -> _Layers:
    """The cache's layers, found by running the model on one token."""
    import torch
    from transformers import DynamicCache

    cache: Any = DynamicCache()

    try:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model(input_ids=token, use_cache=True, **{_cache_argument(model): cache})
        return [
            ((layer.keys.shape[1], layer.keys.shape[3]), (layer.values.shape[1], layer.values.shape[3]))
            for layer in cache.layers
        ]
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} does not run with a plain DynamicCache: {type(error).__name__}: {error}.",
            "Only models whose cache is one key and one value tensor per layer can be exported with it; use "
            "onnxlathe.export for others.",
        ) from error


def _past(layers: _Layers, batch: int, length: int, model: Any) -> list[dict[str, torch.Tensor]]:
    """A cache of zeros."""
    import torch

    def zeros(shape: tuple[int, int]) -> torch.Tensor:
        return torch.zeros(batch, shape[0], length, shape[1], dtype=model.dtype, device=model.device)

    return [{"key": zeros(key), "value": zeros(value)} for key, value in layers]


def _example(layers: _Layers, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example inputs and their dynamic dims."""
    import torch

    device = model.device
    tokens = ("batch", "sequence")
    cached = {0: "batch", 2: "past_sequence"}
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64, device=device),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64, device=device),
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE, device=device).repeat(_BATCH, 1),
        "past_key_values": _past(layers, _BATCH, _PAST, model),
    }
    dims: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": ("batch", "total_sequence"),
        "position_ids": tokens,
        "past_key_values": [{"key": cached, "value": cached} for _ in layers],
    }
    if "position_ids" not in inspect.signature(model.forward).parameters:
        del inputs["position_ids"], dims["position_ids"]
    return inputs, dims


def _unwrap_names(graph: ir.Model) -> None:
    """Removes the wrapper's ``lm.`` from weight names and node namespaces."""
    for value in list(graph.graph.initializers.values()):
        value.name = (value.name or "").removeprefix("lm.")
    for node in graph.graph:
        if "namespace" in node.metadata_props:
            node.metadata_props["namespace"] = node.metadata_props["namespace"].replace("/lm.", "/")


def _check(graph: ir.Model, model: Any, layers: _Layers) -> None:
    """Prefill and a second step, once for one sequence and once for two with the first padded by 3 on the left."""
    try:
        session = open_session(graph, session_options(optimize=False))
        for batch, steps, padding in ((1, (7, 1), 0), (2, (9, 2), 3)):
            past = {
                f"past_key_values.{i}.{kind}": to_numpy("The cache", tensor)
                for i, layer in enumerate(_past(layers, batch, 0, model))
                for kind, tensor in layer.items()
            }
            _check_steps(session, model, past, steps, padding)
    except ModelError as error:
        raise ExportError(
            f"ONNX Runtime cannot run the exported {type(model).__name__}: {error.what}",
            "Export with check=False to look at the graph, or try another opset.",
        ) from error


def _check_steps(session: Any, model: Any, past: dict[str, Any], steps: tuple[int, int], padding: int) -> None:
    """Feeds the same tokens to both, each with its own cache, and compares logits and caches after each step."""
    import torch
    from transformers import DynamicCache

    batch = next(iter(past.values())).shape[0]
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, sum(steps)), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = [value.name for value in session.get_inputs()]
    # The model's own idea of a cache (with sliding windows where it has them), not the one that was exported.
    cache: Any = DynamicCache(config=model.config)
    start = 0
    for name, length in zip(("prefill", "the second step"), steps, strict=True):
        end = start + length
        tokens = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        tokens = {key: value for key, value in tokens.items() if key in wanted}
        on_device = {key: value.to(model.device) for key, value in tokens.items()}
        result = model(**on_device, use_cache=True, **{_cache_argument(model): cache})
        expected = to_numpy("The output", result.logits)
        got = run_session(session, {**{key: value.numpy() for key, value in tokens.items()}, **past})

        sample = f"{name} of {batch} sequence(s)" + (f" with {padding} tokens of left padding" if padding else "")
        valid = mask.numpy().astype(bool)[:, :end]  # what is computed at padded positions is arbitrary
        compare("logits", expected[valid[:, start:]], got["logits"][valid[:, start:]], sample)
        for i, layer in enumerate(cache.layers):
            for kind, tensor in (("key", layer.keys), ("value", layer.values)):
                reference = to_numpy("The cache", tensor).swapaxes(1, 2)
                kept = slice(end - reference.shape[1], end)  # a sliding window drops what it no longer needs
                present = got[f"present.{i}.{kind}"].swapaxes(1, 2)[:, kept]
                compare(f"present.{i}.{kind}", reference[valid[:, kept]], present[valid[:, kept]], sample)
        past = {key: got[key.replace("past_key_values", "present")] for key in past}
        start = end
