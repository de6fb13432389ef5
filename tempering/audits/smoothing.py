"""Randomised smoothing: the radius in which a noisy vote cannot be changed, certified."""

from __future__ import annotations

from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.audits.base import Answer, check_positive
from tempering.audits.intervals import exact_lower

ABSTAINS = -1


@torch.no_grad()
def certify(
    answer: Answer,
    p: Tensor,
    *,
    sigma: float,
    picks: int = 100,
    votes: int = 1000,
    alpha: float = 0.001,
    batch: int = 500,
    seed: int = 0,
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """The class that the smoothed model answers, -1 where it abstains, and its certified l2 radius, 0 there; (N,) each.

    The smoothed model answers what the model says most often under Gaussian noise. The noise leaves [0, 1], as the
    theorem needs it to.

    Args:
        answer: pixels -> logits.
        p: images (N, C, H, W).
        sigma: of the noise, in pixels of [0, 1].
        picks: votes by which the class is picked.
        votes: that bound its probability from below.
        alpha: the probability with which an image's certificate may be wrong.
        batch: noisy images at once.
        seed: of the noise.

    Reference: Cohen et al., "Certified Adversarial Robustness via Randomized Smoothing", 2019, arXiv:1902.02918,
    CERTIFY in section 3.2.2.
    """
    check_positive({"picks": picks, "votes": votes, "batch": batch})
    if not sigma > 0 or not 0 < alpha < 1:
        raise ValueError(f"certify needs sigma > 0 and alpha in (0, 1); got sigma={sigma}, alpha={alpha}.")
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.full((len(p),), ABSTAINS, dtype=torch.long)
    radius = torch.zeros(len(p), dtype=torch.float64)
    for i, image in enumerate(p):
        top = int(_votes(answer, image, sigma, picks, batch, generator).argmax())
        hits = int(_votes(answer, image, sigma, votes, batch, generator)[top])
        surely = exact_lower(hits, votes, alpha)
        if surely > 0.5:
            predicted[i], radius[i] = top, sigma * NormalDist().inv_cdf(surely)
    return predicted, radius


def _votes(answer: Answer, image: Tensor, sigma: float, n: int, batch: int, generator: torch.Generator) -> Tensor:
    """How often each class is answered under n draws of noise, (C,)."""
    counts = 0
    for first in range(0, n, batch):
        size = (min(batch, n - first), *image.shape)
        noise = torch.randn(size, generator=generator, dtype=image.dtype).to(image.device)
        z = answer(image + sigma * noise)
        counts = counts + torch.bincount(z.argmax(-1).cpu(), minlength=z.shape[1])
    assert isinstance(counts, Tensor)
    return counts
