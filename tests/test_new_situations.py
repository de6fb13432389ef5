"""Situations of users that were wrong, crashed, or were refused without help."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tempering import distill
from tempering.methods import KD
from tempering.rows import Rows, total
from tempering.tasks import Seq2Seq
from tempering.tasks.classification import _confusions
from tempering.teachers import Live, MeanTeacher
from tempering.training.config import Run, SelfCheckError, TrainState
from tempering.training.evaluator import CachedTeacherOutputs, Evaluator
from tempering.utils.tensors import copy_model
from tests.cases import each
from tests.lazy_modules import LazyModule
from tests.runs import cut, go, points, stop_at, student_net
from tests.test_seq2seq import t5

hf = LazyModule("transformers")
mixin = LazyModule("tempering.integrations.huggingface")
pl = LazyModule("lightning.pytorch")
adapter = LazyModule("tempering.integrations.lightning")

torch.manual_seed(0)
Y = torch.arange(32) % 4
X = torch.randn(32, 8) + 2.0 * nn.functional.one_hot(Y, 8)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]


def net(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, classes))


def run(student: nn.Module, batches: Any = BATCHES, teacher: nn.Module | None = None, **options: Any) -> Run:
    given: dict[str, Any] = {"method": KD(), "quiet": True, "skip_checks": ["above chance"]} | options
    length = {} if "epochs" in given else {"steps": 4}
    return distill(student, net(1) if teacher is None else teacher, batches, **length, **given)


# weights in the memory of the teacher


def by_data(student: nn.Sequential, teacher: nn.Sequential) -> None:
    student[0].weight.data = teacher[0].weight.data  # pyright: ignore


def by_assignment(student: nn.Sequential, teacher: nn.Sequential) -> None:
    student.load_state_dict(teacher.state_dict(), assign=True)


def by_part(student: nn.Sequential, teacher: nn.Sequential) -> None:
    wide = nn.Parameter(torch.cat((teacher[2].weight.detach(), torch.zeros(3, 16))))  # pyright: ignore
    teacher[2].weight, student[2].weight = nn.Parameter(wide.data[:4]), nn.Parameter(wide.data[2:6])


@each("take", [by_data, by_assignment, by_part])
@each("by", ["engine", "huggingface", "lightning"])
def test_weights_in_the_memory_of_the_teacher_are_refused(by: str, take: Callable[..., None], tmp_path: Path) -> None:
    """Training the student would change the teacher, whose parameters are other objects."""
    student, teacher = net(), net(1)
    take(student, teacher)
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=r"in the memory of the teacher's.*copy.deepcopy\(model\)"):
        if by == "engine":
            run(student, teacher=teacher)
        elif by == "lightning":
            pytest.importorskip("lightning.pytorch")
            adapter.DistillModule(student, teacher, method=KD())
        else:
            pytest.importorskip("transformers")
            trainer(student, teacher, tmp_path)
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict().items())
    run(student, teacher=copy.deepcopy(teacher))
    # halves of one storage do not overlap, as of a file that is mapped to memory
    halves, student, teacher = torch.randn(2, 16, 8), net(), net(1)
    student[0].weight, teacher[0].weight = (nn.Parameter(half) for half in halves)
    run(student, teacher=teacher)


def trainer(student: nn.Module, teacher: Any, folder: Path, kind: str = "Trainer", **more: Any) -> Any:
    given = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2, "seed": 0}
    given |= more.pop("options", {})
    kd: Any = type("KDTrainer", (mixin.DistillMixin, getattr(hf, kind)), {})
    arguments = getattr(hf, "TrainingArguments" if kind == "Trainer" else "Seq2SeqTrainingArguments")
    options = {"method": KD(temperature=2.0), "selfcheck": False} | more
    return kd(student, arguments(str(folder), **given), teacher=teacher, **options)


# models


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@each("convert", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_scripted_models_are_taught_and_teach(convert: Any, tmp_path: Path) -> None:
    want = run(net(), teacher=net(1)).student
    teacher = convert(net(1))
    got = run(convert(net()), teacher=teacher, out=tmp_path).student
    torch.testing.assert_close(got(X), want(X))
    assert all(p.requires_grad for p in teacher.parameters()), "given back"


@each("side", ["student", "teacher"])
def test_lazy_modules_are_refused_until_they_have_run(side: str) -> None:
    lazy = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))
    models = {"student": net(), "teacher": net(1), side: lazy}
    with pytest.raises(ValueError, match=rf"the {side} has lazy modules.*Run it on a batch first"):
        run(models["student"], teacher=models["teacher"])
    lazy(X)
    run(models["student"], teacher=models["teacher"])


class Counting(nn.Module):
    """Has buffers that a training step assigns or changes, in the state dict or not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)
        self.register_buffer("changed", torch.zeros(2), persistent=False)
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
            self.scale = self.scale * 0.9
            self.changed += 1
        return self.net(x) * self.scale * self.mask


