"""Similarity of two models: linear CKA of representations, and cosine similarity of input gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from tempering.audits.base import Answer
from tempering.audits.intervals import Z


def cka(a: Float[Tensor, "N P"], b: Float[Tensor, "N Q"], *, unbiased: bool = True) -> float:
    """Return the linear centered kernel alignment of two representations of the same N samples.

    It is 1 if they are equal up to rotation and scale, about 0 if they have nothing in common. The biased estimate is
    far above 0 for unrelated features with more dimensions than samples; the ``unbiased`` one is not, and may be
    slightly below 0. A constant representation has an alignment of 0.

    Raises:
        ValueError: if the numbers of samples differ, or there are fewer than 4.

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414; the
    unbiased HSIC of Song et al., 2012, as in Nguyen et al., 2021, arXiv:2010.15327, equation 3.
    """
    K, L = grams(a, b)
    return _alignment(K, L, unbiased)


def cka_interval(a: Float[Tensor, "N P"], b: Float[Tensor, "N Q"], *, folds: int = 10) -> tuple[float, float]:
    """Return the 95 % interval of ``cka`` over samples, by the jackknife over ``folds`` parts."""
    K, L = grams(a, b)
    folds = min(folds, len(K) // 4)
    if folds < 2:
        raise ValueError(f"an interval of CKA needs 8 samples or more; got {len(K)}.")
    fold = torch.arange(len(K)) % folds
    remaining = [[G[fold != f][:, fold != f] for G in (K, L)] for f in range(folds)]
    values = torch.tensor([_alignment(first, second, True) for first, second in remaining], dtype=torch.float64)
    half = Z * float(((folds - 1) / folds * (values - values.mean()).square().sum()).sqrt())
    estimate = _alignment(K, L, True)
    return max(-1.0, estimate - half), min(1.0, estimate + half)


def grams(a: Tensor, b: Tensor) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N N"]]:
    """Return the Gram matrix of each representation, in float64; features are flattened and centered first."""
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA compares the same samples, 4 or more; got {len(a)} and {len(b)}.")
    flat = [x.flatten(1).double() for x in (a, b)]
    first, second = (x - x.mean(0) for x in flat)
    # a centered constant holds rounding errors, which have random directions
    first, second = (c * (c.abs().max() > 1e-12 * x.abs().max()) for c, x in zip((first, second), flat, strict=True))
    return first @ first.T, second @ second.T


def _alignment(K: Tensor, L: Tensor, unbiased: bool) -> float:
    hsic = _unbiased if unbiased else _plain
    both, own, other = hsic(K, L), hsic(K, K), hsic(L, L)
    if own <= 0 or other <= 0:
        return 0.0
    return max(-1.0, min(1.0, both / (own * other) ** 0.5))


def _plain(K: Tensor, L: Tensor) -> float:
    center = [G - G.mean(0) - G.mean(1)[:, None] + G.mean() for G in (K, L)]
    return float((center[0] * center[1]).sum())


def _unbiased(K: Tensor, L: Tensor) -> float:
    n = len(K)
    K, L = (G - torch.diag(torch.diagonal(G)) for G in (K, L))
    sums = K.sum(0), L.sum(0)
    total = (K * L).sum() + sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums[0] @ sums[1])
    return float(total) / (n * (n - 3))


def slopes(answer: Answer, x: Tensor, y: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """Return the gradient of each sample's cross-entropy in its input, flattened, (N, D) on the CPU."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(answer(leaf), y, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0].flatten(1).cpu()


def agreement(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Return the cosine similarity of each sample's two gradients, (N,), 0 where one is zero."""
    # divide by the largest entries first: gradients of confident predictions would underflow in a norm
    a, b = (g.double() / g.double().abs().amax(1, keepdim=True).clamp_min(1e-300) for g in (a, b))
    return cosine_similarity(a, b, dim=1)
