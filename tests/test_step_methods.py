"""Methods that own their step: what each promises, the authors' numbers of KDIGA, and Interactive's derivative."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.methods import KDIGA, Interactive, Method, StepMethod, Sum
from tempering.methods.step._virtual_step import VirtualStep, split_step
from tempering.objectives import cross_entropy, kl
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.tasks.two_view import MixUp, TwoView
from tempering.teachers import Live, record
from tempering.teachers.ensemble import Ensemble
from tempering.temperature import Sharpness, Static
from tests.cases import each
from tests.contract import PLAIN_STEP_METHODS, STEP_CASES, STEP_METHODS, Lesson, arguments, on_each, remade, same
from tests.paths import needs_shared
from tests.runs import CLASSES, LOADERS, STEPS, cut, flattened, go, identical, left, points, stop_at
from tests.runs import student_net as plain_student
from tests.runs import teacher_net as plain_teacher
from tests.test_golden import Case

# both are tested elsewhere
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Sharpness\(solve='published'\)"),
    pytest.mark.filterwarnings(r"ignore:Curriculum's temperature is at a bound"),
]


every_method = on_each("method", STEP_CASES, lambda method: method)


# what all of them promise


def test_all_are_found() -> None:
    assert {"KDIGA", "Interactive", "Explainer"} <= {kind.__name__ for kind in STEP_METHODS}


@every_method
def test_terms_are_a_value_a_row(method: StepMethod) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        lesson = Lesson(dtype=dtype)
        for progress in (0.0, 1.0):
            _, terms, rows = lesson.loss(copy.deepcopy(method), progress)
            assert terms and all(t.shape == (len(rows),) and t.isfinite().all() for t in terms.values())
            assert all(t.dtype in (torch.float32, torch.float64) for t in terms.values())
        lesson.backward(method)


@every_method
def test_nothing_is_left_behind(method: StepMethod) -> None:
    lesson = Lesson()
    before = copy.deepcopy(lesson.student.state_dict())
    lesson.backward(method)
    assert identical(dict(lesson.student.state_dict()), dict(before))
    assert all(p.grad is None for p in lesson.student.parameters()) and not lesson.images.requires_grad
    taught = list(lesson.teacher.model.parameters())
    assert all(p.requires_grad == method.teacher_is_student and p.grad is None for p in taught)
    assert not any(module.training for module in lesson.teacher.model.modules())
    moved = lesson.teacher.identity != Live(lesson.teacher.model).identity
    assert moved == (method.trains_teacher and not method.teacher_is_student), "the optimizer moves a second student"


@every_method
def test_weights_weigh_the_terms_of_their_names(method: StepMethod) -> None:
    terms = Lesson().loss(copy.deepcopy(method))[1]
    for name in ("hard", "align", "adversarial"):  # "soft" also weighs what Interactive's teacher hears
        if name in terms and name in arguments(method) and not method.trains_teacher:
            twice = remade(method, **{name: 2.0 * getattr(method, name)})
            same(Lesson().loss(twice)[1][name], 2.0 * terms[name])
    inside = [m for m in method.modules() if isinstance(m, Method)]
    assert {own(name) for name in terms} <= {name for part in inside for name in arguments(part)}


def own(name: str) -> str:
    """The name of the student's term that is the same as this one of a second student."""
    return name.removeprefix("peer_")


@every_method
def test_rows_of_weight_zero_take_no_part(method: StepMethod) -> None:
    lesson, padded = Lesson(), Lesson()
    lesson.weights = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    # one more at the end of each half, so that a method which halves the batch finds the same real rows in both
    places = torch.tensor([0, 1, 2, 4, 5, 6])
    padded.images = torch.full((8, 3, 2, 2), 50.0, dtype=torch.float64).index_copy(0, places, lesson.images)
    padded.labels = torch.full((8,), IGNORE_INDEX).index_copy(0, places, lesson.labels)
    padded.weights = torch.zeros(8, dtype=torch.float64).index_copy(0, places, lesson.weights)
    same(padded.backward(method), lesson.backward(method))
    padded.weights = torch.zeros_like(padded.weights)
    loss, gradients = padded.backward(method)
    assert float(loss) == 0.0 and not any(g.any() for g in gradients)


