"""A robust teacher is trained once, then a student distilled from it on CIFAR-100 and attacked; inputs are pixels.

Command:  tempering run recipes/robust.py --data DIR --method kdiga
A table:  tempering compare recipes/robust.py --methods supervised,kd,kd-matched,dtkd,r2kd,kdiga --seeds 3 --out DIR
          -- --data DIR
Laptop:   ... --teacher resnet8 --epochs 6 --subset 5000 --test-subset 1000 --attack-steps 3

The teacher learns by adversarial training (PGD, or TRADES), the student by the method alone, on images as they come, as
in KDIGA's base protocol. Both normalize inside, so that strengths and slopes are in pixels. Tables have the accuracy on
clean images, under FGSM and under PGD at the end of the run; `tempering audit RUN --robustness` asks harder. Length,
optimizer and decay are those of recipes/cifar100.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar100 import decay, rate, sgd
from torch import Tensor, nn

from tempering import Run, distill
from tempering.audits.attacks import fgsm, pgd
from tempering.audits.base import as_function, at_rest
from tempering.data import Splits, cifar100
from tempering.data.cifar import MEAN, STD
from tempering.experiments.presets import arm_from, method_of, slug
from tempering.methods import Method
from tempering.models import Normalized, build, stages
from tempering.rows import Rows
from tempering.tasks import Classification
from tempering.teachers import Live
from tempering.training.distill import CHECK_ONLY
from tempering.training.pretrained import trained

COLUMNS = ("test/accuracy", "test/fgsm", "test/pgd")


class Attacked(Classification):
    """Classification of pixels whose finished student is attacked too: accuracy under FGSM and PGD, in [0, 1].

    Args:
        eps: l-infinity strength, in pixels of [0, 1].
        steps: of PGD, eps / 4 each, from one random start; 20 of 2/255 at 8/255, as the literature has it.
        taps: as in Classification.
    """

    def __init__(self, *, eps: float, steps: int, features: dict[str, tuple[str, str]] | None = None) -> None:
        super().__init__(features=features)
        self.eps, self.steps = eps, steps

    def analyze(
        self,
        student: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: Callable[[Any, Tensor | None], Any] | None = None,
        temperatures: Callable[[Rows], Any] | None = None,
    ) -> dict[str, Any]:
        found = super().analyze(student, batches, teacher=teacher, temperatures=temperatures)
        return {**found, "scores": self.under_attack(student, batches)}

    def under_attack(self, student: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """The accuracies "fgsm" and "pgd", upper bounds of the robust one."""
        net = getattr(student, "module", student)  # the engine's wrapper lets nobody else go backwards
        stands: dict[str, list[Tensor]] = {"fgsm": [], "pgd": []}
        with at_rest(net), torch.enable_grad():
            answer, device = as_function(net, "student"), next(net.parameters()).device
            for x, y, *_ in batches:
                x, y = x.to(device), y.to(device)
                long = pgd(answer, x, y, eps=self.eps, steps=self.steps, step=self.eps / 4 or None, losses=("ce",))
                stands["fgsm"].append(~fgsm(answer, x, y, eps=self.eps).fooled)
                stands["pgd"].append(~long.fooled)
        return {name: float(torch.cat(parts).double().mean()) for name, parts in stands.items()}


def main(
    *,
    data: Path,
    teacher: str = "resnet14",
    student: str = "resnet8",
    method: str = "kdiga",
    temperature: str | None = None,
    label: str | None = None,
    epochs: int = 60,
    batch_size: int = 64,
    lr: float | None = None,
    subset: int | None = None,
    test_subset: int | None = None,
    seed: int = 0,
    teacher_method: str = "pgdat",
    teacher_epochs: int | None = None,
    teacher_subset: int | None = None,
    teacher_dir: Path | None = None,
    eps: float = 8 / 255,
    attack_steps: int = 7,
    test_steps: int = 20,
    accelerator: str = "auto",
    threads: int | None = None,
    evaluate_every: int = 1,
    checkpoint_every: int | None = None,
    selfcheck: bool = True,
    resume: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Distil a student from an adversarially trained teacher, which is trained first, once, and attack it.

    Args:
        data: the official cifar-100-python archive or folder, or this project's packed blocks.
        teacher: net of the teacher; `tempering list` names them.
        student: net of the student.
        method: an arm or a method, such as supervised, kd, dtkd, r2kd, kdiga, "kdiga(align=0.3, right=true)"; pgdat and
            trades are the student's own adversarial training.
        temperature: a policy in place of the method's own, such as "sharpness(4, solve=max)".
        label: what tables call this run; by itself it follows from the method.
        epochs: how long; decay and warm-up are shares of it.
        batch_size: images a step.
        lr: learning rate at the start; by itself 0.05, and 0.01 for MobileNets and ShuffleNets.
        subset: train on this many images, classes in proportion; by itself all 50,000.
        test_subset: test on this many images, classes in proportion; by itself all 10,000.
        seed: of the student's first weights, of the order and of the augmentation.
        teacher_method: how the teacher is trained: pgdat or trades, which get --eps and --attack-steps; or any method
            without a teacher as it is written, such as supervised.
        teacher_epochs: how long the teacher is trained; by itself as long as the student.
        teacher_subset: train the teacher on this many images; by itself on the student's.
        teacher_dir: where trained teachers are kept and found again; by itself "teachers" beside the run's folder.
        eps: strength of the attacks on the teacher in training and on the student in the end, in pixels of [0, 1].
        attack_steps: of the attacks that the teacher is trained by; each costs as much as a step of plain training.
        test_steps: of the PGD that the finished nets are attacked by.
        accelerator: auto, cpu, cuda or mps.
        threads: of torch; by itself as many as there are cores.
        evaluate_every: epochs between evaluations, on clean images.
        checkpoint_every: steps between checkpoints; by itself one an epoch.
        selfcheck: look at the first batch before an hour is spent.
        resume: go on where an earlier run in the same folder stopped; --no-resume begins again.
        out: the run's folder; by itself runs/robust/TEACHER-STUDENT/METHOD-SEED.
        quiet: no progress bar.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arm, loss = arm_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/robust", f"{teacher}-{student}", f"{slug(arm.name)}-{seed}")
    # a third quicker, also under attack; but a third slower where a method differentiates twice
    last = not loss.needs_live
    read = partial(cifar100, data, batch_size=batch_size, subset=subset, test_subset=test_subset, pixels=True)
    train = partial(
        distill,
        schedule=decay,
        accelerator=accelerator,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        selfcheck=selfcheck,
        resume=resume,
        quiet=quiet,
    )
    splits = read(seed=seed, channels_last=last)
    learner, taught, said = _new(student, splits, seed=seed, channels_last=last), None, None
    taps = {name: (f"net.{name}", f"net.{name}") for name in loss.select_features(stages(learner.net))}
    task = Attacked(eps=eps, steps=test_steps, features=taps)
    if loss.needs_teacher:
        net, how = _new(teacher, splits, seed=0, channels_last=True), _teaching(teacher_method, eps, attack_steps)
        said = {"name": teacher, "parameters": sum(p.numel() for p in net.parameters()), "method": teacher_method}
        length, speed = teacher_epochs or epochs, lr or rate(teacher)
        own = read if teacher_subset is None else partial(read, subset=teacher_subset)
        plain = Attacked(eps=eps, steps=test_steps)
        key = {"method": how.hyperparameters(), "by": type(how).__name__, "epochs": length, "batch_size": batch_size}
        key |= {"lr": speed, "seed": 0, "eps": eps, "test_steps": test_steps, "test": splits.test.identity}
        key |= {"train": splits.train.identity if teacher_subset is None else teacher_subset}

        def teach(folder: Path) -> None:
            found = own(seed=0, channels_last=True)
            train(
                net,
                None,
                found.train,
                method=how,
                task=plain,
                optimizer=sgd(speed),
                epochs=length,
                test=found.test,
                out=None if CHECK_ONLY.get() else folder,
                facts={"label": f"teacher {teacher}", "student": {"name": teacher}, "data": found.facts()},
            )

        said["scores"] = trained(net, teacher, teacher_dir or out.parent / "teachers", teach, key=key)
        taught = Live(net, channels_last=last)
    facts = {"label": label or arm.label, "student": {"name": student}, "teacher": said, "data": splits.facts()}
    return train(
        learner,
        taught,
        splits.train,
        method=loss,
        task=task,
        optimizer=sgd(lr or rate(student)),
        epochs=epochs,
        test=splits.test,
        seed=seed,
        out=None if CHECK_ONLY.get() else out,
        facts={**facts, "columns": COLUMNS},
    )


def _new(name: str, splits: Splits, *, seed: int, channels_last: bool) -> Normalized:
    """The net with the first weights of that seed, the same in every arm, and its normalization inside."""
    torch.manual_seed(seed)
    net = Normalized(build(name, classes=splits.train.classes), mean=MEAN, std=STD)
    return net.to(memory_format=torch.channels_last) if channels_last else net  # pyright: ignore[reportCallIssue]


def _teaching(method: str, eps: float, attack_steps: int) -> Method:
    """The teacher's method; the two attacks by name get the recipe's strength and steps.

    Raises:
        ValueError: for a method that needs a teacher itself.
    """
    if method.lower() in ("pgdat", "trades"):
        method = f"{method}(eps={eps!r}, attack_steps={attack_steps})"
    made = method_of(method)
    if made.needs_teacher:
        raise ValueError(f"the teacher is trained without one, and {method} needs one. Give --teacher-method pgdat.")
    return made
