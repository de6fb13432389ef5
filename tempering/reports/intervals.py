"""Mean, standard deviation, and the interval and power of a difference over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

LEVEL = 0.95  # of every interval, two-sided
POWER = 0.8  # of ``Difference.detectable``


@dataclass(frozen=True)
class Difference:
    """Method minus control.

    Attributes:
        mean: the difference.
        half: half-width of its 95 % t interval, the smallest significant difference at this spread; None if there are
            too few seeds, or all differences are equal: scores are counts on a test set, so equality is a coincidence
            and an interval of zero width would be misleading.
        n: number of pairs, or runs of the smaller method if unpaired.
        paired: whether runs with the same seed were subtracted; else it is Welch's interval of two independent means.
        freedom: degrees of freedom of the interval, 0 without one.
        each: seed -> its difference, if paired.
    """

    mean: float
    half: float | None
    n: int
    paired: bool
    freedom: float = 0.0
    each: Mapping[int, float] = field(default_factory=dict)

    @property
    def shown(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def detectable(self) -> float | None:
        """Return the true difference that is significant with a power of 80 % at this spread; None without an interval.

        Source: the power of the t test by the noncentral t distribution.
        """
        return self.half and self.half * _detectable_ratio(self.freedom)


def difference(group: Mapping[int, float], control: Mapping[int, float]) -> Difference | None:
    """Return method minus control: paired if two or more seeds are shared, else Welch's; None if one is empty.

    A method with one seed has no interval in either case; it is paired with the same seed of the other method.

    Source: Welch (1947), "The generalization of Student's problem when several different population variances are
    involved", for the interval of unpaired seeds.
    """
    common = sorted(set(group) & set(control))
    if len(common) >= 2 or (common and min(len(group), len(control)) == 1):
        gap_by_seed = {seed: group[seed] - control[seed] for seed in common}
        gaps = list(gap_by_seed.values())
        spread, freedom = deviation(gaps), len(gaps) - 1
        half = _quantile(freedom) * spread / math.sqrt(len(gaps)) if spread else None
        return Difference(math.fsum(gaps) / len(gaps), half, len(gaps), True, freedom if half else 0.0, gap_by_seed)
    a, b = list(group.values()), list(control.values())
    if not a or not b:
        return None
    gap = math.fsum(a) / len(a) - math.fsum(b) / len(b)
    sa, sb = deviation(a), deviation(b)
    n = min(len(a), len(b))
    if sa is None or sb is None or not (sa or sb):
        return Difference(gap, None, n, False)
    va, vb = sa**2 / len(a), sb**2 / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return Difference(gap, _quantile(freedom) * math.sqrt(va + vb), n, False, freedom)


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of an empty sequence."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1), 0 if values differ by rounding only; None of fewer than two."""
    if len(values) < 2:
        return None
    average = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((v - average) ** 2 for v in values) / (len(values) - 1))
    return spread if spread > 1e-12 * max(1.0, *map(abs, values)) else 0.0


@lru_cache
def _detectable_ratio(freedom: float) -> float:
    """Return the true difference, in half-widths of the interval, that is significant with probability ``POWER``."""
    from scipy.optimize import brentq
    from scipy.stats import nct

    edge = _quantile(freedom)

    def lacking(shift: float) -> float:
        return float(nct.sf(edge, freedom, shift)) - POWER  # the tail on the other side adds less than 1e-6

    root: Any = brentq(lacking, 0.0, 4.0 * edge)
    return float(root) / edge


def _quantile(freedom: float) -> float:
    """Return the quantile of Student's t distribution, two-sided at ``LEVEL``."""
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'tempering[report]'.") from error
    return float(t.ppf(0.5 + LEVEL / 2, freedom))
