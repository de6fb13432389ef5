"""AdaKD's temperatures: lower temperatures for rows on which student and teacher differ more than the median."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.utils.search_space import Tau


class Adaptive(Policy):
    """T = tau exp(-strength tanh(log(s / median s))), one temperature per row for both sides, (N, 1).

    s is the Hellinger distance of the row's two predictions at temperature 1; the (lower) median is over the rows of
    the block that have weight. Hard rows get a low temperature; all temperatures are in [tau e^-strength, tau
    e^strength]. If the median is 0, most rows agree and every row gets tau; the source divides by zero there.

    Args:
        tau: temperature of the median row; 1 in the source, on tokens.
        strength: range of the temperatures, c in the source; negative values give hard rows the high temperatures.

    This is the temperature of AdaKD only (IDTS). Its selection of tokens (LATF) corresponds to the rows' weights.

    Reference: "LLM-Oriented Token-Adaptive Knowledge Distillation", AAAI 2026, arXiv:2510.11615.
    """

    paper = "arXiv:2510.11615"
    relational = True

    def __init__(self, tau: Tau = 4.0, *, strength: float = 0.5) -> None:
        super().__init__()
        self.tau, self.strength = tau, strength

    @torch.no_grad()
    def forward(self, rows: Rows, progress: float) -> Temperatures:
        s = hellinger(rows)
        if not len(rows):
            return Temperatures(s, s)
        has_weight = torch.ones_like(s, dtype=torch.bool) if rows.weight is None else (rows.weight > 0).unsqueeze(1)
        sorted_s = s.masked_fill(~has_weight, torch.inf).flatten().sort().values
        middle = (has_weight.sum() - 1).clamp_min(0) // 2
        median = sorted_s.index_select(0, middle.unsqueeze(0)).squeeze(0)  # a 0-dim index would be read by the host
        # tanh(log r) = (r^2 - 1) / (r^2 + 1), which avoids log(0)
        is_usable = (median > 0) & median.isfinite()
        a, b = s.square(), torch.where(is_usable, median, 1.0).square()
        T = self.tau * torch.exp(-self.strength * torch.where(is_usable, (a - b) / (a + b), 0.0))
        return Temperatures(T, T)


def hellinger(rows: Rows) -> Float[Tensor, "N 1"]:
    """The Hellinger distance of each row's predictions at temperature 1, (N, 1), in [0, 1]."""
    sides: list[Tensor] = []
    for z in (upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)):
        empty = torch.isneginf(z).all(-1, keepdim=True)
        sides.append(z.masked_fill(empty, 0.0).softmax(-1).sqrt())
    return (0.5 * (sides[0] - sides[1]).square().sum(-1, keepdim=True)).sqrt()
