"""AdaKD's temperatures: rows on which the two differ more than usual are softened less."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures, check_positive
from tempering.utils.search_space import Temperature


class Adaptive(Policy):
    """T = tau exp(-strength tanh(log(s / median s))), one temperature for both sides of a row, (N, 1).

    s is the Hellinger distance of the row's two predictions at temperature 1, and the median (the lower one) is over
    the rows of the block that have weight. Hard rows get a low temperature; all lie in tau e^-strength to tau
    e^strength. Where the median is 0, most rows agree and every row has tau; the source divides by zero there.

    Args:
        tau: of the row in the middle; the source's is 1, on tokens.
        strength: how far the temperatures spread, the source's c; below 0, hard rows get the high temperatures.

    This is the temperature of AdaKD alone (IDTS). Its choice of tokens (LATF) is a matter of the rows' weights.

    Reference: "LLM-Oriented Token-Adaptive Knowledge Distillation", AAAI 2026, arXiv:2510.11615.
    """

    paper = "arXiv:2510.11615"
    relational = True

    def __init__(self, tau: Annotated[float, Temperature()] = 4.0, *, strength: float = 0.5) -> None:
        super().__init__()
        check_positive("Adaptive", tau=tau)
        if not math.isfinite(strength):
            raise ValueError(f"Adaptive needs a finite strength; got {strength!r}. The source's is 0.5.")
        self.tau, self.strength = tau, strength

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        s = hellinger(rows)
        if not len(rows):
            return Temperatures(s, s)
        kept = torch.ones_like(s, dtype=torch.bool) if rows.weight is None else (rows.weight > 0).unsqueeze(1)
        ranked = s.masked_fill(~kept, torch.inf).flatten().sort().values
        middle = ranked[(kept.sum() - 1).clamp_min(0) // 2]
        # tanh(log r) = (r^2 - 1) / (r^2 + 1), which needs no logarithm of 0
        usual = (middle > 0) & middle.isfinite()
        a, b = s.square(), torch.where(usual, middle, 1.0).square()
        T = self.tau * torch.exp(-self.strength * torch.where(usual, (a - b) / (a + b), 0.0))
        return Temperatures(T, T)


def hellinger(rows: Rows) -> Float[Tensor, "N 1"]:
    """The Hellinger distance of each row's predictions at temperature 1, (N, 1), in [0, 1]."""
    sides = []
    for z in (upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)):
        empty = torch.isneginf(z).all(-1, keepdim=True)
        sides.append(z.masked_fill(empty, 0.0).softmax(-1).sqrt())
    return (0.5 * (sides[0] - sides[1]).square().sum(-1, keepdim=True)).sqrt()
