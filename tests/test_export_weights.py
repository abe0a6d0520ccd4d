"""What ``export`` leaves alone: weights stay the module's own, once; the module, its inputs and the terminal."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import onnxlathe as lathe


def run(model: ir.Model, **feeds: torch.Tensor) -> dict[str, np.ndarray]:
    """The model in plain onnxruntime with default options: not the way the export checks itself."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {key: value.numpy() for key, value in feeds.items()}), strict=True))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, features):
        return self.head(self.body(features))


def test_weights_share_memory_with_the_module():
    module = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Linear(10, 16), nn.ReLU())
    model = lathe.export(module, torch.randn(2, 4, 12))
    parameters = [parameter.detach().numpy() for parameter in module.parameters()]
    weights = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value.size > 1]
    assert len(weights) >= 4
    for parameter in parameters:
        assert any(np.shares_memory(parameter, weight) for weight in weights)
    assert "1.weight.T" in model.graph.initializers  # what MatMul reads is a view, and has a name


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 40, bias=False)
        if how == "parameter":
            self.head.weight = self.embedding.weight
        else:  # two Parameter objects over the same memory
            self.head.weight = nn.Parameter(self.embedding.weight.data)

    def forward(self, ids):
        return self.head(self.embedding(ids))


@pytest.mark.parametrize("how", ["parameter", "memory"])
def test_tied_embedding_is_stored_once(how):
    module = Tied(how)
    ids = torch.randint(40, (2, 3))
    model = lathe.export(module, ids)
    assert sum(value.const_value.size >= 320 for value in model.graph.initializers.values()) == 1
    assert len(ir.to_proto(model).SerializeToString()) < 2 * 320 * 4
    np.testing.assert_allclose(run(model, ids=ids)["output"], module(ids).detach().numpy(), atol=1e-5)


def test_weight_of_two_layers_is_stored_once():
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = lathe.export(Module(), torch.randn(2, 5, 8))
    assert sum(value.const_value.size == 64 for value in model.graph.initializers.values()) == 1
    assert all(node.op_type != "Transpose" for node in model.graph)


def test_no_source_paths_in_the_model():
    text = ir.to_proto(lathe.export(Classifier(), torch.randn(2, 6))).SerializeToString()
    assert b".py" not in text
    assert b"body.0" in text  # but which submodule a node comes from is kept


# --- the module is left as it was, and nothing is printed -----------------------------------------------------------


def test_training_flags_are_restored_one_by_one():
    module = Classifier()
    module.body[1].eval()
    before = [part.training for part in module.modules()]
    lathe.export(module, torch.randn(4, 6))
    assert [part.training for part in module.modules()] == before
    with pytest.raises(lathe.ExportError):
        lathe.export(module, torch.randn(4, 7))
    assert [part.training for part in module.modules()] == before


def test_arguments_are_left_as_they_were():
    class Module(nn.Module):
        def forward(self, x):
            return x.add_(1) * 2

    x = torch.zeros(3)
    lathe.export(Module(), x, check=False)
    assert not x.any()


def test_silence_and_lazy_torch():
    program = """
        import sys
        import onnxlathe as lathe
        import onnxlathe.compiler.exporting.export, onnxlathe.compiler.exporting.export_lm, onnxlathe.models.zoo
        assert "torch" not in sys.modules
        import logging, torch
        level = logging.getLogger("torch").level
        class Branch(torch.nn.Module):
            def forward(self, x):
                return x if x.sum() > 0 else -x
        lathe.export(torch.nn.Linear(3, 3), torch.randn(2, 3), dynamic_shapes={"input": {0: "batch"}})
        try:
            lathe.export(Branch(), torch.randn(3))
        except lathe.ExportError:
            pass
        assert logging.getLogger("torch").level == level
    """
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
