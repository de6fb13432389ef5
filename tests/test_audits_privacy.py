"""Membership inference on planted cases, its statistics by hand, and canary exposure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tempering.audits import exposure as canary
from tempering.audits.membership import confidence, found_at, lira, separation, separations_apart
from tempering.audits.privacy import Privacy
from tempering.audits.shadows import fresh, halves, shadow_confidence, train
from tests.cases import each
from tests.paths import SHARED, needs_shared
from tests.test_audits import by_name

# statistics


def test_separation_by_hand_and_its_interval_covers() -> None:
    members, others = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    # pairs won: 3 > 2, 3 > 0, 1 > 0, 2 > 0, and 2 = 2 counts half, of 6
    assert separation(members, others).auc == pytest.approx(4.5 / 6)
    true = 0.5 * (1 + math.erf(1 / math.sqrt(2) / math.sqrt(2)))  # of two normals one deviation apart
    hits = 0
    for _ in range(200):
        got = separation(torch.randn(60) + 1, torch.randn(80))
        hits += got.low <= true <= got.high
        assert 0 <= got.low <= got.auc <= got.high <= 1
    assert hits >= 180
    with pytest.raises(ValueError, match="members and others; got 0 and 2"):
        separation(members[:0], others)


def test_two_models_scores_of_the_same_samples_are_compared_in_pairs() -> None:
    own, other = torch.randn(200) + 0.5, torch.randn(200)
    noise = 0.01 * torch.randn(200)
    apart = separations_apart((own, other), (own + noise, other))
    alone = separation(own, other)
    assert apart.low <= apart.auc <= apart.high and apart.high - apart.low < 0.2 * (alone.high - alone.low)
    assert separations_apart((own, other), (own, other)) == (0.0, 0.0, 0.0)


def test_members_found_at_a_false_positive_rate() -> None:
    members, others = torch.tensor([9.0, 5.0, 3.0, 0.5]), torch.arange(10.0)
    assert found_at(members, others, 0.0).tolist() == [False] * 4  # 9 is not above 9
    assert found_at(members + 0.5, others, 0.0).tolist() == [True, False, False, False]
    assert found_at(members, others, 0.5).tolist() == [True, True, False, False]
    for rate in (0.0, 0.1, 0.35):
        assert float((others > others.sort(descending=True).values[int(rate * 10)]).double().mean()) <= rate
    with pytest.raises(ValueError, match=r"in \[0, 1\); got 1"):
        found_at(members, others, 1)


def test_confidence_is_the_log_odds_where_a_softmax_is_saturated_too() -> None:
    z, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 4
    p = z.softmax(-1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(confidence(z, y), torch.log(p / (1 - p)))
    assert confidence(torch.tensor([[1e4, 0.0]]), torch.tensor([0])).item() == 1e4
    with pytest.raises(ValueError, match="need two classes"):
        confidence(z[:, :1], y * 0)


def test_lira_by_hand() -> None:
    shadows = torch.tensor([[1.0, 9.0], [3.0, 5.0], [9.0, 7.0]], dtype=torch.float64)
    out = torch.tensor([[True, False], [True, True], [False, True]])
    # means 2 and 6, squared deviations 1 + 1 + 1 + 1 over 4 - 2 degrees of freedom
    got = lira(torch.tensor([4.0, 6.0], dtype=torch.float64), shadows, out)
    torch.testing.assert_close(got, torch.tensor([2 / 2**0.5, 0.0], dtype=torch.float64))
    for bad in (torch.zeros_like(out), torch.tensor([[True, True], [False, False], [False, False]])):
        with pytest.raises(ValueError, match="Train more shadows"):
            lira(torch.zeros(2), shadows, bad)


# planted cases


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 4))


@cache
def planted() -> tuple[Tensor, Tensor, nn.Module]:
    """400 points of labels half noise, and a net that learned the first 200 by heart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator)
    y = torch.where(
        torch.rand(400, generator=generator) < 0.5, x[:, :4].argmax(1), torch.randint(4, (400,), generator=generator)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net()
    train(model, x[:200], y[:200], epochs=30, lr=0.1, batch=32, seed=0)
    return x, y, model.eval()


def batches(part: slice) -> list[tuple[Tensor, Tensor]]:
    x, y, _ = planted()
    return [(x[part], y[part])]


def test_an_overfitted_student_is_found_and_a_fresh_one_is_not() -> None:
    _, _, student = planted()
    torch.manual_seed(1)
    found = by_name(Privacy(batches(slice(0, 200)))(student, net(), batches(slice(200, 400))))
    assert found["student", "loss_auc"].low > 0.7
    assert found["student", "accuracy_gap"].low > 0.2 and found["student", "loss_found"].n == 200
    fresh_one = found["teacher", "loss_auc"]
    assert fresh_one.low < 0.5 < fresh_one.high and abs(found["teacher", "accuracy_gap"].value) < 0.1
    assert found["both", "loss_auc_gap"].low > 0.1
    # a fresh net is guessed at, whatever its weights
    aucs = [
        by_name(Privacy(batches(slice(0, 200)))(net(), None, batches(slice(200, 400))))["student", "loss_auc"].value
        for _ in range(10)
    ]
    assert 0.45 < sum(aucs) / 10 < 0.55


def test_lira_beats_the_loss_where_samples_are_not_equally_hard() -> None:
    _, _, student = planted()
    before = torch.get_rng_state()
    audit = Privacy(batches(slice(0, 200)), shadows=8, epochs=25, lr=0.1, batch=32)
    found = by_name(audit(student, None, batches(slice(200, 400))))
    assert torch.equal(before, torch.get_rng_state())
    assert found["student", "lira_auc"].value > found["student", "loss_auc"].value > 0.7
    assert found["student", "lira_found"].value > found["student", "loss_found"].value
    torch.manual_seed(3)
    untrained = by_name(audit(net(), None, batches(slice(200, 400))))["student", "lira_auc"]
    assert 0.4 < untrained.value < 0.6


class Shuffled:
    """The batches of another order at every pass, as a DataLoader with shuffle=True."""

    def __init__(self, part: slice, dtype: torch.dtype = torch.int64) -> None:
        x, y, _ = planted()
        self.x, self.y = x[part], y[part].to(dtype)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y))
        return iter(list(zip(self.x[order].split(50), self.y[order].split(50), strict=True)))


