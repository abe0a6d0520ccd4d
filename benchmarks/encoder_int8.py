"""The real MiniLM encoder in int8 on the CPU: speed and fidelity against everything a user could take instead.

    python benchmarks/peers.py && python benchmarks/encoder_int8.py [--rounds 7] [--threads 2]

Calibration: 128 sentences of models/data/stories260k/heldout.txt; fidelity: 256 others. Speed is against the dynamo
export in fp32 in ONNX Runtime with its default optimizations; each side is alone in its process, in turns. Fidelity is
against the same model in fp32: mean cosine of mean-pooled embeddings, Spearman correlation of their pairwise
similarities, how often the nearest neighbour stays the same, and the largest relative error of the output on real
tokens (padding not counted) and on random ones.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import Side, compare, exported, quantize, run_once, write_result
from peers import python_of
from rich.console import Console
from rich.table import Table

SHAPES = {"(1,16)": (1, 16), "(1,128)": (1, 128), "(8,128)": (8, 128)}
TEXT = Path(__file__).parent.parent / "models" / "data" / "stories260k" / "heldout.txt"
CALIBRATION, HELD_OUT = 128, 256
# name -> (quantizer, environment it runs in, what executes the result, environment of that)
SIDES = {
    "onnxlathe static": ("onnxlathe static", "ours", "lathe", "ours"),
    "onnxlathe dynamic": ("onnxlathe dynamic", "ours", "lathe", "ours"),
    "ORT dynamic": ("ORT dynamic", "ours", "ort", "ours"),
    "ORT dynamic, per channel": ("ORT dynamic, per channel", "ours", "ort", "ours"),
    "ORT dynamic on ORT-fused": ("ORT dynamic on ORT-fused", "ours", "ort", "ours"),
    "ORT static": ("ORT static", "ours", "ort", "ours"),
    "ORT static on ORT-fused": ("ORT static on ORT-fused", "ours", "ort", "ours"),
    "onnxsim static": ("onnxsim static", "onnxsim", "ort", "ours"),
    "NNCF in ORT": ("NNCF transformer", "nncf", "ort", "ours"),
    "NNCF in OpenVINO": ("NNCF transformer", "nncf", "openvino", "nncf"),
}


def sentences() -> list[str]:
    """The sentences of the held-out stories, shuffled with a seed."""
    parts = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", TEXT.read_text())]
    kept = sorted({part for part in parts if len(part) > 20})
    return [kept[index] for index in np.random.default_rng(0).permutation(len(kept))]


def batches(texts: list[str], size: int) -> list[dict[str, Any]]:
    """Tokenized, padded to the longest of each batch."""
    from onnxlathe.models.encoder import minilm_tokenizer

    tokenizer = minilm_tokenizer()
    feeds: list[dict[str, Any]] = []
    for start in range(0, len(texts), size):
        encoded = tokenizer.encode_batch(texts[start : start + size])
        ids = np.array([item.ids for item in encoded])
        mask = np.array([item.attention_mask for item in encoded])
        feeds.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return feeds


def random_tokens(shape: tuple[int, int]) -> dict[str, Any]:
    """Token ids drawn evenly, no padding."""
    ids = np.random.default_rng(0).integers(1000, 30000, shape)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def pooled(outputs: list[Any], feeds: list[dict[str, Any]]) -> Any:
    """Mean over the tokens that are no padding, normalized."""
    parts: list[Any] = []
    for output, sample in zip(outputs, feeds, strict=True):
        mask = sample["attention_mask"][..., None]
        mean = (output * mask).sum(1) / mask.sum(1)
        parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(parts)


def fidelity(reference: list[Any], got: list[Any], feeds: list[dict[str, Any]]) -> dict[str, float]:
    """How far an encoder is from fp32, see the module's docstring."""
    from scipy.stats import spearmanr

    a, b = pooled(reference, feeds), pooled(got, feeds)
    pairs = np.triu_indices(len(a), 1)
    similar = [x @ x.T for x in (a, b)]
    nearest = [(s - 2 * np.eye(len(s))).argmax(1) for s in similar]
    masks = [sample["attention_mask"][..., None] for sample in feeds]
    top = max(float(np.abs(x * m).max()) for x, m in zip(reference, masks, strict=True))
    far = max(float(np.abs((x - y) * m).max()) for x, y, m in zip(reference, got, masks, strict=True))
    return {
        "cosine": float((a * b).sum(1).mean()),
        "spearman": float(spearmanr(similar[0][pairs], similar[1][pairs]).statistic),
        "recall@1": float((nearest[0] == nearest[1]).mean()),
        "error": far / top,
    }


