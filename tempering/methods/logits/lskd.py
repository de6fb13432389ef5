"""Logit standardization: any method on standardized (z-scored) logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.methods.base import Method, is_row_method
from tempering.methods.logits.kd import KD
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import mask_constants
from tempering.temperature.static import Static
from tempering.utils.search_space import NonNegative


class LSKD(Method):
    """Logit standardization: the terms of ``inner`` on (z - mean) / (std + eps) of each row of both sides, plus hard *
    cross entropy of the raw logits.

    The value of ``LSKD(KD(soft=9.0, hard=0.0, temperature=Static(2.0)))`` equals that of KD with ``Standardized(2.0,
    scale="tau")``. The gradient differs: as released, it flows through the student's mean and standard deviation, so
    the soft terms do not change the scale of a row; only the hard term does. This is why it is a method and not only a
    temperature policy.

    Args:
        inner: the method applied to standardized logits; give it ``hard=0.0``. None: the paper's KD with weight 9 at
            T = 2. ``LSKD(DKD(target=9.0, non_target=72.0, hard=0.0, temperature=Static(2.0)), hard=1.0)`` is DKD + LS.
        hard: weight of the cross entropy.
        eps: added to the standard deviation, as released. A row of constant logits stays 0, with gradient 0.

    Standard deviations have C - 1 in the denominator, as released.

    Reference: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427.
    """

    paper = "arXiv:2403.01427"

    def __init__(self, inner: Method | None = None, *, hard: NonNegative = 0.1, eps: NonNegative = 1e-7) -> None:
        super().__init__()
        if inner is not None and not is_row_method(inner):
            raise TypeError(f"LSKD needs a method over rows, such as KD(soft=9.0, hard=0.0); got {inner!r}.")
        if inner_hard := getattr(inner, "hard", 0.0):
            raise ValueError(
                f"LSKD: {type(inner).__name__}(hard={inner_hard!r}) would apply its hard term to standardized logits. "
                "Give it hard=0.0, and LSKD the weight: LSKD(..., hard=0.1)."
            )
        self.inner = KD(soft=9.0, hard=0.0, temperature=Static(2.0)) if inner is None else inner
        self.hard, self.eps = hard, eps
        for flag in ("needs_labels", "needs_teacher", "zero_when_equal", "non_negative"):
            setattr(self, flag, getattr(self.inner, flag))

    def setup(self, rows: Rows) -> None:
        self.inner.setup(self._standardized(rows))

    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups()

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rows = rows.replace(student=upcast_to_float32(rows.student))
        terms = self.inner(self._standardized(rows), progress)
        return self.with_hard(terms, rows)

    def _standardized(self, rows: Rows) -> Rows:
        student, teacher = upcast_to_float32(rows.student), mask_constants(upcast_to_float32(rows.teacher))
        # a very negative logit of the student alone is no mask
        masked = torch.where(torch.isneginf(teacher), mask_constants(student), student)
        return rows.replace(student=standardized(masked, self.eps), teacher=standardized(teacher, self.eps))


def standardized(logits: Float[Tensor, "N C"], eps: float) -> Float[Tensor, "N C"]:
    """Return (z - mean) / (std + eps) over classes above -inf; constant rows become 0, masked classes stay masked."""
    z = upcast_to_float32(logits)
    is_masked = torch.isneginf(z)
    n = (~is_masked).sum(-1, keepdim=True)
    z = z.masked_fill(is_masked, 0.0)
    noise = 8.0 * torch.finfo(z.dtype).eps * z.detach().abs().amax(-1, keepdim=True)
    z = (z - z.sum(-1, keepdim=True) / n.clamp_min(1)).masked_fill(is_masked, 0.0)
    square = z.square().sum(-1, keepdim=True) / (n - 1).clamp_min(1)
    is_constant = square <= noise.square()
    scaled = z / (torch.where(is_constant, 1.0, square).sqrt() + eps)
    return torch.where(is_constant, 0.0, scaled).masked_fill(is_masked, -torch.inf)
