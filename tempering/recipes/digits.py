"""Distill a small student on scikit-learn's bundled digits, in seconds and without a download.

Command:  tempering run digits --method dtkd        (`tempering demo` runs five methods of it)
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from tempering.data import Splits, digits
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods.logits.supervised import Supervised
from tempering.models import build_seeded, stages
from tempering.tasks import Classification
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe

SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)


def decay(progress: float) -> float:
    """Return the factor on the learning rate: 0.1 in the last quarter of the run, 0.01 in its last eighth."""
    return 0.1 ** ((progress >= 0.75) + (progress >= 0.875))


def main(
    *,
    method: str = "dtkd",
    temperature: str | None = None,
    label: str | None = None,
    teacher: str = "digits_large",
    student: str = "digits_small",
    teacher_epochs: int = 20,
    batch_size: int = 64,
    lr: float = 0.05,
    subset: int | None = None,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=20, log_every=10),
) -> Experiment:
    """Distill a small student on 8 x 8 digits; the teacher is trained first, once, next to the run's folder.

    Args:
        method: a preset or a method, such as supervised, kd, kd-matched, dtkd-published, or
            "dtkd(soft=0.5, temperature=sharpness(4, solve=std))".
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)" or "static(2)".
        label: name of this run in tables; default: that of the method.
        teacher: the teacher's network.
        student: the student's network.
        teacher_epochs: number of epochs of the teacher's training.
        batch_size: images per step.
        lr: initial learning rate, of both.
        subset: train the student on this many of the 1,078 training images, classes in proportion.
        out: the run's folder; default: runs/digits/METHOD-SEED. The teacher is kept in "teachers" next to it.
        config: options of training.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/digits", f"{slug(preset.name)}-{config.seed}")
    optimizer = partial(SGD, lr=lr)
    network = build_seeded(student, seed=config.seed, classes=10, channels=1)
    data = digits(batch_size=batch_size, seed=config.seed)
    data = data if subset is None else data._replace(train=data.train.subset(subset))

    def train_teacher(model: nn.Module) -> Experiment:
        """Train on all images, with seed 0."""
        splits: Splits = digits(batch_size=batch_size, seed=0)
        return Experiment(
            student=model,
            **splits._asdict(),
            method=Supervised(),
            optimizer=optimizer,
            schedule=decay,
            config=config.for_teacher(teacher_epochs),
            facts={"data": splits.facts()},
        )

    teacher_recipe = TeacherRecipe(
        name=teacher,
        build=partial(build_seeded, teacher, seed=0, classes=10, channels=1),
        train=train_teacher,
        folder=out.parent / "teachers",
        key={"epochs": teacher_epochs, "batch_size": batch_size, "lr": lr} | config.changed("precision"),
    )
    return Experiment(
        student=network,
        teacher=teacher_recipe if loss.needs_teacher else None,
        **data._asdict(),
        method=loss,
        task=Classification(features={name: (name, name) for name in loss.select_features(stages(network))}),
        optimizer=optimizer,
        schedule=decay,
        config=config,
        out=out,
        facts={"label": label or preset.label, "student": {"name": student}, "data": data.facts()},
    )
