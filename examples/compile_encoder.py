"""Compiles a Hugging Face encoder with real samples for the checks and the speed gate, and proves the answers equal.

    python examples/compile_encoder.py

Weights are random, so it needs no download; replace ``build`` by ``AutoModel.from_pretrained(folder)`` for your own.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import BertConfig, BertModel

import onnxlathe as lathe
from onnxlathe.compiler.verify import relative_error


def build() -> torch.nn.Module:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False).eval()


def sample(batch: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Token ids of which the last row is padded, as a tokenizer would give."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[-1, length // 2 :] = 0
    return {"input_ids": rng.integers(0, 30522, (batch, length)), "attention_mask": mask}


def main() -> None:
    module = build()
    first = sample(2, 16, seed=0)
    dims = ("batch", "sequence")
    model = lathe.export(
        module,
        tuple(torch.from_numpy(array) for array in first.values()),
        dynamic_shapes={"input_ids": dims, "attention_mask": dims},
    )

    # The samples are compared after every pass, and timed: take shapes that you serve.
    out = lathe.compile(model, "cpu-fp32", threads=2, calibration=[sample(1, 16, seed=1), sample(8, 64, seed=2)])
    out.report.print()
    path = out.save("encoder.onnx")

    unseen = sample(3, 29, seed=3)
    got = lathe.Session(path, threads=2).run(unseen)["last_hidden_state"]
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(array) for name, array in unseen.items()}).last_hidden_state
    print(f"against PyTorch on inputs not seen before: relative error {relative_error(expected.numpy(), got):.1e}")


if __name__ == "__main__":
    main()
