"""A student distilled on CIFAR-100 by the field's standard recipe; the teacher is trained first where there is none.

Command:  tempering run recipes/cifar100.py --data DIR --teacher resnet32x4 --student resnet8x4 --method dtkd
Laptop:   ... --teacher resnet14 --student resnet8 --epochs 6 --subset 5000 --threads 2

The standard recipe is mdistiller's: 240 epochs of 64 cropped and flipped images a step, SGD with momentum 0.9 and
weight decay 5e-4, learning rate 0.05 (0.01 for MobileNets and ShuffleNets), a tenth of it after each of 150, 180, 210
epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering import Run, distill
from tempering.data import Splits, cifar100
from tempering.data.cifar import MEAN, STD
from tempering.experiments.presets import arm_from, method_of, slug
from tempering.methods.logits.supervised import Supervised
from tempering.models import build, explainer, load, parted, stages
from tempering.tasks import Classification, Task
from tempering.tasks.two_view import CutMix, CutOut, MixUp, RandAugment, TwoView
from tempering.teachers import Live, record
from tempering.training.distill import CHECK_ONLY
from tempering.training.pretrained import trained
from tempering.utils.device import has_native_bf16

MILESTONES = (150 / 240, 180 / 240, 210 / 240)
SLOW = ("mobilenet", "shuffle")  # nets that the field trains at a fifth of the learning rate


def decay(progress: float) -> float:
    """A tenth after each milestone, which are shares of the run, so that a shorter run decays in proportion."""
    return 0.1 ** sum(progress >= m for m in MILESTONES)


def main(
    *,
    data: Path,
    teacher: str = "resnet32x4",
    student: str = "resnet8x4",
    tree: Path | None = None,
    method: str = "dtkd",
    temperature: str | None = None,
    views: Literal["one", "strong", "cutmix", "mixup", "cutout"] = "one",
    label: str | None = None,
    epochs: int = 240,
    batch_size: int = 64,
    lr: float | None = None,
    subset: int | None = None,
    test_subset: int | None = None,
    validation: int = 0,
    seed: int = 0,
    teacher_weights: Path | None = None,
    teacher_epochs: int | None = None,
    teacher_subset: int | None = None,
    teacher_dir: Path | None = None,
    teacher_cache: int | None = None,
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true",
    teacher_precision: Literal["auto", "bf16", "fp32"] = "auto",
    fast: bool = True,
    compile: bool = False,
    graphs: bool = False,
    teacher_device: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    threads: int | None = None,
    evaluate_every: int = 1,
    checkpoint_every: int | None = None,
    selfcheck: bool = True,
    resume: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Distil a student on CIFAR-100; the teacher is trained first, once, where there are no weights of it.

    Args:
        data: the official cifar-100-python archive or folder, or this project's packed blocks.
        teacher: net of the teacher, such as resnet14, resnet32x4, wrn_40_2; `tempering list` names them.
        student: net of the student; "vam:resnet8" attends to 4 virtual blocks of its maps, "vam8:resnet8" to 8.
        tree: of an "explainer" student: weights of a finished run, whose tree is kept while all else is drawn anew.
        method: an arm or a method, such as supervised, kd, kd-matched, dtkd-published, or
            "dtkd(soft=0.5, temperature=sharpness(4, solve=std))".
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)" or "static(2)".
        views: a second, augmented view of every batch: "strong" for methods of two views (MLKD, CSKD), "cutmix" for
            R2KD.
        label: what tables call this run; by itself it follows from the method.
        epochs: how long; decay and warm-up are shares of it.
        batch_size: images a step.
        lr: learning rate at the start; by itself 0.05, and 0.01 for MobileNets and ShuffleNets. Explainers have Adam
            and a linear decay until they have a tree, and then halve it ten times.
        subset: train on this many images, classes in proportion; by itself all 50,000.
        test_subset: test on this many images, classes in proportion; by itself all 10,000.
        validation: training images held out to choose the best epoch by; 0 trains on all, as the field does, and the
            best epoch is then chosen by the test images, which the report says.
        seed: of the student's first weights, of the order and of the augmentation.
        teacher_weights: a safetensors file of a trained teacher; by itself it is trained here.
        teacher_epochs: how long the teacher is trained; by itself as long as the student.
        teacher_subset: train the teacher on this many images, 50,000 for all; by itself on the student's.
        teacher_dir: where trained teachers are kept and found again; by itself "teachers" beside the run's folder.
        teacher_cache: ask the teacher once and keep its answers: 0 to clean images, k to k augmentations of each that
            training then replays, which differ from seed to seed; by itself it is asked at every step.
        precision: of the student's training, and of the teacher's.
        teacher_precision: in which the teacher is asked; auto is bf16 where the hardware computes in it, else fp32.
        fast: fold the teacher's batch norms into its convolutions, where nothing is tapped, and lay images out
            channels-last: the same but for rounding.
        compile: torch.compile the student.
        graphs: replay CUDA graphs of the student's forward, its way back, and the teacher's forward.
        teacher_device: where the teacher stays, such as cuda:1; by itself with the student.
        accelerator: auto, cpu, cuda or mps.
        devices: how many.
        strategy: auto, ddp or fsdp, for more than one device.
        threads: of torch; by itself as many as there are cores.
        evaluate_every: epochs between evaluations.
        checkpoint_every: steps between checkpoints; by itself one an epoch.
        selfcheck: look at the first batch before an hour is spent.
        resume: go on where an earlier run in the same folder stopped; --no-resume begins again.
        out: the run's folder; by itself runs/cifar100/TEACHER-STUDENT/METHOD-SEED.
        quiet: no progress bar.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arm, loss = arm_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/cifar100", f"{teacher}-{student}", f"{slug(arm.name)}-{seed}")
    read = partial(
        cifar100,
        data,
        batch_size=batch_size,
        subset=subset,
        test_subset=test_subset,
        validation=validation,
        channels_last=fast,
    )
    train = partial(
        distill,
        schedule=decay,
        precision=precision,
        accelerator=accelerator,
        compile="reduce-overhead" if graphs else compile,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        selfcheck=selfcheck,
        resume=resume,
        quiet=quiet,
    )
    splits = read(seed=seed)
    learner, taught, said = _new(student, splits, fast, seed=seed), None, None
    if tree is not None:
        explainer.restart(load(learner, tree))
    optimizer, schedule = _trains(learner, lr or rate(student), staged=tree is not None)
    taps = {name: (name, name) for name in loss.select_features(stages(learner))}
    if loss.needs_teacher:
        net = _new(teacher, splits, fast, seed=0)
        said = {"name": teacher, "parameters": sum(p.numel() for p in net.parameters())}
        if teacher_weights is not None:
            load(net, teacher_weights)
        else:
            length, speed = teacher_epochs or epochs, lr or rate(teacher)
            own = read if teacher_subset is None else partial(read, subset=teacher_subset)
            teach = partial(_teach, net, teacher, own, partial(train, epochs=length, optimizer=sgd(speed)))
            key = {"epochs": length, "batch_size": batch_size, "lr": speed, "seed": 0, "precision": precision}
            # a larger set is not decoded to name it: the test images say which data it is, and the count how many
            key["data"] = (
                splits.train.identity if teacher_subset is None else [splits.test.identity, teacher_subset, validation]
            )
            said["scores"] = trained(net, teacher, teacher_dir or out.parent / "teachers", teach, key=key)
        here = "cpu" if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True) or "cpu"
        auto = "bf16" if has_native_bf16(teacher_device or here) else "fp32"
        said["precision"] = auto if teacher_precision == "auto" else teacher_precision
        taught = Live(
            net,
            precision=said["precision"],
            channels_last=fast,
            fuse_conv_bn=fast and not taps,
            compile="reduce-overhead" if graphs else False,
            device=teacher_device,
        )
        if teacher_cache is not None:
            of = f"{taught.identity[:10]}-{splits.train.identity[:10]}-{teacher_cache}"
            of += f"-{seed}" if teacher_cache else ""  # augmentations are the seed's
            place = (teacher_dir or out.parent / "teachers") / f"answers-{of}"
            live, taught = taught, record(taught, splits.train, place, views=teacher_cache or None, quiet=quiet)
            taught.fallback = live  # the test images are not in it
            said["calls"] = taught.rows
    return train(
        learner,
        taught,
        splits.train.replay(teacher_cache) if taught is not None and teacher_cache else splits.train,
        method=loss,
        task=_task(views, taps),
        optimizer=optimizer,
        schedule=schedule,
        epochs=epochs,
        validation=splits.validation,
        test=splits.test,
        devices=devices,
        strategy=strategy,
        seed=seed,
        out=None if CHECK_ONLY.get() else out,
        facts={
            "label": label or _label(arm.label, student, staged=tree is not None),
            "student": _net(student),
            "teacher": said,
            "data": splits.facts(),
        },
    )


def _teach(net: nn.Module, name: str, read: Callable[..., Splits], train: Callable[..., Run], folder: Path) -> None:
    """The teacher's own training: the same recipe, seed 0."""
    own = read(seed=0)
    train(
        net,
        None,
        own.train,
        method=Supervised(),
        validation=own.validation,
        test=own.test,
        out=None if CHECK_ONLY.get() else folder,
        facts={"label": f"teacher {name}", "student": {"name": name}, "data": own.facts()},
    )


