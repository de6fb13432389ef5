"""Ablate a policy: its temperatures without its scale, or its scale without its temperatures."""

from __future__ import annotations

from typing import Literal, Self

from tempering.rows import Rows
from tempering.temperature.base import Policy, PolicyWrapper, Temperatures, constant
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.static import Static

Keep = Literal["temperatures", "scale"]


class Ablated(PolicyWrapper):
    """Keep one of the two effects of ``policy``; the other uses the reference tau.

    Args:
        policy: any policy. None: Static(4.0), whose two effects are both those of tau.
        keep: "temperatures" softens as the policy does and multiplies the divergence by tau^2; "scale" softens both
            sides at tau, (1, 1), and multiplies by the policy's T_s T_t, (N, 1).

    A policy softens rows and also weights them by T_s T_t; this ablation shows which of the two matters.

    Reference: no publication of this policy; it ablates Wei & Bai, 2024, arXiv:2404.12711, which changes both at once.
    """

    paper = "none: an ablation of another policy"

    def __init__(self, policy: Policy | None = None, *, keep: Keep = "temperatures") -> None:
        super().__init__(Static(4.0) if policy is None else policy)
        if keep not in ("temperatures", "scale"):
            raise ValueError(f"Ablated needs keep 'temperatures' or 'scale'; got {keep!r}.")
        self.keep: Keep = keep
        self.reference = self.tau

    @classmethod
    def example(cls) -> Self:
        return cls(Sharpness(4.0), keep="scale")

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        self.reference = self.reference_at(progress)
        return super().forward(rows, progress)

    def with_reference(self, tau: float, rows: Rows, progress: float) -> Temperatures:
        self.reference = tau
        return super().with_reference(tau, rows, progress)

    def transform(self, T: Temperatures, rows: Rows) -> Temperatures:
        tau = constant(self.reference, T.student)
        if self.keep == "scale":
            return Temperatures(tau, tau, T.scale.unsqueeze(-1))
        return Temperatures(T.student, T.teacher, tau.square().expand(len(T.scale), 1))
