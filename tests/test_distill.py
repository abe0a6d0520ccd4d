"""Distill: what it learns, what it keeps, and what it does when training is cut off or goes wrong."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from low_bit_models import block, block_feeds

import onnxlathe as lathe
from onnxlathe.compiler.base import Claim, Outcome, Pass, PassContext
from onnxlathe.compiler.load import infer_shapes
from onnxlathe.compiler.training.data import training_samples
from onnxlathe.compiler.training.losses import IGNORED, hard_loss, match_loss, soft_loss, token_mask
from onnxlathe.compiler.verify import Signature, check_model, check_structure, run_reference
from onnxlathe.models.encoder import Encoder, EncoderConfig
from onnxlathe.passes import Distill, FewLevelWeights, QuantizeWeights
from onnxlathe.passes.presets import make_pass
from onnxlathe.runtime.errors import LatheError, ModelError, PassError, RuntimeUnavailable
from rewriting import from_text, inside_if, with_external_data

RNG = np.random.default_rng(0)
F4 = np.float32
DATA = next((p / "shared" / "data" for p in Path(__file__).parents if (p / "shared" / "data").is_dir()), Path("shared"))


def classifier(noise: float = 0.0, seed: int = 1) -> ir.Model:
    """Two layers; ``noise`` spoils the weights of the same teacher."""
    rng, spoil = np.random.default_rng(0), np.random.default_rng(seed)
    weights = {
        name: (rng.standard_normal(shape) / 3 + noise * spoil.standard_normal(shape)).astype(np.float32)
        for name, shape in {"w1": (8, 16), "b1": (16,), "w2": (16, 5), "b2": (5,)}.items()
    }
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 8] x, float[8, 16] w1, float[16] b1, float[16, 5] w2,'
    body = "m = MatMul(x, w1) a = Add(m, b1) r = Relu(a) logits = Gemm(r, w2, b2)"
    return from_text(f"{text} float[5] b2) => (float[n, 5] logits) {{ {body} }}", **weights)


def batches(count: int = 20, rows: int = 16) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.standard_normal((rows, 8)).astype(np.float32)} for _ in range(count)]


def distill(model: ir.Model, teacher: ir.Model | None, **options: Any) -> tuple[ir.Model, Outcome]:
    """A trained clone, checked for its structure."""
    after = model.clone()
    outcome = Distill(teacher=teacher, **options)(after, PassContext(threads=1))
    check_structure(after)
    check_model(after)
    Signature.of(model).check_kept(Signature.of(after))
    assert outcome.changed == (ir.to_proto(model) != ir.to_proto(after)), "`changed` is not truthful"
    return after, outcome


def divergence(model: ir.Model, teacher: ir.Model, seed: int = 77) -> float:
    """KL of the logits on inputs that nobody trained on."""
    feeds = [{"x": np.random.default_rng(seed).standard_normal((200, 8)).astype(np.float32)}]
    a, b = (torch.tensor(run_reference(of, feeds)[0]["logits"]) for of in (model, teacher))
    return float(soft_loss(a, b, 1.0))


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]


def test_recovers_what_noise_spoiled() -> None:
    student, teacher = classifier(0.2), classifier()
    after, outcome = distill(student, teacher, data=batches(), steps=150, lr=0.03)
    assert divergence(after, teacher) < 0.1 * divergence(student, teacher)
    assert outcome.counts == {"weights trained": 4} and "held-out loss" in outcome.notes[-1]
    assert [node.op_type for node in after.graph] == [node.op_type for node in student.graph]


@pytest.mark.parametrize("options", [{"hidden": 1.0}, {"hidden": 1.0, "distance": "cosine"}, {"temperature": 4.0}])
def test_every_loss_teaches(options: dict[str, Any]) -> None:
    after, _ = distill(classifier(0.2), classifier(), data=batches(), steps=120, lr=0.03, **options)
    assert divergence(after, classifier()) < 0.5 * divergence(classifier(0.2), classifier())


def test_without_labels_the_best_class_of_the_teacher_is_the_label() -> None:
    student, teacher = classifier(0.3), classifier()
    after, _ = distill(student, teacher, data=batches(40), steps=200, lr=0.03, hard=1.0)
    feeds = [{"x": np.random.default_rng(9).standard_normal((500, 8)).astype(np.float32)}]
    best = [run_reference(model, feeds)[0]["logits"].argmax(-1) for model in (teacher, student, after)]
    assert (best[0] != best[2]).mean() < 0.5 * (best[0] != best[1]).mean()


def test_labels_of_the_data_count() -> None:
    """Labels that contradict the teacher: cross entropy follows them."""
    feeds = [{**sample, "labels": np.full(16, 3)} for sample in batches()]
    after, _ = distill(classifier(), classifier(), data=feeds, steps=100, lr=0.05, hard=1.0)
    assert (run_reference(after, batches(1))[0]["logits"].argmax(-1) == 3).all()


def test_values_inside_are_matched() -> None:
    after, _ = distill(
        classifier(0.2), classifier(), data=batches(), steps=120, lr=0.03, hidden=1.0, match=(("r", "r"),)
    )
    assert divergence(after, classifier()) < 0.5 * divergence(classifier(0.2), classifier())
    with pytest.raises(PassError, match="teacher does not make q"):
        distill(classifier(0.2), classifier(), data=batches(), hidden=1.0, match=(("r", "q"),))
    with pytest.raises(PassError, match=r"r has shape \[16, 16\], but the teacher's logits has \[16, 5\]"):
        distill(classifier(0.2), classifier(), data=batches(), hidden=1.0, match=(("r", "logits"),))


def test_through_compile_the_teacher_is_the_model_given() -> None:
    """Pruned by a former step of the same compile; also by name, with calibration samples as data."""
    model = classifier()
    masked = model.clone()
    weight = weights(model)["w1"] * (np.random.default_rng(3).random((8, 16)) > 0.5)

    class Prune(Pass):
        name = "prune"
        claims = Claim.APPROXIMATE

        def __call__(self, model: ir.Model, context: PassContext) -> Outcome:
            model.graph.initializers["w1"].const_value = ir.tensor(weight, name="w1")
            outcome = Outcome()
            outcome.counts["pruned"] += 1
            return outcome

    masked.graph.initializers["w1"].const_value = ir.tensor(weight, name="w1")
    options: Any = {"calibration": batches(), "progress": False}
    after = lathe.compile(model, [Prune(), Distill(steps=120, lr=0.03)], **options).model
    assert divergence(after, model) < 0.5 * divergence(masked, model)
    assert ((weights(after)["w1"] == 0) == (weight == 0)).all(), "zeros stay, and only they"
    assert lathe.compile(model, ["distill"], **options).report.passes[0].status != "failed"


def test_a_teacher_is_needed(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="no teacher"):
        Distill(data=batches())(classifier(), PassContext())
    path = tmp_path / "teacher.onnx"
    ir.save(classifier(), path)
    after, _ = distill(classifier(0.2), path, data=batches(), steps=60, lr=0.03)  # type: ignore[arg-type]
    assert divergence(after, classifier()) < divergence(classifier(0.2), classifier())


@pytest.mark.parametrize("levels", ["binary", "ternary", "midrise"])
def test_few_levels_are_trained_on_their_grid(levels: Any) -> None:
    teacher, student = block(), block()
    FewLevelWeights(levels=levels, block_size=32, accuracy_level=0)(student, PassContext())
    after, _ = distill(student, teacher, data=block_feeds(), steps=60, lr=0.02, soft=1.0)
    wanted, was, got = (run_reference(m, block_feeds(3)[2:])[0]["logits"] for m in (teacher, student, after))
    assert ((got - wanted) ** 2).sum() < 0.7 * ((was - wanted) ** 2).sum()
    for name, before in weights(student).items():
        if name.endswith(("_q2", "_q4")):
            shifts = np.arange(0, 8, 2 if name.endswith("_q2") else 4)
            mask = 3 if name.endswith("_q2") else 15
            codes = [set(np.unique((packed[..., None] >> shifts) & mask)) for packed in (before, weights(after)[name])]
            assert codes[1] <= codes[0] and (before != weights(after)[name]).any()


def test_eight_bits_keep_scales_and_zero_points() -> None:
    teacher, student = block(), block()
    QuantizeWeights(bits=4, block_size=32, accuracy_level=0)(student, PassContext())
    after, _ = distill(student, teacher, data=block_feeds(), steps=40, lr=0.01)
    for name, array in weights(student).items():
        if name.endswith(("_scales", "_zero_points")):
            assert (array == weights(after)[name]).all()
    assert [node.op_type for node in after.graph] == [node.op_type for node in student.graph]


def test_what_gets_no_better_is_refused() -> None:
    """A teacher that contradicts the labels, with a rate that destroys the weights: nothing changes."""
    student = classifier()
    after, outcome = distill(student, student, data=batches(), steps=5, lr=30.0)
    assert not outcome.changed and "nothing changed" in outcome.notes[-1]
    assert all((array == weights(after)[name]).all() for name, array in weights(student).items())


def test_nan_stops_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of step 41 is NaN: the weights of the best step before it stay."""
    from onnxlathe.compiler.training import distillation

    real, calls = distillation.Distillation.loss, [0]

    def loss(self: Any, index: int) -> torch.Tensor:
        calls[0] += 1
        return real(self, index) * (float("nan") if calls[0] == 41 else 1.0)

    monkeypatch.setattr(distillation.Distillation, "loss", loss)
    after, outcome = distill(classifier(0.2), classifier(), data=batches(), steps=100, lr=0.03)
    assert "not finite in step 41" in outcome.notes[0] and outcome.changed
    assert all(np.isfinite(array).all() for array in weights(after).values())
    assert divergence(after, classifier()) < divergence(classifier(0.2), classifier())