def _task(views: str, taps: dict[str, tuple[str, str]]) -> Task:
    """Batches as they come, or beside an augmented copy."""
    if views == "one":
        return Classification(features=taps)
    if taps:
        raise ValueError(f"--views {views} makes two blocks of rows, and features are tapped for one: --views one.")
    if views == "strong":
        return TwoView(RandAugment(2, 10, mean=MEAN, std=STD))
    second = {"cutmix": CutMix, "mixup": MixUp, "cutout": CutOut}[views]()
    return TwoView(second, names=("clean", "augmented"), labeled=False)


def _new(name: str, splits: Splits, channels_last: bool, *, seed: int) -> nn.Module:
    """The net with the first weights of that seed, the same in every arm."""
    torch.manual_seed(seed)
    net = build(name, classes=splits.train.classes)
    return net.to(memory_format=torch.channels_last) if channels_last else net  # pyright: ignore[reportCallIssue]


def rate(name: str) -> float:
    return 0.01 if parted(name)[1].lower().startswith(SLOW) else 0.05


def _net(name: str) -> dict[str, str]:
    """A student in the records. One that attends is the same net when it is folded, so tables compare the two."""
    attention, plain = parted(name)
    return {"name": plain, "attention": attention} if attention else {"name": plain}


def _label(arm: str, student: str, *, staged: bool) -> str:
    """What tables call a run by itself: its arm, and what its student has beside it."""
    attention, _ = parted(student)
    return arm + (f" + {attention.upper()}" if attention else "") + (", second stage" if staged else "")


def _trains(net: nn.Module, lr: float, *, staged: bool) -> tuple[Callable[..., Any], Callable[[float], float]]:
    """Optimizer and schedule of a student; an explainer's are its code's, of its first or its second stage."""
    if isinstance(net, explainer.Explainer) and not staged:
        return partial(explainer.adam, net=net, lr=lr), explainer.rate
    return sgd(lr), explainer.halving if staged else decay


def sgd(lr: float) -> partial[torch.optim.SGD]:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4)
