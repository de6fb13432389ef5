"""What a loss promises: its definition, temperature scale, mask and reduction."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["logits", "tokens", "top_k", "features", "scores"]
KINDS: tuple[Kind, ...] = ("logits", "tokens", "top_k", "features", "scores")
Definition = Callable[..., Tensor]
"""(student (N, C), teacher (N, C), temperature), float64 -> (N,); a parameter ``target`` gets the labels (N,)."""
Reduction = Literal["mean", "sum", "batch", "elements", "none"]
Tail = Literal["truncated", "renormalized", "bucket"]


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What the documentation of a loss says. None: nothing is said, and a difference is no failure.

    Args:
        definition: the divergence of one row without its temperature scale, a key of ``DEFINITIONS`` or a function
            (see ``Definition``); for features and scores the function takes both sides and returns the loss. None: the
            harness looks for the known definition that the loss computes, and compares with that.
        temperature: T of a loss without an argument ``temperature``.
        temperature_squared: whether the loss is multiplied by T^2.
        reduction: "mean" over valid rows, "sum" over them, "batch" (sum over the rows, divided by the first dimension),
            "elements" (mean over rows and classes), "none" (a value per row).
        batch_dependent: whether a row's loss depends on other rows.
        divergence: whether the loss is 0 at agreement and positive elsewhere. None: as the definition.
        identifies_teacher: whether a student at the minimum has the teacher's probabilities. None: yes, for a divergence.
        detached_scale: whether factors of the loss are constants for the gradient (weights, adaptive temperatures), so
            that the gradient is not the slope of the value.
        ignored_rows: whether rows labeled -100 (or masked) are left out.
        sequences: for logits: whether (B, T, V) logits give the loss of their B * T rows.
        shift: for tokens: position i predicts the label of position i + shift.
        masked_classes: whether logits may be minus infinity on both sides.
        masked_teacher: whether the teacher's logits alone may be minus infinity.
        padded_vocabulary: whether a teacher with more columns than the student, or the reverse, is allowed.
        low_precision: whether logits may be bfloat16, with the arithmetic in float32.
        class_order, row_order: whether the order of the classes, of the rows, has no effect.
        tail: for top-k: the teacher's mass outside its list is "truncated" (left out), the list is "renormalized", or
            the mass is one more class (a "bucket").
        sampled: for top-k: the entries are classes drawn from the teacher, and the loss is unbiased.
        top_k_values: for top-k: what the list holds: "log_probs", "probs" or "logits".
        feature_shape: for features: their shape without the batch dimension.
    """

    definition: str | Definition | None = None
    temperature: float = 1.0
    temperature_squared: bool | None = None
    reduction: Reduction | None = None
    batch_dependent: bool = False
    divergence: bool | None = None
    identifies_teacher: bool | None = None
    detached_scale: bool = False
    ignored_rows: bool | None = None
    sequences: bool | None = None
    shift: int = 0
    masked_classes: bool | None = None
    masked_teacher: bool | None = None
    padded_vocabulary: bool | None = None
    low_precision: bool | None = None
    class_order: bool = True
    row_order: bool = True
    tail: Tail | None = None
    sampled: bool = False
    top_k_values: Literal["log_probs", "probs", "logits"] = "log_probs"
    feature_shape: tuple[int, ...] = (4,)

    def __post_init__(self) -> None:
        if isinstance(self.definition, str) and self.definition not in DEFINITIONS:
            raise ValueError(
                f"definition must be a function or one of {', '.join(DEFINITIONS)}; got {self.definition!r}."
            )
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite; got {self.temperature!r}.")


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
    "probabilities of the student where log-probabilities are due": _of_probabilities,
    "softmax of the teacher's probabilities": _twice_normalized,
    "the temperature applied to the teacher alone": _student_at_one,
    **{f"the definition {name}": function for name, function in DEFINITIONS.items()},
}


def takes(function: Callable[..., object], *names: str) -> str | None:
    """Return the first of these names that is a parameter of the function, or None."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in names if name in parameters), None)
