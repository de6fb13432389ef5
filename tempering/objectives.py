"""Divergences, a value a row. Pure functions of rows and temperatures; nothing here reduces.

Each is exactly zero where the two sides agree and never negative, is multiplied by ``T.scale`` unless it says
otherwise, is computed in float32 at least, and leaves out classes that are minus infinity on both sides. A class that
is minus infinity for the student alone, and not for the teacher, costs infinity: mask both sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Temperatures
from tempering.utils.override import OVERRIDES


def kl(rows: Rows, T: Temperatures) -> Float[Tensor, " N"]:
    """T_s T_t KL(teacher || student), (N,); 0 exactly where the softened two agree.

    Reference: Hinton et al., 2015, arXiv:1503.02531, section 2.
    """
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("kl")):
        return fast(rows, T)
    student, teacher = softened(rows, T)
    return T.scale * divergence(teacher, student)


def reverse_kl(rows: Rows, T: Temperatures) -> Float[Tensor, " N"]:
    """T_s T_t KL(student || teacher), (N,): seeks the teacher's modes.

    Reference: Gu et al., "MiniLLM", ICLR 2024, arXiv:2306.08543.
    """
    student, teacher = softened(rows, T)
    return T.scale * divergence(student, teacher)


def jsd(rows: Rows, T: Temperatures, *, beta: float = 0.5) -> Float[Tensor, " N"]:
    """T_s T_t [beta KL(teacher || m) + (1 - beta) KL(student || m)], m = beta teacher + (1 - beta) student, (N,).

    At beta 0 and 1, where the definition itself is zero, the limits that the source takes stand: ``kl`` at 0 and
    ``reverse_kl`` at 1.

    Raises:
        ValueError: for beta outside [0, 1].

    Reference: Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv:2306.13649, equation 1.
    """
    check_fraction("jsd", beta=beta)
    if beta in (0.0, 1.0):
        return kl(rows, T) if beta == 0.0 else reverse_kl(rows, T)
    student, teacher = softened(rows, T)
    middle = mixture(teacher, student, beta)
    return T.scale * (beta * divergence(teacher, middle) + (1.0 - beta) * divergence(student, middle))


def skew_kl(rows: Rows, T: Temperatures, *, skew: float = 0.1) -> Float[Tensor, " N"]:
    """T_s T_t KL(teacher || skew teacher + (1 - skew) student), (N,); ``kl`` at skew 0.

    Raises:
        ValueError: for skew outside [0, 1).

    Reference: Ko et al., "DistiLLM", ICML 2024, arXiv:2402.03898, equation 3. The released code leaves the teacher's
    entropy out of the value; the gradient is the same.
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
    """T_s T_t times half the sum of |teacher - student|, the total variation distance, (N,); unscaled in [0, 1].

    Where the two agree on a class its slope is 0, as torch has it.

    Reference: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023,
    arXiv:2307.15190.
    """
    student, teacher = softened(rows, T)
    return T.scale * 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)


def adaptive_kl(rows: Rows, T: Temperatures, *, head: float = 0.5) -> Float[Tensor, " N"]:
    """T_s T_t [w KL(teacher || student) + (1 - w) KL(student || teacher)], (N,), with a weight w for each row.

    w is the part of |teacher - student| that lies in the teacher's head, held constant: the likeliest classes whose
    probabilities together stay within ``head``, and the likeliest one always. Where the two agree w is 1/2.

    Raises:
        ValueError: for head outside [0, 1].

    Reference: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    COLING 2025, arXiv:2404.02657. The released code calls the reverse divergence with its arguments exchanged.
    """
    check_fraction("adaptive_kl", head=head)
    student, teacher = softened(rows, T)
    w = head_share(teacher.detach().exp(), student.detach().exp(), head)
    return T.scale * (w * divergence(teacher, student) + (1.0 - w) * divergence(student, teacher))


def head_share(p: Float[Tensor, "N C"], q: Float[Tensor, "N C"], head: float) -> Float[Tensor, " N"]:
    """Which part of sum |p - q| lies in the head of p, the likeliest classes up to mass ``head``, (N,), in [0, 1]."""
    if not p.shape[-1]:
        return p.sum(-1)
    likeliest, order = p.sort(dim=-1, descending=True, stable=True)
    inside = likeliest.cumsum(-1) <= head
    inside[..., 0] = True
    apart = (p - q).abs().gather(-1, order)
    whole = apart.sum(-1)
    share = (apart * inside).sum(-1) / torch.where(whole > 0, whole, torch.ones_like(whole))
    return torch.where(whole > 0, share, torch.full_like(share, 0.5))


