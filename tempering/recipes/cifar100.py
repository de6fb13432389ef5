"""Distill a student on CIFAR-100 with the standard recipe; the teacher is trained first if it is missing.

Command:  tempering run cifar100 --data DIR --teacher resnet32x4 --student resnet8x4 --method dtkd
Laptop:   ... --teacher resnet14 --student resnet8 --size 16 --epochs 6 --subset 5000 --threads 2

The standard recipe is mdistiller's: 240 epochs of 64 cropped and flipped images per step; see training/schedules.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from tempering.data import cifar100
from tempering.data.cifar import MEAN, STD
from tempering.experiments.presets import method_of, preset_from, run_label, slug
from tempering.methods.logits.supervised import Supervised
from tempering.models import build_seeded, explainer, load, network_facts, stages
from tempering.tasks.two_view import classification_of_views
from tempering.teachers import Live
from tempering.teachers.ensemble import with_pruned
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe
from tempering.training.logit_cache import LogitCache
from tempering.training.schedules import cifar_decay, cifar_lr, cifar_sgd
from tempering.utils.device import resolve_precision


def main(
    *,
    data: Path,
    teacher: str = "resnet32x4",
    student: str = "resnet8x4",
    routing_tree: Path | None = None,
    method: str = "dtkd",
    temperature: str | None = None,
    views: Literal["one", "strong", "cutmix", "mixup", "cutout"] | None = None,
    label: str | None = None,
    size: int = 32,
    batch_size: int = 64,
    lr: float | None = None,
    subset: int | None = None,
    test_subset: int | None = None,
    validation: int = 0,
    teacher_weights: Path | None = None,
    teacher_epochs: int | None = None,
    teacher_subset: int | None = None,
    teacher_dir: Path | None = None,
    teacher_cache: int | None = None,
    teacher_pruned: float | None = None,
    teacher_precision: Literal["auto", "bf16", "fp32"] = "auto",
    teacher_device: str | None = None,
    channels_last: bool = True,
    fuse_bn: bool = True,
    cuda_graphs: bool = False,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=240),
) -> Experiment:
    """Distill a student on CIFAR-100; the teacher is trained first, once, if there are no weights of it.

    Args:
        data: the official cifar-100-python archive or folder, or this project's packed blocks.
        teacher: the teacher's network, such as resnet14, resnet32x4, wrn_40_2; `tempering list` names them.
        student: the student's network; "vam:resnet8" adds attention over 4 virtual blocks of maps, "vam8:resnet8" 8.
        routing_tree: weights of a finished run of an "explainer" student, whose tree is kept for a second stage.
        method: a preset or a method, such as supervised, kd-matched, "dtkd(soft=0.5, temperature=sharpness(4))".
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)" or "static(2)".
        views: a second, augmented view of every batch, or "one"; default: "cutmix" for R2KD, else "one". "strong" is
            for two-view methods (MLKD, CSKD).
        label: name of this run in tables; default: that of the method.
        size: height and width of the images; 16 averages 2 x 2 pixels, at a quarter of the time.
        batch_size: images per step.
        lr: initial learning rate; default: 0.05, and 0.01 for MobileNets and ShuffleNets.
        subset: train on this many images, classes in proportion; default: all 50,000.
        test_subset: test on this many images, classes in proportion; default: all 10,000.
        validation: training images held out to select the best epoch; with 0 the test images select it.
        teacher_weights: a trained teacher, also a .pth of mdistiller, RepDistiller, timm; default: it is trained here.
        teacher_epochs: epochs of the teacher's training; default: the student's.
        teacher_subset: train the teacher on this many images, 50,000 for all; default: the student's.
        teacher_dir: where trained teachers are kept; default: "teachers" next to the run's folder.
        teacher_cache: cache the teacher's logits: 0 of clean images, k of k augmentations of each, which every method
            then replays; default: no cache.
        teacher_pruned: share of weights that are 0 in a copy of the teacher, added to it; 0: no copy; default: 0.1 for
            R2KD, else 0.
        teacher_precision: of the teacher's forward pass; auto is bf16 on hardware that computes in it, else fp32.
        teacher_device: device of the teacher, such as cuda:1; default: the student's.
        channels_last: store images and weights in channels-last format; results differ by rounding.
        fuse_bn: fuse the teacher's batch norms into its convolutions, unless the method uses its features.
        cuda_graphs: replay CUDA graphs of both models; --compile reduce-overhead does so for the student only.
        out: the run's folder; default: runs/cifar100/TEACHER-STUDENT/METHOD-SEED.
        config: options of training.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    view, pruned = views or loss.second_view, loss.teacher_pruned if teacher_pruned is None else teacher_pruned
    out = out or Path("runs/cifar100", f"{teacher}-{student}", f"{slug(preset.name)}-{config.seed}")
    folder = teacher_dir or out.parent / "teachers"
    config = replace(config, compile="reduce-overhead") if cuda_graphs else config
    sizes = {"size": size, "batch_size": batch_size, "test_subset": test_subset, "validation": validation}
    read = partial(cifar100, data, **sizes, channels_last=channels_last)
    splits = read(subset=subset, seed=config.seed)
    build = partial(build_seeded, classes=splits.train.classes, channels_last=channels_last)
    network = build(student, seed=config.seed)
    if routing_tree is not None:
        explainer.restart(load(network, routing_tree))
    rate, teacher_lr, length = lr or cifar_lr(student), lr or cifar_lr(teacher), teacher_epochs or config.epochs
    optimizer, schedule = explainer.optimizer_and_schedule(network, rate, (cifar_sgd(rate), cifar_decay))
    features = {name: (name, name) for name in loss.select_features(stages(network))}

    def train_teacher(model: nn.Module) -> Experiment:
        """Train with the same recipe and seed 0."""
        teacher_splits = read(subset=subset if teacher_subset is None else teacher_subset, seed=0)
        return Experiment(
            student=model,
            **teacher_splits._asdict(),
            method=Supervised(),
            optimizer=cifar_sgd(teacher_lr),
            schedule=cifar_decay,
            config=config.for_teacher(length),
            facts={"data": teacher_splits.facts()},
        )

    # identify other training images by the test images and their count, without decoding them
    source = splits.train.identity if teacher_subset is None else [splits.test.identity, teacher_subset, validation]
    key = {"epochs": length, "batch_size": batch_size, "lr": teacher_lr, "seed": 0, "precision": config.precision}
    precision = resolve_precision(teacher_precision, config.accelerator, teacher_device)
    wrap = partial(Live, precision=precision, channels_last=channels_last, device=teacher_device)
    wrap = partial(wrap, fuse_conv_bn=fuse_bn and not features, compile="reduce-overhead" if cuda_graphs else False)
    cache = partial(LogitCache, batches=splits.train, folder=folder, seed=config.seed, quiet=config.quiet)
    teacher_recipe = TeacherRecipe(
        name=teacher,
        build=partial(build, teacher, seed=0),
        train=train_teacher,
        folder=folder,
        key=key | {"data": source},
        weights=teacher_weights,
        wrap=partial(with_pruned, amount=pruned, wrap=wrap) if pruned else wrap,
        cache=None if teacher_cache is None else cache(views=teacher_cache),
        facts={"precision": precision},
    )
    # methods without a teacher see the same augmentations as those of cached logits
    train = splits.train.replay(teacher_cache) if teacher_cache and not loss.needs_teacher else splits.train
    label = label or run_label(preset, student, second_stage=routing_tree is not None)
    return Experiment(
        student=network,
        teacher=teacher_recipe if loss.needs_teacher else None,
        **splits._replace(train=train)._asdict(),
        method=loss,
        task=classification_of_views(view, features, mean=MEAN, std=STD),
        optimizer=optimizer,
        schedule=schedule,
        config=config,
        out=out,
        facts={"label": label, "student": network_facts(student), "data": splits.facts()},
    )
