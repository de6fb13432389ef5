"""Checks of the first batches before training: one line if all pass, an error if one fails."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from tempering.methods.base import Method
from tempering.rows import Rows, class_indices, class_labels, is_labeled, without_labels
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.teachers.outputs import Sparse
from tempering.training.checkpoint import random_state, set_random_state
from tempering.training.config import Checked, Results, SelfCheckError
from tempering.training.distributed import from_all_processes, while_all, world_size
from tempering.utils.files import sha256_text
from tempering.utils.tensors import batch_digests, map_tensors

__all__ = [
    "Checked",
    "SelfCheckError",
    "batch_of_one",
    "check_student",
    "explain_batch_of_one",
    "independent_workers",
    "last_batch_size",
    "one_sample",
    "selfcheck",
    "whose_logits",
]

REPEAT_TOLERANCE = (
    1e-2  # tolerance of repeated forward passes, relative to the largest logit, for half precision on a GPU
)
MOST_CUT = 0.01  # largest mean probability of the teacher's classes that the student does not have
MOST_TRIED = 20  # batches to look for one that the student learns from
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORM_OF_ONE = "more than 1 value per channel"  # in torch's error for a batch norm of one value

Features = Callable[[], Mapping[str, tuple[Tensor, Tensor]]]


def selfcheck(
    student: nn.Module,
    teacher: Teacher | None,
    batch: Any,
    *,
    method: Method,
    task: Task,
    features: Features | None = None,
    more: Callable[[], Iterable[Any]] | None = None,
    single: str | None = None,
    workers: int = 0,
    skip: Collection[str] = (),
) -> Checked:
    """Check teacher, student and method on a batch, and restore all state, random state included.

    Args:
        features: the paired features of the last forward passes, for methods that compare them.
        more: returns the batches after this one, for checks that one batch does not decide; None: there are none.
        single: the batch of one sample, in words, if an epoch has one: batch norm cannot be trained on it.
        workers: number of processes that iterate over a data set on their own, see ``independent_workers``.
        skip: names of checks that are turned off.

    Raises:
        SelfCheckError: if a check fails.
        ValueError: for an unknown name in ``skip``.
    """
    from tempering.training.loss_checks import check_label_names, check_logits, check_loss

    results, models = Results(skip), _Models(student, teacher, task, features)

    def following() -> Iterable[Any]:
        return () if more is None else more()

    with _restored(student) as modes:
        if task.predicts != "classes" and results.wants("method"):
            from tempering.training.method_fits import check_method

            check_method(method, task)
            results["method"] = "ok"
        sizes = [(p.numel(), p.requires_grad) for p in student.parameters()]
        if (trained := sum(n for n, trains in sizes if trains)) < (count := sum(n for n, _ in sizes)):
            results["trained parameters"] = f"ok ({trained:,} of {count:,})"
        first = models.run(batch)
        blocks = first.blocks
        for rows in blocks:
            check_student(rows, results)
        if teacher is not None:
            _check_modes(teacher, method, results)
            if results.wants("label names"):
                for model in teacher.models:
                    check_label_names(student, model)
            _check_teacher_logits(teacher, task, first, results)
            if results.wants("logits"):
                check_logits(blocks)
            if method.teacher_is_student:
                results["above chance"] = "the teacher is a second student"
            elif results.wants("above chance"):
                _check_above_chance(models, first, following, results)
        if results.wants("row weights"):
            _check_row_weights(task, batch, blocks)
        if method.owns_step:
            results["loss"] = "the method owns its step"
        else:
            for rows in blocks:
                check_loss(method, rows, results, has_teacher=teacher is not None)
            if results.wants("can learn"):
                _check_can_learn(method, models, blocks, following, results)
        if results.wants("training mode"):
            _check_training_mode(models, modes, first, single, results)
        if workers > 1 and results.wants("workers"):
            _check_workers(batch, itertools.islice(following(), workers - 1), workers)
            results["workers"] = "ok"
    return Checked(dict(results))


class _Outputs(NamedTuple):
    """What both models return for a batch, the student in eval mode, and the blocks of rows of it."""

    batch: Any
    blocks: list[Rows]
    student: Any
    teacher: Any
    samples: int | None  # that the teacher draws
    repeat: Callable[[], Any]  # runs the teacher again on the same inputs


class _Models:
    """Both models, and how their outputs become rows."""

    def __init__(self, student: nn.Module, teacher: Teacher | None, task: Task, features: Features | None) -> None:
        self.student, self.teacher, self.task, self.features = student, teacher, task, features

    @torch.no_grad()
    def run(self, batch: Any) -> _Outputs:
        """Run both models on a batch."""
        student_inputs, teacher_inputs, ids = self.task.inputs(batch)

        def teach() -> Any:
            return None if self.teacher is None else self.teacher(teacher_inputs, ids)

        try:
            with _unchanged(teacher_inputs, "teacher"):
                teacher_output = teach()
            self.student.eval()
            with _unchanged(student_inputs, "student"):
                student_output = self.student(student_inputs)
        except (RuntimeError, TypeError) as error:
            from tempering.training.checks import explain_inputs

            explain_inputs(error, self.student, student_inputs)
            raise
        blocks = self.task.rows(student_output, teacher_output, batch)
        if self.features is not None:
            blocks[-1] = blocks[-1].replace(features={**blocks[-1].features, **self.features()})
        samples = None if self.teacher is None else self.teacher.samples
        return _Outputs(batch, blocks, student_output, teacher_output, samples, teach)


@contextmanager
def _unchanged(inputs: Any, side: str) -> Generator[None]:
    """Check that a forward pass does not change its inputs: the other model, and later epochs, get them too."""
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and not x.is_inference()]
    before = [x._version for x in tensors]
    yield
    if any(x._version != version for x, version in zip(tensors, before, strict=True)):
        raise SelfCheckError(
            f"the {side} changes its inputs in place, such as by x.sub_(mean) or a ReLU(inplace=True) that comes "
            "first, so the other model would get other inputs. Write x = x - mean, or nn.ReLU()."
        )


@contextmanager
def _restored(student: nn.Module) -> Generator[dict[nn.Module, bool]]:
    """Restore the student's modes and buffers, and the random state; the modes are the context's value."""
    saved, modes = random_state(), {module: module.training for module in student.modules()}
    # by name, since a forward pass may assign another tensor: self.count = self.count + 1
    named = dict(student.named_buffers())
    buffers = [(name, buffer, buffer.clone()) for name, buffer in named.items()]
    try:
        yield modes
    finally:
        with torch.no_grad():
            for name, buffer, value in buffers:
                path, _, own = name.rpartition(".")
                setattr(student.get_submodule(path), own, buffer.copy_(value))
        for module, mode in modes.items():
            module.training = mode
        set_random_state(saved)


def _check_training_mode(
    models: _Models, modes: Mapping[nn.Module, bool], first: _Outputs, single: str | None, results: Results
) -> None:
    """Check that the student runs in training mode, as it will, and that its outputs have a gradient path."""
    distributed = world_size() > 1
    student, task = models.student, models.task
    student.train()
    if modes[student]:  # parts that are in eval mode, such as a frozen norm, stay in it
        for module, mode in modes.items():
            module.training = mode
    try:
        with torch.set_grad_enabled(not distributed):  # a wrapper would wait for the backward pass
            blocks = task.rows(student(task.inputs(first.batch)[0]), first.teacher, first.batch)
    except ValueError as error:
        raise (SelfCheckError(batch_norm_text("the first batch")) if NORM_OF_ONE in str(error) else error) from error
    if single is not None and any(isinstance(m, BATCH_NORMS) and m.training for m in student.modules()):
        with torch.no_grad():
            try:
                student(task.inputs(one_sample(first.batch))[0])
            except Exception as error:  # a sample cut out of a batch of another structure may not fit the model
                if NORM_OF_ONE in str(error):
                    raise SelfCheckError(batch_norm_text(single)) from error
    sources = [x for rows in blocks for x in (rows.student, rows.task_loss) if x is not None]
    if models.features is None and not distributed and not any(x.requires_grad for x in sources):
        raise SelfCheckError(
            "the student's outputs have no gradient path to its parameters: nothing would be learned. Are they "
            "detached, computed under torch.no_grad(), or made of frozen parts only?"
        )
    if models.features is not None and all(p.requires_grad for p in student.parameters()):
        names = [name for name, (s, _) in models.features().items() if s.is_floating_point() and not s.requires_grad]
        if names and not distributed:
            raise SelfCheckError(
                f"the student's feature {names[0]!r} has no gradient path, so its loss would not reach the student. Is "
                "its module run under torch.no_grad(), or by torch.utils.checkpoint with use_reentrant=True? Write "
                "use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
    results["training mode"] = "ok"


def batch_norm_text(which: str) -> str:
    """Say that batch norm cannot be trained on a batch of one sample, and what to do."""
    return (
        f"{which} has one sample, and batch norm in training mode needs two. Give the loader drop_last=True or another "
        "batch size, or freeze the norm."
    )


def explain_batch_of_one(error: ValueError, which: str) -> None:
    """Raise what to do in place of torch's error for a batch of one sample; pass over any other error.

    Raises:
        ValueError: naming the batch.
    """
    if NORM_OF_ONE in str(error):
        raise ValueError(batch_norm_text(which)) from error


def _check_modes(teacher: Teacher, method: Method, results: Results) -> None:
    """Check that a live teacher is frozen and in eval mode."""
    if not (models := teacher.models):
        return
    if results.wants("teacher frozen"):
        if not method.teacher_is_student and any(p.requires_grad for model in models for p in model.parameters()):
            raise SelfCheckError("the teacher has parameters that require grad. Wrap it in teachers.Live(model).")
        results["teacher frozen"] = "the method trains it" if method.trains_teacher else "ok"
    if results.wants("in eval"):
        modules = [pair for model in models for pair in cast("list[tuple[str, nn.Module]]", [*model.named_modules()])]
        training = [name or "itself" for name, m in modules if m.training]
        if training:
            raise SelfCheckError(
                f"the teacher is in training mode ({training[0]}): its outputs depend on the batch and on dropout. "
                "Wrap it in teachers.Live(model), and do not call .train() on it."
            )
        results["in eval"] = "ok"


@torch.no_grad()
def _check_teacher_logits(teacher: Teacher, task: Task, first: _Outputs, results: Results) -> None:
    """Check that the teacher's logits are finite, equal in a second forward pass, and of the student's classes."""
    blocks = first.blocks
    for rows in blocks:
        if torch.isnan(rows.teacher).any() or torch.isposinf(rows.teacher).any():
            row = int((torch.isnan(rows.teacher) | torch.isposinf(rows.teacher)).any(-1).nonzero()[0])
            raise SelfCheckError(
                f"the teacher's logits hold NaN or infinity (first in row {row} of the first batch)"
                f"{whose_logits(teacher, task, first.batch)}. Is its checkpoint complete? Are its inputs normalized as "
                "in its training? Is its precision enough? Try precision='fp32'."
            )
    if results.wants("deterministic"):
        repeated = task.rows(first.student, first.repeat(), first.batch)
        if not all(_close(a.teacher, b.teacher) for a, b in zip(repeated, blocks, strict=True)):
            raise SelfCheckError(
                "the teacher's logits differ in a second forward pass of the same batch. Is dropout on, or is there "
                "random augmentation in the model? Wrap it in teachers.Live(model), or give it the inputs without "
                "augmentation."
            )
        results["deterministic"] = "ok"
    if isinstance(first.teacher, Sparse) and first.samples is not None:
        from tempering.teachers.selection import entropy_not_sampled

        excess = float(entropy_not_sampled(first.teacher, first.samples))
        results["samples"] = f"ok (the logged loss lies above the KL, by about {excess:.2g})"
    if results.wants("vocabulary"):
        cut = task.probability_cut(first.student, first.teacher, first.batch)
        if cut is None:
            return
        if cut > MOST_CUT:
            raise SelfCheckError(
                f"{100 * cut:.1f} % of the teacher's probability is on classes that the student does not have, so they "
                "would be cut off. Is the vocabulary that of another tokenizer, or vocabulary= too small? Give the "
                "student the teacher's tokens, or use tasks.CrossTokenizer(). skip_checks=['vocabulary'] skips this."
            )
        results["vocabulary"] = f"ok ({100 * cut:.2g} % of the teacher's probability is cut off)"


def whose_logits(teacher: Teacher | None, task: Task, batch: Any) -> str:
    """Return where NaN or infinity in logits come from, as text that follows: the inputs, or one of several teachers.

    "" if neither is known.
    """
    student_inputs, *theirs = task.inputs(batch)
    floats = [x for x in tree_leaves([student_inputs, theirs[0]]) if isinstance(x, Tensor) and x.is_floating_point()]
    if not all(bool(torch.isfinite(x).all()) for x in floats):
        return ", and so do the inputs of the batch"
    names = [] if teacher is None else teacher.nonfinite_parts(*theirs)
    return f", those of the teacher {', '.join(map(repr, names))}" if names else ""


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether logits of two forward passes agree."""
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return not len(a) or bool((a - b).abs().max() <= REPEAT_TOLERANCE * a.abs().max())


