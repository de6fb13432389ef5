"""Audits: what all of them keep to, and calibration on planted predictors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering.audits import AUDITS, Audit, Finding
from tempering.audits.base import labeled
from tempering.audits.calibration import Calibration, brier, ece, fit_temperature, noise
from tempering.audits.intervals import bootstrap, exact_lower, wilson
from tempering.teachers import Live


class Answers(nn.Module):
    """A model whose answers are its inputs, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.factor * x)


def sampled(n: int, classes: int = 5, *, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from their own softmax: a perfectly calibrated predictor."""
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, classes, generator=generator)
    return z, torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]


def by_name(found: Iterable[Finding]) -> dict[tuple[str, str], Finding]:
    out = {(f.of, f.name): f for f in found}
    for f in out.values():
        assert f.meaning and f.of in ("student", "teacher", "both")
        assert f.low is None or f.high is None or f.value is None or f.low <= f.value <= f.high, f
    return out


def test_every_audit_is_found() -> None:
    assert "Calibration" in AUDITS
    assert all(issubclass(audit, Audit) and audit.__doc__ for audit in AUDITS.values())


# what every audit keeps to


class Broken(Audit):
    """Stopped half way, as Ctrl-C does."""

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in models.values())
        raise KeyboardInterrupt


def test_models_are_put_back_also_where_it_is_interrupted() -> None:
    student, teacher = Answers(), Answers()
    student.dropout.eval()  # a module frozen on its own stays so
    with pytest.raises(KeyboardInterrupt):
        Broken()(student, teacher, [])
    assert student.training and not student.dropout.training and teacher.training
    assert student.factor.requires_grad and teacher.factor.requires_grad


def test_no_global_random_number_is_drawn_and_a_second_audit_finds_the_same() -> None:
    x, y = sampled(200)
    before = torch.get_rng_state()
    first = Calibration(draws=20)(Answers(), Answers(2.0), [(x, y)])
    assert torch.equal(before, torch.get_rng_state())
    assert first == Calibration(draws=20)(Answers(), Answers(2.0), list(zip(x.split(33), y.split(33), strict=True)))


def test_labeled_rows_alone_and_no_more_than_asked() -> None:
    y = torch.tensor([0, -100, 2, 1, -1, 2])
    x = torch.arange(6.0)[:, None]
    assert torch.equal(torch.cat([y for _, y in labeled([(x, y), (x, y)], 5)]), torch.tensor([0, 2, 1, 2, 0]))

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield x, y

    assert sum(len(y) for _, y in labeled(endless(), 9)) == 9


@pytest.mark.parametrize(
    ("student", "batches", "said"),
    [
        (Answers(), [], "no labeled row"),
        (Answers(), [(torch.randn(8, 3), torch.full((8,), -100))], "no labeled row"),
        (Answers(), [(torch.randn(8, 3), torch.full((8,), 3))], "a label 3, but the models have 3 classes"),
        (
            Answers(),
            [(torch.randn(8, 3), torch.zeros(8))],
            "a class index (N,) for each of 8 inputs; got torch.float32",
        ),
        (Answers(), [torch.randn(8, 3)], "an audit needs batches of (inputs, labels)"),
        (Answers(), [(torch.randn(8, 3, 2), torch.zeros(8).long())], "must return (N, C) logits for an audit"),
        (Answers(math.nan), [(torch.randn(8, 3), torch.zeros(8).long())], "logits that are not finite"),
        (Answers(), [(torch.randn(3, 3), torch.zeros(3).long())], "at least 4 rows; got 3"),
    ],
)
def test_what_cannot_be_audited_is_refused(student: nn.Module, batches: list[Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Calibration()(student, None, batches)
    assert said in str(caught.value)


def test_a_cache_or_another_number_of_classes_is_refused() -> None:
    x, y = sampled(8, 3)
    with pytest.raises(TypeError, match="pass the model itself"):
        Calibration()(Answers(), object(), [(x, y)])
    with pytest.raises(ValueError, match="the student 3 and the teacher 4"):
        Calibration()(Answers(), nn.Linear(3, 4), [(x, y)])
    with pytest.raises(ValueError, match=r"samples >= 1, or None for all; got 0"):
        Calibration(samples=0)(Answers(), None, [(x, y)])
    with pytest.raises(ValueError, match="must be a finite number"):
        Finding("ece", "student", math.inf, "...")
    assert len(Calibration(draws=5)(Answers(), Live(nn.Linear(3, 3)), [(x, y)])) == 18


# intervals


def test_intervals_cover() -> None:
    assert wilson(0, 0) == (0.0, 1.0) and wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == 1.0
    covered = sum(
        low <= 0.3 <= high for low, high in (wilson(int((torch.rand(200) < 0.3).sum()), 200) for _ in range(400))
    )
    assert 0.92 * 400 < covered < 0.98 * 400
    # (0.001)^(1/100): all of 100 hits, at Cohen et al.'s alpha
    assert exact_lower(100, 100, 0.001) == pytest.approx(0.001**0.01) and exact_lower(0, 100, 0.001) == 0.0
    values = torch.randn(400)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), 400, draws=300, seed=0)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.15)


# calibration


def test_ece_by_hand() -> None:
    confidence = torch.tensor([0.55, 0.58, 0.91, 0.95], dtype=torch.float64)
    right = torch.tensor([True, False, True, True])
    want = 0.5 * abs(0.565 - 0.5) + 0.5 * abs(0.93 - 1)
    assert ece(confidence, right, bins=10) == pytest.approx(want)
    assert ece(confidence, right, bins=2, adaptive=True) == pytest.approx(want)
    assert ece(confidence, right, bins=1) == pytest.approx(abs(0.7475 - 0.75))
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    assert brier(p, torch.tensor([1])).item() == pytest.approx(0.49 + 0.64 + 0.01)


def test_a_perfectly_calibrated_predictor_has_the_error_of_its_sampling_noise() -> None:
    over = 0
    for seed in range(20):
        z, y = sampled(2000, seed=seed)
        confidence, predicted = z.softmax(-1).max(-1)
        floor = noise(confidence, draws=40)
        got = ece(confidence, predicted == y)
        over += got > floor.high
        assert 0.4 * floor.mean < got < 2.5 * floor.mean
    assert over <= 4  # 1 is expected
    found = by_name(Calibration(draws=40)(Answers(), None, [sampled(4000)]))
    temperature = found["student", "temperature"]
    assert temperature.low < 1 < temperature.high and "not shown" in temperature.meaning
    assert "within it" in found["student", "ece"].meaning and found["student", "ece"].low < 0.01


def test_an_overconfident_predictor_is_found_and_one_temperature_mends_it() -> None:
    z, y = sampled(4000)
    found = by_name(Calibration(draws=40, temperatures={"student": 3.0, "teacher": 5.5})(Answers(3.0), None, [(z, y)]))
    T = found["student", "temperature"]
    assert T.low < 3 < T.high and T.high - T.low < 0.6 and "overconfident" in T.meaning
    assert "the student's logits at 3, the teacher's logits at 5.5" in T.meaning
    for name in ("ece", "ece_adaptive", "nll", "brier"):
        before, after = found["student", name], found["student", f"{name}_tempered"]
        assert after.high < before.low, name
    assert "above it" in found["student", "ece"].meaning and "within it" in found["student", "ece_tempered"].meaning


def test_the_fitted_temperature_minimizes_and_its_interval_covers() -> None:
    z, y = sampled(3000, scale=4.0)

    def nll(T: float) -> float:
        return float(nn.functional.cross_entropy(z.double() / T, y))

    best = fit_temperature(z, y).value
    assert nll(best) <= min(nll(best * 1.01), nll(best / 1.01))
    hits = 0
    for seed in range(100):
        z, y = sampled(300, seed=seed)
        fitted = fit_temperature(2.5 * z, y)
        assert fitted.low <= fitted.value <= fitted.high
        hits += fitted.low <= 2.5 <= fitted.high
    assert hits >= 90


def test_where_no_temperature_is_best_the_edge_is_named() -> None:
    z = 3.0 * torch.eye(4).repeat(3, 1)
    right = fit_temperature(z, z.argmax(-1))
    assert right.bound and right.value == pytest.approx(0.02, rel=1e-3)
    assert fit_temperature(z, z.argmin(-1)).bound
    found = by_name(Calibration(draws=5)(Answers(), None, [(z, z.argmax(-1))]))
    assert "at a bound" in found["student", "temperature"].meaning
    one = by_name(Calibration(draws=5)(Answers(), None, [(torch.randn(8, 1), torch.zeros(8).long())]))  # one class
    assert one["student", "ece"].value == 0.0
