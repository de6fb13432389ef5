"""What each temperature policy does, and how they compose; Sharpness has a file of its own."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.experiments.presets import method_of
from tempering.experiments.spec import method_from, policy_from
from tempering.methods import DKD, DTKD, KD, LSKD, Method, Sum
from tempering.objectives import entropy, kl
from tempering.rows import Rows, total
from tempering.temperature import (
    DTS,
    POLICIES,
    Ablated,
    Adaptive,
    Capped,
    Cosine,
    Curriculum,
    Energy,
    Entropy,
    Policy,
    Scheduled,
    Sharpness,
    Standardized,
    Static,
)
from tempering.training.distill import distill
from tests.conftest import random_rows
from tests.contract import VARIED_POLICIES, backward, block, on_each, same


def trained(method: Method, rows: Rows, *, steps: int = 60, lr: float = 0.3, progress: float = 1.0) -> list[float]:
    """Losses of ``steps`` of descent in the method's own parameters, the student held."""
    optimizer = torch.optim.SGD(method.param_groups(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = total(method(rows, progress), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def like_cifar(n: int = 64, classes: int = 100) -> Rows:
    """Rows as trained nets give them: one large logit, the others correlated."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    teacher, student = 1.8 * one, 1.5 * (0.7 * one + math.sqrt(1 - 0.7**2) * other)
    teacher[:, 0], student[:, 0] = 12.0 + 3.0 * one[:, 0], 8.0 + 3.0 * other[:, 0]
    return Rows(student, teacher)


def reference(policy: Policy, rows: Rows) -> Tensor:
    T = policy(rows).student
    return T.detach().expand(len(rows), 1)


# Curriculum


@pytest.mark.parametrize("form", ["global", "instance"])
@pytest.mark.parametrize("initial", [-2.6, 0.0], ids=["below", "above"])
def test_the_temperature_climbs_the_loss_and_without_reversal_descends_it(form: Any, initial: float) -> None:
    rows = random_rows(16, 12, labels=False)
    for lam, sign in ((-1.0, 1), (1.0, -1)):
        torch.manual_seed(1)
        method = KD(
            soft=1.0, hard=0.0, temperature=Curriculum(form=form, initial=initial, lambda_last=lam, run_fraction=0.0)
        )
        method.setup(rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the descent ends at a bound
            losses = trained(method, rows, steps=30, lr=0.02)
        steps = [sign * (after - before) for before, after in itertools.pairwise(losses)]
        assert all(step > -1e-9 for step in steps) and sum(steps) > 1e-2, (lam, losses)


def test_the_adversary_stops_where_the_loss_is_largest() -> None:
    rows = like_cifar()
    method = KD(soft=1.0, hard=0.0, temperature=Curriculum(initial=-1.5, run_fraction=0.0))
    trained(method, rows, steps=40)
    found = float(reference(method.temperature, rows)[0])
    losses = [float(kl(rows, Static(T)(rows)).mean()) for T in (0.95 * found, found, 1.05 * found)]
    assert 2.5 < found < 3.5 and losses[1] > max(losses[0], losses[2]), "the paper's ends at 3.4 to 4.0"


def test_nothing_moves_while_lambda_is_zero() -> None:
    rows = random_rows(8, 5)
    method = KD(temperature=Curriculum(run_fraction=0.5))
    losses = trained(method, rows, progress=0.0)
    assert losses[0] == losses[-1]
    assert float(reference(method.temperature, rows)[0]) == pytest.approx(1 + 20 / (1 + math.exp(-1.0)), rel=1e-6)
    policy = Curriculum(run_fraction=0.5)
    assert [policy.lambda_at(p) for p in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.0, -0.5, -1.0, -1.0])


@pytest.mark.parametrize("form", ["global", "instance"])
def test_reversal_multiplies_the_gradient_and_leaves_the_value(form: Any) -> None:
    rows = random_rows(6, 7)
    found = []
    for lam in (1.0, -0.25):
        torch.manual_seed(2)
        policy = Curriculum(form=form, lambda_last=lam, run_fraction=0.0).double()
        policy.setup(rows)
        T = policy(rows).student
        found.append((T.detach(), torch.autograd.grad(T.sum(), list(policy.parameters()))))
    same(found[0][0], found[1][0], 0.0, 0.0)
    same([-0.25 * g for g in found[0][1]], list(found[1][1]))
    assert all(bool(g.any()) for g in found[0][1])


def test_on_standardized_logits_it_falls_to_the_floor_and_says_so_once() -> None:
    rows = like_cifar()
    policy = Curriculum(low=2.0, high=22.0, initial=-2.0, run_fraction=0.0)
    method = LSKD(KD(soft=9.0, hard=0.0, temperature=policy), hard=0.0)
    with pytest.warns(UserWarning, match=r"is at a bound, T = 2\.\d+ of \[2, 22\], where it is constant") as said:
        trained(method, rows, steps=50, lr=0.5)
    assert len(said) == 1 and int(policy.report()["at_bound"]) == 1
    assert float(reference(policy, rows)[0]) < 2.2


def test_the_warning_is_for_most_rows_and_for_training() -> None:
    policy = Curriculum(initial=9.0)
    policy.eval()
    policy(block())  # warnings are errors here
    policy.train()
    with pytest.warns(UserWarning, match="T = 21 of"):
        policy(block())
    instance = Curriculum(form="instance", centered=False, hidden=1)
    rows = block(4, 2, weighted=True)
    instance.setup(rows)
    with torch.no_grad():
        for p in instance.parameters():
            p.zero_()
        instance.net[0].weight[0, 0] = 1.0  # pyright: ignore
        instance.net[2].weight[0, 0] = 1.0  # pyright: ignore
    teacher = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    half = rows.replace(teacher=teacher)
    instance(half)
    assert int(instance.report()["at_bound"]) == 2
    instance(half.replace(weight=torch.tensor([0.0, 1.0, 1.0, 1.0])))
    assert int(instance.report()["at_bound"]) == 1
    with pytest.warns(UserWarning, match="T = 21 of"):
        instance(half.replace(weight=torch.tensor([1.0, 1.0, 1.0, 0.0])))


def test_weight_decay_on_the_temperature_is_a_choice() -> None:
    own, plain = Curriculum(weight_decay=0.0), Curriculum()
    for method in (KD(temperature=own), KD(temperature=Scheduled(Capped(own))), LSKD(KD(hard=0.0, temperature=own))):
        assert method.param_groups() == [{"params": [own.raw], "weight_decay": 0.0}]
    assert KD(temperature=plain).param_groups() == [{"params": [plain.raw]}]
    both = Sum(KD(temperature=own), DKD(hard=0.0, temperature=plain)).param_groups()
    assert both == [{"params": [own.raw], "weight_decay": 0.0}, {"params": [plain.raw]}]
    assert KD(temperature=Capped(Sharpness())).param_groups() == []
    optimizer = torch.optim.SGD(both, lr=0.1, weight_decay=5e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 5e-4]


def test_the_instance_net_is_sized_by_the_first_rows() -> None:
    method = KD(temperature=Scheduled(Curriculum(form="instance", hidden=5), end=2.0))
    assert method.needs_setup() and not KD().needs_setup() and not DTKD(temperature=Capped(Sharpness())).needs_setup()
    with pytest.raises(RuntimeError, match=r"its net has no size yet, and .*7 classes. Call method.setup\(rows\)"):
        method(block())
    Sum(method, DKD(hard=0.0)).setup(block())
    (net,) = [p for p in method.policies().values() if isinstance(p, Curriculum)]
    first = net.net
    method.setup(block())
    assert net.net is first and [p.shape for p in net.parameters()] == [(5, 14), (5,), (1, 5), (1,)]
    backward(method, block())
    with pytest.raises(RuntimeError, match=r"is made for 7 classes, and .* has 5 classes"):
        method(block(4, 5))


@pytest.mark.parametrize("form", ["global", "instance"])
def test_the_engine_trains_it(form: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    teacher, student = nn.Linear(6, 4), nn.Linear(6, 4)
    with torch.no_grad():
        labels = teacher(x).argmax(-1)
        teacher.weight.mul_(5.0)
    batches = [(x[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    policy = Curriculum(form=form, run_fraction=0.5, weight_decay=0.0)
    run = distill(student, teacher, batches, method=KD(temperature=policy), epochs=6, quiet=True)
    T = reference(policy, Rows(student(x).detach(), teacher(x).detach()))
    start = 1 + 20 / (1 + math.exp(-1.0))
    assert run.facts["status"] == "done" and float((T - start).abs().mean()) > 0.05
    assert (float(T.std()) > 1e-4) == (form == "instance")


# Energy


def test_energy_sorts_rows_into_three() -> None:
    scale = torch.linspace(0.5, 12.0, 20, dtype=torch.float64).unsqueeze(1)
    teacher = scale * torch.randn(1, 7, dtype=torch.float64)
    rows = Rows(torch.randn(20, 7, dtype=torch.float64), teacher)
    T = Energy()(rows)
    assert T.student is T.teacher
    # the sharper the teacher, the lower the energy: the last rows are the sure ones
    assert T.teacher.flatten().tolist() == [6.0] * 4 + [4.0] * 12 + [2.0] * 4
    known = Energy(bounds=Energy.bounds_of(teacher))
    same(known(rows).teacher, T.teacher)
    assert not known.relational and Energy().relational
    same(known(Rows(rows.student[:1], teacher[:1])).teacher, T.teacher[:1])
    assert (
        Energy(low_energy=6.0, high_energy=2.0)(rows).teacher.flatten().tolist() == [2.0] * 4 + [4.0] * 12 + [6.0] * 4
    )
    weight = torch.ones(20, dtype=torch.float64)
    weight[16:] = 0.0
    assert Energy()(rows.replace(weight=weight)).teacher.flatten()[:16].tolist() == [6.0] * 3 + [4.0] * 10 + [2.0] * 3


def test_energy_as_released_is_not_centered() -> None:
    rows = random_rows(50, 10)
    moved = rows.replace(teacher=rows.teacher + torch.linspace(-20, 20, 50, dtype=torch.float64).unsqueeze(1))
    same(Energy()(moved).teacher, Energy()(rows).teacher)
    raw = Energy(centered=False)
    found = -4.0 * (rows.teacher / 4.0).exp().sum(1).log()
    ranked = found.sort().values
    want = torch.where(found < ranked[10], 2.0, torch.where(found > ranked[-11], 6.0, 4.0))
    same(raw(rows).teacher.flatten(), want.double())
    assert not torch.equal(raw(moved).teacher, raw(rows).teacher)


# Adaptive


@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_adaptive_is_the_formula_of_its_source(strength: float) -> None:
    rows = random_rows(9, 6)
    p, q = rows.student.softmax(-1), rows.teacher.softmax(-1)
    s = (p.sqrt() - q.sqrt()).square().sum(-1).sqrt() / math.sqrt(2.0)
    want = 3.0 * torch.exp(-strength * torch.tanh(torch.log(s / s.median())))
    same(Adaptive(3.0, strength=strength)(rows).student.flatten(), want)
    hardest = int(s.argmax())
    assert (float(want[hardest]) < 3.0) == (strength > 0)


def test_adaptive_where_most_rows_agree() -> None:
    rows = random_rows(5, 6)
    agreeing = rows.replace(student=rows.teacher.clone())
    assert reference(Adaptive(4.0), agreeing).flatten().tolist() == [4.0] * 5
    agreeing.student[0] = rows.student[0]
    assert reference(Adaptive(4.0), agreeing).flatten().tolist() == [4.0] * 5
    alone = agreeing.replace(weight=torch.tensor([1.0, 0, 0, 0, 0]))
    assert float(reference(Adaptive(4.0), alone)[0]) == 4.0
    none = agreeing.replace(weight=torch.zeros(5))
    assert reference(Adaptive(4.0), none).isfinite().all()


# Scheduled and DTS


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_a_schedule_goes_from_start_to_end(shape: Any) -> None:
    rows = block()
    policy = Scheduled(Static(4.0), shape=shape, end=2.0, run_fraction=0.8)
    middle = 3.0
    quarter = 3.5 if shape == "linear" else 2.0 + 2.0 * 0.5 * (1 + math.cos(math.pi / 4))
    for progress, want in ((0.0, 4.0), (0.2, quarter), (0.4, middle), (0.8, 2.0), (1.0, 2.0)):
        assert float(policy(rows, progress).student) == pytest.approx(want) == policy.reference_at(progress)
    assert Scheduled(Static(4.0), start=8.0, end=1.0).reference_at(0.0) == 8.0
    assert Scheduled(end=1.0, run_fraction=0.0).reference_at(0.0) == 1.0


@pytest.mark.parametrize("solved", [Sharpness, Entropy])
def test_a_schedule_solves_anew_where_the_reference_is_in_the_equation(solved: Any) -> None:
    rows, policy = block(16), Scheduled(solved(4.0), end=2.0)
    same(policy(rows, 1.0), solved(2.0)(rows))
    multiplied = solved(4.0)(rows).times(0.5)
    assert not torch.allclose(policy(rows, 1.0).student, multiplied.student, rtol=1e-3)
    T = policy(rows, 0.5)
    same(T.student + T.teacher, torch.full((16, 1), 6.0, dtype=torch.float64))
    assert set(policy.report()) == {"fallback", "clamped"}


@pytest.mark.parametrize("inner", [Cosine(), Standardized(2.0), Standardized(scale="tau"), Energy(), Curriculum()])
def test_a_schedule_multiplies_the_others(inner: Policy) -> None:
    rows = block()
    found = Scheduled(inner, start=inner.tau, end=inner.tau / 4)(rows, 1.0)
    want = inner(rows).times(0.25)
    same(found, want)
    same(found.scale, inner(rows).scale / 16)


def test_plain_terms_follow_the_schedule() -> None:
    rows = block()
    found = DTKD(warmup=0.0, temperature=Scheduled(Sharpness(4.0), end=2.0))(rows, 1.0)
    want = DTKD(warmup=0.0, temperature=Sharpness(2.0))(rows, 1.0)
    same(found, want)
    inside = DTKD(warmup=0.0, temperature=Capped(Scheduled(Sharpness(4.0), end=2.0), low=0.01))(rows, 1.0)
    same(inside, want)


@on_each("policy", VARIED_POLICIES, lambda policy: policy)
@pytest.mark.filterwarnings(r"ignore:Sharpness\(solve='published'\)")
def test_policies_compose(policy: Policy) -> None:
    rows = block(weighted=True)
    for outer in (
        Capped(Scheduled(copy.deepcopy(policy), end=2.0), low=1.5, high=3.0),
        Scheduled(Capped(copy.deepcopy(policy), low=1.5, high=3.0), start=4.0, end=4.0),
    ):
        for kind in (KD, DKD, DTKD):
            method = kind(temperature=outer)
            method.setup(rows)
            backward(method, rows, 0.5)
        T = outer(rows, 0.5)
        scale = 4.0 / outer.tau if isinstance(outer, Scheduled) and type(policy) not in (Sharpness, Entropy) else 1.0
        for side in (T.student, T.teacher):
            assert bool((side >= scale * 1.5 - 1e-6).all()) and bool((side <= scale * 3.0 + 1e-6).all())
        assert outer.shift_invariant == policy.shift_invariant and outer.relational == policy.relational
        assert "capped" in outer.report()


def test_isolated_halves_make_the_whole() -> None:
    """Each is the other's divergence at its own scale: together they are the policy, and each alone is not."""
    rows, tau = block(weighted=True), 4.0
    T, plain = Sharpness(tau)(rows), Static(tau)(rows)
    soften, weigh = (Ablated(Sharpness(tau), keep=keep) for keep in ("temperatures", "scale"))
    same(kl(rows, soften(rows)) * T.scale, kl(rows, T) * tau**2)
    same(kl(rows, weigh(rows)) * tau**2, kl(rows, plain) * T.scale)
    assert not torch.allclose(kl(rows, weigh(rows)), kl(rows, plain))
    assert soften.report().keys() == {"fallback", "clamped"}
    for keep in ("temperatures", "scale"):
        later = Scheduled(Ablated(Sharpness(4.0), keep=keep), end=2.0)
        inside = Ablated(Scheduled(Sharpness(4.0), end=2.0), keep=keep)
        want = Ablated(Sharpness(2.0), keep=keep)(rows)
        for found in (later(rows, 1.0), inside(rows, 1.0)):
            same(tuple(found), tuple(want))
        backward(DTKD(temperature=Ablated(Sharpness(4.0), keep=keep)), rows, 0.5)
        same(DTKD(temperature=Ablated(keep=keep))(rows, 0.5), DTKD(temperature=Static(4.0))(rows, 0.5))


def test_a_cap_holds_and_counts() -> None:
    rows = block(8, weighted=True)
    plain, policy = Sharpness(4.0)(rows), Capped(Sharpness(4.0), low=3.5, high=4.5)
    T = policy(rows)
    same(T.teacher, plain.teacher.clamp(3.5, 4.5))
    out = sum(int(((side < 3.5) | (side > 4.5)).sum()) for side in (plain.student, plain.teacher))
    assert int(policy.report()["capped"]) == out > 0
    assert policy.report().keys() == {"fallback", "clamped", "capped"}
    none = rows.replace(weight=torch.zeros(8))
    policy(none)
    assert int(policy.report()["capped"]) == 0
    assert float(Capped(Static(40.0), high=None)(rows).student) == 40.0
    learned = Capped(Curriculum(initial=0.0), high=5.0)
    (slope,) = torch.autograd.grad(learned(rows).student.sum(), learned.parameters())
    assert float(slope) == 0.0


def test_dts_follows_its_source() -> None:
    policy, want = DTS(), 4.0
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for step in range(40):
        student, teacher = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) * 3
        target = torch.randint(5, (4,), generator=generator)
        progress = step / 80
        lost = nn.functional.cross_entropy(teacher, target) - nn.functional.cross_entropy(student, target)
        m = float(lost / (lost + 1))
        seen.add((m > 1) + (m > 2))
        m = 1.0 if m <= 1 else 1.35 if m > 2 else m
        aim = min(max(4.0 * 0.5 * (1 + math.cos(math.pi * progress)) * m, 2.0), 4.0)
        want = 0.9 * want + 0.1 * aim
        T = policy(Rows(student, teacher, target), progress)
        assert float(T.student) == pytest.approx(want, rel=1e-6)
    assert seen == {0, 1, 2}, "all three cases of m"


def test_dts_stands_still_out_of_training_and_is_saved() -> None:
    rows, policy = block(), DTS(3.0)
    for _ in range(5):
        policy(rows, 0.9)
    moved = float(policy(rows, 0.9).student)
    assert 2.0 < moved < 3.0
    policy.eval()
    assert float(policy(rows, 0.1).student) == float(policy(rows, 0.9).student) == pytest.approx(moved)
    again = DTS(3.0)
    again.load_state_dict(policy.state_dict())
    assert float(again.eval()(rows).student) == pytest.approx(moved)


def test_dts_without_labels_or_with_masked_ones_is_its_cosine() -> None:
    rows, target = random_rows(4, 5), torch.tensor([0, 1, -100, 3])
    gone = rows.teacher.index_fill(1, torch.tensor([0]), -torch.inf)
    masked = Rows(rows.student.index_fill(1, torch.tensor([0]), -torch.inf), gone, target)
    for made in (rows.replace(target=None), rows.replace(target=torch.full_like(target, -100)), masked):
        same(DTS()(made, 0.3), DTS(adjust=False)(made, 0.3))
    unweighted = random_rows(4, 5, weighted=True)
    policy = DTS(momentum=0.0, low=0.01, high=100.0)
    assert unweighted.weight is not None
    two = unweighted.replace(weight=torch.tensor([1.0, 1, 0, 0], dtype=torch.float64))
    assert unweighted.target is not None
    half = Rows(unweighted.student[:2], unweighted.teacher[:2], unweighted.target[:2])
    same(policy(two, 0.3), policy(half, 0.3))


# Entropy


def gap(rows: Rows, policy: Policy) -> Tensor:
    T = policy(rows)
    return entropy(rows.teacher / T.teacher) - entropy(rows.student / T.student)


@pytest.mark.parametrize(("tau", "classes"), [(1.0, 10), (4.0, 2), (4.0, 100), (8.0, 10)])
def test_both_sides_have_one_entropy(tau: float, classes: int) -> None:
    rows = random_rows(10_000, classes, labels=False)
    spreads = torch.linspace(0.1, 3.0, 10_000, dtype=torch.float64).unsqueeze(1)
    rows = rows.replace(student=rows.student * spreads, teacher=rows.teacher * spreads.flip(0))
    policy = Entropy(tau, reach=1.0)
    T = policy(rows)
    same(T.student + T.teacher, torch.full((10_000, 1), 2 * tau, dtype=torch.float64))
    assert bool((T.student > 0).all()) and bool((T.teacher > 0).all())
    assert int(policy.report()["fallback"]) == 0
    assert float(gap(rows, policy).abs().max()) < 1e-6
    single = rows.replace(student=rows.student.float(), teacher=rows.teacher.float())
    assert float(gap(single, Entropy(tau)).abs().quantile(0.5)) < 1e-6


def test_entropy_is_exact_for_multiples_and_antisymmetric() -> None:
    teacher = torch.randn(50, 9, dtype=torch.float64) * 4
    T = Entropy(4.0)(Rows(teacher / 3.0, teacher))
    same(T.teacher / T.student, torch.full((50, 1), 3.0, dtype=torch.float64), 1e-7)
    rows = random_rows(50, 9)
    one, other = Entropy(4.0)(rows), Entropy(4.0)(Rows(rows.teacher, rows.student))
    same(one.student, other.teacher, 1e-7)
    same(Entropy(1e4)(rows).teacher, Sharpness(1e4, solve="std")(rows).teacher, 1e-3)


def test_entropy_holds_at_its_reach_and_falls_back() -> None:
    flat, sharp = torch.zeros(1, 5), torch.tensor([[90.0, 0, 0, 0, 0]])
    nearly = torch.tensor([[0.01, 0, 0, 0, 0]])
    policy = Entropy(4.0, reach=0.5)
    T = policy(Rows(torch.cat((flat, nearly, sharp)), torch.cat((sharp, sharp, nearly))))
    assert T.teacher.flatten().tolist() == pytest.approx([4.0, 6.0, 2.0])
    assert {name: int(n) for name, n in policy.report().items()} == {"fallback": 1, "clamped": 2}
    one = policy(Rows(torch.randn(3, 1), torch.randn(3, 1)))
    assert one.student.flatten().tolist() == [4.0] * 3
    hot = 1e4 * torch.eye(5)[:3]
    for dtype in (torch.float16, torch.float32):
        assert policy(Rows(hot.to(dtype), -hot.to(dtype))).student.isfinite().all()


# from text


def test_nested_policies_from_text() -> None:
    method = method_from("kd(temperature=scheduled(sharpness(4), end=2))")
    assert isinstance(method, KD) and isinstance(method.temperature, Scheduled)
    assert isinstance(method.temperature.policy, Sharpness) and method.temperature.end == 2
    deep = policy_from("capped(scheduled(curriculum(form=instance, weight_decay=0), shape=linear, end=1), high=none)")
    assert isinstance(deep, Capped) and deep.high is None and isinstance(deep.policy, Scheduled)
    assert deep.policy.shape == "linear" and isinstance(deep.policy.policy, Curriculum)
    assert isinstance(policy_from("scheduled(policy=cosine)").policy, Cosine)  # pyright: ignore
    assert policy_from("energy(bounds=[-30, -12])").bounds == (-30, -12)  # pyright: ignore
    said: Any = method.hyperparameters()["temperature"]
    assert said["name"] == "Scheduled" and said["policy"] == {"name": "Sharpness", **Sharpness(4).hyperparameters()}
    with pytest.raises(ValueError, match=r"no temperature policy is called 'sharpnes'. Did you mean 'sharpness'"):
        method_from("kd(temperature=scheduled(sharpnes))")
    with pytest.raises(ValueError, match=r"Capped wraps another policy, such as Capped\(Static.*; got 4"):
        policy_from("capped(4)")


@pytest.mark.parametrize("name", ["ctkd", "ctkd-instance", "cosine", "standardized", "energy", "adaptive", "annealed"])
def test_arms_of_policies_train(name: str) -> None:
    method = method_of(name)
    assert isinstance(method, KD) and (method.soft, method.hard) == (0.9, 0.1)
    method.setup(block())
    backward(method, block())


def test_every_policy_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from tempering.cli.main import main

    main(["list"])
    said = capsys.readouterr().out
    assert all(name.lower() in said for name in POLICIES) and "ctkd" in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Curriculum(form="local"), "Curriculum needs form 'global' or 'instance'; got 'local'"),  # pyright: ignore
        (lambda: Curriculum(low=5.0, high=5.0), "Curriculum needs low < high, the bounds of T; got low=5.0"),
        (lambda: Curriculum(run_fraction=10), "Curriculum needs run_fraction in [0, 1], the share of the run"),
        (lambda: Curriculum(lambda_last=math.nan), "Curriculum needs lambda_last to be a finite number; got nan"),
        (lambda: Curriculum(weight_decay=-1.0), "Curriculum needs weight_decay >= 0, or None for the optimizer's"),
        (lambda: Curriculum(hidden=0), "Curriculum needs hidden >= 1; got 0"),
        (lambda: Energy(tail_fraction=0.6), "Energy needs tail_fraction in [0, 0.5]"),
        (lambda: Energy(bounds=(1.0, 0.0)), "Energy needs bounds (lower, upper)"),
        (lambda: Energy(low_energy=0.0), "Energy needs low_energy > 0"),
        (lambda: Energy.bounds_of(torch.zeros(0, 3)), "needs the teacher's logits of at least one row"),
        (lambda: Adaptive(strength=math.inf), "Adaptive needs strength to be a finite number; got inf"),
        (lambda: Entropy(reach=0.0), "Entropy needs reach in (0, 1]"),
        (lambda: Scheduled(end=0.0), "Scheduled needs end > 0"),
        (lambda: Scheduled(run_fraction=20), "Scheduled needs run_fraction in [0, 1]"),
        (lambda: Scheduled(shape="step"), "Scheduled needs shape 'cosine' or 'linear'; got 'step'"),  # pyright: ignore
        (lambda: Ablated(keep="half"), "Ablated needs keep 'temperatures' or 'scale'; got 'half'"),
        (lambda: Capped(low=5.0, high=2.0), "Capped needs low <= high; got low=5.0 and high=2.0"),
        (lambda: Capped(low=-1.0), "Capped needs low > 0"),
        (lambda: DTS(low=5.0), "DTS needs low <= high; got low=5.0"),
        (lambda: DTS(momentum=1.0), "DTS needs momentum in [0, 1)"),
    ],
)
def test_slips_are_named(make: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert said in str(caught.value)


def test_a_number_is_no_policy_to_go_round() -> None:
    with pytest.raises(TypeError, match=r"Scheduled wraps another policy, .*; got 4.0"):
        Scheduled(4.0)  # pyright: ignore[reportArgumentType]
