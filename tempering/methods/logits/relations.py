"""Shared functions of relational methods over logits: masks of counted entries, and cosine and Pearson distances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.objectives import log_softmax, tempered
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Temperatures


def counted_entries(rows: Rows) -> tuple[Rows, Bool[Tensor, "N C"]]:
    """Return the rows in float32 at least, zeros in rows of weight 0, and the mask of counted entries, (N, C).

    An entry is counted if its row has weight > 0 and its class is masked on neither side. Rows of weight 0 are replaced
    before anything is computed from them, since a NaN would reach the gradient through a later mask.
    """
    student, teacher = upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)
    if rows.weight is not None:
        excluded = ~(rows.weight > 0).unsqueeze(1)
        student, teacher = student.masked_fill(excluded, 0.0), teacher.masked_fill(excluded, 0.0)
    counted = ~torch.isneginf(student) & ~torch.isneginf(teacher)
    if rows.weight is not None:
        counted = counted & (rows.weight > 0).unsqueeze(1)
    return rows.replace(student=student, teacher=teacher), counted


class Softened(NamedTuple):
    """Log-probabilities of both sides, and the mask of counted entries, (N, C) each."""

    student: Float[Tensor, "N C"]
    teacher: Float[Tensor, "N C"]
    counted: Bool[Tensor, "N C"]

    def exp(self) -> Softened:
        """Return the probabilities, 0 where an entry is not counted."""
        p, q = (x.exp().masked_fill(~self.counted, 0.0) for x in (self.student, self.teacher))
        return Softened(p, q, self.counted)


def soften(rows: Rows, counted: Bool[Tensor, "N C"], T: Temperatures) -> Softened:
    """Return log-probabilities of rows from ``counted_entries`` at their temperatures."""
    student, teacher = log_softmax(tempered(rows.student, T.student)), log_softmax(tempered(rows.teacher, T.teacher))
    return Softened(student, teacher, counted)


class Lines(NamedTuple):
    """Vectors along one dimension, each divided by its largest entry, and the logarithm of that entry.

    Cosines are invariant to the scale of a vector, so this keeps classes whose probabilities would underflow.
    """

    values: Tensor
    log_scale: Tensor


def lines(logp: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"], dim: int) -> Lines:
    """Return the probabilities along ``dim`` as scaled vectors; 0 where an entry is not counted."""
    x = logp.detach().masked_fill(~counted, -torch.inf)
    top = x.amax(dim, keepdim=True)
    top = top.masked_fill(torch.isneginf(top), 0.0)
    # mask before exp: an entry that is not counted may be much larger than the others
    shifted = (logp - top).masked_fill(~counted, -torch.inf)
    return Lines(shifted.exp(), top)


def correlation_distance(
    a: Lines, b: Lines, counted: Bool[Tensor, "*_"], dim: int, *, centered: bool = False, eps: float = 0.0
) -> Tensor:
    """Return 1 - cosine of pairs of vectors along ``dim``, one value per pair, in [0, 2].

    With ``centered`` it is 1 - Pearson's r. Computed as half the squared distance of the unit vectors, so it is exactly
    0, a minimum, where they agree. A zero vector (constant, if centered) has distance 1 to any other and 0 to another
    zero vector, with gradient 0.

    ``eps`` is added to the product of the norms of the unscaled probabilities, as in the released codes.
    """
    (u, norm_a, zero_a), (v, norm_b, zero_b) = (_unit(x.values, counted, dim, centered) for x in (a, b))
    half = 0.5 * (u - v).square().sum(dim)
    if eps:
        product = norm_a * norm_b * (a.log_scale + b.log_scale).squeeze(dim).exp()
        product = torch.where(zero_a | zero_b, 0.0, product)
        return (eps + product * half) / (product + eps)
    return torch.where(zero_a | zero_b, (zero_a ^ zero_b).to(half.dtype), half)


def _unit(x: Tensor, counted: Tensor, dim: int, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit vectors (0 for zero vectors), their norms (1 for zero vectors), and which are zero vectors."""
    if centered:
        n = counted.sum(dim, keepdim=True).clamp_min(1)
        mean = x.sum(dim, keepdim=True) / n
        x = torch.where(counted, x - mean, 0.0)
    square = x.square().sum(dim)
    # the largest entry is 1, and the mean of n numbers near 1 has an error of a few eps
    noise = (8.0 * torch.finfo(x.dtype).eps) ** 2 * counted.sum(dim).clamp_min(1)
    is_zero = square <= noise
    norm = torch.where(is_zero, 1.0, square).sqrt()
    unit = torch.where(is_zero.unsqueeze(dim), 0.0, x / norm.unsqueeze(dim))
    return unit, norm, is_zero


def mean_over(value: Tensor, counted: Tensor) -> Float[Tensor, ""]:
    """Return the mean of the counted entries, (); 0 if there are none."""
    return torch.where(counted, value, 0.0).sum() / counted.sum().clamp_min(1)


def block_scale(T: Temperatures, counted: Bool[Tensor, "N C"]) -> Float[Tensor, ""]:
    """Return the factor of a term over a whole block, (): mean(T_s) mean(T_t), or the mean of a policy's own factor."""
    kept = counted.any(1)

    def mean(x: Tensor) -> Tensor:
        return mean_over(x.expand(len(kept), 1).squeeze(1), kept)

    return mean(T.student) * mean(T.teacher) if T.factor is None else mean(T.factor)


def row_distance(softened: Softened, *, centered: bool, eps: float) -> Float[Tensor, " N"]:
    """Return the ``correlation_distance`` of each row's two distributions over the classes, (N,)."""
    counted = softened.counted
    a, b = lines(softened.student, counted, 1), lines(softened.teacher, counted, 1)
    return correlation_distance(a, b, counted, 1, centered=centered, eps=eps)


def class_distance(softened: Softened, *, centered: bool, eps: float) -> Float[Tensor, ""]:
    """Return the mean over classes of the ``correlation_distance`` of a class's probabilities over the rows, ()."""
    counted = softened.counted
    a, b = lines(softened.student, counted, 0), lines(softened.teacher, counted, 0)
    return mean_over(correlation_distance(a, b, counted, 0, centered=centered, eps=eps), counted.any(0))
