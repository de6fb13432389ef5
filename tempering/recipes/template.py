"""A recipe to start from: replace the data and the networks by your own.

Command:  tempering run template.py --method dtkd
Check:    tempering check template.py                (the first batch alone; nothing is trained)
Compare:  tempering compare template.py --methods supervised,kd,kd-matched,dtkd --seeds 3 --out runs/grid
Images:   tempering run template.py --data DIR       (DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg)

A recipe is a Python file with a function ``main``. Its keyword arguments are the flags, and its docstring explains them
under --help. `tempering compare` and `tempering tune` need --method, --seed and --out.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from tempering import Run, distill
from tempering.data import Batches, Splits, image_folder
from tempering.experiments.presets import arm_from, method_of, slug
from tempering.methods.logits.supervised import Supervised
from tempering.tasks import Classification
from tempering.teachers import Live
from tempering.training.distill import CHECK_ONLY
from tempering.training.pretrained import trained

SIZE = 16  # pixels a side


# 1. The data: training, validation and test batches. Without a validation split the test split chooses the best epoch.


def load_data(folder: Path | None, *, batch_size: int, seed: int) -> Splits:
    """The images of a folder, or synthetic ones: a random pattern per class, under noise."""
    if folder is not None:
        return image_folder(folder, size=SIZE, batch_size=batch_size, validation=100, flip=True, seed=seed)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(10, (1400,), generator=generator)
    noise = torch.rand(len(labels), 3, SIZE, SIZE, generator=generator)
    images = (255 * (0.3 * patterns[labels] + 0.7 * noise)).to(torch.uint8)
    whole = Batches(
        images,
        labels,
        batch_size=batch_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        shuffle=True,
        seed=seed,
        name="synthetic",
    )
    rest, test = whole.split(200, seed=0)
    train, validation = rest.split(200, seed=0)
    return Splits(train, validation, test)


# 2. The networks: any nn.Module whose output is logits of shape (N, classes).


def build_net(width: int, *, classes: int, seed: int) -> nn.Module:
    """A small convolutional network, its weights drawn with this seed."""
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


def main(
    *,
    data: Path | None = None,
    method: str = "dtkd",
    temperature: str | None = None,
    label: str | None = None,
    teacher_width: int = 32,
    student_width: int = 4,
    epochs: int = 10,
    teacher_epochs: int = 10,
    batch_size: int = 50,
    lr: float = 0.05,
    accelerator: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Distill a small network; its teacher is trained first, once, beside the run's folder.

    Args:
        data: a folder of images, a subfolder per class; default: synthetic images.
        method: a method, or a preset of one (`tempering list` shows them), such as supervised, kd, kd-matched, or
            "dtkd(soft=0.5, temperature=sharpness(4, solve=std))".
        temperature: a policy that replaces the method's own, such as "static(2)".
        label: name of this run in tables; default: from the method.
        teacher_width: channels of the teacher's first layer.
        student_width: channels of the student's first layer.
        epochs: of the student.
        teacher_epochs: of the teacher.
        batch_size: images per step.
        lr: initial learning rate of both.
        accelerator: auto, cpu, cuda or mps.
        seed: of the student's initial weights and of the order of the images.
        threads: of torch; default: one per core.
        resume: continue an interrupted run in the same folder; --no-resume starts again.
        out: the run's folder; default: runs/template/METHOD-SEED. The teacher's folder "teachers" lies beside it.
        quiet: no progress bar.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arm, loss = arm_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/template", f"{slug(arm.name)}-{seed}")
    splits = load_data(data, batch_size=batch_size, seed=seed)
    classes = splits.train.classes
    # options of both runs, the teacher's and the student's
    train = partial(
        distill,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
        schedule=lambda progress: 1.0 - progress,  # factor on the learning rate; progress goes from 0 to 1
        validation=splits.validation,
        test=splits.test,
        accelerator=accelerator,
        resume=resume,
        quiet=quiet,
        log_every=10,
    )

    # The teacher. To load weights instead: `load(net, "teacher.safetensors")` of tempering.models, then Live(net).
    teacher, about_teacher = None, None
    if loss.needs_teacher:
        net, name = build_net(teacher_width, classes=classes, seed=0), f"cnn-{teacher_width}"
        their_data = load_data(data, batch_size=batch_size, seed=0)
        teach = partial(train, net, None, their_data.train, method=Supervised(), epochs=teacher_epochs)
        facts = {"label": f"teacher {name}", "student": {"name": name}, "data": their_data.facts()}
        # everything that makes it this teacher: with another key, another one is trained
        key = {"data": their_data.train.identity, "epochs": teacher_epochs, "batch_size": batch_size, "lr": lr}
        scores = trained(
            net,
            name,
            out.parent / "teachers",
            lambda folder: teach(out=None if CHECK_ONLY.get() else folder, facts=facts),
            key=key,
        )
        teacher, about_teacher = Live(net), {"name": name, "scores": scores}

    # The student. A method that compares features (fitnet, ...) needs them by name: features={name: (student's module,
    # teacher's module)} of the task.
    return train(
        build_net(student_width, classes=classes, seed=seed),
        teacher,
        splits.train,
        method=loss,
        task=Classification(),
        epochs=epochs,
        seed=seed,
        out=None if CHECK_ONLY.get() else out,
        facts={
            "label": label or arm.label,
            "student": {"name": f"cnn-{student_width}"},
            "teacher": about_teacher,
            "data": splits.facts(),
        },
    )
