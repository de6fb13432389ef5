"""Show which samples a temperature policy treats as hard: per-sample temperatures against the student's loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.audits.base import Finding
from tempering.audits.intervals import correlation
from tempering.rows import Rows
from tempering.temperature.base import Policy
from tempering.temperature.sharpness import Sharpness

PARTS = 5
EXTREMES = 5  # samples listed at either end
STANDARD = 4.0  # tau if the run's policy is unknown


class Hardness(NamedTuple):
    """Temperatures and loss per sample, (N,) each, in float64, and a description of the policy."""

    student: Float[Tensor, " N"]
    teacher: Float[Tensor, " N"]
    loss: Float[Tensor, " N"]
    policy: str


def hardness(
    policy: Policy | None, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"], y: Int[Tensor, " N"]
) -> Hardness:
    """Return the temperatures of these rows at the end of the run; with ``Sharpness(4.0)`` if there is no policy."""
    used = Sharpness(STANDARD) if policy is None else copy.deepcopy(policy).cpu().eval()
    rows = Rows(student.float(), teacher.float(), y)
    with torch.no_grad():
        T = used(rows, 1.0)
    loss = torch.nn.functional.cross_entropy(student, y, reduction="none")
    items = used.hyperparameters().items()
    arguments = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in items)
    description = f"{type(used).__name__}({arguments})"
    description += ", used in training" if policy is not None else ", not used in training"
    T_student, T_teacher = (side.expand(len(y), 1).flatten().double() for side in (T.student, T.teacher))
    return Hardness(T_student, T_teacher, loss.double(), description)


def findings(result: Hardness, ids: Sequence[int]) -> list[Finding]:
    """Return the rank correlation of each side's temperature with the student's loss, and the extreme samples."""
    out = []
    for side, T in (("student", result.student), ("teacher", result.teacher)):
        meaning = (
            f"Rank correlation of the {side}'s temperature with the student's loss on the label: above 0, samples that "
            f"are hard for the student are softened more on this side. Temperatures are those of {result.policy}."
        )
        out.append(correlation("temperature_difficulty", side, T, result.loss, meaning))
    if float(result.student.max() - result.student.min()) < 1e-6:
        return out
    order = torch.argsort(result.student, stable=True).tolist()
    for name, indices in (("highest", order[::-1][:EXTREMES]), ("lowest", order[:EXTREMES])):
        samples = "; ".join(
            f"id {ids[i]} (T {float(result.student[i]):.2f} and {float(result.teacher[i]):.2f}, loss "
            f"{float(result.loss[i]):.2f})"
            for i in indices
        )
        meaning = f"The {name} temperature on the student's side. The {len(indices)} {name} samples: {samples}."
        out.append(Finding(f"temperature_{name}", "student", float(result.student[indices[0]]), meaning, n=len(ids)))
    return out


def by_difficulty(result: Hardness) -> dict[str, Any]:
    """Return mean temperatures in fifths of the student's loss, hardest first, JSON-serializable."""
    order = torch.argsort(result.loss, descending=True, stable=True)
    parts = [
        {
            "bin": i,
            "count": len(part),
            "loss": float(result.loss[part].mean()),
            "T_student": float(result.student[part].mean()),
            "T_teacher": float(result.teacher[part].mean()),
        }
        for i, part in enumerate(order.tensor_split(PARTS))
        if len(part)
    ]
    return {"policy": result.policy, "by_difficulty": parts}
