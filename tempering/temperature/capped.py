"""Clamp the temperatures of another policy."""

from __future__ import annotations

import math
from typing import Self

from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows
from tempering.temperature.base import Policy, PolicyWrapper, Temperatures
from tempering.temperature.sharpness import Sharpness
from tempering.temperature.static import Static
from tempering.utils.search_space import Positive


class Capped(PolicyWrapper):
    """The temperatures of ``policy``, clamped to [low, high] on each side.

    A scale set by the policy (``Standardized(scale="tau")``) is kept. A clamped temperature has zero gradient, so a
    learned temperature gets no gradient beyond the bounds. ``report`` adds the number of clamped temperatures to the
    counts of the policy.

    Args:
        policy: any policy. None: Static(4.0).
        low: lower bound.
        high: upper bound; None for no bound.

    Reference: none.
    """

    paper = "none: a cap round another policy"

    def __init__(self, policy: Policy | None = None, *, low: Positive = 1.0, high: Positive | None = 10.0) -> None:
        super().__init__(Static(4.0) if policy is None else policy)
        if high is not None and low > high:
            raise ValueError(f"Capped needs low <= high; got low={low!r} and high={high!r}.")
        self.low, self.high = low, high

    @classmethod
    def example(cls) -> Self:
        return cls(Sharpness(4.0), low=3.0, high=4.5)

    def transform(self, T: Temperatures, rows: Rows) -> Temperatures:
        self.counts = {"capped": self._outside(T.student, rows) + self._outside(T.teacher, rows)}
        student, teacher = (side.clamp(self.low, self.high) for side in (T.student, T.teacher))
        return Temperatures(student, teacher, T.factor)

    def _outside(self, T: Float[Tensor, "#N 1"], rows: Rows) -> Tensor:
        outside = (self.low > T) | ((math.inf if self.high is None else self.high) < T)
        return (outside if rows.weight is None else outside & (rows.weight > 0).unsqueeze(1)).sum()