@every_method
@each("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_of_ten_thousand(method: StepMethod, dtype: torch.dtype) -> None:
    lesson = Lesson(dtype=dtype)
    for net in (lesson.student, lesson.teacher.model):
        with torch.no_grad():
            net[-1].weight.mul_(1e4)
    assert bool(lesson.student(lesson.images).abs().max() > 1e4)
    lesson.backward(method)


@every_method
@each(("n", "classes"), [(0, 5), (1, 5), (2, 5), (6, 1)])
def test_few_rows_and_one_class(method: StepMethod, n: int, classes: int) -> None:
    loss, _ = Lesson(n, classes).backward(method)
    assert n or float(loss) == 0.0


@every_method
def test_rows_without_a_label(method: StepMethod) -> None:
    lesson = Lesson()
    lesson.labels[1::2] = IGNORE_INDEX
    _, terms, _ = lesson.loss(copy.deepcopy(method))
    assert not terms["hard"][1::2].any() and terms["hard"][::2].all()
    lesson.labels[:] = IGNORE_INDEX
    lesson.backward(method)


@on_each("method", [(name, part) for name, part in STEP_CASES if "-" not in name], lambda method: method)
def test_gradient_is_the_slope_of_the_value(method: StepMethod) -> None:
    """At fixed temperatures, since those of a policy are constants, as the student is in the terms of a second one."""
    lesson = Lesson()
    _, gradients = lesson.backward(method)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in gradients]

    def value(h: float) -> float:
        moved = Lesson()
        with torch.no_grad():
            for p, x in zip(moved.student.parameters(), direction, strict=True):
                p.add_(h * x)
        _, terms, rows = moved.loss(copy.deepcopy(method))
        return total({name: term for name, term in terms.items() if own(name) == name}, rows).item()

    slope = sum(float((g * x).sum()) for g, x in zip(gradients, direction, strict=True))
    assert slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-4)


@every_method
def test_zero_and_stationary_at_agreement(method: StepMethod) -> None:
    lesson = Lesson()
    elsewhere = max(float(g.abs().max()) for g in lesson.backward(method)[1])
    lesson.student = copy.deepcopy(lesson.teacher.model).requires_grad_()
    _, terms, rows = lesson.loss(copy.deepcopy(method))
    soft = {name: term for name, term in terms.items() if name != "hard"}
    if method.trains_teacher:  # which has moved before the student is compared with it
        return
    if not method.zero_when_equal:
        found = any(bool((term.abs() > 1e-6).any()) for term in soft.values())
        assert found or not soft, "it says it is not zero at agreement"
        return
    assert all(bool((term.abs() <= 1e-9).all()) for term in soft.values())
    gradients = torch.autograd.grad(total(soft, rows), list(lesson.student.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) <= 1e-5 * (1.0 + elsewhere) for g in gradients)


@pytest.mark.parametrize("kind", STEP_METHODS)
def test_what_a_record_says_of_it(kind: type[StepMethod]) -> None:
    made = kind.example()
    assert json.dumps(made.hyperparameters())
    assert remade(made).hyperparameters() == made.hyperparameters()
    assert "Reference: " in (kind.__doc__ or "") and made.paper in (kind.__doc__ or "")
    with pytest.raises(TypeError, match="Sum adds methods over rows"):
        Sum(made)


@every_method
def test_two_blocks_of_rows_are_refused(method: StepMethod) -> None:
    lesson = Lesson()
    lesson.loss(method)
    step = lesson.step(method=method)
    one = step.make_rows
    step.make_rows = lambda s, t, b: [*one(s, t, b), *one(s, t, b)]
    with pytest.raises(ValueError, match=r"one block of rows, and the task makes 2: (logits, logits|images, images)"):
        method.step(step)


