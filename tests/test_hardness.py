"""Temperatures beside difficulty, Grad-CAM beside Grad-CAM, reliability before and after: planted cases and figures."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from tempering.audits import gradcam, hardness
from tempering.audits.calibration import Calibration, diagram, ece
from tempering.audits.explanation import Explanation
from tempering.audits.intervals import correlation
from tempering.reports import audit_figures
from tempering.reports.schema import DRAWN, misfit
from tempering.rows import Rows
from tempering.temperature import Sharpness, Static
from tempering.temperature.base import Policy, Temperatures
from tests.test_audits import Answers, by_name, sampled


class ByLoss(Policy):
    """A policy that softens the student's side by its loss: what an audit is to find."""

    paper = "none: a test's"
    tau = 2.0

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        assert progress == 1.0 and rows.target is not None
        T = 1 + nn.functional.cross_entropy(rows.student, rows.target, reduction="none")[:, None]
        return Temperatures(T, 1 / T)


class Blunt(nn.Module):
    """A student that saw less: it takes its classes for one another."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.3 * x.roll(1, 1)


def told(policy: Policy | None, n: int = 100) -> tuple[dict, Explanation, Tensor, Tensor]:
    z, y = sampled(n)
    audit = Explanation(policy=policy)
    found = by_name(audit(Blunt(), Answers(), [(z, y, torch.arange(n) + 1000)]))
    return found, audit, z, y


def test_a_policy_that_goes_by_the_loss_is_found_out() -> None:
    found, audit, z, y = told(ByLoss())
    assert found["student", "temperature_difficulty"].value == pytest.approx(1.0)
    assert found["teacher", "temperature_difficulty"].value == pytest.approx(-1.0)
    loss = nn.functional.cross_entropy(Blunt()(z), y, reduction="none")
    most = found["student", "temperature_highest"]
    assert most.value == pytest.approx(1 + float(loss.max()), rel=1e-5)
    assert f"id {1000 + int(loss.argmax())} (T" in most.meaning and most.meaning.count("id ") == 5
    assert f"id {1000 + int(loss.argmin())} (T" in found["student", "temperature_lowest"].meaning
    assert "ByLoss(), used in training" in found["student", "temperature_difficulty"].meaning
    parts = audit.report_data(Answers())["temperatures"]["by_difficulty"]
    assert [p["count"] for p in parts] == [20] * 5
    assert [p["T_student"] for p in parts] == sorted((p["T_student"] for p in parts), reverse=True)
    assert parts[0]["loss"] == pytest.approx(float(loss.sort(descending=True).values[:20].mean()), rel=1e-5)


def test_without_a_policy_it_is_sharpness_and_says_so() -> None:
    found, _, z, y = told(None)
    meaning = found["student", "temperature_difficulty"].meaning
    assert "Sharpness(tau=4, solve=exact" in meaning and "not used in training" in meaning
    T = Sharpness(4.0)(Rows(Blunt()(z), z, y))
    assert found["student", "temperature_lowest"].value == pytest.approx(float(T.student.min()), rel=1e-5)
    policy = Sharpness(4.0)
    hardness.hardness(policy, 0.5 * z.double(), z.double(), y)
    assert policy.last is None, "the run's own policy is left alone"


def test_a_constant_temperature_has_no_correlation() -> None:
    found, audit, _, _ = told(Static(3.0))
    one = found["student", "temperature_difficulty"]
    assert one.value is None and "the same for all samples" in one.meaning
    assert ("student", "temperature_highest") not in found
    assert {p["T_student"] for p in audit.report_data(Answers())["temperatures"]["by_difficulty"]} == {3.0}
    few = told(ByLoss(), n=3)[0]
    assert few["student", "temperature_difficulty"].value is None


def test_rank_correlation_is_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(6, (80,), generator=generator).double()
    b = a + 4 * torch.randn(80, generator=generator)
    got = correlation("r", "both", a, b, "meaning")
    assert got.value == pytest.approx(float(stats.spearmanr(a.numpy(), b.numpy()).statistic), abs=1e-12)
    assert got.low is not None and got.high is not None and got.low < got.value < got.high
    best = correlation("r", "both", b, b.exp(), "meaning")
    assert best.value == best.high == 1.0


def test_the_interval_of_a_rank_correlation_covers() -> None:
    generator = torch.Generator().manual_seed(0)
    true, hits = 6 / math.pi * math.asin(0.6 / 2), 0  # of a bivariate normal with correlation 0.6
    for _ in range(200):
        a, e = torch.randn(2, 60, generator=generator).double()
        found = correlation("r", "both", a, 0.6 * a + 0.8 * e, "meaning")
        hits += found.low <= true <= found.high  # pyright: ignore[reportOptionalOperand]
    assert 180 <= hits <= 199


# Grad-CAM


class Looks(nn.Module):
    """A convolution, and a head that looks at one half of the image alone."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.left = left
        with torch.no_grad():
            self.conv.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(x)[:, 0]
        half = seen[..., :4] if self.left else seen[..., 4:]
        said = half.square().sum((1, 2))
        return torch.stack((said, -said), 1)


