"""The models by name, with example inputs: for tests, benchmarks, examples and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["module", "causal-lm"]


@dataclasses.dataclass(frozen=True)
class ZooEntry:
    """A model and how to export it.

    Attributes:
        module: the torch module, in eval mode.
        args: example inputs, ``module(*args)``.
        dynamic_shapes: names of the dims that may vary, by input, as ``onnxlathe.export`` takes them.
        kind: ``"module"`` for ``onnxlathe.export(module, args, dynamic_shapes=...)``, ``"causal-lm"`` for
            ``onnxlathe.export_causal_lm(module)``.
    """

    module: torch.nn.Module
    args: tuple[Any, ...]
    dynamic_shapes: dict[str, Any]
    kind: Kind = "module"


def names() -> list[str]:
    """The names ``build`` knows."""
    return list(_BUILDERS)


def build(name: str) -> ZooEntry:
    """Builds the model called ``name``, with the same weights and inputs each time.

    Raises:
        KeyError: no such model.
        ImportError: an extra that the model needs is not installed; the message says which.
    """
    if name not in _BUILDERS:
        raise KeyError(f"There is no model {name!r}; choose one of {', '.join(_BUILDERS)}.")
    return _BUILDERS[name]()


def tokenizer(name: str) -> str | None:
    """The content of ``tokenizer.json`` for the model called ``name``; None if it has no tokenizer."""
    if name != "stories260k":
        return None
    from .stories import tokenizer_json

    return tokenizer_json()


def _mlp() -> ZooEntry:
    from .mlp import Mlp784

    return ZooEntry(Mlp784().eval(), (_noise(4, 784),), {"pixels": {0: "batch"}})


def _convnet() -> ZooEntry:
    from .convnet import ConvNet

    return ZooEntry(ConvNet().eval(), (_noise(2, 3, 32, 32),), {"pixels": {0: "batch"}})


def _encoder() -> ZooEntry:
    from .encoder import Encoder, EncoderConfig

    return _encoder_entry(Encoder().eval(), EncoderConfig().vocabulary)


def _minilm() -> ZooEntry:
    from .encoder import minilm

    return _encoder_entry(minilm(), 30522)


def _decoder_tiny() -> ZooEntry:
    from .decoder import decoder

    return _decoder_entry(decoder("tiny"))


def _llama_135m() -> ZooEntry:
    from .decoder import decoder

    return _decoder_entry(decoder("llama_135m"))


def _stories() -> ZooEntry:
    from .stories import stories260k

    return _decoder_entry(stories260k())


_BUILDERS: dict[str, Callable[[], ZooEntry]] = {
    "mlp-784": _mlp,
    "convnet": _convnet,
    "encoder": _encoder,
    "minilm": _minilm,
    "decoder-tiny": _decoder_tiny,
    "llama-135m": _llama_135m,
    "stories260k": _stories,
}


def _noise(*shape: int) -> torch.Tensor:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _encoder_entry(module: torch.nn.Module, vocabulary: int) -> ZooEntry:
    """Two sequences of 16 tokens, the second padded to 11."""
    import torch

    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    dims = ("batch", "sequence")
    return ZooEntry(
        module,
        (ids, mask, torch.zeros_like(ids)),
        {"input_ids": dims, "attention_mask": dims, "token_type_ids": dims},
    )


def _decoder_entry(module: Any) -> ZooEntry:
    import torch

    ids = torch.randint(module.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    return ZooEntry(module, (ids,), {"input_ids": ("batch", "sequence")}, "causal-lm")