def computed(*, seed: int = 1) -> nn.Module:
    """A student whose weights have a graph after a forward, which copy.deepcopy refuses."""
    net = student_net(seed=seed)
    net[0] = torch.nn.utils.weight_norm(net[0])
    net(points(4)[0])
    return net


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_computed_weights_are_averaged_and_copied() -> None:
    """As by torch.nn.utils.weight_norm, after a forward."""
    batches, x = cut(points(16), 8), points(4)[0]
    net, copied = computed(), copy_model(computed())
    assert torch.equal(copied(x), net(x)) and copied[0].weight is not net[0].weight
    before = net[0].weight_v.clone()
    run = go(batches, student=net, epochs=1, ema=0.5, skip_checks=["above chance"])
    assert run.ema is not None and not torch.equal(run.ema[0].weight_v, before)
    go(batches, student=computed(), teacher=MeanTeacher(), method=KD(hard=1.0), epochs=1)
    low = Live(computed(), precision="bf16")
    torch.testing.assert_close(low(x), computed().eval()(x), rtol=0.05, atol=0.05)


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return points(4)[0][i], 0


def test_what_is_no_loader_is_refused_with_what_to_write() -> None:
    batches, samples = cut(points(16), 8), Samples()
    for split in ({"validation": {"clean": batches, "noisy": batches}}, {"test": {"a": batches}}):
        with pytest.raises(ValueError, match=r"must be a loader of batches, .*got a dict with .*one loader for each"):
            go(batches, epochs=1, **split)
    with pytest.raises(ValueError, match=r"got the data set Samples, whose items .*DataLoader\(dataset, batch_size=64"):
        go(samples, epochs=1)
    with pytest.raises(ValueError, match=r"got Tensor \(16, 6\) \(one batch as the loader is \[\(inputs, labels\)\]\)"):
        go(points(16), epochs=1)
    go(DataLoader(batches, batch_size=None), epochs=1, skip_checks=["above chance"])  # pyright: ignore


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_named(value: float) -> None:
    """Not the teacher, in the first batch and in a later one."""
    x, y = points(32)
    late = r"hold NaN or infinity, and so do the inputs of the batch"
    for row, error, text in ((0, SelfCheckError, r"Are the inputs finite"), (20, FloatingPointError, late)):
        spoiled = x.index_fill(0, torch.tensor([row]), value)
        with pytest.raises(error, match=text):
            go(cut((spoiled, y), 8), epochs=1, skip_checks=["above chance"])


def test_a_sigmoid_teaches_a_softmax() -> None:
    """One logit beside two: refused, and as two logits the same probabilities."""
    x, y = points(16)
    student, one = nn.Linear(6, 2), nn.Linear(6, 1)
    with pytest.raises(ValueError, match=r"the teacher's logits \(8, 1\) .*torch.cat\(\(torch.zeros_like\(z\), z"):
        go(cut((x, y % 2), 8), student=student, teacher=one, epochs=1)
    z = one(x)
    torch.testing.assert_close(torch.cat((torch.zeros_like(z), z), 1).softmax(1)[:, 1:], z.sigmoid())


def test_weights_of_half_precision_are_named_with_inputs_of_another() -> None:
    with pytest.raises(RuntimeError) as caught:
        go(cut(points(16), 8), student=student_net().bfloat16(), epochs=1, skip_checks=["above chance"])
    assert "x.to(torch.bfloat16); or train float32 weights, student.float(), with" in caught.value.__notes__[0]


