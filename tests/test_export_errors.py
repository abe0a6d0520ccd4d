"""What ``export`` says when a module cannot be exported or disagrees with its graph, and what it checks with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import onnxlathe as lathe


def error_of(module: nn.Module, *args, **options) -> str:
    with pytest.raises(lathe.ExportError) as caught:
        lathe.export(module, args, **options)
    assert caught.value.remedy
    return str(caught.value)


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x)[0]


class Rigid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return x + self.bias


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


class WrongWhenExported(nn.Module):
    """Differs by a factor everywhere, or only at sizes other than 4."""

    def __init__(self, divisor) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x):
        return x.sum(0) / (self.divisor if torch.compiler.is_exporting() else x.shape[0])


class UpTo(nn.Module):
    def forward(self, x):
        if not torch.compiler.is_exporting() and x.shape[0] != 4:
            raise ValueError("only four")
        return x


def test_data_dependent_branch():
    text = error_of(Branch(), torch.randn(3))
    assert "branches on a value" in text and "test_export_errors.py" in text and "torch.where" in text


def test_unsupported_operator_is_named():
    text = error_of(Unsupported(), torch.randn(3, 3))
    assert "aten.linalg_qr" in text and "test_export_errors.py" in text


@pytest.mark.parametrize("dim", ["batch", torch.export.Dim("batch")])
def test_dimension_that_cannot_be_dynamic(dim):
    text = error_of(Rigid(), torch.randn(5, 3), dynamic_shapes={"x": {0: dim}})
    assert "imension 0 of input x" in text and "only" in text and "5" in text


def test_two_names_for_one_size():
    text = error_of(Sum(), torch.randn(5), torch.randn(5), dynamic_shapes={"a": ("n",), "b": ("m",)})
    assert "'n'" in text and "'m'" in text and "one name" in text


@pytest.mark.parametrize(
    ("dynamic_shapes", "said"),
    [
        ({"z": {0: "n"}}, "z, which is not among the inputs: a, b"),
        ({"a": {3: "n"}}, "axis 3 of a"),
        ({"a": ("my batch",)}, "'my batch'"),
    ],
)
def test_wrong_dynamic_shapes(dynamic_shapes, said):
    assert said in error_of(Sum(), torch.randn(5), torch.randn(5), dynamic_shapes=dynamic_shapes)


def test_wrong_arguments():
    assert "'b'" in error_of(Sum(), torch.randn(5))
    assert "itself fails" in error_of(Sum(), torch.randn(5), torch.randn(4))
    assert "str" in error_of(Sum(), "x", "y")
    with pytest.raises(lathe.ExportError, match="not a torch"):
        lathe.export(lambda x: x, torch.randn(3))


def test_disagreement_on_the_example():
    text = error_of(WrongWhenExported(5), torch.randn(4, 3))
    assert "'output'" in text and "relative error 2.0e-01" in text and "example" in text


def test_disagreement_at_another_size():
    x = torch.rand(4, 3) + 1
    lathe.export(WrongWhenExported(4), x)
    text = error_of(WrongWhenExported(4), x, dynamic_shapes={"x": {0: "batch"}})
    assert "batch=5" in text and "relative error" in text
    lathe.export(WrongWhenExported(4), x, dynamic_shapes={"x": {0: "batch"}}, check=False)


def test_module_that_takes_no_other_size():
    assert "only four" in error_of(UpTo(), torch.randn(4), dynamic_shapes={"x": ("n",)})


def test_other_inputs_are_like_the_example():
    seen: list[torch.Tensor] = []

    class Module(nn.Module):
        def forward(self, ids, mask, x):
            if not torch.compiler.is_exporting():
                seen.append((ids, mask, x))
            return ids * mask + x.sum()

    ids = torch.tensor([[7, 9, 11, 9]])
    mask = torch.tensor([[1, 1, 0, 0]])
    dims = {"ids": ("b", "s"), "mask": ("b", "s"), "x": (None,)}
    lathe.export(Module(), (ids, mask, torch.zeros(3)), dynamic_shapes=dims)
    first, other = seen
    assert torch.equal(first[0], ids)
    assert other[0].shape == other[1].shape and other[0].shape[0] != 1 and other[0].shape[1] != 4
    assert set(other[0].flatten().tolist()) <= {7, 9, 11}
    assert set(other[1].flatten().tolist()) == {0, 1} and other[1].any(-1).all()
    assert other[2].any()  # zeros are a placeholder for floats