def test_models_that_look_at_the_same_places_are_told_from_others() -> None:
    pytest.importorskip("captum")
    x, y = torch.rand(12, 1, 6, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(12, dtype=torch.long)
    # the class's gradient is spread evenly by Grad-CAM's mean, so the map is that of the activations
    left = gradcam.gradcam(Looks(True), "student", "conv", x, y)
    mean = 2 * x[..., :4].sum((1, 2, 3)) / 48
    torch.testing.assert_close(left, (mean[:, None, None] * x[:, 0]).double())
    same = gradcam.looks_alike({"student": Looks(True), "teacher": Looks(True)}, {}, x, y, batch=5)
    assert same.value == pytest.approx(1.0) and same.n == 12 and "at conv of the student" in same.meaning
    other = gradcam.looks_alike({"student": Looks(True), "teacher": Looks(False)}, {}, x, y + 1, batch=5)
    assert other.value == 0.0  # a class that all speaks against has a flat map


def test_maps_are_compared_place_by_place() -> None:
    a = torch.rand(5, 4, 4, dtype=torch.float64)
    want = torch.stack([torch.corrcoef(torch.stack((p.flatten(), q.flatten())))[0, 1] for p, q in zip(a, a.flip(1))])  # noqa: B905
    torch.testing.assert_close(gradcam.correlated(a, a.flip(1)), want)
    torch.testing.assert_close(gradcam.correlated(1e-20 * a, a), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(gradcam.correlated(a, 1 - a), -torch.ones(5, dtype=torch.float64))
    assert (gradcam.correlated(a, torch.full_like(a, 0.3)) == 0).all()
    fine = nn.functional.interpolate(a[:, None], size=(8, 8), mode="bilinear")[:, 0]
    assert (gradcam.correlated(a, fine) > 0.999).all()


def test_without_captum_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradcam, "find_spec", lambda name: None)
    x, y = torch.rand(4, 1, 6, 8), torch.zeros(4, dtype=torch.long)
    found = gradcam.looks_alike({"student": Looks(True), "teacher": Looks(True)}, {}, x, y, batch=5)
    assert found.value is None and 'pip install "tempering[explanation]"' in found.meaning


def test_what_has_no_maps_is_left_out() -> None:
    pytest.importorskip("captum")
    z, y = sampled(20)
    found = by_name(Explanation()(Answers(0.5), Answers(), [(z, y)]))
    assert found["both", "gradcam_correlation"].value is None
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=9, padding=1), nn.Flatten(), nn.Linear(2, 5))
    found = by_name(Explanation(layers={"conv": ("0", "0")})(copy.deepcopy(net), net, [(torch.rand(20, 1, 4, 4), y)]))
    one = found["both", "gradcam_correlation"]
    assert one.value is None and "with one position" in one.meaning


# calibration, and what is drawn


def test_the_diagram_is_what_the_error_is_made_of() -> None:
    z, y = sampled(400)
    z = 3 * z.double()
    bins = diagram(z, y, bins=10)
    assert sum(b["count"] for b in bins) == 400 and all(b["low"] < b["confidence"] <= b["high"] for b in bins)
    said = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 400
    confidence, predicted = z.softmax(-1).max(-1)
    assert said == pytest.approx(ece(confidence, predicted == y, bins=10), abs=1e-12)


def test_calibration_draws_both_models_before_and_after() -> None:
    z, y = sampled(400)
    audit = Calibration(draws=20)
    found = by_name(audit(Answers(3.0), Answers(), [(z, y)]))
    drawn = audit.report_data(Answers())["reliability"]
    assert drawn["temperature"]["student"] == found["student", "temperature"].value == pytest.approx(3.0, rel=0.3)
    for when, name in (("plain", "ece"), ("tempered", "ece_tempered")):
        for side in ("student", "teacher"):
            bins = drawn[when][side]
            said = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 200
            assert said == pytest.approx(found[side, name].value, abs=1e-9)
    figures = audit_figures.reliability({"reliability": drawn}, "a1", "r")
    assert [f.title for f in figures] == ["Reliability before scaling", "After the fitted temperature"]
    assert "student 3" in figures[1].caption or "student 2" in figures[1].caption
    assert all(f.svg.count("<g ") == 2 for f in figures)


def test_what_is_drawn_has_the_shape_that_records_are_held_to() -> None:
    audit = told(ByLoss())[1]
    drawn = audit.report_data(Answers())
    assert misfit(drawn, DRAWN) is None
    assert misfit({"temperatures": {"policy": "x", "by_difficulty": [{}]}}, DRAWN) is not None
    (figure,) = audit_figures.temperatures(drawn, "a1", "h")
    assert "hardest" in figure.svg and "ByLoss" in figure.caption
    assert not audit_figures.temperatures({}, "a1", "h") and not audit_figures.reliability({}, "a1", "r")
