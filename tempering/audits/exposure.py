"""Canary exposure: how likely a secret from the training data is compared with all possible secrets.

Reference: Carlini et al., "The Secret Sharer", 2019, arXiv:1802.08232, sections 4.2 and 4.3.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def perplexity(log_likelihoods: Float[Tensor, "N L"]) -> Float[Tensor, " N"]:
    """Return the perplexity: exp of minus the mean log-likelihood (nats) of a sequence's tokens, (N,).

    For sequences of equal length the ranks equal those of the paper's log-perplexity.
    """
    return (-log_likelihoods.mean(-1)).exp()


def log_perplexity(log_likelihoods: Float[Tensor, "N L"]) -> Float[Tensor, " N"]:
    """Return the paper's log-perplexity in bits, (N,): minus the sum over tokens of log2 of the likelihood.

    Args:
        log_likelihoods: one per token, in nats.
    """
    return -log_likelihoods.sum(-1) / math.log(2)


def rank(perplexities: Float[Tensor, " R"], canaries: Int[Tensor, " K"], *, ties: str = "after") -> Int[Tensor, " K"]:
    """Return the rank of each canary among all candidates by perplexity, (K,); 1 is the most likely.

    Args:
        perplexities: one per candidate; any increasing function of it works too.
        canaries: index of each canary.
        ties: "after": candidates as likely as the canary rank after it; "before": they rank before it, which is
            pessimistic for an attacker.
    """
    if ties not in ("after", "before"):
        raise ValueError(f'ties must be "after" or "before"; got {ties!r}.')
    if not torch.isfinite(perplexities).all():
        raise ValueError("a rank needs finite perplexities; pass their logarithms if they overflow.")
    values, ordered = perplexities[canaries], perplexities.sort().values
    if ties == "after":
        return 1 + torch.searchsorted(ordered, values)
    return torch.searchsorted(ordered, values, right=True)  # the canary counts itself


def exposure(
    perplexities: Float[Tensor, " R"], canaries: Int[Tensor, " K"], *, ties: str = "after"
) -> Float[Tensor, " K"]:
    """Return the exposure log2 |R| - log2 rank in bits, (K,) float64.

    It ranges from 0 to log2 |R|, where the canary can be extracted; an unseen canary has about 1.44 bits on average.
    """
    ranks = rank(perplexities, canaries, ties=ties).double()
    return math.log2(len(perplexities)) - ranks.log2()


def sampled_exposure(canaries: Float[Tensor, " K"], alternatives: Float[Tensor, "K M"]) -> Float[Tensor, " K"]:
    """Estimate the exposure in bits, (K,), from M sampled candidates that are not the canary.

    It is -log2 of the fraction, including the canary, that is at least as likely; at upper_bound log2(M + 1).

    Args:
        canaries: perplexity of each canary.
        alternatives: perplexities of M candidates per canary, (K, M), or (M,) for all canaries.
    """
    alternatives = alternatives.expand(len(canaries), -1)
    as_likely = (alternatives <= canaries[:, None]).sum(-1).double()
    return -torch.log2((1 + as_likely) / (1 + alternatives.shape[1]))


def modeled_exposure(
    canaries: Float[Tensor, " K"], alternatives: Float[Tensor, " M"], *, upper_bound: float = math.inf
) -> Float[Tensor, " K"]:
    """Extrapolate the exposure in bits, (K,), beyond the resolution of sampling.

    It is -log2 of the lower tail of a skew normal distribution fitted to the alternatives by maximum likelihood.

    Args:
        canaries: log-perplexity of each canary.
        alternatives: log-perplexities of sampled candidates.
        upper_bound: upper bound, log2 |R|.

    Raises:
        ImportError: if scipy is not installed (extra "report").
        ValueError: if there are fewer than 20 alternatives, or all are equal.
    """
    try:
        from scipy.stats import skewnorm
    except ImportError as error:
        raise ImportError("the modeled exposure needs scipy: pip install 'tempering[report]'.") from error
    sample = alternatives.double().numpy()
    if len(sample) < 20 or not sample.std() > 0:
        raise ValueError(f"fitting a skew normal needs 20 or more alternatives that differ; got {len(sample)}.")
    skew, location, spread = map(float, skewnorm.fit(sample))  # pyright: ignore[reportArgumentType]
    tails = [_log_below(float(c), (skew, location, spread)) for c in canaries]
    return torch.tensor([min(upper_bound, max(0.0, -tail / math.log(2))) for tail in tails], dtype=torch.float64)


def reduction(before: Float[Tensor, " K"], after: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Return the reduction of exposure in percent, (K,); nan where there was none."""
    return torch.where(before > 0, 100 * (1 - after / before), torch.nan)


def _log_below(x: float, shape: tuple[float, float, float]) -> float:
    """Return the log of the skew normal's CDF at ``x``; integrate numerically where it would underflow."""
    from scipy.integrate import quad
    from scipy.stats import skewnorm

    below = float(skewnorm.cdf(x, *shape))
    if below > 1e-8:
        return math.log(min(1.0, below))
    edge, scale = float(skewnorm.logpdf(x, *shape)), shape[2]
    # below x the density decays at least as fast as a normal density
    mass = quad(lambda u: math.exp(float(skewnorm.logpdf(x - scale * u, *shape)) - edge), 0, math.inf)[0]
    return edge + math.log(scale * mass)
