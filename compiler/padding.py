"""What a language model's results mean where a sample has padding, so that two versions of it can be compared.

What is computed at padded positions is arbitrary, and how a decoder's cache is laid out is the graph's own affair (some
kernels want each row's tokens from slot 0 on). What counts is the results of tokens, and of a decoder that the next
step goes on from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ..runtime.generation.causal_lm import MASK, POSITIONS, TOKENS
from ..runtime.inference import run_session

Array = np.ndarray[Any, Any]
_PAST, _PRESENT = "past_key_values", "present"


def cache_names(model: ir.Model) -> dict[str, str]:
    """``{past input: present output}`` of a decoder with the usual names; empty for any other model."""
    inputs = {value.name or "" for value in model.graph.inputs}
    outputs = {value.name or "" for value in model.graph.outputs}
    if not {TOKENS, MASK} <= inputs:
        return {}
    pairs = {name: name.replace(_PAST, _PRESENT, 1) for name in inputs if name.startswith(_PAST)}
    return pairs if all(name in outputs for name in pairs.values()) else {}


def defined_results(
    session: ort.InferenceSession, sample: Mapping[str, Array], results: Mapping[str, Array], caches: Mapping[str, str]
) -> dict[str, Array]:
    """``results`` as they are where ``sample`` has no padding; else what is defined of them, and the step after.

    Args:
        session: the decoder.
        sample: its inputs.
        results: its outputs for them.
        caches: ``{past input: present output}``.
    """
    mask = sample[MASK].astype(bool)
    if mask.all():
        return dict(results)
    defined = {name: _of_tokens(array, mask) for name, array in results.items() if name not in caches.values()}
    ones = np.ones((mask.shape[0], 1), sample[MASK].dtype)
    following = {
        **sample,
        TOKENS: np.ascontiguousarray(sample[TOKENS][:, -1:]),
        MASK: np.concatenate([sample[MASK], ones], axis=1),
        **{past: results[present] for past, present in caches.items()},
    }
    if POSITIONS in sample:
        following[POSITIONS] = mask.sum(1, keepdims=True).astype(sample[POSITIONS].dtype)
    after = run_session(session, following)
    return defined | {f"{name} of the next step": after[name] for name in defined}


def without_padding(sample: Mapping[str, Array]) -> dict[str, Array]:
    """The row of ``sample`` with most tokens, those alone; as it is where not every input is one number a token."""
    mask = sample.get(MASK)
    if mask is None or mask.ndim != 2 or not mask.size or any(array.shape != mask.shape for array in sample.values()):
        return dict(sample)
    row = int(mask.astype(bool).sum(axis=1).argmax())
    tokens = mask[row].astype(bool)
    return {name: np.ascontiguousarray(array[row : row + 1, tokens]) for name, array in sample.items()}


def results_of_tokens(sample: Mapping[str, Array], results: Mapping[str, Array]) -> dict[str, Array]:
    """``results`` with zeros at positions that ``attention_mask`` leaves out; all of them if there is no such input."""
    mask = sample.get(MASK)
    if mask is None or mask.ndim != 2 or mask.dtype.kind not in "iub" or mask.all():
        return dict(results)
    return {
        name: _of_tokens(array, mask.astype(bool)) if array.shape[:2] == mask.shape else array
        for name, array in results.items()
    }


def _of_tokens(array: Array, mask: Array) -> Array:
    """``array`` with zeros at the padded positions of its first two axes."""
    if array.ndim < 2 or array.shape[0] != mask.shape[0] or array.shape[1] > mask.shape[1]:
        return array
    tokens = mask[:, mask.shape[1] - array.shape[1] :]
    return np.where(tokens.reshape(*tokens.shape, *[1] * (array.ndim - 2)), array, array.dtype.type(0))
