"""FuseGroupQueryAttention: every spelling, the near misses, a NumPy reference, a cache in place, torch as the judge."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from grouped_decoders import VOCABULARY, Rotary, Spec, decoder, reference, samples, step

from onnxlathe.compiler.base import PassContext
from onnxlathe.compiler.graph import attribute
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.verify import relative_error
from onnxlathe.passes import FuseGroupQueryAttention
from onnxlathe.runtime.inference import open_session, run_session, session_options
from rewriting import from_text, inside_if, ops, refused, rewrite, with_external_data

Array = np.ndarray[Any, Any]
PASS = FuseGroupQueryAttention(max_length=64)
RANGE = Rotary(16, angles="range")

SPELLINGS = {
    "repeated by Expand": Spec(),
    "repeated by Tile": Spec(repeat="tile"),
    "no repeats": Spec(kv_heads=4, repeat="none"),
    "one key/value head": Spec(kv_heads=1),
    "head size 32": Spec(size=32, rotary=(Rotary(32), Rotary(32))),
    "interleaved": Spec(rotary=(Rotary(16, interleaved=True),) * 2),
    "half of the features": Spec(size=32, rotary=(Rotary(16),) * 2),
    "half of the features, interleaved": Spec(size=32, rotary=(Rotary(16, interleaved=True),) * 2),
    "angles by slot": Spec(rotary=(RANGE, RANGE)),
    "angles from a table": Spec(rotary=(Rotary(16, angles="table"),) * 2),
    "learned positions": Spec(rotary=(None, None), learned=True),
    "one layer not rotated": Spec(rotary=(Rotary(16), None)),
    "each layer its own theta": Spec(rotary=(Rotary(16), Rotary(16, theta=10000.0))),
    "scores divided": Spec(scale="divided"),
    "scale on Q": Spec(scale="q"),
    "scale on K": Spec(scale="k"),
    "root of the scale on both": Spec(scale="both"),
    "no scale": Spec(scale="none"),
    "another scale": Spec(factor=0.3),
    "softcap": Spec(softcap=2.0),
    "Q and K normed": Spec(norm=True),
    "mask by Where": Spec(mask="where"),
    "mask by fill": Spec(mask="fill"),
    "ONNX Attention": Spec(mask="attention", repeat="none"),
    "ONNX Attention, repeated, capped": Spec(mask="attention", softcap=2.0),
    "window in one layer": Spec(windows=(3, 0)),
    "two windows": Spec(windows=(3, 4), mask="where"),
    "packed, Slice": Spec(packed="slice"),
    "packed, Split": Spec(packed="split"),
    "packed by head": Spec(packed="per head", kv_heads=4, repeat="none"),
    "mask int32": Spec(mask_type="int32"),
    "mask bool": Spec(mask_type="bool"),
    "mask float": Spec(mask_type="float"),
}
OUTSIDE = {
    "head size 8": Spec(size=8, rotary=(Rotary(8), Rotary(8))),
    "8 of 16 features": Spec(rotary=(Rotary(8), Rotary(8))),
    "head size 8, by slot": Spec(size=8, rotary=(Rotary(8, angles="range"),) * 2),
}


def nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    spec = SPELLINGS[name]
    after, outcome = rewrite(PASS, decoder(spec), feeds=samples(spec), nested=False)
    assert outcome.counts == {"GroupQueryAttention": 2} and not outcome.refusals
    left = ops(after)
    assert not {"Softmax", "Attention", "Expand", "Tile", "Where", "Cos", "Tanh"} & set(left), "the old block is gone"
    for node, rotary, window in zip(nodes(after), spec.rotary, spec.windows, strict=True):
        assert attribute(node, "num_heads") == spec.heads and attribute(node, "kv_num_heads") == spec.kv_heads
        assert attribute(node, "local_window_size", 0) == window and attribute(node, "softcap", 0.0) == spec.softcap
        assert attribute(node, "do_rotary", 0) == (rotary is not None)
        assert (node.inputs[1] is None) == (spec.packed in ("slice", "split"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_rotated_outside_where_the_kernel_cannot(name: str) -> None:
    spec = OUTSIDE[name]
    after, outcome = rewrite(PASS, decoder(spec), feeds=samples(spec), nested=False)
    assert ops(after)["com.microsoft.RotaryEmbedding"] == 4 and any("no multiple of 16" in n for n in outcome.notes)


def test_layers_of_one_kind_share_a_table() -> None:
    after, _ = rewrite(PASS, decoder(Spec()), feeds=samples(Spec()), nested=False)
    assert len({node.inputs[7] for node in nodes(after)}) == 1
    assert nodes(after)[0].inputs[7].shape == ir.Shape([64, 8])  # type: ignore[union-attr]
    assert after.metadata_props["onnxlathe.max_length"] == "64"


def test_table_ends_where_the_models_own_does() -> None:
    spec = Spec(rotary=(Rotary(16, angles="table"),) * 2)
    after, _ = rewrite(FuseGroupQueryAttention(), decoder(spec), feeds=samples(spec), nested=False)
    assert nodes(after)[0].inputs[7].shape == ir.Shape([64, 8])  # type: ignore[union-attr]
    assert after.metadata_props["onnxlathe.max_length"] == "64"


def replaced(*pairs: tuple[str, str], **options: Any) -> Spec:
    return Spec(replaced=pairs, **options)


ALIBI = "far = Cast<to=1>(away) slope = Mul(far, slopes) "
NTK = "top = Cast<to=1>({}) most = Max(top, limit) ratio = Div(most, limit) slow = Div(column0, ratio) "
WIDE_V = {"wv0": np.ones((24, 64), np.float32), "wo0": np.ones((128, 24), np.float32)}
ANOTHER = "x1 = RMSNormalization<axis=-1>(h_1, g)"
NEAR_MISSES: dict[str, tuple[Spec, str]] = {
    "ALiBi in the mask": (
        replaced(
            ("masked0 = Add(scaled0, bias0)", ALIBI + "all = Add(bias0, slope) masked0 = Add(scaled0, all)"),
            extra={"slopes": np.array([0.5, 0.25, 0.125, 0.1], np.float32).reshape(4, 1, 1)},
        ),
        "bias",
    ),
    "bias beside the mask": (
        replaced(
            ("masked0 = Add(scaled0, bias0)", ALIBI + "late = Add(scaled0, slope) masked0 = Add(late, bias0)"),
            extra={"slopes": np.array([0.5], np.float32)},
        ),
        "bias",
    ),
    "not causal": (replaced(("causal = LessOrEqual(keys, own2)", "causal = GreaterOrEqual(keys, keys)")), "not causal"),
    "sees one later token": (
        replaced(
            ("LessOrEqual(keys, own2)", "Less(keys, own3)"),
            ("own2 = Unsqueeze(own, i1)", "own2 = Unsqueeze(own, i1) own3 = Add(own2, s2)"),
            extra={"s2": np.array(2)},
        ),
        "not causal",
    ),
    "padding is seen": (replaced(("keep0 = And(padding, causal)", "keep0 = And(causal, causal)")), "no effect"),
    "cache read elsewhere": (
        replaced((ANOTHER, "mean = ReduceMean<keepdims=0>(present_0_key) " + ANOTHER), outputs="float mean"),
        "also read by ReduceMean",
    ),
    "V scaled": (
        replaced(
            ("(past_0_value, vt0)", "(past_0_value, vx)"),
            ("present_0_key = Concat", "vx = Mul(vt0, two) present_0_key = Concat"),
            extra={"two": np.float32(2)},
        ),
        "V is",
    ),
    "K turned the other way": (
        replaced(
            ("k0bs = Mul(k0b, sin0)", "back = Neg(sin0) k0bs = Mul(k0b, back)"),
            ("k0as = Mul(k0a, sin0)", "k0as = Mul(k0a, back)"),
        ),
        "different angles",
    ),
    "dynamic NTK by total": (
        replaced(
            ("angle0 = Mul(column0,", NTK.format("total") + "angle0 = Mul(slow,"), extra={"limit": np.float32(50)}
        ),
        "length of the input",
    ),
    "dynamic NTK by position": (
        replaced(
            (
                "angle0 = Mul(column0,",
                "most_of = ReduceMax<keepdims=0>(position_ids) " + NTK.format("most_of") + "angle0 = Mul(slow,",
            ),
            extra={"limit": np.float32(50)},
        ),
        "length of the input",
    ),
    "dynamic NTK by slot": (
        replaced(
            ("angle0 = Mul(column0,", NTK.format("total") + "angle0 = Mul(slow,"),
            extra={"limit": np.float32(50)},
            rotary=(RANGE, RANGE),
        ),
        "length of the input",
    ),
    "head size 12": (Spec(size=12, rotary=(Rotary(12), Rotary(12))), "no multiple of 8"),
    "K and V of two sizes": (
        replaced(
            ("float[batch, 2, past, 16] past_0_value", "float[batch, 2, past, 32] past_0_value"),
            ("float[batch, 2, total, 16] present_0_value", "float[batch, 2, total, 32] present_0_value"),
            ("vs0 = Reshape(vp0, i0_0_2_16)", "vs0 = Reshape(vp0, wide)"),
            ("vall0 = Reshape(vwide0, i0_4_m1_16)", "vall0 = Reshape(vwide0, widest)"),
            ("a0 = Reshape(ct0, i0_0_64)", "a0 = Reshape(ct0, merged)"),
            extra={
                **WIDE_V,
                "wide": np.array([0, 0, 2, 32]),
                "widest": np.array([0, 4, -1, 32]),
                "merged": np.array([0, 0, 128]),
            },
        ),
        "values 32",
    ),
    "causal by attribute": (
        replaced(("c0 = Attention<scale", "c0 = Attention<is_causal=1, scale"), mask="attention", repeat="none"),
        "causal by attribute",
    ),
    "probabilities are an output": (Spec(outputs="float[batch, 4, sequence, total] p0"), "also used elsewhere"),
    "scores are an output": (Spec(outputs="float[batch, 4, sequence, total] scaled0"), "also used elsewhere"),
    "logits of the last slot": (
        replaced(
            ("logits = MatMul(last, head)", "end = Gather<axis=1>(last, slot) logits = MatMul(end, head)"),
            ("float[batch, sequence, 40] logits", "float[batch, 1, 40] logits"),
            extra={"slot": np.array([-1])},
        ),
        "logits of one slot",
    ),
    "positions learned by slot": (
        replaced(
            ("place = Gather(places, position_ids)", "place = Gather(places, own)"), learned=True, rotary=(None, None)
        ),
        "slots or padding",
    ),
    "positions learned by the mask": (
        replaced(
            (
                "place = Gather(places, position_ids)",
                "sums = CumSum(attention_mask, one) mine = Slice(sums, before, t1, i1) place = Gather(places, mine)",
            ),
            ("new = Squeeze(n1)", "before = Sub(t1, n1) new = Squeeze(n1)"),
            learned=True,
            rotary=(None, None),
            extra={"one": np.array(1)},
        ),
        "slots or padding",
    ),
    "tokens mixed": (
        replaced(
            ("x0 = RMSNormalization<axis=-1>(h_0, g)", "sum = CumSum(h_0, one) x0 = RMSNormalization<axis=-1>(sum, g)"),
            extra={"one": np.array(1)},
        ),
        "slots or padding",
    ),
    "another input by token": (
        replaced(
            (
                "h_0 = Gather(embed, input_ids)",
                "t = Gather(embed, input_ids) s = Gather(places, token_type_ids) h_0 = Add(t, s)",
            ),
            inputs="int64[batch, sequence] token_type_ids",
        ),
        "token_type_ids",
    ),
    "only one layer is strange": (
        Spec(
            rotary=(Rotary(16), Rotary(16)),
            windows=(0, 0),
            replaced=(
                (
                    "masked1 = Add(scaled1, bias1)",
                    "twice1 = Add(scaled1, bias1) sig1 = Sigmoid(twice1) masked1 = Add(sig1, bias1)",
                ),
            ),
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    spec, reason = NEAR_MISSES[name]
    feeds = samples(spec)[1:2]
    for feed in feeds:
        if spec.inputs:
            feed["token_type_ids"] = np.ones_like(feed["input_ids"])
        if name == "K and V of two sizes":
            feed["past_key_values.0.value"] = np.tile(feed["past_key_values.0.value"], 2)
    outcome = refused(PASS, decoder(spec), reason, feeds=feeds, nested=False)
    assert len(outcome.refusals) == 1 and outcome.refusals[0].reason


def test_without_an_attention_mask_it_is_refused() -> None:
    model = decoder(Spec())
    infer_shapes(model)
    next(value for value in model.graph.inputs if value.name == "attention_mask").name = "padding_mask"
    outcome = PASS(model, PassContext())
    assert not outcome.changed and "no input attention_mask" in outcome.refusals[0].reason


def test_models_without_a_cache_are_not_spoken_of() -> None:
    model = from_text("""<ir_version: 10, opset_import: ["" : 23]>
      g (float[b, 4, s, 16] q, float[b, 4, s, 16] k) => (y) {
      t = Transpose<perm=[0,1,3,2]>(k) m = MatMul(q, t) p = Softmax(m) y = MatMul(p, k) }""")
    assert not refused(PASS, model).refusals


def test_a_decoder_in_a_branch_stays() -> None:
    model = inside_if(decoder(Spec()))
    infer_shapes(model)
    outcome = PASS(model, PassContext())
    assert not outcome.changed


@pytest.mark.parametrize("names", [("last", "h_1"), ("h_1", "last"), ("o0", "h_2")])
def test_other_outputs_by_token_come_back_in_order(names: tuple[str, str]) -> None:
    """Hidden states that later layers or the head read too: only the outputs are put in the caller's order."""
    spec = Spec(outputs=", ".join(f"float[batch, sequence, 24] {name}" for name in names))
    _, outcome = rewrite(PASS, decoder(spec), feeds=samples(spec), nested=False)
    assert outcome.changed