@each("dtype", [torch.int64, torch.uint8], ids=str)
def test_a_shuffled_loader_reveals_as_much_as_one_in_order(dtype: torch.dtype) -> None:
    _, _, student = planted()
    how = {"shadows": 8, "epochs": 25, "lr": 0.1, "batch": 32}
    inside, outside = slice(0, 200), slice(200, 400)
    ordered = by_name(Privacy(batches(inside), **how)(student, None, batches(outside)))
    shuffled = by_name(Privacy(Shuffled(inside, dtype), **how)(student, None, Shuffled(outside, dtype)))
    for name in ("loss_auc", "accuracy_gap"):
        assert shuffled["student", name].value == pytest.approx(ordered["student", name].value)
    # the halves of the shadows are other samples, so the values are not equal to the last digit
    assert shuffled["student", "lira_auc"].value == pytest.approx(ordered["student", "lira_auc"].value, abs=0.03)


def test_shadows_leave_every_sample_out_by_half_and_are_not_the_student() -> None:
    taken = halves(11, 6, seed=0)
    assert (taken.sum(0) == 3).all() and torch.equal(taken, halves(11, 6, seed=0))
    x, y, student = planted()
    weights = [p.clone() for p in student.parameters()]
    drawn = fresh(student, 5)
    assert all(not torch.equal(a, b) for a, b in zip(drawn.parameters(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(fresh(student, 5).parameters(), drawn.parameters(), strict=True))
    said, out = shadow_confidence(student, x[:40], y[:40], count=2, epochs=1, lr=0.1, batch=8, seed=0)
    assert said.shape == out.shape == (2, 40) and torch.equal(out[0], ~out[1])
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), weights, strict=True))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"head \(Own\) has scale but no reset_parameters"):
        fresh(nn.ModuleDict({"head": Own()}), 0)


