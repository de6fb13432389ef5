"""Divergences per row: pure functions of rows and temperatures, without reduction.

Each is non-negative, exactly zero where both sides are equal, multiplied by ``T.scale`` unless documented otherwise,
and computed in at least float32. Classes that are minus infinity on both sides are left out. A class that is minus
infinity for the student but not for the teacher gives an infinite loss: mask both sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, is_labeled, upcast_to_float32
from tempering.temperature.base import Temperatures
from tempering.utils.registry import OVERRIDES


def kl(rows: Rows, T: Temperatures) -> Float[Tensor, " N"]:
    """T_s T_t KL(teacher || student), (N,); exactly 0 where the softened distributions are equal.

    Reference: Hinton et al., 2015, arXiv:1503.02531, section 2.
    """
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("kl")):
        return fast(rows, T)
    student, teacher = softened(rows, T)
    return T.scale * divergence(teacher, student)


def reverse_kl(rows: Rows, T: Temperatures) -> Float[Tensor, " N"]:
    """T_s T_t KL(student || teacher), (N,); mode-seeking.

    Reference: Gu et al., "MiniLLM", ICLR 2024, arXiv:2306.08543.
    """
    student, teacher = softened(rows, T)
    return T.scale * divergence(student, teacher)


def jsd(rows: Rows, T: Temperatures, *, beta: float = 0.5) -> Float[Tensor, " N"]:
    """T_s T_t [beta KL(teacher || m) + (1 - beta) KL(student || m)], m = beta teacher + (1 - beta) student, (N,).

    At beta 0 and 1, where this expression is zero, the limits of the source are used: ``kl`` at 0 and ``reverse_kl`` at
    1.

    Raises:
        ValueError: for beta outside [0, 1].

    Reference: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv:2306.13649, equation 1.
    """
    check_fraction("jsd", beta=beta)
    if beta in (0.0, 1.0):
        return kl(rows, T) if beta == 0.0 else reverse_kl(rows, T)
    student, teacher = softened(rows, T)
    mixed = mixture(teacher, student, beta)
    return T.scale * (beta * divergence(teacher, mixed) + (1.0 - beta) * divergence(student, mixed))


def skew_kl(rows: Rows, T: Temperatures, *, skew: float = 0.1) -> Float[Tensor, " N"]:
    """T_s T_t KL(teacher || skew teacher + (1 - skew) student), (N,); ``kl`` at skew 0.

    Raises:
        ValueError: for skew outside [0, 1).

    Reference: Ko et al., "DistiLLM", ICML 2024, arXiv:2402.03898, equation 3. The released code leaves the teacher's
    entropy out of the value; the gradients are equal.
    """
    check_skew("skew_kl", skew)
    student, teacher = softened(rows, T)
    return T.scale * divergence(teacher, mixture(teacher, student, skew))


def skew_reverse_kl(rows: Rows, T: Temperatures, *, skew: float = 0.1) -> Float[Tensor, " N"]:
    """T_s T_t KL(student || skew student + (1 - skew) teacher), (N,); ``reverse_kl`` at skew 0.

    Raises:
        ValueError: for skew outside [0, 1).

    Reference: Ko et al., "DistiLLM", ICML 2024, arXiv:2402.03898, equation 4.
    """
    check_skew("skew_reverse_kl", skew)
    student, teacher = softened(rows, T)
    return T.scale * divergence(student, mixture(student, teacher, skew))


def tvd(rows: Rows, T: Temperatures) -> Float[Tensor, " N"]:
    """T_s T_t times half the sum of |teacher - student|, the total variation distance, (N,); in [0, 1] before scaling.

    Its derivative at a class with equal probabilities is 0, as in torch.

    Reference: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023,
    arXiv:2307.15190.
    """
    student, teacher = softened(rows, T)
    return T.scale * 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


def adaptive_kl(rows: Rows, T: Temperatures, *, head: float = 0.5) -> Float[Tensor, " N"]:
    """T_s T_t [w KL(teacher || student) + (1 - w) KL(student || teacher)], (N,), with one weight w per row.

    w is the fraction of sum |teacher - student| over the teacher's head, treated as a constant. The head is the most
    likely class and further likely classes while their cumulative probability stays within ``head``. Where the two
    distributions are equal, w is 1/2.

    Raises:
        ValueError: for head outside [0, 1].

    Reference: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    COLING 2025, arXiv:2404.02657. The released code calls the reverse divergence with its arguments swapped.
    """
    check_fraction("adaptive_kl", head=head)
    student, teacher = softened(rows, T)
    w = head_share(teacher.detach().exp(), student.detach().exp(), head)
    return T.scale * (w * divergence(teacher, student) + (1.0 - w) * divergence(student, teacher))


def on_student_top_k(rows: Rows, T: Temperatures, k: int) -> tuple[Rows, Temperatures]:
    """Return rows over the student's k likeliest classes and one of all others, with both sides softened before.

    A divergence of them is at most that over all classes, and 0 if both sides are equal; its scale is that of T. Which
    classes are the likeliest is a constant.

    Raises:
        ValueError: for k below 1.
    """
    if k < 1:
        raise ValueError(f"on_student_top_k needs k >= 1; got {k}.")
    student, teacher = softened(rows, T)
    kept = student.detach().topk(min(k, student.shape[-1])).indices
    v, u = (torch.cat((x.gather(1, kept), _logsumexp_of_others(x, kept)), 1) for x in (student, teacher))
    one = torch.ones_like(T.student[:1])
    return Rows(v, u, name=rows.name), Temperatures(one, one, T.scale[:, None])


def _logsumexp_of_others(logp: Float[Tensor, "N C"], kept: Tensor) -> Float[Tensor, "N 1"]:
    """Return log of the sum over all classes but ``kept``, (N, 1), without the cancellation of 1 - sum."""
    others = logp.scatter(1, kept, -torch.inf)
    empty = torch.isneginf(others.amax(-1, keepdim=True))
    return torch.logsumexp(others.masked_fill(empty, 0.0), -1, keepdim=True).masked_fill(empty, -torch.inf)


def head_share(p: Float[Tensor, "N C"], q: Float[Tensor, "N C"], head: float) -> Float[Tensor, " N"]:
    """The fraction of sum |p - q| over the head of p, its likely classes up to mass ``head``, (N,), in [0, 1]."""
    if not p.shape[-1]:
        return p.sum(-1)
    sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    in_head = sorted_p.cumsum(-1) <= head
    in_head[..., 0] = True
    difference = (p - q).abs().gather(-1, order)
    total = difference.sum(-1)
    share = (difference * in_head).sum(-1) / torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(total > 0, share, torch.full_like(share, 0.5))


def cross_entropy(rows: Rows) -> Float[Tensor, " N"]:
    """-log p(target) of the student at temperature 1, (N,); 0 on rows without a label.

    Soft labels (N, C) and ``rows.label_smoothing`` are those of ``torch.nn.functional.cross_entropy``, over the classes
    that are not masked. Returns ``rows.task_loss``, the task's own supervised loss, if the rows have one.

    Raises:
        ValueError: for rows without targets, or (checked on the CPU only, where it needs no synchronization) a target
            >= C.
    """
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("cross_entropy")):
        return fast(rows)
    if rows.task_loss is not None:
        return upcast_to_float32(rows.task_loss)
    if rows.label_smoothing:
        return _smoothed(rows)
    if rows.target is not None and rows.target.ndim == 2:
        logp = log_softmax(rows.student)
        target = rows.target.to(logp.dtype)
        return -(target * logp.masked_fill(target == 0, 0.0)).sum(-1)
    target = require_labels(rows, "cross_entropy").long().clamp_min(-1)
    return F.cross_entropy(masked(upcast_to_float32(rows.student)), target, ignore_index=-1, reduction="none")


def _smoothed(rows: Rows) -> Float[Tensor, " N"]:
    """The cross entropy with label smoothing over the unmasked classes, (N,); 0 on rows without a label."""
    smoothing, plain = rows.label_smoothing, cross_entropy(rows.replace(label_smoothing=0.0))
    assert rows.target is not None
    logq = log_softmax(rows.student)
    is_masked = torch.isneginf(logq)
    uniform = -logq.masked_fill(is_masked, 0.0).sum(-1) / (~is_masked).sum(-1).clamp_min(1)
    return (1.0 - smoothing) * plain + smoothing * torch.where(is_labeled(rows.target), uniform, 0.0)


def entropy(logits: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Shannon entropy of softmax(logits) in nats, (N,), in [0, log C]."""
    logp = log_softmax(logits)
    return -(logp.exp() * logp.masked_fill(torch.isneginf(logp), 0.0)).sum(-1)


