"""Privacy-dependent temperatures, as in Swing Distillation: higher teacher temperatures for private tokens."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, PolicyWrapper, Temperatures
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.static import Static
from tempering.utils.search_space import Positive

Sides = Literal["teacher", "both"]


class Private(PolicyWrapper):
    """T + g (high - T) for the T of ``policy`` and g = privacy_score^power; public rows keep T exactly.

    With g, the scale of each row goes from the policy's own to 1: private rows are not multiplied by their T_s T_t. At
    high temperatures that product would turn the divergence into logit matching, which hides nothing.

    Args:
        policy: any policy. None: Static(4.0).
        high: temperature of rows whose privacy score is 1.
        power: exponent of the privacy score: 1 is linear, larger values change slightly private rows less.
        sides: "teacher" raises the teacher's temperature only, so that the student learns a flatter distribution;
            "both" raises both, where the divergence is still 0 only at the teacher's own logits and only its gradient
            is smaller.
        squared: multiply private rows by their T_s T_t too.

    With "teacher", a student equal to its teacher does not have zero loss on private rows: it is meant to forget. The
    plain term of DTKD uses the reference temperature and reveals private rows in full: use this policy with
    ``DTKD(soft=0)`` or ``methods.Swing``.

    The source states that the temperature of a token depends on how private it is; its formula is not known to us. The
    formula and all arguments here are ours.

    Reference: Li et al., "Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework", 2022,
    arXiv:2212.08349.
    """

    paper = "arXiv:2212.08349"

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        high: Positive = 20.0,
        power: Positive = 1.0,
        sides: Sides = "teacher",
        squared: bool = False,
    ) -> None:
        super().__init__(Static(4.0) if policy is None else policy)
        if sides not in ("teacher", "both"):
            raise ValueError(f"Private needs sides 'teacher' or 'both'; got {sides!r}.")
        self.high, self.power, self.sides, self.squared = high, power, sides, squared

    @classmethod
    def example(cls) -> Self:
        return cls(Sharpness(4.0))

    def transform(self, T: Temperatures, rows: Rows) -> Temperatures:
        scores = privacy(rows)
        if scores is None:
            self.counts = {}
            return T
        self.counts = {"private": (scores > 0).sum()}
        g = scores.unsqueeze(1).to(T.teacher.dtype) ** self.power

        def toward(x: Tensor, goal: Tensor | float) -> Tensor:
            # torch.where, so that public rows keep x to the bit
            return torch.where(g > 0, x + g * (goal - x), x)

        teacher = toward(T.teacher, self.high)
        student = toward(T.student, self.high) if self.sides == "both" else T.student
        base = T.student * T.teacher if T.factor is None else T.factor
        return Temperatures(student, teacher, toward(base, student * teacher if self.squared else 1.0))


def privacy(rows: Rows) -> Float[Tensor, " N"] | None:
    """The privacy scores, (N,), 0 for rows without weight; None if the rows have no scores."""
    if rows.privacy_score is None:
        return None
    scores = rows.privacy_score.to(upcast_to_float32(rows.teacher).dtype)
    return scores if rows.weight is None else torch.where(rows.weight > 0, scores, torch.zeros_like(scores))