def test_unnamed_dims() -> None:
    """Outputs are by token because of what they do, not because of what their dims are called."""
    model = decoder(Spec())
    model.graph.outputs[0].shape = None
    _, outcome = rewrite(PASS, model, feeds=samples(Spec()), nested=False)
    assert outcome.changed


HEADS = {
    "bias and cap": "raw = MatMul(last, head) biased = Add(raw, bias) less = Div(biased, cap) t = Tanh(less) "
    "logits = Mul(t, cap)",
    "tied": "turned = Transpose<perm=[1,0]>(embed) logits = MatMul(last, turned)",
    "Gemm": "flat = Reshape(last, rows) gemm = Gemm(flat, head, bias) shape = Shape<end=2>(input_ids) "
    "whole = Concat<axis=0>(shape, columns) logits = Reshape(gemm, whole)",
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    extra = {"bias": np.linspace(-1, 1, VOCABULARY, dtype=np.float32), "cap": np.float32(3)}
    extra |= {"rows": np.array([-1, 24]), "columns": np.array([VOCABULARY])}
    spec = replaced(("logits = MatMul(last, head)", HEADS[name]), extra=extra)
    _, outcome = rewrite(PASS, decoder(spec), feeds=samples(spec), nested=False)
    assert outcome.changed


def test_shared_weights_and_a_projection_read_twice() -> None:
    spec = replaced(("x1, wq1", "x1, wq0"), ("x1, wk1", "x1, wk0"), outputs="float[batch, sequence, 64] qp0")
    _, outcome = rewrite(PASS, decoder(spec), feeds=samples(spec), nested=False)
    assert outcome.changed


def test_external_data(tmp_path: Path) -> None:
    model = with_external_data(decoder(Spec()), tmp_path)
    _, outcome = rewrite(PASS, model, feeds=samples(Spec()), nested=False)
    assert outcome.changed


def fused(spec: Spec) -> ir.Model:
    model = decoder(spec)
    infer_shapes(model)
    assert PASS(model, PassContext()).changed
    return model


@pytest.mark.parametrize(
    "spec",
    [
        Spec(rotary=(Rotary(16), Rotary(8, interleaved=True)), norm=True, softcap=3.0),
        Spec(rotary=(RANGE, None), windows=(4, 0)),
        Spec(size=8, rotary=(Rotary(8), Rotary(8)), kv_heads=1),
    ],
    ids=["norms, cap", "window", "outside"],
)
def test_numpy_reference(spec: Spec) -> None:
    """A left-padded prompt of two texts and three steps, against each text alone without any padding."""
    session = open_session(fused(spec), session_options(optimize=True), "cpu")
    texts = np.random.default_rng(3).integers(0, VOCABULARY, (2, 10))
    lengths = np.array([6, 4])
    prompt = np.zeros((2, 6), np.int64)
    mask = (np.arange(6) >= 6 - lengths[:, None]).astype(np.int64)
    for row, length in enumerate(lengths):
        prompt[row, 6 - length :] = texts[row, :length]
    feeds = step(spec, mask, 6)
    ids = prompt
    for turn in range(4):
        feeds |= {"input_ids": ids, "attention_mask": mask}
        if spec.has_positions:
            feeds["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        results = run_session(session, feeds)
        for row, length in enumerate(lengths):
            expected = reference(spec, texts[row, : length + turn])
            got = results["logits"][row][-min(ids.shape[1], length + turn) :]
            got = got[-(length if turn == 0 else 1) :]
            assert relative_error(expected[-len(got) :].astype(np.float32), got) < 1e-5
        feeds |= {
            name.replace("present", "past_key_values"): array for name, array in results.items() if "present" in name
        }
        ids = texts[np.arange(2), lengths + turn][:, None]
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)


@pytest.mark.parametrize("spec", [Spec(), Spec(windows=(3, 0)), Spec(packed="split", size=8, rotary=(Rotary(8),) * 2)])
def test_in_place(spec: Spec) -> None:
    """Past and present in one buffer, longer than needed, over a padded prompt and two steps."""
    session = open_session(fused(spec), session_options(optimize=True), "cpu")
    mask = np.ones((2, 5), np.int64)
    mask[1, :2] = 0
    feeds, room = step(spec, mask, 5), 12
    caches = {name: np.zeros((2, spec.kv_heads, room, spec.size), np.float32) for name in feeds if "past" in name}
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in caches.items()}
    rng = np.random.default_rng(5)
    for _ in range(3):
        expected = run_session(session, feeds)
        binding = session.io_binding()
        for name, array in feeds.items():
            if name in buffers:
                binding.bind_ortvalue_input(name, buffers[name])
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffers[name])
            else:
                binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        got = binding.copy_outputs_to_cpu()[-1]  # in the order of binding
        tokens = feeds["attention_mask"][:, -feeds["input_ids"].shape[1] :].astype(bool)
        assert relative_error(expected["logits"][tokens], got[tokens]) < 1e-5
        ids = rng.integers(0, VOCABULARY, (2, 1))
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
        feeds = {**feeds, "input_ids": ids, "attention_mask": mask}
        if spec.has_positions:
            feeds["position_ids"] = mask.cumsum(1)[:, -1:] - 1
        feeds |= {
            name.replace("present", "past_key_values"): array for name, array in expected.items() if "present" in name
        }


