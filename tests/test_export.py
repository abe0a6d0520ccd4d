"""``export``: names, dynamic shapes, numbers."""

from __future__ import annotations

import collections
import dataclasses

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


def shapes(values) -> dict[str, str]:
    return {value.name: str(value.shape) for value in values}


def symbols(model: ir.Model) -> set[str]:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {dim.value for value in values for dim in value.shape or () if isinstance(dim, ir.SymbolicDim) and dim.value}


def error_of(module: nn.Module, *args, **options) -> str:
    with pytest.raises(lathe.ExportError) as caught:
        lathe.export(module, args, **options)
    assert caught.value.remedy
    return str(caught.value)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, features):
        return self.head(self.body(features))


class Tagger(nn.Module):
    """Embeds tokens and returns a dict with a nested tuple; the mask may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.projection = nn.Linear(16, 16)

    def forward(self, input_ids, mask=None, *, scale=1.0):
        x = self.projection(self.embedding(input_ids)) * scale
        if mask is not None:
            x = x * mask[..., None]
        return {"logits": x @ self.embedding.weight.T, "hidden": (x, x.sum(-1)), "nothing": None}


@pytest.mark.parametrize("example", [1, 4])  # torch likes to take a size of 1 for a constant
def test_dynamic_batch_runs_at_other_sizes(example):
    module = Classifier()
    model = lathe.export(module, torch.randn(example, 6), dynamic_shapes={"features": {0: "batch"}})
    assert shapes(model.graph.inputs) == {"features": "[batch,6]"}
    assert shapes(model.graph.outputs) == {"output": "[batch,3]"}
    assert model.graph.name == "Classifier"
    module.eval()
    for batch in (1, 9):
        x = torch.randn(batch, 6)
        np.testing.assert_allclose(run(model, features=x)["output"], module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_names_of_nested_inputs_and_outputs():
    ids, mask = torch.randint(50, (2, 7)), torch.ones(2, 7)
    dims = ("batch", "sequence")
    model = lathe.export(
        Tagger(), (ids,), {"scale": 2.0, "mask": mask}, dynamic_shapes={"input_ids": dims, "mask": dims}
    )
    assert shapes(model.graph.inputs) == {"input_ids": "[batch,sequence]", "mask": "[batch,sequence]"}
    assert shapes(model.graph.outputs) == {
        "logits": "[batch,sequence,50]",
        "hidden.0": "[batch,sequence,16]",
        "hidden.1": "[batch,sequence]",
    }
    assert symbols(model) == {"batch", "sequence"}


def test_none_argument_is_no_input():
    model = lathe.export(Tagger(), (torch.randint(50, (2, 7)), None))
    assert shapes(model.graph.inputs) == {"input_ids": "[2,7]"}


Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Result:
    total: torch.Tensor
    parts: list


torch.export.register_dataclass(Result)


class Variadic(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, input, /, *rest, state, **more):
        x = input + rest[0] * more["extra"]
        return self.wrap(x, state[0]["k"] - x)


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda a, b: (a, None, b), ["output", "output_2"]),
        (lambda a, b: [a, (a, b)], ["output", "output_1.0", "output_1.1"]),
        (Pair, ["first", "second"]),
        (lambda a, b: Result(a, [b]), ["total", "parts.0"]),
        (lambda a, b: {"input": a, "y": b}, ["input_out", "y"]),  # an output may not be called like an input
    ],
)
def test_names_of_every_kind_of_container(wrap, names):
    args = (torch.randn(3), torch.randn(3))
    kwargs = {"extra": torch.randn(3), "state": [{"k": torch.randn(3)}]}
    model = lathe.export(Variadic(wrap), args, kwargs)
    assert [value.name for value in model.graph.inputs] == ["input", "rest.0", "state.0.k", "extra"]
    assert [value.name for value in model.graph.outputs] == names


def test_names_are_not_taken_by_inner_values():
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Parameter(torch.randn(3))

        def forward(self, mul):
            return {"add": mul * 3 + self.output, "mul_1": (mul + 1) * (mul + 2)}

    model = lathe.export(Module(), torch.randn(3))
    assert [value.name for value in model.graph.inputs] == ["mul"]
    assert [value.name for value in model.graph.outputs] == ["add", "mul_1"]
    every = [v.name for node in model.graph for v in node.outputs] + ["mul", *model.graph.initializers]
    assert len(every) == len(set(every))


def test_input_returned_as_it_is():
    class Module(nn.Module):
        def forward(self, x):
            return x, x + 1, x + 1

    x = torch.randn(2)
    got = run(lathe.export(Module(), x), x=x)
    assert list(got) == ["output", "output_1", "output_2"]
    np.testing.assert_array_equal(got["output"], x.numpy())


def test_one_spelling_for_equal_sizes():
    class Module(nn.Module):
        def forward(self, past, new):
            a, b = torch.cat([past, new], 1), torch.cat([new, past], 1)
            return a, b + a, new.flatten(0, 1), b

    inputs = (torch.randn(2, 3, 4), torch.randn(2, 5, 4))
    model = lathe.export(
        Module(), inputs, dynamic_shapes={"past": ("batch", "past", None), "new": ("batch", "new", None)}
    )
    total = "[batch,new + past,4]"
    assert list(shapes(model.graph.outputs).values()) == [total, total, "[batch*new,4]", total]
    assert symbols(model) == {"batch", "past", "new", "new + past", "batch*new"}


def test_a_size_that_is_the_sum_of_two_others():
    class Module(nn.Module):
        def forward(self, past, new, mask):
            return torch.cat([past, new], 1) * mask

    inputs = (torch.randn(2, 3), torch.randn(2, 5), torch.ones(2, 8))
    dims = {"past": ("batch", "past"), "new": ("batch", "new"), "mask": ("batch", "total")}
    # Most choices of three sizes are refused by the module: the check has to find one that fits.
    model = lathe.export(Module(), inputs, dynamic_shapes=dims)
    assert shapes(model.graph.inputs)["mask"] == "[batch,total]"


def test_torch_forms_of_dynamic_shapes():
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=9)
    dynamic = torch.export.Dim.DYNAMIC

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(9, 4)

        def forward(self, x, y):
            # x of more than 9 columns fails: the check must keep to the limits of Dim
            return self.positions(torch.arange(x.shape[1])) + x[..., None] + y[:, :1, None]

    inputs = (torch.randn(2, 7), torch.randn(2, 5))
    model = lathe.export(Module(), inputs, dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: dynamic}))
    assert shapes(model.graph.inputs) == {"x": "[batch,length]", "y": "[batch,y_dim_1]"}


def test_sizes_that_depend_on_data_are_named_after_the_output():
    class Module(nn.Module):
        def forward(self, x):
            return {"found": torch.nonzero(x)}

    model = lathe.export(Module(), torch.tensor([0.0, 1.0, 2.0]))
    assert shapes(model.graph.outputs) == {"found": "[found_dim_0,1]"}
    assert run(model, x=torch.tensor([1.0, 1.0, 1.0]))["found"].shape == (3, 1)


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_opset(opset):
    x = torch.randn(2, 6)
    module = Classifier()
    model = lathe.export(module, x, opset=opset)
    assert model.opset_imports[""] == opset
    np.testing.assert_allclose(run(model, features=x)["output"], module.eval()(x).detach().numpy(), atol=1e-5)


def test_unreachable_opset_is_refused():
    assert "not as opset 7" in error_of(Classifier(), torch.randn(2, 6), opset=7)


# --- what torch gets wrong by itself, and special modules -------------------------------------------------------------


def test_one_tensor_for_three_inputs():
    """torch would trace the case query = key = value, and the graph would ignore the last two."""
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    model = lathe.export(module, (x, x, x))
    query, key, value = (torch.randn(2, 5, 16) for _ in range(3))
    expected = module.eval()(query, key, value)[0].detach().numpy()
    np.testing.assert_allclose(run(model, query=query, key=key, value=value)["output"], expected, atol=1e-5)


def test_shapes_that_torch_declares_wrongly_are_inferred_again():
    """torch 2.13 declares the example's length, 5, for the output of an LSTM."""
    module = nn.LSTM(8, 16, batch_first=True)
    model = lathe.export(module, torch.randn(2, 5, 8), dynamic_shapes={"input": ("batch", "time")})
    assert model.graph.outputs[0].shape[1] != 5
    x = torch.randn(3, 9, 8)
    np.testing.assert_allclose(run(model, input=x)["output"], module(x)[0].detach().numpy(), atol=1e-5)


def test_hugging_face_encoder_by_itself():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.randint(32, (2, 9))
    dims = ("batch", "sequence")
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shared = {"input_ids": dims, "attention_mask": dims}
    model = lathe.export(transformers.BertModel(transformers.BertConfig(**sizes)), (), kwargs, dynamic_shapes=shared)
    assert shapes(model.graph.outputs) == {
        "last_hidden_state": "[batch,sequence,16]",
        "pooler_output": "[batch,16]",
    }
    decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    assert "export_causal_lm" in error_of(decoder, ids)


def test_half_precision():
    model = lathe.export(nn.Linear(8, 8).half(), torch.randn(2, 8).half(), dynamic_shapes={"input": ("batch",)})
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert "check=False" in error_of(nn.Linear(8, 8).bfloat16(), torch.randn(2, 8).bfloat16())
