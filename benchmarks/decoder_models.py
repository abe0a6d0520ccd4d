"""Makes what the sides of the decoder benchmark run: one set of seeded weights, exported, built and compiled.

Kept in ``ROOT`` between runs (about 540 MB a side for the 135M model); only onnxlathe's artifact is made anew.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import Side, prepare
from peers import ROOT as VENVS
from peers import python_of

ROOT = Path(os.environ.get("ONNXLATHE_BENCH_MODELS", VENVS.parent / "bench-decoder"))
NOT_INSTALLED = "not installed: run benchmarks/peers.py"
LOOPS = ("genai loop", "genai loop as it comes", "onnxlathe loop", "torch generate")
NAMES = (
    "genai graph",
    "genai graph last-logits",
    "genai int4 graph",
    "genai int8 graph",
    "ORT opset 20 eager",
    "ORT opset 23 SDPA",
    "onnxlathe",
    "OpenVINO",
    "OpenVINO int4",
    "torch eager",
    "torch eager last-logits",
    "torch.compile",
    *LOOPS,
)


def make_side(name: str, config: str, preset: str) -> Side:
    """The side called ``name``, its model made if it is not there; with the reason where that fails."""
    side = Side(name, "", "", worker="decoder_worker.py")
    try:
        side.kind, side.model, side.python = _model(name, config, preset)
        if not python_of(side.python).exists():
            side.failure = NOT_INSTALLED
        elif side.model.endswith(".onnx"):
            side.note = describe(Path(side.model))
        elif side.model.endswith(".xml"):
            size = sum(file.stat().st_size for file in Path(side.model).parent.iterdir()) / 1e6
            side.note = f"cache a state, all logits, {size:.1f} MB"
        else:
            side.note = {
                "torch eager": "DynamicCache; all logits",
                "torch eager last-logits": "DynamicCache; last logits",
                "torch.compile": "StaticCache; all logits",
                "genai loop as it comes": "its own choice of threads",
            }.get(name, "")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        side.failure = str(error)
    return side


def _model(name: str, config: str, preset: str) -> tuple[str, str, str]:
    """Kind of worker, model, and environment."""
    folder = ROOT / config
    if name.startswith("genai"):
        if not python_of("genai").exists():
            raise RuntimeError(NOT_INSTALLED)
        last = name.endswith("last-logits")
        precision = next((kind for kind in ("int4", "int8") if kind in name), "fp32")
        plain = "genai" if precision == "fp32" else f"genai-{precision}"
        built = _genai(config, folder / ("genai-last" if last else plain), last, precision)
        return (name, str(built), "genai") if "loop" in name else ("ort", str(built / "model.onnx"), "ours")
    if name.startswith("ORT"):
        _, _, opset, attention = name.split()
        return "ort", str(export(config, int(opset), attention.lower())), "ours"
    if name == "OpenVINO":
        return "openvino", str(export(config, 20, "sdpa")), "openvino"
    if name == "OpenVINO int4":
        return "openvino", str(_openvino_int4(config)), "openvino"
    if name.startswith("onnxlathe"):
        return "lathe loop" if "loop" in name else "lathe", str(_compile(config, preset)), "ours"
    kinds = {"torch.compile": "torch.compile", "torch eager last-logits": "torch last", "torch generate": "torch loop"}
    return kinds.get(name, "torch"), str(weights(config)), "ours"


def weights(config: str) -> Path:
    """The folder of ``save_pretrained``, with a tokenizer that genai's builder can copy: one word per token."""
    target = ROOT / config / "huggingface"
    if target.exists():
        return target
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    module = _module(config)
    draft = _draft(target)
    module.save_pretrained(draft)
    vocabulary = {f"t{i}": i for i in range(module.config.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    special = {"bos_token": "t1", "eos_token": "t2", "pad_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(draft)
    return draft.rename(target)


def _module(config: str) -> Any:
    if config == "stories260k":
        from onnxlathe.models.stories import stories260k

        return stories260k()
    from onnxlathe.models.decoder import decoder

    return decoder(config)


def export(config: str, opset: int, attention: str) -> Path:
    """The plain export of onnxlathe's exporter, made once and kept."""
    target = ROOT / config / f"export-{opset}-{attention}" / "model.onnx"
    if target.exists():
        return target
    import onnxlathe as lathe
    from onnxlathe.runtime.artifact import save

    module = _module(config)
    module.set_attn_implementation(attention)
    draft = _draft(target.parent)
    # Not checked here: every side is compared with PyTorch before it is timed.
    save(lathe.export_causal_lm(module, opset=opset, check=False), draft / "model.onnx", external_data=True)
    draft.rename(target.parent)
    return target


def _genai(config: str, target: Path, last: bool, precision: str) -> Path:
    """The folder that genai's builder makes, with its defaults or with only the last position's logits."""
    if target.exists():
        return target
    draft = _draft(target)
    options = ["--extra_options", "prune_lm_head=true"] if last else []
    command = [python_of("genai"), "-m", "onnxruntime_genai.models.builder", "-i", weights(config), "-o", draft]
    done = subprocess.run(
        [*command, "-p", precision, "-e", "cpu", "-c", draft / "cache", *options], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"genai's builder: {done.stderr.strip().splitlines()[-1][:160]}")
    return draft.rename(target)


def _openvino_int4(config: str) -> Path:
    target = ROOT / config / "openvino-int4" / "model.xml"
    if target.exists():
        return target
    if not python_of("nncf").exists():
        raise RuntimeError(NOT_INSTALLED)
    draft = _draft(target.parent)
    script = Path(__file__).parent / "decoder_openvino.py"
    command = [python_of("nncf"), script, export(config, 20, "sdpa"), draft / target.name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nncf: {done.stderr.strip().splitlines()[-1][:160]}")
    draft.rename(target.parent)
    return target


def _compile(config: str, preset: str) -> Path:
    """Once a run: what the present code makes of the plain export."""
    target = ROOT / config / f"onnxlathe-{os.getpid()}" / "model.onnx"
    if target.exists():
        return target
    target.parent.mkdir(parents=True)
    done = prepare(f"onnxlathe {preset}", export(config, 20, "sdpa"), target, "ours", timeout=600)
    if "failure" in done:
        raise RuntimeError(done["failure"])
    return target


def clean(config: str) -> None:
    """Removes this run's artifact."""
    shutil.rmtree(ROOT / config / f"onnxlathe-{os.getpid()}", ignore_errors=True)


def describe(path: Path) -> str:
    """Nodes, attention operators, how the cache goes round, and which positions' logits are computed."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    ops = collections.Counter(node.op_type for node in graph.node)
    makers = {output: node.op_type for node in graph.node for output in node.output}
    presents = [value.name for value in graph.output if value.name.startswith("present")]
    in_place = all(makers[name] == "GroupQueryAttention" for name in presents)
    attention = [f"{ops[op]} {op}" for op in ("GroupQueryAttention", "MultiHeadAttention", "Attention") if ops[op]]
    logits = next(value for value in graph.output if value.name == "logits")
    last = logits.type.tensor_type.shape.dim[1].dim_value == 1
    parts = [f"{len(graph.node)} nodes", *attention, "cache in place" if in_place else "cache copied"]
    size = sum(file.stat().st_size for file in path.parent.glob("*.onnx*")) / 1e6
    return ", ".join([*parts, "last logits" if last else "all logits", f"{size:.1f} MB"])


def _draft(target: Path) -> Path:
    """A fresh folder beside ``target``, to be renamed when it is complete."""
    draft = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


if __name__ == "__main__":  # python benchmarks/decoder_models.py CONFIG PRESET NAME...
    for given in sys.argv[3:]:
        print(make_side(given, sys.argv[1], sys.argv[2]))
