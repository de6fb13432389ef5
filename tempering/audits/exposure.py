"""Canary exposure: how far a secret put into the training data stands out among those that might have been.

Reference: Carlini et al., "The Secret Sharer", 2019, arXiv:1802.08232, sections 4.2 and 4.3.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def perplexity(log_likelihoods: Float[Tensor, "N L"]) -> Float[Tensor, " N"]:
    """exp of minus the mean log-likelihood of a sequence's tokens (in nats), (N,): what a language model reports.

    Sequences of one length have the ranks of the paper's log-perplexity.
    """
    return (-log_likelihoods.mean(-1)).exp()


def log_perplexity(log_likelihoods: Float[Tensor, "N L"]) -> Float[Tensor, " N"]:
    """The paper's log-perplexity of each sequence in bits, (N,): minus the sum over tokens of log2 of the likelihood.

    Args:
        log_likelihoods: of each token, in nats.
    """
    return -log_likelihoods.sum(-1) / math.log(2)


def rank(perplexities: Float[Tensor, " R"], canaries: Int[Tensor, " K"], *, ties: str = "after") -> Int[Tensor, " K"]:
    """The place of each canary among all candidates by perplexity, (K,); 1 is the most likely.

    Args:
        perplexities: of every candidate; any increasing function of them will do.
        canaries: index of each canary.
        ties: "after", candidates as likely as the canary come after it; "before", the pessimist's for an attacker.
    """
    if ties not in ("after", "before"):
        raise ValueError(f'ties come "after" or "before" the canary; got {ties!r}.')
    if not torch.isfinite(perplexities).all():
        raise ValueError("a rank needs finite perplexities; give their logarithms where they overflow.")
    own, ordered = perplexities[canaries], perplexities.sort().values
    if ties == "after":
        return 1 + torch.searchsorted(ordered, own)
    return torch.searchsorted(ordered, own, right=True)  # the canary is one of those upto itself


def exposure(
    perplexities: Float[Tensor, " R"], canaries: Int[Tensor, " K"], *, ties: str = "after"
) -> Float[Tensor, " K"]:
    """log2 |R| - log2 rank in bits, (K,) float64: 0 to log2 |R|, where the canary can be extracted; about 1.44 bits on
    average for one that was never seen."""
    place = rank(perplexities, canaries, ties=ties).double()
    return math.log2(len(perplexities)) - place.log2()


def sampled_exposure(canaries: Float[Tensor, " K"], alternatives: Float[Tensor, "K M"]) -> Float[Tensor, " K"]:
    """The exposure in bits, (K,), by M sampled alternatives that are not the canary: -log2 of the share, counting the
    canary, that is as likely or more. At most log2(M + 1).

    Args:
        canaries: perplexity of each.
        alternatives: those of M others each, (K, M), or (M,) for all canaries.
    """
    alternatives = alternatives.expand(len(canaries), -1)
    as_likely = (alternatives <= canaries[:, None]).sum(-1).double()
    return -torch.log2((1 + as_likely) / (1 + alternatives.shape[1]))


def modeled_exposure(
    canaries: Float[Tensor, " K"], alternatives: Float[Tensor, " M"], *, most: float = math.inf
) -> Float[Tensor, " K"]:
    """The exposure in bits, (K,), beyond what sampling can count: -log2 of the lower tail of a skew normal
    distribution that is fitted to the alternatives by maximum likelihood.

    Args:
        canaries: log-perplexity of each.
        alternatives: log-perplexities of sampled others.
        most: log2 |R|, beyond which an exposure means nothing.

    Raises:
        ImportError: without scipy, which extra "report" brings.
        ValueError: for fewer than 20 alternatives, or ones that do not differ.
    """
    try:
        from scipy.stats import skewnorm
    except ImportError as error:
        raise ImportError("the modeled exposure needs scipy: pip install 'tempering[report]'.") from error
    sample = alternatives.double().numpy()
    if len(sample) < 20 or not sample.std() > 0:
        raise ValueError(f"a skew normal is fitted to 20 alternatives or more that differ; got {len(sample)}.")
    skew, middle, spread = map(float, skewnorm.fit(sample))  # pyright: ignore[reportArgumentType]
    tails = [_log_below(float(c), (skew, middle, spread)) for c in canaries]
    return torch.tensor([min(most, max(0.0, -tail / math.log(2))) for tail in tails], dtype=torch.float64)


def reduction(before: Float[Tensor, " K"], after: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Percent by which exposure fell, (K,); nan where there was none."""
    return torch.where(before > 0, 100 * (1 - after / before), torch.nan)


def _log_below(x: float, shape: tuple[float, float, float]) -> float:
    """Logarithm of the skew normal's mass below ``x``; by its own integral where that would underflow."""
    from scipy.integrate import quad
    from scipy.stats import skewnorm

    below = float(skewnorm.cdf(x, *shape))
    if below > 1e-8:
        return math.log(min(1.0, below))
    edge, scale = float(skewnorm.logpdf(x, *shape)), shape[2]
    # the density falls off below x at least as fast as a normal one
    mass = quad(lambda u: math.exp(float(skewnorm.logpdf(x - scale * u, *shape)) - edge), 0, math.inf)[0]
    return edge + math.log(scale * mass)
