"""Many rows over several workers: in threads of this process, or on a Ray cluster where one is connected.

    python examples/data_parallel.py

On a cluster: ``ray start --head`` here, ``ray start --address=...`` on the other machines, ``ray.init("auto")`` at the
top of the program; nothing else changes. See docs/scaling.md.
"""

from __future__ import annotations

import numpy as np

import onnxlathe as lathe
from onnxlathe.models import zoo


def main() -> None:
    entry = zoo.build("mlp-784")
    model = lathe.export(entry.module, entry.args, dynamic_shapes=entry.dynamic_shapes)
    lathe.compile(model, "cpu-fp32", speed_gate=False).save("mlp.onnx")

    rows = np.random.default_rng(0).standard_normal((1000, 784)).astype(np.float32)
    with lathe.distributed.DataParallel("mlp.onnx", workers=2, threads=1) as workers:
        divided = workers.run({"pixels": rows})
    whole = lathe.Session("mlp.onnx", threads=2).run({"pixels": rows})
    for name, value in whole.items():
        print(name, value.shape, "largest difference:", np.abs(value - divided[name]).max())
        assert np.allclose(value, divided[name], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main()
