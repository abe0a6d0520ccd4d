"""The models of the survey's experiments: trained or real, with each technique applied, and what it costs in quality.

Everything is kept in a folder, so that timing can be done apart, while the machine is idle.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from distillation import digits
from encoder_int8 import batches, fidelity, random_tokens
from harness import exported
from pruning_data import story_samples, texts

import onnxlathe as lathe
from onnxlathe.compiler.graph import weight_bytes
from onnxlathe.compiler.scores import nats
from onnxlathe.models.mlp import Mlp784
from onnxlathe.passes import PruneSparse, PruneWidth, QuantizeWeights
from onnxlathe.passes.linear_layers import linear_layer
from onnxlathe.passes.presets import PRESETS
from onnxlathe.runtime.artifact import load, save
from onnxlathe.runtime.inference import open_session, run_session, session_options

Feeds = dict[str, Any]
TRAINED = 8000
FUSED = list(PRESETS["cpu-fp32"].passes)
INT8 = list(PRESETS["cpu-int8"].passes)
# Zeros where the smallest 20 % of all weights are, as the survey has it; 20 % of the units; units until half the time.
ZEROS = PruneSparse(sparsity=0.2, method="magnitude", refit=False, allocation="global")
WIDTH, HALF = PruneWidth(ratio=0.2), PruneWidth(latency_target=0.5)


_AT = INT8.index("cleanup", INT8.index("fuse-linear"))
# technique -> what it starts from, and the passes; what begins with "pruned" is not timed itself.
PIPELINES: dict[str, tuple[str, list[Any]]] = {
    "fused": ("original", FUSED),
    "zeros 20 %": ("fused", [ZEROS]),
    "int8": ("original", INT8),
    "pruned 20 %": ("original", [*INT8[:_AT], WIDTH, "cleanup"]),
    "width 20 %": ("pruned 20 %", ["fuse-qkv", "cleanup"]),
    "width 20 % + int8": ("pruned 20 %", INT8[_AT:]),
    "pruned for 2 x": ("original", [*INT8[:_AT], HALF, "cleanup"]),
    "width for 2 x": ("pruned for 2 x", ["fuse-qkv", "cleanup"]),
    "width for 2 x + int8": ("pruned for 2 x", INT8[_AT:]),
}


@dataclasses.dataclass
class Subject:
    """A model and its task.

    Attributes:
        name: of the model.
        metric: what ``judge`` gives.
        calibration: samples for the passes.
        judge: quality of a model; None where the weights are random.
        workloads: label -> sample for ``survey_worker.py``.
        pipelines: technique -> the one it starts from, and passes.
        text: whether it is timed on texts.
    """

    name: str
    metric: str
    calibration: list[Feeds]
    judge: Callable[[Path], float] | None
    workloads: dict[str, Feeds]
    pipelines: dict[str, tuple[str, list[Any]]]
    text: bool = False


def mlp(folder: Path) -> Subject:
    """LeNet-300-100, trained on 8,000 digits, judged on 2,000 others; 1000 samples in batches of 1, 100, 1000."""
    images, labels = digits()
    pixels = images.reshape(-1, 784) / 255
    order = np.random.default_rng(0).permutation(len(pixels))
    trained, unseen = order[:TRAINED], order[TRAINED:]
    source = folder / "mlp" / "original.onnx"
    if not source.exists():
        save(_trained(pixels[trained], labels[trained]), source)
    rows = {"pixels": pixels[trained[:1000]]}
    return Subject(
        "mlp",
        "accuracy, %",
        [{"pixels": part} for part in np.array_split(pixels[trained[:2000]], 20)],
        lambda path: accuracy(path, pixels[unseen], labels[unseen]),
        {f"1000 digits, batch {size}": {**rows, "batch": np.array(size)} for size in (1, 100, 1000)},
        PIPELINES,
    )


def _trained(pixels: Any, labels: Any) -> ir.Model:
    """Adam for 20 epochs, seeded."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, x, y = Mlp784(), torch.from_numpy(pixels), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(20):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x[part]), y[part]).backward()
            optimizer.step()
    return lathe.export(module.eval(), (x[:4],), dynamic_shapes={"pixels": {0: "batch"}})


def logits(model: Path | ir.Model, pixels: Any) -> Any:
    """Of the MLP."""
    session = open_session(model, session_options(threads=1))
    return next(iter(run_session(session, {"pixels": pixels}).values()))


def accuracy(model: Path | ir.Model, pixels: Any, labels: Any) -> float:
    """Share of right answers in percent."""
    return 100 * float((logits(model, pixels).argmax(1) == labels).mean())


def encoder(folder: Path) -> Subject:
    """MiniLM; calibrated on 512 sentences, judged on 256 others."""
    known, unseen = texts(512)
    judged = batches(unseen, 32)
    source = folder / "encoder" / "original.onnx"
    if not source.exists():
        save(exported("minilm"), source)
    reference: list[Any] = []

    def outputs(path: Path) -> list[Any]:
        session = open_session(path, session_options(threads=1))
        return [next(iter(run_session(session, sample).values())) for sample in judged]

    def judge(path: Path) -> float:
        if not reference:
            reference.extend(outputs(source))
        return fidelity(reference, outputs(path), judged)["cosine"]

    tokens = random_tokens((8, 128))
    return Subject(
        "encoder",
        "pooled cosine with fp32",
        batches(known[:512], 16),
        judge,
        {f"8 texts of 128, batch {size}": {**tokens, "batch": np.array(size)} for size in (1, 8)},
        PIPELINES,
    )


