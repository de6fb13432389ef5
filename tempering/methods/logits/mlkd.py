"""Multi-level logit distillation: match instances, classes and the batch, each at several temperatures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.methods.base import Method, check_policy, linear_warmup, zero_term
from tempering.methods.logits.relations import Softened, counted_entries, mean_over, soften
from tempering.objectives import divergence, log_softmax
from tempering.rows import Rows, expand_to_rows
from tempering.temperature.base import PolicyLike, Temperatures
from tempering.utils.search_space import NonNegative, Positive, RunFraction, TermWeight

STRONG = "strong"  # name of the block of strongly augmented rows of tasks.TwoView


class MLKD(Method):
    """Multi-level logit distillation: soft * sum KL + classes * sum |P_t'P_t - P_s'P_s|^2 / C + batch * sum |P_t P_t' -
    P_s P_s'|^2 / N + hard * cross entropy.

    Sums are over ``temperatures``; each KL is multiplied by T_s T_t, the distances of Gram matrices are not. P is the
    (N, C) matrix of softened probabilities. The block named "strong" has only the KL and the cross entropy. On other
    blocks (the weak view, or a single view) "soft" and "batch" use the rows whose teacher is at most as confident as
    the median, and "classes" the classes whose summed teacher probability is at most the median. Gram terms grow with
    the batch size. Rows of weight 0 are excluded.

    Args:
        soft: weight of the KL of each row.
        classes: weight of the class Gram matrices, (C, C).
        batch: weight of the batch Gram matrices, (N, N).
        hard: weight of the cross entropy.
        temperatures: the temperatures of all terms but ``hard``.
        published: reproduce errors of the released code: its masks multiply sums instead of entries, so they only scale
            by the fraction of selected rows (classes); and the strong view's KL at the last two temperatures is
            computed from the weak view's logits, without a mask.
        warmup: fraction of the run over which all terms but ``hard`` rise linearly from 0; published: none.
        temperature: a temperature policy, multiplied by each of ``temperatures`` divided by its reference tau. None:
            Static(4.0). ``Standardized(2.0, scale="tau")`` is MLKD on standardized logits.

    Expects the two views as blocks of rows named "weak" and "strong": ``tasks.TwoView``.

    Reference: Jin et al., "Multi-Level Logit Distillation", CVPR 2023, doi 10.1109/CVPR52729.2023.02325.
    """

    paper = "none: CVPR 2023, doi 10.1109/CVPR52729.2023.02325, no preprint"
    relational = True
    pairwise = True

    def __init__(
        self,
        *,
        soft: TermWeight = 0.9,
        classes: TermWeight = 0.9,
        batch: TermWeight = 0.9,
        hard: NonNegative = 0.1,
        temperatures: Sequence[Positive] = (4.0, 3.0, 5.0, 2.0, 6.0),
        published: bool = False,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        if not temperatures:
            raise ValueError("MLKD needs at least one of temperatures, such as (4.0, 3.0, 5.0, 2.0, 6.0); got none.")
        self.soft, self.classes, self.batch, self.hard = soft, classes, batch, hard
        self.temperatures, self.published, self.warmup = tuple(temperatures), published, warmup
        self.temperature = check_policy("MLKD", temperature, default=4.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        names = ("soft",) if rows.name == STRONG else ("soft", "classes", "batch")
        terms = self._levels(rows, progress) if len(rows) else {name: zero_term(rows) for name in names}
        return self.with_hard(terms, rows)

    def _levels(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        T, strong = self.temperature(rows, progress), rows.name == STRONG
        kept, counted = counted_entries(rows)
        levels = [self._rescaled(T, tau) for tau in self.temperatures]
        softened = [soften(kept, counted, level) for level in levels]
        kl = torch.stack([T.scale * divergence(s.teacher, s.student) for T, s in zip(levels, softened, strict=True)])
        rise = linear_warmup(progress, self.warmup)
        if strong:
            return {"soft": self.soft * rise * (kl[:-2] if self.published else kl).sum(0)}
        unconfident, rare = doubtful(kept.teacher, counted)
        if self.published:
            in_rows, in_classes = counted.any(1), counted.any(0)
            share_r, share_c = (mean_over(m.to(kl.dtype), c) for m, c in ((unconfident, in_rows), (rare, in_classes)))
            soft = share_r * kl.sum(0) + kl[-2:].sum(0)
            classes = share_c * torch.stack([class_gram(s, in_classes) for s in softened]).sum()
            batch = share_r * torch.stack([batch_gram(s, in_rows) for s in softened]).sum()
        else:
            soft = torch.where(unconfident, kl.sum(0), 0.0)
            classes = torch.stack([class_gram(s, rare) for s in softened]).sum()
            batch = torch.stack([batch_gram(s, unconfident) for s in softened]).sum()
        return {
            "soft": self.soft * rise * soft,
            "classes": self.classes * rise * expand_to_rows(classes, rows),
            "batch": self.batch * rise * expand_to_rows(batch, rows),
        }

    def _rescaled(self, T: Temperatures, tau: float) -> Temperatures:
        """Rescale the policy's temperatures from its reference to ``tau``."""
        ratio = tau / self.temperature.tau
        return Temperatures(T.student * ratio, T.teacher * ratio, None if T.factor is None else T.factor * ratio**2)


@torch.no_grad()
def doubtful(
    teacher: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"]
) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " C"]]:
    """Select rows (N,) whose top probability, and classes (C,) whose summed probability, is at most the median."""
    p = log_softmax(teacher).exp().masked_fill(~counted, 0.0)
    return _lower_half(p.amax(1), counted.any(1)), _lower_half(p.sum(0), counted.any(0))


def _lower_half(x: Tensor, counted: Tensor) -> Tensor:
    median = torch.nanquantile(x.masked_fill(~counted, torch.nan), 0.5)
    return counted & (x <= median)


def class_gram(s: Softened, columns: Bool[Tensor, " C"]) -> Float[Tensor, ""]:
    """Return |P_t'P_t - P_s'P_s|^2 / C over these columns, the distance of the class Gram matrices, ()."""
    p, q, counted = s.exp()
    gap = (q.T @ q - p.T @ p).square().sum(0)
    return torch.where(columns, gap, 0.0).sum() / counted.any(0).sum().clamp_min(1)


def batch_gram(s: Softened, columns: Bool[Tensor, " N"]) -> Float[Tensor, ""]:
    """Return |P_t P_t' - P_s P_s'|^2 / N over these columns, the distance of the batch Gram matrices, ()."""
    p, q, counted = s.exp()
    gap = (q @ q.T - p @ p.T).square().sum(0)
    return torch.where(columns, gap, 0.0).sum() / counted.any(1).sum().clamp_min(1)
