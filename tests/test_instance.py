"""Instance: the released numbers, densities and advantages against independent ones, what it learns, and its state."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path as Folder
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Normal, SigmoidTransform, TransformedDistribution

from tempering.methods import DKD, KD
from tempering.rows import Rows, total
from tempering.temperature import Instance, Policy, Temperatures
from tempering.temperature._mixed import Mix, MixUpLoader, ranked
from tempering.temperature._ppo import (
    Actor,
    Layers,
    Learned,
    Path,
    discounted,
    gae,
    log_density,
    normals,
    prediction_loss,
    published_log_density,
    published_prediction_loss,
    published_redistributed,
    redistributed,
    squashed,
)
from tempering.temperature.base import AdaptivePolicy, constant
from tempering.temperature.instance import observed, scale
from tempering.training.distill import distill
from tests.cases import each
from tests.conftest import random_rows
from tests.paths import SHARED, needs_shared

ALWAYS: dict[str, Any] = {"warmup": 0.0, "period": 1.0, "span": 1.0}
FORMS = ["ppo", "bandit", "published"]


def same(got: Tensor, want: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    want = want if isinstance(want, Tensor) else torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.detach(), want, rtol=rtol, atol=atol, check_dtype=False)


# the released code's numbers


def golden(case: str) -> dict[str, Any]:
    with np.load(SHARED / "golden" / "itkd.npz", allow_pickle=False) as file:
        found = {k.split("__", 1)[1]: file[k] for k in file if k.startswith(f"{case}__")}
    return {k: json.loads(str(v)) if k == "config" else torch.from_numpy(v) for k, v in found.items()}


class Given(Policy):
    paper = "none: temperatures of a test"

    def __init__(self, T: Tensor, factor: Tensor | None = None) -> None:
        super().__init__()
        self.tau, self.found = 4.0, Temperatures(T.unsqueeze(1), T.unsqueeze(1), factor)

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.found


@needs_shared
@pytest.mark.parametrize("case", ["c10", "c100"])
def test_golden_states_and_losses(case: str) -> None:
    g = golden(case)
    rows = Rows(g["student_logits"].requires_grad_(), g["teacher_logits"], g["labels"])
    kept = torch.ones(len(rows), dtype=torch.bool)
    same(observed(rows, kept), g["state_fixed"])
    same(observed(rows, kept, published=True), g["state_released"])
    T, c = g["temperatures"], g["config"]
    progress = c["epoch"] / 240
    kd = KD(soft=1.0, hard=0.0, temperature=Given(T))
    # the released DKD multiplies every row's divergence with every row's T^2, which comes to their mean
    every = Given(T, T.square().mean().expand(len(T), 1))
    dkd = DKD(target=c["dkd_alpha"], non_target=c["dkd_beta"], hard=0.0, warmup=20 / 240, temperature=every)
    for method, name in ((kd, "kd"), (dkd, "dkd")):
        loss = total(method(rows, progress), rows)
        same(loss, g[f"loss_{name}"])
        same(torch.autograd.grad(loss, rows.student)[0], g[f"grad_{name}"])


@needs_shared
def test_golden_policy() -> None:
    g = golden("policy")
    actor = Actor().double()
    with torch.no_grad():
        for i, layer in enumerate(actor.body.layers, 1):
            weight = g[f"actor_l{i}_2_weight" + ("_f32" if i == 2 else "")]
            layer.weight.copy_(weight), layer.bias.copy_(g[f"actor_l{i}_2_bias"])  # pyright: ignore
        actor.log_std.copy_(g["actor_log_std"].flatten())
        mu, log_std = actor(g["state"])
        x = mu + log_std.exp() * g["noise"]
    same(mu, g["mu"])
    same(log_std.expand(len(mu)), g["log_std"])
    same(log_std.exp().expand(len(mu)), g["std"])
    same(squashed(x, low=0.0, high=10.0), g["temperature"])
    same(published_log_density(x, mu, log_std, low=0.0, high=10.0), g["log_prob"])


@needs_shared
def test_golden_scale_of_the_reward() -> None:
    g = golden("reward_scale")
    for name, n, switches, waves in (
        ("cifar100", 240, (150 / 240, 210 / 240, 1.0), (75 / 240, 30 / 240)),
        ("imagenet", 120, (30 / 120, 60 / 120, 90 / 120), (75 / 120, 30 / 120)),
    ):
        got = torch.tensor([scale(e / n, switches, waves) for e in g["epochs"].tolist()], dtype=torch.float64)
        same(got, g[name], 1e-6)  # the original is computed in float32


@needs_shared
def test_golden_advantages_and_calibration() -> None:
    g = golden("gae")
    c = g["config"]
    rewards, values = g["rewards"].double(), g["values"]
    advantages, returns = gae(rewards, values, torch.tensor(c["last_value"]).double(), gamma=c["gamma"], trace=c["lam"])
    same(advantages, g["advantages"], 1e-5, 1e-6)  # the original's buffers are float32
    same(returns, g["returns"], 1e-5, 1e-6)
    spread = advantages.std(correction=0)
    same((advantages - advantages.mean()) / spread, g["advantages_normalised"], 1e-5, 1e-6)
    nets = {
        "redistribution": Layers(4, 16, 1, linear=True).double(),
        "detector": Layers(3, 16, 1, linear=True).double(),
    }
    with torch.no_grad():
        for name, net in nets.items():
            for layer, part in zip(net.layers, ("lstm_0", "fc_out"), strict=True):
                layer.weight.copy_(g[f"{name}_{part}_weight"]), layer.bias.copy_(g[f"{name}_{part}_bias"])  # pyright: ignore
        predicted = nets["redistribution"](torch.cat((g["observations"], g["actions"]), 1)).squeeze(-1)
        same(nets["detector"](g["observations"]).sigmoid(), g["masks"])
    returns = g["returns"].double()
    same(predicted, g["raw_predictions"])
    same(published_redistributed(predicted, returns), g["redistributed_rewards"])
    same(published_prediction_loss(predicted, returns[-1]), g["redistribution_loss"])


# against independent numbers


@pytest.mark.parametrize(("low", "high"), [(0.0, 10.0), (1.5, 4.0)])
def test_log_density_is_that_of_the_squashed_action(low: float, high: float) -> None:
    mu, log_std = torch.tensor([-0.9, 0.0, 0.4], dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    x = torch.tensor([-2.0, 0.3, 3.0], dtype=torch.float64, requires_grad=True)
    got = log_density(x, mu, log_std, low=low, high=high)
    told = TransformedDistribution(Normal(mu, log_std.exp()), [SigmoidTransform(), AffineTransform(low, high - low)])
    T = squashed(x, low=low, high=high)
    same(got, told.log_prob(T).detach())
    (slope,) = torch.autograd.grad(T.sum(), x)
    same(got, (Normal(mu, log_std.exp()).log_prob(x) - slope.log()).detach())
    grid = torch.linspace(-9.0, 9.0, 20001, dtype=torch.float64)
    T = low + (high - low) * grid.sigmoid()
    mass = torch.trapezoid(log_density(grid, mu[:1].expand_as(grid), log_std, low=low, high=high).exp(), T)
    same(mass, 1.0, 1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_gae_against_a_loop(n: int) -> None:
    rewards, values = torch.randn(2, n, dtype=torch.float64)
    last, gamma, trace = torch.tensor(0.3, dtype=torch.float64), 0.9, 0.8
    running, ahead = 0.0, 0.3
    wanted = []
    for t in reversed(range(n)):
        after = float(values[t + 1]) if t + 1 < n else 0.3
        running = float(rewards[t]) + gamma * after - float(values[t]) + gamma * trace * running
        ahead = float(rewards[t]) + gamma * ahead
        wanted.insert(0, (running, ahead))
    got = torch.stack(gae(rewards, values, last, gamma=gamma, trace=trace), 1)
    same(got, torch.tensor(wanted, dtype=torch.float64), 1e-12)
    same(discounted(rewards, 0.0), rewards)


def test_learned_is_adam_with_its_norm_held() -> None:
    net, x = Layers(3, 5, 1).double(), torch.randn(8, 3, dtype=torch.float64)
    theirs = copy.deepcopy(net)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.1)
    ours = Learned(net, lr=0.1, max_norm=0.5).double()
    for _ in range(5):
        ours.descend(lambda: (ours(x) - 7.0).square().mean())  # pyright: ignore
        adam.zero_grad()
        (theirs(x) - 7.0).square().mean().backward()
        assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.5) > 0.5
        adam.step()
    for p, q in zip(ours.net.parameters(), theirs.parameters(), strict=True):
        same(p, q.detach(), 1e-5, 1e-7)  # torch's clipping adds 1e-6 to the norm
    assert not any(p.requires_grad for p in ours.parameters())


def test_draws_are_normal_and_a_function_of_place_and_key() -> None:
    place, key = torch.arange(1, 20001), torch.tensor(2**62 - 5)
    z = normals(place, key).double()
    assert abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1.0) < 0.03
    gap = (torch.special.ndtr(z.sort().values) - (place - 0.5) / len(z)).abs().max()
    assert float(gap) < 1.63 / math.sqrt(len(z))  # Kolmogorov and Smirnov at 1 %
    assert torch.equal(normals(place[:5], key), z[:5].float())
    other = normals(place, key + 1).double()
    for pair in ((z, other), (z[:-1], z[1:]), (z[:-1], other[1:])):
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 0.03


def test_redistribution_keeps_the_reward_and_the_predictor_s_loss_is_of_each_path() -> None:
    worth, reward = torch.randn(7, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    shares = redistributed(worth, reward)
    same(shares.sum(), 2.5)
    same(shares.diff(), worth.diff() / 7)
    returns, lengths = torch.tensor([1.0, 1, 1, -2, 3, 3, 3], dtype=torch.float64), torch.tensor([3, 1, 3])
    ends, firsts = [], []
    for part in worth.split([3, 1, 3]):
        target = float(returns[len(firsts)])
        firsts += [(float(part[: i + 1].mean()) - target) ** 2 for i in range(len(part))]
        ends.append(firsts[-1])
    same(prediction_loss(worth, returns, lengths), sum(ends) / 3 + 0.5 * sum(firsts) / 7)


# what it does


def test_draws_in_training_and_the_mean_in_eval() -> None:
    rows, policy = random_rows(64), Instance()
    generator = torch.get_rng_state()
    drawn, again = policy(rows), policy(rows)
    assert torch.equal(drawn.student, again.student) and torch.equal(drawn.student, drawn.teacher)
    policy.update(None)
    after = policy(rows)
    assert not torch.allclose(after.student, drawn.student) and torch.equal(torch.get_rng_state(), generator)
    torch.default_generator.manual_seed(5)
    assert not torch.allclose(policy(rows).student, after.student)
    policy.eval()
    mean = policy(rows)
    mu, _ = policy.agent.actor(observed(rows, torch.ones(64, dtype=torch.bool)))
    same(mean.student.squeeze(1), 10.0 * mu.sigmoid())
    assert torch.equal(Instance(seed=3).eval()(rows).student, Instance(seed=3).eval()(rows).student)
    assert not torch.equal(Instance(seed=3).eval()(rows).student, mean.student)
    assert not any(p.requires_grad for p in policy.parameters()) and KD(temperature=policy).param_groups() == []


def test_spans_are_the_epochs_that_twenty_divides() -> None:
    policy, steps = Instance(), 7  # steps an epoch
    spans = [1 + s // steps for s in range(240 * steps) if policy.improves((s + 1) / (240 * steps))]
    assert spans == [e for e in range(20, 241, 20) for _ in range(steps)]
    rows = random_rows(8)
    for progress in (0.01, 19 / 240):
        assert torch.equal(policy(rows, progress).student, torch.full((1, 1), 4.0, dtype=torch.float64))
    assert policy(rows, 19.5 / 240).student.shape == (8, 1)


@pytest.mark.parametrize("form", FORMS)
def test_improves_in_spans_alone(form: Any) -> None:
    policy = Instance(form=form)
    start = copy.deepcopy(policy.agent.state_dict())

    def step(progress: float, seed: int) -> bool:
        policy(random_rows(16, seed=seed), progress)
        wanted = policy.needs_reward
        policy.update(torch.randn(16, dtype=torch.float64) if wanted else None)
        return wanted

    assert not any(step(p, i) for i, p in enumerate((0.05, 18 / 240, 30 / 240)))
    assert all(torch.equal(v, start[k]) for k, v in policy.agent.state_dict().items())
    asked = [step(40 / 240, seed) for seed in range(4, 7)]
    assert asked == [form == "bandit"] * 3
    assert int(policy.report()["updates"]) == (2 if form == "ppo" else 3)
    moved = {
        k.split(".")[0]
        for k, v in policy.agent.state_dict().items()
        if v.shape != start[k].shape or v.ne(start[k]).any()
    }
    assert {"actor", "critic"} <= moved and (form == "bandit") != ("predictor" in moved)


def blocks(accuracies: list[float], n: int = 20) -> Iterator[Rows]:
    for seed, accuracy in enumerate(accuracies):
        rows = random_rows(n, 5, seed=seed, dtype=torch.float32)
        target = rows.student.argmax(1)
        target[round(n * accuracy) :] += 1
        yield rows.replace(target=target % 5)


@pytest.mark.parametrize(("form", "wanted"), [("ppo", [0.3, -0.5]), ("published", [0.2, 0.3, -0.5])])
def test_the_reward_is_how_much_the_accuracy_rose(form: Any, wanted: list[float]) -> None:
    policy = Instance(form=form)
    told: list[tuple[Path, float]] = []
    policy.agent.improve = lambda path, reward: told.append((path, float(reward)))  # pyright: ignore
    made = []
    for rows, progress in zip(blocks([0.2, 0.4, 0.7, 0.2, 0.9]), [0.12, *[40 / 240] * 3, 0.2], strict=True):
        made.append(policy(rows, progress).student.squeeze(1))
        policy.update(None)
    factors = [scale(p, policy.switches, policy.waves) for p in (40 / 240, 40 / 240, 40 / 240, 0.2)]
    if form == "ppo":  # the path of a step is paid by the next step's accuracy, also the last one of a span
        wanted = [*wanted, 0.7]
        factors = factors[1:]
    same(torch.tensor([r for _, r in told]), [f * r for f, r in zip(factors, wanted, strict=False)], 1e-5)
    for (path, _), T in zip(told, made[1:], strict=False):
        same(squashed(path.x, low=0.0, high=10.0), T, 1e-6)


@pytest.mark.parametrize("best", [3.0, 6.5])
def test_the_bandit_finds_the_best_temperature(best: float) -> None:
    policy = Instance(form="bandit", actor_lr=1e-3, **ALWAYS)
    rows = random_rows(64, dtype=torch.float32)
    for _ in range(60):
        policy.update(-(policy(rows, 0.5).student.squeeze(1) - best).square())
    assert abs(float(policy.eval()(rows, 0.5).student.mean()) - best) < 0.3
    assert float(policy.report()["deviation"]) < 0.3


def test_the_bandit_tells_contexts_apart() -> None:
    policy = Instance(form="bandit", actor_lr=1e-3, **ALWAYS)
    rows = random_rows(64, dtype=torch.float32)
    sure = torch.arange(64) % 2 == 0
    rows = rows.replace(teacher=torch.where(sure[:, None], 9.0, 0.01) * rows.teacher)
    best = torch.where(sure, 6.5, 3.5)
    for _ in range(100):
        policy.update(-(policy(rows, 0.5).student.squeeze(1) - best).square())
    T = policy.eval()(rows, 0.5).student.squeeze(1)
    assert float((T - best).abs().mean()) < 0.5, "PPO's bandit"


@pytest.mark.parametrize(("best", "seed"), [(3.5, 0), (6.5, 1)])
def test_ppo_finds_the_best_temperature_from_late_accuracies(best: float, seed: int) -> None:
    """The next batch's accuracy is all it is told: how near the temperatures of this one came to the best."""
    torch.default_generator.manual_seed(seed)
    policy = Instance(actor_lr=1e-3, switches=(0.0, 0.0, 0.0), **ALWAYS)
    accuracy, means = 0.5, []
    for step in range(160):
        (rows,) = blocks([accuracy], 32)
        T = policy(rows.replace(teacher=random_rows(32, 5, seed=step, dtype=torch.float32).teacher), 0.5).student
        policy.update(None)
        accuracy = min(max(1.0 - float((T - best).square().mean()) / 25.0, 0.0), 1.0)
        means.append(float(T.mean()))
    assert abs(means[0] - 5.0) < 0.7 and abs(sum(means[-60:]) / 60 - best) < 0.8


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_do_not_count(form: Any) -> None:
    rows = random_rows(12)
    weight = torch.tensor([1.0, 0.0] * 6)
    garbage = rows.student.clone()
    garbage[1::2] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0.0, 1.0, 2.0], dtype=torch.float64)
    assert rows.target is not None
    kept = rows.replace(student=rows.student[::2], teacher=rows.teacher[::2], target=rows.target[::2])
    ours, theirs = (Instance(form=form, **ALWAYS).double() for _ in range(2))
    for i in range(3):
        reward = torch.randn(12)
        reward[1::2] = torch.nan
        T = ours(rows.replace(student=garbage + i, weight=weight), 0.5).student
        same(T[::2], theirs(kept.replace(student=kept.student + i), 0.5).student)
        ours.update(reward)
        theirs.update(reward[::2])
    for name, value in theirs.state_dict().items():
        same(ours.state_dict()[name], value, 1e-7, 1e-9)
    assert int(ours.updates) >= 2


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from(form: Any) -> None:
    policy = Instance(form=form, **ALWAYS)
    rows = random_rows(6, dtype=torch.float32)
    policy.update(torch.zeros(6))  # no call before it
    before = copy.deepcopy(policy.agent.state_dict())
    empty = random_rows(0, dtype=torch.float32)
    for made in (
        empty,
        rows.replace(target=None),
        rows.replace(weight=torch.zeros(6)),
        rows.replace(target=-torch.ones(6).long()),
    ):
        policy(made, 0.5)
        policy.update(None if made.target is None else torch.ones(len(made)))
    assert all(torch.equal(v, before[k]) for k, v in policy.agent.state_dict().items())
    one = random_rows(1, 1, dtype=torch.float32)
    for _ in range(3):
        assert policy(one, 0.5).student.isfinite().all()
        policy.update(torch.ones(1))
    assert all(v.isfinite().all() for v in policy.agent.state_dict().values())
    if form == "bandit":
        policy(rows, 0.5)
        with pytest.raises(ValueError, match=r"needs the reward of each row of the last call, \(6,\); got \(5,\)"):
            policy.update(torch.zeros(5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "sac"}, r"needs form 'ppo', 'bandit' or 'published'; got 'sac'"),
        ({"low": 5.0, "high": 5.0}, r"needs 0 <= low < high; got low=5.0 and high=5.0"),
        ({"warmup": 20}, r"needs warmup in \[0, 1\], the share of the run .*; got 20"),
        ({"mix": 0.5}, r"needs mix in \[0, 0.2\]; got 0.5"),
        ({"span": 1.0}, r"0 < span <= period <= 1, fractions of the run .*got span=1.0"),
        ({"rounds": 0}, r"needs rounds >= 1, an integer; got 0"),
        ({"clip": -0.2}, r"needs clip > 0"),
        ({"switches": (0.5,)}, r"needs three switches and two waves > 0; got \(0.5,\)"),
    ],
)
def test_slips_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Instance(**options)


