"""What came over from the teacher: agreement, gradients and representations, on pairs whose likeness is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tempering.audits.explanation import Explanation
from tempering.audits.similarity import agreement, cka, cka_interval, slopes
from tests.test_audits import Answers, by_name, sampled


def test_cka_is_one_up_to_rotation_and_scale_and_zero_of_the_unrelated() -> None:
    a = torch.randn(60, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    for unbiased in (True, False):
        assert cka(a, 3 * a @ turn + 5, unbiased=unbiased) == pytest.approx(1.0, abs=1e-9)
    wide = [cka(torch.randn(40, 400), torch.randn(40, 400)) for _ in range(30)]
    assert abs(sum(wide) / 30) < 0.03
    assert cka(torch.randn(40, 400), torch.randn(40, 400), unbiased=False) > 0.8  # why it is the unbiased one
    assert cka(a, torch.full((60, 3), 0.1)) == 0.0
    assert cka(a.float(), a.float().view(60, 2, 2, 2)) == pytest.approx(1.0)
    for other in (a[:50], a[:3]):
        with pytest.raises(ValueError, match="the same samples, 4 or more"):
            cka(a[:3] if len(other) == 3 else a, other)


def test_plain_cka_is_kornbliths_formula() -> None:
    a, b = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    a, b = a - a.mean(0), b - b.mean(0)
    want = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert cka(a, b, unbiased=False) == pytest.approx(float(want), abs=1e-12)


def test_the_interval_of_cka_covers() -> None:
    mix = torch.tensor([[1.0, 0.0, 0.5], [0.3, 1.0, 0.0]])
    generator = torch.Generator().manual_seed(0)

    def pair(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        a = torch.randn(n, 2, generator=generator)
        return a, a @ mix + 0.7 * torch.randn(n, 3, generator=generator)

    true, hits = cka(*pair(1500)), 0
    for _ in range(40):
        low, high = cka_interval(*pair(150))
        hits += low <= true <= high
    assert hits >= 34
    with pytest.raises(ValueError, match="8 samples or more; got 7"):
        cka_interval(*pair(7))


def test_input_gradients_are_compared_however_small_they_are() -> None:
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).requires_grad_(False)
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    g = slopes(net, x, y)
    assert g.shape == (30, 6) and not x.requires_grad
    torch.testing.assert_close(agreement(g, 1e-30 * g), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(agreement(g, -g), -torch.ones(30, dtype=torch.float64))
    assert (agreement(g, 0 * g) == 0).all()
    leaf = x[:1].clone().requires_grad_()
    nn.functional.cross_entropy(net(leaf), y[:1]).backward()
    torch.testing.assert_close(g[:1], leaf.grad)


def test_a_copy_agrees_in_everything_and_a_stranger_in_little() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    stranger = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(240, 6)
    y = torch.randint(4, (240,))
    audit = Explanation(layers={"hidden": ("1", "1")}, class_names=["ant", "bee", "cow", "dog"], classes=2, inside=120)
    same = by_name(audit(copy.deepcopy(net), net, [(x, y)]))
    other = by_name(audit(stranger, net, [(x, y)]))
    for name in ("agreement", "agreement_wrong", "gradient_cosine", "cka_hidden", "cka_logits"):
        assert same["both", name].value == pytest.approx(1.0, abs=1e-6), name
        assert other["both", name].high < 0.9, name
    assert same["both", "kl"].value == pytest.approx(0, abs=1e-9) and other["both", "kl"].low > 0
    assert same["both", "cka_hidden"].n == 120 and same["both", "agreement"].n == 240
    named = [f for (_, name), f in other.items() if name.startswith("agreement_class_")]
    assert len(named) == 2 and all(any(a in f.meaning for a in ("ant", "bee", "cow", "dog")) for f in named)
    assert sum(other["both", f"agreement_{p}"].n for p in ("hardest", "hard", "middling", "easy", "easiest")) == 240


def test_a_student_that_fails_where_the_teacher_is_unsure_is_seen_to() -> None:
    z, y = sampled(500)
    order = torch.argsort(z.softmax(-1).gather(1, y[:, None])[:, 0])
    sign = torch.ones(500, 1)
    sign[order[:100]] = -1  # the hardest fifth

    class Part(nn.Module):
        def __init__(self, loses: bool) -> None:
            super().__init__()
            self.loses = loses

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :5] * x[:, 5:] if self.loses else x[:, :5]

    found = by_name(Explanation()(Part(True), Part(False), [(torch.cat((z, sign), 1), y)]))
    assert found["both", "agreement_hardest"].value < 0.1 and found["both", "agreement_easiest"].value == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    z, y = sampled(20)
    with pytest.raises(ValueError, match="compares a student with its teacher, and there is none"):
        Explanation()(Answers(), None, [(z, y)])
    with pytest.raises(ValueError, match=r"has no module 'pool'\. Did you mean"):
        Explanation(layers={"pool": ("pool", "pool")})(Answers(), Answers(), [(z, y)])
    few = by_name(Explanation()(Answers(), Answers(2.0), [(z[:3], y[:3])]))
    assert few["both", "cka_logits"].value is None and few["both", "agreement"].value == 1.0
    right = by_name(Explanation()(Answers(), Answers(), [(z, z.argmax(-1))]))
    assert (
        right["both", "agreement_wrong"].value is None and "no such sample" in right["both", "agreement_wrong"].meaning
    )
    assert math.isfinite(right["both", "kl"].value)
