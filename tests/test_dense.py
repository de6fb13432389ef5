"""Tasks of pixels, labels and numbers: what holds for all of them, and their plain definitions in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering import methods, teachers, temperature
from tempering.data import Batches, synthetic_masks, synthetic_shapes
from tempering.methods import AT, CWD, DKD, DTKD, KD, FitNet, RegressionKD, Sum, Supervised
from tempering.rows import Rows, binary_logits, total
from tempering.tasks import Binary, Classification, MultiLabel, Ordinal, Regression, Segmentation
from tempering.training.config import SelfCheckError
from tests.dense_runs import CASES, data, loss, pair, run
from tests.runs import cut, go, identical, left, stop_at

LOGITS = [name for name in CASES if name != "pixels and maps"]


def outputs(name: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The student's outputs, a leaf; the teacher's; and the batch."""
    batch, (student, teacher) = data(name), pair(name)
    with torch.no_grad():
        return student(batch[0]).requires_grad_(), teacher(batch[0]), batch


@pytest.mark.parametrize("name", LOGITS)
def test_loss_and_gradient_do_not_depend_on_split_or_order(name: str) -> None:
    s, t, batch = outputs(name)
    whole = loss(name, (s, t), batch)
    (slope,) = torch.autograd.grad(whole, s)
    assert slope.isfinite().all() and slope.abs().sum() > 0
    sizes, parts = (5, 1, 11, 7), torch.zeros((), dtype=torch.float64)
    for a, b, (x, y) in zip(s.split(sizes), t.split(sizes), cut(batch, *sizes), strict=True):
        parts = parts + loss(name, (a, b), (x, y), batch)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(parts, s)[0], slope, rtol=1e-10, atol=1e-12)
    order = torch.randperm(len(s), generator=torch.Generator().manual_seed(3))
    moved = loss(name, (s[order], t[order]), (batch[0][order], batch[1][order]))
    torch.testing.assert_close(moved, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(moved, s)[0], slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LOGITS if "taught" not in name])
