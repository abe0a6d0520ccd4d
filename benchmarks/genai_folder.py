"""Does onnxruntime-genai generate the same greedy tokens from our folder as ``Session.generate``?

    python benchmarks/peers.py genai && python benchmarks/genai_folder.py [--preset cpu-fp32] [--model stories260k]

Compiles the model, writes it with ``Compiled.save_genai``, and lets genai's own loop, in its own environment, load the
folder and continue prompts: one by one, and several of equal length as a batch. Exits with 1 where tokens differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import Side, Worker, write_result

NEW = 100


def folder_of(model: str, preset: str, temporary: Path) -> Path:
    """Exports, compiles and writes the folder, with the tokenizer where the model has one."""
    import onnxlathe as lathe
    from onnxlathe.models.decoder import decoder
    from onnxlathe.models.stories import stories260k, stories_tokenizer

    module: Any = stories260k() if model == "stories260k" else decoder(model)
    huggingface = temporary / "huggingface"
    module.save_pretrained(huggingface)
    if model == "stories260k":
        stories_tokenizer().save(str(huggingface / "tokenizer.json"))
    compiled = lathe.compile(lathe.export_causal_lm(module), preset, progress=False)
    compiled.save(temporary / "model.onnx")
    return compiled.save_genai(temporary / "genai", huggingface=huggingface)


def texts(side: Side, samples: list[Path]) -> list[Any]:
    """The tokens that a side's loop makes of every sample."""
    worker = Worker(side, threads=2)
    found: list[Any] = []
    try:
        for path in samples:
            output = path.with_suffix(f".{side.python}.npy")
            worker.ask(load=str(path))
            worker.ask(outputs=str(output))
            found.append(np.load(output))
    finally:
        worker.close()
    return found


def main() -> int:
    """Prints which texts are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cpu-fp32")
    parser.add_argument("--model", default="stories260k", choices=["stories260k", "tiny"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        folder = folder_of(options.model, options.preset, temporary)
        config = json.loads((folder / "genai_config.json").read_text())
        print("past_present_share_buffer:", config["search"]["past_present_share_buffer"])
        samples: list[Path] = []
        for number, (batch, length) in enumerate([(1, 1), (1, 7), (1, 30), (4, 12)]):
            samples.append(temporary / f"{number}.npz")
            ids = np.random.default_rng(number).integers(3, config["model"]["vocab_size"], (batch, length))
            ids[:, 0] = 1
            np.savez(samples[-1], prompt=ids, new=NEW)
        ours = texts(Side("ours", "lathe loop", str(temporary / "model.onnx"), worker="decoder_worker.py"), samples)
        genai = Side("genai", "genai loop", str(folder), python="genai", worker="decoder_worker.py")
        theirs = texts(genai, samples)
    equal = [int((a == b).sum()) for a, b in zip(ours, theirs, strict=True)]
    for tokens, count in zip(ours, equal, strict=True):
        print(f"batch {len(tokens)}: {count} of {tokens.size} tokens equal")
    content = {"model": options.model, "preset": options.preset, "equal": equal, "of": [tokens.size for tokens in ours]}
    print("wrote", write_result("genai_folder", 2, {**content, "config": config}, {"genai"}))
    return int(equal != content["of"])


if __name__ == "__main__":
    sys.exit(main())
