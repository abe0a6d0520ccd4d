"""OpenVINO's side of the decoder benchmark: the plain ONNX export, its cache made a state as optimum-intel does it.

PYTHON benchmarks/decoder_openvino.py IN.onnx OUT.xml      # in the environment "nncf": weights in 4 bits
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from decoder_worker import DRIFT
from worker import Feeds


class OpenVino:
    """The cache lives inside the request; a ``beam_idx`` input reorders it, which OpenVINO's attention fusion wants."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino as ov

        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
                  "KV_CACHE_PRECISION": "f32"}  # fmt: skip
        compiled = ov.Core().compile_model(_stateful(ov.Core().read_model(model)), "CPU", config)
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.names}
        self._feeds: Feeds = {}

    def __call__(self, feeds: Feeds) -> Any:
        prompt = feeds["prompt"]
        if "token" not in feeds:
            self._request.reset_state()
            return self._step(prompt, 0)
        if feeds is not self._feeds:
            self._request.reset_state()
            self._step(prompt, 0)
            self._start = [(state, np.array(state.state.data)) for state in self._request.query_state()]
            self._length, self._feeds = prompt.shape[1], feeds
        elif self._length >= prompt.shape[1] + DRIFT:
            self._rewind(prompt.shape[1])
        self._length += 1
        return self._step(feeds["token"], self._length - 1)

    def _rewind(self, length: int) -> None:
        import openvino as ov

        for state, kept in self._start:
            state.state = ov.Tensor(kept)
        self._length = length

    def _step(self, ids: Any, length: int) -> Any:
        batch, new = ids.shape
        tokens = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, length + new), np.int64),
            "position_ids": np.tile(np.arange(length, length + new), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        result = self._request.infer({name: tokens[name] for name in self._inputs & tokens.keys()}, share_outputs=True)
        return result["logits"][:, -1]


def _stateful(model: Any) -> Any:
    """Makes each past/present pair a variable, read through a Gather by ``beam_idx``."""
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = opset13.parameter([-1], np.int32, name="beam_idx")
    beams.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beams])
    pairs: dict[str, str] = {}
    for port in model.inputs:
        name = port.any_name
        if "past" not in name:
            continue
        targets = port.get_target_inputs()
        gather = opset13.gather(port, beams, opset13.constant(0, dtype=np.int64))
        for target in targets:
            target.replace_source_output(gather.output(0))
        pairs[name] = name.replace("past_key_values", "present")
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    return model


def compress(source: str, target: str) -> None:
    """NNCF's 4-bit weights, symmetric in blocks of 32; as by its default, embedding and head get 8 bits."""
    import nncf
    import openvino as ov

    mode = nncf.CompressWeightsMode.INT4_SYM
    model = nncf.compress_weights(ov.Core().read_model(source), mode=mode, group_size=32, ratio=1.0)
    ov.save_model(model, target)


if __name__ == "__main__":
    compress(*sys.argv[1:])