def test_samples_without_labels_may_hold_nan(name: str) -> None:
    """The last sample has no label: padding, whatever is in it."""
    s, t, batch = outputs(name)
    without = loss(name, (s[:-1], t[:-1]), (batch[0][:-1], batch[1][:-1]))
    bad = torch.full_like(s[-1:], torch.nan), torch.full_like(t[-1:], torch.nan)
    leaf = torch.cat((s[:-1].detach(), bad[0])).requires_grad_()
    padded = loss(name, (leaf, torch.cat((t[:-1], bad[1]))), batch)
    torch.testing.assert_close(padded, without, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(padded, leaf)
    assert (slope[-1] == 0).all()
    torch.testing.assert_close(slope[:-1], torch.autograd.grad(without, s)[0][:-1], rtol=1e-10, atol=1e-12)
    only = loss(name, (s[-1:], t[-1:]), (batch[0][-1:], batch[1][-1:]))
    assert only.requires_grad and float(only.detach()) == 0.0


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_step_and_a_resumed_run(name: str, tmp_path: Path) -> None:
    """With the self-check, a batch of unequal parts has the weights of the whole one, and so has a run that stopped."""
    options: dict[str, Any] = {"test": [data(name)], "checkpoint_every": 1, "selfcheck": True, "steps": 4}
    skip = {"skip_checks": ("above chance",)}
    whole = run(name, tmp_path / "whole", **options, **skip)
    assert whole.last is not None and all(torch.isfinite(torch.tensor(list(whole.last["test"].values()))))
    metric = CASES[name].task().headline()[0]
    assert metric in whole.last["test"] and whole.facts["best_by"] == f"test/{metric}"
    with pytest.raises(KeyboardInterrupt):
        run(name, tmp_path / "stopped", **options, **skip, on_step=stop_at(1))
    run(name, tmp_path / "stopped", **options, **skip)
    assert identical(left(tmp_path / "whole"), left(tmp_path / "stopped"))
    parts = run(name, None, steps=2, accumulate=2, max_grad_norm=1e9)
    student, _ = pair(name)
    together = go(
        [data(name)], student=student, teacher=pair(name)[1], task=CASES[name].task(), method=CASES[name].method(),
        steps=2, precision="64-true", selfcheck=False,
    )  # fmt: skip
    for p, q in zip(parts.student.parameters(), together.student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


# plain definitions


def bernoulli(t: Tensor, s: Tensor) -> Tensor:
    p, q = t.sigmoid(), s.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_pairs_have_the_bernoulli_divergence_and_the_binary_cross_entropy() -> None:
    s, t, (x, y) = outputs("labels")
    known = y >= 0
    method = KD(soft=0.7, hard=0.3, temperature=3.0)
    (rows,) = MultiLabel().rows(s, t, (x, y))
    got = total(method(rows), rows)
    soft = 9.0 * bernoulli(t / 3.0, s / 3.0)[known].mean()
    want = 0.7 * soft + 0.3 * F.binary_cross_entropy_with_logits(s[known], y[known].double())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(value, s, retain_graph=True)[0] for value in (got, want)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-14)
    two = [torch.stack((torch.zeros_like(z[:, 0]), z[:, 0]), 1) for z in (s, t)]
    (zeros,) = Classification().rows(two[0], two[1], (x, y[:, 0]))
    (one,) = Binary().rows(s[:, 0], t[:, 0], (x, y[:, 0]))
    torch.testing.assert_close(method(zeros)["soft"], KD(soft=0.7, temperature=3.0)(one.replace(weight=None))["soft"])


def test_soft_labels_and_unlabeled_pairs_that_are_taught() -> None:
    s, t, (x, y) = outputs("soft labels")
    known = ~y.isnan()
    (rows,) = MultiLabel().rows(s, t, (x, y))
    want = F.binary_cross_entropy_with_logits(s[known], y[known])
    torch.testing.assert_close(total(Supervised()(rows), rows), want, rtol=1e-12, atol=1e-12)
    (rows,) = MultiLabel(unlabeled="teach").rows(s, t, (x, y))
    want = 0.1 * want * known.sum() / y.numel() + 0.9 * 16 * bernoulli(t / 4, s / 4).mean()
    torch.testing.assert_close(total(KD()(rows), rows), want, rtol=1e-12, atol=1e-12)


def test_sharpness_of_one_logit_is_its_size() -> None:
    """DTKD's temperatures give both sides the same |z| / T, so its dynamic term is 0 where both have one sign."""
    z, u = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    rows = Rows(binary_logits(z), binary_logits(u), (u > 0).long())
    T = temperature.Sharpness(4.0)(rows, 1.0)
    inside = (T.teacher - 4.0).abs().flatten() < 3.5
    ratio = (z.abs() / T.student.flatten(), u.abs() / T.teacher.flatten())
    torch.testing.assert_close(ratio[0][inside], ratio[1][inside], rtol=1e-6, atol=1e-6)
    dynamic = DTKD(warmup=0.0)(rows)["dynamic"]
    same = (z * u > 0) & inside
    assert same.sum() > 10 and dynamic[same].abs().max() < 1e-9 < dynamic[(z * u < 0) & inside].min()
    both = [DKD()(rows)[name] for name in ("target", "non_target")]
    torch.testing.assert_close(both[0], KD(soft=1.0)(rows)["soft"], rtol=1e-9, atol=1e-12)  # DKD is KD of two classes
    assert (both[1] == 0).all()


def test_numbers_have_squared_errors_bounds_and_gaussian_divergences() -> None:
    s, t, (x, y) = outputs("numbers")
    known = ~y.isnan()
    (rows,) = Regression().rows(s, t, (x, y))
    error, theirs = (side[known] - y[known] for side in (s, t))
    want = (0.5 * (s - t)[known].square() + 2.0 * error.square()).mean()
    torch.testing.assert_close(total(RegressionKD(soft=0.5, hard=2.0)(rows), rows), want, rtol=1e-12, atol=1e-12)
    worse = error.square() > theirs.square()
    assert 0 < worse.sum() < len(worse)
    got = total(RegressionKD(hard=0.0, bound=0.0)(rows), rows)
    want = (error.square() * worse).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(value, s, retain_graph=True)[0] for value in (got, want)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-14)
    s, t, (x, y) = outputs("gaussian")
    (rows,) = Regression(uncertainty=True).rows(s, t, (x, y))
    normal = [torch.distributions.Normal(z[:, :2], (z[:, 2:] / 2).exp()) for z in (t, s)]
    want = torch.distributions.kl_divergence(*normal)[known].mean()
    torch.testing.assert_close(total(RegressionKD(hard=0.0)(rows), rows), want, rtol=1e-10, atol=1e-12)
    want = F.gaussian_nll_loss(s[:, :2][known], y[known], s[:, 2:].exp()[known])
    torch.testing.assert_close(total(Supervised()(rows), rows), want, rtol=1e-10, atol=1e-12)


