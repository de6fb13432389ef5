"""distill(): a whole run in one call. The training loop is in trainer.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.searching import SEARCHING
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.training.config import Run, Settings
from tempering.training.trainer import Trainer

__all__ = ["CHECK_ONLY", "LOOK_ONLY", "SGD", "CheckedOnly", "Looked", "Run", "Settings", "distill"]

# while it is on, distill() stops after the self-check and raises CheckedOnly
CHECK_ONLY: ContextVar[bool] = ContextVar("check_only", default=False)
# while it is on, distill() trains nothing and raises what it was given: an audit looks at a run through its recipe
LOOK_ONLY: ContextVar[bool] = ContextVar("look_only", default=False)


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)


class CheckedOnly(Exception):
    """Raised in place of training where ``CHECK_ONLY`` is set; carries the self-check's line."""


class Looked(CheckedOnly):
    """Raised in place of a run where ``LOOK_ONLY`` is set, with its models, its method and its data."""

    def __init__(self, student: nn.Module, teacher: Teacher | None, method: Method, splits: dict[str, Any]) -> None:
        super().__init__("the run was looked at, and not trained")
        self.student, self.teacher, self.method, self.splits = student, teacher, method, splits


def distill(
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    batches: Iterable[Any],
    *,
    method: Method,
    task: Task | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = SGD,
    schedule: Callable[[float], float] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    validation: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    evaluate_every: int = 1,
    out: str | Path | None = None,
    seed: int = 0,
    accumulate: int = 1,
    clip: float | None = None,
    precision: str = "32-true",
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    compile: bool | str = False,
    chunks: bool | None = None,
    log_every: int = 50,
    checkpoint_every: int | None = None,
    keep: int = 2,
    patience: int | None = None,
    resume: bool = True,
    loggers: Sequence[Any] = (),
    selfcheck: bool = True,
    quiet: bool = False,
    facts: Mapping[str, Any] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Run:
    """Train ``student`` under ``method`` beside ``teacher``; resumes where ``out`` holds the same run half done.

    Args:
        student: the net that is trained, in place.
        teacher: a module (wrapped in ``teachers.Live``), a Teacher, or None for a method that looks at none.
        batches: training batches, walked anew every epoch. With several processes a batch of ``tempering.data.Batches``
            is shared out to them; the batches of a DataLoader are each process's own.
        method: the loss, with its temperature policy.
        task: how batches become rows; None is Classification().
        optimizer: parameter groups -> optimizer; groups of the method's own parameters follow the student's.
        schedule: progress in [0, 1) -> factor on every group's learning rate.
        steps, epochs: how long, one of them. A step is one update of the weights.
        validation: scored every ``evaluate_every`` epochs; chooses the best epoch and stops early.
        test: scored as well; chooses the best epoch only where there is no validation, which the report says.
        out: folder for records, checkpoints and weights; None writes nothing.
        seed: of the order, augmentation and dropout of every epoch; initialize the student before.
        accumulate: batches in one step. The loss is the mean over all of them, however they are split.
        clip: largest norm of the gradient.
        precision, accelerator, devices, strategy: Fabric's; strategy "fsdp" is FSDP2, and leaves the student sharded.
            With several devices the script runs once for each; parameters are as with one and the same batch.
        compile: compile the student's forward, and its way back; a word is a mode of torch.compile, and
            "reduce-overhead" replays CUDA graphs. The loss and the optimizer stay as they are.
        chunks: take the loss by ``kernels.chunked``, in the memory of a few rows; None does from 2^22 logits on, where
            the method looks at a row at a time. The records say which path ran.
        checkpoint_every: steps between checkpoints within an epoch; there is one at every epoch's end. A run killed at
            any moment goes on from the last one, to the same bits.
        keep: how many checkpoints stay.
        patience: evaluations without a better score after which to stop.
        resume: False begins again and removes what ``out`` holds of an earlier run.
        loggers: "tensorboard", "csv", "wandb", or Fabric loggers.
        selfcheck: look at the first batch before training.
        facts: more for facts.json, such as "label" and "data".
        on_step: called after every step with its number (from 0) and its loss, (); with several processes, the mean
            over them is the step's loss.

    Raises:
        ValueError: for settings that do not fit together, a method that a split of the step would change, or an
            ``out`` that holds another run.
        SelfCheckError: when the first batch shows that the run would be wrong.
        CorruptCheckpointError: when the newest checkpoint is truncated or edited.
        FloatingPointError: when the loss is no number.
        OSError: when there is no space for a checkpoint; the earlier ones stay.
    """
    settings = Settings(
        steps=steps,
        epochs=epochs,
        evaluate_every=evaluate_every,
        seed=seed,
        accumulate=accumulate,
        clip=clip,
        precision=precision,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        compile=compile,
        chunks=chunks,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        keep=keep,
        patience=patience,
        resume=resume,
        selfcheck=selfcheck,
        quiet=quiet,
    )
    _look(student, taught := _teacher(teacher, method, batches), method, (batches, validation, test))
    trainer = Trainer(
        student,
        taught,
        method,
        _task(task, student, taught),
        batches,
        optimizer=optimizer,
        schedule=schedule,
        evaluations=_evaluations(validation, test),
        config=settings,
        folder=out,
        loggers=loggers,
        on_step=on_step,
    )
    if CHECK_ONLY.get():
        raise CheckedOnly(trainer.check().line)
    return trainer.run(dict(facts or {}))


def _look(student: nn.Module, teacher: Teacher | None, method: Method, splits: tuple[Any, ...]) -> None:
    if LOOK_ONLY.get():
        raise Looked(student, teacher, method, dict(zip(("train", "validation", "test"), splits, strict=True)))


def _task(task: Task | None, student: nn.Module, teacher: Teacher | None) -> Task:
    if task is None:
        from tempering.tasks.classification import Classification

        return Classification()
    for model in (student, None if teacher is None else teacher.model):
        if model is not None:
            task.prepare_model(model)
    return task


def _evaluations(validation: Iterable[Any] | None, test: Iterable[Any] | None) -> dict[str, Iterable[Any] | None]:
    """The splits that are scored; in a search the validation split alone."""
    if not SEARCHING.get():
        return {"validation": validation, "test": test}
    if validation is None:
        raise ValueError(
            "a search scores its trials on a validation split, so that the test split stays unseen, and this run has "
            "none. Give the recipe one, such as --validation=5000."
        )
    return {"validation": validation}


def _teacher(teacher: nn.Module | Teacher | None, method: Method, batches: Iterable[Any]) -> Teacher | None:
    if isinstance(teacher, Teacher):
        known = getattr(batches, "identity", None) is not None  # somebody else's loader says nothing of its data
        if known and (why := teacher.incompatibility(batches)) is not None:
            raise ValueError(why)
        return teacher
    if isinstance(teacher, nn.Module):
        from tempering.teachers.live import Live

        return Live(teacher)
    if teacher is not None:
        raise TypeError(f"teacher must be a module, a Teacher or None; got {type(teacher).__name__}.")
    if method.needs_teacher:
        raise ValueError(
            f"{type(method).__name__} needs a teacher, and teacher is None. Alone it is methods.Supervised()."
        )
    return None