# its state, and runs


@pytest.mark.parametrize("form", FORMS)
def test_state_survives_in_the_middle_of_a_span(form: Any) -> None:
    def steps(policy: Instance, seeds: range) -> None:
        for seed in seeds:
            policy(random_rows(9 + seed % 3, 5, seed=seed, dtype=torch.float32), 0.5)
            policy.update(torch.linspace(-1.0, 1.0, 9 + seed % 3))

    whole, first, second = (Instance(form=form, **ALWAYS) for _ in range(3))
    steps(whole, range(6))
    steps(first, range(3))
    kept = {k: v.clone() for k, v in first.state_dict().items()}
    second.load_state_dict(kept)
    steps(second, range(3, 6))
    assert set(kept) == set(whole.state_dict()) and whole.updates > 3
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def digits(n: int = 96, classes: int = 4) -> Any:
    from tempering.data.batches import Batches

    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=g)
    images = torch.randint(80, (n, 1, 4, 4), generator=g)
    images += 40 * torch.eye(classes, dtype=torch.long)[labels][:, None, None, :]
    return Batches(images.to(torch.uint8), labels, batch_size=16, mean=(0.2,), std=(0.2,), shuffle=True, name="stripes")


def net(seed: int) -> nn.Module:
    torch.default_generator.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def run(policy: Instance, student: nn.Module, epochs: int, out: Folder | None = None, **more: Any) -> Any:
    method = KD(soft=0.5, hard=0.5, temperature=policy)
    return distill(
        student, net(1), digits(), method=method, epochs=epochs, out=out, selfcheck=False, quiet=True, **more
    )


