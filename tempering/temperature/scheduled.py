"""Temperatures that depend on the progress of the run: a schedule for the reference of any policy, and DTS."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.rows import Rows, class_labels, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_inner_policy
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.static import Static
from tempering.utils.search_space import RUN_FRACTION, Positive, Tau

Shape = Literal["cosine", "linear"]


class Scheduled(Policy):
    """The temperatures of ``policy`` for a reference that moves from ``start`` to ``end`` over the run.

    A policy whose equation contains the reference (Sharpness, Entropy) is solved for each reference; the temperatures
    of other policies are multiplied by the reference divided by their tau, including those of a policy with a range.
    Methods with a plain softened term use the scheduled reference for it.

    Args:
        policy: any policy. None: Static(4.0).
        shape: "cosine", half a period, flat at both ends; or "linear".
        start: the reference at the start. None: the policy's own tau.
        end: the reference from ``run_fraction`` on.
        run_fraction: the fraction of the run over which the reference moves.

    Reference: no publication of this policy; for annealing see Jafari et al., "Annealing Knowledge Distillation", EACL
    2021.
    """

    paper = "none: a schedule on another policy"

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        shape: Shape = "cosine",
        start: Positive | None = None,
        end: Positive = 1.0,
        run_fraction: Annotated[float, RUN_FRACTION] = 1.0,
    ) -> None:
        super().__init__()
        self.policy = check_inner_policy("Scheduled", Static(4.0) if policy is None else policy)
        self.tau = self.policy.tau if start is None else start
        if shape not in ("cosine", "linear"):
            raise ValueError(f"Scheduled needs shape 'cosine' or 'linear'; got {shape!r}.")
        self.shape: Shape = shape
        self.start, self.end, self.run_fraction = start, end, run_fraction
        self.shift_invariant, self.by_class = self.policy.shift_invariant, self.policy.by_class
        self.relational = self.policy.relational

    @classmethod
    def example(cls) -> Self:
        return cls(Sharpness(4.0), end=2.0)

    def reference_at(self, progress: float) -> float:
        done = 1.0 if self.run_fraction <= 0.0 else min(progress / self.run_fraction, 1.0)
        remaining = 1.0 - done if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.end + (self.tau - self.end) * remaining

    def forward(self, rows: Rows, progress: float) -> Temperatures:
        return self.policy.with_reference(self.reference_at(progress), rows, progress)

    def report(self) -> dict[str, Tensor]:
        """The counts of the policy."""
        return self.policy.report()


class DTS(Policy):
    """One temperature for all rows, (1, 1): a running mean of tau (1 + cos(pi curve progress)) / 2 * m in [low, high].

    m is d / (d + 1) if that is above 1, else 1, and 1.35 if it is above 2; d is the teacher's cross entropy with the
    labels minus the student's, averaged over the block's rows that have weight and a label. So m exceeds 1 only if
    the student's is larger by more than 1, and never without labels. The mean keeps a fraction ``momentum`` of itself
    at every call in training, and is part of the state dict; in evaluation it is constant.

    Args:
        tau: the temperature at the start.
        low: lower bound of the values that are averaged.
        high: upper bound of the values that are averaged.
        curve: fraction of the cosine's half period that the run covers.
        momentum: momentum of the running mean.
        adjust: use m; False gives a cosine schedule with a lag.

    Differs from the released code, in which a step's temperature uses the losses of the step before; here it uses the
    step's own losses. Each rank of a distributed run keeps its own mean.

    Reference: dynamic temperature scheduling (DTS), 2025, arXiv:2511.13767, after its authors' code (DATS_enhanced).
    """

    paper = "arXiv:2511.13767"

    def __init__(
        self,
        tau: Tau = 4.0,
        *,
        low: Positive = 2.0,
        high: Positive = 4.0,
        curve: Positive = 1.0,
        momentum: float = 0.9,
        adjust: bool = True,
    ) -> None:
        super().__init__()
        if low > high:
            raise ValueError(f"DTS needs low <= high; got low={low!r} and high={high!r}.")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"DTS needs momentum in [0, 1), the fraction of the mean that is kept; got {momentum!r}.")
        self.tau, self.low, self.high, self.curve = tau, low, high, curve
        self.momentum, self.adjust = momentum, adjust
        self.relational = adjust
        self.mean: Tensor
        self.register_buffer("mean", torch.full((1, 1), float(tau)))

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        mean = self.mean.to(upcast_to_float32(rows.student))
        if self.training and len(rows):
            cosine = 0.5 * (1.0 + math.cos(math.pi * self.curve * progress))
            value = (self.tau * cosine * self._scale(rows)).clamp(self.low, self.high)
            mean = self.momentum * mean + (1.0 - self.momentum) * value
            self.mean.copy_(mean)
        return Temperatures(mean, mean)

    def _scale(self, rows: Rows) -> Tensor:
        """m of this block, (); 1 without ``adjust`` or labels."""
        one = torch.ones((), dtype=upcast_to_float32(rows.student).dtype, device=rows.student.device)
        if not self.adjust or rows.target is None:
            return one
        target = class_labels(rows.target)
        weight = (target >= 0).to(one.dtype)
        if rows.weight is not None:
            weight = weight * rows.weight.to(one.dtype)
        target = target.long().clamp_min(0)
        losses = [F.cross_entropy(upcast_to_float32(z), target, reduction="none") for z in (rows.teacher, rows.student)]
        gap = torch.where(weight > 0, (losses[0] - losses[1]).to(one.dtype), 0.0)
        d = (weight * gap).sum() / weight.sum().clamp_min(torch.finfo(one.dtype).tiny)
        m = d / (d + 1.0)
        m = torch.where(m > 2.0, 1.35, m)
        return torch.where(m > 1.0, m, one)  # also if a masked label makes d infinite or NaN
