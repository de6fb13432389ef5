"""Evaluate a run: scores of the splits, the best epoch, early stopping, and the final analysis."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.rows import Rows
from tempering.tasks.base import NothingToScoreError, Task
from tempering.teachers.base import Teacher
from tempering.training.checkpoint import random_state, set_random_state
from tempering.training.config import SelfCheckError, TrainState
from tempering.training.resumable_loader import DATALOADER_PARTS, require_reiterable
from tempering.utils.tensors import on_host


class Evaluator:
    """Score the student on the evaluation splits.

    Args:
        splits: name -> batches; None: there is no such split. "validation" selects the best epoch, or "test" if
            there is no validation split.
        teacher: scores may compare the student with it; None for a run without a teacher.
        cache_teacher: whether to keep the teacher's outputs on the splits from one evaluation to the next.
        patience: number of evaluations without improvement after which to stop; None: never.

    Attributes:
        best_by: the score that selects the best epoch, "<split>/<metric>"; None without a split to select by.

    Raises:
        ValueError: for a split that is an iterator, or a patience without a score.
    """

    def __init__(
        self,
        task: Task,
        splits: Mapping[str, Iterable[Any] | None],
        teacher: Teacher | None,
        *,
        device: torch.device,
        cache_teacher: bool,
        patience: int | None,
    ) -> None:
        self.task, self.device, self.patience = task, device, patience
        self.splits = {name: batches for name, batches in splits.items() if batches is not None}
        for name, batches in self.splits.items():
            require_reiterable(name, batches)
        # a cache of the training set has no other split, and would return outputs of training samples
        sources = (
            {} if teacher is None else {name: teacher.for_batches(batches) for name, batches in self.splits.items()}
        )
        self.teachers = {
            name: CachedTeacherOutputs(source.to(device), enabled=cache_teacher)
            for name, source in sources.items()
            if source is not None
        }
        metric, self.higher_is_better = task.headline()
        self.best_by = next((f"{name}/{metric}" for name in ("validation", "test") if name in self.splits), None)
        if patience is not None and self.best_by is None:
            raise ValueError("patience= needs a score to stop by, and there is no split to score: give validation=.")

    def score(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Score the model on every split: split -> metric -> value."""
        return {
            name: self.task.score(model, batches, teacher=self._teacher(name)) for name, batches in self.splits.items()
        }

    def select_best(self, state: TrainState, value: float) -> bool:
        """Compare ``value``, the score ``best_by``, with the best so far; return whether it is better.

        Updates ``state``: the best evaluation, how many evaluations ago it was, and whether the run should stop.
        """
        best = state.best_value
        better = best is None or math.isnan(best) or (value > best if self.higher_is_better else value < best)
        improved = best is None or (better and not math.isnan(value))
        if improved:
            state.best_value, state.best, state.stale = value, state.last, 0
        else:
            state.stale += 1
        state.stopped = self.patience is not None and state.stale >= self.patience
        return improved

    def check(self, model: nn.Module, method: Method) -> None:
        """Score and analyze the first batch of every split that holds something to score, as the run will.

        Raises:
            NothingToScoreError: for a split without anything to score.
            SelfCheckError: for a split without the score that selects the best epoch.
        """
        saved, method = random_state(), copy.deepcopy(method).eval() if method.policies() else method
        try:
            for name, batches in self.splits.items():
                with generators_restored(batches):
                    scores = self._check_split(name, model, method, batches)
                metric = self.task.headline()[0]
                if self.best_by == f"{name}/{metric}" and not math.isfinite(scores.get(metric, math.nan)):
                    raise SelfCheckError(
                        f"{type(self.task).__name__}.score() of the {name} split has no finite {metric!r}, which "
                        f"headline() selects the best epoch by; got {scores}."
                    )
        finally:
            set_random_state(saved)

    def _check_split(self, name: str, model: nn.Module, method: Method, batches: Iterable[Any]) -> dict[str, float]:
        """Score and analyze one batch of a split, the first that can be scored; return its scores."""
        teacher = self.teachers[name].teacher if name in self.teachers else None
        reason: Exception | None = None
        for batch in batches:
            one = _OneBatch(batches, batch)
            try:
                scores = self.task.score(model, one, teacher=teacher)
            except NothingToScoreError as error:
                reason = error
                continue
            self._analyze(model, method, one, teacher)
            return scores
        why = reason or "there is nothing to score: the loader yields no batches. Is the split empty?"
        raise NothingToScoreError(f"the {name} split: {why}") from reason

    def _analyze(self, model: nn.Module, method: Method, batches: Iterable[Any], teacher: Any) -> dict[str, Any]:
        policy = next(iter(method.policies().values()), None)
        temperatures = None if policy is None else temperatures_on_cpu(policy, self.device)
        return self.task.analyze(model, batches, teacher=teacher, temperatures=temperatures)

    def analyze(self, model: nn.Module, method: Method, state: TrainState) -> dict[str, Any]:
        """Analyze the finished student on the test split, or on the first split; {} without splits or results.

        Scores in the analysis are added to the last evaluation in ``state``.
        """
        name = self._analyzed
        if name is None:
            return {}
        analysis = self._analyze(model, method.eval(), self.splits[name], self._teacher(name))
        (state.last or {}).get(name, {}).update(analysis.pop("scores", {}))
        return {"split": name, **analysis} if analysis else {}

    def compare_models(self, model: nn.Module, analysis: dict[str, Any], most: int) -> dict[str, Any]:
        """Add to the analysis the teacher's scores and ``most`` examples on which both models differ; for records.

        An error in it is recorded in their place: a finished run is not lost for it.
        """
        name = analysis.get("split") or self._analyzed
        if name is None or name not in self.teachers:
            return analysis
        teacher, task, batches = self.teachers[name].teacher, self.task, self.splits[name]
        network = None if getattr(teacher, "parts", None) else getattr(teacher, "model", None)
        more: dict[str, Callable[[], Any]] = {"examples": lambda: task.examples(model, batches, teacher, most)}
        if isinstance(network, nn.Module):
            more["teacher_scores"] = lambda: task.score_teacher(network, batches)
        added: dict[str, Any] = {}
        for key, compute in more.items():
            try:
                added[key] = compute()
            except Exception as error:
                added[f"{key}_error"] = f"{type(error).__name__}: {error}"[:200]
        added = {key: value for key, value in added.items() if value}
        return {"split": name, **analysis, **added} if added else analysis

    @property
    def _analyzed(self) -> str | None:
        return "test" if "test" in self.splits else next(iter(self.splits), None)

    def _teacher(self, split: str) -> CachedTeacherOutputs | None:
        return self.teachers[split].reset() if split in self.teachers else None


