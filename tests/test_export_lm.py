"""``export_causal_lm`` on tiny models of each family, against the Hugging Face model run without any cache."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import onnxlathe as lathe

transformers = pytest.importorskip("transformers")

HIDDEN, VOCABULARY, LAYERS = 64, 200, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# family -> what differs from SIZES; sliding windows are shorter than the sequences of the test
FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {"num_key_value_heads": 1, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {"head_dim": 32},
    "GPT2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
    "Phi": {"num_key_value_heads": 4},
    "Phi3": {"sliding_window": 4},
    "Gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "Gemma2": {"head_dim": 16, "sliding_window": 4},
    "Gemma3": {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": 4},
}
CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}
MODEL_NAMES = {"GPT2": "GPT2LMHeadModel"}


def build(family: str, **changes):
    config = getattr(transformers, CONFIG_NAMES.get(family, f"{family}Config"))
    known = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"} if family == "GPT2" else SIZES.keys()
    options = {**{key: SIZES[key] for key in known}, **FAMILIES[family], **changes}
    torch.manual_seed(0)
    return getattr(transformers, MODEL_NAMES.get(family, f"{family}ForCausalLM"))(config(**options))


def session_of(model: ir.Model) -> ort.InferenceSession:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def logits_step_by_step(session, ids, mask, steps) -> np.ndarray:
    """Logits of all positions, computed in ``steps`` pieces with the cache handed on."""
    positions = (mask.cumsum(-1) - 1).clip(min=0)
    cache = {
        value.name: np.zeros([len(ids), value.shape[1], 0, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in session.get_outputs()]
    pieces, start = [], 0
    for length in steps:
        now = slice(start, start + length)
        feeds = {"input_ids": ids[:, now], "attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
        outputs = dict(zip(names, session.run(names, {**feeds, **cache}), strict=True))
        pieces.append(outputs["logits"])
        cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
        start = now.stop
    assert all(array.shape[2] == start for array in cache.values())
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_without_a_cache(family):
    module = build(family)
    model = lathe.export_causal_lm(module)
    session = session_of(model)
    generator = np.random.default_rng(0)
    for batch, padding, steps in ((1, 0, (1, 1, 6, 1)), (3, 5, (7, 1, 1, 2))):
        ids = generator.integers(3, VOCABULARY, (batch, sum(steps)))
        mask = np.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clip(min=0)
        with torch.no_grad():
            expected = (
                module.eval()(
                    input_ids=torch.tensor(ids),
                    attention_mask=torch.tensor(mask),
                    position_ids=torch.tensor(positions),
                    use_cache=False,
                )
                .logits[torch.tensor(mask).bool()]
                .numpy()
            )
        got = logits_step_by_step(session, ids, mask, steps)[mask.astype(bool)]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()

    assert [v.name for v in model.graph.inputs[:4]] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
    ]
    shapes = {value.name: str(value.shape) for value in [*model.graph.inputs, *model.graph.outputs]}
    heads, size = model.graph.inputs[3].shape[1], model.graph.inputs[3].shape[3]
    assert shapes["input_ids"] == shapes["position_ids"] == "[batch,sequence]"
    assert shapes["attention_mask"] == "[batch,total_sequence]"
    assert shapes["past_key_values.1.value"] == f"[batch,{heads},past_sequence,{size}]"
    assert shapes["logits"] == f"[batch,sequence,{VOCABULARY}]"
    assert shapes["present.1.key"] == f"[batch,{heads},total_sequence,{size}]"
    assert len(shapes) == 4 + 4 * LAYERS

    # The embedding is stored once where it is also the output projection, and weights are the module's own memory.
    large = [value for value in model.graph.initializers.values() if value.const_value.size == HIDDEN * VOCABULARY]
    assert len(large) == (1 if module.config.tie_word_embeddings else 2)
    weights = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value.size > 512]
    owned = [parameter.detach().numpy() for parameter in module.parameters()]
    assert all(any(np.shares_memory(weight, array) for array in owned) for weight in weights)
    assert not any(name.startswith("lm.") for name in model.graph.initializers)


def test_eager_attention_and_training_flags():
    module = build("Llama")
    module.set_attn_implementation("eager")
    module.train()
    model = lathe.export_causal_lm(module)
    assert module.training and module.lm_head.training
    assert not any(node.op_type == "IsNaN" for node in model.graph)  # which the sdpa translation has


def test_generates_what_the_model_generates():
    module = build("Llama")
    session = session_of(lathe.export_causal_lm(module, check=False))
    prompt = torch.tensor([[5, 9, 14, 3]])
    expected = module.eval().generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0].tolist()
    tokens = prompt[0].tolist()
    for _ in range(8):
        ids = np.array([tokens])
        logits = logits_step_by_step(session, ids, np.ones_like(ids), [4] + [1] * (len(tokens) - 4))[0, -1]
        logits[2] = -np.inf  # min_new_tokens forbids the end token
        tokens.append(int(logits.argmax()))
    assert tokens == expected


def test_disagreement_is_an_error(monkeypatch):
    module = build("Llama")
    layer = module.model.layers[1].mlp
    original = type(layer).forward
    monkeypatch.setattr(
        type(layer),
        "forward",
        lambda self, x: original(self, x) * (0.5 if torch.compiler.is_exporting() and self is layer else 1),
    )
    with pytest.raises(lathe.ExportError, match=r"'logits' differs from PyTorch on prefill of 1 sequence.*relative"):
        lathe.export_causal_lm(module)


def test_a_wrong_second_step_is_found(monkeypatch):
    """A cache that is lost on the way only shows after the prefill."""
    module = build("Llama")
    original = transformers.DynamicCache.get_seq_length

    def forgetful(self, *args, **kwargs):
        length = original(self, *args, **kwargs)
        return length - length if torch.compiler.is_exporting() else length

    monkeypatch.setattr(transformers.DynamicCache, "get_query_offset", forgetful)
    with pytest.raises(lathe.ExportError, match="on the second step"):
        lathe.export_causal_lm(module)


def test_other_models_are_refused():
    with pytest.raises(lathe.ExportError, match="not a Hugging Face causal language model"):
        lathe.export_causal_lm(torch.nn.Linear(2, 2))
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4)
    with pytest.raises(lathe.ExportError, match="Mamba"):
        lathe.export_causal_lm(transformers.MambaForCausalLM(config))


def test_missing_transformers_says_what_to_install():
    program = """
        import sys
        sys.modules["transformers"] = None
        import onnxlathe as lathe
        try:
            lathe.export_causal_lm(object())
        except lathe.ExportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert 'pip install "onnxlathe[hf]"' in done.stdout, done.stderr
