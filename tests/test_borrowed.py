"""What a run borrows is given back: modes, requires_grad, hooks, random state and environment, also after errors."""

from __future__ import annotations

import copy
import io
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.integrations.common import fitting
from tempering.methods import AT, KD, FitNet, Supervised
from tempering.tasks import Classification
from tempering.teachers import Ensemble, Live, Routed, TopKTeacher
from tempering.teachers.base import fingerprint
from tempering.training.features import PairedFeatures
from tempering.utils.hooks import FeatureExtractor
from tempering.utils.state import borrowed
from tests.cases import each

torch.manual_seed(0)
X = torch.randn(64, 1, 4, 4) + (torch.arange(64) % 4).view(-1, 1, 1, 1)
Y = torch.arange(64) % 4
DATA = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]


def net(width: int = 4, seed: int = 0, norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    """Convolution, normalization, in-place ReLU, dropout, head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        norm(width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(16 * width, 4),
    )


def knowing(width: int = 8) -> nn.Sequential:
    """A teacher that knows the labels, in training mode."""
    teacher = net(width)
    distill(teacher, None, DATA, method=Supervised(), epochs=20, quiet=True)
    return teacher


def state(model: nn.Module) -> list[Any]:
    """Modes, requires_grad and the number of hooks of every part."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [[m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], hooks]


def numbers() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # pyright: ignore


@each("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_frozen_normalization_stays_frozen(norm: Any) -> None:
    """In training and evaluation, for any module in eval mode; of a student in eval mode everything is trained."""
    student = net(norm=lambda n: norm(n, track_running_stats=True))
    student[1].eval()
    before, mean = state(student), student[1].running_mean.clone()
    run = distill(student, None, DATA, method=Supervised(), epochs=2, test=DATA, quiet=True)
    assert torch.equal(run.student[1].running_mean, mean) and state(student) == before  # pyright: ignore
    distill(student.eval(), None, DATA, method=Supervised(), epochs=1, quiet=True)
    assert not torch.equal(student[1].running_mean, mean) and not any(m.training for m in student.modules())


def test_training_mode_of_a_student_that_overrides_train() -> None:
    class Detectorlike(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    student = Detectorlike(*net())
    mean = student[1].running_mean.clone()
    distill(student, None, DATA, method=Supervised(), epochs=1, quiet=True)
    assert torch.equal(student[1].running_mean, mean)


def test_a_run_gives_back_what_it_borrowed() -> None:
    teacher, student, task = knowing(), net(), Classification(features={"map": ("0", "0")})
    teacher[1].eval()
    teacher[5].bias.requires_grad_(False)
    before, seeds, environment = [state(teacher), state(student)], numbers(), dict(os.environ)
    for method in (FitNet(), KD(), AT()):
        distill(student, teacher, DATA, method=method, task=task, epochs=1, test=DATA, quiet=True)
        assert [state(teacher), state(student)] == before and numbers() == seeds and dict(os.environ) == environment
    torch.save(student, io.BytesIO())


def test_an_error_or_refusal_gives_back_too() -> None:
    teacher, student = knowing(), net()
    before, seeds = [state(teacher), state(student)], numbers()

    def fail(step: int, loss: Tensor) -> None:
        raise KeyboardInterrupt

    task = Classification(features={"map": ("0", "0")})
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, DATA, method=FitNet(), task=task, epochs=1, on_step=fail, quiet=True)
    assert [state(teacher), state(student)] == before and numbers() == seeds
    with pytest.raises(ValueError, match="has no module 'layer9'"):
        task = Classification(features={"map": ("layer9", "0")})
        distill(student, teacher, DATA, method=FitNet(), task=task, epochs=1, quiet=True)
    assert [state(teacher), state(student)] == before


class Headed(nn.Module):
    """A head on a backbone that it may share with another model."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def sharing() -> dict[str, tuple[nn.Module, Any]]:
    """Name -> (student, a teacher that shares something with it)."""
    backbone, student, drop = net(), net(), nn.Dropout(0.5)
    norm = nn.BatchNorm1d(4, affine=False)
    return {
        "backbone": (Headed(backbone), Headed(backbone)),
        "itself": (student, student),
        "a part": (nn.Sequential(student), student[0]),
        "statistics": (nn.Sequential(net(), norm), nn.Sequential(net(), norm)),
        "dropout": (nn.Sequential(net(), drop), nn.Sequential(net(), drop)),
        "tied weight": tied(),
    }


def tied() -> tuple[nn.Module, nn.Module]:
    student, teacher = net(), net()
    teacher[5].weight = student[5].weight
    return student, teacher


@each("name", sharing())
def test_a_teacher_that_shares_with_the_student_is_refused_untouched(name: str) -> None:
    student, teacher = sharing()[name]
    before = [state(student), state(teacher)]
    with pytest.raises(ValueError, match=r"shares weights with the student.*copy\.deepcopy"):
        distill(student, teacher, DATA, method=KD(), epochs=1, quiet=True)
    assert [state(student), state(teacher)] == before


WRAPPED: dict[str, Any] = {
    "live": Live,
    "ensemble": lambda teacher: Ensemble([net(seed=3), teacher]),
    "routed": lambda teacher: Routed({"a": net(seed=3), "b": Live(teacher)}, by=torch.zeros(64, dtype=torch.long)),
    "reduced": lambda teacher: TopKTeacher(Ensemble([net(seed=3), teacher]), top=2),
}


@each("name", WRAPPED)
def test_layers_that_a_teacher_has_frozen_are_not_silently_left_untrained(name: str) -> None:
    for how in ("backbone", "a part", "tied weight"):
        student, teacher = sharing()[how]
        source = WRAPPED[name](teacher)
        before = [state(student), state(teacher)]
        with pytest.raises(ValueError, match=r"shares weights with the student.*part\.requires_grad_\(False\) before"):
            distill(student, source, DATA, method=KD(), epochs=1, quiet=True)
        assert [state(student), state(teacher)] == before
        with pytest.raises(ValueError, match="shares weights with the student"):
            fitting(KD(), source, student)


def test_layers_of_a_teacher_that_does_not_teach_here() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    live = Live(Headed(backbone))
    student = Headed(backbone)
    with pytest.raises(ValueError, match=r"'backbone.1.weight', would not be trained: .*live\.release\(\)"):
        distill(student, None, DATA, method=Supervised(), epochs=1, quiet=True)
    with pytest.raises(ValueError, match=r"student\.requires_grad_\(True\) trains it"):
        distill(copy.deepcopy(live.model), None, DATA, method=Supervised(), epochs=1, quiet=True)
    live.release()
    weight = backbone[1].weight.clone()
    distill(student, None, DATA, method=Supervised(), epochs=1, quiet=True)
    assert not torch.equal(backbone[1].weight, weight)
    backbone.requires_grad_(False)  # by its user, so it may be shared
    run = distill(student, live.model, DATA, method=KD(), epochs=1, quiet=True, skip_checks=["above chance"])
    assert run.facts["selfcheck"]["checks"]["trained parameters"] == "ok (20 of 88)"


def test_a_frozen_head_of_the_teacher_may_be_reused() -> None:
    teacher = knowing(4)
    student = net()
    student[5] = teacher[5].requires_grad_(False)
    distill(student, teacher, DATA, method=KD(), epochs=1, quiet=True)


def test_live_is_released_and_takes_the_module_again() -> None:
    model = net()
    before = state(model)
    live = Live(model)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert state(model.train() and live.release().model) == before
    torch.testing.assert_close(live(X), copy.deepcopy(model).eval()(X))
    assert not any(m.training for m in model.modules())
    with pytest.raises(RuntimeError), borrowed(model):
        model.train()
        raise RuntimeError
    assert not model.training


# features


@each("inplace", [True, False])
def test_a_feature_is_the_output_of_its_module(inplace: bool) -> None:
    """Also before an in-place ReLU or addition, in every forward, with its gradient."""

    class Added(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0) if inplace else x + 1.0

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace), nn.Conv2d(2, 2, 1), Added(), nn.Conv2d(2, 2, 1))
    reference = copy.deepcopy(model)
    with FeatureExtractor(model, ["0", "2", "4"]) as features:
        for forward in range(3):
            y = model(X)
            want = [reference[0](X)]
            want.append(reference[2](want[0].relu()))
            want.append(reference[4](want[1] + 1.0))
            for name, value in zip(("0", "2", "4"), want, strict=True):
                torch.testing.assert_close(features[name], value, rtol=0, atol=0)
            (gradient,) = torch.autograd.grad(features["0"].square().sum(), model[0].weight, retain_graph=True)
            (expected,) = torch.autograd.grad(want[0].square().sum(), reference[0].weight)
            torch.testing.assert_close(gradient, expected)
            y.sum().backward()
            assert (features["4"] is y) == (forward > 0), "what nothing overwrote in the first forward is not copied"
    assert not any(m._forward_hooks for m in model.modules())


def test_a_module_that_did_not_run_in_this_forward_has_no_feature() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.aux = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.trunk(x) + (self.aux(x) if self.training else 0.0)

    model, x = Auxiliary(), torch.randn(2, 4)
    with FeatureExtractor(model, ["aux"]) as features:
        model(x)
        assert features["aux"].shape == (2, 4)
        model.eval()(x)
        with pytest.raises(KeyError, match="did not run in the last forward"):
            features["aux"]
    with FeatureExtractor(model, ["trunk"]) as features, torch.inference_mode():
        model(x)
        assert features["trunk"].shape == (2, 4)


# wrapped models


def test_a_compiled_or_parallel_model_is_the_plain_one(tmp_path: Path) -> None:
    """As student and as teacher: keys of weights, features, identity, and the weights that are trained."""
    from safetensors.torch import load_file

    plain, teacher = net(), knowing()
    task = Classification(features={"map": ("0", "0")})
    options: dict[str, Any] = {"method": AT(), "task": task, "epochs": 1, "test": DATA, "quiet": True}
    distill(plain, teacher, DATA, **options)
    for number, wrap in enumerate(
        (
            nn.DataParallel,
            lambda m: torch.compile(m, backend="eager"),
            lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
        )
    ):
        student = net()
        distill(wrap(student), wrap(teacher), DATA, **options, out=(folder := tmp_path / str(number)))
        weights = load_file(folder / "student.safetensors")
        assert weights.keys() == plain.state_dict().keys() == load_file(folder / "best.safetensors").keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=0)
        assert fingerprint(wrap(teacher)) == fingerprint(teacher) and Live(wrap(teacher)).release().model is teacher


def test_extracting_features_in_a_step_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters enter the context at every step."""
    import torch._dynamo

    resets: list[int] = []
    features = PairedFeatures.from_models(net(), Live(net()), {"map": ("0", "0")})
    assert features is not None
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    for _ in range(3):
        with features:
            pass
    assert not resets


def test_sharded_or_empty_students_are_refused() -> None:
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*student\.module, .*strategy='ddp'"):
        distill(type("DistributedDataParallel", (nn.Module,), {})(), None, DATA, method=Supervised(), epochs=1)
    with pytest.raises(ValueError, match=r"sharded by FSDP.*strategy='fsdp'"):
        distill(type("FullyShardedDataParallel", (nn.Module,), {})(), None, DATA, method=Supervised(), epochs=1)
    with pytest.raises(ValueError, match="on the meta device"):
        distill(net().to("meta"), None, DATA, method=Supervised(), epochs=1)
    with pytest.raises(ValueError, match=r"has no values for 0\.weight: it is on the meta device"):
        Live(net().to("meta"))


@each("disk", [False, True])
def test_a_teacher_offloaded_by_accelerate(disk: bool, tmp_path: Path) -> None:
    """It runs, is not moved, and has the identity of the same weights in memory."""
    accelerate = pytest.importorskip("accelerate")
    teacher = knowing()
    here, want = copy.deepcopy(teacher), Live(copy.deepcopy(teacher))
    if disk:
        places = {"0": "cpu", "1": "disk", "2": "cpu", "3": "cpu", "4": "cpu", "5": "disk"}
        away = accelerate.dispatch_model(teacher, places, main_device="cpu", offload_dir=tmp_path)
    else:
        away = accelerate.cpu_offload(teacher, execution_device="cpu")
    assert any(p.is_meta for p in away.parameters())
    live = Live(away)
    assert live.identity == want.identity
    torch.testing.assert_close(live(X), want(X), rtol=0, atol=0)
    students = [net(), net()]
    for student, source in zip(students, (away, here), strict=True):
        distill(student, source, DATA, method=KD(), epochs=1, test=DATA, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))


# the trainers of other libraries


@pytest.mark.filterwarnings("ignore")
@each("fails", [False, True])
def test_lightning_gives_back(fails: bool, tmp_path: Path) -> None:
    """Modes and random state after ``prepare``; the teacher and hooks after ``fit``, also after an exception."""
    pl = pytest.importorskip("lightning.pytorch")
    from tempering.integrations.lightning import DistillModule

    class Failing(DistillModule):
        def on_train_batch_end(self, *_: Any) -> None:
            if fails:
                raise RuntimeError("stop")

    teacher, student = knowing(), net()
    teacher[1].eval()
    student[1].eval()
    before, seeds = [state(teacher), state(student)], numbers()
    task = Classification(features={"map": ("0", "0")})
    module = Failing(student, teacher, method=FitNet(), task=task)
    module.prepare(DATA[0])
    assert [state(teacher), state(student)] == before and numbers() == seeds
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_model_summary=False, **options)
    mean = student[1].running_mean.clone()
    try:
        trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
    except RuntimeError as error:
        assert fails and "stop" in str(error)
    assert [state(teacher), state(student)] == before and torch.equal(student[1].running_mean, mean)


@pytest.mark.filterwarnings("ignore")
@each("fails", [False, True])
def test_the_trainer_of_transformers_gives_back(fails: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tempering.integrations.huggingface import DistillMixin, Labeled

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.inner(pixel_values)}

    class KDTrainer(DistillMixin, transformers.Trainer):
        def training_step(self, *args: Any) -> Any:
            if fails:
                raise RuntimeError("stop")
            return super().training_step(*args)

    teacher, student = Wrapped(knowing()), Wrapped(net())
    before = state(teacher)
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=16, report_to=[], save_strategy="no", use_cpu=True
    )
    data = [{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    task = Labeled(features={"map": ("inner.0", "inner.0")})
    trainer = KDTrainer(student, args, train_dataset=data, teacher=teacher, method=FitNet(), task=task)
    assert state(teacher) == before, "not touched before training"
    try:
        trainer.train()
    except RuntimeError as error:
        assert fails and "stop" in str(error)
    assert state(teacher) == before and not any(m._forward_hooks for m in student.modules())
