"""Randomized smoothing: certify the radius within which the majority vote under noise cannot change."""

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
    """Return the smoothed model's class, -1 if it abstains, and its certified l2 radius, 0 there; (N,) each.

    The smoothed model predicts the most frequent class under Gaussian noise. The noise is not clipped to [0, 1], as
    the theorem requires.

    Args:
        answer: pixels -> logits.
        p: images (N, C, H, W).
        sigma: standard deviation of the noise, in pixels of [0, 1].
        picks: noisy samples to select the class.
        votes: noisy samples to bound its probability from below.
        alpha: probability that an image's certificate is wrong.
        batch: noisy images per forward pass.
        seed: seed of the noise.

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
        top = int(_count_predictions(answer, image, sigma, picks, batch, generator).argmax())
        hits = int(_count_predictions(answer, image, sigma, votes, batch, generator)[top])
        lower_bound = exact_lower(hits, votes, alpha)
        if lower_bound > 0.5:
            predicted[i], radius[i] = top, sigma * NormalDist().inv_cdf(lower_bound)
    return predicted, radius


def _count_predictions(
    answer: Answer, image: Tensor, sigma: float, n: int, batch: int, generator: torch.Generator
) -> Tensor:
    """Count the predictions per class under n samples of noise, (C,)."""
    counts = 0
    for first in range(0, n, batch):
        size = (min(batch, n - first), *image.shape)
        noise = torch.randn(size, generator=generator, dtype=image.dtype).to(image.device)
        z = answer(image + sigma * noise)
        counts = counts + torch.bincount(z.argmax(-1).cpu(), minlength=z.shape[1])
    assert isinstance(counts, Tensor)
    return counts
