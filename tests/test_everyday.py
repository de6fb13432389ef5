"""Everyday options of training: schedules, groups, EMA, smoothing, MixUp, class weights; they resume to the bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from tempering.data import Batches
from tempering.methods import DKD, DTKD, KD, Supervised
from tempering.models import build
from tempering.tasks.two_view import MixUp, TwoView
from tempering.training.balanced_sampling import balanced
from tempering.training.batch_changes import BatchChanges, soft_labels
from tempering.training.config import TrainConfig
from tempering.training.schedules import SCHEDULES, with_warmup
from tests.cases import each
from tests.runs import ADAMW, CLASSES, STEPS, Noisy, cut, go, identical, images, left, points, student_net, timeless


def lines(out: Path, name: str = "steps.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def pictures(n: int = 24, classes: int = 3, **more: Any) -> Batches:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=g)
    labels = torch.arange(n) % classes
    return Batches(pixels, labels, batch_size=8, mean=(0.5,), std=(0.25,), shuffle=True, **more)


def picture_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


# schedules and groups


@each(
    "name, torchs",
    [
        ("cosine", partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12)),
        ("linear", partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=12)),
        ("step", partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[4, 8])),
        ("constant", partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)),
    ],
)
def test_a_schedule_by_name_is_torchs(name: str, torchs: Callable[..., Any], tmp_path: Path) -> None:
    rates = []
    for schedule in (name, torchs):
        out = tmp_path / str(len(rates))
        go(cut(points(32), 8), steps=12, schedule=schedule, out=out, selfcheck=False)
        rates.append([line["lr"] for line in lines(out)])
    assert rates[0] == pytest.approx(rates[1], abs=1e-12)


def test_a_schedule_with_warm_up_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for name, steps, warm in (("cosine", 40, 5), ("linear", 30, 9)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=steps)
        ours = with_warmup(SCHEDULES[name], warm / steps)
        for i in range(steps):
            assert ours(i / steps) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
            optimizer.step()
            theirs.step()


def test_an_option_schedule_replaces_the_given_one_and_a_warm_up_takes_any_function(tmp_path: Path) -> None:
    run = {"steps": 10, "selfcheck": False, "schedule": lambda p: 2.0 if p < 0.5 else 1.0}
    go(cut(points(32), 8), out=tmp_path / "a", warmup=0.2, **run)
    assert [line["lr"] for line in lines(tmp_path / "a")] == pytest.approx(
        [0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]
    )
    with pytest.raises(ValueError, match=r"no schedule is called 'cosin'\. Did you mean .*cosine"):
        go(cut(points(32), 8), steps=3, schedule="cosin")
    with pytest.raises(ValueError, match=r"--warmup\) does not go with a scheduler of torch\. .*SequentialLR"):
        go(cut(points(32), 8), steps=3, warmup=0.1, schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=1))


@each("net", [lambda: student_net(norm=True), lambda: build("resnet8", classes=CLASSES)])
def test_norms_and_biases_are_not_decayed(net: Callable[[], nn.Module]) -> None:
    from tempering.training.optimizers import split_by_decay

    student = net()
    decayed, exempt = (group["params"] for group in split_by_decay(student, student))
    kinds = {id(p): type(m) for m in student.modules() for p in m.parameters(recurse=False)}
    assert {kinds[id(p)] for p in decayed} <= {nn.Linear, nn.Conv2d} and all(p.ndim > 1 for p in decayed)
    assert sum(map(len, (decayed, exempt))) == len(list(student.parameters()))
    try:
        from timm.optim import param_groups_weight_decay  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    theirs = {g["weight_decay"]: {id(p) for p in g["params"]} for g in param_groups_weight_decay(student, 0.1)}
    assert theirs == {0.0: {id(p) for p in exempt}, 0.1: {id(p) for p in decayed}}


def test_a_run_without_decay_of_norms_is_that_of_two_groups_by_hand() -> None:
    run = {"steps": 6, "selfcheck": False, "teacher": None, "method": Supervised()}
    by_flag, by_hand = student_net(norm=True), student_net(norm=True)
    go(
        cut(points(32), 8),
        student=by_flag,
        decay_norms=False,
        optimizer=partial(torch.optim.AdamW, lr=0.1, weight_decay=1.0),
        **run,
    )
    some = [p for p in by_hand.parameters() if p.ndim > 1], [p for p in by_hand.parameters() if p.ndim < 2]
    groups = [{"params": some[0], "weight_decay": 1.0}, {"params": some[1], "weight_decay": 0.0}]
    go(cut(points(32), 8), student=by_hand, optimizer=torch.optim.AdamW(groups, lr=0.1), **run)
    assert identical(by_flag.state_dict(), by_hand.state_dict())
    with pytest.raises(ValueError, match=r"--no-decay-norms\) sets weight_decay=0 .*this SGD decays them by 0.1"):
        go(
            cut(points(32), 8),
            student=by_hand,
            decay_norms=False,
            steps=1,
            optimizer=torch.optim.SGD(by_hand.parameters(), lr=0.1, weight_decay=0.1),
        )


# the average of the weights


@each("options", [{}, {"optimizer": ADAMW, "method": DTKD(), "accumulate": 2, "precision": "bf16-mixed"}])
def test_the_average_is_torchs_averaged_model_and_the_student_is_as_without(
    options: dict[str, Any], tmp_path: Path
) -> None:
    student, plain = student_net(norm=True), student_net(norm=True)
    by_hand: list[AveragedModel] = []

    def average(step: int, loss: Tensor) -> None:
        if not step:
            by_hand.append(AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True))
        by_hand[0].update_parameters(plain)

    more = {"epochs": 2, "selfcheck": False, "validation": cut(points(20, seed=9), 10)} | options
    run = go(cut(points(32), 8), student=student, ema=0.8, out=tmp_path / "ema", **more)
    without = go(cut(points(32), 8), student=plain, on_step=average, out=tmp_path / "plain", **more)
    assert identical(student.state_dict(), plain.state_dict()) and without.ema is None and run.ema is not None
    expected = by_hand[0].module.state_dict()
    assert identical(dict(run.ema.state_dict()), dict(expected))
    assert identical(
        dict(sorted(load_file(tmp_path / "ema" / "ema.safetensors").items())),
        dict(sorted(expected.items())),
    )
    assert not (tmp_path / "plain" / "ema.safetensors").exists()
    for line, other in zip(*(lines(tmp_path / name, "epochs.jsonl") for name in ("ema", "plain")), strict=True):
        assert "accuracy" in line.pop("validation_ema") and timeless(line) == timeless(other)
    if "precision" not in options:
        x, y = points(20, seed=9)
        loss = float(F.cross_entropy(run.ema.eval()(x), y))
        assert run.last["validation_ema"]["loss"] == pytest.approx(loss, rel=1e-5)
    again = go(cut(points(32), 8), student=student_net(norm=True), ema=0.8, out=tmp_path / "ema", **more)
    assert again.how == "finished" and again.ema is not None and identical(dict(again.ema.state_dict()), dict(expected))


# soft labels of mixed images, class weights, smoothing


@each("name", ["mixup", "cutmix"])
def test_mixed_labels_have_the_shares_of_the_mixed_images(name: str) -> None:
    """The images of a class have a channel of ones, so the means of a mixed image are its shares."""
    change = BatchChanges(replace(TrainConfig(epochs=1), **{name: 1.0}), 8)
    x, y = torch.zeros(8, 8, 6, 6), torch.arange(8)
    x[y, y] = 1.0  # a channel per class
    state = torch.random.get_rng_state()
    for number in range(4):
        mixed, labels, ids, weight = change((x, y, torch.arange(8)), 0, number)
        torch.testing.assert_close(labels, mixed.mean((2, 3)))
        assert ids is None and weight is None and (labels > 0).sum() > 8
        assert identical([mixed, labels], list(change((x, y), 0, number)[:2])), "a function of seed, epoch and batch"
    assert torch.equal(torch.random.get_rng_state(), state)
    others = [change((x, y), *key)[0] for key in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(others[0], others[1]) and not torch.equal(others[0], others[2])


def test_mixup_is_one_step_of_torchs_cross_entropy_on_the_mixed_batch() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 1, 4, 4), torch.arange(8) % 3)]
    ours = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    torchs = copy.deepcopy(ours)
    go(
        batches,
        student=ours,
        teacher=None,
        method=Supervised(),
        steps=1,
        mixup=0.3,
        label_smoothing=0.1,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        selfcheck=False,
    )
    x, y, *_ = BatchChanges(TrainConfig(epochs=1, mixup=0.3), 3)(batches[0], 0, 0)
    F.cross_entropy(torchs(x), y, label_smoothing=0.1).backward()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p, q - q.grad)


@each("weights", [(0.5, 1.0, 3.0), "balanced"])
def test_class_weights_are_those_of_torchs_cross_entropy(weights: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(24, 5), torch.tensor([0, 0, 0, 1, 1, 2] * 4)
    ours, given = nn.Linear(5, 3), weights
    torchs = copy.deepcopy(ours)
    go(
        DataLoader(TensorDataset(x, y), batch_size=12),
        student=ours,
        teacher=None,
        method=Supervised(),
        steps=1,
        accumulate=2,
        class_weights=weights,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        selfcheck=False,
    )
    if weights == "balanced":
        given = [len(y) / (3 * n) for n in (12, 8, 4)]
    F.cross_entropy(torchs(x), y, weight=torch.tensor(given)).backward()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert q.grad is not None
        torch.testing.assert_close(p, q - q.grad)


@each("dims, option", [((5,), "mixup"), ((5, 7), "mixup"), ((2, 4, 4), "cutmix")])
def test_inputs_that_are_mixed(dims: tuple[int, ...], option: str) -> None:
    """MixUp takes vectors and sequences of floats, CutMix images; both refuse the others with their shape."""
    change = BatchChanges(replace(TrainConfig(epochs=1), **{option: 1.0}), 3)
    x, labels = torch.rand(6, *dims), torch.arange(6) % 3
    assert change((x, labels), 0, 0).labels.shape == (6, 3)
    for wrong in (x.long(), torch.rand(6), {"input_ids": x}):
        with pytest.raises(ValueError, match=r"mix one tensor of floats, CutMix images \(N, C, H, W\); got"):
            change((wrong, labels), 0, 0)


def test_unlabeled_samples_stay_so() -> None:
    labels = soft_labels(torch.tensor([0, -100, 2]), 3, torch.float32)
    assert labels.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    change = BatchChanges(TrainConfig(epochs=1, class_weights=(2.0, 1.0, 3.0)), 3)
    weight = change((torch.zeros(3, 2), torch.tensor([0, -100, 2])), 0, 0).weight
    assert weight is not None and weight.tolist() == [2.0, 1.0, 3.0]


def test_what_does_not_go_together_is_refused_with_what_to_type() -> None:
    data, net = pictures(), picture_net()
    for options, said in (
        ({"mixup": 0.2, "method": DKD()}, r"DKD needs class indices, .*--mixup"),
        (
            {"cutmix": 1.0, "method": KD(), "task": TwoView(MixUp())},
            r"cutmix= change batches .*Classification; got TwoView",
        ),
        ({"class_weights": (1.0, 2.0)}, r"class_weights= needs a weight per class, 3; got 2"),
        ({"class_weights": ()}, r"class_weights must be numbers >= 0, one per class, or 'balanced'; got \(\)"),
        ({"class_weights": "balance"}, r"class_weights must be numbers >= 0, .*'balanced'; got 'balance'"),
        ({"ema": 1.0}, r"ema must be in \(0, 1\), such as 0.999; got 1.0"),
        ({"ema": 0.9, "precision": "bf16-true"}, r"ema=0.9 \(--ema\) of weights in torch.bfloat16 .*bf16-mixed"),
        ({"ema": 0.9, "strategy": "fsdp"}, r"--ema\) does not go with strategy='fsdp'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ({"mixup": -1.0}, r"mixup must be an alpha > 0, or 0 for none; got -1.0"),
        (
            {"gradient_checkpointing": True},
            r"Sequential has no gradient checkpointing\. .*transformers .*leave the option out",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            go(
                data,
                student=net,
                **({"teacher": copy.deepcopy(net), "steps": 1, "skip_checks": ["above chance"]} | options),
            )


# resuming


RESUMED = {
    "ema": {"ema": 0.7},
    "mixed": {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "method": KD(), "ema": 0.9},
    "balanced": {"balanced_sampling": True},
    "weights": {"class_weights": (1.0, 2.0, 0.5, 1.0, 3.0), "schedule": "cosine", "warmup": 0.1, "decay_norms": False},
}


@each("name", RESUMED)
def test_a_run_with_everyday_options_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def train(out: Path, **more: Any) -> Any:
        torch.manual_seed(77)
        student = nn.Sequential(nn.Flatten(), student_net(dropout=0.3, norm=True))
        teacher = nn.Sequential(nn.Flatten(), student_net(seed=4))
        settings = {"optimizer": ADAMW, "steps": STEPS, "checkpoint_every": 3, "selfcheck": False} | RESUMED[name]
        return go(images(), student=student, teacher=teacher, out=out, validation=images().clean(), **(settings | more))

    def stop(step: int, loss: Tensor) -> None:
        if step == 13:
            raise KeyboardInterrupt

    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(parts, on_step=stop)
    assert train(parts).how == "resumed"
    assert identical(left(whole), left(parts))
    if "ema" in RESUMED[name]:
        assert (whole / "ema.safetensors").read_bytes() == (parts / "ema.safetensors").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"holds another run: .*its (ema|mixup|label_smoothing|class_weights|schedule|balanced_sampling)",
    ):
        other = {"label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": None, "schedule": None}
        train(parts, ema=None, balanced_sampling=False, **other)


@each("generator", [None, 5])
def test_a_weighted_sampler_is_seeded_and_resumes_to_the_same_bits(generator: int | None, tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {}

    class Recorded(Noisy):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            seen[key].append(torch.tensor(i))
            return super().__getitem__(i)

    def loader() -> DataLoader[Any]:
        weights = (points(60)[1] == 0).double() * 9 + 1
        given = None if generator is None else torch.Generator().manual_seed(generator)
        sampler = WeightedRandomSampler(weights.tolist(), 60, generator=given)
        return DataLoader(Recorded(60), batch_size=8, sampler=sampler)

    def train(name: str, **more: Any) -> Any:
        return go(
            loader(),
            student=student_net(dropout=0.3),
            steps=20,
            checkpoint_every=3,
            selfcheck=False,
            out=tmp_path / name,
            validation=cut(points(20), 10),
            **more,
        )

    def stop(step: int, loss: Tensor) -> None:
        if step == 12:
            raise KeyboardInterrupt

    for key in ("whole", "again", "parts"):
        seen[key] = []
        if key == "parts":
            with pytest.raises(KeyboardInterrupt):
                train(key, on_step=stop)
        train(key)
    assert identical(left(tmp_path / "whole"), left(tmp_path / "parts")) and identical(seen["whole"], seen["again"])
    share = (points(60)[1][torch.stack(seen["whole"])] == 0).double().mean()
    assert share > 2 * (points(60)[1] == 0).double().mean()


def test_balanced_sampling_draws_every_class_equally_often(tmp_path: Path) -> None:
    x, y = points(90)
    y = torch.where(torch.arange(90) < 81, 0, torch.arange(90) % 2 + 1)
    y[:9] = -100
    pixels = torch.randint(256, (90, 1, 2, 2), dtype=torch.uint8)
    own = Batches(pixels, y, batch_size=8, mean=(0.5,), std=(0.25,))
    for loader in (own, own.shard(0, 1).subset(90), DataLoader(TensorDataset(x, y), batch_size=8)):
        drawn = balanced(loader)
        seen = []
        for epoch in range(20):
            if isinstance(drawn, Batches):
                drawn.set_epoch(epoch)
            seen += [batch[1] for batch in drawn]
        counts = torch.bincount(torch.cat(seen) + 100, minlength=103)[[0, 100, 101, 102]] / 20
        assert len(drawn) == len(loader) and len(torch.cat(seen)) == 20 * 90
        assert torch.allclose(counts, torch.tensor([9.0, 27.0, 27.0, 27.0]), atol=4.0), counts
    parts = [list(balanced(own).shard(rank, 2)) for rank in (0, 1)]
    assert identical([torch.cat([a[2], b[2]]) for a, b in zip(*parts, strict=True)], [b[2] for b in balanced(own)])
    with pytest.raises(ValueError, match=r"balanced_sampling= .*no class index .*WeightedRandomSampler"):
        go(cut(points(8), 8), balanced_sampling=True, steps=1)
    noisy: Any = Noisy(60)
    noisy.targets = noisy.y[:50]
    with pytest.raises(ValueError, match=r"50 labels or targets and 60 samples"):
        balanced(DataLoader(noisy, batch_size=8))
    with pytest.raises(ValueError, match="the training loader yields no batches"):
        go(DataLoader(TensorDataset(*points(0)), batch_size=8), balanced_sampling=True, steps=1)


def test_balanced_sampling_reads_the_labels_of_a_dataset_of_datasets() -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, the extra 'text'")
    rows = {"inputs": points(40)[0].tolist(), "label": [0] * 36 + [1] * 4, "text": ["a"] * 40}
    data = datasets.Dataset.from_dict(rows).with_format("torch", columns=["inputs"], output_all_columns=True)
    drawn = balanced(DataLoader(data, batch_size=8, collate_fn=lambda rows: [row["label"] for row in rows]))
    seen = [label for _ in range(20) for batch in drawn for label in batch]
    assert len(seen) == 800 and abs(sum(seen) - 400) < 80
    texts = DataLoader(data.remove_columns("label").rename_column("text", "label"))
    with pytest.raises(ValueError, match="no class index"):
        balanced(texts)


# gradient checkpointing


def test_gradient_checkpointing_changes_no_bit_and_is_switched_off_afterwards() -> None:
    transformers = pytest.importorskip("transformers")
    from tempering.tasks import LanguageModeling

    size = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    tokens = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(0))
    after, recomputed = [], []
    for on in (False, True):
        torch.manual_seed(0)
        student = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**size, resid_pdrop=0.1, bos_token_id=0, eos_token_id=0)
        )
        calls: list[int] = []
        student.transformer.h[0].mlp.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        batches = [{"input_ids": tokens, "labels": tokens}]
        go(
            batches,
            student=student,
            teacher=None,
            method=Supervised(),
            task=LanguageModeling(),
            steps=2,
            gradient_checkpointing=on,
            selfcheck=False,
        )
        after.append(dict(student.state_dict()))
        recomputed.append(len(calls))
        assert not student.transformer.gradient_checkpointing
    assert identical(*after) and recomputed[1] == recomputed[0] + 2


def test_a_model_of_timms_kind_is_checkpointed_too() -> None:
    switched: list[bool] = []

    class Net(nn.Linear):
        def set_grad_checkpointing(self, enable: bool = True) -> None:
            switched.append(enable)

    go(
        [(torch.randn(8, 4), torch.arange(8) % 3)],
        student=Net(4, 3),
        teacher=None,
        method=Supervised(),
        steps=1,
        gradient_checkpointing=True,
        selfcheck=False,
    )
    assert switched == [True, False]