def test_buffers_outside_of_the_state_dict_survive_an_interruption(tmp_path: Path) -> None:
    straight = run(Counting(), epochs=3).student
    assert (int(straight.steps), straight.changed.tolist()) == (12, [12, 12]), "the self-check gives them back"  # pyright: ignore
    assert float(straight.scale) == pytest.approx(0.9**12)  # pyright: ignore
    with pytest.raises(KeyboardInterrupt):
        run(Counting(), epochs=3, out=tmp_path, on_step=stop_at(9))
    resumed = run(Counting(), epochs=3, out=tmp_path)
    assert resumed.how == "resumed"
    for name, buffer in straight.named_buffers():
        assert torch.equal(buffer, resumed.student.get_buffer(name)), name
    assert torch.equal(straight.net[0].weight, resumed.student.net[0].weight)  # pyright: ignore
    from tempering.training import checkpoint

    state = checkpoint.load(tmp_path / "checkpoints")
    assert state is not None and state["buffers"].keys() == {"scale", "changed"}, "constants are not saved"


class InPlace(nn.Module):
    """Normalizes the images of the batch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5))


@each("side", ["student", "teacher"])
def test_a_model_that_changes_its_inputs_is_refused(side: str) -> None:
    batches = [(x.clone(), y) for x, y in BATCHES]
    models = {"student": net(), "teacher": net(1), side: InPlace()}
    with pytest.raises(SelfCheckError, match=rf"the {side} changes its inputs in place.*Write x = x - mean"):
        run(models["student"], batches, models["teacher"])


class OfTransformers(nn.Module):
    """Has the config of a classifier of transformers."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.net = net()
        self.config = type("Config", (), config)()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_models_without_classes_are_refused_by_their_config(tmp_path: Path) -> None:
    several = OfTransformers(problem_type="multi_label_classification")
    labeled = [(X, nn.functional.one_hot(Y, 4).float())]  # one label each: as soft labels they would be trained
    for models in ((several, net(1)), (net(), several)):
        with pytest.raises(TypeError, match=r"multi_label.*tasks.MultiLabel\(\)"):
            run(models[0], labeled, models[1])
    with pytest.raises(TypeError, match=r"one output, and no classes.*tasks.Binary\(\)"):
        run(OfTransformers(problem_type="regression"))
    run(OfTransformers(problem_type="single_label_classification"))
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for config in ({"problem_type": "multi_label_classification"}, {"num_labels": 1}):
        bert = hf.BertForSequenceClassification(hf.BertConfig(**sizes, intermediate_size=8, **config))
        with pytest.raises(TypeError, match="classes"):
            trainer(bert, copy.deepcopy(bert), tmp_path)


def test_the_rows_advised_for_several_labels_have_the_loss_of_each() -> None:
    """The temperature 1 loss of the two logits (0, z) is the binary cross entropy, and so is its gradient."""
    z, t, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3) > 0.5
    z.requires_grad_()
    two = [torch.stack((torch.zeros_like(x), x), -1).flatten(0, 1) for x in (z, t)]
    rows = Rows(*two, y.flatten().long())
    loss = total(KD(soft=0.5, hard=0.5, temperature=1.0)(rows), rows)
    binary = nn.functional.binary_cross_entropy_with_logits
    entropy = binary(t, t.sigmoid())
    want = 0.5 * (binary(z, t.sigmoid()) - entropy) + 0.5 * binary(z, y.double())
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, want)))


def test_multi_hot_labels_are_refused_with_their_rows() -> None:
    with pytest.raises(ValueError, match=r"Several labels per sample\? Use task=tasks.MultiLabel"):
        Rows(torch.randn(2, 3), torch.randn(2, 3), torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))


# batches


def test_labels_of_none_are_no_labels() -> None:
    want = run(net(), [(x, torch.full_like(y, -100)) for x, y in BATCHES]).student
    got = run(net(), [(x, None) for x, _ in BATCHES]).student
    assert torch.equal(want[0].weight, got[0].weight)  # pyright: ignore
    with pytest.raises(ValueError, match="no sample has a label"):
        run(net(), test=[(X, None)])


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


REFUSED: dict[str, tuple[Any, str]] = {
    "list of samples": ([[{"x": X[0], "y": Y[0]}, {"x": X[1], "y": Y[1]}]], "got list of dict, dict"),
    "pairs": ([[(X[0], Y[0]), (X[1], Y[1])]], "got list of tuple, tuple"),
    "labels in a dict": ([(X, {"label": Y})], "got tuple of Tensor, dict"),
    "numpy": ([(X.numpy(), Y.numpy())], r"the inputs as ndarray. Write torch.from_numpy\(x\)"),
    "labels as a list": ([(X, Y.tolist())], r"the labels as list. Write torch.tensor\(x\)"),
    "labels as floats": ([(X, Y.float())], r"Write target.long\(\), unless they are numbers"),
    "labels as bools": ([(X, Y > 1)], r"Write target.long\(\)\."),
    "without labels": (DataLoader(TensorDataset(X), 8), r"Without labels they are \(inputs, None\)"),
}


