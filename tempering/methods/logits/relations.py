"""What relational methods over logits share: which entries take part, and how alike two lines of numbers are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.objectives import log_softmax, tempered
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Temperatures


def counted_entries(rows: Rows) -> tuple[Rows, Bool[Tensor, "N C"]]:
    """The rows in float32 at least, those of weight 0 blanked, and which entries count, (N, C).

    An entry counts where its row has weight and its class is masked on neither side. What a row of weight 0 holds is
    exchanged before anything is computed from it: a NaN would pass a later mask on the way back.
    """
    student, teacher = upcast_to_float32(rows.student), upcast_to_float32(rows.teacher)
    if rows.weight is not None:
        out = ~(rows.weight > 0).unsqueeze(1)
        student, teacher = student.masked_fill(out, 0.0), teacher.masked_fill(out, 0.0)
    counted = ~torch.isneginf(student) & ~torch.isneginf(teacher)
    if rows.weight is not None:
        counted = counted & (rows.weight > 0).unsqueeze(1)
    return rows.replace(student=student, teacher=teacher), counted


class Softened(NamedTuple):
    """Log-probabilities of both sides, and which entries count, (N, C) each."""

    student: Float[Tensor, "N C"]
    teacher: Float[Tensor, "N C"]
    counted: Bool[Tensor, "N C"]

    def exp(self) -> Softened:
        """The probabilities themselves, 0 where an entry does not count."""
        p, q = (x.exp().masked_fill(~self.counted, 0.0) for x in (self.student, self.teacher))
        return Softened(p, q, self.counted)


def soften(rows: Rows, counted: Bool[Tensor, "N C"], T: Temperatures) -> Softened:
    """Both sides of rows from ``counted_entries`` at their temperatures."""
    student, teacher = log_softmax(tempered(rows.student, T.student)), log_softmax(tempered(rows.teacher, T.teacher))
    return Softened(student, teacher, counted)


class Lines(NamedTuple):
    """Lines along one dimension, each over its largest entry, and the logarithm of what it was divided by.

    Likeness does not know the scale of a line, and so a class whose probabilities underflow keeps its line.
    """

    values: Tensor
    log_scale: Tensor


def lines(logp: Float[Tensor, "N C"], counted: Bool[Tensor, "N C"], dim: int) -> Lines:
    """The probabilities along ``dim`` as scaled lines; 0 where an entry does not count."""
    x = logp.detach().masked_fill(~counted, -torch.inf)
    top = x.amax(dim, keepdim=True)
    top = top.masked_fill(torch.isneginf(top), 0.0)
    # blanked before the exponential: an entry that does not count may lie far above the others
    shifted = (logp - top).masked_fill(~counted, -torch.inf)
    return Lines(shifted.exp(), top)


def correlation_distance(
    a: Lines, b: Lines, counted: Bool[Tensor, ...], dim: int, *, centered: bool = False, eps: float = 0.0
) -> Tensor:
    """1 - cosine of two families of lines along ``dim``, one value a line, in [0, 2]; ``centered``: 1 - Pearson's r.

    Written as half the squared distance of the unit lines, so it is exactly 0, a minimum, where they agree. A line
    without direction (constant, where centered) is 1 from any other and 0 from its like, with no slope.

    ``eps`` is what the released codes add to the product of the norms, in the probabilities' own scale.
    """
    (u, norm_a, flat_a), (v, norm_b, flat_b) = (_unit(x.values, counted, dim, centered) for x in (a, b))
    half = 0.5 * (u - v).square().sum(dim)
    if eps:
        product = norm_a * norm_b * (a.log_scale + b.log_scale).squeeze(dim).exp()
        whole = torch.where(flat_a | flat_b, 0.0, product)
        return (eps + whole * half) / (whole + eps)
    return torch.where(flat_a | flat_b, (flat_a ^ flat_b).to(half.dtype), half)


def _unit(x: Tensor, counted: Tensor, dim: int, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lines of length 1 (0 where flat), their lengths, and which are flat; a flat one's length is given as 1."""
    if centered:
        n = counted.sum(dim, keepdim=True).clamp_min(1)
        mean = x.sum(dim, keepdim=True) / n
        x = torch.where(counted, x - mean, 0.0)
    square = x.square().sum(dim)
    # a line's largest entry was 1, and a mean of n numbers near 1 is off by a few eps
    noise = (8.0 * torch.finfo(x.dtype).eps) ** 2 * counted.sum(dim).clamp_min(1)
    flat = square <= noise
    norm = torch.where(flat, 1.0, square).sqrt()
    unit = torch.where(flat.unsqueeze(dim), 0.0, x / norm.unsqueeze(dim))
    return unit, norm, flat


def mean_over(value: Tensor, counted: Tensor) -> Float[Tensor, ""]:
    """The mean of the entries that count, (); 0 where none does."""
    return torch.where(counted, value, 0.0).sum() / counted.sum().clamp_min(1)


def block_scale(T: Temperatures, counted: Bool[Tensor, "N C"]) -> Float[Tensor, ""]:
    """What a term over a whole block is multiplied by, (): mean(T_s) mean(T_t), or a policy's own mean factor."""
    kept = counted.any(1)

    def mean(x: Tensor) -> Tensor:
        return mean_over(x.expand(len(kept), 1).squeeze(1), kept)

    return mean(T.student) * mean(T.teacher) if T.factor is None else mean(T.factor)


def row_distance(softened: Softened, *, centered: bool, eps: float) -> Float[Tensor, " N"]:
    """``correlation_distance`` of each row's two distributions over the classes, (N,)."""
    counted = softened.counted
    a, b = lines(softened.student, counted, 1), lines(softened.teacher, counted, 1)
    return correlation_distance(a, b, counted, 1, centered=centered, eps=eps)


def class_distance(softened: Softened, *, centered: bool, eps: float) -> Float[Tensor, ""]:
    """The mean over classes of the ``correlation_distance`` of a class's two lines of probabilities over rows, ()."""
    counted = softened.counted
    a, b = lines(softened.student, counted, 0), lines(softened.teacher, counted, 0)
    return mean_over(correlation_distance(a, b, counted, 0, centered=centered, eps=eps), counted.any(0))