def _check_above_chance(
    models: _Models, first: _Outputs, following: Callable[[], Iterable[Any]], results: Results
) -> None:
    """Check that the accuracy of every teacher is above chance; it is not for shuffled classes or broken weights."""
    from tempering.training.teacher_check import above_chance

    teacher, task = models.teacher, models.task
    assert teacher is not None
    if not task.comparable or not teacher.trained:
        results["above chance"] = (
            "the teacher is not trained yet" if task.comparable else "the two have classes of their own"
        )
        return

    def counts(models: _Models, first: Callable[[], _Outputs]) -> Iterator[tuple[Rows, Tensor | None, Any]]:
        for outputs in itertools.chain([first()], map(models.run, following())):
            yield *task.scored_rows(outputs.student, outputs.teacher, outputs.batch), outputs

    def of_all() -> Iterator[tuple[Rows, Tensor | None]]:
        return ((rows, top) for rows, top, _ in counts(models, lambda: first))

    def of(name: str) -> Iterator[tuple[Rows, Tensor | None]]:
        """Count the hits of one of several teachers, on the samples that it answers."""
        alone, answers = teacher.alone(name), models
        if alone is not None:
            answers = _Models(models.student, alone, task, None)
        for rows, top, outputs in counts(answers, lambda: first if alone is None else answers.run(first.batch)):
            if alone is None and rows.target is not None:
                _, inputs, ids = task.inputs(outputs.batch)
                owners = task.rows(outputs.student, teacher.owners(inputs, ids, outputs.teacher), outputs.batch)[-1]
                others = owners.teacher[:, 0] != list(teacher.parts).index(name)
                rows = rows.replace(target=without_labels(rows.target, others))
            yield rows, top

    results["above chance"] = above_chance(teacher.identity, of_all, "the teacher")
    for name in teacher.active if len(teacher.active) > 1 else ():
        identity = sha256_text(f"{teacher.identity} {name}")
        results["above chance"] += f"; {name}: {above_chance(identity, partial(of, name), f'the teacher {name!r}')}"