@pytest.mark.parametrize("kind", PLAIN_STEP_METHODS)
def test_what_does_not_go_with_it_is_refused(kind: type[StepMethod], tmp_path: Path) -> None:
    def refused(**more: Any) -> str:
        with pytest.raises(ValueError, match=f"^{kind.__name__} ") as error:
            go(cut(points(16), 8), method=kind.example(), steps=1, **more)
        return str(error.value)

    if kind.needs_double_backward:
        assert "which compile=True does not support" in refused(compile=True)
        assert "which strategy='fsdp' does not support" in refused(strategy="fsdp")
        assert "which precision='16-mixed' does not support" in refused(precision="16-mixed")
    batches = LOADERS["batches"]()
    stored = record(Live(flattened(plain_teacher())), batches, tmp_path / "stored", quiet=True)
    if kind.needs_live:
        assert "differentiates through the teacher, and Cached has no gradient. Give" in refused(teacher=stored)
    with pytest.raises(TypeError, match="Cached is not differentiable: it has only stored outputs"):
        stored.forward_with_grad(batches, None)
    if kind.trains_teacher and not kind.teacher_is_student:  # of two students a step may be split
        assert "Use accumulate=1." in refused(accumulate=2)


@pytest.mark.parametrize("kind", PLAIN_STEP_METHODS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_run_in_each_precision(kind: type[StepMethod], precision: str) -> None:
    run = go(cut(points(64), 16), method=kind.example(), steps=4, precision=precision, test=cut(points(32, seed=3), 16))
    assert run.last["test"]["loss"] < 10 and run.facts["method"]["name"] == kind.__name__
    said = run.facts["selfcheck"]["checks"]["teacher frozen"]
    assert said == ("the method trains it" if kind.trains_teacher else "ok")


# KDIGA


def mlp(case: Case, who: str) -> nn.Sequential:
    """The golden file's Flatten - Linear - activation - Linear."""
    arrays = {key: torch.tensor(value) for key, value in case.values.items() if key.startswith(f"{who}_")}
    hidden, classes = arrays[f"{who}_1_weight"].shape[0], arrays[f"{who}_3_weight"].shape[0]
    activation = getattr(nn, case.config["activation"])()
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, hidden), activation, nn.Linear(hidden, classes)).double()
    with torch.no_grad():
        for i in (1, 3):
            net[i].weight.copy_(arrays[f"{who}_{i}_weight"])
            net[i].bias.copy_(arrays[f"{who}_{i}_bias"])
    return net


def lesson_of(student: nn.Module, teacher: nn.Module | Live | Ensemble, x: Tensor, y: Tensor) -> Lesson:
    made = Lesson()
    made.student, made.images, made.labels = student, x, y
    made.teacher = Live(teacher) if isinstance(teacher, nn.Module) else teacher  # pyright: ignore
    return made


@needs_shared
@pytest.mark.parametrize("name", ["kd", "kdiga_tanh", "kdiga_relu"])
def test_kdiga_as_the_authors_have_it(name: str) -> None:
    case = Case("kdiga", name)
    config, net = case.config, mlp(case, "student")
    x, y = torch.tensor(case.values["x"]), torch.tensor(case.values["labels"])
    lesson = lesson_of(net, mlp(case, "teacher"), x, y)
    align = config["gamma"] if config["method"] == "kdiga" else 0.0
    made = partial(KDIGA, soft=config["alpha"], hard=1.0 - config["alpha"], temperature=Static(config["temperature"]))
    published = made(align=align, warmup=0.0, published=True)
    loss, terms, rows = lesson.loss(published)
    case.agree("loss", loss)
    case.agree("student_logits", rows.student)
    case.agree("teacher_logits", rows.teacher)
    case.agree("loss_ce", cross_entropy(rows).mean())
    case.agree("kl_batchmean", kl(rows, Static(config["temperature"])(rows)).mean() / config["temperature"] ** 2)
    case.agree("kl_mean_reduction", terms["soft"].mean() / (config["alpha"] * config["temperature"] ** 2))
    for i, gradient in zip(("1_weight", "1_bias", "3_weight", "3_bias"), slopes(loss, net), strict=True):
        case.agree(f"grad_{i}", gradient)
    # the same with the divergence as everywhere here: averaged over the rows and not over the classes too
    published.soft *= rows.student.shape[1]
    loss = lesson.loss(published)[0]
    case.agree("loss_batchmean", loss)
    for i, gradient in zip(("1_weight", "1_bias", "3_weight", "3_bias"), slopes(loss, net), strict=True):
        case.agree(f"gradbm_{i}", gradient)
    if align:
        rowwise = lesson.loss(made(align=2.0, warmup=0.0))[1]["align"] / 2.0
        case.agree("align_per_sample", rowwise)
        case.agree("align_norm", rowwise.square().sum().sqrt() / len(y))


