"""Truncated importance weights: any method on texts of older weights."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from tempering.methods.base import Method, is_row_method
from tempering.methods.logits._sampled import rollout_log_prob, sampled_log_prob
from tempering.methods.logits.kd import KD
from tempering.rows import Rows


class TruncatedImportance(Method):
    """A method whose terms are multiplied by min(q(y) / m(y), most), a constant per sampled token y.

    q is the student, and m what y was sampled from (``Rows.rollout_log_prob``): older weights, as with
    ``RolloutServer(staleness=...)``, or another temperature. Each token is corrected, not the text before it, and
    truncation trades a bias, towards tokens of m, for a bounded variance. Rows that were not sampled have weight 1. The
    mean is over rows, not over weights. For ``PolicyGradient`` use its own ``truncate``.

    Args:
        inner: a method over rows, such as Divergence(objective="reverse_kl").
        most: largest weight.

    Raises:
        TypeError: for a method that runs its own step.
        ValueError: for most below 1; while it runs, for sampled rows without rollout_log_prob.

    Reference: Ionides, "Truncated Importance Sampling", 2008, Journal of Computational and Graphical Statistics 17.
    """

    paper = "none: another method, weighted"

    def __init__(self, inner: Method, *, most: float = 2.0) -> None:
        super().__init__()
        if not is_row_method(inner):
            raise TypeError(f"TruncatedImportance needs a method over rows, such as KD(hard=0.0); got {inner!r}.")
        if not most >= 1.0:
            raise ValueError(f"TruncatedImportance needs most >= 1; got {most!r}.")
        self.inner, self.most = inner, most
        for flag in ("needs_labels", "needs_teacher", "zero_when_equal", "non_negative", "shift_invariant"):
            setattr(self, flag, getattr(inner, flag))

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        terms = self.inner(rows, progress)
        if rows.sampled_id is None:
            return terms
        q = sampled_log_prob(rows.student.detach(), rows.sampled_id)
        weight = (q - rollout_log_prob(rows, "TruncatedImportance").to(q.dtype)).exp().clamp_max(self.most)
        return {name: weight * term for name, term in terms.items()}

    def setup(self, rows: Rows) -> None:
        self.inner.setup(rows)

    def needs_setup(self) -> bool:
        return self.inner.needs_setup()

    @classmethod
    def example(cls) -> Self:
        return cls(KD())

    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups()