def test_ordered_classes_are_questions_of_above() -> None:
    s, t, (x, y) = outputs("ordinal")
    known = y >= 0
    (rows,) = Ordinal(3).rows(s, t, (x, y))
    wanted = (y[:, None] > torch.arange(3)).double()
    want = F.binary_cross_entropy_with_logits(s[known], wanted[known])
    torch.testing.assert_close(total(Supervised()(rows), rows), want, rtol=1e-12, atol=1e-12)
    scores = Ordinal(3).score(nn.Identity(), [(wanted * 2 - 1, y)])
    assert scores["accuracy"] == 1.0 and scores["mae"] == 0.0


def test_pixels_have_the_losses_of_torch() -> None:
    s, t, (x, y) = outputs("pixels")
    known, labels = y != 255, y.long()
    size = (8, 10)
    assert s.shape[2:] == (4, 5) and t.shape[2:] == size
    big = F.interpolate(s, size, mode="bilinear", align_corners=False)
    kl = F.kl_div((big / 2).log_softmax(1), (t / 2).softmax(1), reduction="none").sum(1)
    want = 0.9 * 4.0 * kl[known].mean() + 0.1 * F.cross_entropy(big, labels, ignore_index=255)
    for given in (s, {"out": s, "aux": s}, type("Output", (), {"logits": s})()):
        (rows,) = Segmentation().rows(given, t, (x, y))
        got = total(KD(temperature=2.0)(rows), rows)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    both = [torch.autograd.grad(value, s, retain_graph=True)[0] for value in (got, want)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-14)
    (rows,) = Segmentation(stride=3).rows(s, t, (x, y))
    want = F.cross_entropy(big[:, :, 1::3, 1::3], labels[:, 1::3, 1::3], ignore_index=255)
    torch.testing.assert_close(total(Supervised()(rows), rows), want, rtol=1e-12, atol=1e-12)


def test_miou_is_of_one_confusion_matrix() -> None:
    y = torch.randint(4, (6, 5, 5), generator=torch.Generator().manual_seed(0))
    y[0], y[1, 0] = 255, -100
    predicted = torch.where(torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.7, y.clamp(0, 3), 1)
    logits = 5.0 * F.one_hot(predicted, 5).permute(0, 3, 1, 2).double()  # class 4 does not occur
    known = (y >= 0) & (y < 4)
    each = [((predicted == c) & (y == c)).sum() / (((predicted == c) | (y == c)) & known).sum() for c in range(4)]
    got = Segmentation().score(nn.Identity(), [(logits[:2], y[:2]), (logits[2:], y[2:])])
    assert got["miou"] == pytest.approx(float(sum(each)) / 4, rel=1e-6)
    assert got["accuracy"] == pytest.approx(float((predicted == y)[known].double().mean()))
    want = F.cross_entropy(logits, torch.where(known, y, -100))
    assert got["loss"] == pytest.approx(float(want), rel=1e-6)


def test_features_of_images_are_beside_rows_of_pixels() -> None:
    """Each method over maps changes the student, and an image without pixels does not count."""
    task = Segmentation(features={"maps": ("0", "0")})
    for method in (AT, FitNet, CWD):
        runs = []
        for feature in (0.0, 5.0):
            made = Sum(KD(), method(hard=0.0, feature=feature, names=["maps"]))
            torch.manual_seed(3)
            more = {"task": task, "method": made, "skip_checks": ("above chance",)}
            runs.append(run("pixels", None, **more, selfcheck=feature > 0, steps=2).student)
        first, second = (next(iter(model.parameters())) for model in runs)
        assert (first - second).abs().max() > 1e-4, method.__name__


# refused before training


