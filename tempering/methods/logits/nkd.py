"""Normalized KD, and universal self-KD, its teacher-free form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tempering.methods.base import Method, check_policy, linear_warmup
from tempering.methods.logits.labeled import drop_classes, label_index, one_hot, soft_cross_entropy, weighted_nll
from tempering.objectives import log_softmax, require_labels, tempered
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, RunFraction, TermWeight


class NKD(Method):
    """Normalized KD: -target * p_t(y) log p_s(y) + non_target * T_s T_t H(N(u / T_t), N(v / T_s)) + hard * cross
    entropy.

    N is the softmax over the classes other than the label y; the target term is at temperature 1. Both terms are cross
    entropies as published: the teacher's entropy is not subtracted, so for a student equal to the teacher "non_target"
    is at its minimum but not 0. Both are 0 on rows without a label.

    Args:
        target: weight of the label's term.
        non_target: weight of the term of the other classes, the paper's gamma.
        hard: weight of the cross entropy.
        warmup: fraction of the run over which ``target`` and ``non_target`` rise linearly from 0; published: none.
        temperature: a temperature policy, or a number for Static; None: Static(1.0).

    The defaults are those for ImageNet; for CIFAR-100, ``non_target`` is 3.5 at T = 3.

    Reference: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023, arXiv:2303.13005.
    """

    paper = "arXiv:2303.13005"
    needs_labels = True
    zero_when_equal = False

    def __init__(
        self,
        *,
        target: TermWeight = 1.0,
        non_target: TermWeight = 1.5,
        hard: NonNegative = 1.0,
        warmup: RunFraction = 0.0,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        self.target, self.non_target, self.hard, self.warmup = target, non_target, hard, warmup
        self.temperature = check_policy("NKD", temperature, default=1.0)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rise, T = linear_warmup(progress, self.warmup), self.temperature(rows, progress)
        label = require_labels(rows, "NKD")
        student, teacher = upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)
        is_label = one_hot(label, student)
        confidence = log_softmax(teacher).exp().gather(1, label_index(label)).squeeze(1)
        others = soft_cross_entropy(
            drop_classes(tempered(teacher, T.teacher), is_label), drop_classes(tempered(student, T.student), is_label)
        )
        terms = {
            "target": self.target * rise * weighted_nll(confidence, student, label),
            "non_target": self.non_target * rise * torch.where(label >= 0, T.scale * others, 0.0),
        }
        return self.with_hard(terms, rows.replace(student=student))


class USKD(Method):
    """Universal self-KD, without a teacher: target * smoothed confidence + non_target * Zipf ranks + weak * cross
    entropy of a weak head + hard * cross entropy.

    The soft target of the label is p(y)^2 + 1 - mean p(y)^2 over the labeled rows; those of the other classes are
    1 / rank, normalized, with ranks of their predictions. They are computed from ``rows.teacher``, which contains the
    student's own detached logits if there is no teacher (``distill(student, None, ...)``). With a teacher, its
    predictions are smoothed instead of the student's.

    Args:
        target: weight of the label's term, the paper's alpha.
        non_target: weight of the term of the other classes, the paper's beta.
        weak: weight of the weak head's cross entropy, the paper's mu; labels smoothed by 0.1.
        hard: weight of the cross entropy.
        names: one feature (N, D) or (N, C, H, W), pooled, the input of the method's weak linear head; its prediction
            is added to the final one before ranking. (): no weak head; only the final prediction is ranked.
        ranks: "mended" ranks the normalized probabilities of both predictions over the other classes only; "published"
            uses log p / (1 - log p(y)) for the final prediction, since the released code reads a reused variable, and
            includes the label in the ranking.
        warmup: fraction of the run over which all terms but ``hard`` rise linearly from 0; published: none.

    The defaults are those for ImageNet; for CIFAR-100 the three weights are 0.1, 0.1 and 0.1.

    Reference: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023, arXiv:2303.13005.
    """

    paper = "arXiv:2303.13005"
    relational = True
    needs_labels = True
    needs_teacher = False
    zero_when_equal = False

    def __init__(
        self,
        *,
        target: TermWeight = 1.0,
        non_target: TermWeight = 0.1,
        weak: TermWeight = 0.005,
        hard: NonNegative = 1.0,
        names: Sequence[str] = (),
        ranks: Literal["mended", "published"] = "mended",
        warmup: RunFraction = 0.0,
    ) -> None:
        super().__init__()
        if len(names) > 1 or isinstance(names, str):
            raise ValueError(f"USKD reads one feature at most, names=['pooled']; got {names!r}.")
        if ranks not in ("mended", "published"):
            raise ValueError(f"USKD needs ranks 'mended' or 'published'; got {ranks!r}.")
        self.target, self.non_target, self.weak, self.hard, self.warmup = target, non_target, weak, hard, warmup
        self.names, self.ranks = tuple(names), ranks
        self.head: nn.Linear | None = None

    def setup(self, rows: Rows) -> None:
        if self.names and self.head is None:
            feature = self._feature(rows)
            self.head = nn.Linear(feature.shape[1], rows.student.shape[1]).to(feature)

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        rise, label = linear_warmup(progress, self.warmup), require_labels(rows, "USKD")
        student, own = upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)
        is_label, has_label = one_hot(label, student), label >= 0
        weak_logits = self._weak_logits(rows)
        ranked = self._ranks(own, None if weak_logits is None else weak_logits.detach(), is_label)
        terms = {
            "target": self.target * rise * weighted_nll(self._confidence(own, label, rows.weight), student, label),
            "non_target": self.non_target
            * rise
            * torch.where(has_label, soft_cross_entropy(ranked, drop_classes(student, is_label)), 0.0),
        }
        if weak_logits is not None:
            logq = log_softmax(weak_logits.masked_fill(torch.isneginf(student), -torch.inf))
            smooth = 0.9 * is_label.to(logq.dtype) + 0.1 * (~torch.isneginf(logq)) / _classes(logq)
            terms["weak"] = self.weak * rise * torch.where(has_label, soft_cross_entropy(smooth.log(), logq), 0.0)
        return self.with_hard(terms, rows.replace(student=student))

    @torch.no_grad()
    def _confidence(self, own: Tensor, label: Tensor, weight: Tensor | None) -> Float[Tensor, " N"]:
        """Return the label's soft target: p(y)^2 + 1 - its mean over the labeled rows of weight > 0."""
        square = log_softmax(own).gather(1, label_index(label)).squeeze(1).exp().square()
        counted = label >= 0 if weight is None else (label >= 0) & (weight > 0)
        return square + 1.0 - torch.where(counted, square, 0.0).sum() / counted.sum().clamp_min(1)

    @torch.no_grad()
    def _ranks(self, own: Tensor, weak_logits: Tensor | None, is_label: Bool[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """Return the log of the soft labels of the other classes, 1 / rank normalized; minus infinity on the label."""
        is_masked = torch.isneginf(own)
        if self.ranks == "mended":
            score = drop_classes(own, is_label).exp()
            if weak_logits is not None:
                score = score + drop_classes(weak_logits.masked_fill(is_masked, -torch.inf), is_label).exp()
            unranked = is_masked | is_label
        else:
            logp = log_softmax(own)
            score = logp / (1.0 - (logp * is_label).nan_to_num(0.0).sum(1, keepdim=True) + 1e-6)
            if weak_logits is not None:
                p = log_softmax(weak_logits.masked_fill(is_masked, -torch.inf)).exp()
                score = score + p / (1.0 - (p * is_label).sum(1, keepdim=True) + 1e-6)
            unranked = is_masked
        order = torch.sort(score.masked_fill(unranked, -torch.inf), dim=1, descending=True, stable=True).indices
        positions = torch.arange(1, own.shape[1] + 1, device=own.device, dtype=own.dtype).expand_as(own)
        rank = torch.zeros_like(own).scatter(1, order, positions)
        excluded = is_masked | is_label
        return log_softmax((-rank.log()).masked_fill(excluded, -torch.inf)).masked_fill(excluded, -torch.inf)

    def _weak_logits(self, rows: Rows) -> Float[Tensor, "N C"] | None:
        """Return the logits of the weak head; None without one."""
        if not self.names:
            return None
        if self.head is None:
            raise RuntimeError(
                "USKD's weak head takes its size from the feature: call method.setup(rows) with a first block of "
                "rows, before the optimizer is made."
            )
        return self.head(self._feature(rows))

    def _feature(self, rows: Rows) -> Float[Tensor, "N D"]:
        name = self.names[0]
        if name not in rows.features:
            raise ValueError(
                f"USKD reads the feature {name!r}, and Rows(name={rows.name!r}) has {sorted(rows.features) or 'none'}. "
                f"Name a module to tap in the task: Classification(features={{{name!r}: ('stage3', 'stage3')}})."
            )
        feature = upcast_to_float32(rows.features[name][0])
        if rows.weight is not None:
            feature = feature.masked_fill(~(rows.weight > 0).view(-1, *[1] * (feature.ndim - 1)), 0.0)
        return feature.flatten(2).mean(2) if feature.ndim > 2 else feature


def _classes(logp: Float[Tensor, "N C"]) -> Float[Tensor, "N 1"]:
    """Return the number of unmasked classes of each row, at least 1."""
    return (~torch.isneginf(logp)).sum(1, keepdim=True).clamp_min(1).to(logp.dtype)
