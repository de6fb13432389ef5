"""Checks of outputs, and of a method's loss: what must not change it, its gradients, whether it moves the student."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.rows import FIELDS, Rows, is_labeled, rows_per_sample, total, upcast_to_float32, without_labels
from tempering.training.config import Results, SelfCheckError

LOSS_TOLERANCE = 1e-4  # relative tolerance of losses, for float32 and a few thousand classes


def check_loss(method: Method, rows: Rows, results: Results, *, has_teacher: bool) -> None:
    """Check the method's loss and gradients on a block of rows, and add to ``results``.

    The soft terms are 0 for a student equal to the teacher, splitting the batch, shifting logits and adding rows of
    weight 0 do not change the loss, and gradients are finite.
    """
    rows = _leaves(rows)

    def loss(rows: Rows, normalizer: float | None = None) -> float:
        with torch.no_grad():
            return float(total(_terms(copy.deepcopy(method), rows), rows, normalizer=normalizer))

    name, weight, reference = type(method).__name__, float(rows.total_weight), loss(rows)
    if not math.isfinite(reference):
        raise SelfCheckError(
            f"{name}: the loss of the first batch is {reference}. Inspect the logits of both models on it."
        )
    if has_teacher and method.zero_when_equal and results.wants("zero at agreement"):
        _check_zero_when_equal(method, rows)
        results["zero at agreement"] = "ok"

    def check_equal(check: str, got: float, reason: str) -> None:
        # "not <=" rather than ">", to catch NaN
        if not abs(got - reference) <= LOSS_TOLERANCE * (1.0 + abs(reference)):
            raise SelfCheckError(f"{name}: the loss is {reference:.6g}, and {got:.6g} {reason}")
        results[check] = "ok"

    if method.is_batch_dependent() or len(rows) < 2:
        results["split"] = "rows are compared with each other" if len(rows) > 1 else "one row"
    else:
        if results.wants("same when split"):
            half = len(rows) // 2
            if (per := rows_per_sample(rows)) > 1:  # samples are not cut
                half = max(1, len(rows) // per // 2) * per
            parts = (rows.select(slice(None, half)), rows.select(slice(half, None)))
            split = sum(loss(part, weight) for part in parts)
            reason = f"when the batch is split in two. Is {name} a method with relational = True?"
            check_equal("same when split", split, reason)
        if results.wants("same when padded"):
            padded = "with rows of weight 0 added: leave them out, or weight the terms of every sum over rows."
            check_equal("same when padded", loss(_padded(rows)), padded)
    if not (all(p.shift_invariant for p in method.policies().values()) and method.shift_invariant):
        results["shift"] = "its temperatures move with a shift of the logits"
    elif results.wants("same when shifted"):
        shifted = rows.replace(student=rows.student + 3.0, teacher=rows.teacher - 5.0)
        check_equal(
            "same when shifted", loss(shifted), "with a constant added to the logits, which does not change softmax."
        )
    if results.wants("finite gradients"):
        _check_gradients(method, rows)
        results["finite gradients"] = "ok"


def check_logits(blocks: Sequence[Rows]) -> None:
    """Check that neither side has probabilities: their softmax would be taken again, and is nearly uniform.

    Labels as one-hot rows are not refused: they may be meant as logits.
    """
    for rows in blocks:
        for side, z in (("teacher", rows.teacher), ("student", rows.student)):
            z = z if rows.weight is None else z[rows.weight > 0]
            if z.shape[1] < 2 or not len(z) or bool((z.amax(1) == 1).all()):
                continue
            if bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() < 1e-3).all()):
                raise SelfCheckError(
                    f"the {side}'s outputs are probabilities (not negative, with the sum 1), and logits are needed: "
                    "softmax would be taken twice. Leave out the model's last softmax, or return probabilities.log(). "
                    "skip_checks=['logits'] skips this."
                )


def check_label_names(student: nn.Module, teacher: nn.Module | None) -> None:
    """Check that models of transformers with the same label names have them in the same order.

    Raises:
        SelfCheckError: if they do not.
    """
    ours, theirs = _label_names(student), _label_names(teacher)
    if ours == theirs or sorted(ours.values()) != sorted(theirs.values()):
        return
    first = next(i for i in sorted(ours) if ours[i] != theirs.get(i))
    raise SelfCheckError(
        f"the two models have the same labels in another order: class {first} is {ours[first]!r} for the student and "
        f"{theirs.get(first)!r} for the teacher (config.id2label). Build the student with the teacher's id2label and "
        "label2id, and give the data those labels. skip_checks=['label names'] skips this."
    )


def _label_names(model: nn.Module | None) -> dict[int, str]:
    """Return config.id2label of a model of transformers, in any wrappers; {} if there is none."""
    modules = cast("Iterable[nn.Module]", () if model is None else model.modules())
    configs = (getattr(module, "config", None) for module in modules)
    found = cast("list[dict[Any, Any] | None]", [getattr(config, "id2label", None) for config in configs])
    return {int(i): str(name) for i, name in (next(filter(None, found), None) or {}).items()}


def moves_student(method: Method, blocks: Sequence[Rows]) -> bool:
    """Return whether the loss of these rows has a gradient in the student, which is first moved off the teacher."""
    return any(bool(g.any()) for rows in blocks for g in _gradients(method, rows))


def teacher_matters(method: Method, blocks: Sequence[Rows]) -> bool:
    """Return whether another teacher would give the loss of these rows another gradient in the student."""
    for rows in blocks:
        other = rows.replace(
            teacher=_moved(rows.teacher, 1),
            features={name: (s, _moved(t, 1)) for name, (s, t) in rows.features.items()},
            teacher_loss=None if rows.teacher_loss is None else torch.full_like(rows.teacher_loss, torch.inf),
        )
        pairs = itertools.zip_longest(_gradients(method, rows), _gradients(method, other))
        if any(a is None or b is None or not torch.equal(a, b) for a, b in pairs):
            return True
    return False


def _gradients(method: Method, rows: Rows) -> Iterator[Tensor]:
    """Yield the gradients of the loss in what the student gives, which is moved, in the course of a run."""
    rows = _leaves(rows)
    features = {name: (_moved(s.detach()), t) for name, (s, t) in rows.features.items()}
    hard = None if rows.task_loss is None else rows.task_loss.clone()
    probe = rows.replace(student=_moved(rows.student), features=features, task_loss=hard)
    given = [probe.student, *(s for s, _ in features.values()), *([] if hard is None else [hard])]
    leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
    for progress in (1.0, 0.5):  # a weight may be 0 at the end of the run
        with torch.enable_grad():
            loss = total(_terms(copy.deepcopy(method), probe, progress), probe)
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        yield from (g for g in cast("Sequence[Tensor | None]", gradients) if g is not None)


def _moved(x: Tensor, seed: int = 0) -> Tensor:
    """Return a copy with noise of a tenth of the mean size; integers stay."""
    if not x.is_floating_point():
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    return x + 0.1 * (1.0 + x.masked_fill(~x.isfinite(), 0.0).abs().mean()) * noise


def why_nothing_moves(blocks: Sequence[Rows]) -> str:
    """Return the likeliest reason for a loss without gradient in the student."""
    targets = [rows.target for rows in blocks if rows.target is not None and rows.task_loss is None]
    if not sum(len(rows) for rows in blocks):
        return "The batch has no rows. Does a filter of the data, or of the task, remove all of them?"
    if not any(float(rows.total_weight) for rows in blocks):
        return "No row has weight: is everything masked or padding, or are all labels -100?"
    if all(rows.student.shape[1] < 2 and rows.task_loss is None for rows in blocks):
        return (
            "The logits have one class, of which every divergence and cross entropy is 0. The logit z of a binary "
            "classifier is two classes, see tasks.Binary. For regression, give the rows its loss as task_loss, see "
            "tasks.Regression."
        )
    if targets and not any(bool(is_labeled(target).any()) for target in targets):
        return (
            "No row has a label (-100 and -1 mean unlabeled), and the method learns from nothing else. Are the labels "
            "masked by mistake? A method with a teacher learns without labels: methods.KD(hard=0.0)."
        )
    return "All terms have weight 0, or do not depend on the student on these rows. See its arguments."


def _leaves(rows: Rows) -> Rows:
    """Return the rows without a graph, in at least float32."""
    hard = None if rows.task_loss is None else upcast_to_float32(rows.task_loss.detach())
    student, teacher = upcast_to_float32(rows.student.detach()), upcast_to_float32(rows.teacher)
    return rows.replace(student=student, teacher=teacher, task_loss=hard)


def _terms(method: Method, rows: Rows, progress: float = 1.0) -> dict[str, Tensor]:
    """Compute the terms with a fixed seed; the method has to be a copy, because it may store rows."""
    torch.default_generator.manual_seed(0)
    if rows.student.is_cuda:
        torch.cuda.manual_seed_all(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run warns
        return method(rows, progress)


def _check_zero_when_equal(method: Method, rows: Rows) -> None:
    """Check that the soft terms of a student equal to the teacher are 0."""
    features = {name: (t, t) for name, (_, t) in rows.features.items()}
    # without privacy scores, since private rows may have other targets, and without rewards; the reference agrees too
    others: dict[str, Any] = {"features": features, "privacy_score": None}
    others |= {} if rows.reward is None else {"reward": torch.zeros_like(rows.reward)}
    others |= {} if rows.reference is None else {"reference": rows.teacher}
    with torch.no_grad():
        terms = _terms(copy.deepcopy(method), rows.replace(student=rows.teacher, **others))
    kept = slice(None) if rows.weight is None else rows.weight > 0
    soft = {k: v[kept].abs().max().item() for k, v in terms.items() if not k.endswith("hard") and len(v[kept])}
    if not all(v <= LOSS_TOLERANCE for v in soft.values()):
        values = ", ".join(f"{k} = {v:.3g}" for k, v in soft.items())
        raise SelfCheckError(
            f"{type(method).__name__}: the loss of a student equal to its teacher is not 0; the largest terms of a "
            f"row: {values}. If this is intended, set zero_when_equal = False."
        )


def _check_gradients(method: Method, rows: Rows) -> None:
    """Check that gradients reach the student, and that all gradients are finite."""
    with torch.enable_grad():
        student = rows.student.clone().requires_grad_()
        features = {n: (s.detach().clone().requires_grad_(), t) for n, (s, t) in rows.features.items()}
        hard = None if rows.task_loss is None else rows.task_loss.clone().requires_grad_()
        rows, method = rows.replace(student=student, features=features, task_loss=hard), copy.deepcopy(method)
        leaves = {"the student's logits": student} | {f"the feature {n!r}": s for n, (s, _) in features.items()}
        leaves |= {} if hard is None else {"the task's own losses": hard}
        leaves |= {f"its own {n}": p for n, p in method.named_parameters() if p.requires_grad}
        loss = total(_terms(method, rows), rows)
        if not loss.requires_grad:
            raise SelfCheckError(
                f"{type(method).__name__}: no gradient reaches the student. Is it detached, or computed under no_grad?"
            )
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, cast("Sequence[Tensor | None]", gradients), strict=True):
        if gradient is None or torch.isfinite(gradient).all():
            continue
        position = ""
        if not name.startswith("its own"):
            position = f", first in row {int((~torch.isfinite(gradient)).view(len(gradient), -1).any(1).nonzero()[0])}"
        raise SelfCheckError(
            f"{type(method).__name__}: the gradient in {name} is not finite on the first batch{position}. If classes "
            "are masked, mask them on both sides."
        )


def _padded(rows: Rows, extra: int = 2) -> Rows:
    """Append copies of the last ``extra`` samples with weight 0 and changed values."""
    extra *= rows_per_sample(rows)
    weight = torch.ones(len(rows), device=rows.student.device) if rows.weight is None else rows.weight
    rows = rows.replace(weight=weight)
    tail = rows.select(slice(-extra, None))
    tail = tail.replace(
        student=tail.student.flip(-1),
        teacher=-tail.teacher.flip(-1),
        target=None if tail.target is None else without_labels(tail.target),
        weight=torch.zeros_like(weight[-extra:]),
        task_loss=None if tail.task_loss is None else -tail.task_loss,
    )
    fields = {n: torch.cat((x, getattr(tail, n))) for n in FIELDS if (x := getattr(rows, n)) is not None}
    both = {n: (rows.features[n], tail.features[n]) for n in rows.features}
    return rows.replace(
        **fields, features={n: (torch.cat((s, u)), torch.cat((t, v))) for n, ((s, t), (u, v)) in both.items()}
    )