SPANS: dict[str, Any] = {"warmup": 0.1, "period": 0.5, "span": 0.25}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_a_resumed_run_is_the_same_run(form: Any, mix: float, tmp_path: Folder) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, loss: Tensor) -> None:
        if step == 10:  # in a span: steps 7 to 12 of 24 are
            raise Stop

    def policy() -> Instance:
        return Instance(form=form, mix=mix, **SPANS)

    whole, ours = policy(), net(0)
    run(whole, ours, 4, tmp_path / "whole")
    with pytest.raises(Stop):
        run(policy(), net(0), 4, tmp_path / "cut", checkpoint_every=3, on_step=stop)
    resumed, theirs = policy(), net(0)
    run(resumed, theirs, 4, tmp_path / "cut", checkpoint_every=3)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert int(whole.updates) == 12 - (form == "ppo")  # the last path of the run is never paid
    assert (int(whole.times.sum()) > 0) == (mix > 0)


def test_the_student_runs_again_only_for_a_bandit_in_a_span() -> None:
    for form, calls in (("ppo", 24), ("published", 24), ("bandit", 24 + 2 * 12)):
        student = Counted(net(0))
        run(Instance(form=form, **SPANS), student, 4)  # pyright: ignore
        assert student.calls == calls, form


class Rewarded(AdaptivePolicy):
    """Keeps its rewards, and wants one after every step."""

    paper, tau = "none", 4.0

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[torch.Tensor] = []

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return Temperatures(constant(4.0, rows.student), constant(4.0, rows.student))

    def update(self, reward: torch.Tensor | None) -> None:
        assert reward is not None
        self.rewards.append(reward)


