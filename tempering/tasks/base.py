"""Base class of tasks: map batches to inputs and outputs to rows, and score students."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.rows import Rows
from tempering.teachers.base import Columns, Teacher
from tempering.utils.tensors import eval_mode, to_device

TeacherForward = Callable[[Any, Tensor | None], Any]  # (inputs, sample ids) -> the teacher's output
PolicyForward = Callable[[Rows], Any]  # rows -> their Temperatures


class NothingToScoreError(ValueError):
    """The batches hold nothing that can be scored, such as labels or boxes; others of the split may."""


class Task(ABC):
    """A kind of problem: all that depends on images, tokens or boxes in a run.

    ``features`` are the inputs of feature methods: name -> (student's module, teacher's module). ``distill`` extracts
    them and adds them to the last block of rows. ``comparable`` is whether a class has the same meaning on both sides.
    """

    features: Mapping[str, tuple[str, str]] = {}
    comparable: bool = True
    unit: str = "row"  # the word for a row in messages; scores of tokens include the perplexity
    # see ``training.method_fits``; "vectors" are embeddings, in the features of the rows
    predicts: Literal["classes", "pixels", "labels", "binary", "numbers", "vectors"] = "classes"
    splittable: bool = True  # whether rows are the same however a step is split; not with candidates of the batch
    remember: bool = True  # whether the teacher's outputs on the scored splits are small enough to be cached

    def prepare_model(self, model: nn.Module) -> None:
        """Prepare a model before its first forward, such as by a hook that unpacks ``inputs``."""
        return

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        """Return the student's inputs, the teacher's (the two views may differ), and sample ids (N,) or None."""

    @abstractmethod
    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        """Return the blocks of rows of two outputs; a teacher of None means a run without a teacher."""

    @abstractmethod
    def row_weights(self, batch: Any) -> Mapping[str, Tensor | float]:
        """Return block name -> total weight of its rows in this batch, known before the forward.

        Losses divide by its sum over the whole optimizer step, so micro-batches and ranks add up.
        """

    def scored_rows(self, student: Any, teacher: Any, batch: Any) -> tuple[Rows, Tensor | None]:
        """Return the rows of two outputs to score, and the teacher's most likely class of each; None: no teacher."""
        rows = self.rows(student, teacher, batch)[-1]
        return rows, None if teacher is None else rows.teacher.argmax(-1)

    @abstractmethod
    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Score the student on these batches: metric -> value."""

    def probability_cut(self, student: Any, teacher: Any, batch: Any) -> float | None:
        """Return the teacher's mean probability of classes that the student does not have; None if it has them all."""
        return None

    def headline(self) -> tuple[str, bool]:
        """Return the metric that selects the best epoch, and whether higher is better."""
        return "accuracy", True

    def analyze(
        self,
        student: nn.Module,
        batches: Iterable[Any],
        *,
        teacher: TeacherForward | None = None,
        temperatures: PolicyForward | None = None,
    ) -> dict[str, Any]:
        """Return the contents of the report beyond scores, JSON-serializable; {} if there are none.

        "scores" in it are added to the last epoch's scores of this split: metrics too expensive for each epoch.
        """
        return {}

    def examples(
        self, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward, most: int
    ) -> list[dict[str, Any]]:
        """Return the samples on which both models differ most, at most ``most``, JSON-serializable, for the report.

        See ``tasks.examples``; [] for tasks that show none.
        """
        return []

    def score_teacher(self, teacher: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Score the teacher as ``score`` does the student, at the end of a run; {} if its inputs are others."""
        for batch in batches:
            student_in, teacher_in, _ = self.inputs(batch)
            return self.score(teacher, batches) if student_in is teacher_in else {}
        return {}


def prepare_task(task: Task, student: nn.Module, teacher: Teacher | None) -> Task:
    """Let the task prepare all models, and return it; for a teacher that reads columns of the batch, a copy.

    Its ``inputs`` hands these columns to the teacher, in ``teachers.combined.Columns``, and to no model.
    """
    for model in (student, *(() if teacher is None else teacher.models)):
        task.prepare_model(model)
    return with_columns(task, teacher)


def with_columns(task: Task, teacher: Teacher | None) -> Task:
    """Return the task, or a copy whose ``inputs`` hands the columns that the teacher reads to it alone.

    Raises:
        ValueError: for a teacher whose outputs have no meaning for what the task predicts.
    """
    if teacher is None:
        return task
    teacher.check_predicts(task.predicts)
    if not teacher.columns:
        return task
    own, names = copy.copy(task), teacher.columns

    def inputs(batch: Any) -> tuple[Any, Any, Tensor | None]:
        columns = {name: batch[name] for name in names if isinstance(batch, Mapping) and name in batch}
        if len(columns) < len(names):
            missing = next(name for name in names if name not in columns)
            raise ValueError(
                f"the teacher reads the column {missing!r} of the batch, which it does not have. Batches are then "
                f"mappings with {missing!r}, one value per sample; keep it in the collator."
            )
        rest = {name: value for name, value in batch.items() if name not in names}
        student_in, teacher_in, ids = task.inputs(rest)
        return student_in, Columns(teacher_in, columns), ids

    own.inputs = inputs  # pyright: ignore[reportAttributeAccessIssue]
    return own


def tokenizer_of(data: Any) -> Any:
    """Return the tokenizer of a loader's student; None if it has none."""
    return getattr(data, "student_tokenizer", getattr(data, "tokenizer", None))


@contextmanager
def evaluating(student: nn.Module, batches: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Context manager that yields the batches on the student's device; the student is in eval mode in it."""
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    with eval_mode(student), torch.no_grad():
        yield (to_device(batch, device) for batch in batches)
