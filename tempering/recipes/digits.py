"""A small student distilled on scikit-learn's bundled digits: the whole job in seconds, with no download.

Command:  tempering run recipes/digits.py --method dtkd        (`tempering demo` runs five arms of it)
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from tempering import Run, distill
from tempering.data import digits
from tempering.experiments.presets import arm_from, method_of, slug
from tempering.methods.logits.supervised import Supervised
from tempering.models import build, stages
from tempering.tasks import Classification
from tempering.teachers import Live
from tempering.training.distill import CHECK_ONLY
from tempering.training.pretrained import trained

SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)


def decay(progress: float) -> float:
    """A tenth of the learning rate in the last quarter of the run, and a hundredth in its last eighth."""
    return 0.1 ** ((progress >= 0.75) + (progress >= 0.875))


def main(
    *,
    method: str = "dtkd",
    temperature: str | None = None,
    label: str | None = None,
    teacher: str = "digits_large",
    student: str = "digits_small",
    epochs: int = 20,
    teacher_epochs: int = 20,
    batch_size: int = 64,
    lr: float = 0.05,
    subset: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Distil a small student on 8 x 8 digits; the teacher is trained first, once, beside the run's folder.

    Args:
        method: an arm or a method, such as supervised, kd, kd-matched, dtkd-published, or
            "dtkd(soft=0.5, temperature=sharpness(4, solve=std))".
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)" or "static(2)".
        label: what tables call this run; by itself it follows from the method.
        teacher: net of the teacher.
        student: net of the student.
        epochs: how long; decay and warm-up are shares of it.
        teacher_epochs: how long the teacher is trained.
        batch_size: images a step.
        lr: learning rate at the start, of both.
        subset: distil on this many of the 1,078 training images, every digit in proportion.
        seed: of the student's first weights, and of the order of the images.
        threads: of torch; by itself as many as there are cores.
        resume: go on where an earlier run in the same folder stopped; --no-resume begins again.
        out: the run's folder; by itself runs/digits/METHOD-SEED. The teacher lies in "teachers" beside it.
        quiet: no progress bar.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arm, loss = arm_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/digits", f"{slug(arm.name)}-{seed}")
    train = partial(distill, optimizer=partial(SGD, lr=lr), schedule=decay, resume=resume, quiet=quiet, log_every=10)
    learner, taught, said = _new(student, seed=seed), None, None
    if loss.needs_teacher:
        net = _new(teacher, seed=0)
        key = {"epochs": teacher_epochs, "batch_size": batch_size, "lr": lr}
        scores = trained(net, teacher, out.parent / "teachers", partial(_teach, net, teacher, train, key), key=key)
        said = {"name": teacher, "scores": scores}
        taught = Live(net)
    data = digits(batch_size=batch_size, seed=seed)
    images = data.train if subset is None else data.train.subset(subset)
    return train(
        learner,
        taught,
        images,
        method=loss,
        task=Classification(features={name: (name, name) for name in loss.select_features(stages(learner))}),
        epochs=epochs,
        validation=data.validation,
        test=data.test,
        seed=seed,
        out=None if CHECK_ONLY.get() else out,
        facts={
            "label": label or arm.label,
            "student": {"name": student},
            "teacher": said,
            "data": data._replace(train=images).facts(),
        },
    )


def _new(name: str, *, seed: int) -> nn.Module:
    """The net with the first weights of that seed, the same in every arm."""
    torch.manual_seed(seed)
    return build(name, classes=10, channels=1)


def _teach(net: nn.Module, name: str, train: partial[Run], key: dict[str, float], folder: Path) -> None:
    """The teacher's own training, on all images, with seed 0."""
    data = digits(batch_size=int(key["batch_size"]), seed=0)
    train(
        net,
        None,
        data.train,
        method=Supervised(),
        epochs=int(key["epochs"]),
        validation=data.validation,
        test=data.test,
        out=None if CHECK_ONLY.get() else folder,
        facts={"label": f"teacher {name}", "student": {"name": name}, "data": data.facts()},
    )
