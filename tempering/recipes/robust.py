"""Distill a student from an adversarially trained teacher on CIFAR-100, and attack it; inputs are pixels.

Command:  tempering run robust --data DIR --method kdiga
Table:    tempering compare robust --methods supervised,kd,kd-matched,dtkd,r2kd,kdiga --seeds 3 --out DIR
          -- --data DIR
Laptop:   ... --teacher resnet8 --epochs 6 --subset 5000 --test-subset 1000 --attack-steps 3

The teacher is trained adversarially (PGD or TRADES), the student by the method on clean images, as in KDIGA's base
protocol. Both normalize their inputs, so that perturbations and input gradients are in pixels. Tables have the accuracy
on clean images, under FGSM and under PGD at the end of the run; `tempering audit RUN --robustness` has more attacks.
Optimizer and schedule are those of the recipe cifar100.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.audits.attacks import fgsm, pgd
from tempering.audits.base import as_function, frozen_eval_mode
from tempering.data import cifar100
from tempering.data.cifar import MEAN, STD
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods import Method
from tempering.models import Normalized, build, stages
from tempering.tasks import Classification
from tempering.tasks.two_view import VIEWS, CutMix, TwoView
from tempering.teachers import Live
from tempering.teachers.ensemble import with_pruned
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe
from tempering.training.schedules import cifar_decay, cifar_lr, cifar_sgd

COLUMNS = ("test/accuracy", "test/fgsm", "test/pgd")


class Attacked(Classification):
    """Classification of images in pixels; scores the finished student under FGSM and PGD too, in [0, 1].

    Args:
        eps: l-infinity strength, in pixels of [0, 1].
        steps: number of PGD steps of eps / 4, from one random start; usually 20 steps of 2/255 for 8/255.
        features: as in Classification.
    """

    def __init__(self, *, eps: float, steps: int, features: dict[str, tuple[str, str]] | None = None) -> None:
        super().__init__(features=features)
        self.eps, self.steps = eps, steps

    def final_scores(self, student: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Return the accuracies "fgsm" and "pgd", upper bounds of the robust accuracy."""
        net = getattr(student, "module", student)  # Fabric's wrapper allows only its own backward
        correct: dict[str, list[Tensor]] = {"fgsm": [], "pgd": []}
        with frozen_eval_mode(net), torch.enable_grad():
            forward, device = as_function(net, "student"), next(net.parameters()).device
            for x, y, *_ in batches:
                x, y = x.to(device), y.to(device)
                attacked = pgd(forward, x, y, eps=self.eps, steps=self.steps, step=self.eps / 4 or None, losses=("ce",))
                correct["fgsm"].append(~fgsm(forward, x, y, eps=self.eps).fooled)
                correct["pgd"].append(~attacked.fooled)
        return {name: float(torch.cat(parts).double().mean()) for name, parts in correct.items()}


