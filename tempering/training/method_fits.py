"""Check that a method has a meaning for what a task predicts: pixels, labels, one logit, numbers, or embeddings."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tempering.methods.base import Method
from tempering.rows import Rows, binary_logits
from tempering.tasks.base import Task
from tempering.training.config import SelfCheckError

ONLY_SIGNS = (
    "of one logit, on both sides, it sees the sign alone: its terms are 0 wherever student and teacher have the same "
    "one, however far apart they are, since its temperatures or its norm take the size away. Use "
    "methods.KD(temperature=4.0), or methods.DTKD(), whose plain KD term remains."
)


def check_method(method: Method, task: Task) -> None:
    """Check every part of a method for the rows of a task that does not predict one class per sample.

    Raises:
        SelfCheckError: naming the part that has no meaning there.
    """
    for part in [m for m in method.modules() if isinstance(m, Method)]:
        if (reason := _why_not(part, task)) is not None:
            raise SelfCheckError(
                f"{type(part).__name__} does not suit tasks.{type(task).__name__}: {reason} skip_checks=['method'] "
                "skips this check."
            )


def _why_not(part: Method, task: Task) -> str | None:
    """Return why a method has no meaning for a task's rows; None if it has."""
    binary = task.predicts in ("labels", "binary")
    if any(inner is not part and isinstance(inner, Method) for inner in part.modules()):
        return ONLY_SIGNS if binary and sees_only_signs(part) else None  # flags are those of its parts
    if task.predicts == "vectors" and not hasattr(part, "wants"):  # an attribute of methods over features
        return (
            "it compares logits or numbers, and these are embeddings. Use methods.EmbeddingKD(), or another method "
            "over features that are vectors, such as methods.RKD(). Similarities are numbers in tasks.Similarity(), "
            "and logits in tasks.Ranking()."
        )
    several = task.predicts in ("pixels", "labels")
    if task.predicts == "numbers" and (part.of_classes or part.owns_step):
        return (
            "it reads outputs as logits of classes, and these are numbers. Use methods.RegressionKD(), methods over "
            "features, or methods.Supervised()."
        )
    if several and part.owns_step:
        return "it runs the models itself, on one row per sample. Use a method over rows, such as methods.KD()."
    if task.predicts == "pixels" and part.pairwise:
        return "it compares every row with every other, in memory of N^2, and rows are pixels. Use methods.KD()."
    if task.predicts == "labels" and part.relational and part.of_classes:
        return (
            "it compares rows with each other, and a row is a pair of a sample and a label. Use methods.KD(), or a "
            "relational method over features."
        )
    if binary and part.of_classes and not part.owns_step and sees_only_signs(part):
        return ONLY_SIGNS
    return None


def sees_only_signs(method: Method) -> bool:
    """Return whether all soft terms are 0 on rows of one logit each that has the same sign on both sides."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(16)
    student, teacher = (binary_logits(sign * (0.5 + torch.rand(32, generator=generator))) for _ in range(2))
    rows = Rows(student, teacher, (sign > 0).long(), ids=torch.arange(32))
    terms = _terms(copy.deepcopy(method).cpu().double(), rows)
    soft = [term for name, term in terms.items() if not name.endswith("hard")]
    return bool(soft) and all(bool((term.abs() < 1e-5).all()) for term in soft)


@torch.no_grad()
def _terms(method: Method, rows: Rows) -> dict[str, Tensor]:
    method.setup(rows)
    return method(rows, 1.0)
