"""Temperatures by privacy, those of Swing Distillation: the more private a token, the hotter its teacher's answer."""

from __future__ import annotations

from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, PolicyWrapper, Temperatures, check_positive
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.static import Static

Sides = Literal["teacher", "both"]


class Private(PolicyWrapper):
    """T + g (high - T) for the T of ``policy`` and g = privacy^power; rows that are not private keep T exactly.

    The scale of a row goes from the policy's own to 1 with g: a private row is not multiplied by its T_s T_t. At high
    temperatures that product would turn the divergence into the matching of logits, which hides nothing.

    Args:
        policy: any policy; None is Static(4.0).
        high: the temperature of a row whose privacy is 1.
        power: of the privacy: 1 is linear, more spares rows that are a little private.
        sides: "teacher" heats the teacher's answer alone, so that the student learns a flatter one; "both" heats both,
            where the divergence still is 0 only at the teacher's own logits, and only its slope is less.
        squared: multiply private rows by their T_s T_t too.

    With "teacher" a student that equals its teacher is not at zero on private rows: it is meant to forget. DTKD's plain
    term keeps to its reference temperature and tells all of it: give this to ``DTKD(soft=0)`` or to ``methods.Swing``.

    The source says that the temperature of a token follows from how private it is; its formula is not known to us, and
    this one, with every argument here, is ours.

    Reference: Li et al., "Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework", 2022,
    arXiv:2212.08349.
    """

    paper = "arXiv:2212.08349"

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        high: float = 20.0,
        power: float = 1.0,
        sides: Sides = "teacher",
        squared: bool = False,
    ) -> None:
        super().__init__(Static(4.0) if policy is None else policy)
        check_positive("Private", high=high, power=power)
        if sides not in ("teacher", "both"):
            raise ValueError(f"Private needs sides 'teacher' or 'both'; got {sides!r}.")
        self.high, self.power, self.sides, self.squared = high, power, sides, squared

    @classmethod
    def example(cls) -> Self:
        return cls(Sharpness(4.0))

    def transform(self, T: Temperatures, rows: Rows) -> Temperatures:
        private = privacy(rows)
        if private is None:
            self.counts = {}
            return T
        self.counts = {"private": (private > 0).sum()}
        g = private.unsqueeze(1).to(T.teacher.dtype) ** self.power

        def toward(x: Tensor, aim: Tensor | float) -> Tensor:
            # where, so that a public row keeps the very same number
            return torch.where(g > 0, x + g * (aim - x), x)

        teacher = toward(T.teacher, self.high)
        student = toward(T.student, self.high) if self.sides == "both" else T.student
        base = T.student * T.teacher if T.factor is None else T.factor
        return Temperatures(student, teacher, toward(base, student * teacher if self.squared else 1.0))


def privacy(rows: Rows) -> Float[Tensor, " N"] | None:
    """How private the rows are, (N,), 0 where they have no weight; None where nothing is said of it."""
    if rows.privacy_score is None:
        return None
    private = rows.privacy_score.to(upcast_to_float32(rows.teacher).dtype)
    return private if rows.weight is None else torch.where(rows.weight > 0, private, torch.zeros_like(private))
