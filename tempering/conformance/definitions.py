"""Divergences of one row, and known mistakes in them, written for float64 and for reading."""

from __future__ import annotations

import functools

import torch
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
}


def _of_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = log_probabilities(student, temperature).exp(), log_probabilities(teacher, temperature)
    return expectation(p.exp(), p - q)


def _twice_normalized(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p = log_probabilities(student, temperature), log_probabilities(teacher, temperature).exp()
    return expectation(torch.softmax(p, -1), torch.log_softmax(p, -1) - q)


def _student_at_one(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return kl(student * temperature, teacher, temperature)


MISTAKES: dict[str, Definition] = {
    **{f"the definition {name}": function for name, function in DEFINITIONS.items()},
    "probabilities of the student where log-probabilities are due": _of_probabilities,
    "softmax of the teacher's probabilities": _twice_normalized,
    "the temperature applied to the teacher alone": _student_at_one,  # at T = 1 this is kl, which is found first
}
