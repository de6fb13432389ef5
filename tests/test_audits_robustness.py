"""Attacks, certificates and corruptions, on nets whose robustness is known by hand, and on ones that hide it."""

from __future__ import annotations

from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tempering.audits.attacks import Attacked, Pixels, autoattack, blind, fgsm, margin, pgd
from tempering.audits.corruptions import CORRUPTIONS, corrupt
from tempering.audits.robustness import Robustness
from tempering.audits.smoothing import ABSTAINS, certify
from tests.test_audits import by_name


class Linear(nn.Module):
    """Two classes (or more) by a linear map of the pixels round mid-gray: robust accuracy is known in closed form."""

    def __init__(self, classes: int = 2, size: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, size, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T


def images(n: int = 60, *, margin: float = 0.25, seed: int = 1) -> Tensor:
    """(n, 1, 4, 4), away from the edges of [0, 1] by a margin, so that no ball is cut."""
    drawn = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return margin + (1 - 2 * margin) * drawn


def distance(net: Linear, p: Tensor, norm: str) -> Tensor:
    """The smallest change that turns the answer of a linear net of two classes round."""
    gap = net.weight[0] - net.weight[1]
    return (net(p) @ torch.tensor([1.0, -1.0])).abs() / (gap.abs().sum() if norm == "linf" else gap.norm())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_on_a_linear_net_fool_exactly_where_they_can(norm: str) -> None:
    net, p = Linear(), images()
    y = net(p).argmax(-1)
    far = distance(net, p, norm).detach()
    eps = float(far.median())
    sure = (far - eps).abs() > 1e-3 * eps
    for attack in (partial(fgsm), partial(pgd, steps=10, restarts=2), partial(pgd, steps=10, losses=("margin",))):
        struck = attack(net, p, y, eps=eps, norm=norm)
        assert torch.equal(struck.fooled[sure], (far < eps)[sure])
        moved = (struck.images - p).flatten(1)
        length = moved.abs().max(1).values if norm == "linf" else moved.norm(dim=1)
        assert float(length.max()) <= eps * (1 + 1e-4)
        assert float(struck.images.min()) >= 0 and float(struck.images.max()) <= 1
        assert torch.equal(net(struck.images).argmax(-1) != y, struck.fooled)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("stop", [True, False])
def test_no_strength_is_clean_accuracy(norm: str, stop: bool) -> None:
    net, p = Linear(3), images()
    y = torch.arange(60) % 3
    wrong = net(p).argmax(-1) != y
    for attack in (fgsm, blind, partial(pgd, steps=3, restarts=2, stop=stop)):
        struck = attack(net, p, y, eps=0.0, norm=norm)
        assert torch.equal(struck.fooled, wrong) and torch.equal(struck.images, p)


def curved(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


def test_more_of_everything_never_helps_the_defender() -> None:
    net, p = curved().requires_grad_(False), images(120)
    y = net(p).argmax(-1)
    left = [float((~pgd(net, p, y, eps=eps, steps=10).fooled).double().mean()) for eps in (0.0, 0.02, 0.05, 0.1, 0.25)]
    assert left == sorted(left, reverse=True) and left[0] == 1.0 and left[-1] < 0.5
    kept = [~pgd(net, p, y, eps=0.06, steps=5, step=0.01, restarts=r).fooled for r in (1, 2, 4)]
    longer = ~pgd(net, p, y, eps=0.06, steps=20, step=0.01).fooled
    assert not (kept[1] & ~kept[0]).any() and not (kept[2] & ~kept[1]).any() and not (longer & ~kept[0]).any()
    assert torch.equal(pgd(net, p, y, eps=0.06).images, pgd(net, p, y, eps=0.06).images)
    # one that goes on does as much harm, and goes further
    first, on = pgd(net, p, y, eps=0.06), pgd(net, p, y, eps=0.06, stop=False)
    assert not (first.fooled & ~on.fooled).any()
    assert float(margin(net(on.images), y).mean()) > float(margin(net(first.images), y).mean())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eps": 1.5}, "eps in linf must be in \\[0, 1\\].*got eps=1.5"),
        ({"eps": -0.1}, "got eps=-0.1"),
        ({"p": images() * 3}, "starts at pixels in \\[0, 1\\] and stays there"),
        ({"p": images() * float("nan")}, "starts at pixels in"),
        ({"norm": "l1"}, 'norm must be "linf" or "l2"'),
        ({"steps": 0}, "steps and restarts >= 1"),
        ({"losses": ("hinge",)}, "losses of"),
    ],
)
def test_an_attack_that_would_leave_the_valid_range_is_refused(change: dict, said: str) -> None:
    how = {"p": images(), "eps": 0.1, "steps": 2} | change
    p = how.pop("p")
    with pytest.raises(ValueError, match=said):
        pgd(Linear(), p, torch.zeros(len(p)).long(), **how)