@each("what", REFUSED)
def test_batches_that_do_not_fit_are_refused_with_what_to_write(what: str) -> None:
    batches, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        run(net(), batches)


@each("batch", [(Y, X), (torch.arange(32), X, Y)])
def test_labels_in_the_place_of_inputs_are_noted(batch: Any) -> None:
    with pytest.raises(RuntimeError) as error:
        run(net(), [batch])
    assert "Are they the labels?" in "".join(error.value.__notes__)


def test_several_inputs_are_noted() -> None:
    student, teacher = (nn.Sequential(net(seed)) for seed in (0, 1))
    for batch in (((X, X), Y), {"a": X, "b": X, "label": Y}):
        with pytest.raises(TypeError) as error:
            run(student, [batch], teacher)
        if isinstance(batch, dict):
            assert "dict with 'a', 'b'. For one that takes several" in "".join(error.value.__notes__)
    model = nn.Sequential(Two())
    model.append(net())
    with pytest.raises(TypeError, match="positional argument") as error:
        run(model, [((X, X), Y)], copy.deepcopy(model))
    assert "self.model(*x)" in "".join(error.value.__notes__)


# scores


def test_a_first_score_of_nan_is_not_the_best_forever() -> None:
    """Nor is a later one an improvement."""
    evaluator = Evaluator.__new__(Evaluator)
    for sign, higher in ((1.0, True), (-1.0, False)):
        evaluator.higher_is_better, evaluator.patience, state = higher, 2, TrainState()
        improved, stopped = [], []
        for epoch, value in enumerate((float("nan"), float("nan"), 1.0, float("nan"), 2.0)):
            state.last = {"epoch": epoch}
            improved.append(evaluator.select_best(state, sign * value))
            stopped.append(state.stopped)
        assert improved == [True, False, True, False, True] and not any(stopped)
        assert state.best == {"epoch": 4} and state.best_value == 2.0 * sign


def test_confusions_take_no_memory_per_pair_of_classes() -> None:
    classes, labels = 10**6, torch.tensor([5, 5, 5, 7, -100, 999_999])

    class Wide:
        """Logits whose most likely class is known."""

        def __init__(self, likeliest: list[int]) -> None:
            self.likeliest = torch.tensor(likeliest)

        def argmax(self, dim: int) -> Tensor:
            return self.likeliest

    student, teacher = Wide([5, 6, 6, 7, 1, 0]), Wide([5, 5, 6, 8, 2, 0])
    found = _confusions(student, teacher, labels, classes)  # pyright: ignore[reportArgumentType]
    assert found == [
        {"true": 5, "predicted": 6, "student": 2, "teacher": 1},
        {"true": 7, "predicted": 8, "student": 0, "teacher": 1},
    ]
    assert _confusions(student, student, labels, classes) == []  # pyright: ignore[reportArgumentType]


def test_numbers_of_groups_are_not_taken_for_ids_of_samples() -> None:
    """Batches in another order have the same ones, and would get the outputs of other samples."""
    ids, asked = torch.zeros(4, dtype=torch.long), list[Tensor]()

    def teach(x: Tensor, ids: Tensor | None) -> Tensor:
        asked.append(x)
        return 2 * x

    outputs = CachedTeacherOutputs(teach)
    for epoch in range(2):
        outputs.reset()
        for x in X.split(4)[:: -1 if epoch else 1]:
            assert torch.equal(outputs(x, ids), 2 * x)
    assert len(asked) == 16
    unique = CachedTeacherOutputs(teach)
    for _ in range(2):
        unique.reset()
        for i, x in enumerate(X.split(4)):
            assert torch.equal(unique(x, torch.arange(4 * i, 4 * i + 4)), 2 * x)
    assert len(asked) == 24


# folders


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to(tmp_path / "nowhere")
    for out, words in ((file, "is a file"), (file / "run", "file is a file"), (link / "run", "does not exist")):
        with pytest.raises(ValueError, match=f"must be a folder, and .*{words}"):
            run(net(), out=out)
    assert run(net(), out=tmp_path / "mein Läuf ☃ 'x'" / "y").how == "new"


