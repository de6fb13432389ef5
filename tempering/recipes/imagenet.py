"""Distill a student on ImageNet, or on your own images in any number: workers decode them as they are needed.

Command:  tempering run imagenet --data DIR --teacher torchvision:resnet34 --student torchvision:resnet18 --pretrained
Shards:   ... --data "imagenet-train-{000000..000146}.tar" --val-data "imagenet-val-{000000..000006}.tar"
Small:    ... --data DIR --teacher resnet14 --student resnet8 --size 32 --epochs 2 --batch-size 64

The recipe is torchvision's for ResNets, as papers use it for ResNet-34 -> ResNet-18: 100 epochs of 256 images per step,
random resized crops and flips, SGD with learning rate 0.1, momentum 0.9 and weight decay 1e-4; a tenth from 30, 60, 90.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering.data import open_images
from tempering.data.open_images import Kind
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods.logits.supervised import Supervised
from tempering.models import build_seeded, network_facts, stages
from tempering.models.factory import build
from tempering.tasks import Classification
from tempering.teachers import Live
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe
from tempering.training.logit_cache import LogitCache
from tempering.training.schedules import imagenet_decay
from tempering.utils.device import resolve_precision


def main(
    *,
    data: str,
    val_data: str | None = None,
    dataset: Kind = "auto",
    classes: int | None = None,
    length: int | None = None,
    teacher: str = "torchvision:resnet34",
    student: str = "torchvision:resnet18",
    pretrained: bool = False,
    method: str = "kd-imagenet",
    temperature: str | None = None,
    label: str | None = None,
    size: int = 224,
    batch_size: int = 256,
    lr: float = 0.1,
    validation: float = 0,
    test: float = 0,
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    teacher_weights: Path | None = None,
    teacher_epochs: int | None = None,
    teacher_dir: Path | None = None,
    teacher_cache: int | None = None,
    teacher_precision: Literal["auto", "bf16", "fp32"] = "auto",
    channels_last: bool = True,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=100),
) -> Experiment:
    """Distill a student on a folder of images, tar shards of webdataset, or a data set of Hugging Face.

    Args:
        data: a folder with a folder per class in train/ and val/; a folder or a pattern of tar shards; the folder of a
            saved data set, or a name on the hub, which is streamed.
        val_data: pattern of the validation shards.
        dataset: what the data is; default: found by its form.
        classes: number of classes, of streamed shards.
        length: training images per epoch, of shards to stream: needed for addresses and pipes.
        teacher: the teacher's network: torchvision:NAME, timm:NAME, transformers:NAME, or one of `tempering list`.
        student: the student's network.
        pretrained: use the library's weights of the teacher, which are for ImageNet's 1,000 classes in its order.
        method: a preset or a method; kd-imagenet and dkd-imagenet have mdistiller's weights for this pair. DTKD's
            weights for ImageNet are not published: "dtkd" has those for CIFAR-100.
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)" or "static(2)".
        label: name of this run in tables; default: that of the method.
        size: height and width of the inputs.
        batch_size: images per step, over all devices.
        lr: initial learning rate.
        validation: number, or share, of training images to hold out if there is no such split.
        test: the same of the test split.
        workers: processes that decode; default: one per CPU, at most 8.
        on_error: whether an image that cannot be read ends the run, or is left out.
        teacher_weights: a trained teacher; without it and without --pretrained, it is trained here.
        teacher_epochs: epochs of the teacher's training; default: the student's.
        teacher_dir: where trained teachers are kept; default: "teachers" next to the run's folder.
        teacher_cache: cache the teacher's logits of k augmentations, or of clean images with 0; default: no cache.
        teacher_precision: of the teacher's forward pass; auto is bf16 on hardware that computes in it, else fp32.
        channels_last: store inputs and weights in channels-last format.
        out: the run's folder; default: runs/imagenet/TEACHER-STUDENT/METHOD-SEED.
        config: options of training.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/imagenet", slug(f"{teacher}-{student}"), f"{slug(preset.name)}-{config.seed}")
    folder = teacher_dir or out.parent / "teachers"
    read = partial(open_images, data, kind=dataset, val=val_data, classes=classes, length=length, size=size)
    read = partial(read, batch_size=batch_size, validation=validation, test=test, workers=workers)
    read = partial(read, on_error=on_error, channels_last=channels_last)
    splits = read(seed=config.seed)
    if pretrained and teacher_weights is None and splits.train.classes != 1000:
        raise ValueError(
            f"--pretrained uses weights for ImageNet's 1,000 classes, and {data} has {splits.train.classes}. Leave it "
            "out to train the teacher here, or give --teacher-weights."
        )
    make = partial(build_seeded, classes=splits.train.classes, channels_last=channels_last)
    network = make(student, seed=config.seed)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=1e-4)

    def train_teacher(model: nn.Module) -> Experiment:
        """Train with the same recipe and seed 0."""
        described: dict[str, Any] = {"method": Supervised(), "optimizer": optimizer, "schedule": imagenet_decay}
        shorter = config.for_teacher(teacher_epochs or config.epochs)
        return Experiment(student=model, **read(seed=0)._asdict(), **described, config=shorter)

    key = {"epochs": teacher_epochs or config.epochs, "batch_size": batch_size, "lr": lr, "seed": 0}
    teacher_recipe = TeacherRecipe(
        name=slug(teacher),
        build=partial(build, teacher, classes=1000, pretrained=True) if pretrained else partial(make, teacher, seed=0),
        train=None if pretrained else train_teacher,
        folder=folder,
        key=key | {"data": splits.train.identity, "precision": config.precision},
        weights=teacher_weights,
        wrap=partial(Live, precision=resolve_precision(teacher_precision, config.accelerator, None)),
        cache=None
        if teacher_cache is None
        else LogitCache(batches=splits.train, folder=folder, views=teacher_cache, seed=config.seed, quiet=config.quiet),
    )
    return Experiment(
        student=network,
        teacher=teacher_recipe if loss.needs_teacher else None,
        **splits._asdict(),
        method=loss,
        task=Classification(features={name: (name, name) for name in loss.select_features(stages(network))}),
        optimizer=optimizer,
        schedule=imagenet_decay,
        config=config,
        out=out,
        facts={"label": label or preset.label, "student": network_facts(student), "data": splits.facts()},
    )