def test_inputs_of_another_normalization_are_refused() -> None:
    view = Pixels((0.5,), (0.25,))
    p = images()
    assert torch.allclose(view.pixels(view.inputs(p)), p, atol=1e-6)
    with pytest.raises(ValueError, match="Pass the mean and std that the loader normalizes with"):
        Robustness()(Linear(), None, [(view.inputs(p), torch.zeros(60).long())])
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\) of floats with 1 channels"):
        view.pixels(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="one value per channel, std > 0"):
        Pixels((0.5, 0.5), (0.0, 1.0))


def test_the_margin_finds_what_a_saturated_softmax_hides() -> None:
    net, p = Linear(), images()
    y = net(p).argmax(-1)
    eps = 1.5 * float(distance(net, p, "linf").detach().max())
    loud = lambda x: 1e4 * net(x)  # noqa: E731
    assert (~pgd(loud, p, y, eps=eps, losses=("ce",), steps=5).fooled).any()
    assert pgd(loud, p, y, eps=eps, steps=5, losses=("margin",)).fooled.all()
    assert pgd(loud, p, y, eps=eps, steps=5, restarts=2).fooled.all()


# certificates


def test_a_certificate_of_a_linear_net_is_below_the_true_radius_and_near_it() -> None:
    net, p = Linear(), images(10)
    predicted, radius = certify(net, p, sigma=0.5, votes=2000, picks=50)
    far = distance(net, p, "l2").double()
    kept = predicted != ABSTAINS
    assert torch.equal(predicted[kept], net(p).argmax(-1)[kept])
    # a linear net's smoothed radius is its distance; the most that 2000 votes can say is sigma Phi^-1(0.001^(1/2000))
    most = 0.5 * NormalDist().inv_cdf(0.001 ** (1 / 2000))
    assert (radius <= far + 1e-9).all() and kept.sum() > 5
    near = kept & (far < 0.8 * most)
    assert (radius[near] > 0.6 * far[near] - 0.05).all() and near.any()
    assert (radius[~kept] == 0).all()
    noisy, none = certify(lambda x: x.flatten(1)[:, :2] * 0 + torch.rand(len(x), 2), p[:3], sigma=0.5, votes=200)
    assert (noisy == ABSTAINS).all() and (none == 0).all()
    with pytest.raises(ValueError, match="sigma > 0 and alpha"):
        certify(net, p, sigma=0.0)


# corruptions


# three of them do not grow in plain distance, by CIFAR-C's own constants: tests/test_corruptions.py
@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic", "frost", "glass_blur"}))
def test_corruptions_grow_with_severity_and_stay_in_range(name: str) -> None:
    if name in ("pixelate", "jpeg"):
        pytest.importorskip("PIL")
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    p = nn.functional.interpolate(coarse, size=32, mode="bilinear").clamp(0, 1)
    p = (p * 255).round() / 255
    made = [corrupt(p, name, s) for s in (1, 3, 5)]
    moved = [float((m - p).abs().mean()) for m in made]
    # the first three discs of defocus_blur are one pixel, softened a little
    assert 0 < moved[0] < moved[1] < moved[2] < 0.3
    assert all(m.shape == p.shape and float(m.min()) >= 0 and float(m.max()) <= 1 for m in made)
    assert all(torch.allclose(m * 255, (m * 255).round(), atol=1e-3) for m in made)
    assert torch.equal(corrupt(p, name, 3), made[1])
    gray = corrupt(p[:, :1], name, 2)
    assert gray.shape == (4, 1, 32, 32)


