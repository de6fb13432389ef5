"""Intervals of 95 %, two-sided: of a share, of a mean, by resampling, and exact ones of a binomial."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.audits.base import Finding

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Interval of a share, hits of n; (0, 1) of nothing.

    Reference: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if not n:
        return 0.0, 1.0
    p, z2 = hits / n, Z**2
    center, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def exact_lower(hits: int, n: int, alpha: float) -> float:
    """The one-sided lower bound of a binomial's probability that fails with probability ``alpha`` at most.

    Reference: Clopper and Pearson (1934), "The use of confidence or fiducial limits".

    Raises:
        ImportError: without scipy, which extra "report" brings.
    """
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ImportError("certified radii need scipy: pip install 'tempering[report]'.") from error
    return 0.0 if hits == 0 else float(beta.ppf(alpha, hits, n - hits + 1))


def share(name: str, of: str, hits: Bool[Tensor, " N"], meaning: str) -> Finding:
    """The share of hits as a finding; None where there is nobody to ask."""
    n, k = len(hits), int(hits.sum())
    if not n:
        return Finding(name, of, None, f"There is no such sample. {meaning}", share=True)
    return Finding(name, of, k / n, meaning, *wilson(k, n), n=n, share=True)


def average(name: str, of: str, values: Float[Tensor, " N"], meaning: str, *, share: bool = False) -> Finding:
    """The mean as a finding, with the normal interval of a mean of independent values."""
    values = values.double()
    middle, n = float(values.mean()), len(values)
    # values that do not differ show no spread, which is no certainty
    half = (Z * float(values.std()) / math.sqrt(n) if n > 1 else 0.0) or None
    low, high = (None, None) if half is None else (middle - half, middle + half)
    return Finding(name, of, middle, meaning, low, high, n, share)


def correlation(name: str, of: str, a: Float[Tensor, " N"], b: Float[Tensor, " N"], meaning: str) -> Finding:
    """Spearman's rank correlation as a finding, in [-1, 1], ties at their mean rank; None where one side is constant.

    Reference: the interval is that of Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and
    Spearman correlations", Psychometrika 2000, equation 8.
    """
    n, (x, y) = len(a), (_ranks(v.double()) for v in (a, b))
    spread = float(x.square().sum() * y.square().sum()) ** 0.5
    if n < 4 or spread == 0:
        why = f"there are {n} samples" if n < 4 else "one of the two is the same for all samples"
        return Finding(name, of, None, f"There is no correlation: {why}. {meaning}", n=n)
    r = max(-1.0, min(1.0, float((x * y).sum()) / spread))
    middle, half = math.atanh(r * (1 - 1e-12)), Z * math.sqrt((1 + r**2 / 2) / (n - 3))
    return Finding(name, of, r, meaning, min(r, math.tanh(middle - half)), max(r, math.tanh(middle + half)), n)


def _ranks(v: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Centered ranks, the mean one for values that are equal."""
    _, place, counts = torch.unique(v, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    return rank - rank.mean()


def bootstrap(
    statistic: Callable[[Tensor], float], n: int, *, draws: int, seed: int, biased: bool = False
) -> tuple[float, float]:
    """Interval of ``statistic(rows)``, rows an index (n,), by drawing the n rows anew with replacement.

    Percentiles; where the statistic is ``biased`` upward by noise, as a calibration error is, the basic interval, which
    takes the bias out that resampling shows, widened to hold the statistic itself and never below 0.

    Reference: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 5.2.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.tensor(
        [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(draws)], dtype=torch.float64
    )
    low, high = (float(drawn.quantile(q)) for q in (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    if not biased:
        return low, high
    found = statistic(torch.arange(n))
    return max(0.0, min(2 * found - high, found)), max(2 * found - low, found)
