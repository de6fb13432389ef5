"""Which samples a temperature policy treats as hard: what it gives each, beside the student's own loss on it."""

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
EXTREMES = 5  # samples named at either end
STANDARD = 4.0  # tau where no run says which policy it had


class Hardness(NamedTuple):
    """What a policy gives each sample, (N,) each, in float64, and which policy it is, in words."""

    student: Float[Tensor, " N"]
    teacher: Float[Tensor, " N"]
    loss: Float[Tensor, " N"]
    policy: str


def hardness(
    policy: Policy | None, student: Float[Tensor, "N C"], teacher: Float[Tensor, "N C"], y: Int[Tensor, " N"]
) -> Hardness:
    """The temperatures of these rows at the end of the run; of ``Sharpness(4.0)`` where there is no policy."""
    asked = Sharpness(STANDARD) if policy is None else copy.deepcopy(policy).cpu().eval()
    rows = Rows(student.float(), teacher.float(), y)
    with torch.no_grad():
        T = asked(rows, 1.0)
    loss = torch.nn.functional.cross_entropy(student, y, reduction="none")
    named = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in asked.hyperparameters().items())
    said = f"{type(asked).__name__}({named})"
    said += ", the one it was trained with" if policy is not None else ", which is not one that it was trained with"
    T_student, T_teacher = (side.expand(len(y), 1).flatten().double() for side in (T.student, T.teacher))
    return Hardness(T_student, T_teacher, loss.double(), said)


def findings(found: Hardness, ids: Sequence[int]) -> list[Finding]:
    """The rank correlation of either side's temperature with the student's loss, and the samples at both ends."""
    out = []
    for side, T in (("student", found.student), ("teacher", found.teacher)):
        meaning = (
            f"Rank correlation of the {side}'s temperature with the student's loss on the label: above 0, samples that "
            f"are hard for the student are softened more on this side. Temperatures are those of {found.policy}."
        )
        out.append(correlation("temperature_difficulty", side, T, found.loss, meaning))
    if float(found.student.max() - found.student.min()) < 1e-6:
        return out
    order = torch.argsort(found.student, stable=True).tolist()
    for name, places in (("highest", order[::-1][:EXTREMES]), ("lowest", order[:EXTREMES])):
        told = "; ".join(
            f"id {ids[i]} (T {float(found.student[i]):.2f} and {float(found.teacher[i]):.2f}, loss "
            f"{float(found.loss[i]):.2f})"
            for i in places
        )
        meaning = f"The {name} temperature of the student's side. The {len(places)} samples at this end: {told}."
        out.append(Finding(f"temperature_{name}", "student", float(found.student[places[0]]), meaning, n=len(ids)))
    return out


def by_difficulty(found: Hardness) -> dict[str, Any]:
    """Mean temperatures in fifths of the student's loss, hardest first, plain enough for JSON."""
    order = torch.argsort(found.loss, descending=True, stable=True)
    parts = [
        {
            "bin": i,
            "count": len(part),
            "loss": float(found.loss[part].mean()),
            "T_student": float(found.student[part].mean()),
            "T_teacher": float(found.teacher[part].mean()),
        }
        for i, part in enumerate(order.tensor_split(PARTS))
        if len(part)
    ]
    return {"policy": found.policy, "by_difficulty": parts}
