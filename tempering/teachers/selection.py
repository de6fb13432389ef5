"""Reduce teacher logits to a few tokens per position: the top k with a tail bucket, or unbiased samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.rows import upcast_to_float32
from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.outputs import Sparse

NEVER = -1e4  # the log-probability of a token that is kept for its label's sake: exp() of it is exactly 0


def keep_top_k(
    logits: Float[Tensor, "*N V"], k: int, *, besides: Int[Tensor, "*N"] | None = None, temperature: float = 1.0
) -> Sparse:
    """The k likeliest tokens, and all others in one bucket; ``besides`` is kept as well, so K is then k + 1.

    The bucket is summed over the others themselves, so it is never negative and not lost to rounding. The divergence
    to it is "with ghost token": without the bucket the kept tokens would be scaled up, and their teacher is worse than
    none up to k = 25.

    Raises:
        ValueError: for k outside [1, V).

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870, for the bucket.
    """
    width = k + (besides is not None)
    if k < 1 or width > logits.shape[-1]:
        raise ValueError(f"top needs 1 <= k <= {logits.shape[-1] - (besides is not None)}; got k={k}.")
    # not log_softmax, which sums up 19,000 numbers a lane of AVX2 in turn: 2e-5 off where V is 152,000
    z = upcast_to_float32(logits) / temperature
    z = z - z.amax(-1, keepdim=True)
    logp = z - z.logsumexp(-1, keepdim=True)
    ids = logp.topk(width, -1).indices
    if besides is not None:
        absent = (ids[..., :k] != besides[..., None]).all(-1)
        ids[..., -1] = torch.where(absent, besides, ids[..., -1])
    others = logp.scatter(-1, ids, -torch.inf)
    none = torch.isneginf(others.amax(-1))
    rest = torch.logsumexp(others.masked_fill(none[..., None], 0.0), -1).masked_fill(none, -torch.inf)
    return Sparse(ids, logp.gather(-1, ids), rest)


def keep_samples(
    logits: Float[Tensor, "*N V"],
    samples: int,
    *,
    besides: Int[Tensor, "*N"] | None = None,
    generator: torch.Generator | None = None,
) -> Sparse:
    """``samples`` tokens drawn with replacement, each as likely as it was drawn often: in the mean the teacher itself.

    The gradient of ``kl`` to it is that of ``kl`` to the teacher in expectation, since that is linear in the teacher's
    probabilities; its value is not, nor is anything at another temperature than 1, and reverse divergences are
    infinite. There is no rest. ``besides`` is kept as well, with probability 0 where it was not drawn.

    Raises:
        ValueError: for samples < 1.

    Reference: Anshumann et al., "Sparse Logit Sampling", ACL 2025, arXiv:2503.16870.
    """
    if samples < 1:
        raise ValueError(f"drawn needs samples >= 1; got {samples}.")
    p = torch.softmax(upcast_to_float32(logits), -1)
    ids = torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator)
    return count_samples(ids.view(*logits.shape[:-1], samples), besides=besides, dtype=p.dtype)


def count_samples(
    ids: Int[Tensor, "*N S"], *, besides: Int[Tensor, "*N"] | None = None, dtype: torch.dtype = torch.float32
) -> Sparse:
    """Drawn tokens with their shares, the commonest first; K = S, or S + 1 with ``besides``."""
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
    """Return tokens that were drawn ``counts`` times in ``samples`` draws, a count of 0 for none, as ``Sparse``.

    ``besides`` is kept as well, behind the others: K is then K + 1.
    """
    logp = (counts / samples).log()
    if besides is not None:
        known = ((ids == besides[..., None]) & (counts > 0)).any(-1, keepdim=True)
        extra = torch.full_like(logp[..., :1], NEVER).masked_fill(known, -torch.inf)
        ids, logp = torch.cat((ids, besides[..., None]), -1), torch.cat((logp, extra), -1)
    return Sparse(ids, logp, torch.full_like(logp[..., 0], -torch.inf))


class TopKTeacher(Teacher):
    """A teacher of which few tokens a position are kept: answers ``Sparse`` (B, L, K) to batches of a Generation task.

    The next token of the text is kept with them, so that a hard term has its label.

    Args:
        teacher: the one that is asked, such as Live(model).
        top: how many of the likeliest tokens, beside the bucket of the rest.
        samples: in its place, how many draws; for forward divergences at Static(1.0), see ``drawn``.
        seed: of the draws, which are those of a sample of the data set wherever it stands; without ids, of the batch.

    Raises:
        ValueError: unless exactly one of ``top`` and ``samples`` is given.
    """

    def __init__(self, teacher: Teacher, *, top: int | None = None, samples: int | None = None, seed: int = 0) -> None:
        if (top is None) == (samples is None) or (top or samples or 0) < 1:
            raise ValueError(
                f"TopKTeacher needs one of top and samples, at least 1; got top={top} and samples={samples}."
            )
        self.teacher, self.top, self.samples, self.seed = teacher, top, samples, seed
        how = {"top": top} if top is not None else {"samples": samples, "seed": seed}
        self.identity = key_digest({"teacher": teacher.identity, **how})

    @property
    def model(self) -> nn.Module | None:
        return self.teacher.model

    def to(self, device: torch.device | str) -> Self:
        self.teacher.to(device)
        return self

    def __call__(self, inputs: Any, ids: Tensor | None) -> Sparse:
        said = self.teacher({name: x for name, x in inputs.items() if name != "taught"}, ids)
        logits, label = getattr(said, "logits", said), next_tokens(inputs)
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


def next_tokens(inputs: Mapping[str, Any]) -> Int[Tensor, "B L"]:
    """The token of the text that each position answers for; of an encoder-decoder that is its label."""
    if "labels" in inputs:
        return inputs["labels"].clamp_min(0)
    tokens = inputs["input_ids"]
    return torch.cat((tokens[:, 1:], tokens[:, -1:]), 1)
