"""Temperatures from the standard deviation of the logits: NormKD and logit standardization."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, mask_constants
from tempering.utils.search_space import Tau

Scale = Literal["product", "teacher", "tau"]


class Standardized(Policy):
    """T = tau * std(logits) per row and side, (N, 1): softens standardized logits at tau.

    ``scale`` selects the factor of a softened divergence, on which the sources differ: "product" is T_s * T_t, as for
    other policies; "teacher" is NormKD's T_t^2 per row; "tau" is logit standardization's tau^2, without the standard
    deviations. Rows without spread get tau. Standard deviations are over the unmasked classes, with ``ddof`` = 1 as in
    both released codes.

    ``differentiable`` lets gradients flow through the student's standard deviation, as both released codes do: a step
    then leaves each row's scale unchanged to first order. Without it each step changes the scale, which the temperature
    then follows, and with ``scale="teacher"`` and no warmup the student can diverge.

    References: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation", 2023, arXiv:2308.00520; Sun et al.,
    "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, equation 7.
    """

    paper = "arXiv:2308.00520; arXiv:2403.01427"

    def __init__(
        self, tau: Tau = 2.0, *, scale: Scale = "product", ddof: int = 1, differentiable: bool = False
    ) -> None:
        super().__init__()
        if scale not in ("product", "teacher", "tau"):
            raise ValueError(f"Standardized needs scale 'product', 'teacher' or 'tau'; got {scale!r}.")
        if ddof not in (0, 1):
            raise ValueError(f"Standardized needs ddof 0 or 1; got {ddof!r}.")
        self.tau, self.scale, self.ddof, self.differentiable = tau, scale, ddof, differentiable

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            student = self.tau * spread(rows.student, ddof=self.ddof)
        teacher = self.tau * spread(rows.teacher, ddof=self.ddof)
        if self.scale == "product":
            return Temperatures(student, teacher)
        factor = teacher.square() if self.scale == "teacher" else torch.full_like(teacher, self.tau**2)
        return Temperatures(student, teacher, factor)


def spread(logits: Float[Tensor, "N C"], *, ddof: int) -> Float[Tensor, "N 1"]:
    """The standard deviation over the unmasked classes, (N, 1); 1 for rows without spread."""
    z = mask_constants(upcast_to_float32(logits))
    valid = ~torch.isneginf(z)
    count = valid.sum(-1, keepdim=True)
    z = torch.where(valid, z, 0.0)
    mean = z.sum(-1, keepdim=True) / count.clamp_min(1)
    centered = torch.where(valid, z - mean, 0.0)
    square = centered.square().sum(-1, keepdim=True) / (count - ddof).clamp_min(1)
    is_constant = square <= (1e-6 * (1.0 + mean.abs())).square()
    # torch.where before sqrt, whose gradient at 0 is infinite
    return torch.where(is_constant, torch.ones_like(square), square).sqrt()