@pytest.mark.parametrize(
    ("case", "method", "reason"),
    [
        ("labels", methods.LSKD(), "LSKD does not suit tasks.MultiLabel: .*sees the sign alone"),
        ("binary", KD(temperature=temperature.Sharpness(4.0)), "KD does not suit tasks.Binary: .*methods.DTKD"),
        ("labels", KD(temperature=temperature.Standardized()), "KD does not suit .*the sign alone"),
        ("labels", Sum(KD(), methods.DIST(hard=0.0)), "DIST does not suit .*a pair of a sample and a label"),
        ("labels", methods.KDIGA(), "KDIGA does not suit .*runs the models itself"),
        ("numbers", KD(), "KD does not suit tasks.Regression: .*methods.RegressionKD"),
        ("numbers", Sum(RegressionKD(), DTKD(hard=0.0)), "DTKD does not suit"),
        ("pixels", methods.MLKD(), "MLKD does not suit tasks.Segmentation: .*N\\^2"),
    ],
)  # fmt: skip
def test_methods_without_a_meaning_are_refused_by_name(case: str, method: Any, reason: str) -> None:
    with pytest.raises(SelfCheckError, match=reason):
        run(case, None, method=method, selfcheck=True)


X = torch.zeros(4, 3)
MAPS = torch.zeros(4, 2, 6, 6)
Y = torch.zeros(4, 6, 6, dtype=torch.long)