def decoder(folder: Path) -> Subject:
    """stories260k; calibrated on 40 stories, judged on as many others."""
    calibration, judged = story_samples(40)
    source = folder / "decoder" / "original.onnx"
    if not source.exists():
        from onnxlathe.models.stories import stories260k

        save(lathe.export_causal_lm(stories260k(), check=False), source)
    stock = np.concatenate([sample["input_ids"][0] for sample in judged])
    return Subject(
        "decoder",
        "nats a token",
        calibration,
        lambda path: _nats(load(path), judged),
        {
            "6 prompts of 256": {"prompt": np.resize(stock, (6, 256)), "new": np.array(1)},
            "6 texts of 16 + 64": {"prompt": np.resize(stock, (6, 16)), "new": np.array(64)},
        },
        PIPELINES,
        text=True,
    )


def llama(folder: Path) -> Subject:
    """A 135M Llama with random weights: speed only."""
    source = folder / "llama" / "original.onnx"
    if not source.exists():
        from onnxlathe.models.decoder import decoder as make

        save(lathe.export_causal_lm(make("llama_135m"), check=False), source)
    plain = PruneWidth(ratio=0.2, what=("ffn",), method="magnitude", refit=False)
    eight = QuantizeWeights(bits=8)
    found = {
        "fused": ("original", FUSED),
        "width 20 %": ("fused", [plain, "cleanup"]),
        "8-bit weights": ("fused", [eight]),
        "width 20 % + 8-bit weights": ("width 20 %", [eight]),
    }
    prompts = np.random.default_rng(0).integers(3, 40_000, (2, 16))
    texts = {"2 texts of 16 + 12": {"prompt": prompts, "new": np.array(12)}}
    return Subject("llama", "", [], None, texts, found, text=True)


def _nats(model: ir.Model, judged: list[Feeds]) -> float:
    """Of all tokens of the judged stories, each from its start."""
    session = open_session(model, session_options(threads=1))
    return nats(judged, [run_session(session, _with_caches(sample, model), ["logits"]) for sample in judged])


def _with_caches(sample: Feeds, model: ir.Model) -> Feeds:
    """``sample`` with empty caches as ``model`` takes them, which may have lost heads."""
    caches = {v.name: v.shape for v in model.graph.inputs if v.name and v.name.startswith("past") and v.shape}
    return {**sample, **{name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in caches.items()}}


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"mlp": mlp, "encoder": encoder, "decoder": decoder, "llama": llama}


def prepare(name: str, folder: Path) -> dict[str, Any]:
    """Compiles every technique and judges it; what is there already stays. Returns what is known of each model."""
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    subject = SUBJECTS[name](folder)
    for number, (label, feeds) in enumerate(subject.workloads.items()):
        np.savez(home / f"workload-{number}.npz", **feeds)
        print(f"{name}: workload {number} is {label}", flush=True)
    notes = home / "known.json"
    known: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {}
    known |= {"": {"metric": subject.metric, "workloads": list(subject.workloads), "text": subject.text}}
    for technique, (source, steps) in {"original": ("original", []), **subject.pipelines}.items():
        path = model_path(folder, name, technique)
        if technique in known and path.exists():
            continue
        failed = known.get(source, {}).get("failure")
        made = {"failure": failed} if failed else _made(subject, model_path(folder, name, source), path, steps)
        known[technique] = made
        print(name, technique, known[technique], flush=True)
        notes.write_text(json.dumps(known, indent=1))
    notes.write_text(json.dumps(known, indent=1))
    return known


def _made(subject: Subject, source: Path, path: Path, steps: Sequence[Any]) -> dict[str, Any]:
    told: list[str] = []
    if steps:
        given = [_with_caches(sample, load(source)) for sample in subject.calibration] or None
        try:
            out = lathe.compile(source, steps, calibration=given, threads=1, speed_gate=False, progress=False)
        except lathe.LatheError as error:
            return {"failure": str(error)}
        out.save(path)
        told = [note for record in out.report.passes if record.name.startswith("prune") for note in record.notes]
    model = load(path)
    quality = subject.judge(path) if subject.judge is not None else None
    return {"quality": quality, "bytes": weight_bytes(model), "weights": product_weights(model), "notes": told}


def product_weights(model: ir.Model) -> int:
    """Weights that products multiply with: proportional to their arithmetic, and to the bytes of fp32 they read."""
    layers = [layer for node in model.graph if (layer := linear_layer(node)) is not None]
    return sum(layer.stored.const_value.size for layer in layers if layer.stored.const_value is not None)


def model_path(folder: Path, name: str, technique: str) -> Path:
    """Where a technique's model lies."""
    return folder / name / f"{re.sub('[^a-z0-9]+', '-', technique.lower())}.onnx"
