"""Train a student in one call. The training loop is in trainer.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.tasks.base import Task, prepare_task
from tempering.teachers.base import Teacher
from tempering.training.checks import as_method, check_models_are_distinct, check_unsharded
from tempering.training.config import Precision, Run, TrainConfig
from tempering.training.optimizers import Optimizer, Schedule
from tempering.training.trainer import Trainer
from tempering.utils.state import borrowed

__all__ = ["SGD", "Optimizer", "Run", "TrainConfig", "distill", "make_trainer"]

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)


def distill(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    batches: Iterable[Any],
    *,
    method: Method | str,
    task: Task | None = None,
    optimizer: Optimizer = SGD,
    schedule: Schedule | Any = None,
    steps: int | None = None,
    epochs: int | None = None,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    evaluate_every: int = 1,
    out: str | Path | None = None,
    seed: int = 0,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int | str = "auto",
    strategy: str = "auto",
    compile: bool | str = False,
    warmup: float = 0.0,
    decay_norms: bool = True,
    ema: float | None = None,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    class_weights: Sequence[float] | Literal["balanced"] | None = None,
    balanced_sampling: bool = False,
    gradient_checkpointing: bool = False,
    chunks: bool | None = None,
    log_every: int = 50,
    examples: int = 6,
    checkpoint_every: int | None = None,
    keep: int = 2,
    patience: int | None = None,
    resume: bool = True,
    extend: bool = False,
    requeue: bool = False,
    loggers: Sequence[Any] = (),
    selfcheck: bool = True,
    skip_checks: Sequence[str] = (),
    quiet: bool = False,
    facts: Mapping[str, Any] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Run:
    """Train ``student`` with ``method`` and ``teacher``; resume if ``out`` has the same run, interrupted.

    If ``out`` has the same run, finished, its result is returned and nothing is trained (``Run.how`` is "finished").

    ``tempering.training.experiment.Experiment`` describes the same run without starting it.

    Options of ``TrainConfig`` with the same name: accumulate, max_grad_norm, precision, accelerator, devices,
    num_nodes, strategy, compile, warmup, decay_norms, ema, label_smoothing, mixup, cutmix, class_weights,
    balanced_sampling, gradient_checkpointing, chunks, evaluate_every, log_every, examples, checkpoint_every, keep,
    patience, resume, extend, requeue, selfcheck, skip_checks, quiet.
    With strategy="fsdp" the student is left sharded. With several devices the script runs once per device; the
    parameters equal those of one device with the same batch. A run killed at any moment resumes from the last
    checkpoint, with bit-identical results.

    Args:
        student: the model to train, in place. Modules that are in eval mode in a student in training mode, such as
            frozen normalization, stay in eval mode; of a student in eval mode everything is trained. All modes are
            given back as they were: call ``run.student.eval()`` before using a student that was in training mode.
        teacher: a module (wrapped in ``teachers.Live``, and given back as it was), a Teacher, or None for a method
            without a teacher.
        batches: training batches, iterated over every epoch. With several processes, a batch of
            ``tempering.data.Batches`` is split among them; the batches of a DataLoader are each process's own.
        method: the loss, with its temperature policy; or the name of a method, with its default values.
        task: turns batches into rows; None is Classification().
        optimizer: parameter groups -> optimizer; groups of the method's own parameters follow the student's. Or an
            optimizer of the student's parameters, or a name of ``torch.optim``.
        schedule: progress in [0, 1) -> factor on every group's learning rate; "constant", "cosine", "linear" or
            "step"; or a scheduler of torch, its class or a partial of it, stepped once per step.
        steps, epochs: length of the run; give one of them. A step is one update of the weights.
        validation: scored every ``evaluate_every`` epochs; selects the best epoch and stops early.
        test: scored as well; selects the best epoch only if there is no validation, which the report notes.
        out: folder for records, checkpoints and weights; None writes nothing.
        seed: of the order, augmentation and dropout of every epoch; not of the student's initial weights.
        loggers: "tensorboard", "csv", "wandb", "mlflow", "trackio", or Fabric loggers.
        facts: additional content of facts.json, such as "label" and "data".
        on_step: called after every step with its number (from 0) and its loss, (); with several processes, the mean
            over them is the step's loss.

    Raises:
        ValueError: for incompatible options, a method whose loss a split of the step would change, or an ``out`` that
            has another run.
        SelfCheckError: if the first batch shows that the run would be wrong.
        CorruptCheckpointError: if the newest checkpoint is truncated or edited.
        FloatingPointError: if the loss is NaN or infinite.
        OSError: if there is no space for a checkpoint; the earlier ones stay.
        RunInterrupted: (SystemExit, code 99) after SIGTERM, SIGUSR1 or SIGHUP; a checkpoint is written.
    """
    given = locals()
    if steps is not None and epochs is not None:
        raise ValueError(f"give either steps= or epochs=; got steps={steps}, epochs={epochs}.")
    options: dict[str, Any] = {
        option.name: given[option.name] for option in fields(TrainConfig) if option.name in given
    }
    options |= {"class_weights": _plain(class_weights), "skip_checks": tuple(skip_checks)}
    with borrowed(student, teacher):
        trainer = make_trainer(
            student,
            teacher,
            batches,
            method=as_method(method),
            task=task,
            optimizer=optimizer,
            schedule=schedule,
            evaluations={"validation": validation, "test": test},
            config=TrainConfig(**options),
            folder=out,
            loggers=loggers,
            on_step=on_step,
        )
        return trainer.run(dict(facts or {}))


def _plain(weights: Sequence[float] | str | None) -> tuple[float, ...] | Any:
    return weights if weights is None or isinstance(weights, str) else tuple(float(w) for w in weights)


def make_trainer(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    batches: Iterable[Any],
    *,
    method: Method,
    task: Task | None,
    optimizer: Optimizer,
    schedule: Schedule | Any,
    evaluations: Mapping[str, Iterable[Any] | None],
    config: TrainConfig,
    folder: str | Path | None,
    loggers: Sequence[Any] = (),
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Trainer:
    """Create the trainer of a run; convert the teacher to a Teacher, and let the task prepare both models.

    Raises:
        ValueError: for an incompatible combination of options, teacher, data and method.
    """
    config.validate()
    check_unsharded(student)
    if config.gradient_checkpointing:
        from tempering.training.gradient_checkpointing import check_gradient_checkpointing

        check_gradient_checkpointing(student)
    check_models_are_distinct(student, teacher)
    source = as_teacher(teacher, method, batches)
    return Trainer(
        student,
        source,
        method,
        _prepare_task(task, student, source),
        batches,
        optimizer=optimizer,
        schedule=schedule,
        evaluations=evaluations,
        config=config,
        folder=folder,
        loggers=loggers,
        on_step=on_step,
    )


def as_teacher(teacher: nn.Module | Teacher | None, method: Method, batches: Iterable[Any]) -> Teacher | None:
    """Convert to a Teacher, and check it against the batches; a module becomes a live teacher.

    Raises:
        ValueError: for a cache of other batches, or None with a method that needs a teacher.
        TypeError: for an argument of another type.
    """
    if isinstance(teacher, Teacher):
        has_identity = getattr(batches, "identity", None) is not None  # a loader of another library has none
        if has_identity and (reason := teacher.incompatibility(batches)) is not None:
            raise ValueError(reason)
        teacher.bind_data(batches)
        return teacher
    if isinstance(teacher, nn.Module):
        from tempering.teachers.live import Live

        live = Live(teacher)
        live.bind_data(batches)
        return live
    if teacher is not None:
        from tempering.teachers.live import no_teacher_error

        raise no_teacher_error(teacher, "teacher must be a module, a Teacher or None")
    if method.needs_teacher:
        raise ValueError(
            f"{type(method).__name__} needs a teacher, and teacher is None. To train without one, use "
            "methods.Supervised()."
        )
    return None


def _prepare_task(task: Task | None, student: nn.Module, teacher: Teacher | None) -> Task:
    """Let the task prepare the models, and return it; None is Classification()."""
    if task is None:
        from tempering.tasks.classification import Classification

        task = Classification()
    return prepare_task(task, student, teacher)
