"""The int8 key/value cache of GroupQueryAttention: values to codes and back, by the scales in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]
SCALE_OF = {3: 12, 4: 13}
"""GroupQueryAttention's inputs past_key and past_value, and where their scales are."""
LIMIT = 127


def cache_scales(model: ir.Model) -> dict[str, Array]:
    """``{name: float32 scales}`` of every int8 cache input and output; the scales broadcast over the cache."""
    found: dict[str, Array] = {}
    for node in model.graph:
        if node.op_type != "GroupQueryAttention" or node.domain != "com.microsoft":
            continue
        for past, index in SCALE_OF.items():
            value = node.inputs[past] if past < len(node.inputs) else None
            scale = node.inputs[index] if index < len(node.inputs) else None
            if value is None or scale is None or scale.const_value is None or value.dtype != ir.DataType.INT8:
                continue
            for name in (value.name, node.outputs[past - 2].name):
                found[name or ""] = scale.const_value.numpy()
    return found


def quantize_caches(sample: Mapping[str, Array], scales: Mapping[str, Array]) -> dict[str, Array]:
    """``sample`` with its float caches as the codes the model takes."""
    return {
        name: np.clip(np.rint(array / scales[name]), -LIMIT - 1, LIMIT).astype(np.int8)
        if name in scales and array.dtype.kind == "f"
        else array
        for name, array in sample.items()
    }


def dequantize_caches(results: Mapping[str, Array], scales: Mapping[str, Array]) -> dict[str, Array]:
    """``results`` with its int8 caches as the values they stand for."""
    return {
        name: array.astype(np.float32) * scales[name] if name in scales and array.dtype == np.int8 else array
        for name, array in results.items()
    }
