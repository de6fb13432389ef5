"""Neuron selectivity transfer: match the distributions of channel activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tempering.methods.features.base import FeatureMethod, fitted
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class NST(FeatureMethod):
    """Neuron selectivity transfer: feature * squared maximum mean discrepancy of the normalized channels, with the
    kernel (x . y)^2, summed over the pairs.

    Reference: Huang & Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
    arXiv:1707.01219, equation 6.
    """

    paper = "arXiv:1707.01219"
    relational = False

    def __init__(self, *, feature: TermWeight = 50.0, hard: NonNegative = 1.0, names: Sequence[str] = ()) -> None:
        super().__init__(feature=feature, hard=hard, names=names)

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        distances: list[Tensor] = []
        for s, t in (fitted(*p) for p in pairs):
            s, t = F.normalize(s.flatten(2), dim=2), F.normalize(t.flatten(2), dim=2)
            distances.append(_kernel(t, t) + _kernel(s, s) - 2.0 * _kernel(s, t))
        return sum(distances[1:], distances[0])


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean over pairs of channels of (x_i . y_j)^2, (N,)."""
    return (x @ y.transpose(1, 2)).square().mean((1, 2))
