"""What the self-check sees of the whole run before it starts: labels, training mode, scored splits, the teacher."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    get_worker_info,
)

import tempering as kd
from tempering.data.batches import Batches
from tempering.methods import CSKD, DIST, DKD, DTKD, KD, FitNet, Method, Sum, Supervised
from tempering.rows import Rows
from tempering.tasks import Classification, LanguageModeling
from tempering.tasks.base import NothingToScoreError
from tempering.teachers import Live, Teacher
from tempering.teachers.selection import keep_top_k
from tempering.training.config import CHECKS, VERDICTS
from tempering.training.selfcheck import SelfCheckError, batch_of_one, last_batch_size, selfcheck
from tempering.training.teacher_check import (
    FALSE_ALARM,
    MISSED,
    Verdict,
    good_accuracy,
    judge,
    log_evidence,
    shared_verdict,
)
from tests.cases import each

C = 4
X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :C].argmax(1)


def net(norm: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, C))


class Knows(nn.Module):
    """A teacher that is right on a share of the rows, the first ones of every batch, and else off by one class."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share, self.scale = share, nn.Parameter(torch.tensor(6.0))

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, :C].clone()
        wrong = torch.arange(len(x)) >= round(self.share * len(x))
        return self.scale * torch.where(wrong[:, None], z.roll(1, 1), z)


def batches(y: Tensor = Y, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), y.split(size), strict=True))


def run(train: Any = None, *, teacher: Any = "knows", student: nn.Module | None = None, **more: Any) -> kd.Run:
    wanted = {"method": KD(), "epochs": 1, "quiet": True} | more
    return kd.distill(
        net() if student is None else student,
        Knows() if teacher == "knows" else teacher,
        batches() if train is None else train,
        **wanted,
    )


# labels


@each("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8], ids=str)
def test_labels_of_any_integer_type_train_and_score_alike(dtype: torch.dtype) -> None:
    scores = []
    for y in (Y, Y.to(dtype)):
        torch.manual_seed(0)
        done = run(batches(y), validation=batches(y), method=DKD())
        scores.append((done.last["validation"], torch.cat([p.flatten() for p in done.student.parameters()])))
    assert scores[0][0] == scores[1][0] and torch.equal(scores[0][1], scores[1][1])


@each("unlabeled", [-100, -1])
def test_rows_without_a_label_are_left_out_of_every_score(unlabeled: int) -> None:
    half = torch.where(torch.arange(48) % 2 == 0, Y, unlabeled)
    task, student = Classification(), Knows(0.5)
    teacher = Live(Knows())
    got = task.score(student, [(X, half)], teacher=teacher)
    outside = task.score(Knows(0.5), [(X[::2], Y[::2])], teacher=teacher)
    assert got["accuracy"] == outside["accuracy"] == 0.5 and got["ece"] == pytest.approx(outside["ece"], abs=1e-6)
    assert got["agreement"] == 0.5 and got["loss"] == pytest.approx(outside["loss"], abs=1e-6)
    analysis = task.analyze(student, [(X, half)], teacher=teacher, temperatures=KD().temperature)
    assert analysis["accuracy"] == {"student": 0.5, "teacher": 1.0}
    assert sum(b["count"] for b in analysis["reliability"]["student"]) == 24
    done = run(batches(half), validation=batches(half))
    assert "labels (8 of 16 rows have none: learned from the teacher)" in done.facts["selfcheck"]["line"]


@each("y", [Y - 2 * (Y == 0), torch.full_like(Y, -7)], ids=lambda y: str(int(y.min())))
def test_another_negative_label_is_refused_in_training_and_in_scores(y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"class indices from 0 on; got -\d. Only -100 and -1 mean"):
        run(batches(y))
    with pytest.raises(ValueError, match=r"class indices from 0 on; got -\d. Only -100 and -1 mean"):
        run(validation=batches(y))


def test_labels_of_minus_one_are_no_rows_of_a_language_model() -> None:
    tokens = torch.arange(8).view(1, 8)
    for unlabeled in (-100, -1):
        labels = tokens.where(tokens > 3, torch.tensor(unlabeled))
        batch = {"input_ids": tokens, "labels": labels}
        assert float(LanguageModeling().row_weights(batch)["logits"]) == 4.0
    assert (
        float(LanguageModeling().row_weights({"input_ids": tokens, "labels": tokens.to(torch.uint8) + 152})["logits"])
        == 7
    )


# whether anything can be learned

NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "no label": ({"train": batches(torch.full_like(Y, -100)), "method": Supervised()}, "no row has a label"),
    "no label, hard only": ({"train": batches(torch.full_like(Y, -1)), "method": KD(soft=0.0)}, "no row has a label"),
    "no weight in the method": ({"method": KD(soft=0.0, hard=0.0)}, "all terms have weight 0"),
    "no row": ({"train": [(X[:0], Y[:0])]}, "the batch has no rows"),
}