@each("part", [nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Identity()], ids=lambda m: type(m).__name__)
def test_the_reward_is_the_effect_of_the_step_alone(part: nn.Module) -> None:
    x = torch.randn(64, 6)
    batches = [(x[i : i + 16], x[i : i + 16, :4].argmax(1)) for i in range(0, 64, 16)]
    batches[0][1][:3] = torch.tensor([-100, -1, 2])
    for lr in (0.0, 0.1):
        student, policy = nn.Sequential(nn.Linear(6, 16), copy.deepcopy(part), nn.Linear(16, 4)), Rewarded()
        optimizer = partial(torch.optim.SGD, lr=lr)
        how = {"method": KD(temperature=policy), "optimizer": optimizer, "epochs": 1, "selfcheck": False, "quiet": True}
        distill(student, nn.Linear(6, 4), batches, **how)  # pyright: ignore[reportArgumentType]
        told = torch.stack(policy.rewards)
        assert bool((told == 0).all()) == (lr == 0.0) and not told[0, :2].any()


def test_the_self_check_passes_and_the_report_shows_mean_temperatures(tmp_path: Folder) -> None:
    batches, policy = digits(), Instance(**SPANS)
    teacher = net(1)
    distill(teacher, None, batches, method=__import__("tempering.methods").methods.Supervised(), epochs=8, quiet=True)
    method = KD(temperature=policy)
    done = distill(net(0), teacher, batches, method=method, epochs=2, test=batches.clean(), out=tmp_path, quiet=True)
    assert done.facts["selfcheck"]["line"].startswith("self-check ok")
    by = json.loads((tmp_path / "analysis.json").read_text())["temperatures"]["by_difficulty"]
    assert all(2.68 < bin["T_student"] < 7.32 for bin in by), "the mean action lies within 10 sigmoid(-1) and (1)"
    assert not policy.training