@pytest.mark.parametrize(
    "wrong", [{"shadows": 3}, {"shadows": 2}, {"shadows": -2}, {"rate": 0.0}, {"lr": 0.0}, {"epochs": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        Privacy([], **wrong)


# canary exposure


def test_exposure_by_hand() -> None:
    ppl = torch.tensor([5.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    at = torch.tensor([1, 2, 0])
    assert canary.rank(ppl, at).tolist() == [1, 2, 4] and canary.rank(ppl, at, ties="before").tolist() == [1, 3, 4]
    assert canary.exposure(ppl, at).tolist() == [2.0, 1.0, 0.0]
    assert canary.sampled_exposure(ppl[at], torch.tensor([3.0, 4.0, 6.0])).tolist() == pytest.approx(
        [2.0, 1.0, 2 - math.log2(3)]
    )
    with pytest.raises(ValueError, match="finite perplexities"):
        canary.rank(ppl / 0, at)
    with pytest.raises(ValueError, match='"after" or "before"'):
        canary.rank(ppl, at, ties="first")


def test_a_memorized_canary_is_fully_exposed_and_an_unseen_one_by_a_bit() -> None:
    ppl = torch.rand(4096, dtype=torch.float64)
    unseen = canary.exposure(ppl, torch.arange(4096))
    assert float(unseen.median()) == pytest.approx(1.0, abs=0.01)
    assert float(unseen.mean()) == pytest.approx(math.log2(math.e), abs=0.02)
    ppl[7] = -1.0
    assert canary.exposure(ppl, torch.tensor([7])).item() == 12.0
    assert canary.reduction(torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.0]))[0].item() == 75.0


def test_the_modelled_exposure_is_the_tails_beyond_what_sampling_can_count() -> None:
    pytest.importorskip("scipy")
    normal = torch.randn(4000, dtype=torch.float64) * 3 + 50
    at = torch.tensor([50.0, 44.0, 20.0, -40.0], dtype=torch.float64)
    got = canary.modeled_exposure(at, normal)
    want = -torch.special.log_ndtr((at - 50) / 3) / math.log(2)
    assert (got[:2] - want[:2]).abs().max() < 0.5 and (got - want).abs().max() < 0.35 * want.max()
    assert got[2] > math.log2(4001) and (got.diff() > 0).all() and torch.isfinite(got).all()
    assert canary.modeled_exposure(at, normal, upper_bound=20.0)[3].item() == 20.0
    # both estimates agree where both can be had
    sampled = canary.sampled_exposure(at[:2], normal)
    assert (sampled - got[:2]).abs().max() < 0.6
    # the tail's own integral takes over without a step
    shape = (-2.0, 1.0, 2.0)
    near = [canary._log_below(x, shape) for x in (-10.8, -10.6, -10.4, -10.2, -10.0)]
    steps = np.diff(near)
    assert (np.abs(np.diff(steps)) < 0.02).all() and (steps > 0).all()
    with pytest.raises(ValueError, match="20 or more alternatives"):
        canary.modeled_exposure(at, normal[:5])


@needs_shared
@pytest.mark.parametrize("part", ["shared", "heldout"])
def test_golden_exposure(part: str) -> None:
    folder = SHARED / "golden" / ("" if part == "shared" else "heldout")
    if not (folder / "exposure.npz").is_file():
        pytest.skip("the held-out numbers are not here")
    with np.load(folder / "exposure.npz", allow_pickle=False) as file:
        g = {key: file[key] for key in file}
    ppl, at = (torch.from_numpy(g[f"full__{key}"]) for key in ("perplexities", "canary_index"))
    assert canary.rank(ppl, at).tolist() == g["full__rank"].tolist()
    assert canary.rank(ppl, at, ties="before").tolist() == g["full__rank_pessimistic"].tolist()
    others = ppl[torch.from_numpy(g["sampled__alternatives"])]
    before, after = (torch.from_numpy(g[f"reduction__exposure_{x}"]) for x in "ab")
    pairs = {
        "full__exposure": canary.exposure(ppl, at),
        "full__exposure_pessimistic": canary.exposure(ppl, at, ties="before"),
        "sampled__exposure": canary.sampled_exposure(ppl[at], others),
        "reduction__perplexity_from_loglik": canary.perplexity(torch.from_numpy(g["reduction__token_log_likelihoods"])),
        "reduction__mean_a": before.mean(),
    }
    for key, got in pairs.items():
        torch.testing.assert_close(got, torch.from_numpy(np.asarray(g[key])), rtol=1e-9, atol=1e-9, msg=key)
    assert float(g["full__max_exposure"]) == pytest.approx(math.log2(json.loads(str(g["full__config"]))["R"]), abs=1e-9)
    fell = canary.reduction(before, after)
    assert torch.equal(fell.isnan(), before == 0)
    torch.testing.assert_close(fell[before > 0], (100 * (1 - after / before))[before > 0])
