"""Distill a small network: replace the data and the networks by your own.

Command:  tempering run template.py --method dtkd
Check:    tempering check template.py                (the first batch; nothing is trained)
Compare:  tempering compare template.py --methods supervised,kd,kd-matched,dtkd --seeds 3 --out runs/grid
Images:   tempering run template.py --data DIR       (DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg)

A recipe is a Python file with a function ``main``, which returns the description of a run and trains nothing. Its
keyword arguments are the flags, and --help shows its docstring; ``config`` has the flags of training, such as --epochs
and --seed. `tempering compare` and `tempering tune` need --method, --seed and --out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from tempering.data import Batches, Splits, image_folder
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods.logits.supervised import Supervised
from tempering.tasks import Classification
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe

SIZE = 16  # pixels per side


# 1. The data: training, validation and test batches. Without a validation split the test split selects the best epoch.


def load_data(folder: Path | None, *, validation: int, batch_size: int, seed: int) -> Splits:
    """Load the images of a folder, or generate synthetic ones: a random pattern per class, with noise."""
    if folder is not None:
        return image_folder(folder, size=SIZE, batch_size=batch_size, validation=validation, flip=True, seed=seed)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(10, (1300,), generator=generator)
    noise = torch.rand(len(labels), 3, SIZE, SIZE, generator=generator)
    images = (255 * (0.3 * patterns[labels] + 0.7 * noise)).to(torch.uint8)
    order = {"batch_size": batch_size, "shuffle": True, "seed": seed}
    data = Batches(images, labels, mean=(0.5,) * 3, std=(0.25,) * 3, name="synthetic", **order)
    train, test = data.split(200, seed=0)
    return Splits(*train.split(validation, seed=0), test) if validation else Splits(train, None, test)


# 2. The networks: any nn.Module whose output is logits of shape (N, classes).


def build_net(width: int, *, classes: int, seed: int) -> nn.Module:
    """Build a small convolutional network, with initial weights from this seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, classes),
    )


# 3. The run: flags, the teacher, the method, the optimizer.


def decay(progress: float) -> float:
    """Return the factor on the learning rate; progress increases from 0 to 1."""
    return 1.0 - progress


def main(
    *,
    data: Path | None = None,
    validation: int = 100,
    method: str = "dtkd",
    temperature: str | None = None,
    label: str | None = None,
    teacher_width: int = 32,
    student_width: int = 4,
    teacher_epochs: int = 10,
    batch_size: int = 50,
    lr: float = 0.05,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=10, log_every=10),
) -> Experiment:
    """Distill a small network; the teacher is trained first, once, next to the run's folder.

    Args:
        data: a folder of images, a subfolder per class; default: synthetic images.
        validation: training images held out to select the best epoch, if the folder has no validation split of its
            own; with 0 the test images select it.
        method: a method, or a preset of one (`tempering list` shows them), such as supervised, kd, kd-matched, or
            "dtkd(soft=0.5, temperature=sharpness(4, solve=std))".
        temperature: a policy that replaces the method's own, such as "static(2)".
        label: name of this run in tables; default: from the method.
        teacher_width: channels of the teacher's first layer.
        student_width: channels of the student's first layer.
        teacher_epochs: number of epochs of the teacher's training.
        batch_size: images per step.
        lr: initial learning rate of both.
        out: the run's folder; default: runs/template/METHOD-SEED. The teacher is kept in "teachers" next to it.
        config: options of training.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/template", f"{slug(preset.name)}-{config.seed}")
    load = partial(load_data, data, validation=validation, batch_size=batch_size)
    splits = load(seed=config.seed)
    classes, optimizer = splits.train.classes, partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4)

    # The teacher: trained when it is first needed; later runs with the same key reuse it. To load weights instead:
    # TeacherRecipe(weights=Path("teacher.safetensors"), train=None, ...).
    name, teacher_splits = f"cnn-{teacher_width}", load(seed=0)

    def train_teacher(model: nn.Module) -> Experiment:
        return Experiment(
            student=model,
            **teacher_splits._asdict(),
            method=Supervised(),
            optimizer=optimizer,
            schedule=decay,
            config=config.for_teacher(teacher_epochs),
            facts={"data": teacher_splits.facts()},
        )

    # everything that the weights depend on: with another key, another teacher is trained
    key = {"data": teacher_splits.train.identity, "epochs": teacher_epochs, "batch_size": batch_size, "lr": lr}
    teacher = TeacherRecipe(
        name=name,
        build=partial(build_net, teacher_width, classes=classes, seed=0),
        train=train_teacher,
        folder=out.parent / "teachers",
        key=key | config.changed("precision"),
    )

    # The student. A method that compares features (fitnet, ...) needs them by name: features={name: (student's module,
    # teacher's module)} of the task.
    return Experiment(
        student=build_net(student_width, classes=classes, seed=config.seed),
        teacher=teacher if loss.needs_teacher else None,
        **splits._asdict(),
        method=loss,
        task=Classification(),
        optimizer=optimizer,
        schedule=decay,
        config=config,
        out=out,
        facts={"label": label or preset.label, "student": {"name": f"cnn-{student_width}"}, "data": splits.facts()},
    )