def test_samples_that_are_mixed() -> None:
    entropy, times = torch.arange(20.0, 0.0, -1.0) * 2.0, torch.full((20,), 2.0)  # sample 0 is ranked first
    mix = ranked(entropy, times, 0.1)
    changed = (mix.other != torch.arange(20)).nonzero().squeeze(1).tolist()
    assert changed == [16, 17] and mix.other[changed].tolist() == [2, 3]
    same(mix.share[changed], [1.0, 0.85], 1e-6)
    assert ranked(entropy, torch.cat((torch.zeros(1), times[1:])), 0.1).other.tolist()[0] == 0
    often = ranked(torch.ones(20) * torch.arange(1.0, 21.0), torch.arange(1.0, 21.0), 0.1)
    assert often.other[[3, 2]].tolist() == [17, 16], "of one mean entropy, the more often seen comes first"
    batches = digits()
    other = torch.arange(96)
    other[5] = 9
    share = torch.zeros(96)
    share[5] = 0.75
    for larger in (True, False):
        mixed = MixUpLoader(batches, lambda: Mix(other, share), larger=larger)
        assert len(mixed) == len(batches) and mixed.identity == batches.identity
        for (x, y, ids), (x0, y0, ids0) in zip(mixed, batches, strict=True):
            assert torch.equal(ids, ids0)
            here = ids == 5
            assert torch.equal(x[~here], x0[~here]) and torch.equal(y[~here], y0[~here])
            if here.any():
                nine = batches.gather(torch.tensor([9]))
                same(x[here], 0.75 * nine[0] + 0.25 * x0[here], 1e-6, 1e-6)
                assert torch.equal(y[here], nine[1] if larger else y0[here])
        assert copy.deepcopy(mixed).larger == larger and isinstance(mixed.to("cpu"), MixUpLoader)
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(MixUpLoader(batches, lambda: None, larger=True), batches, strict=True)
    )


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mixes images by their ids, and list cannot look them up. Use "):
        Instance(mix=0.1).wrap_batches([], None)

    class Answers:
        model = None

    with pytest.raises(ValueError, match=r"shows images that are in no cache, and Answers reads its outputs from one"):
        Instance(mix=0.1).wrap_batches(digits(), Answers())
    batches = [1, 2]
    assert Instance().wrap_batches(batches, None) is batches
