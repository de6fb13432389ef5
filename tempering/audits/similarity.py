"""How alike two models are inside: linear CKA of representations, and the angle between input gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from tempering.audits.base import Answer
from tempering.audits.intervals import Z


def cka(a: Float[Tensor, "N P"], b: Float[Tensor, "N Q"], *, unbiased: bool = True) -> float:
    """Linear centered kernel alignment of two representations of the same N samples: 1 where they agree up to rotation
    and scale, about 0 where they have nothing in common.

    The plain one is far above 0 for unrelated features that are wider than there are samples; ``unbiased`` is not, and
    may be a little below 0. A representation that is constant has an alignment of 0.

    Raises:
        ValueError: for other numbers of samples, or fewer than 4.

    Reference: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019, arXiv:1905.00414; the
    unbiased HSIC of Song et al., 2012, as Nguyen et al., 2021, arXiv:2010.15327, equation 3 has it.
    """
    K, L = grams(a, b)
    return _alignment(K, L, unbiased)


def cka_interval(a: Float[Tensor, "N P"], b: Float[Tensor, "N Q"], *, folds: int = 10) -> tuple[float, float]:
    """The 95 % interval of ``cka`` over samples, by leaving out one of ``folds`` parts at a time (the jackknife)."""
    K, L = grams(a, b)
    folds = min(folds, len(K) // 4)
    if folds < 2:
        raise ValueError(f"an interval of CKA needs 8 samples or more; got {len(K)}.")
    place = torch.arange(len(K)) % folds
    left = [[G[place != f][:, place != f] for G in (K, L)] for f in range(folds)]
    each = torch.tensor([_alignment(first, second, True) for first, second in left], dtype=torch.float64)
    half = Z * float(((folds - 1) / folds * (each - each.mean()).square().sum()).sqrt())
    middle = _alignment(K, L, True)
    return max(-1.0, middle - half), min(1.0, middle + half)


def grams(a: Tensor, b: Tensor) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N N"]]:
    """Inner products of the samples in each representation, in float64; features are centered and flattened first."""
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"CKA compares the same samples, 4 or more; got {len(a)} and {len(b)}.")
    flat = [x.flatten(1).double() for x in (a, b)]
    first, second = (x - x.mean(0) for x in flat)
    # what is left of a constant is rounding, which has directions of its own
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
    whole = (K * L).sum() + sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums[0] @ sums[1])
    return float(whole) / (n * (n - 3))


def slopes(answer: Answer, x: Tensor, y: Int[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """The gradient of each sample's cross-entropy in its input, flattened, (N, D) on the CPU."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(answer(leaf), y, reduction="sum")
        return torch.autograd.grad(loss, leaf)[0].flatten(1).cpu()


def agreement(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Cosine of the angle between each sample's two gradients, (N,), 0 where one is zero."""
    # by their largest entries first: gradients of sure answers are far below the rounding of a norm
    a, b = (g.double() / g.double().abs().amax(1, keepdim=True).clamp_min(1e-300) for g in (a, b))
    return cosine_similarity(a, b, dim=1)
