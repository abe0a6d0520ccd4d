"""Runs the model on the sample input with plain onnxruntime: python run.py"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent
BUNDLE = json.loads((HERE / "bundle.json").read_text())


def open_session(threads=0):
    wanted, options = json.loads((HERE / "session.json").read_text()), ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, wanted["graph_optimization_level"])
    options.execution_order = getattr(ort.ExecutionOrder, wanted["execution_order"])
    options.enable_mem_pattern = wanted["enable_mem_pattern"]
    options.enable_mem_reuse = wanted["enable_mem_reuse"]
    options.enable_cpu_mem_arena = wanted["enable_cpu_mem_arena"]
    for key, value in wanted["config_entries"].items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(HERE / BUNDLE["model"], options, providers=BUNDLE["providers"])


def run(session, feeds):
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


if __name__ == "__main__":
    for name, array in run(open_session(), dict(np.load(HERE / "sample" / "inputs.npz"))).items():
        print(name, array.dtype, list(array.shape), array.ravel()[:4])
