"""Temperatures that follow the run: a schedule on the reference of any policy, and DTS."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_inner_policy, check_positive, check_run_fraction
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.static import Static
from tempering.utils.search_space import Temperature

Shape = Literal["cosine", "linear"]


class Scheduled(Policy):
    """The temperatures of ``policy`` round a reference that moves from ``start`` to ``end`` over the run.

    A policy whose equation has the reference in it (Sharpness, Entropy) is solved anew at each; the temperatures of any
    other are multiplied by the reference over its own tau, also those that lie in a range. Methods that soften plainly
    too follow the reference.

    Args:
        policy: any policy; None is Static(4.0).
        shape: "cosine", half a period, flat at both ends; "linear".
        start: the reference at the start; None is the policy's own tau.
        end: and from ``over`` on.
        over: the share of the run over which it moves.

    Reference: none of its own; annealing is as old as Jafari et al., "Annealing Knowledge Distillation", EACL 2021.
    """

    paper = "none: a schedule on another policy"

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        shape: Shape = "cosine",
        start: float | None = None,
        end: float = 1.0,
        over: float = 1.0,
    ) -> None:
        super().__init__()
        self.policy = check_inner_policy("Scheduled", Static(4.0) if policy is None else policy)
        self.tau = self.policy.tau if start is None else start
        check_positive("Scheduled", start=self.tau, end=end)
        check_run_fraction("Scheduled", over=over)
        if shape not in ("cosine", "linear"):
            raise ValueError(f"Scheduled needs shape 'cosine' or 'linear'; got {shape!r}.")
        self.shape: Shape = shape
        self.start, self.end, self.over = start, end, over
        self.shift_invariant, self.by_class = self.policy.shift_invariant, self.policy.by_class
        self.relational = self.policy.relational  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def example(cls) -> Self:
        return cls(Sharpness(4.0), end=2.0)

    def reference_at(self, progress: float) -> float:
        done = 1.0 if self.over <= 0.0 else min(progress / self.over, 1.0)
        left = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.end + (self.tau - self.end) * left

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.policy.with_reference(self.reference_at(progress), rows, progress)

    def report(self) -> dict[str, Tensor]:
        """What the policy reports."""
        return self.policy.report()


class DTS(Policy):
    """One temperature for all rows, (1, 1): a running mean of tau (1 + cos(pi curve progress)) / 2 * m in [low, high].

    m is d / (d + 1) where that is above 1, else 1, and 1.35 where it is above 2; d is the teacher's cross entropy with
    the labels less the student's, the mean over the block's rows that have weight and a label. So m acts only where the
    student's is the larger by more than 1, and without labels never. The mean keeps ``momentum`` of itself at every
    call in training, and is a part of the state that is saved; in evaluation it stands still.

    Args:
        tau: the temperature at the start.
        low: lower bound of what enters the mean.
        high: upper bound.
        curve: how much of the half period the run takes.
        momentum: of the running mean.
        adjust: whether m acts at all; without it this is a cosine schedule with a lag.

    Differs from the released code in that a step's temperature knows the step's own losses; there it knows those of the
    step before. Every rank of a distributed run keeps its own mean.

    Reference: dynamic temperature scheduling (DTS), 2025, arXiv:2511.13767, after its authors' code (DATS_enhanced).
    """

    paper = "arXiv:2511.13767"

    def __init__(
        self,
        tau: Annotated[float, Temperature()] = 4.0,
        *,
        low: float = 2.0,
        high: float = 4.0,
        curve: float = 1.0,
        momentum: float = 0.9,
        adjust: bool = True,
    ) -> None:
        super().__init__()
        check_positive("DTS", tau=tau, low=low, high=high, curve=curve)
        if low > high:
            raise ValueError(f"DTS needs low <= high; got low={low!r} and high={high!r}.")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"DTS needs momentum in [0, 1), the share of itself the mean keeps; got {momentum!r}.")
        self.tau, self.low, self.high, self.curve = tau, low, high, curve
        self.momentum, self.adjust = momentum, adjust
        self.relational = adjust  # pyright: ignore[reportAttributeAccessIssue]
        self.mean: Tensor
        self.register_buffer("mean", torch.full((1, 1), float(tau)))

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        mean = self.mean.to(upcast_to_float32(rows.student))
        if self.training and len(rows):
            cosine = 0.5 * (1.0 + math.cos(math.pi * self.curve * progress))
            aim = (self.tau * cosine * self._scale(rows)).clamp(self.low, self.high)
            mean = self.momentum * mean + (1.0 - self.momentum) * aim
            self.mean.copy_(mean)
        return Temperatures(mean, mean)

    def _scale(self, rows: Rows) -> Tensor:
        """m of this block, (); 1 where it does not act."""
        one = torch.ones((), dtype=upcast_to_float32(rows.student).dtype, device=rows.student.device)
        if not self.adjust or rows.target is None:
            return one
        weight = (rows.target >= 0).to(one.dtype)
        if rows.weight is not None:
            weight = weight * rows.weight.to(one.dtype)
        target = rows.target.long().clamp_min(0)
        lost = [F.cross_entropy(upcast_to_float32(z), target, reduction="none") for z in (rows.teacher, rows.student)]
        gap = torch.where(weight > 0, (lost[0] - lost[1]).to(one.dtype), 0.0)
        d = (weight * gap).sum() / weight.sum().clamp_min(torch.finfo(one.dtype).tiny)
        m = d / (d + 1.0)
        m = torch.where(m > 2.0, 1.35, m)
        return torch.where(m > 1.0, m, one)  # also where a masked label makes d infinite or not a number