@each("name", list(NOTHING))
def test_a_run_without_anything_to_learn_is_refused(name: str) -> None:
    options, reason = NOTHING[name]
    with pytest.raises(SelfCheckError, match=f"(?i)nothing can be learned here: .* is 0 on the first .*{reason}"):
        run(**options)


def test_one_class_is_refused_with_the_form_that_serves() -> None:
    one = [(X[:16], Y[:16] * 0)]
    for options in ({}, {"selfcheck": False}):
        with pytest.raises(ValueError, match=r"one class, of which every divergence is 0.*tasks.Binary\(\)"):
            run(one, student=nn.Linear(6, 1), teacher=nn.Linear(6, 1), **options)

    class Bare(Classification):
        def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
            return [Rows(student, teacher, batch[1])]

    with pytest.raises(SelfCheckError, match=r"The logits have one class.*For regression, give the rows its loss"):
        selfcheck(nn.Linear(6, 1), Live(nn.Linear(6, 1)), one[0], method=KD(), task=Bare())


def test_a_later_batch_that_can_be_learned_from_is_enough_and_so_is_a_copy_of_the_teacher() -> None:
    unlabeled = (X[:16], torch.full_like(Y[:16], -100))
    assert "can learn" in run([unlabeled, *batches()], method=Supervised()).facts["selfcheck"]["line"]
    teacher = net(norm=False)
    student = net(norm=False)
    student.load_state_dict(teacher.state_dict())
    done = run(teacher=teacher, student=student, method=KD(hard=0.0), skip_checks=["above chance"])
    assert "can learn" in done.facts["selfcheck"]["line"]


def test_outputs_without_a_gradient_path_are_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach()

    with pytest.raises(SelfCheckError, match="no gradient path to its parameters"):
        run(student=Detached())


# training mode


class Again:
    """A loader that tells nothing but its batches."""

    def __init__(self, batches: list[Any]) -> None:
        self.stored = batches

    def __len__(self) -> int:
        return len(self.stored)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stored)


def test_batch_norm_with_a_batch_of_one_is_refused_unless_it_is_frozen() -> None:
    with pytest.raises(SelfCheckError, match=r"the first batch has one sample, .*drop_last=True"):
        run(batches(size=1), skip_checks=["above chance"])
    loader = DataLoader(TensorDataset(X[:33], Y[:33]), batch_size=16)
    images = Batches(torch.randint(256, (33, 1, 2, 3), dtype=torch.uint8), Y[:33], mean=[0.5], std=[0.5], batch_size=16)
    assert last_batch_size(loader) == last_batch_size(images) == 1
    assert last_batch_size(images._replace(drop_last=True)) is None, "all of its batches are full"
    with pytest.raises(SelfCheckError, match="the last batch of an epoch has one sample"):
        run(loader)
    flat = nn.Sequential(nn.Flatten(), net())
    with pytest.raises(SelfCheckError, match="the last batch of an epoch has one sample"):
        run(images, student=flat, teacher=None, method=Supervised())
    data = TensorDataset(X[:33], Y[:33])
    sampled = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 16, drop_last=False))
    with pytest.raises(SelfCheckError, match="the last batch of an epoch has one sample"):
        run(sampled)
    stored = [(X[:16], Y[:16]), (X[:1], Y[:1]), (X[:16], Y[:16])]
    for known in (stored, tuple(stored), DataLoader(data, batch_sampler=[[*range(16)], [1], [2, 3]])):
        with pytest.raises(SelfCheckError, match=r"batch 2 of 3 of an epoch has one sample, .*drop_last=True"):
            run(known)
    with pytest.raises(ValueError, match=r"the batch of step 2 has one sample, .*drop_last=True"):
        run(Again(stored))
    run(DataLoader(data, batch_size=16, drop_last=True))
    assert batch_of_one([{"ids": [1]}]) is None
    run(loader, student=net(norm=False))