def _check_row_weights(task: Task, batch: Any, blocks: list[Rows]) -> None:
    """Check that ``task.row_weights()`` is the total weight of the rows that ``task.rows()`` returns."""
    declared = task.row_weights(batch)
    for rows in blocks:
        if rows.name not in declared:
            raise SelfCheckError(
                f"{type(task).__name__}.row_weights() does not have the block {rows.name!r} that rows() returns."
            )
        got, expected = float(rows.total_weight), float(declared[rows.name])
        if abs(got - expected) > 1e-3 * max(1.0, got):
            raise SelfCheckError(
                f"{type(task).__name__}.row_weights() is {expected:g} for the block {rows.name!r}, but rows() has "
                f"{got:g}: the loss would change with the batch split."
            )


def check_student(rows: Rows, results: Results) -> None:
    """Check labels and the student's logits."""
    if rows.target is not None and len(rows):
        target = class_indices(class_labels(rows.target).cpu(), "the task")
        labels = int(is_labeled(target).sum())
        if 0 < labels < len(target) and rows.weight is None and rows.task_loss is None:
            results["labels"] = f"ok ({len(target) - labels} of {len(target)} rows have none: learned from the teacher)"
        if (largest := int(target.max())) >= rows.student.shape[1]:
            raise SelfCheckError(
                f"label {largest} is out of range for {rows.student.shape[1]} classes (the first is 0). "
                "Is the student's head too small, or do labels start at 1?"
            )
    if torch.isnan(rows.student).any():
        raise SelfCheckError("the student's logits hold NaN on the first batch. Are the inputs finite and normalized?")


