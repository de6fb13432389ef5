"""Temperatures from the spread of the logits: NormKD, and logit standardization."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_positive
from tempering.utils.search_space import Temperature

Scale = Literal["product", "teacher", "tau"]


class Standardized(Policy):
    """T = tau * std(logits), each side by its own standard deviation, (N, 1): softening z-scored logits at tau.

    ``scale`` names what a softened divergence is multiplied by, since the sources differ: "product" is this house's
    T_s * T_t; "teacher" NormKD's T_t^2 a row; "tau" logit standardization's tau^2, in which the spread takes no part.
    A row with no spread keeps tau. Standard deviations are over the classes that are not masked, with ``ddof`` = 1 as
    in both released codes.

    ``attached`` lets the gradient flow through the student's standard deviation, as both released codes do: then a step
    does not change a row's scale to first order. Without it each step pulls at the scale that the temperature follows,
    and with ``scale="teacher"`` and no warm-up the student can run away.

    References: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation", 2023, arXiv:2308.00520;
    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, equation 7.
    """

    paper = "arXiv:2308.00520; arXiv:2403.01427"

    def __init__(
        self,
        tau: Annotated[float, Temperature()] = 2.0,
        *,
        scale: Scale = "product",
        ddof: int = 1,
        attached: bool = False,
    ) -> None:
        super().__init__()
        check_positive("Standardized", tau=tau)
        if scale not in ("product", "teacher", "tau"):
            raise ValueError(f"Standardized needs scale 'product', 'teacher' or 'tau'; got {scale!r}.")
        if ddof not in (0, 1):
            raise ValueError(f"Standardized needs ddof 0 or 1; got {ddof!r}.")
        self.tau, self.scale, self.ddof, self.attached = tau, scale, ddof, attached

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        with torch.set_grad_enabled(self.attached and torch.is_grad_enabled()):
            student = self.tau * spread(rows.student, ddof=self.ddof)
        teacher = self.tau * spread(rows.teacher, ddof=self.ddof)
        if self.scale == "product":
            return Temperatures(student, teacher)
        factor = teacher.square() if self.scale == "teacher" else torch.full_like(teacher, self.tau**2)
        return Temperatures(student, teacher, factor)


def spread(logits: Float[Tensor, "N C"], *, ddof: int) -> Float[Tensor, "N 1"]:
    """The standard deviation over the classes that are not masked, (N, 1); 1 where the row has none."""
    z = upcast_to_float32(logits)
    valid = ~torch.isneginf(z)
    count = valid.sum(-1, keepdim=True)
    z = torch.where(valid, z, 0.0)
    mean = z.sum(-1, keepdim=True) / count.clamp_min(1)
    centered = torch.where(valid, z - mean, 0.0)
    square = centered.square().sum(-1, keepdim=True) / (count - ddof).clamp_min(1)
    flat = square <= (1e-6 * (1.0 + mean.abs())).square()
    # where before the root: its slope at 0 is infinite
    return torch.where(flat, torch.ones_like(square), square).sqrt()
