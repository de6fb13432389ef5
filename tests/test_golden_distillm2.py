"""DistiLLM-2's released terms of a sequence, by our divergences: shifted by one, each a mean over its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempering.objectives import cross_entropy, jsd, kl, reverse_kl, skew_kl, skew_reverse_kl
from tempering.rows import IGNORE_INDEX, Rows
from tempering.temperature import Static
from tests.paths import needs_shared
from tests.test_golden import Case, case, cases  # noqa: F401

pytestmark = needs_shared


def sequences(of: Case) -> tuple[Tensor, list[Rows]]:
    """The student's logits, a leaf, and the labeled tokens of each sequence as rows."""
    student, teacher, labels = (torch.tensor(of.values[k]) for k in ("student_logits", "teacher_logits", "labels"))
    leaf, out = student.requires_grad_(), []
    for row, y in enumerate(labels[:, 1:]):
        kept = y != IGNORE_INDEX
        out.append(Rows(leaf[row, :-1][kept], teacher[row, :-1][kept], y[kept]))
    return leaf, out


@cases("llm_kl", "distillm2")
@pytest.mark.parametrize("variant", [0, 1, 3, 4])  # 2 moves the skew from sequence to sequence, which ours does not
def test_the_terms_of_a_sequence(case: Case, variant: int) -> None:  # noqa: F811
    leaf, parts = sequences(case)
    T = Static(1.0)(parts[0])
    case.agree(f"logps_{variant}", torch.stack([-cross_entropy(rows).mean() for rows in parts]))
    as_student = [rows.replace(student=rows.teacher) for rows in parts]
    case.agree(f"teacher_logps_{variant}", torch.stack([-cross_entropy(rows).mean() for rows in as_student]))
    terms = {
        0: lambda rows: (skew_kl(rows, T, skew=0.1), skew_reverse_kl(rows, T, skew=0.1)),
        1: lambda rows: (skew_kl(rows, T, skew=0.1), skew_reverse_kl(rows, T, skew=0.1)),
        3: lambda rows: (jsd(rows, T, beta=0.9),) * 2,
        4: lambda rows: (kl(rows, T), -reverse_kl(rows, T)),  # theirs has the sign turned
    }
    found = [terms[variant](rows) for rows in parts]
    for side, name in enumerate(("teacher_side", "student_side")):
        value = torch.stack([pair[side].mean() for pair in found])
        case.agree(f"{name}_kl_{variant}", value)
        if name == "student_side" and variant < 3:
            continue  # theirs holds the student in the mixture constant, so its slope is another one
        slope = torch.autograd.grad(value.mean(), leaf, retain_graph=True)[0]
        case.agree(f"grad_{name}_{variant}", slope)
