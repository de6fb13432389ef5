"""Attention transfer: match the spatial attention maps of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tempering.methods.features.base import FeatureMethod, fitted, per_row
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class AT(FeatureMethod):
    """Attention transfer: feature * mean over positions of (a_s - a_t)^2, summed over the pairs, with a the
    l2-normalized mean over channels of |F|^power.

    The larger map is average-pooled to the size of the smaller. This is the form of the released code; the paper has an
    l2 norm instead of a mean of squares.

    Reference: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928, equation 2.
    """

    paper = "arXiv:1612.03928"
    relational = False

    def __init__(
        self, *, feature: TermWeight = 1000.0, hard: NonNegative = 1.0, power: float = 2.0, names: Sequence[str] = ()
    ) -> None:
        super().__init__(feature=feature, hard=hard, names=names)
        if power <= 0:
            raise ValueError(f"AT needs power > 0; got {power!r}.")
        self.power = power

    def compare(self, pairs: list[tuple[Tensor, Tensor]], rows: Rows) -> Tensor:
        errors = [per_row((self._attention(s) - self._attention(t)).square()) for s, t in (fitted(*p) for p in pairs)]
        return sum(errors[1:], errors[0])

    def _attention(self, x: Tensor) -> Tensor:
        return F.normalize(x.abs().pow(self.power).mean(1).flatten(1))
