"""Shared by the integrations: check that a method works in an external trainer, and turn a batch into rows."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from tempering.methods.base import BlockLoss, Chunking, Method
from tempering.rows import Rows, total
from tempering.tasks.base import Task
from tempering.tasks.row_scores import RowScores
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live, no_teacher_error
from tempering.teachers.outputs import Sparse
from tempering.training.checks import check_models_are_distinct, validate_sampled_teacher
from tempering.training.config import Checked, Results, SelfCheckError
from tempering.training.distributed import checked_together, whole_rows
from tempering.training.evaluator import generators_restored
from tempering.training.features import PairedFeatures, extracting
from tempering.training.selfcheck import (
    MOST_TRIED,
    batch_of_one,
    check_student,
    explain_batch_of_one,
    independent_workers,
    selfcheck,
)
from tempering.utils.state import random_state, restored, set_random_state
from tempering.utils.tensors import map_tensors

ENGINE = "Run it with tempering.distill."


def fitting(method: Method, teacher: nn.Module | Teacher | None, student: nn.Module) -> Teacher | None:
    """Return the teacher, a bare module wrapped in ``Live``, if an external trainer supports the method.

    A bare module is as it was until its first forward; ``release()`` at the end of training gives it back.

    Raises:
        TypeError: if ``teacher`` is not a teacher, or the method owns its step.
        ValueError: if the teacher is missing or shares weights with the student, or a policy is adaptive.
    """
    if method.owns_step:
        raise TypeError(f"{type(method).__name__} owns its step, and so does this trainer. {ENGINE}")
    if adaptive := method.adaptive_policies():
        raise ValueError(
            f"{type(adaptive[0]).__name__} learns from a second forward after every step, which this trainer does not "
            f"run. {ENGINE}"
        )
    if teacher is None:
        if method.needs_teacher:
            raise ValueError(
                f"{type(method).__name__} needs a teacher, and teacher is None. Alone it is methods.Supervised()."
            )
        return None
    if not isinstance(teacher, (nn.Module, Teacher)):
        raise no_teacher_error(teacher, "teacher must be a module, a Teacher or None")
    check_models_are_distinct(student, teacher)
    if isinstance(teacher, nn.Module):
        return Live(teacher).release()
    validate_sampled_teacher(method, teacher)
    return teacher


def whole_batches(method: Method, task: Task, **splits: int) -> None:
    """Reject a method that compares rows with each other, or a task whose rows depend on the batch, if a step is split.

    Args:
        splits: the trainer's options that split a step -> number of parts.

    Raises:
        ValueError: if one of them is not 1; names the first.
    """
    for flag, parts in splits.items():
        if parts > 1 and not task.splittable:
            raise ValueError(whole_rows(task, f"{flag}={parts}"))
        if parts > 1 and method.is_batch_dependent():
            raise ValueError(
                f"{type(method).__name__} compares rows with each other, so its loss depends on how a step is split: "
                f"{flag}={parts} would change it. Use {flag}=1 and smaller batches, or a method over single rows."
            )


def arguments_of(model: nn.Module) -> tuple[dict[str, None], bool]:
    """Return the named arguments of a model's forward, without PEFT's wrapper, and whether it takes any others."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    parameters = inspect.signature(base.forward).parameters.values()
    named = dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return named, any(p.kind == p.VAR_KEYWORD for p in parameters)


def excluded_inputs(model: nn.Module, other: nn.Module) -> frozenset[str]:
    """Return the inputs that the other model names and this one cannot take."""
    own, takes_any = arguments_of(model)
    return frozenset() if takes_any else frozenset(arguments_of(other)[0].keys() - own.keys())


class Forward(NamedTuple):
    """One batch through both models: the outputs, and the blocks of rows of both."""

    student: Any
    teacher: Any
    blocks: list[Rows]