def save_all(feeds: list[dict[str, Any]], folder: Path) -> Path:
    """One ``.npz`` a sample."""
    folder.mkdir(exist_ok=True)
    for number, sample in enumerate(feeds):
        np.savez(folder / f"{number:04}.npz", **sample)
    return folder


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.6, help="per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of sides")
    parser.add_argument("--folder", type=Path, help="keep the models here; those that are there already are used")
    parser.add_argument("--prepare", action="store_true", help="everything but the speed (with --folder)")
    options = parser.parse_args()
    from onnxlathe.runtime.artifact import save

    texts = sentences()
    held = batches(texts[CALIBRATION : CALIBRATION + HELD_OUT], 32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        source = folder / "fp32.onnx"
        if not source.exists():
            save(exported("minilm"), source)
        calibration = save_all(batches(texts[:CALIBRATION], 8), folder / "calibration")
        held_files = sorted(save_all(held, folder / "held").glob("*.npz"))
        samples: dict[str, Path] = {}
        for label, shape in SHAPES.items():
            samples[label] = folder / f"{shape[0]}-{shape[1]}.npz"
            np.savez(samples[label], **random_tokens(shape))
        sides = [Side("ORT fp32, dynamo export", "ort", str(source))]
        for name, (tool, python, kind, runner) in SIDES.items():
            if options.only and name not in options.only:
                continue
            target = folder / f"{tool}.onnx".replace(" ", "-").replace(",", "")
            side = Side(name, kind, str(target), python=runner)
            side.failure = "" if target.exists() else quantize(tool, source, target, calibration, python)
            sides.append(side)
            print(name, side.failure or "quantized", flush=True)
        quality = _quality(sides, held, held_files, samples["(8,128)"], folder, options.threads)
        if options.prepare:
            return
        results = compare(
            sides, samples, threads=options.threads, rounds=options.rounds, seconds=options.seconds, reference={}
        )
    _show(sides, results, quality, options.threads)
    notes = {
        side.name: {"failure": side.failure, "speed": results[side.name], "fidelity": quality.get(side.name)}
        for side in sides
    }
    installed = {name for name in ("nncf", "onnxsim") if python_of(name).exists()}
    print("wrote", write_result("encoder_int8", options.threads, {"sides": notes}, {"ours", *installed}))


def _quality(
    sides: list[Side], held: list[dict[str, Any]], files: list[Path], random: Path, folder: Path, threads: int
) -> dict[str, dict[str, float]]:
    """Fidelity of each side; kept in ``folder``, so that it does not lengthen a measurement."""
    kept = folder / "fidelity.json"
    quality: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [side for side in sides if not side.failure and side.name not in quality]
    if not missing:
        return quality
    expected, expected_random = run_once(sides[0], files, threads), run_once(sides[0], [random], threads)
    for side in missing:
        try:
            quality[side.name] = fidelity(expected, run_once(side, files, threads), held)
            got = run_once(side, [random], threads)
        except RuntimeError as error:
            side.failure = str(error)
            continue
        quality[side.name]["error, random tokens"] = fidelity(expected_random, got, [random_tokens((8, 128))])["error"]
    kept.write_text(json.dumps(quality, indent=1))
    return quality


def _show(sides: list[Side], results: Any, quality: Any, threads: int) -> None:
    table = Table(title=f"MiniLM int8, CPU, {threads} threads: times ORT fp32, and fidelity to it on real sentences")
    columns = ["cosine", "spearman", "recall@1", "error", "error, random tokens"]
    for column in ("side", *SHAPES, *columns):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side in sides:
        rows = results[side.name]
        if side.failure or not rows:
            table.add_row(side.name, side.failure)
            continue
        speeds = [f"{rows[label]['ratio']:.2f} ±{rows[label]['spread']:.2f}" for label in SHAPES]
        table.add_row(side.name, *speeds, *(f"{quality[side.name][column]:.4f}" for column in columns))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
