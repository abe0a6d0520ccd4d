"""The edge bundle: a folder with all that a device needs to run a model, and to see for itself that it runs right.

::

    m.bundle/
        m.onnx, m.onnx.data       the artifact
        session.json              session options, in onnxruntime's own words
        bundle.json               names, types, tolerance, versions, and how a decoder's cache goes round
        sample/inputs.npz, expected.npz, inputs/*.bin, outputs/*.bin (little-endian, for the web)
        run.py, selftest.py       plain onnxruntime and numpy; a decoder also has generate.py
        web.html                  the same test in onnxruntime-web
        report.json, report.html  what the compile did (the page where jinja2 is installed)
        SHA256SUMS                of all the others, for ``sha256sum --check``
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from ..runtime.artifact import is_compressed, save
from ..runtime.environment import environment
from ..runtime.errors import ModelError
from ..runtime.feeds import check_feeds, make_feeds
from ..runtime.files import new_folder
from ..runtime.generation.causal_lm import MASK, TOKENS, CausalLM, read_causal_lm
from ..runtime.generation.quantized_cache import cache_scales, quantize_caches
from ..runtime.inference import open_session, run_session, session_options
from ..runtime.providers import Device, providers_for
from ..runtime.session import Session
from ..runtime.targets import obstacles
from .graph import all_nodes
from .report import Report
from .verify import relative_error

Array = np.ndarray[Any, Any]
MANIFEST = "bundle.json"
SUMS = "SHA256SUMS"
OLDEST_RUNTIME = "1.30"
"""The onnxruntime that kernels.json and the passes were last checked against, also in the browser."""
_NEW_TOKENS = 16
_LEAST_TOLERANCE, _MARGIN = 1e-4, 2
_FLOAT32_LEVEL = 1  # accuracy_level of MatMulNBits
_DISTURBANCE, _DISTURBANCES, _SMALL = 1e-6, 3, 65_536


def bundle_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of the bundle of a model called ``path``: ``m.bundle`` for ``m.onnx``."""
    return Path(path).with_suffix(".bundle")