def interrupted_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxlathe.compiler.training import distillation

    real, calls = distillation.Distillation.loss, [0]

    def loss(self: Any, index: int) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == count:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(distillation.Distillation, "loss", loss)


def test_ctrl_c_gives_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(60, monkeypatch)
    after, outcome = distill(classifier(0.2), classifier(), data=batches(), steps=100, lr=0.03)
    assert "ended after 59 of 100 steps: interrupted" in outcome.notes[0] and outcome.changed
    assert divergence(after, classifier()) < divergence(classifier(0.2), classifier())


@pytest.mark.parametrize("levels", ["", "ternary"])
def test_resuming_gives_the_same_as_never_having_stopped(
    levels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = block()
    if levels:
        FewLevelWeights(levels=levels, block_size=32, accuracy_level=0)(student, PassContext())
    else:
        student.graph.initializers["gain"].const_value = ir.tensor(np.ones(64, np.float32), name="gain")
    options: Any = {"data": block_feeds(), "steps": 40, "lr": 0.02}
    whole, _ = distill(student, block(), **options)
    checkpoint = tmp_path / "state"
    with monkeypatch.context() as patch:
        interrupted_at(23, patch)
        part, _ = distill(student, block(), checkpoint=checkpoint, **options)
    resumed, outcome = distill(student, block(), checkpoint=checkpoint, **options)
    assert not any("ended" in note for note in outcome.notes)
    for name, array in weights(whole).items():
        assert (array == weights(resumed)[name]).all(), name
    assert any((array != weights(part)[name]).any() for name, array in weights(whole).items())
    assert [path.name for path in tmp_path.iterdir()] == ["state"], "no temporary file is left"
    with pytest.raises(PassError, match="is of another run"):
        distill(student, block(), checkpoint=checkpoint, **{**options, "lr": 1e-3})
    checkpoint.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is no checkpoint"):
        distill(student, block(), checkpoint=checkpoint, **options)


def test_progress_says_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxlathe.compiler.training import loop

    monkeypatch.setattr(loop, "_SECONDS", 0.0)
    said: list[str] = []
    step = Distill(teacher=classifier(), data=batches(), steps=4)
    step(classifier(0.2), PassContext(progress=said.append))
    assert any(line.startswith("distill: step 4/4, loss ") and "held out" in line for line in said)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([{"x": np.zeros((4, 7), np.float32)}] * 3, "Input 'x' in training sample 0 has shape"),
        ([{"x": np.zeros((4, 8))}] * 3, "has dtype float64"),
        ([{"y": np.zeros((4, 8), np.float32)}] * 3, "Wrong input names in training sample 0"),
        ([{"x": np.zeros((4, 8), F4), "labels": np.zeros(3, np.int64)}] * 3, r"Labels of shape \[3\] do not fit"),
        ([{"x": np.zeros((4, 8), F4), "labels": np.full(4, 5)}] * 3, "there are 5 classes"),
        ([{"x": np.zeros((4, 8), F4), "labels": np.zeros(4)}] * 3, "labels of training sample 0 are float64"),
        ([{"x": np.full((4, 8), np.nan, np.float32)}] * 3, "NaN"),
        ([[1, 2, 3]], "no input input_ids"),
        ([[1, 2], {"x": np.zeros((4, 8), np.float32)}], "mix samples and streams"),
        ([], "no training data"),
        ([{"x": np.zeros((4, 8), np.float32)}], "at least two samples"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(data: Any, says: str) -> None:
    with pytest.raises(LatheError, match=says):
        distill(classifier(), classifier(), data=data, hard=1.0)


def test_options_that_cannot_be() -> None:
    wrong = ({"steps": 0}, {"lr": 0.0}, {"soft": -1.0}, {"temperature": 0.0}, {"held_out": 1.0}, {"match": ("r",)})
    for options in wrong:
        with pytest.raises(ValueError, match=r"at least|positive|between|negative|needs a weight"):
            Distill(**options)  # type: ignore[arg-type]
    with pytest.raises(PassError, match="no folder for the checkpoint"):
        distill(classifier(), classifier(), data=batches(), checkpoint="nowhere/state")
    with pytest.raises(PassError, match="Which of the outputs"):
        two = classifier()
        two.graph.outputs[0].name = "y"
        two.graph.outputs.append(two.graph[0].outputs[0])
        infer_shapes(two)
        distill(two, two, data=batches(), soft=1.0)
    with pytest.raises(PassError, match="No weight can be trained"):
        distill(classifier(), classifier(), data=batches(), exclude=("*",))


def test_by_name_with_options() -> None:
    step = make_pass("distill", teacher="model.onnx", steps=3, lr=1, exclude=("r",), data="samples.npz")
    assert step == Distill(teacher="model.onnx", steps=3, lr=1, exclude=("r",), data="samples.npz")
    with pytest.raises(PassError, match="cannot be 'much'"):
        make_pass("distill", soft="much")


def test_half_precision_and_external_files(tmp_path: Path) -> None:
    """Weights of a file are read, not written; those of 16 bits are trained in 32 and written in 16."""
    student = with_external_data(classifier(0.2), tmp_path)
    stored = (tmp_path / "external.onnx.data").read_bytes()
    for name in ("w2", "b2"):
        value = student.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=name)  # type: ignore[union-attr]
        value.dtype = ir.DataType.FLOAT16
    gemm = student.graph[-1]
    casts = [ir.node("Cast", [gemm.inputs[at]], attributes={"to": 1}, name=f"cast{at}") for at in (1, 2)]
    for at, cast in enumerate(casts, 1):
        cast.outputs[0].name = f"wide{at}"
        student.graph.insert_before(gemm, cast)
        gemm.replace_input_with(at, cast.outputs[0])
    after, _ = distill(student, classifier(), data=batches(), steps=100, lr=0.03)
    assert divergence(after, classifier()) < 0.5 * divergence(student, classifier())
    assert [weights(after)[name].dtype.name for name in ("w1", "w2", "b2")] == ["float32", "float16", "float16"]
    assert (tmp_path / "external.onnx.data").read_bytes() == stored


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA here")
@pytest.mark.parametrize("levels", ["", "ternary"])
def test_on_cuda(levels: Any) -> None:
    student = block()
    if levels:
        FewLevelWeights(levels=levels, block_size=32, accuracy_level=0)(student, PassContext())
    else:
        student.graph.initializers["gain"].const_value = ir.tensor(np.ones(64, np.float32), name="gain")
    _, outcome = distill(student, block(), data=block_feeds(), steps=40, lr=0.02, device="cuda")
    assert outcome.changed, outcome.notes


def test_cuda_that_is_not_there_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(RuntimeUnavailable):
        distill(classifier(0.2), classifier(), data=batches(), device="cuda")


def test_bodies_are_refused_before_training() -> None:
    feeds = [{**sample, "take": np.array([True])} for sample in batches(3)]
    with pytest.raises(PassError, match=r"If \(choose\): has bodies"):
        distill(inside_if(classifier()), inside_if(classifier()), data=feeds, soft=1.0)


def test_temperature_keeps_the_size_of_derivatives() -> None:
    """T^2 KL has about the same gradient for every T; without T^2 it falls with 1 / T^2."""
    teacher = torch.tensor(RNG.standard_normal((64, 10)))
    norms: list[float] = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        student = torch.tensor(RNG.standard_normal((64, 10)), requires_grad=True)
        soft_loss(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert max(norms) / min(norms) < 1.5


def test_losses_against_torch() -> None:
    student, teacher = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    wanted = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1).flatten(0, 1), (teacher / 2).softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    assert float(soft_loss(student, teacher, 2.0)) == pytest.approx(4 * float(wanted), rel=1e-5)
    labels = torch.randint(7, (3, 4))
    labels[0, 1:] = IGNORED
    exact = torch.nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert float(hard_loss(student, labels)) == pytest.approx(float(exact), rel=1e-5)
    assert float(match_loss(teacher, teacher, "mse")) == 0.0
    assert float(match_loss(2 * teacher, teacher, "mse")) == pytest.approx(1.0)
    assert float(match_loss(2 * teacher, teacher, "cosine")) == pytest.approx(0.0, abs=1e-6)


def test_padding_never_counts() -> None:
    """What stands at padded tokens changes no loss; the mean is over tokens, not over positions."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    student, teacher = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    labels = torch.randint(7, (2, 4))
    tokens = token_mask(mask, student)
    assert tokens is not None and tokens.sum() == 6
    spoiled = student.clone()
    spoiled[1, :2] = 1e4
    for loss in (
        lambda s: soft_loss(s, teacher, 2.0, tokens),
        lambda s: hard_loss(s, labels, tokens),
        lambda s: match_loss(s, teacher, "mse", tokens),
        lambda s: match_loss(s, teacher, "cosine", tokens),
    ):
        assert float(loss(spoiled)) == pytest.approx(float(loss(student)), rel=1e-6)
    alone = soft_loss(student[tokens], teacher[tokens], 2.0)
    assert float(soft_loss(student, teacher, 2.0, tokens)) == pytest.approx(float(alone), rel=1e-6)
    past = token_mask(torch.ones(2, 9), student)
    assert past is not None and past.shape == (2, 4), "the cache's columns come first"
    assert token_mask(mask, torch.randn(2, 7)) is None


def test_the_teacher_of_an_encoder_is_the_torch_original() -> None:
    """Matching the exported teacher's outputs on padded text reaches what the torch module gives."""
    module = Encoder(EncoderConfig(vocabulary=50, hidden=16, layers=1, heads=2, intermediate=32, positions=16)).eval()
    rng = np.random.default_rng(2)
    feeds: list[dict[str, np.ndarray]] = []
    for _ in range(12):
        mask = np.ones((4, 12), np.int64)
        mask[2:, 7:] = 0
        ids = rng.integers(0, 50, (4, 12))
        feeds.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    args = tuple(torch.tensor(array) for array in feeds[0].values())
    dims = dict.fromkeys(feeds[0], ("batch", "sequence"))
    teacher = lathe.export(module, args, dynamic_shapes=dims, check=False)
    student = teacher.clone()
    for value in student.graph.initializers.values():
        if value.name and value.name.endswith("weight.T"):
            noisy = value.const_value.numpy() + 0.1 * rng.standard_normal(value.const_value.shape.numpy())  # type: ignore[union-attr]
            value.const_value = ir.tensor(noisy.astype(np.float32), name=value.name)
    after, outcome = distill(student, teacher, data=feeds[:-1], steps=80, lr=0.03)
    with torch.no_grad():
        wanted = module(*(torch.tensor(array) for array in feeds[-1].values())).numpy()
    mask = feeds[-1]["attention_mask"].astype(bool)
    errors = [
        ((run_reference(m, feeds[-1:])[0]["output"] - wanted)[mask] ** 2).sum() for m in (teacher, student, after)
    ]
    assert errors[0] < 1e-6 and errors[2] < 0.3 * errors[1], (errors, outcome.notes)


def bigrams(noise: float = 0.0) -> ir.Model:
    """Logits of the next token from the token alone, with the inputs of a decoder that has a cache."""
    rng, spoil = np.random.default_rng(0), np.random.default_rng(1)
    weights = {name: rng.standard_normal((20, 8)).astype(np.float32) for name in ("table", "head")}
    weights["head"] = (weights["head"].T + noise * spoil.standard_normal((8, 20))).astype(np.float32)
    inputs = "int64[b, s] input_ids, int64[b, t] attention_mask, int64[b, s] position_ids, float[b, 2, p, 4] past"
    body = "e = Gather(table, input_ids) logits = MatMul(e, head) present = Identity(past)"
    declared = "float[20, 8] table, float[8, 20] head"
    outputs = "float[b, s, 20] logits, float[b, 2, p, 4] present"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}, {declared}) => ({outputs}) {{ {body} }}'
    model = from_text(text, **weights)
    model.graph.inputs[3].name, model.graph.outputs[1].name = "past_key_values.0.key", "present.0.key"
    return model


