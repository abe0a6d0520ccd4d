"""Models that others exported, with real data: other exporters, old opsets, recurrent state, photos.

The files lie in ``../shared/data``, which a user's checkout does not have; the tests skip there.
"""

from __future__ import annotations

import gzip
import wave
from pathlib import Path

import numpy as np
import pytest

import onnxlathe as lathe

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real models are not here ({DATA})")


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """MNIST test images [count, 1, 28, 28] in 0..1, and labels."""
    with gzip.open(DATA / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(DATA / "mnist" / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images[:count].astype(np.float32) / 255, labels[:count]


def test_mnist_keeps_every_answer() -> None:
    images, labels = digits(300)
    path = DATA / "mnist" / "mnist_conv.onnx"
    name = lathe.load(path).graph.inputs[0].name or ""
    feeds = [{name: images[row : row + 1]} for row in range(3)]
    out = lathe.compile(path, "cpu-fp32", calibration=feeds, speed_gate=False, progress=False)
    assert out.report.error is not None and out.report.error <= 1e-5
    sessions = [lathe.Session(path), out.session()]
    answers = [
        [int(next(iter(session.run({name: images[row : row + 1]}).values())).argmax()) for row in range(300)]
        for session in sessions
    ]
    assert answers[0] == answers[1]
    assert np.mean(np.array(answers[1]) == labels) > 0.97


def test_speech_detector_with_state() -> None:
    with wave.open(str(DATA / "silero_vad" / "test.wav")) as file:
        audio = np.frombuffer(file.readframes(512 * 40), np.int16).astype(np.float32) / 32768
    path = DATA / "silero_vad" / "silero_vad_16k_op15.onnx"
    model = lathe.load(path)
    windows = audio.reshape(-1, 512)
    feeds = []
    for window in windows[10:12]:
        sample = {"input": np.concatenate([np.zeros(64, np.float32), window])[None]}
        for value in model.graph.inputs:
            if value.name == "state":
                sample["state"] = np.zeros((2, 1, 128), np.float32)
            elif value.name == "sr":
                sample["sr"] = np.array(16000, np.int64)
        feeds.append(sample)
    out = lathe.compile(path, "cpu-fp32", calibration=feeds, speed_gate=False, progress=False)
    assert out.report.error is not None and out.report.error <= 1e-5
    assert sum(out.report.ops_after.values()) < sum(out.report.ops_before.values())


def test_face_detector_of_an_old_exporter() -> None:
    path = DATA / "ultraface" / "version-RFB-320.onnx"
    rng = np.random.default_rng(0)
    name = next(value.name for value in lathe.load(path).graph.inputs if not value.is_initializer())
    feeds = [{name or "": rng.standard_normal((1, 3, 240, 320)).astype(np.float32)}]
    out = lathe.compile(path, "cpu-fp32", calibration=feeds, speed_gate=False, progress=False)
    assert out.report.error is not None and out.report.error <= 1e-5
    assert sum(out.report.ops_after.values()) < sum(out.report.ops_before.values())