def require_labels(rows: Rows, owner: str) -> Tensor:
    """Return the rows' class indices, (N,).

    Raises:
        ValueError: for rows without targets or with soft labels, or (checked on the CPU only) a target that is out of
            range.
    """
    if rows.target is None:
        raise ValueError(
            f"{owner} needs labels, but Rows(name={rows.name!r}) has target=None. Yield (input, label) batches, or "
            "set the weight of the hard term to 0."
        )
    if rows.target.ndim == 2:
        raise ValueError(
            f"{owner} needs class indices, and Rows(name={rows.name!r}) has soft labels {tuple(rows.target.shape)}, as "
            "MixUp and CutMix make them. Leave out mixup= and cutmix= (--mixup, --cutmix), pass labels.argmax(-1), or "
            "use a method whose labels count in the cross entropy alone, such as methods.DTKD() or methods.KD()."
        )
    if rows.target.device.type == "cpu" and len(rows) and int(rows.target.max()) >= rows.student.shape[1]:
        raise ValueError(
            f"{owner}: label {int(rows.target.max())} is out of range for {rows.student.shape[1]} classes (labels "
            f"count from 0 to {rows.student.shape[1] - 1}). Is the student's head too small, or do labels start at 1?"
        )
    return rows.target


def check_fraction(owner: str, **values: float) -> None:
    """Raise ValueError for a value outside [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{owner} needs {name} in [0, 1]; got {value!r}.")


def check_skew(owner: str, skew: float) -> None:
    """Raise ValueError for a skew outside [0, 1); at 1 both sides of the divergence are equal."""
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"{owner} needs skew in [0, 1); got {skew!r}. At 1 both sides are equal.")


def softened(rows: Rows, T: Temperatures) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
    """Log-probabilities of student and teacher at their temperatures, (N, C) each, in at least float32."""
    return log_softmax(tempered(rows.student, T.student)), log_softmax(tempered(rows.teacher, T.teacher))


def tempered(logits: Float[Tensor, "N C"], T: Float[Tensor, "#N 1"]) -> Float[Tensor, "N C"]:
    """logits / T in at least float32; masked classes stay masked and give no NaN gradient in a learned T."""
    z = upcast_to_float32(logits)
    if not T.requires_grad:
        return z / T
    is_masked = torch.isneginf(z.detach() / T.detach())  # a finite mask too, if the quotient overflows
    return (z.masked_fill(is_masked, 0.0) / T).masked_fill(is_masked, -torch.inf)


def log_softmax(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """log softmax in at least float32; rows with all classes masked are uniform, without gradient."""
    return F.log_softmax(masked(upcast_to_float32(logits)), dim=-1)


def masked(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Replace rows that have all classes masked by zeros, so that softmax gives no NaN."""
    if logits.shape[-1] == 0:
        return logits
    empty = torch.isneginf(logits.amax(-1, keepdim=True))
    return logits.masked_fill(empty, 0.0)


def divergence(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """KL(p || q) of two log-probabilities, (N,), in nats; negative rounding errors are clamped, gradients kept."""
    p = logp.exp()
    is_masked = p == 0  # minus infinity, or a finite mask that is far below
    ratio = logp.masked_fill(is_masked, 0.0) - logq.masked_fill(is_masked, 0.0)
    value = (p * ratio).sum(-1)
    return value - value.detach().clamp_max(0.0)


def mixture(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"], share: float) -> Float[Tensor, "N C"]:
    """log(share p + (1 - share) q), (N, C), computed in log space."""
    if share in (0.0, 1.0):
        return logp if share == 1.0 else logq
    both = torch.isneginf(logp) & torch.isneginf(logq)
    p, q = logp.masked_fill(both, 0.0), logq.masked_fill(both, 0.0)
    log_share, log_rest = (torch.full((), x, dtype=logp.dtype, device=logp.device).log() for x in (share, 1.0 - share))
    return torch.logaddexp(p + log_share, q + log_rest).masked_fill(both, -torch.inf)
