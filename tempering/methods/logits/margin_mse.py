"""MarginMSE: match the teacher's margins between the relevant candidate and the others."""

from __future__ import annotations

import torch
from torch import Tensor

from tempering.methods.base import Method
from tempering.objectives import require_labels
from tempering.rows import Rows, is_labeled, upcast_to_float32
from tempering.utils.search_space import NonNegative, TermWeight


class MarginMSE(Method):
    """MarginMSE: soft * mean over the candidates j other than the label y of ((s_y - s_j) - (t_y - t_j))^2 + hard *
    cross entropy, of scores without a softmax.

    Rows are queries and classes are candidates: see ``tasks.Ranking``. Masked candidates are left out, and the term is
    0 on rows without a label. There is no temperature; scores of both sides should have one scale.

    Args:
        soft: weight of the margins.
        hard: weight of the cross entropy with the relevant candidate.

    Reference: Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation", 2020, arXiv:2010.02666, equation 8, with one other candidate per query.
    """

    paper = "arXiv:2010.02666"
    needs_labels = True

    def __init__(self, *, soft: TermWeight = 1.0, hard: NonNegative = 0.0) -> None:
        super().__init__()
        self.soft, self.hard = soft, hard

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        target = require_labels(rows, "MarginMSE")
        known = is_labeled(target)
        label = target.clamp_min(0).long().unsqueeze(1)
        student, teacher = upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)
        counted = ~(torch.isneginf(student) | torch.isneginf(teacher)).scatter(1, label, True)
        s, t = (z.masked_fill(torch.isneginf(z), 0.0) for z in (student, teacher))
        gap = (s.gather(1, label) - s) - (t.gather(1, label) - t)
        error = torch.where(counted, gap.square(), 0.0).sum(1) / counted.sum(1).clamp_min(1)
        return self.with_hard({"soft": self.soft * torch.where(known, error, 0.0)}, rows)