def test_the_forward_in_training_mode_leaves_no_trace() -> None:
    student = net()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    random, rows = torch.get_rng_state(), (X, Y)
    selfcheck(student, Live(Knows()), rows, method=KD(), task=Classification())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


# scored splits


class Keyed(Classification):
    """Batches are mappings; the score reads another key than training does."""

    def __init__(self, *, broken: str) -> None:
        super().__init__()
        self.broken = broken

    def score(self, student: nn.Module, batches: Any, *, teacher: Any = None) -> dict[str, float]:
        if self.broken == "score":
            raise KeyError("label")
        return super().score(student, batches, teacher=teacher) if self.broken != "headline" else {"other": 1.0}

    def analyze(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.broken == "analyze":
            raise KeyError("analysis")
        return {}


@each("broken, error", [("score", KeyError), ("analyze", KeyError), ("headline", SelfCheckError)])
def test_a_split_that_cannot_be_scored_is_found_before_training(broken: str, error: type[Exception]) -> None:
    steps: list[int] = []
    with pytest.raises(error):
        run(validation=batches(), task=Keyed(broken=broken), on_step=lambda step, loss: steps.append(step))
    assert not steps


def test_a_split_with_nothing_to_score_is_refused_and_one_with_a_later_batch_is_not() -> None:
    none = torch.full_like(Y, -100)
    for split, empty in (("validation", batches(none)), ("test", [])):
        with pytest.raises(NothingToScoreError, match=f"the {split} split: there is nothing to score"):
            run(**{split: empty})  # pyright: ignore[reportArgumentType]
    later = torch.where(torch.arange(48) < 32, -100, Y)
    done = run(validation=batches(later))
    assert done.last["validation"]["accuracy"] >= 0.0 and done.facts["selfcheck"]["checks"]["scores"] == "ok"


def test_scoring_once_more_changes_no_number() -> None:
    def scored(**more: Any) -> Any:
        torch.manual_seed(0)
        held = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
        return run(validation=held, test=batches(), **more).last

    assert scored() == scored(skip_checks=["scores", "training mode"])


# checks turned off


def test_single_checks_are_turned_off_by_name(tmp_path: Path) -> None:
    wrong = batches((Y + 1) % C)
    done = run(wrong, skip_checks=["above chance"], out=tmp_path)
    assert done.facts["selfcheck"]["checks"]["above chance"] == "turned off"
    assert "above chance (turned off)" in done.facts["selfcheck"]["line"]
    for name in CHECKS:
        run(skip_checks=(name,), validation=batches())
    with pytest.raises(
        ValueError, match=r"'chance' is no check of the self-check, to be turned off: row weights, method, "
    ):
        run(skip_checks=["chance"])


# the teacher against a guess


def outcomes(accuracy: float, classes: int, batch: int, *, runs: int, most: int = 100) -> tuple[float, float]:
    """The shares of simulated runs in which a teacher of this accuracy is refused and accepted."""
    size = torch.full((runs, most), float(batch))
    rows = size.cumsum(1)
    correct = torch.binomial(size, torch.full_like(size, float(accuracy))).cumsum(1)
    no_good, no_guess = log_evidence(correct, rows, classes)
    first = [
        torch.where(hit.any(1), hit.int().argmax(1), most)
        for hit in (no_good >= -math.log(FALSE_ALARM), no_guess >= -math.log(MISSED))
    ]
    return float((first[0] < first[1]).double().mean()), float(
        ((first[1] <= first[0]) & (first[1] < most)).double().mean()
    )


@each(
    "classes, batch, accuracy",
    [
        (2, 16, 0.8),
        (64, 8, 0.295),
        (2, 64, None),
        (10, 32, None),
        (100, 64, None),
        (1000, 256, None),
        (50_000, 1024, None),
    ],
)
def test_good_teachers_are_refused_in_under_one_of_1000_runs(classes: int, batch: int, accuracy: float | None) -> None:
    """Also the worst that count as good; of those of the two situations that were reported, all are accepted."""
    refused, accepted = outcomes(accuracy or good_accuracy(classes), classes, batch, runs=4000, most=30)
    assert refused < 1e-3 and (accuracy is None or accepted > 0.999)


@each("classes, batch, most", [(2, 64, 100), (10, 64, 100), (100, 64, 100), (50_000, 1024, 30)])
def test_teachers_that_guess_are_accepted_in_under_one_of_20_runs(classes: int, batch: int, most: int) -> None:
    refused, accepted = outcomes(1 / classes, classes, batch, runs=1000, most=most)
    assert accepted < 0.05 and refused > 0.9
    refused, accepted = outcomes(0.0, classes, batch, runs=1, most=100)
    assert refused == 1.0


def test_more_batches_are_taken_until_it_is_sure() -> None:
    def rows(correct: int, n: int, classes: int = 2) -> tuple[Rows, Tensor]:
        target = torch.zeros(n, dtype=torch.long)
        return Rows(torch.zeros(n, classes), torch.zeros(n, classes), target), (torch.arange(n) >= correct).long()

    taken: list[int] = []

    def counted(correct: int) -> Iterator[tuple[Rows, Tensor]]:
        for i in range(50):
            taken.append(i)
            yield rows(correct, 16)

    assert judge(counted(13)) == Verdict("good", 26, 32, 2, 2) and taken == [0, 1]
    assert judge(counted(3)).result == "guess"
    few = judge([rows(5, 8)])
    assert few == Verdict("open", 5, 8, 2, 1) and not few.is_likely_good


def test_a_teacher_on_too_few_rows_to_be_sure_is_warned_of_and_not_refused() -> None:
    y = torch.where(torch.arange(16) < 4, Y[:16], (Y[:16] + 1) % C)
    with pytest.warns(UserWarning, match="the teacher may be no better than a guess: it is right on 4 of 16 rows"):
        done = run([(X[:16], y)])
    assert "above chance (only 16 labeled rows of 4 classes)" in done.facts["selfcheck"]["line"]


def test_a_sparse_teacher_is_held_to_all_tokens_of_the_vocabulary() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(64, 64))

        def forward(self, batch: Any) -> Tensor:
            return self.table[batch["input_ids"]]

    class Sparse(Teacher):
        """Right on every 12th token: above chance among 64 tokens, below it among the 3 columns of its rows."""

        identity = "sparse"

        def __init__(self, every: int) -> None:
            self.every = every

        def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
            following = inputs["input_ids"].roll(-1, 1)
            right = torch.arange(following.numel()).view_as(following) % self.every == 0
            top = torch.where(right, following, (following + 9) % 64)
            return keep_top_k(6.0 * nn.functional.one_hot(top, 64).float(), 2)

    tokens = torch.randint(64, (8, 64))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    how: dict[str, Any] = {"method": KD(hard=0.0), "task": LanguageModeling()}
    assert "above chance" in selfcheck(Model(), Sparse(12), batch, **how).line.split(";")[0]
    with pytest.raises(SelfCheckError, match=r"right on \d of 504 rows, as a guess among 64 classes"):
        selfcheck(Model(), Sparse(10**6), {**batch, "input_ids": torch.cat((tokens[:, 1:], tokens[:, :1]), 1)}, **how)