def forward(
    batch: Any, student: Callable[[Any], Any], teacher: Teacher | None, task: Task, features: PairedFeatures | None
) -> Forward:
    """Run both models on a batch; the teacher's output is None without a teacher."""
    student_in, teacher_in, ids = task.inputs(batch)
    with extracting(features):
        try:
            student_output = student(student_in)
        except ValueError as error:
            explain_batch_of_one(error, "this batch")
            raise
        teacher_output = None if teacher is None else teacher(teacher_in, ids)
        blocks = task.rows(student_output, teacher_output, batch)
        if features is not None:
            blocks[-1] = blocks[-1].replace(features={**blocks[-1].features, **features.features()})
    return Forward(student_output, teacher_output, blocks)


@checked_together()
def check(
    batch: Any,
    later: Callable[[], Iterable[Any]],
    splits: Mapping[str, Callable[[], Iterable[Any]]],
    *,
    student: nn.Module,
    teacher: Teacher | None,
    method: Method,
    task: Task,
    features: PairedFeatures | None,
    loader: Any,
) -> Checked:
    """Run the self-check on the first batches of training, and evaluate one of every split, as ``distill`` does.

    Args:
        later: returns the batches after the first one.
        splits: name -> what returns the batches of a split that will be evaluated.
        loader: of training, asked for its sizes.

    Raises:
        SelfCheckError: if the batches show that the run would be wrong.
    """
    with extracting(features):
        report = selfcheck(
            student,
            teacher,
            batch,
            method=method,
            task=task,
            features=None if features is None else features.features,
            more=later,
            single=batch_of_one(loader),
            workers=independent_workers(loader),
        )
    saved, method = random_state(), copy.deepcopy(method).eval()
    try:
        with torch.no_grad(), restored(student):
            student.eval()
            for name, batches in splits.items():
                try:
                    _check_split(batches(), student, teacher, method, task, features)
                except (RuntimeError, ValueError) as error:
                    raise SelfCheckError(f"{name}: {error}") from error
                report.checks["scores"] = "ok"
    finally:
        set_random_state(saved)
    return report


def _check_split(
    batches: Iterable[Any],
    student: nn.Module,
    teacher: Teacher | None,
    method: Method,
    task: Task,
    features: PairedFeatures | None,
) -> None:
    """Evaluate the first batch of a split that has a row that counts."""
    evaluation = Evaluation(task, method)
    for batch in itertools.islice(batches, MOST_TRIED):
        out = forward(batch, student, teacher, task, features)
        for rows in out.blocks:
            check_student(rows, Results())
        evaluation.add(batch, out, 1.0, None)
        if any(weight for _, weight in evaluation.blocks.values()):
            return
    raise SelfCheckError(
        f"there is nothing to evaluate in its first {MOST_TRIED} batches, or it has none. Is it empty, or are all its "
        "labels -100?"
    )


def batches_again(loader: Any, *, skip: int = 0) -> Iterator[Any]:
    """Iterate over a loader from its beginning without disturbing a pass that is under way, nor its generators."""
    if isinstance(loader, Iterator):
        return
    with generators_restored(loader):
        again: Any = copy.copy(loader) if isinstance(loader, DataLoader) else loader
        if again is not loader:
            again._iterator = None  # that of persistent workers
        yield from itertools.islice(iter(again), skip, None)


def step_means(
    losses: Sequence[BlockLoss], method: Method, normalizer: Mapping[str, Any], out: Any
) -> dict[str, Tensor]:
    """Return what a micro-batch adds to the means over a step's rows, each (): terms, temperatures and agreement.

    The terms add up to the loss. Temperatures and agreement, the share of rows on which both models have the same most
    likely class, are those of the last block with several classes.

    Args:
        normalizer: block name -> total weight of its rows in the step; {}: this micro-batch is the step.
        out: the teacher's output; None, or one of its most likely classes only, has no agreement.
    """
    means: dict[str, Tensor] = {}

    def add(name: str, value: Tensor, rows: Rows) -> None:
        part = total({name: value.detach().float()}, rows, normalizer=normalizer.get(rows.name))
        means[name] = means[name] + part if name in means else part

    for block in losses:
        for name, term in block.terms.items():
            add(name, term, block.rows)
    rows = next((b.rows for b in reversed(losses) if b.rows.student.shape[1] > 1), losses[-1].rows)
    last = next((p.last for p in method.policies().values() if p.last is not None), None)
    for side in ("teacher", "student") if last is not None else ():
        T = getattr(last, side).flatten()
        if len(T) in (1, len(rows)):
            add(f"T_{side}", T.expand(len(rows)), rows)
    if out is not None and not isinstance(out, Sparse):
        add("agreement", rows.student.argmax(-1) == rows.teacher.argmax(-1), rows)
    return means