def test_streams_of_tokens_for_a_decoder() -> None:
    """Windows padded to the longest, labels shifted, empty caches; caches are not matched."""
    streams = [RNG.integers(0, 20, size) for size in (30, 21, 40, 9, 50)]
    samples = training_samples(streams, bigrams(), 16, 2)
    assert sum(int(sample["attention_mask"].sum()) for sample in samples) == sum(map(len, streams))
    for sample in samples:
        ids, labels = sample["input_ids"], sample["labels"]
        kept = labels[:, :-1] != IGNORED
        assert sample["past_key_values.0.key"].shape == (len(ids), 2, 0, 4) and (labels[:, -1] == IGNORED).all()
        assert (labels[:, :-1][kept] == ids[:, 1:][kept]).all()
        assert (kept.sum(1) == sample["attention_mask"].sum(1) - 1).all()
    options: Any = {"data": streams, "window": 16, "batch": 2, "steps": 100, "lr": 0.03, "temperature": 1.0}
    _, outcome = distill(bigrams(0.5), bigrams(), **options)
    before, after = (float(word) for word in outcome.notes[-1].split("(")[0].replace("->", "").split()[2:4])
    assert outcome.counts == {"weights trained": 2} and after < 0.5 * before


def test_a_teacher_with_layers_and_heads_that_the_student_lost() -> None:
    """It gets empty caches of its own; samples whose caches hold something cannot be given to it."""
    teacher, student = bigrams(), bigrams(0.5)
    for value in (teacher.graph.inputs[3], teacher.graph.outputs[1]):
        value.shape = ir.Shape(["b", 4, "p", 4])
    caches = ir.TensorType(ir.DataType.FLOAT)
    teacher.graph.inputs.append(ir.Value(name="past_key_values.1.key", shape=ir.Shape(["b", 4, "p", 4]), type=caches))
    streams = [RNG.integers(0, 20, size) for size in (30, 21, 40, 9, 50)]
    options: Any = {"data": streams, "window": 16, "batch": 2, "steps": 50, "lr": 0.03, "temperature": 1.0}
    _, outcome = distill(student, teacher, **options)
    assert outcome.counts == {"weights trained": 2}
    samples = training_samples(streams, student, 16, 2)
    for sample in samples:
        batch, length = sample["input_ids"].shape
        sample["past_key_values.0.key"] = np.zeros((batch, 2, 3, 4), np.float32)
        sample["attention_mask"] = np.ones((batch, length + 3), np.int64)
    with pytest.raises(PassError, match="another cache"):
        distill(student, teacher, **(options | {"data": samples}))