class _OneBatch:
    """One batch in place of a split, with the split's attributes, such as ``class_names``."""

    def __init__(self, split: Iterable[Any], batch: Any) -> None:
        self._split, self._batch = split, batch

    def __iter__(self) -> Iterator[Any]:
        return iter([self._batch])

    def __len__(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)


@contextmanager
def generators_restored(batches: Iterable[Any]) -> Generator[None]:
    """Restore the state of the generators that a DataLoader draws from."""
    parts = [batches, *(getattr(batches, name, None) for name in DATALOADER_PARTS)]
    generators = {g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)}
    states = {g: g.get_state() for g in generators}
    try:
        yield
    finally:
        for generator, state in states.items():
            generator.set_state(state)


class CachedTeacherOutputs:
    """Cache a teacher's outputs on a fixed, unshuffled split, so that it runs once and not at every evaluation.

    Outputs are cached by position and sample ids; batches without ids are not cached, nor is a split in which an id
    occurs twice: they are no ids of samples, such as the number of a group, and another order may have the same.

    Args:
        enabled: False for a teacher that is trained during the run, or whose outputs are too large to keep.
    """

    def __init__(self, teacher: Callable[[Any, Tensor | None], Any], *, enabled: bool = True) -> None:
        self.teacher, self.enabled = teacher, enabled
        self.outputs: list[tuple[Tensor, Any]] = []  # sample ids and outputs of each batch
        self.seen: set[int] = set()  # ids
        self.position = 0

    def reset(self) -> CachedTeacherOutputs:
        """Start at the first batch again."""
        self.position = 0
        return self

    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        """Return the teacher's outputs for the next batch."""
        position, self.position = self.position, self.position + 1
        if ids is None or not self.enabled:
            return self.teacher(inputs, ids)
        if position < len(self.outputs) and torch.equal(*on_host((self.outputs[position][0], ids))):
            return self.outputs[position][1]
        output = self.teacher(inputs, ids)
        if position == len(self.outputs):
            new: list[int] = on_host(ids).tolist()
            self.enabled = len({*new}) == len(new) and self.seen.isdisjoint(new)
            self.outputs = [*self.outputs, (ids, output)] if self.enabled else []
            self.seen.update(new)
        return output


def temperatures_on_cpu(policy: Callable[[Rows], Any], device: torch.device) -> Callable[[Rows], Any]:
    """Wrap a policy on ``device`` to take rows on the CPU and return temperatures on the CPU."""

    def call(rows: Rows) -> Any:
        target = None if rows.target is None else rows.target.to(device)
        T = policy(rows.replace(student=rows.student.to(device), teacher=rows.teacher.to(device), target=target))
        return type(T)(*(None if x is None else x.detach().cpu() for x in T))

    return call