def _check_can_learn(
    method: Method, models: _Models, blocks: list[Rows], following: Callable[[], Iterable[Any]], results: Results
) -> None:
    """Check that the loss of one of the first batches can move the student."""
    from tempering.training.loss_checks import moves_student, teacher_matters, why_nothing_moves

    tried = 1
    moves = any(from_all_processes(moves_student(method, blocks)))
    for batch in () if moves else while_all(itertools.islice(following(), MOST_TRIED)):
        blocks = models.run(batch).blocks
        moves, tried = any(from_all_processes(moves_student(method, blocks))), tried + 1
        if moves:
            break
    if not moves:
        where = "the first batch" if tried == 1 else f"the first {tried} batches"
        raise SelfCheckError(
            f"nothing can be learned here: the gradient of {type(method).__name__}'s loss is 0 on {where}. "
            f"{why_nothing_moves(blocks)}"
        )
    results["can learn"] = "ok"
    if models.teacher is not None and method.needs_teacher and results.wants("teacher effect"):
        results["teacher effect"] = "ok"
        if not any(from_all_processes(teacher_matters(method, blocks))):
            results["teacher effect"] = "none"
            warnings.warn(
                f"the teacher has no effect: with another one, the loss of {type(method).__name__} would have the same "
                "gradient. Are the weights of all terms that use it 0, such as soft=0? Give one of them a weight, or "
                "train without a teacher by methods.Supervised(). skip_checks=['teacher effect'] skips this.",
                stacklevel=2,
            )