@pytest.mark.parametrize(
    ("task", "student", "labels", "reason"),
    [
        (MultiLabel(), X, torch.zeros(4, dtype=torch.long), r"labels \(4,\).*tasks.Classification"),
        (MultiLabel(), X, torch.zeros(4, 2), "one shape"),
        (MultiLabel(), X, torch.full((4, 3), 2), "labels must be 0 or 1.*got 2 to 2"),
        (MultiLabel(), X, torch.full((4, 3), -0.5), "labels must be 0 or 1.*got -0.5"),
        (MultiLabel(), MAPS, torch.zeros(4, 3), "must return .N, C. logits for MultiLabel"),
        (Binary(), X, torch.zeros(4), "one logit per sample.*tasks.MultiLabel"),
        (Ordinal(2), X, torch.full((4,), 3), r"classes 0 to 2; got 3"),
        (Ordinal(3), X, torch.zeros(4), "Ordinal needs class indices"),
        (Regression(), X, torch.zeros(4), r"one number per label; the student returns \(4, 3\)"),
        (Regression(uncertainty=True), X, torch.zeros(4, 3), "a mean and a log variance per label"),
        (Segmentation(), MAPS, torch.zeros(4, 1, 6, 6, dtype=torch.long), r"labels.squeeze\(1\)"),
        (Segmentation(), MAPS, torch.zeros(4, 6, 6), "class indices of pixels.*tasks.Regression"),
        (Segmentation(), MAPS, torch.full((4, 6, 6), -7), "class indices from 0 on; got -7"),
        (Segmentation(), MAPS[:, :1], Y, "one class"),
        (Segmentation(), X, Y, r"must return \(N, C, H, W\) logits"),
        (Segmentation(), {"a": MAPS}, Y, "got dict with 'a'"),
    ],
)  # fmt: skip
def test_bad_batches_are_named(task: Any, student: Any, labels: Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        task.rows(student, None, (X, labels))


@pytest.mark.parametrize(
    "make",
    [lambda: Segmentation(stride=0), lambda: Segmentation(unlabeled="no"), lambda: MultiLabel(unlabeled="no"),  # type: ignore
     lambda: Ordinal(0), lambda: Regression(unlabeled="no"), lambda: RegressionKD(bound=-1.0)],  # type: ignore
)  # fmt: skip
def test_bad_options_are_named(make: Any) -> None:
    with pytest.raises(ValueError, match="needs"):
        make()


def test_a_label_out_of_range_and_other_classes_are_named_before_training() -> None:
    x, y = data("pixels")
    with pytest.raises(SelfCheckError, match="label 9 is out of range for 4 classes"):
        go([(x, torch.where(y == 0, 9, y))], student=pair("pixels")[0], teacher=None, task=Segmentation(), steps=1,
           method=Supervised(), precision="64-true")  # fmt: skip
    with pytest.raises(ValueError, match="Give both heads the same classes"):
        Segmentation().rows(torch.zeros(4, 3, 6, 6), torch.zeros(4, 2, 6, 6), (X, Y))


# cached teachers, and models of transformers


def images(labels: Tensor, **more: Any) -> Batches:
    x = (torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    return Batches(x, labels, batch_size=4, mean=(0.5,) * 3, std=(0.25,) * 3, **more)


def small(outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))


def test_a_cached_teacher_has_the_logits_of_one_label_too(tmp_path: Path) -> None:
    labels = torch.arange(12) % 2
    trained = []
    live = teachers.Live(small(1, 5))
    cache = teachers.record(live, images(labels), tmp_path / "cache", precision="fp32", quiet=True)
    for teacher in (live, cache):
        made = go(images(labels), student=small(1, 6), teacher=teacher, task=Binary(), steps=6, method=KD(),
                  skip_checks=("above chance",))  # fmt: skip
        trained.append(made.student.get_parameter("1.weight"))
    torch.testing.assert_close(*trained)


def test_models_of_transformers() -> None:
    """SegFormer's logits have a quarter of the labels' size; several labels, and one number, of BERT."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 1], "num_encoder_blocks": 2}
    more = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [1, 1]}
    config = hf.SegformerConfig(**sizes, **more, decoder_hidden_size=8, num_labels=3)
    torch.manual_seed(0)
    student, teacher = (hf.SegformerForSemanticSegmentation(config) for _ in "st")
    x = torch.randn(2, 3, 32, 32)
    y = torch.randint(3, (2, 32, 32))
    assert student(x).logits.shape == (2, 3, 8, 8)
    got = go([(x, y)], student=student, teacher=teacher, task=Segmentation(), steps=2, test=[(x, y)],
             skip_checks=("above chance",))  # fmt: skip
    assert got.last is not None and set(got.last["test"]) == {"miou", "accuracy", "loss", "agreement"}
    tiny = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    batch = {"input_ids": torch.randint(16, (4, 5)), "attention_mask": torch.ones(4, 5, dtype=torch.long)}
    for task, outputs, labels, method in (
        (MultiLabel(), 3, torch.tensor([[0.0, 1.0, 1.0]] * 4), KD()),
        (Binary(), 1, torch.tensor([0, 1, 0, 1]), KD()),
        (Regression(), 1, torch.randn(4), RegressionKD()),
    ):
        config = hf.BertConfig(**tiny, intermediate_size=8, num_labels=outputs)
        student, teacher = (hf.BertForSequenceClassification(config) for _ in "st")
        data = [{**batch, "labels": labels}]
        go(data, student=student, teacher=teacher, task=task, steps=2, test=data, method=method,
           skip_checks=("above chance",))  # fmt: skip


def test_masks_are_those_of_the_shapes() -> None:
    """Every shape's pixels are in its box, with its class inside and 255 at its edge; other pixels are background."""
    data = synthetic_masks(size=32, train=6, test=2, batch_size=6)
    shapes = synthetic_shapes(size=32, train=6, test=2, batch_size=6, flip=False)
    images, masks, ids = next(iter(data.train))
    assert images.shape == (6, 3, 32, 32) and masks.dtype == torch.uint8 and sorted(ids.tolist()) == list(range(6))
    found = next(iter(shapes.train.clean()))
    for number, picture, target in zip(found["ids"], found["images"], found["targets"], strict=True):
        at = int((ids == number).nonzero())
        mask, here = masks[at], torch.zeros(32, 32, dtype=torch.bool)
        torch.testing.assert_close(images[at], (picture * 255.0 - 128.0) / 64.0, atol=1e-4, rtol=0.0)
        for (x0, y0, x1, y1), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            box = (slice(int(y0), int(y1) + 1), slice(int(x0), int(x1) + 1))
            here[box] = True
            assert (mask[box] == label + 1).any() and (mask[box] == 255).any()
        assert (mask[~here] == 0).all()
    with pytest.raises(ValueError, match=r"synthetic_masks\(\) needs size >= 16"):
        synthetic_masks(size=8)


def test_numbers_of_unlabeled_samples_are_not_learned() -> None:
    """Labels of None are no numbers, and -100 is one."""
    task, x = Regression(), torch.randn(3, 1)
    (rows,) = task.rows(x, x + 1, (x, None))
    assert rows.weight is not None and rows.weight.tolist() == [0, 0, 0]
    (rows,) = task.rows(x, x + 1, (x, torch.tensor([-100, 0, 2])))
    assert rows.weight is not None and rows.weight.tolist() == [1, 1, 1]
