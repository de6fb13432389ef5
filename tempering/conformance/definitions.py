"""Divergences of one row, and known mistakes in them, written for float64 and for reading."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.conformance.promises import Definition


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


def expectation(p: Tensor, value: Tensor) -> Tensor:
    """Sum of p times value over classes; 0 where p is 0, whatever the value."""
    return torch.where(p > 0, p * torch.where(p > 0, value, 0.0), 0.0).sum(-1)


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) in nats, (N,)."""
    q, p = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    return expectation(p.exp(), p - q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(student || teacher) in nats, (N,)."""
    return kl(teacher, student, temperature)


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross entropy with the teacher's probabilities as targets, (N,)."""
    p = log_probabilities(teacher, temperature).exp()
    return -expectation(p, log_probabilities(student, temperature))


def jsd(student: Tensor, teacher: Tensor, temperature: float, *, beta: float = 0.5) -> Tensor:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s, (N,); 2306.13649."""
    q, p = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    m = torch.logaddexp(p + torch.tensor(beta).log(), q + torch.tensor(1 - beta).log())
    return beta * expectation(p.exp(), p - m) + (1 - beta) * expectation(q.exp(), q - m)


def mse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over classes of the squared difference of the logits over T, (N,)."""
    return ((student - teacher) / temperature).square().mean(-1)


def mse_of_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over classes of the squared difference of the probabilities, (N,)."""
    q, p = log_probabilities(student, temperature).exp(), log_probabilities(teacher, temperature).exp()
    return (q - p).square().mean(-1)


def total_variation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Half the sum over classes of the absolute difference of the probabilities, (N,)."""
    q, p = log_probabilities(student, temperature).exp(), log_probabilities(teacher, temperature).exp()
    return (q - p).abs().sum(-1) / 2


def l1(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over classes of the absolute difference of the logits over T, (N,)."""
    return ((student - teacher) / temperature).abs().mean(-1)


def smooth_l1(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over classes of the smooth absolute difference of the logits over T, quadratic below 1, (N,)."""
    return F.smooth_l1_loss(student / temperature, teacher / temperature, reduction="none").mean(-1)


def cosine(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """1 minus the cosine similarity of the logits, (N,); 1 for a row of zeros."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


DEFINITIONS: dict[str, Definition] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "cross_entropy": cross_entropy,
    "jsd": jsd,
    "jsd(0.1)": functools.partial(jsd, beta=0.1),
    "jsd(0.9)": functools.partial(jsd, beta=0.9),
    "mse": mse,
    "mse_of_probabilities": mse_of_probabilities,
    "total_variation": total_variation,
    "l1": l1,
    "smooth_l1": smooth_l1,
    "cosine": cosine,
}
MEANS_OVER_CLASSES = ("mse", "mse_of_probabilities", "l1", "smooth_l1")
"""Definitions that are divided by the number of classes."""
EXPECTATIONS = ("kl", "reverse_kl", "cross_entropy", "jsd", "jsd(0.1)", "jsd(0.9)")
"""Definitions that are sums over classes, weighted by probabilities."""


def _of_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = log_probabilities(student, temperature).exp(), log_probabilities(teacher, temperature)
    return expectation(p.exp(), p - q)


def _twice_normalized(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = log_probabilities(student, temperature), log_probabilities(teacher, temperature).exp()
    return expectation(torch.softmax(p, -1), torch.log_softmax(p, -1) - q)


def _student_at_one(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kl(student * temperature, teacher, temperature)


MISTAKES: dict[str, Definition] = {
    "probabilities of the student where log-probabilities are due": _of_probabilities,
    "softmax of the teacher's probabilities": _twice_normalized,
    "the temperature applied to the teacher alone": _student_at_one,  # at T = 1 this is kl, which is looked for first
}