def save_bundle(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    report: Report,
    metadata: Mapping[str, str],
    ort_config: Mapping[str, Any],
    sample: Mapping[str, Array] | None = None,
    external_data: bool | None = None,
    extra: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Path:
    """Writes the bundle of a compiled model; an older one of this name is replaced when the new one is complete.

    The expected output is what the saved file gives here, with its session options. Kernels of other machines differ in
    the last digits, which quantized models answer by other codes, and where there is no integer kernel for MatMulNBits
    (in the browser, for one) ``accuracy_level=4`` means float32. So the tolerance (relative to the largest value of an
    output) is twice the largest difference to what the model gives with its small float constants disturbed by 1e-6,
    and with MatMulNBits in float32 and onnxruntime's optimizations off; at least 1e-4.

    Args:
        model: the model.
        path: the ``.onnx`` name; the folder is ``bundle_folder(path)`` and the model in it has this name.
        report: the report of the compile.
        metadata: ``metadata_props`` of the artifact.
        ort_config: session options, as stored in the artifact.
        sample: inputs for the self-test, ``{input name: array}``; None: made from the input types. Of a padded
            one the first row is taken, without its padding. A decoder's prompt is the first row of its ``input_ids``.
        external_data: as for ``artifact.save``.
        extra: files to add, by the names they get, such as ``tokenizer.json``.

    Returns:
        The folder.

    Raises:
        ModelError: the model does not run on the sample, or the folder cannot be written or holds something else.
    """
    name = Path(path).name
    if is_compressed(path) or Path(path).suffix != ".onnx":
        raise ModelError(f"A bundle cannot hold a model called {name}.", "Give a name that ends in .onnx.")
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    sample = _without_padding(sample or make_feeds(model, count=1)[0], inputs)
    sample = quantize_caches(sample, cache_scales(model))
    check_feeds(inputs, sample)
    strange = [name for name, array in sample.items() if array.dtype.kind not in "fiub"]
    if strange:
        raise ModelError(
            f"A bundle cannot hold a sample of the inputs {strange}, which are not numbers.", "Save without bundle."
        )
    device: Device = "cuda" if report.device == "cuda" else "cpu"
    target = bundle_folder(path)
    with new_folder(target, MANIFEST, "a bundle") as draft:
        file = save(model, draft / name, metadata=metadata, external_data=external_data)
        data = sorted(other.name for other in draft.iterdir() if other != file)
        expected = run_session(open_session(file, session_options(ort_config=ort_config), device), sample)
        tolerance = _tolerance(model, sample, expected, ort_config, device)
        manifest = {
            "format": 1,
            "model": name,
            "external_data": data,
            "opsets": dict(model.opset_imports),
            "written_with": {**environment(), "onnxruntime": ort.__version__},
            "requires": {"onnxruntime": OLDEST_RUNTIME},
            "providers": providers_for(device),
            "tolerance": tolerance,
            "inputs": _write_arrays(draft, "inputs", sample),
            "outputs": _write_arrays(draft, "outputs", expected),
        }
        decoder = _decoder(model)
        if decoder is not None:
            manifest["decoder"] = _describe_decoder(decoder, file, sample, ort_config, device)
        _write_json(draft / MANIFEST, manifest)
        _write_json(draft / "session.json", session_json(ort_config))
        _write_json(draft / "report.json", report.to_dict())
        if find_spec("jinja2") is not None:  # the extra `report`
            report.html(draft / "report.html")
        scripts = ["run.py", "selftest.py", *(["generate.py"] if decoder is not None else [])]
        scripts += [] if obstacles(model, "web") else ["web.html"]
        for script in scripts:
            content = resources.files(__package__ or "").joinpath("bundle_files", script).read_bytes()
            (draft / script).write_bytes(content)
        for other, source in (extra or {}).items():
            shutil.copyfile(source, draft / other)
        _write_sums(draft)
    return target


def session_json(ort_config: Mapping[str, Any]) -> dict[str, Any]:
    """``ort_config`` with every option said, by the names of onnxruntime's ``SessionOptions`` and its enums."""
    level = ort_config.get("graph_optimization_level", "all")
    order = "PRIORITY_BASED" if ort_config.get("execution_order") == "priority" else "DEFAULT"
    return {
        "graph_optimization_level": "ORT_DISABLE_ALL" if level == "disable" else f"ORT_ENABLE_{level.upper()}",
        "execution_order": order,
        "enable_mem_pattern": ort_config.get("memory_pattern", True),
        "enable_mem_reuse": ort_config.get("memory_reuse", True),
        "enable_cpu_mem_arena": ort_config.get("memory_arena", True),
        "config_entries": dict(ort_config.get("config_entries", {})),
    }


def _tolerance(
    model: ir.Model,
    sample: Mapping[str, Array],
    expected: Mapping[str, Array],
    ort_config: Mapping[str, Any],
    device: Device,
) -> float:
    """How much the outputs may differ elsewhere, see ``save_bundle``."""
    variants = [(_float_products(model), session_options(optimize=False))]
    variants += [(_disturbed(model, seed), session_options(ort_config=ort_config)) for seed in range(_DISTURBANCES)]
    worst = 0.0
    for variant, options in variants:
        results = run_session(open_session(variant, options, device), sample)
        errors = [relative_error(expected[name], results[name]) for name in expected]
        worst = max([worst, *(error for error in errors if np.isfinite(error))])
    return max(_LEAST_TOLERANCE, _MARGIN * worst)


def _float_products(model: ir.Model) -> ir.Model:
    """A clone whose MatMulNBits compute in float32."""
    clone = model.clone()
    for node in all_nodes(clone):
        if node.op_type == "MatMulNBits" and "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32_LEVEL)
    return clone


def _disturbed(model: ir.Model, seed: int) -> ir.Model:
    """A clone whose small float32 constants are off by up to 1e-6 of themselves, about what a sum may be off by."""
    rng, clone = np.random.default_rng(seed), model.clone()
    for graph in clone.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size > _SMALL:
                continue
            array = tensor.numpy()
            noise = (array * _DISTURBANCE * rng.uniform(-1, 1, array.shape)).astype(np.float32)
            with np.errstate(over="ignore"):  # the lowest float, as masks have it
                moved = array + noise
            value.const_value = ir.tensor(np.where(np.isfinite(moved), moved, array), name=value.name)
    return clone


def _without_padding(sample: Mapping[str, Array], inputs: Sequence[ir.Value]) -> dict[str, Array]:
    """Of a padded sample the tokens of the first row: what a quantized model says of padding hangs on the last digit.

    Where the shapes are fixed, or there is a cache, the mask becomes ones instead.
    """
    ids, mask = sample.get(TOKENS), sample.get(MASK)
    if ids is None or mask is None or mask.all():
        return dict(sample)
    fixed = any(isinstance(dim, int) for value in inputs if value.name == MASK for dim in value.shape or ())
    if fixed or ids.shape != mask.shape:
        return {**sample, MASK: np.ones_like(mask)}
    kept = mask[0].astype(bool)
    return {
        name: array[:1, kept] if array.shape[:2] == mask.shape else array[:1] if len(array) == len(mask) else array
        for name, array in sample.items()
    }


def _decoder(model: ir.Model) -> CausalLM | None:
    try:
        return read_causal_lm(model)
    except ModelError:
        return None


def _describe_decoder(
    decoder: CausalLM, file: Path, sample: Mapping[str, Array], ort_config: Mapping[str, Any], device: Device
) -> dict[str, Any]:
    """What ``generate.py`` needs, with a prompt and what ``Session.generate`` makes of it."""
    prompt = [int(token) for token in sample[TOKENS][0]]
    count = _NEW_TOKENS if decoder.positions is None else min(_NEW_TOKENS, decoder.positions - len(prompt))
    session = Session(file, device=device, ort_config=ort_config)
    expected = session.generate(prompt, count) if count > 0 else []
    return {
        "tokens": {name: dtype.numpy().name for name, dtype in decoder.tokens.items()},
        "cache": [
            {"past": c.past, "present": c.present, "heads": c.heads, "size": c.size, "dtype": c.dtype.numpy().name}
            for c in decoder.cache
        ],
        "eos": list(decoder.eos),
        "prompt": prompt,
        "expected": [int(token) for token in expected],
    }


def _write_arrays(draft: Path, side: str, arrays: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Writes ``sample/inputs.npz`` or ``sample/expected.npz`` and a raw file for each array; says what they are."""
    folder = draft / "sample" / side
    folder.mkdir(parents=True)
    described: list[dict[str, Any]] = []
    # np.savez takes names as keywords, and has one called "file" of its own.
    with zipfile.ZipFile(draft / "sample" / f"{'inputs' if side == 'inputs' else 'expected'}.npz", "w") as archive:
        for number, (name, array) in enumerate(arrays.items()):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            raw = folder / f"{number}.bin"
            little = array if sys.byteorder == "little" else array.astype(array.dtype.newbyteorder("<"))
            raw.write_bytes(np.ascontiguousarray(little).tobytes())
            file = raw.relative_to(draft).as_posix()
            described.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "file": file})
    return described


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _write_sums(draft: Path) -> None:
    lines: list[str] = []
    for file in sorted(path for path in draft.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            lines.append(
                f"{hashlib.file_digest(content, 'sha256').hexdigest()}  {file.relative_to(draft).as_posix()}\n"
            )
    (draft / SUMS).write_text("".join(lines))
