"""Two views of a batch, the augmentations that make them, and the blended teacher that R2KD has beside them."""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.methods import KD, MLKD, R2KD
from tempering.rows import IGNORE_INDEX
from tempering.tasks.two_view import AutoAugment, CutMix, CutOut, MixUp, RandAugment, TwoView
from tempering.teachers import Live
from tempering.teachers.ensemble import Ensemble, prune, with_pruned
from tests.paths import SHARED, needs_shared

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def net(classes: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))


def batch(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4, torch.arange(n)


def doubled(x: Tensor) -> Tensor:
    return 2.0 * x


# the task


def test_two_blocks() -> None:
    task, (x, y, ids) = TwoView(doubled), batch()
    student_in, teacher_in, found = task.inputs((x, y, ids))
    assert student_in is teacher_in and found is not None and found.tolist() == [*range(6), *range(6)]
    assert torch.equal(student_in, torch.cat((x, 2 * x)))
    student, teacher = torch.randn(12, 4, requires_grad=True), torch.randn(12, 4)
    weak, strong = task.rows(student, teacher, (x, y, ids))
    assert (weak.name, strong.name) == ("weak", "strong")
    assert torch.equal(weak.student, student[:6]) and torch.equal(strong.student, student[6:])
    assert torch.equal(weak.teacher, teacher[:6]) and torch.equal(strong.teacher, teacher[6:])
    assert torch.equal(strong.target, y) and torch.equal(strong.ids, ids)
    assert task.row_weights((x, y, ids)) == {"weak": 6.0, "strong": 6.0}
    alone = task.rows(student, None, (x, y))
    assert torch.equal(alone[1].teacher, student[6:].detach()) and not alone[1].teacher.requires_grad
    kept = TwoView(doubled, labeled=False).rows(student, teacher, (x, y))
    assert torch.equal(kept[0].target, y) and (kept[1].target == IGNORE_INDEX).all()


def test_the_teacher_may_see_other_views() -> None:
    x, y, ids = batch()
    first = TwoView(doubled, teacher="first")
    student_in, teacher_in, found = first.inputs((x, y, ids))
    assert len(student_in) == 12 and teacher_in is x and found is ids
    student, teacher = torch.randn(12, 4), torch.randn(6, 4)
    blocks = first.rows(student, teacher, (x, y))
    assert all(torch.equal(rows.teacher, teacher) for rows in blocks)
    own = TwoView(doubled, teacher=lambda x: -x)
    assert torch.equal(own.inputs((x, y))[1], torch.cat((x, -x)))
    with pytest.raises(ValueError, match=r"returned 6 rows for two views of 6. A cached teacher has no outputs for"):
        TwoView(doubled).rows(student, teacher, (x, y))


def test_picked_rows_are_the_unsure_ones() -> None:
    x, y, _ = batch()
    task = TwoView(CutMix(), names=("clean", "augmented"), max_augmented=2)
    teacher = torch.randn(12, 4) * torch.arange(1.0, 13.0)[:, None]
    teacher[8:10] = torch.tensor([0.0, 0.1, 0.0, 0.0])
    clean, augmented = task.rows(torch.randn(12, 4), teacher, (x, y))
    assert clean.weight is None and augmented.weight is not None
    assert augmented.weight.tolist() == [0, 0, 1, 1, 0, 0]
    assert task.row_weights((x, y)) == {"clean": 6.0, "augmented": 2.0}
    assert TwoView(doubled, max_augmented=64).row_weights((x, y))["strong"] == 6.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TwoView(3), "needs a callable augment"),  # pyright: ignore
        (lambda: TwoView(doubled, names=("a", "a")), "two different names"),
        (lambda: TwoView(doubled, teacher="none"), "teacher 'same', 'first' or a callable; got 'none'"),  # pyright: ignore
        (lambda: TwoView(CutMix(), teacher="first"), "mixes images, so a teacher needs the same mixed images"),
        (lambda: TwoView(MixUp(), labeled=True), "mixes images, whose label is not one class"),
        (lambda: TwoView(doubled, max_augmented=0), "needs max_augmented >= 1"),
        (lambda: TwoView(lambda x: x[:2]).inputs(batch()), r"must keep the shape \(6, 3, 8, 8\); got \(2, 3, 8, 8\)"),
        (lambda: TwoView(doubled).inputs(([1], torch.tensor([0]))), "augments one tensor of inputs; got list"),
        (lambda: CutMix(0.0), "CutMix needs alpha > 0"),
        (lambda: RandAugment(mean=MEAN, std=(0.0, 1.0, 1.0)), "needs a mean and a std > 0 per channel"),
        (lambda: AutoAugment("mine", mean=MEAN, std=STD), "policy 'imagenet', 'cifar10' or 'svhn'; got 'mine'"),
    ],
)
def test_what_does_not_fit(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("task", "method"),
    [
        (TwoView(CutOut(4)), MLKD()),
        (TwoView(CutMix(), names=("clean", "augmented")), R2KD()),
        (TwoView(doubled, teacher="first", max_augmented=3), KD()),
    ],
    ids=["mlkd", "r2kd", "kd"],
)
def test_a_run(task: TwoView, method: Any, tmp_path: Any) -> None:
    model = net(seed=1).eval()
    x = batch(16)[0]
    batches = [(part, model(part).argmax(1)) for part in x.split(8)]
    teacher = with_pruned(model, amount=0.1)

    def run(out: Any) -> Any:
        optimizer = functools.partial(torch.optim.SGD, lr=0.01)
        return distill(
            net(seed=2),
            teacher,
            batches,
            method=method,
            task=task,
            optimizer=optimizer,
            steps=4,
            validation=batches,
            out=out,
            log_every=1,
            quiet=True,
        )

    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    assert 0.0 <= first.epochs[-1]["validation"]["accuracy"] <= 1.0
    assert all(torch.equal(a, b) for a, b in zip(first.student.parameters(), again.student.parameters(), strict=True))
    assert not torch.equal(first.student[0].weight, net(seed=2)[0].weight)  # pyright: ignore