def _check_workers(first: Any, others: Iterable[Any], workers: int) -> None:
    """Check that the first batches, one of each worker, are not all the same."""
    want, others = batch_digests(first), list(others)
    if want and len(others) == workers - 1 and all(batch_digests(batch) == want for batch in others):
        raise SelfCheckError(
            f"the first {workers} batches, one of each worker, are equal to the bit: each of the {workers} workers "
            f"reads the whole data set, and every sample would be learned {workers} times. Split it in __iter__: "
            "info = torch.utils.data.get_worker_info(), then itertools.islice(samples, info.id, None, "
            "info.num_workers) if info is not None; or give the loader num_workers=1. skip_checks=['workers'] skips "
            "this."
        )


def independent_workers(batches: Any) -> int:
    """Return the number of workers of which each iterates over the data set of a loader itself; 0: it is split."""
    return batches.num_workers if isinstance(getattr(batches, "dataset", None), IterableDataset) else 0


def last_batch_size(batches: Any) -> int | None:
    """Return the number of samples in the last batch of an epoch; None if that is full, or the loader does not tell."""
    if getattr(batches, "drop_last", False):
        return None
    size, batch_size = getattr(batches, "size", None), getattr(batches, "batch_size", None)
    if isinstance(batches, DataLoader):
        loader, inner = cast("Any", batches), cast("Any", batches).batch_sampler
        part: Any = inner if type(inner) is BatchSampler else loader
        size = len(part.sampler) if not part.drop_last and hasattr(part.sampler, "__len__") else None
        batch_size = part.batch_size
    world: int = getattr(batches, "world", 1)  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(size, int) or not isinstance(batch_size, int) or size < world:
        return None
    last = size % batch_size
    # fewer samples than processes are dropped
    return batch_size // world if last < world else last // world


def batch_of_one(batches: Any) -> str | None:
    """Return which batch of an epoch has one sample, in words; None if there is none, or the loader does not tell."""
    stored: Any = getattr(batches, "batch_sampler", batches)
    if not isinstance(stored, Sequence):
        return "the last batch of an epoch" if last_batch_size(batches) == 1 else None
    parts = cast("Sequence[Any]", stored)
    sizes = map(samples_of, parts) if stored is batches else map(len, parts)
    number = next((i for i, size in enumerate(sizes, 1) if size == 1), None)
    return None if number is None else f"batch {number} of {len(parts)} of an epoch"


def samples_of(batch: Any) -> int | None:
    """Return the number of samples of a batch, that of its first tensor; None without one."""
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), None)


def one_sample(batch: Any) -> Any:
    """Return the first sample of a batch, as a batch."""
    sizes = list[int]()
    map_tensors(batch, lambda x: sizes.append(len(x) if x.ndim else 0) or x)
    return map_tensors(batch, lambda x: x[:1] if x.ndim and len(x) == sizes[0] else x)
