"""Two-sided 95 % intervals of proportions and means, bootstrap intervals, and exact binomial bounds."""

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
    """Return the interval of a proportion, hits out of n; (0, 1) for n = 0.

    Reference: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if not n:
        return 0.0, 1.0
    p, z2 = hits / n, Z**2
    center, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2))
    low, high = ((center + sign * half) / (1 + z2 / n) for sign in (-1, 1))
    return (0.0 if hits == 0 else low), (1.0 if hits == n else high)


def exact_lower(hits: int, n: int, alpha: float) -> float:
    """Return the one-sided lower confidence bound of a binomial probability, with error at most ``alpha``.

    Reference: Clopper and Pearson (1934), "The use of confidence or fiducial limits".

    Raises:
        ImportError: if scipy is not installed (extra "report").
    """
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ImportError("certified radii need scipy: pip install 'tempering[report]'.") from error
    return 0.0 if hits == 0 else float(beta.ppf(alpha, hits, n - hits + 1))


def share(name: str, of: str, hits: Bool[Tensor, " N"], meaning: str) -> Finding:
    """Return the fraction of hits as a finding; its value is None without samples."""
    n, k = len(hits), int(hits.sum())
    if not n:
        return Finding(name, of, None, f"There is no such sample. {meaning}", share=True)
    return Finding(name, of, k / n, meaning, *wilson(k, n), n=n, share=True)


def average(name: str, of: str, values: Float[Tensor, " N"], meaning: str, *, share: bool = False) -> Finding:
    """Return the mean as a finding, with the normal interval of a mean of independent values."""
    values = values.double()
    mean, n = float(values.mean()), len(values)
    # equal values have no spread, which does not mean certainty
    half = (Z * float(values.std()) / math.sqrt(n) if n > 1 else 0.0) or None
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Finding(name, of, mean, meaning, low, high, n, share)


def correlation(name: str, of: str, a: Float[Tensor, " N"], b: Float[Tensor, " N"], meaning: str) -> Finding:
    """Return Spearman's rank correlation in [-1, 1] as a finding, ties at their mean rank; None if one is constant.

    Reference: the interval is that of Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and
    Spearman correlations", Psychometrika 2000, equation 8.
    """
    n, (x, y) = len(a), (_ranks(v.double()) for v in (a, b))
    spread = float(x.square().sum() * y.square().sum()) ** 0.5
    if n < 4 or spread == 0:
        reason = f"there are {n} samples" if n < 4 else "one of the two is the same for all samples"
        return Finding(name, of, None, f"There is no correlation: {reason}. {meaning}", n=n)
    r = max(-1.0, min(1.0, float((x * y).sum()) / spread))
    z, half = math.atanh(r * (1 - 1e-12)), Z * math.sqrt((1 + r**2 / 2) / (n - 3))
    return Finding(name, of, r, meaning, min(r, math.tanh(z - half)), max(r, math.tanh(z + half)), n)


def _ranks(v: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return centered ranks; equal values get their mean rank."""
    _, inverse, counts = torch.unique(v, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]
    return rank - rank.mean()


def bootstrap(
    statistic: Callable[[Tensor], float], n: int, *, draws: int, seed: int, biased: bool = False
) -> tuple[float, float]:
    """Return the bootstrap interval of ``statistic(rows)``, rows an index (n,), over resamples with replacement.

    By percentiles. If noise biases the statistic upward (``biased``), as for a calibration error, use the basic
    interval, which removes the bias that resampling shows, widened to contain the statistic and clipped at 0.

    Reference: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 5.2.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(draws)], dtype=torch.float64
    )
    low, high = (float(values.quantile(q)) for q in (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    if not biased:
        return low, high
    value = statistic(torch.arange(n))
    return max(0.0, min(2 * value - high, value)), max(2 * value - low, value)