def test_a_teacher_is_judged_once_in_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VERDICTS, str(tmp_path / "teachers"))
    calls: list[str] = []

    def decide(result: str) -> Verdict:
        calls.append(result)
        return Verdict(result, 3, 4, 5, 1)

    for result in ("good", "guess"):
        assert shared_verdict("a", lambda result=result: decide(result)) == Verdict("good", 3, 4, 5, 1)
    assert shared_verdict("b", lambda: decide("guess")).result == "guess" and calls == ["good", "guess"]
    run()
    (told,) = [p for p in (tmp_path / "teachers").glob("*.json") if json.loads(p.read_text())["rows"] > 4]
    told.write_text(json.dumps(Verdict("guess", 1, 48, C, 3)._asdict()))
    with pytest.raises(SelfCheckError, match="right on 1 of 48 rows, as a guess among 4"):
        run()


# the teacher's vocabulary


@each("tokens, extra, cut", [(72, 0.0, 0.11), (65, -20.0, None), (72, 3.0, 0.7)])
def test_probability_beyond_the_student_s_tokens_is_told_or_refused(
    tokens: int, extra: float, cut: float | None
) -> None:
    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.cat((torch.zeros(64), torch.full((width - 64,), extra))))

        def forward(self, batch: Any) -> Tensor:
            return self.z.expand(*batch["input_ids"].shape, -1)

    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    how: dict[str, Any] = {"method": KD(), "task": LanguageModeling(), "skip": ["above chance"]}
    models = Model(64), Live(Model(tokens))
    exact = (tokens - 64) * math.exp(extra) / (64 + (tokens - 64) * math.exp(extra))
    assert LanguageModeling().probability_cut(models[0](batch), models[1](batch, None), batch) == pytest.approx(exact)
    if cut is None:
        line = selfcheck(models[0], models[1], batch, **how).line
        assert f"vocabulary ({100 * exact:.2g} % of the teacher's probability is cut off)" in line
        return
    assert exact == pytest.approx(cut, abs=0.02)
    with pytest.raises(SelfCheckError, match=rf"{100 * exact:.1f} % of the teacher's probability is on classes"):
        selfcheck(models[0], models[1], batch, **how)
    how["skip"] = ["above chance", "vocabulary"]
    assert "vocabulary (turned off)" in selfcheck(*models, batch, **how).line