def test_corruptions_have_cifar_cs_constants() -> None:
    p = torch.full((1, 3, 64, 64), 0.5)
    for severity, sigma in ((1, 0.04), (5, 0.10)):
        assert float(corrupt(p, "gaussian_noise", severity).std()) == pytest.approx(sigma, rel=0.05)
    hit = (corrupt(p, "impulse_noise", 5) - 0.5).abs() > 0.4
    assert float(hit.double().mean()) == pytest.approx(0.07, rel=0.1)
    assert float(corrupt(p, "shot_noise", 5).std()) == pytest.approx((0.5 / 50) ** 0.5, rel=0.05)
    assert float(corrupt(p, "brightness", 4).mean()) == pytest.approx(0.7, abs=0.004)
    black = torch.zeros(1, 3, 8, 8)
    assert float(corrupt(black, "brightness", 2).mean()) == pytest.approx(0.1, abs=0.004)
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 1, 64, 64)
    got = corrupt(ramp, "contrast", 2)
    assert float(got.std()) == pytest.approx(0.5 * float(ramp.std()), rel=0.02)
    with pytest.raises(ValueError, match="at 1 to 5; got 'fog' at 6"):
        corrupt(p, "fog", 6)


# the audit

SMALL = {"steps": 5, "samples": 60, "certified": 6, "votes": 100, "corruptions": ("brightness", "gaussian_noise")}


def test_the_audit_of_a_student_that_is_its_teacher() -> None:
    net, p = Linear(), images()
    y = net(p).argmax(-1)
    eps = float(distance(net, p, "linf").detach().median()) * 1.001
    found = by_name(Robustness(eps=eps, **SMALL)(net, net, [(p, y)]))
    assert found["student", "clean"].value == 1.0
    assert found["student", "pgd"].value == pytest.approx(0.5, abs=0.04) and found["student", "pgd"].low < 0.5
    assert found["both", "agreement_attacked"].value == 1.0 == found["both", "inherited"].value
    for check in ("more_steps", "one_step", "random", "black_box", "restarts"):
        assert found["student", f"check_{check}"].value == pytest.approx(0.0, abs=0.04), check
    assert found["student", "check_unbounded"].value == 0.0
    assert found["student", "certified_0.5"].value <= found["student", "certified_0"].value
    assert found["student", "corrupted"].n == 60 and net.weight.grad is None and net.weight.requires_grad
    alone = by_name(Robustness(eps=eps, **SMALL)(net, None, [(p, y)]))
    assert ("student", "check_black_box") not in alone and ("both", "inherited") not in alone


class Masked(nn.Module):
    """A net behind a staircase: as easily fooled, and with no gradient to say where."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 50).round() / 50 + 0 * x)


def test_masked_gradients_are_seen_through() -> None:
    net, p = Linear(), images()
    y = net(p).argmax(-1)
    eps = float(distance(net, p, "linf").detach().median())
    how = SMALL | {"certified": 0, "corruptions": ()}
    found = by_name(Robustness(eps=eps, **how)(Masked(net), net, [(p, y)]))
    assert found["student", "pgd"].value > 0.8  # feigned: the net behind it has 0.5
    assert found["student", "check_unbounded"].low > 0.2 and found["student", "check_black_box"].low > 0.1


def test_autoattack_never_finds_more_accuracy_than_pgd() -> None:
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    net, p = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).requires_grad_(False), images(3)
    y = net(p).argmax(-1)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    struck = pgd(net, p, y, eps=0.15)
    auto = autoattack(net, p, y, eps=0.15)
    assert torch.equal(state, torch.get_rng_state()) and (numbers == np.random.get_state()[1]).all()
    assert float((auto.images - p).abs().max()) <= 0.15 + 1e-6
    assert not (struck.fooled & ~auto.fooled).any() and auto.fooled.any()


def test_autoattack_adds_to_pgd_in_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    net, p = Linear(), images()
    y = net(p).argmax(-1)
    asked = []

    def half(answer: object, p: Tensor, y: Tensor, **how: object) -> Attacked:
        asked.append(len(p))
        return Attacked(p, torch.arange(len(p)) % 2 == 0)

    monkeypatch.setattr("tempering.audits.robustness.autoattack", half)
    eps = float(distance(net, p, "linf").detach().median())
    how = SMALL | {"certified": 0, "corruptions": (), "checks": False, "eps": eps, "auto": True}
    found = by_name(Robustness(**how)(net, None, [(p, y)]))
    kept = round(60 * found["student", "pgd"].value)
    assert asked == [kept] and found["student", "autoattack"].value == pytest.approx(kept // 2 / 60)