def test_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    result = run(net(), out="~/runs/a", facts={"data": "cifar", "student": "small"})
    assert result.folder == tmp_path / "home" / "runs" / "a" and not os.path.exists("~")
    assert result.facts["data"]["name"] == "cifar" and result.facts["student"]["name"] == "small"


# trainers


def test_generated_predictions_come_with_the_methods_loss(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    texts = [torch.randint(3, 12, (n,)).tolist() for n in (3, 5, 4, 6, 5)]
    data = [{"input_ids": x, "attention_mask": [1] * len(x), "labels": x[::-1]} for x in texts]

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pad = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        parts = {name: [torch.tensor(s[name]) for s in samples] for name in samples[0]}
        return {n: nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=pad[n]) for n, x in parts.items()}

    options = {"predict_with_generate": True, "generation_max_length": 6, "per_device_eval_batch_size": 2}
    common: dict[str, Any] = {"kind": "Seq2SeqTrainer", "task": Seq2Seq(), "eval_dataset": data, "options": options}
    common |= {"train_dataset": data, "data_collator": collate}
    shapes = list[tuple[int, ...]]()
    kd = trainer(
        t5(16, 0).float(),
        t5(16, 1).float(),
        tmp_path,
        compute_metrics=lambda p: shapes.append(p.predictions.shape) or {},
        **common,
    )
    kd.train()
    written = kd.evaluate()
    kd.args.predict_with_generate = False
    kd.compute_metrics = None
    plain = kd.evaluate()
    assert shapes[0][0] == 5 and written["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert written["eval_accuracy"] == plain["eval_accuracy"] and kd.label_smoother is None


def test_labels_may_have_the_name_that_the_trainer_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    losses = []
    for name in ("labels", "target"):
        data = [{"x": x, name: y} for x, y in zip(X, Y, strict=True)]
        models = [Keyword(net(seed)) for seed in (0, 1)]
        kd = trainer(*models, tmp_path, train_dataset=data, eval_dataset=data, options={"label_names": [name]})
        kd.train()
        losses.append(kd.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


class Keyword(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor | None = None, target: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.model(x)}


@pytest.mark.filterwarnings("ignore")
def test_lightning_validates_several_loaders(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    fit = pl.Trainer(max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    loaders = [DataLoader(TensorDataset(X[:n], Y[:n]), batch_size=7) for n in (32, 12)]
    module = adapter.DistillModule(net(), net(1), method=KD(), selfcheck=False)
    fit.fit(module, loaders[0], loaders)
    together = {name: float(value) for name, value in fit.callback_metrics.items()}
    for i, loader in enumerate(loaders):
        alone = fit.validate(module, loader, verbose=False)[0]
        for name in ("val_loss", "val_accuracy"):
            assert together[f"{name}/dataloader_idx_{i}"] == pytest.approx(alone[name], rel=1e-6)
    module = adapter.DistillModule(net(), net(1), method=KD())
    fit = pl.Trainer(max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    fit.fit(module, loaders[0], {"clean": loaders[0], "noisy": loaders[1]})
    named = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val_")}
    assert named == pytest.approx({name: value for name, value in together.items() if name.startswith("val_")})


def test_other_trainers_warn_of_a_loss_that_is_nan(tmp_path: Path) -> None:
    """They go on; transformers' log even shows 0."""
    pytest.importorskip("lightning.pytorch")
    x = X.index_fill(0, torch.tensor([20]), math.nan)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    fit = pl.Trainer(max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    module = adapter.DistillModule(net(), net(1), method=KD())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(module, DataLoader(TensorDataset(x, Y), batch_size=8), DataLoader(TensorDataset(X, Y), batch_size=8))
    rows = [{"inputs": a, "labels": int(b)} for a, b in zip(x, Y, strict=True)]
    trainer = type("KDTrainer", (mixin.DistillMixin, hf.Trainer), {})(
        Named(net()),
        hf.TrainingArguments(str(tmp_path), per_device_train_batch_size=8, max_steps=4, logging_steps=1, report_to=[]),
        teacher=Named(net(1)),
        method=KD(),
        train_dataset=rows,
    )
    with warnings.catch_warnings(record=True) as caught_too:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(x.message) for x in (*caught, *caught_too) if "the loss is NaN or infinite by step" in str(x.message)]
    assert len(texts) == 2 and "step 4: {'loss': nan}. The trainer continues" in texts[0] and "'soft': nan" in texts[1]


class Named(nn.Module):
    """A model as transformers calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.net(inputs)}