def main(
    *,
    data: Path,
    teacher: str = "resnet14",
    student: str = "resnet8",
    method: str = "kdiga",
    temperature: str | None = None,
    views: Literal["one", "cutmix"] | None = None,
    label: str | None = None,
    size: int = 32,
    batch_size: int = 64,
    lr: float | None = None,
    subset: int | None = None,
    test_subset: int | None = None,
    teacher_method: str = "pgdat",
    teacher_epochs: int | None = None,
    teacher_subset: int | None = None,
    teacher_dir: Path | None = None,
    teacher_pruned: float | None = None,
    eps: float = 8 / 255,
    attack_steps: int = 7,
    test_steps: int = 20,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=60),
) -> Experiment:
    """Distill a student from an adversarially trained teacher, which is trained first, once; attack both.

    Args:
        data: the official cifar-100-python archive or folder, or this project's packed blocks.
        teacher: the teacher's network; `tempering list` names them.
        student: the student's network.
        method: a preset or a method, such as supervised, kd, dtkd, r2kd, kdiga, "kdiga(align=0.3, right=true)"; pgdat
            and trades are the student's own adversarial training.
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)".
        views: "cutmix" for a second, mixed view of every batch; default: "cutmix" for R2KD, else "one".
        label: name of this run in tables; default: that of the method.
        size: height and width of the images; 16 averages 2 x 2 pixels, at a quarter of the time.
        batch_size: images per step.
        lr: initial learning rate; default: 0.05, and 0.01 for MobileNets and ShuffleNets.
        subset: train on this many images, classes in proportion; default: all 50,000.
        test_subset: test on this many images, classes in proportion; default: all 10,000.
        teacher_method: method of the teacher's training: pgdat or trades, with --eps and --attack-steps; or any method
            without a teacher, such as supervised.
        teacher_epochs: epochs of the teacher's training; default: the student's.
        teacher_subset: train the teacher on this many images; default: the student's.
        teacher_dir: where trained teachers are kept; default: "teachers" next to the run's folder.
        teacher_pruned: share of weights that are 0 in a copy of the teacher, added to it; 0: no copy; default: 0.1 for
            R2KD, else 0.
        eps: strength of the attacks in the teacher's training and on the finished student, in pixels of [0, 1].
        attack_steps: steps of the attacks in the teacher's training; each costs as much as a step of plain training.
        test_steps: steps of the PGD attack on the finished networks.
        out: the run's folder; default: runs/robust/TEACHER-STUDENT/METHOD-SEED.
        config: options of training. Evaluations during training are on clean images.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    view, pruned = views or loss.second_view, loss.teacher_pruned if teacher_pruned is None else teacher_pruned
    out = out or Path("runs/robust", f"{teacher}-{student}", f"{slug(preset.name)}-{config.seed}")
    # a third faster, attacks included; but a third slower for second derivatives
    channels_last = not loss.needs_live
    read = partial(cifar100, data, size=size, batch_size=batch_size, test_subset=test_subset, pixels=True)
    splits = read(subset=subset, seed=config.seed, channels_last=channels_last)
    build = partial(_build, classes=splits.train.classes)
    network = build(student, seed=config.seed, channels_last=channels_last)
    features = {name: (f"net.{name}", f"net.{name}") for name in loss.select_features(stages(network.net))}
    teacher_loss, length = _teacher_loss(teacher_method, eps, attack_steps), teacher_epochs or config.epochs
    teacher_lr = lr or cifar_lr(teacher)

    def train_teacher(model: nn.Module) -> Experiment:
        teacher_splits = read(subset=subset if teacher_subset is None else teacher_subset, seed=0, channels_last=True)
        return Experiment(
            student=model,
            **teacher_splits._asdict(),
            method=teacher_loss,
            task=Attacked(eps=eps, steps=test_steps),
            optimizer=cifar_sgd(teacher_lr),
            schedule=cifar_decay,
            config=config.for_teacher(length),
            facts={"data": teacher_splits.facts()},
        )

    key = {
        "method": teacher_loss.hyperparameters(),
        "by": type(teacher_loss).__name__,
        "epochs": length,
        "batch_size": batch_size,
    }
    key |= {"lr": teacher_lr, "seed": 0, "eps": eps, "test_steps": test_steps, "test": splits.test.identity}
    key |= {"train": splits.train.identity if teacher_subset is None else teacher_subset}
    wrap = partial(Live, channels_last=channels_last)
    task = Attacked(eps=eps, steps=test_steps, features=features)
    teacher_recipe = TeacherRecipe(
        name=teacher,
        build=partial(build, teacher, seed=0, channels_last=True),
        train=train_teacher,
        folder=teacher_dir or out.parent / "teachers",
        key=key | config.changed("precision"),
        wrap=partial(with_pruned, amount=pruned, wrap=wrap) if pruned else wrap,
        facts={"method": teacher_method},
    )
    return Experiment(
        student=network,
        teacher=teacher_recipe if loss.needs_teacher else None,
        **splits._asdict(),
        method=loss,
        task=task if view == "one" else TwoView(CutMix(), names=VIEWS, labeled=False, inner=task),
        optimizer=cifar_sgd(lr or cifar_lr(student)),
        schedule=cifar_decay,
        config=config,
        out=out,
        facts={
            "label": label or preset.label,
            "student": {"name": student},
            "data": splits.facts(),
            "columns": COLUMNS,
        },
    )


def _build(name: str, *, classes: int, seed: int, channels_last: bool) -> Normalized:
    """Build the network, which normalizes its inputs, with initial weights from the seed, equal for every method."""
    torch.manual_seed(seed)
    net = Normalized(build(name, classes=classes), mean=MEAN, std=STD)
    return net.to(memory_format=torch.channels_last) if channels_last else net  # pyright: ignore[reportCallIssue]


def _teacher_loss(method: str, eps: float, attack_steps: int) -> Method:
    """Return the method of the teacher's training; pgdat and trades have the recipe's strength and steps.

    Raises:
        ValueError: for a method that needs a teacher.
    """
    if method.lower() in ("pgdat", "trades"):
        method = f"{method}(eps={eps!r}, attack_steps={attack_steps})"
    loss = method_of(method)
    if loss.needs_teacher:
        raise ValueError(f"the teacher is trained without one, and {method} needs one. Give --teacher-method pgdat.")
    return loss
