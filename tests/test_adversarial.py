"""Training on attacked inputs: the ball, PGD-AT and TRADES, KDIGA's variants, nets that take pixels."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.audits.attacks import pgd
from tempering.methods import KDIGA, PGDAT, TRADES, Supervised
from tempering.methods.step._attack import PerturbationBall
from tempering.models import Normalized, build, stages
from tempering.objectives import cross_entropy
from tempering.rows import IGNORE_INDEX, Rows
from tempering.training.distill import distill
from tempering.utils.hooks import FeatureExtractor
from tempering.utils.tensors import eval_mode
from tests.contract import Lesson, same


def rows_of(n: int, weight: Tensor | None = None) -> Rows:
    return Rows(torch.zeros(n, 2), torch.zeros(n, 2), weight=weight)


def pixels(**options: Any) -> Lesson:
    """A lesson whose images are pixels."""
    lesson = Lesson(**options)
    lesson.images = torch.rand(lesson.images.shape, generator=torch.Generator().manual_seed(1)).to(lesson.images)
    return lesson


# the ball


def test_pgd_goes_to_the_ball_s_edge_and_no_further() -> None:
    x, slope = torch.rand(50, 1, 4, 4), torch.randn(1, 4, 4)
    ball = PerturbationBall("PGDAT", x, rows_of(50), eps=0.1, bounds=(0.0, 1.0))
    worst = ball.worst(lambda z: (z * slope).flatten(1).sum(1), steps=5, size=None)
    torch.testing.assert_close(worst, (x + 0.1 * slope.sign()).clamp(0, 1))
    start = ball.start()
    assert float((start - x).abs().max()) <= 0.1 + 1e-6 and float(start.min()) >= 0 and float(start.max()) <= 1
    assert 0.03 < float((start - x).abs().mean()) < 0.06
    free = PerturbationBall("PGDAT", x, rows_of(50), eps=0.1, bounds=None).worst(
        lambda z: z.sum((1, 2, 3)), steps=3, size=0.01
    )
    assert float(free.max()) > 1.0
    still = PerturbationBall("PGDAT", x, rows_of(50), eps=0.0, bounds=(0.0, 1.0)).worst(
        lambda z: z.sum((1, 2, 3)), steps=2, size=1
    )
    assert torch.equal(still, x)


def test_rows_of_weight_zero_stay_and_may_be_anything() -> None:
    x = torch.rand(4, 3)
    padded = torch.cat((x, torch.full((2, 3), 50.0)))
    weight = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0, 0.0])
    moved = []
    for inputs, rows in ((x, rows_of(4, weight[:4])), (padded, rows_of(6, weight))):
        torch.manual_seed(0)
        ball = PerturbationBall("PGDAT", inputs, rows, eps=0.2, bounds=(0.0, 1.0))
        moved.append(ball.worst(lambda z: z.square().sum(1), steps=2, size=0.05))
    assert torch.equal(moved[1][:4], moved[0]) and torch.equal(moved[1][4:], padded[4:])


@pytest.mark.parametrize("value", [2.0, -0.5, float("nan"), float("inf")])
def test_inputs_that_are_no_pixels_are_refused(value: float) -> None:
    for method in (PGDAT(), TRADES(), KDIGA(start=0.1), KDIGA(attack=0.1, attack_steps=1)):
        lesson = pixels()
        lesson.images[0] = value
        with pytest.raises(ValueError, match=r"perturbs inputs in 0 to 1, and these are from .*models.Normalized"):
            lesson.loss(method)


@pytest.mark.parametrize("kind", [PGDAT, TRADES])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"eps": -0.1}, "strength >= 0"),
        ({"attack_steps": 0}, "1 step or more"),
        ({"step_size": 0.0}, "size > 0 or None"),
        ({"bounds": (1.0, 0.0)}, r"bounds=\(low, high\)"),
        ({"bounds": (0.0,)}, r"bounds=\(low, high\)"),
        ({"hard": -1.0}, "hard >= 0"),
    ],
)
def test_what_is_no_attack_is_refused(kind: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind(**wrong)


def test_inputs_without_a_slope_are_refused() -> None:
    step = pixels().step()
    step.student_inputs = torch.zeros(6, 4, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"PGDAT needs one floating point tensor of inputs \(N, ...\); got torch.int64"
    ):
        PGDAT().step(step)


# adversarial training


def test_no_strength_is_plain_training() -> None:
    lesson = pixels()
    plain = cross_entropy(lesson.step().forward()[-1])
    for method in (PGDAT(eps=0.0), TRADES(eps=0.0)):
        loss, terms, _ = lesson.loss(method)
        same(terms["hard"], plain)
        same(loss, plain.mean())
        assert not terms.get("robust", torch.zeros(1)).any()


def test_both_are_worse_off_for_the_attack() -> None:
    lesson = pixels()
    plain = cross_entropy(lesson.step().forward()[-1])
    for steps in (1, 5):
        assert bool((lesson.loss(PGDAT(eps=0.1, attack_steps=steps))[1]["hard"] > plain).all())
        moved = lesson.loss(TRADES(eps=0.1, attack_steps=steps))[1]
        same(moved["hard"], plain)
        assert bool((moved["robust"] > 0).all())
    weak, strong = (lesson.loss(TRADES(eps=eps))[1]["robust"].mean() for eps in (0.02, 0.1))
    assert strong > 2 * weak


def test_the_gradient_of_trades_is_that_of_both_answers() -> None:
    lesson, method = pixels(), TRADES(eps=0.1, robust=3.0, hard=0.0)
    _, gradients = lesson.backward(method)
    torch.default_generator.manual_seed(0)
    worst: list[Tensor] = []
    real = method.attacked

    def kept(*args: Any) -> Tensor:
        worst.append(real(*args))
        return worst[-1]

    method.attacked = kept  # pyright: ignore[reportAttributeAccessIssue]
    lesson.loss(method)
    p, q = (lesson.student(x).log_softmax(-1) for x in (lesson.images, worst[0]))
    want = torch.autograd.grad(3.0 * (p.exp() * (p - q)).sum(-1).mean(), list(lesson.student.parameters()))
    same(gradients, list(want), 1e-7, 1e-10)


@pytest.mark.parametrize(("method", "passes"), [(PGDAT(), 1), (TRADES(), 2), (KDIGA(attack=0.1, attack_steps=2), 2)])
def test_the_attack_leaves_statistics_and_modes_alone(method: Any, passes: int) -> None:
    lesson = pixels()
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 5)).double().train()
    net[0].eval()  # somebody froze a part
    lesson.student = net
    step = lesson.step()
    method.double().step(step)
    assert int(net[1].num_batches_tracked) == passes
    assert [m.training for m in net.modules()] == [True, False, True, True]
    with pytest.raises(KeyError), eval_mode(net):
        raise KeyError
    assert net.training and not net[0].training


class Planted:
    """Images of 4 x 4: one pixel says the class strongly, nine times of ten; the others faintly, and always."""

    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(2, (n,), generator=generator)
        sign = 2.0 * self.y[:, None, None, None] - 1
        self.x = 0.5 + 0.04 * sign + 0.04 * torch.randn(n, 1, 4, 4, generator=generator)
        says = torch.where(torch.rand(n, generator=generator) < 0.9, sign[:, 0, 0, 0], -sign[:, 0, 0, 0])
        self.x[:, 0, 0, 0] = 0.5 + 0.4 * says
        self.x = self.x.clamp(0, 1)


@pytest.mark.parametrize("method", [PGDAT(eps=0.1, attack_steps=3), TRADES(eps=0.1, attack_steps=3)], ids=repr)
def test_what_was_attacked_in_training_stands_an_attack(method: Any) -> None:
    train, test = Planted(512, 0), Planted(500, 1)
    accuracy = {}
    for name, by in (("plain", Supervised()), ("robust", method)):
        torch.manual_seed(0)
        net = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), mean=(0.5,), std=(0.25,))
        batches = [(train.x[i : i + 64], train.y[i : i + 64]) for i in range(0, 512, 64)]
        distill(net, None, batches, method=by, epochs=12, optimizer=partial(torch.optim.SGD, lr=0.5), quiet=True)
        struck = pgd(net, test.x, test.y, eps=0.1, steps=5)
        accuracy[name] = [float(x.double().mean()) for x in (net(test.x).argmax(-1) == test.y, ~struck.fooled)]
    assert accuracy["plain"][0] > 0.95 and accuracy["plain"][1] < 0.5
    assert accuracy["robust"][1] > 0.8 > 0.6 > accuracy["plain"][1]


# KDIGA's variants


def test_the_start_is_one_for_both_models() -> None:
    lesson = pixels()
    lesson.student = copy.deepcopy(lesson.teacher.model).requires_grad_(True)
    for variant in ({"start": 0.1}, {"attack": 0.1, "attack_steps": 2}, {"right": True}, {"start": 0.1, "attack": 0.1}):
        _, terms, _ = lesson.loss(KDIGA(warmup=0.0, **variant))
        assert not terms["align"].any() and not terms["soft"].any(), variant
    moved, plain = lesson.loss(KDIGA(start=0.1))[1]["hard"], lesson.loss(KDIGA())[1]["hard"]
    assert bool((moved != plain).all())
    outside = lesson.loss(KDIGA(start=10.0, bounds=(0.0, 1.0)))[2].student
    assert outside.isfinite().all()


def test_only_where_the_teacher_is_right() -> None:
    lesson = pixels(n=40)
    lesson.labels[::4] = IGNORE_INDEX
    whole, some = (lesson.loss(KDIGA(warmup=0.0, right=right))[1] for right in (False, True))
    right = lesson.teacher(lesson.images, None).argmax(-1) == lesson.labels
    assert right.any() and not right.all() and not right[::4].any()
    same(some["hard"], whole["hard"])
    for name in ("soft", "align"):
        same(some[name][right], whole[name][right])
        assert not some[name][~right].any()
    lesson.backward(KDIGA(right=True, published=True))


def test_the_soft_term_is_taken_where_the_student_is_worst() -> None:
    lesson = pixels()
    plain, attacked = (lesson.loss(KDIGA(warmup=0.0, attack=attack))[1] for attack in (0.0, 0.1))
    for name in ("hard", "align"):
        same(attacked[name], plain[name])
    assert bool(((attacked["soft"] - plain["soft"]).abs() > 1e-6).all())
    lesson.backward(KDIGA(attack=0.1, start=0.05))


# nets that take pixels


def test_a_net_that_normalizes_inside() -> None:
    torch.manual_seed(0)
    net = build("resnet8", classes=10).eval()
    made, x = Normalized(net, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)), torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    torch.testing.assert_close(made(x), net((x - mean[:, None, None]) / std[:, None, None]))
    assert stages(made) == ["net.stage1", "net.stage2", "net.stage3"] and set(made.state_dict()) == {
        f"net.{name}" for name in net.state_dict()
    }
    with FeatureExtractor(made, stages(made)) as taps:
        made.eval()(x)
        assert taps["net.stage3"].shape == (2, 64, 8, 8)
    for mean, std in (((0.5,), (0.2, 0.2)), ((), ()), ((0.5,), (0.0,))):
        with pytest.raises(ValueError, match="a mean and a std > 0 per channel"):
            Normalized(net, mean=mean, std=std)
