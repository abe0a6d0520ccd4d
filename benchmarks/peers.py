"""The peers, each in a virtual environment of its own: several bring an onnxruntime that would overwrite ours.

python benchmarks/peers.py             # creates what is missing, a few minutes
python benchmarks/peers.py genai       # only this one
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import onnxruntime

ROOT = Path(os.environ.get("ONNXLATHE_BENCH_VENVS", Path.home() / ".cache" / "onnxlathe" / "bench-venvs"))
# venv -> what is installed in it; the onnxruntime is ours, so that both sides run the same kernels.
VENVS = {
    "tools": [
        f"onnxruntime=={onnxruntime.__version__}",
        "onnx",
        "onnxslim",
        "onnxsim",
        "onnxoptimizer",
        "onnxscript",
        "torch==2.13.0",
        "transformers",
        "psutil",
    ],
    "onnxsim": [f"onnxruntime=={onnxruntime.__version__}", "onnx", "onnxsim"],
    "openvino": ["openvino", "numpy", "psutil"],
    # Its model builder reads a Hugging Face folder with torch and transformers.
    "genai": [
        f"onnxruntime=={onnxruntime.__version__}",
        "onnxruntime-genai",
        "onnx",
        "onnx-ir",
        "torch==2.13.0",
        "transformers",
        "psutil",
    ],
    "executorch": ["executorch==1.5.1", "torch==2.13.0"],
    "nncf": [f"onnxruntime=={onnxruntime.__version__}", "nncf", "openvino", "onnx", "numpy"],
}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment; ``ours`` is the one this runs in."""
    return Path(sys.executable) if name == "ours" else ROOT / name / "bin" / "python"


def create(name: str) -> None:
    """Makes the environment if it is not there."""
    if python_of(name).exists():
        return
    ROOT.mkdir(parents=True, exist_ok=True)
    venv.create(ROOT / name, with_pip=True)
    subprocess.run([python_of(name), "-m", "pip", "install", "-q", *VENVS[name]], check=True)


def versions(name: str) -> dict[str, str]:
    """Versions of everything installed in an environment that matters to a comparison."""
    code = (
        "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions() "
        "if any(w in d.name.lower() for w in ('onnx', 'openvino', 'nncf', 'torch', 'numpy', 'transformers'))}))"
    )
    import json

    return json.loads(subprocess.run([python_of(name), "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    for environment in sys.argv[1:] or VENVS:
        print(f"{environment}: {', '.join(VENVS[environment])}")
        create(environment)
        print(f"  {versions(environment)}")
