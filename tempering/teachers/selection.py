"""Reduce teacher logits to a few tokens per position: the top k with their tail, or unbiased samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.rows import TEACHER_OUTPUTS, upcast_to_float32
from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.outputs import Sparse

NEVER = -1e4  # log-probability of a label that was not sampled: its exp() is exactly 0


def keep_top_k(
    logits: Float[Tensor, "*N V"], k: int, *, besides: Int[Tensor, "*N"] | None = None, temperature: float = 1.0
) -> Sparse:
    """Keep the k likeliest tokens and the tail of all others; ``besides`` is kept as well, so K is then k + 1.

    The tail is summed over the other tokens, not computed as 1 - sum, so it is never negative or lost to rounding. The
    divergence to it is "with ghost token": without the tail the kept tokens would be renormalized, and such a teacher
    is worse than none up to k = 25.

    Raises:
        ValueError: for k outside [1, V).

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870, for the tail.
    """
    width = k + (besides is not None)
    if k < 1 or width > logits.shape[-1]:
        raise ValueError(f"top needs 1 <= k <= {logits.shape[-1] - (besides is not None)}; got k={k}.")
    # not log_softmax, which adds 19,000 numbers per AVX2 lane in sequence: an error of 2e-5 for V = 152,000
    z = upcast_to_float32(logits) / temperature
    z = z - z.amax(-1, keepdim=True)
    logp = z - z.logsumexp(-1, keepdim=True)
    ids = logp.topk(width, -1).indices
    if besides is not None:
        missing = (ids[..., :k] != besides[..., None]).all(-1)
        ids[..., -1] = torch.where(missing, besides, ids[..., -1])
    others = logp.scatter(-1, ids, -torch.inf)
    empty = torch.isneginf(others.amax(-1))
    tail = torch.logsumexp(others.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty, -torch.inf)
    return Sparse(ids, logp.gather(-1, ids), tail)


def keep_samples(
    logits: Float[Tensor, "*N V"],
    samples: int,
    *,
    besides: Int[Tensor, "*N"] | None = None,
    generator: torch.Generator | None = None,
) -> Sparse:
    """Sample tokens with replacement, each with its relative frequency as probability: unbiased for the teacher.

    The gradient of ``kl`` to it equals that of ``kl`` to the teacher in expectation, since that is linear in the
    teacher's probabilities; its value does not, nor does any gradient at another temperature than 1, and reverse
    divergences are infinite. The tail is empty. ``besides`` is kept as well, with probability 0 if it was not sampled.

    Raises:
        ValueError: for samples < 1, or logits that are NaN or infinite.

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870.
    """
    if samples < 1:
        raise ValueError(f"keep_samples needs samples >= 1; got {samples}.")
    p = torch.softmax(upcast_to_float32(logits), -1)
    try:
        ids = torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator)
    except RuntimeError as error:
        if "invalid multinomial" in str(error) or "probability tensor contains" in str(error):
            raise ValueError("the teacher's log-probabilities contain NaN. Is its checkpoint complete?") from error
        raise
    return count_samples(ids.view(*logits.shape[:-1], samples), besides=besides, dtype=p.dtype)


def count_samples(
    ids: Int[Tensor, "*N S"], *, besides: Int[Tensor, "*N"] | None = None, dtype: torch.dtype = torch.float32
) -> Sparse:
    """Return sampled tokens with their frequencies, the most frequent first; K = S, or S + 1 with ``besides``."""
    samples = ids.shape[-1]
    ids = ids.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[..., 1:] = ids[..., 1:] != ids[..., :-1]
    group = first.long().cumsum(-1) - 1
    counts = torch.zeros_like(ids, dtype=dtype).scatter_add_(-1, group, torch.ones_like(ids, dtype=dtype))
    unique = torch.zeros_like(ids).scatter_(-1, group, ids)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    return shares(unique.gather(-1, order), counts, samples, besides=besides)


def shares(
    ids: Int[Tensor, "*N K"], counts: Float[Tensor, "*N K"], samples: int, *, besides: Int[Tensor, "*N"] | None = None
) -> Sparse:
    """Return tokens with ``counts`` of ``samples`` samples, 0 for an empty slot, as ``Sparse``.

    ``besides`` is kept as well, after the others: K is then K + 1.
    """
    logp = (counts / samples).log()
    if besides is not None:
        sampled = ((ids == besides[..., None]) & (counts > 0)).any(-1, keepdim=True)
        extra = torch.full_like(logp[..., :1], NEVER).masked_fill(sampled, -torch.inf)
        ids, logp = torch.cat((ids, besides[..., None]), -1), torch.cat((logp, extra), -1)
    return Sparse(ids, logp, torch.full_like(logp[..., 0], -torch.inf))


def entropy_not_sampled(sparse: Sparse, samples: int) -> Float[Tensor, ""]:
    """Estimate the mean entropy that samples lack, in nats, (): by so much the KL of the samples exceeds the teacher's.

    The cross-entropy with samples of p, and its gradient, are unbiased, but the entropy of a few samples is below that
    of p, so E[KL(samples, q)] = KL(p, q) + H(p) - E[H(samples)]. The estimate is low where most tokens are never drawn.

    Reference: Chao and Shen, "Nonparametric estimation of Shannon's index of diversity when there are unseen species in
    sample", 2003, Environmental and Ecological Statistics 10, equations 6 and 8.
    """
    p = sparse.logp.double().exp().flatten(0, -2)
    p = p[p.sum(-1) > 0.5]  # the positions that are there
    counts = (p * samples).round()
    once = (counts == 1).sum(-1, keepdim=True).clamp_max(samples - 1)
    covered = p * (1 - once / samples)
    entropy = -(torch.xlogy(covered, covered) / (1 - (1 - covered) ** samples).clamp_min(1e-300)).sum(-1)
    return (entropy + torch.xlogy(p, p).sum(-1)).mean()


class TopKTeacher(Teacher):
    """Reduces a language model teacher to few tokens per position: returns ``Sparse`` (B, L, K).

    The next token of the text is kept with them, so that a hard term has its label.

    Args:
        teacher: the teacher, such as Live(model).
        top: number of likeliest tokens, besides the tail.
        samples: number of samples in place of ``top``; for forward divergences at Static(1.0), see ``keep_samples``.
        seed: seed of the samples, which depend on a text's id in the data set; without ids, on its row in the batch.

    Raises:
        ValueError: unless exactly one of ``top`` and ``samples`` is given.
    """

    def __init__(self, teacher: Teacher, *, top: int | None = None, samples: int | None = None, seed: int = 0) -> None:
        if (top is None) == (samples is None) or (top or samples or 0) < 1:
            raise ValueError(
                f"TopKTeacher needs one of top and samples, at least 1; got top={top} and samples={samples}."
            )
        self.teacher, self.top, self.samples, self.seed = teacher, top, samples, seed
        options = {"top": top} if top is not None else {"samples": samples, "seed": seed}
        self.identity = key_digest({"teacher": teacher.identity, **options})

    @property
    def model(self) -> nn.Module | None:
        return self.teacher.model

    @property
    def models(self) -> tuple[nn.Module, ...]:
        return self.teacher.models

    def to(self, device: torch.device | str) -> Self:
        self.teacher.to(device)
        return self

    def nonfinite_parts(self, inputs: Any, ids: Tensor | None) -> list[str]:
        return self.teacher.nonfinite_parts(_without_outputs(inputs), ids)

    def __call__(self, inputs: Any, ids: Tensor | None) -> Sparse:
        output = self.teacher(_without_outputs(inputs), ids)
        logits, label = getattr(output, "logits", output), next_tokens(inputs)
        if self.top is not None:
            return keep_top_k(logits, self.top, besides=label)
        assert self.samples is not None
        parts = []
        for row, z in enumerate(logits.cpu()):
            number = row if ids is None else int(ids[row])
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            parts.append(keep_samples(z, self.samples, besides=label[row].cpu(), generator=generator))
        stacked = (torch.stack([getattr(part, name) for part in parts]) for name in ("ids", "logp", "tail_logp"))
        return Sparse(*stacked).to(logits.device)


def _without_outputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in inputs.items() if name != TEACHER_OUTPUTS}


def next_tokens(inputs: Mapping[str, Any]) -> Int[Tensor, "B L"]:
    """Return the token that each position predicts; for an encoder-decoder that is its label."""
    if "labels" in inputs:
        return inputs["labels"].clamp_min(0)
    tokens = inputs["input_ids"]
    return torch.cat((tokens[:, 1:], tokens[:, -1:]), 1)
