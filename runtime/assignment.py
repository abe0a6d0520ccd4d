"""Where ONNX Runtime really put the nodes of a model that says where it wants them."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import onnxruntime as ort

LAYER_KEY = "layer_ann"
"""Metadata of a node: the name of its layer, which ``session.layer_assignment_settings`` sends to a device."""
LAYERS_OPTION = "session.layer_assignment_settings"
RECORD_OPTION = "session.record_ep_graph_assignment_info"
_PREFIX = "onnxlathe_"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclasses.dataclass(frozen=True)
class Misplaced:
    """A node that did not get where it was meant to.

    Attributes:
        node: its name.
        wanted: the device it was placed on.
        provider: the execution provider that has it.
    """

    node: str
    wanted: str
    provider: str


def layer_name(device: str) -> str:
    """The layer of the nodes for ``device``."""
    return f"{_PREFIX}{device}"


def misplaced(model: ir.Model, session: ort.InferenceSession) -> list[Misplaced]:
    """The nodes of ``model`` that another provider has than the one they are annotated for.

    Nodes that ONNX Runtime fused or folded away are not among them.

    Args:
        model: the model as it was opened.
        session: its session, opened with ``RECORD_OPTION``.
    """
    wanted = {
        node.name: node.metadata_props[LAYER_KEY].removeprefix(_PREFIX)
        for node in model.graph
        if node.metadata_props.get(LAYER_KEY, "").startswith(_PREFIX)
    }
    found: list[Misplaced] = []
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            device = wanted.get(node.name)
            if device is not None and _PROVIDERS.get(device, device) != part.ep_name:
                found.append(Misplaced(node.name, device, part.ep_name))
    return found