def _config(name: str, **options: Any) -> Any:
    import transformers

    common: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 512}
    if name == "GPT2":
        common = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 512}
    return getattr(transformers, f"{name}Config")(**common, **options)


ARCHITECTURES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", 23, {"num_key_value_heads": 2}),
    "llama, eager": ("Llama", "LlamaForCausalLM", 20, {"num_key_value_heads": 2, "attn_implementation": "eager"}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", 23, {"num_key_value_heads": 2, "head_dim": 32}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", 23, {}),
    "phi": ("Phi", "PhiForCausalLM", 23, {"partial_rotary_factor": 0.5}),
    "gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        23,
        {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 6, "query_pre_attn_scalar": 40},
    ),
}
PREPARE = ["upgrade-opset", "cleanup", "simplify-shapes", "fold-constants", "fuse-normalization"]


@functools.cache
def compiled(name: str) -> tuple[Any, Any]:
    """The random torch model, and its export compiled."""
    import torch
    import transformers

    import onnxlathe as lathe

    kind, model, opset, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    module = getattr(transformers, model)(_config(kind, **options)).eval()
    graph = lathe.export_causal_lm(module, opset=opset)
    return module, lathe.compile(graph, [*PREPARE, PASS.name, "cleanup"], progress=False, on_error="raise")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_is_the_judge(name: str) -> None:
    """A prompt of two texts, one padded on the left, and three steps against torch without a cache."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    module, result = compiled(name)
    assert len(nodes(result.model)) == 2 and "Softmax" not in ops(result.model)
    session = open_session(result.model, session_options(optimize=True), "cpu")
    wanted = {value.name for value in session.get_inputs()}
    ids = np.random.default_rng(0).integers(0, 128, (2, 11))
    mask = np.ones((2, 11), np.int64)
    mask[1, :3] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        tensors = [torch.from_numpy(array) for array in (ids, mask, positions)]
        expected = module(tensors[0], attention_mask=tensors[1], position_ids=tensors[2]).logits.numpy()
    shapes = {value.name: value.shape for value in session.get_inputs() if "past" in value.name}
    caches = {name: np.zeros((2, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
    start = 0
    for end in (8, 9, 10, 11):
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        given = {key: np.ascontiguousarray(array) for key, array in feeds.items() if key in wanted}
        results = run_session(session, {**given, **caches})
        tokens = mask[:, start:end].astype(bool)
        assert relative_error(expected[:, start:end][tokens], results["logits"][tokens]) < 1e-5
        caches = {key: results[key.replace("past_key_values", "present")] for key in caches}
        start = end
