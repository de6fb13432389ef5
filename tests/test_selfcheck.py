"""The self-check: every fault it can find is planted and found, all-well is one line, and nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tempering as kd
from tempering.methods import DIST, DKD, DTKD, KD, VID, FitNet, Method, StepMethod, Sum, Supervised
from tempering.rows import Rows
from tempering.tasks import Classification
from tempering.teachers import Live, Teacher
from tempering.temperature import Sharpness
from tempering.training.checkpoint import random_state
from tempering.training.features import PairedFeatures
from tempering.training.selfcheck import SelfCheckError, selfcheck

N, C = 32, 5
X = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :C].argmax(1)
ALL = "teacher frozen, in eval, deterministic, above chance, zero at agreement, same when split, same when padded, "
ALL += "same when shifted, finite gradients, can learn, teacher effect, training mode"


def net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, C))


def knowing(scale: float = 6.0) -> nn.Module:
    """A teacher that is always right."""
    model = nn.Linear(8, C, bias=False)
    with torch.no_grad():
        model.weight.copy_(scale * torch.eye(C, 8))
    return model


class Raw(Teacher):
    """A teacher as it must not be: whatever the function answers, around the module as it comes."""

    identity = "raw"

    def __init__(self, answer: Callable[[Tensor], Tensor], model: nn.Module | None = None) -> None:
        self.answer, self.inner = answer, model

    @property
    def model(self) -> nn.Module | None:
        return self.inner

    def __call__(self, inputs: Tensor, ids: Tensor | None) -> Tensor:
        return self.answer(inputs)


class Odd(Method):
    """A method made of a function of its rows."""

    paper = "none"

    def __init__(self, function: Callable[[Rows], Tensor], **said: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in said.items():
            setattr(self, name, value)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        return {"odd": self.function(rows)}


class Owner(StepMethod):
    paper = "none"

    def step(self, step: Any) -> dict[str, Tensor]:
        raise AssertionError("the self-check takes no step")


def gap(rows: Rows) -> Tensor:
    """A sound term: the squared distance of log-probabilities."""
    return (rows.student.log_softmax(-1) - rows.teacher.log_softmax(-1)).square().sum(-1)


def check(
    method: Method | None = None, teacher: Any = "live", *, batch: Any = (X, Y), student: Any = None, **more: Any
) -> str:
    taught = Live(knowing()) if teacher == "live" else teacher
    task = more.pop("task", Classification())
    student = net() if student is None else student
    return selfcheck(student, taught, batch, method=method or KD(), task=task, **more).line


# all is well


def test_all_well_is_one_line() -> None:
    line = check(DTKD())
    assert line == f"self-check ok: {ALL}" and "\n" not in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_of_any_precision(dtype: torch.dtype) -> None:
    class As(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).to(dtype)

    taught = Raw(lambda x: (x[:, :C] * 6).to(dtype))
    assert check(DTKD(), taught, student=As()).startswith("self-check ok: deterministic, above chance, zero at")


def test_rows_compared_with_each_other_are_not_split() -> None:
    said = check(DIST())
    assert "; not checked: split (rows are compared with each other)" in said
    assert "same when shifted, finite gradients" in said and "same when padded" not in said


def test_temperatures_that_move_with_a_shift_are_not_shifted() -> None:
    said = check(DTKD(temperature=Sharpness(4.0, solve="published")))
    assert said.endswith("; not checked: shift (its temperatures move with a shift of the logits)")


def test_without_a_teacher() -> None:
    expected = "self-check ok: same when split, same when padded, same when shifted, finite gradients, can learn, "
    expected += "training mode"
    assert check(Supervised(), None) == expected


def test_a_method_that_owns_its_step_is_not_called() -> None:
    expected = "teacher frozen, in eval, deterministic, above chance, training mode; not checked: loss (the method "
    expected += "owns its step)"
    assert check(Owner()) == f"self-check ok: {expected}"


@pytest.mark.parametrize("kind", [FitNet, VID])
def test_methods_with_projectors_are_asked_about_features_too(kind: type[Method]) -> None:
    def conv(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, channels, 3), nn.Flatten(), nn.Linear(channels * 4, C))

    images = X.new_tensor(range(N * 16)).view(N, 1, 4, 4).sin()
    student, model = conv(2), conv(3)
    labels = model(images).argmax(1)
    task, taught = Classification(features={"map": ("0", "0")}), Live(model)
    taps = PairedFeatures.from_models(student, taught, task.features)
    assert taps is not None
    taps.__enter__()
    method = Sum(kind(hard=0.0), KD())
    method.setup(Rows(student(images), taught(images), labels).replace(features=taps.features()))
    asked = {"student": student, "batch": (images, labels), "task": task, "features": taps.features}
    before = copy.deepcopy(method.state_dict())
    assert "finite gradients" in check(method, taught, **asked)
    assert before and all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    with torch.no_grad():
        next(p for p in method.parameters() if p.ndim == 4).fill_(torch.inf)
    with pytest.raises(SelfCheckError, match=r"Sum: the (loss of the first batch is|gradient in its own) "):
        check(method, taught, **asked)


def test_nothing_is_left_behind() -> None:
    student, method, teacher = net(), DTKD(), Live(knowing())
    student.train()
    student[1].eval()  # a frozen norm stays frozen
    modes = [m.training for m in student.modules()]
    state, random, policies = copy.deepcopy(student.state_dict()), random_state(), copy.deepcopy(method.state_dict())
    check(method, teacher, student=student)
    with pytest.raises(SelfCheckError):
        check(method, teacher, student=student, batch=(X, (Y + 1) % C))
    assert [m.training for m in student.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
    assert torch.equal(random_state()["torch"], random["torch"]) and random_state()["python"] == random["python"]
    assert method.state_dict().keys() == policies.keys() and method.temperature.last is None


def test_methods_that_remember_or_draw_are_no_fault() -> None:
    class Remembers(Odd):
        calls = 0

        def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
            self.calls += 1
            return {"odd": gap(rows) * self.calls * (1.0 + torch.rand(()))}

    method = Remembers(gap)
    assert check(method) == f"self-check ok: {ALL}" and method.calls == 0


def test_few_rows_masked_classes_and_no_labels() -> None:
    one = check(KD(), batch=(X[:1], Y[:1]), student=nn.Linear(8, C))
    assert "above chance (only 1 labeled rows of 5 classes)" in one and "split (one row)" in one

    class Masked(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).index_fill(1, torch.tensor([3]), -torch.inf)

    taught = Raw(lambda x: (x[:, :C] * 6).index_fill(1, torch.tensor([3]), -torch.inf))
    batch = (X, torch.where(Y == 3, -100, Y))
    assert "finite gradients" in check(DTKD(), taught, student=Masked(8, C), batch=batch)

    class Unlabeled(Classification):
        def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
            return [r.replace(target=None) for r in super().rows(student, teacher, batch)]

    assert "; not checked: above chance (no labels)" in check(KD(hard=0.0), task=Unlabeled())


def test_chance_is_told_from_knowledge_on_many_rows() -> None:
    """Token batches have thousands of rows: the binomial is summed in logarithms."""
    torch.manual_seed(3)
    x = torch.randn(5000, 8)
    labels = x[:, :C].argmax(1)
    guesses = torch.where(torch.rand(5000) < 0.05, labels, torch.randint(C, (5000,)))
    weak = nn.functional.one_hot(guesses, C).float()
    assert "above chance" in check(KD(), Raw(lambda _: weak), batch=(x, labels))
    with pytest.raises(SelfCheckError, match=r"right on \d+ of 5000 rows, as a guess among 5 classes"):
        check(KD(), Raw(lambda _: weak), batch=(x, torch.randint(C, (5000,))))


# faults of the teacher


def test_a_teacher_in_training_mode() -> None:
    model = knowing().requires_grad_(False).train()
    with pytest.raises(SelfCheckError, match=r"training mode \(itself\): its outputs depend .*teachers.Live\(model\)"):
        check(teacher=Raw(model, model))
    part = nn.Sequential(knowing(), nn.Dropout(0.5)).requires_grad_(False).eval()
    part[1].train()
    with pytest.raises(SelfCheckError, match=r"training mode \(1\)"):
        check(teacher=Raw(part, part))


def test_a_teacher_that_is_not_frozen() -> None:
    model = knowing().eval()
    with pytest.raises(SelfCheckError, match=r"has parameters that require grad. Wrap it in teachers.Live\(model\)"):
        check(teacher=Raw(model, model))


def test_a_teacher_that_answers_differently_the_second_time() -> None:
    drop = Raw(lambda x: nn.functional.dropout(x[:, :C] * 6, 0.1))
    with pytest.raises(SelfCheckError, match=r"logits differ in a second forward pass of the same batch.*augmentation"):
        check(teacher=drop)
    noise = Raw(lambda x: x[:, :C] * 6 + 1e-4 * torch.randn(N, C))  # rounding of another kernel is no fault
    assert "deterministic" in check(teacher=noise)


def test_a_teacher_that_guesses() -> None:
    with pytest.raises(SelfCheckError, match=r"right on 0 of 32 rows, as a guess among 5 classes.*selfcheck=False"):
        check(batch=(X, (Y + 1) % C))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_teacher_without_numbers(value: float) -> None:
    def broken(x: Tensor) -> Tensor:
        out = x[:, :C] * 6
        out[3, 2] = value
        return out

    with pytest.raises(SelfCheckError, match=r"hold NaN or infinity \(first in row 3 of .*precision='fp32'"):
        check(teacher=Raw(broken))


# faults of the task, the data and the student


def test_a_task_that_promises_another_weight() -> None:
    class Heavier(Classification):
        def row_weights(self, batch: Any) -> dict[str, float]:
            return {"logits": 2.0 * len(batch[1])}

    class Other(Classification):
        def row_weights(self, batch: Any) -> dict[str, float]:
            return {"boxes": 1.0}

    with pytest.raises(SelfCheckError, match=r"Heavier.row_weights\(\) is 64 .* 'logits', but rows\(\) has 32"):
        check(task=Heavier())
    with pytest.raises(
        SelfCheckError, match=r"Other.row_weights\(\) does not have the block 'logits' that rows\(\) returns"
    ):
        check(task=Other())


def test_labels_that_name_no_class() -> None:
    with pytest.raises(SelfCheckError, match=r"label 5 is out of range for 5 classes .*labels start at 1\?"):
        check(batch=(X, Y + 1))


def test_a_student_without_numbers() -> None:
    student = net()
    with torch.no_grad():
        student[4].bias.fill_(torch.nan)
    with pytest.raises(SelfCheckError, match=r"student's logits hold NaN on the first batch. Are the inputs finite"):
        check(student=student)


# faults of the method

FAULTS: dict[str, tuple[Method, str]] = {
    "not zero at agreement": (
        Odd(lambda rows: gap(rows) + 0.5),
        r"Odd: the loss of a student equal to its teacher is not 0; the largest terms of a row: odd = 0.5.*"
        r"zero_when_equal = False",
    ),
    "no number at agreement": (
        Odd(lambda rows: gap(rows) / (rows.student - rows.teacher).abs().sum(-1)),
        "equal to its teacher is not 0; the largest terms of a row: odd = nan",
    ),
    "changes with the split": (
        Odd(lambda rows: gap(rows) * rows.student.std(0).sum()),
        r"and \S+ when the batch is split in two. Is Odd a method with relational = True\?",
    ),
    "changes with rows that weigh nothing": (
        Odd(lambda rows: gap(rows) * (1.0 if rows.weight is None else 2.0)),
        r"and \S+ with rows of weight 0 added: leave them out",
    ),
    "no number with rows that weigh nothing": (
        Odd(lambda rows: gap(rows) * (1.0 if rows.weight is None else torch.nan)),
        "and nan with rows of weight 0 added",
    ),
    "changes with a shift": (
        Odd(lambda rows: (rows.student - rows.teacher).square().sum(-1)),
        r"and \S+ with a constant added to the logits, which does not change softmax.",
    ),
    "no number": (
        Odd(lambda rows: gap(rows) * torch.inf, zero_when_equal=False),
        "Odd: the loss of the first batch is inf. Inspect the logits",
    ),
    "gradient without numbers": (
        Odd(lambda rows: gap(rows) + (gap(rows) - gap(rows).detach()).abs().sqrt()),
        r"Odd: the gradient in the student's logits is not finite on the first batch, first in row 0. If classes are",
    ),
    "no gradient": (Odd(lambda rows: gap(rows).detach()), "Odd: no gradient reaches the student. Is it detached"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_method_with_a_fault(fault: str) -> None:
    method, text = FAULTS[fault]
    with pytest.raises(SelfCheckError, match=text):
        check(method)


def test_a_method_that_says_what_it_is_passes() -> None:
    said = check(Odd(lambda rows: gap(rows) + 0.5, zero_when_equal=False))
    assert "zero at agreement" not in said and "same when split" in said
    said = check(Odd(lambda rows: gap(rows) * rows.student.std(0).sum(), relational=True))
    assert "not checked: split" in said
    said = check(Odd(lambda rows: (rows.student - rows.teacher).square().sum(-1), shift_invariant=False))
    assert "not checked: shift" in said


def test_a_gradient_without_numbers_in_what_the_method_owns() -> None:
    class Learned(Odd):
        def __init__(self) -> None:
            super().__init__(gap)
            self.heat = nn.Parameter(torch.zeros(()))

        def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
            return {"odd": gap(rows) * (1.0 + self.heat.sqrt())}

    with pytest.raises(SelfCheckError, match="Learned: the gradient in its own heat is not finite on the first batch"):
        check(Learned())


# in a run


def test_a_run_keeps_the_line_or_stops(tmp_path: Any) -> None:
    batches = [(X, Y)]
    how: dict[str, Any] = {"method": DKD(), "steps": 1, "quiet": True}
    done = kd.distill(net(), knowing(), batches, **how, out=tmp_path / "a")
    assert done.facts["selfcheck"]["line"].startswith("self-check ok: teacher frozen")
    wrong = [(X, (Y + 1) % C)]
    with pytest.raises(SelfCheckError, match="as a guess"):
        kd.distill(net(), knowing(), wrong, **how, out=tmp_path / "b")
    kd.distill(net(), knowing(), wrong, **how, selfcheck=False)