# a teacher without effect


@each(
    "method",
    [
        KD(soft=0.0, hard=1.0),
        DKD(target=0.0, non_target=0.0),
        DTKD(dynamic=0.0, soft=0.0),
        Sum(KD(soft=0.0), DIST(inter=0.0, intra=0.0, hard=0.0)),
    ],
)
def test_a_teacher_without_effect_is_told(method: Method) -> None:
    with pytest.warns(UserWarning, match=r"the teacher has no effect: .*Supervised\(\)"):
        line = run(batches(), method=method).facts["selfcheck"]["line"]
    assert "teacher effect (none)" in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batches(), method=method, skip_checks=["teacher effect"])


@each("method", [KD(hard=0.0), KD(soft=1e-6), DTKD(warmup=0.9), CSKD(), Sum(Supervised(), KD(hard=0.0))])
def test_a_teacher_with_a_small_or_later_effect_is_not_told_of(method: Method) -> None:
    assert "teacher effect" in selfcheck(net(), Live(Knows()), (X, Y), method=method, task=Classification()).line


@each("soft", [0.0, 1.0])
def test_a_teacher_of_features_without_effect_is_told(soft: float) -> None:
    task = Classification(features={"map": ("0", "0")})
    student, teacher = (
        nn.Sequential(nn.Conv2d(1, width, (1, 3)), nn.Flatten(), nn.Linear(4 * width, C)) for width in (2, 3)
    )
    options: dict[str, Any] = {"method": FitNet(feature=soft), "task": task, "skip_checks": ["above chance"]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run([(x[:, None, None], y) for x, y in batches()], student=student, teacher=teacher, **options)
    assert any("the teacher has no effect" in str(w.message) for w in told) == (not soft)


# workers of a loader


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    """All samples, or those of this worker."""

    def __init__(self, *, split: bool, shuffle: bool = False) -> None:
        self.split, self.shuffle = split, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(X)) if self.shuffle else range(len(X))
        samples = ((X[i], Y[i]) for i in order)
        info = get_worker_info()
        return (
            itertools.islice(samples, info.id, None, info.num_workers) if self.split and info is not None else samples
        )


@each(
    "workers, split, refused",
    [(2, False, True), (2, True, False), (1, False, False), (0, False, False)],
)
def test_workers_that_repeat_every_sample_are_refused(workers: int, split: bool, refused: bool) -> None:
    loader = DataLoader(Streamed(split=split), batch_size=8, num_workers=workers)
    if refused:
        with pytest.raises(
            SelfCheckError, match=rf"every sample would be learned {workers} times.*get_worker_info\(\)"
        ):
            run(loader, epochs=None, steps=1)
        run(loader, epochs=None, steps=1, skip_checks=["workers"])
    else:
        checks = run(loader, epochs=None, steps=1).facts["selfcheck"]["checks"]
        assert ("workers" in checks) == (workers > 1)