def slopes(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def test_kdiga_is_zero_between_a_model_and_its_copy() -> None:
    lesson = Lesson()
    lesson.student = copy.deepcopy(lesson.teacher.model).requires_grad_(True)
    for published in (False, True):
        loss, terms, _ = lesson.loss(KDIGA(hard=0.0, warmup=0.0, published=published))
        assert not terms["align"].any() and not terms["soft"].any()
        assert all(bool((g.abs() < 1e-14).all()) for g in slopes(loss, lesson.student)), "it is a minimum"


@pytest.mark.parametrize("published", [False, True])
def test_kdiga_slopes_agree_with_differences(published: bool) -> None:
    lesson, method = Lesson(), KDIGA(align=3.0, warmup=0.0, published=published)
    lesson.weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    _, gradients = lesson.backward(method)
    parameter = lesson.student[1].weight
    for place in ((0, 0), (3, 7), (5, 11)):
        values = []
        for by in (1e-6, -1e-6):
            with torch.no_grad():
                parameter[place] += by
            values.append(lesson.backward(method)[0])
            with torch.no_grad():
                parameter[place] -= by
        same((values[0] - values[1]) / 2e-6, gradients[0][place], 1e-6, 1e-8)


def test_kdiga_rises_and_leaves_the_rest_alone() -> None:
    method = KDIGA(warmup=0.5)
    at = [Lesson().loss(method, progress)[1] for progress in (0.25, 0.5, 1.0)]
    same(2.0 * at[0]["align"], at[1]["align"])
    same(at[1], at[2])
    same(at[0]["soft"], at[2]["soft"])


class Attends(nn.Module):
    """One head of fused attention over four tokens of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 9), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


@pytest.mark.parametrize("method", [KDIGA(), Interactive(), Interactive(derivative="difference")], ids=repr)
def test_fused_attention_runs_through_the_math_kernel(method: StepMethod) -> None:
    lesson = Lesson(classes=CLASSES, dtype=torch.float32)
    lesson.student = Attends()
    _, gradients = lesson.backward(method)
    assert all(g.any() for g in gradients[2:])


def test_kdiga_with_other_teachers() -> None:
    model, x, y = Lesson().teacher.model.float(), torch.randn(6, 3, 2, 2), torch.arange(6) % 5
    student, method = Lesson(dtype=torch.float32).student, KDIGA(warmup=0.0)
    plain = lesson_of(student, Live(model), x, y).backward(method)
    half = lesson_of(student, Live(model, precision="bf16"), x, y).backward(method)
    assert 0 < abs(float(half[0] - plain[0])) < 0.1 * float(plain[0])
    same(lesson_of(student, Ensemble([model, copy.deepcopy(model)]), x, y).backward(method), plain, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(6, 4, dtype=torch.long), r"got torch.int64 of shape \(6, 4\). Tokens have no gradient"),
        ({"pixel_values": torch.zeros(6, 3)}, "got dict.*a module that takes the images alone"),
        (torch.zeros(6, 3, 4, 4), r"the student gets \(6, 3, 4, 4\) and the teacher \(6, 3, 2, 2\)"),
    ],
)
def test_kdiga_refuses_other_inputs(inputs: Any, said: str) -> None:
    step = Lesson().step()
    step.student_inputs = inputs
    with pytest.raises(ValueError, match=rf"^KDIGA .*{said}"):
        KDIGA().step(step)


def test_kdiga_refuses_more_rows_than_inputs_and_a_teacher_that_has_no_way_back() -> None:
    step = Lesson().step()
    step.make_rows = lambda s, t, b: [Rows(s.repeat(2, 1), s.detach().repeat(2, 1), b["y"].repeat(2))]
    with pytest.raises(ValueError, match="needs a row for each input; got 12 rows of 6 inputs"):
        KDIGA().step(step)
    step.teacher_with_grad = None
    with pytest.raises(ValueError, match="needs a teacher with a gradient"):
        KDIGA().step(step)
    views, models = TwoView(MixUp(), names=("clean", "mixed")), {"student": plain_student(), "teacher": plain_teacher()}
    models = {side: flattened(model) for side, model in models.items()}
    with pytest.raises(ValueError, match="takes one block of rows, and the task makes 2: clean, mixed"):
        go(LOADERS["batches"](), method=KDIGA(), task=views, steps=1, selfcheck=False, **models)


def test_kdiga_is_split_like_any_loss_over_rows() -> None:
    """Micro-batches of unequal size; processes are in tests/test_distributed.py."""
    whole, parts = (
        go(
            cut(points(48, dtype=torch.float64), *sizes),
            teacher=plain_teacher(torch.float64),
            method=KDIGA(),
            steps=4,
            accumulate=len(sizes),
            precision="64-true",
        )
        for sizes in ((12,), (7, 5))
    )
    same(parts.student.state_dict(), whole.student.state_dict(), 0.0, 1e-12)
    with pytest.raises(ValueError, match="KDIGA compares rows with each other"):
        go(cut(points(48), 12), method=KDIGA(published=True), steps=2, accumulate=2)


# Interactive


def net(*, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(4)
    parts = [nn.Flatten(), nn.Linear(12, 7), *([nn.BatchNorm1d(7)] if norm else []), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Linear(7, 5)).double()


def examined(student: nn.Module, method: Interactive, **options: Any) -> tuple[Lesson, VirtualStep, Any, Any]:
    lesson = Lesson(8, **options)
    lesson.student = student
    lesson.weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    method.bind_teacher(lesson.teacher.model)
    parts = split_step(lesson.step(), method.exam_fraction)
    assert parts is not None and len(parts[0].student_inputs) == 5 and len(parts[1].student_inputs) == 3
    return lesson, VirtualStep(student), *parts


def teacher_gradient(
    method: Interactive, lesson: Lesson, rehearsal: VirtualStep, course: Any, exam: Any
) -> list[Tensor]:
    told, T = method.feedback(rehearsal, course, exam)
    parameters = list(lesson.teacher.model.requires_grad_(True).parameters())
    return list(torch.autograd.grad(method.teacher_loss(course, told, T), parameters))


def exam_after(method: Interactive, rehearsal: VirtualStep, course: Any, exam: Any) -> Tensor:
    """The exam's loss as a function of the teacher's weights, with a graph through the rehearsed step."""
    rows = rehearsal.rows(course, rehearsal.weights)
    taught = course.student_rows(course.teacher_with_grad(course.teacher_inputs, None)).student
    T = method.temperature(rows.replace(student=rows.student.detach(), teacher=taught.detach()), 1.0)
    p, q = (taught / T.teacher).log_softmax(-1), (rows.student / T.student).log_softmax(-1)
    terms = {"soft": method.soft * T.scale * (p.exp() * (p - q)).sum(-1), "hard": method.hard * cross_entropy(rows)}
    down = torch.autograd.grad(total(terms, rows), list(rehearsal.weights.values()), create_graph=True)
    ahead = {n: w - method.virtual_lr * g for (n, w), g in zip(rehearsal.weights.items(), down, strict=True)}
    tested = rehearsal.rows(exam, ahead)
    return total({"exam": cross_entropy(tested)}, tested)


@pytest.mark.parametrize("temperature", [Static(4.0), Sharpness(3.0)], ids=["static", "sharpness"])
@pytest.mark.parametrize("options", [{}, {"norm": True, "dropout": 0.4}], ids=["plain", "norm and dropout"])
def test_the_exam_s_gradient_is_that_of_double_backward(temperature: Any, options: dict[str, Any]) -> None:
    method = Interactive(temperature=temperature, virtual_lr=0.7, exam_fraction=0.4)
    student = net(**options)
    before = copy.deepcopy(student.state_dict())
    generator = torch.get_rng_state()
    lesson, rehearsal, course, exam = examined(student, method)
    drawn = torch.get_rng_state()
    got = teacher_gradient(method, lesson, rehearsal, course, exam)
    assert identical(dict(student.state_dict()), dict(before)) and torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(drawn, generator)
    parameters = list(lesson.teacher.model.parameters())
    want = torch.autograd.grad(exam_after(method, rehearsal, course, exam), parameters)
    assert max(float(g.abs().max()) for g in want) > 1e-4
    same(got, list(want), 0.0, 1e-12)


def test_the_exam_s_gradient_is_that_of_differences() -> None:
    method = Interactive(virtual_lr=0.7, exam_fraction=0.4)
    lesson, rehearsal, course, exam = examined(net(), method)
    got = teacher_gradient(method, lesson, rehearsal, course, exam)
    for place in ((0, 0), (4, 6)):
        values = []
        for by in (1e-5, -1e-5):
            with torch.no_grad():
                lesson.teacher.model[-1].weight[place] += by
            values.append(exam_after(method, rehearsal, course, exam).detach())
            with torch.no_grad():
                lesson.teacher.model[-1].weight[place] -= by
        same((values[0] - values[1]) / 2e-5, got[2][place], 1e-5, 1e-10)


def test_the_difference_form_is_near_the_exact_one() -> None:
    found = []
    for derivative in ("exact", "difference"):
        method = Interactive(virtual_lr=0.7, exam_fraction=0.4, derivative=derivative)
        found.append(teacher_gradient(method, *examined(net(norm=True, dropout=0.4), method)))
    for exact, near in zip(*found, strict=True):
        assert 0 < float((exact - near).abs().max()) < 1e-4 * float(exact.abs().max())


def test_the_supervised_term_and_the_layers_that_learn() -> None:
    method = Interactive(supervised=2.0, virtual_lr=0.7, exam_fraction=0.4)
    lesson, rehearsal, course, exam = examined(net(), method)
    both = teacher_gradient(method, lesson, rehearsal, course, exam)
    method.supervised = 0.0
    alone = teacher_gradient(method, lesson, rehearsal, course, exam)
    rows = course.student_rows(lesson.teacher.forward_with_grad(course.teacher_inputs))
    want = slopes(total({"hard": cross_entropy(rows)}, rows), lesson.teacher.model)
    same([a - b for a, b in zip(both, alone, strict=True)], [2.0 * g for g in want])
    lesson, before = Lesson(), copy.deepcopy(Lesson().teacher.model.state_dict())
    lesson.loss(Interactive(layers=["3.weight"], teacher_lr=0.1))
    moved = {n for n, p in lesson.teacher.model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {"3.weight"}


def test_the_student_follows_the_teacher_that_has_learned() -> None:
    """The exam falls, and the course's terms are those of the teacher after the exam."""
    lesson, method = Lesson(64), Interactive(teacher_lr=0.05, virtual_lr=0.5)
    method.bind_teacher(lesson.teacher.model)
    parts = split_step(lesson.step(), 0.5)
    assert parts is not None
    rehearsal, losses = VirtualStep(lesson.student), []
    for _ in range(10):
        losses.append(float(exam_after(method, rehearsal, *parts).detach()))
        step = lesson.step()
        terms = method.step(step)
        assert step.rows is not None
        same(step.rows.teacher, lesson.teacher(lesson.images))
        same(terms["soft"], method.soft * kl(step.rows, Static(4.0)(step.rows)))
    assert losses[-1] < losses[0] - 0.01 and losses == sorted(losses, reverse=True)


def test_an_exam_every_so_many_steps() -> None:
    lesson, method = Lesson(), Interactive(every=3, teacher_lr=0.1)
    method.bind_teacher(lesson.teacher.model)
    moved = []
    for _ in range(7):
        before = Live(lesson.teacher.model).identity
        method.step(lesson.step())
        moved.append(Live(lesson.teacher.model).identity != before)
    assert moved == [True, False, False, True, False, False, True]


def test_stopped_and_resumed_bit_for_bit_with_its_teacher(tmp_path: Path) -> None:
    def run(out: Path, **more: Any) -> nn.Module:
        taught = flattened(plain_teacher())
        student = flattened(plain_student(dropout=0.3, norm=True))
        method = Interactive(every=2, teacher_lr=1e-2)
        settings = {"steps": STEPS, "out": out, "checkpoint_every": 3, "selfcheck": False}
        go(
            LOADERS["shuffled"](),
            student=student,
            teacher=taught,
            method=method,
            validation=cut(points(20, seed=9), 10),
            **(settings | more),
        )
        return taught

    taught = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", on_step=stop_at(13))
    again = run(tmp_path / "stopped")
    whole, stopped = left(tmp_path / "whole"), left(tmp_path / "stopped")
    assert identical(whole, stopped)
    assert identical(dict(taught.state_dict()), dict(again.state_dict()))
    assert not identical(dict(taught.state_dict()), dict(flattened(plain_teacher()).state_dict()))
    kept = whole["state"]["method"]["_extra_state"]
    assert kept["steps"] == STEPS and len(kept["optimizer"]["state"]) == 2


def test_a_teacher_that_learns_is_asked_anew_at_every_evaluation() -> None:
    """Answers to a fixed loader are remembered for one that stands still, by sample ids."""
    x, y = points(32, seed=3)
    loader = [(x, y, torch.arange(32))]
    taught = plain_teacher()
    run = go(cut(points(64), 16), teacher=taught, method=Interactive(teacher_lr=0.3), epochs=3, test=loader)
    answers = Live(taught)(x)
    want = float((run.student.eval()(x).argmax(-1) == answers.argmax(-1)).double().mean())
    assert run.last["test"]["agreement"] == pytest.approx(want)
    assert not torch.equal(answers, plain_teacher().eval()(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_lr": 0.0}, "teacher_lr > 0 and finite; got 0.0"),
        ({"virtual_lr": float("nan")}, "virtual_lr to be a finite number; got nan"),
        ({"exam_fraction": 1.0}, r"exam_fraction in \(0, 1\), the share of a batch; got 1.0"),
        ({"every": 0}, "every >= 1, steps from exam to exam; got 0"),
        ({"derivative": "second"}, "derivative 'exact' or 'difference'; got 'second'"),
        ({"supervised": -1.0}, "supervised >= 0 and finite; got -1.0"),
    ],
)
def test_interactive_refuses_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^Interactive needs {said}"):
        Interactive(**options)


def test_interactive_refuses_teachers_that_cannot_learn() -> None:
    model = Lesson().teacher.model
    with pytest.raises(ValueError, match=r"layers=\('head',\) of parameters 1.weight, 1.bias, 3.weight, 3.bias"):
        Interactive(layers=["head"]).bind_teacher(model)
    with pytest.raises(ValueError, match="finds no parameters of the teacher"):
        Interactive().bind_teacher(nn.Flatten())
    with pytest.raises(ValueError, match=r"whose 1.weight is torch.bfloat16: .* without precision="):
        Interactive().bind_teacher(Live(model, precision="bf16").model)
    with pytest.raises(RuntimeError, match=r"call method.bind_teacher\(teacher.model\) before the first step"):
        Interactive().step(Lesson().step())
    met = Interactive()
    met.bind_teacher(model)
    with pytest.raises(RuntimeError, match="has no teacher to load"):
        Interactive().load_state_dict(met.state_dict())


def test_a_rehearsal_with_tied_weights_and_batches_of_mappings() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward = nn.Linear(5, 5, bias=False)
            self.outward = nn.Linear(5, 5, bias=False)
            self.outward.weight = self.inward.weight

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.outward(self.inward(batch["x"]).tanh())

    student, step = Tied().double(), Lesson().step()
    x = torch.randn(6, 5, dtype=torch.float64)
    step.student_inputs = step.teacher_inputs = {"x": x, "n": 3, "scale": torch.ones(())}
    rehearsal = VirtualStep(student)
    assert len(rehearsal.weights) == 1
    weight = next(iter(rehearsal.weights.values()))
    doubled = rehearsal.rows(step, {"inward.weight": 2.0 * weight}).student
    same(doubled.detach(), ((x @ (2 * weight).T).tanh() @ (2 * weight).T).detach())
    assert student.inward.weight is student.outward.weight is weight
    parts = split_step(step, 0.3)
    assert parts is not None and [len(p.batch["y"]) for p in parts] == [4, 2]
    assert [len(p.student_inputs["x"]) for p in parts] == [4, 2] and parts[0].student_inputs["n"] == 3
    direction = {"inward.weight": torch.randn(5, 5, dtype=torch.float64)}
    exact, near = (rehearsal.along(step, direction, exact=way) for way in (True, False))
    same(near, exact, 1e-3, 1e-4)
    still = rehearsal.along(step, {"inward.weight": torch.zeros(5, 5, dtype=torch.float64)}, exact=False)
    assert not still.any()