# augmentations


def test_mixup_mixes_two() -> None:
    x = torch.eye(6).view(6, 1, 6, 1)
    mixed = MixUp(1.0)(x).view(6, 6)
    assert torch.allclose(mixed.sum(1), torch.ones(6)) and ((mixed > 0).sum(1) <= 2).all()
    own = mixed.diagonal()
    assert own.unique().numel() <= 2, "one share a batch"


def test_cutmix_pastes_a_rectangle() -> None:
    x = torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 3, 10, 12)
    for seed in range(20):
        torch.manual_seed(seed)
        changed = CutMix()(x) != x
        assert all(len(CutMix()(x)[i].unique()) <= 2 for i in range(8))
        for mask in changed[:, 0]:
            rows, columns = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & columns[None, :])
    assert torch.equal(x[:, 0, 0, 0], torch.arange(1.0, 9.0)), "the batch itself is left alone"


def test_cutout_cuts_each_image_its_own_square() -> None:
    x = torch.ones(16, 3, 10, 10)
    out = CutOut(4)(x)
    holes = (out[:, 0] == 0).flatten(1)
    assert ((holes.sum(1) >= 4) & (holes.sum(1) <= 16)).all() and len(holes.unique(dim=0)) > 4
    assert torch.equal(out[:, 0], out[:, 2])


@pytest.mark.parametrize("kind", [RandAugment, AutoAugment])
def test_learned_and_random_operations(kind: Any) -> None:
    pytest.importorskip("kornia", reason="needs kornia, the extra 'views'")
    augment = kind(mean=MEAN, std=STD)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    x = (torch.rand(4, 3, 16, 16) - mean) / std
    seen = []
    for seed in range(6):
        torch.manual_seed(seed)
        out = augment(x)
        torch.manual_seed(seed)
        assert torch.equal(augment(x), out) and out.shape == x.shape and out.dtype == torch.float32
        pixels = out * std + mean
        assert pixels.isfinite().all() and pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
        seen.append(float((out - x).abs().mean()))
    assert max(seen) > 0.05 and not augment.mixes
    assert augment(x.bfloat16()).isfinite().all()


def test_without_kornia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(ImportError, match=r"pip install 'tempering\[views\]'"):
        RandAugment(mean=MEAN, std=STD)


# the blended teacher


def test_blended() -> None:
    one, other = net(seed=1), net(seed=2)
    teacher = Ensemble([one, other], weights=[0.7, 0.3])
    x = batch()[0]
    answer = teacher(x, None)
    torch.testing.assert_close(answer, 0.7 * one(x) + 0.3 * other(x))
    assert not answer.requires_grad and teacher.model is one and teacher.incompatibility([]) is None
    assert teacher.to("cpu") is teacher
    assert (
        len(
            {
                Ensemble([a, b], weights=[s, 1 - s]).identity
                for a, b, s in ((one, other, 0.7), (other, one, 0.7), (one, other, 0.6))
            }
        )
        == 3
    )
    assert Ensemble([Live(one), other], weights=[0.7, 0.3]).identity == teacher.identity
    with pytest.raises(ValueError, match=r"a number >= 0 for each of the 2 teachers"):
        Ensemble([one, other], weights=[1.5, -0.5])
    with pytest.raises(
        ValueError, match=r"'0' \(Live\) returned \(6, 4\) torch.float32 and teacher '1' \(Live\) returned \(6, 5\)"
    ):
        Ensemble([one, net(5)])(x)


def test_pruned() -> None:
    model = net(seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = prune(model, amount=0.25)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(out.state_dict()) == set(before)
    for name in ("0.weight", "4.weight"):
        gone, old = out.state_dict()[name] == 0, before[name].abs()
        assert int(gone.sum()) == round(0.25 * gone.numel()) and float(old[gone].max()) < float(old[~gone].min())
    assert torch.equal(out.state_dict()["4.bias"], before["4.bias"])
    with pytest.raises(ValueError, match="no convolution or linear layer in ReLU"):
        prune(nn.ReLU())
    with pytest.raises(ValueError, match=r"needs amount in \[0, 1\)"):
        prune(model, amount=1.0)


@needs_shared
def test_pruned_as_released() -> None:
    with np.load(SHARED / "golden" / "r2kd.npz", allow_pickle=False) as stored:
        g = {k.removeprefix("prune__"): stored[k] for k in stored.files if k.startswith("prune__")}
    classes, inputs = g["before_3_weight"].shape
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(inputs, classes)).double()
    names = {"0.weight", "0.bias", "3.weight", "3.bias"}
    model.load_state_dict({name: torch.tensor(g[f"before_{name.replace('.', '_')}"]).double() for name in names})
    out, x = prune(model, amount=0.1), torch.tensor(g["x"]).double()
    for name in names:
        torch.testing.assert_close(out.state_dict()[name], torch.tensor(g[f"after_{name.replace('.', '_')}"]).double())
    for net_, key in ((model, "logits_full"), (out, "logits_pruned")):
        torch.testing.assert_close(net_(x).detach(), torch.tensor(g[key]), rtol=1e-9, atol=1e-11)
    assert int((out[0].weight == 0).sum()) == int(g["pruned_count_conv"])  # pyright: ignore
    blended = Ensemble([model, out], weights=[0.7, 0.3])(x)
    torch.testing.assert_close(blended, 0.7 * torch.tensor(g["logits_full"]) + 0.3 * torch.tensor(g["logits_pruned"]))