def test_mnist_convolutions_recover() -> None:
    """The real network with half of its second filters' weights gone, 600 digits, a few steps."""
    folder = DATA / "mnist"
    if not folder.is_dir():
        pytest.skip("shared/data/mnist is not here")
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 1, 28, 28).astype(np.float32)
    teacher = lathe.compile(folder / "mnist_conv.onnx", ["fold-constants"], progress=False).model
    student = teacher.clone()
    value = student.graph.initializers["Parameter87"]
    array = value.const_value.numpy()  # type: ignore[union-attr]
    value.const_value = ir.tensor(array * (np.abs(array) > np.median(np.abs(array))), name=value.name)
    name = teacher.graph.inputs[0].name or ""
    feeds = [{name: image} for image in images[:600]]
    after, outcome = distill(student, teacher, data=feeds, steps=300, lr=0.02, hidden=1.0)
    judged = [{name: image} for image in images[5000:5300]]
    wanted, was, got = (
        np.concatenate([next(iter(found.values())) for found in run_reference(model, judged)])
        for model in (teacher, student, after)
    )
    assert ((got - wanted) ** 2).sum() < 0.6 * ((was - wanted) ** 2).sum(), outcome.notes
    kept = after.graph.initializers["Parameter87"].const_value.numpy()  # type: ignore[union-attr]
    assert (kept == 0).mean() == pytest.approx(0.5, abs=0.01)