def cross_entropy(rows: Rows) -> Float[Tensor, " N"]:
    """-log p(target) of the student at temperature 1, (N,); 0 on rows without a label.

    Rows that carry ``hard``, their task's own supervised loss, give that.

    Raises:
        ValueError: for rows without targets, or (seen on the CPU alone, where it costs nothing) a target >= C.
    """
    if not torch.compiler.is_compiling() and (fast := OVERRIDES.get().get("cross_entropy")):
        return fast(rows)
    if rows.task_loss is not None:
        return upcast_to_float32(rows.task_loss)
    target = require_labels(rows, "cross_entropy").long().clamp_min(-1)
    return F.cross_entropy(masked(upcast_to_float32(rows.student)), target, ignore_index=-1, reduction="none")


def entropy(logits: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Shannon entropy of softmax(logits) in nats, (N,), in [0, log C]."""
    logp = log_softmax(logits)
    return -(logp.exp() * logp.masked_fill(torch.isneginf(logp), 0.0)).sum(-1)


def require_labels(rows: Rows, asker: str) -> Tensor:
    """The rows' targets; a clear error where there are none or (on the CPU) one names no class."""
    if rows.target is None:
        raise ValueError(
            f"{asker} needs labels, but Rows(name={rows.name!r}) has target=None. Yield (input, label) batches, or "
            "set the weight of the hard term to 0."
        )
    if rows.target.device.type == "cpu" and len(rows) and int(rows.target.max()) >= rows.student.shape[1]:
        raise ValueError(
            f"{asker}: label {int(rows.target.max())} is out of range for {rows.student.shape[1]} classes (labels "
            f"count from 0 to {rows.student.shape[1] - 1}). Is the student's head too small, or do labels start at 1?"
        )
    return rows.target


def check_fraction(owner: str, **values: float) -> None:
    """Refuse a weight of a mixture outside [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{owner} needs {name} in [0, 1]; got {value!r}.")


def check_skew(owner: str, skew: float) -> None:
    """Refuse a skew at which the two sides would be one."""
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"{owner} needs skew in [0, 1); got {skew!r}. At 1 both sides are the same, and it is 0.")


def softened(rows: Rows, T: Temperatures) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
    """Log-probabilities of student and teacher at their temperatures, in float32 at least."""
    return log_softmax(tempered(rows.student, T.student)), log_softmax(tempered(rows.teacher, T.teacher))


def tempered(logits: Float[Tensor, "N C"], T: Float[Tensor, "#N 1"]) -> Float[Tensor, "N C"]:
    """logits / T in float32 at least; a masked class stays masked and sends no NaN into a T that learns."""
    z = upcast_to_float32(logits)
    if not T.requires_grad:
        return z / T
    gone = torch.isneginf(z)
    return (z.masked_fill(gone, 0.0) / T).masked_fill(gone, -torch.inf)


def log_softmax(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """log softmax, finite also where a row has all its classes masked (then uniform, without gradient)."""
    return F.log_softmax(masked(upcast_to_float32(logits)), dim=-1)


def masked(logits: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """The logits, with a row that has no class left replaced by zeros, so that nothing turns into NaN."""
    if logits.shape[-1] == 0:
        return logits
    empty = torch.isneginf(logits.amax(-1, keepdim=True))
    return logits.masked_fill(empty, 0.0)


def divergence(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """KL(p || q) of two log-probabilities, (N,), in nats; never below zero by rounding, its gradient untouched."""
    gone = torch.isneginf(logp)
    ratio = logp.masked_fill(gone, 0.0) - logq.masked_fill(gone, 0.0)
    value = (logp.exp() * ratio).sum(-1)
    return value - value.detach().clamp_max(0.0)


def mixture(logp: Float[Tensor, "N C"], logq: Float[Tensor, "N C"], share: float) -> Float[Tensor, "N C"]:
    """log(share p + (1 - share) q) without leaving log space."""
    if share in (0.0, 1.0):
        return logp if share == 1.0 else logq
    both = torch.isneginf(logp) & torch.isneginf(logq)
    p, q = logp.masked_fill(both, 0.0), logq.masked_fill(both, 0.0)
    weights = torch.tensor([share, 1.0 - share], dtype=logp.dtype, device=logp.device).log()
    return torch.logaddexp(p + weights[0], q + weights[1]).masked_fill(both, -torch.inf)
