"""Saving and loading: nothing half-written, nothing lost, nothing read that must not be."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnxlathe as lathe
from onnxlathe.runtime import artifact
from onnxlathe.runtime.artifact import config_metadata, load, read_config, save
from onnxlathe.runtime.errors import ModelError
from onnxlathe.runtime.files import write_atomically

X = {"x": np.ones((2, 8), np.float32)}


def run_plain(path: Path) -> np.ndarray:
    """What plain onnxruntime makes of the file."""
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, X)[0]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_single_file_runs_in_plain_onnxruntime(small_model: ir.Model, tmp_path: Path) -> None:
    path = save(small_model, tmp_path / "m.onnx", metadata={"k": "v"})
    assert files(tmp_path) == {"m.onnx"} and run_plain(path).shape == (2, 600)
    assert load(path).metadata_props["k"] == "v" and "k" not in small_model.metadata_props


def test_external_data_beside_the_file(small_model: ir.Model, tmp_path: Path) -> None:
    single = run_plain(save(small_model, tmp_path / "a.onnx"))
    path = save(small_model, tmp_path / "m.onnx", external_data=True)
    assert files(tmp_path) == {"a.onnx", "m.onnx", "m.onnx.data"}
    assert np.array_equal(run_plain(path), single)
    assert isinstance(load(path).graph.initializers["w"].const_value, ir.ExternalTensor), "stays on disk"


def test_external_above_the_limit(small_model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_SINGLE_FILE_LIMIT", 10_000)
    save(small_model, tmp_path / "m.onnx")
    assert files(tmp_path) == {"m.onnx", "m.onnx.data"}
    with pytest.raises(ModelError, match="do not fit in one file"):
        save(small_model, tmp_path / "n.onnx", external_data=False)


def test_external_weights_come_into_a_single_file_when_asked(small_model: ir.Model, tmp_path: Path) -> None:
    first = save(small_model, tmp_path / "m.onnx", external_data=True)
    model = load(first)
    second = save(model, tmp_path / "n.onnx", external_data=False)
    (tmp_path / "m.onnx.data").unlink()
    assert run_plain(second).shape == (2, 600)
    assert files(tmp_path) == {"m.onnx", "n.onnx"}


def test_saving_over_itself_keeps_the_weights(small_model: ir.Model, tmp_path: Path) -> None:
    """The old data file is mapped while the new one is written, and goes only afterwards."""
    path = save(small_model, tmp_path / "m.onnx", external_data=True)
    before = run_plain(path)
    for _ in range(2):
        save(load(path), path)
        assert np.array_equal(run_plain(path), before)
    assert len(files(tmp_path)) == 2, "no stale data file is left"


@pytest.mark.parametrize("external", [False, True])
def test_a_crash_leaves_the_old_file(
    small_model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    path = save(small_model, tmp_path / "m.onnx", external_data=external)
    content = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def crash(*args: object, **kwargs: object) -> None:
        Path(args[1]).write_bytes(b"half")  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(ir, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        save(small_model, path, external_data=external)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == content


@pytest.mark.parametrize("external", [False, True])
def test_a_crash_at_the_last_rename_leaves_the_old_file(
    small_model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    path = save(small_model, tmp_path / "m.onnx", external_data=external)
    content = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    replace = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(small_model, path, external_data=external)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == content


def test_a_full_disk_is_said_in_one_paragraph(
    small_model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ModelError, match=r"m\.onnx cannot be written: No space left.*free space"):
        save(small_model, tmp_path / "m.onnx")
    assert files(tmp_path) == set()


def test_write_atomically_cleans_up(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"1")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a", "text")  # type: ignore[arg-type]
    assert files(tmp_path) == {"a"} and (tmp_path / "a").read_bytes() == b"1"


def test_session_options_travel(small_model: ir.Model, tmp_path: Path) -> None:
    config = {"config_entries": {"session.intra_op.allow_spinning": "0"}, "graph_optimization_level": "basic"}
    path = save(small_model, tmp_path / "m.onnx", metadata=config_metadata(config))
    metadata = load(path).metadata_props
    assert read_config(metadata) == config
    assert json.loads(metadata["ort_config"]) == {"session_options": {"graph_optimization_level": 1}}
    options = lathe.Session(path).ort.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert config_metadata({}) == {}


def test_folder_that_is_not_there(small_model: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        save(small_model, tmp_path / "no" / "m.onnx")


def test_bad_files(small_file: Path, tmp_path: Path) -> None:
    whole = small_file.read_bytes()
    cases = {
        "missing.onnx": (None, "no file"),
        "empty.onnx": (b"", "is empty"),
        "text.onnx": (b"This is not a protobuf, but a letter.", "is not an ONNX model"),
        "half.onnx": (whole[: len(whole) // 2], "is not an ONNX model"),
        "weights.onnx": (np.ones(99).tobytes(), "is not an ONNX model"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            load(path)


def external_reference(small_model: ir.Model, folder: Path, location: str) -> Path:
    path = save(small_model, folder / "m.onnx", external_data=True)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin"])
def test_paths_outside_the_folder_are_refused(small_model: ir.Model, tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(30_000))
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(external_reference(small_model, folder, location))


def test_missing_and_truncated_external_data(small_model: ir.Model, tmp_path: Path) -> None:
    path = save(small_model, tmp_path / "m.onnx", external_data=True)
    data = tmp_path / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(ModelError, match="is truncated"):
        load(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"m\.onnx\.data, which is missing"):
        load(path)


def test_compressed(small_model: ir.Model, tmp_path: Path) -> None:
    """Reloads exactly, runs here and in plain onnxruntime, is reproducible, and zeros make it small."""
    weight = small_model.graph.initializers["w"]
    dense = weight.const_value.numpy().copy()  # type: ignore[union-attr]
    dense[np.random.default_rng(0).random(dense.shape) < 0.9] = 0
    weight.const_value = ir.tensor(dense, name="w")
    expected = run_plain(save(small_model, tmp_path / "m.onnx"))
    path = save(small_model, tmp_path / "m.onnx.gz", metadata={"k": "v"})
    assert path.stat().st_size < 0.3 * (tmp_path / "m.onnx").stat().st_size
    again = load(path)
    assert again.metadata_props["k"] == "v"
    assert np.array_equal(again.graph.initializers["w"].const_value.numpy(), dense)  # type: ignore[union-attr]
    content = gzip.decompress(path.read_bytes())
    plain = ort.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, X)[0]
    assert np.array_equal(plain, expected)
    assert np.array_equal(next(iter(lathe.Session(path).run(X).values())), expected)
    first = path.read_bytes()
    assert save(small_model, path, metadata={"k": "v"}).read_bytes() == first
    assert files(tmp_path) == {"m.onnx", "m.onnx.gz"}


def test_compressed_takes_external_data_in(small_model: ir.Model, tmp_path: Path) -> None:
    model = load(save(small_model, tmp_path / "m.onnx", external_data=True))
    path = save(model, tmp_path / "n.onnx.gz")
    assert np.array_equal(next(iter(lathe.Session(path).run(X).values())), run_plain(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="one compressed file"):
        save(model, path, external_data=True)
    outside = tmp_path / "o.onnx.gz"
    outside.write_bytes(gzip.compress((tmp_path / "m.onnx").read_bytes()))
    with pytest.raises(ModelError, match="lies in another file"):
        load(outside)


def test_broken_compressed_files(small_model: ir.Model, tmp_path: Path) -> None:
    path = save(small_model, tmp_path / "m.onnx.gz")
    content = path.read_bytes()
    for broken in (content[:-20], content[: len(content) // 2], b"no gzip at all", gzip.compress(b"no model")):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match="truncated"):
            load(path)
