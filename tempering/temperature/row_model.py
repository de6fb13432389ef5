"""A row of logits as its maximum and a normal bulk: where the solver of ``Sharpness`` starts, from scalars per row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tempering.temperature.sharpness import Statistics


class Model(NamedTuple):
    """A row as its maximum and a bulk of n - 1 draws of a normal distribution cut off at the maximum, (N, 1) each.

    LSE(z / T) = log(exp(top / T) + (n - 1) E exp(x / T)), whose expectation is known in closed form.
    """

    top: Tensor
    sigma: Tensor
    """standard deviation of the normal distribution before it is cut off"""
    cut: Tensor
    """where it is cut off, in units of sigma from its mean"""
    offset: Tensor
    """log(n - 1) - tail(cut)"""
    wrong: tuple[Tensor, Tensor]
    """by how much the model's mean and variance differ from those of the row"""


def _tail(x: Tensor) -> tuple[Tensor, Tensor]:
    """log Phi(x), plus x^2 / 2 where x < 0, Phi the normal distribution function; and Phi'(x) / Phi(x)."""
    erfcx = cast(Tensor, cast(Any, torch.special).erfcx(x.abs() * math.sqrt(0.5)))  # torch has no types for it
    bell = (-0.5 * x.square()).exp()
    phi = 1.0 - 0.5 * erfcx * bell
    below = x < 0
    value = torch.where(below, 0.5 * erfcx, phi).log()
    hazard = torch.where(below, math.sqrt(2 / math.pi) / erfcx, bell / (math.sqrt(2 * math.pi) * phi))
    return value, hazard


def fit(row: Statistics) -> Model:
    """Return the model with the row's count and maximum, and its mean and variance where such a model exists."""
    others = (row.n - 1.0).clamp_min(1.0)
    ratio = row.top / row.std  # in units of std: nothing overflows
    mean = -ratio / others
    variance = ((row.n - ratio.square()) / others - mean.square()).clamp_min(1e-6)
    center, sigma = mean, variance.sqrt()
    for _ in range(2):
        cut = (ratio - center) / sigma
        hazard = _tail(cut)[1]
        sigma = (variance / (1.0 - cut * hazard - hazard.square()).clamp_min(0.3)).sqrt()
        center = mean + sigma * hazard
    cut = (ratio - center) / sigma
    value, hazard = _tail(cut)
    share = others / row.n
    wrong_mean = (center - sigma * hazard - mean).abs() * share
    wrong_variance = (sigma.square() * (1.0 - cut * hazard - hazard.square()) - variance).abs() * share
    wrong = wrong_mean * row.std, wrong_variance * row.std.square()
    return Model(row.top, sigma * row.std, cut, others.log() - value, wrong)


def _of_model(model: Model, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """LSE(z / T) of the model, and its derivative in 1 / T, at ``inverse`` = 1 / T."""
    shift = model.sigma * inverse
    x = model.cut - shift
    value, hazard = _tail(x)
    # (max(x, 0)^2 - max(cut, 0)^2) / 2, without cancellation
    positive = model.cut.clamp_min(0.0)
    shift = torch.minimum(shift, positive)
    bulk = model.offset + value - shift * (positive - 0.5 * shift)
    # softplus() and sigmoid() of torch round the last rows of a tensor otherwise than the first
    less = (-bulk.abs()).exp()
    lse = model.top * inverse + bulk.clamp_min(0.0) + (1.0 + less).log()
    share = torch.where(bulk > 0, 1.0, less) / (1.0 + less)
    return lse, model.top - share * model.sigma * (x + hazard)


def start_of(u: Statistics, v: Statistics, tau: Tensor, end: Tensor) -> Tensor:
    """Return the delta to look at first, (N, 1): the root for the models or, if that is better, the ratio of spreads.

    The ratio of spreads is exact to the second order in 1 / T. The model has all orders, but where its mean or variance
    is wrong (rows of a few classes) it is worse at large T. It is used where this error, in the logsumexp, is below a
    third of what the model adds to the second order.
    """
    by_spread = (tau * (u.std - v.std) / (u.std + v.std)).clamp(-end, end)
    inverse = 1.0 / (tau + by_spread), 1.0 / (tau - by_spread)
    # at least half of these temperatures
    low = (0.5 * (by_spread - tau)).clamp_min(-end)
    high = (0.5 * (by_spread + tau)).clamp_max(end)
    models, delta = (fit(u), fit(v)), by_spread
    wrong = added = torch.zeros_like(delta)
    for step in range(2):
        (f_u, by_u), (f_v, by_v) = (_of_model(m, b) for m, b in zip(models, inverse, strict=True))
        if not step:
            for row, model, b, lse in zip((u, v), models, inverse, (f_u, f_v), strict=True):
                wrong = wrong + model.wrong[0] * b + 0.5 * model.wrong[1] * b.square()
                added = added + (lse - row.n.log() - 0.5 * (row.std * b).square()).abs()
        f, slope = f_u - f_v, by_u * inverse[0].square() + by_v * inverse[1].square()
        newton = slope + 2.0 * delta * f * inverse[0] * inverse[1]
        delta = delta + f / torch.where(newton > 0, newton, slope)
        delta = torch.maximum(torch.minimum(delta, high), low)
        inverse = 1.0 / (tau + delta), 1.0 / (tau - delta)
    return torch.where(wrong < 0.3 * added, delta, by_spread)