def warn_if_not_finite(metrics: Mapping[str, float], step: int) -> bool:
    """Warn of means over training steps that are not finite, since the trainer continues; return whether one is."""
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        warnings.warn(
            f"the loss is NaN or infinite by step {step}: {wrong}. The trainer continues, and the student's weights "
            "may be NaN. Are inputs and teacher's logits finite in every batch? Try a lower learning rate, clipped "
            "gradients or float32.",
            stacklevel=4,
        )
    return bool(wrong)


class Evaluation:
    """The method's loss and the scores of a split: means over all its rows, however it is cut into batches."""

    def __init__(self, task: Task, method: Method) -> None:
        self.task, self.method, self.scores = task, method, RowScores()
        self.blocks: dict[str, list[Any]] = {}  # name -> sum of the loss, total weight
        self.has_teacher = False

    def add(self, batch: Any, out: Forward, progress: float, chunking: Chunking | None) -> Tensor:
        """Add a batch, and return the method's loss on it alone, ()."""
        sums = self.method.losses(out.blocks, progress, {rows.name: 1.0 for rows in out.blocks}, chunking)
        parts = list[Tensor]()
        for rows, loss, *_ in sums:
            weight = rows.total_weight
            block = self.blocks.setdefault(rows.name, [0.0, 0.0])
            block[0], block[1] = block[0] + _double(loss.detach()), block[1] + _double(weight)
            parts.append(loss / torch.where(weight > 0, weight, 1.0))
        if all(rows.task_loss is None for rows in out.blocks):
            rows, teacher_top = self.task.scored_rows(out.student, out.teacher, batch)
            self.has_teacher |= teacher_top is not None
            if rows.target is not None:
                self.scores.add(rows, teacher_top)
        return torch.stack(parts).sum()

    def result(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the means: "loss" of the method, and of labeled rows "cross_entropy", "accuracy" and so on.

        Args:
            reduce: sums a tensor over processes.
            device: of that tensor.
        """
        names, scores = sorted(self.blocks), self.scores
        own = [*(x for name in names for x in self.blocks[name])]
        own += [scores.loss, scores.accuracy, scores.agreement, scores.count]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums: list[float] = reduce(torch.tensor([float(x) for x in own], dtype=dtype, device=device)).tolist()
        pairs = zip(sums[: 2 * len(names) : 2], sums[1 : 2 * len(names) : 2], strict=True)
        out = {"loss": sum(value / weight for value, weight in pairs if weight > 0)} if names else {}
        loss, accuracy, agreement, count = sums[2 * len(names) :]
        if count:
            scores = RowScores(loss, accuracy, agreement, round(count))
            means = scores.means(has_teacher=self.has_teacher, unit=self.task.unit)
            out |= {"cross_entropy": means.pop("loss"), **means}
        return out


def _double(x: Tensor) -> Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def first_samples(batch: Any, n: int) -> Any:
    """Return the first ``n`` samples of a batch: of every tensor that has as many as the first one."""
    sizes = {len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim}
    if len(sizes) != 1:
        raise ValueError(
            "the last batch repeats samples, for an equal number on every process, and holds tensors of "
            f"{sorted(sizes)} samples, so they cannot be left out. Evaluate in one process."
        )
    return map_tensors(batch, lambda x: x[:n] if x.ndim else x)
