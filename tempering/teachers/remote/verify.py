"""Compare a remote teacher to a local one on a few texts before training, and name the difference."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.outputs import Sparse
from tempering.teachers.selection import keep_top_k

LIKELY = math.log(1e-3)  # smallest log-probability that is compared; below it the server's rounding dominates
MOST = 0.9  # share of positions that have to agree for an explanation to be accepted
CUT = -50.0  # log-probability below which the server has removed a token
SLOPE = 0.03  # largest distance from 1 of the slope between two sets of log-probabilities


class TeacherMismatchError(RuntimeError):
    """Raised if the remote teacher differs from the local one; the message names the difference."""


class VerificationResult(NamedTuple):
    """Number of compared tokens, and the largest difference of their log-probabilities, in nats."""

    tokens: int
    largest: float

    @property
    def line(self) -> str:
        """Summary in one line."""
        return f"remote teacher ok: {self.tokens} log-probabilities within {self.largest:.2g} nats"


def verify_remote(
    served: Teacher, reference: Teacher, inputs: Any, ids: Tensor | None = None, *, close: float = 0.1
) -> VerificationResult:
    """Compare two teachers on a batch: token ids, log-probabilities, positions, temperature and tail.

    Args:
        served: the remote teacher, with ``Sparse`` outputs, such as ``teachers.RemoteTeacher``.
        reference: the same weights in a local model, ``Live(model)``; or their stored outputs, ``CachedTopK``.
        inputs: the teacher's inputs of ``LanguageModeling``, ``task.inputs(batch)[1]``.
        ids: ids of the samples, for stored outputs.
        close: nats by which tokens of probability 0.001 and more may differ; bfloat16 on one side needs up to 0.1.

    Raises:
        TeacherMismatchError: naming the first that explains the difference: a shift by one, other token ids, another
            temperature, a missing tail; or the position with the largest difference.
        ValueError: if the batch has nothing to compare.
    """
    remote = served(inputs, ids)
    local = reference(inputs, ids)
    if not isinstance(local, Sparse):
        logits, tokens = getattr(local, "logits", local), inputs["input_ids"]
        labels = torch.cat((tokens[:, 1:], tokens[:, -1:]), 1)
        local = keep_top_k(logits, min(remote.ids.shape[-1], logits.shape[-1]) - 1, besides=labels)
    remote, local = remote.to("cpu"), local.to("cpu")
    if remote.tail_logp.shape != local.tail_logp.shape:
        raise TeacherMismatchError(
            f"the remote teacher's outputs have {tuple(remote.tail_logp.shape)} positions and the local one's "
            f"{tuple(local.tail_logp.shape)}: were they recorded with another length?"
        )
    filled = torch.isfinite(remote.logp).any(-1)
    both = _Comparison(remote, local, filled & torch.isfinite(local.logp).any(-1))
    if not both.positions:
        raise ValueError("there is nothing to compare: no text of the batch has two tokens.")
    if both.same and not both.removed and both.largest <= close:
        return VerificationResult(both.count, both.largest)
    raise TeacherMismatchError(_explain(remote, local, both, filled, close))


class _Comparison:
    """Two sparse outputs at the same positions: the tokens that both have, and their log-probabilities.

    Args:
        remote: of M positions ``ids`` and ``a``, their log-probabilities.
        local: of M positions ``local_ids`` and ``r``, their log-probabilities.
        kept: (B, L) mask of the M positions.
    """

    def __init__(self, remote: Sparse, local: Sparse, kept: Tensor) -> None:
        self.indices = kept.nonzero()
        self.positions = len(self.indices)
        self.ids, self.a = remote.ids[kept], remote.logp[kept]
        self.local_ids, self.r = local.ids[kept], local.logp[kept]
        self.mass = [float((1.0 - tail[kept].exp()).mean()) for tail in (remote.tail_logp, local.tail_logp)]
        shared = (self.ids[:, :, None] == self.local_ids[:, None]) & (self.r[:, None] >= LIKELY)
        self.shared = shared & (self.a > CUT)[:, :, None]
        self.removed = int(shared.sum() - self.shared.sum())  # likely tokens whose probability is 0 on the server
        self.count = int(self.shared.sum())
        difference = torch.where(self.shared, (self.a[:, :, None] - self.r[:, None]).abs(), 0.0)
        self.difference = difference.flatten(1).amax(1) if self.positions else difference.new_zeros(0)
        self.largest = float(self.difference.max()) if self.positions else 0.0
        # each side has the other's likeliest token: tokens of about equal probability may change order
        agree = (self.local_ids == self.ids[:, :1]).any(1) & (self.ids == self.local_ids[:, :1]).any(1)
        self.agree = float(agree.float().mean()) if self.positions else 0.0

    @property
    def same(self) -> bool:
        return self.agree >= MOST and self.count > 0

    def holds(self, close: float) -> bool:
        """Return whether most positions agree."""
        return self.same and float((self.difference <= close).float().mean()) >= MOST

    def ranked(self) -> Tensor:
        """Return the largest difference by rank at each position, (M,)."""
        k = min(self.a.shape[1], self.r.shape[1]) - 1  # the last token may be the text's own
        a, r = (x.sort(-1, descending=True).values[:, :k] for x in (self.a, self.r))
        return torch.where(r >= LIKELY, (a - r).abs(), 0.0).amax(-1)

    def line(self) -> tuple[float, float]:
        """Return the slope of remote on local log-probabilities within a position, and the largest distance from it."""
        n = self.shared.flatten(1).sum(1).clamp_min(1)[:, None, None]
        a, r = (
            torch.where(self.shared, x - torch.where(self.shared, x, 0.0).sum((1, 2), keepdim=True) / n, 0.0)
            for x in (self.a[:, :, None].expand_as(self.shared), self.r[:, None].expand_as(self.shared))
        )
        slope = float((a * r).sum() / (r * r).sum().clamp_min(1e-12))
        return slope, float((a - slope * r).abs().max())


def _explain(remote: Sparse, local: Sparse, both: _Comparison, filled: Tensor, close: float) -> str:
    prefix = "the remote teacher differs from the local one: "
    for offset, word in ((1, "later"), (-1, "earlier")):
        rolled = Sparse(*(torch.roll(x, -offset, 1) for x in (local.ids, local.logp, local.tail_logp)))
        kept = filled & torch.roll(filled, -offset, 1)
        kept[:, -1 if offset > 0 else 0] = False
        shifted = _Comparison(remote, rolled, kept)
        if shifted.positions > 1 and shifted.holds(close):
            return (
                f"{prefix}it is shifted by one: its log-probabilities at a position are the local ones of the position "
                f"one {word}. Position i has to predict token i + 1; does the server insert a token?"
            )
    if not both.same:
        agreement = f"the likeliest tokens are the same at {100 * both.agree:.0f} % of {both.positions} positions"
        if float((both.ranked() <= close).float().mean()) >= MOST:
            return (
                f"{prefix}{agreement}, and their probabilities agree by rank: the ids mean other tokens. Another "
                "tokenizer, or ``tokens`` of another model? First: remote "
                f"{int(both.ids[0, 0])}, local {int(both.local_ids[0, 0])}."
            )
        return f"{prefix}{agreement} only. Other weights, or another text?"
    slope, residual = both.line()
    if residual <= close and abs(slope - 1.0) > SLOPE and slope > 0 and not both.removed:
        return (
            f"{prefix}its log-probabilities are those of temperature {1 / slope:.3g}. Request raw ones, or serve it at "
            "temperature 1 (vLLM: --logprobs-mode raw_logprobs)."
        )
    if residual <= close:
        return (
            f"{prefix}the tail is missing: the probabilities of its kept tokens add up to {both.mass[0]:.4f}, the "
            f"local ones to {both.mass[1]:.4f}. Does the server apply top-k or top-p and renormalize?"
        )
    worst = int(both.difference.argmax())
    row, column = both.indices[worst].tolist()
    return (
        f"{prefix}of {both.count} log-probabilities one differs by {both.largest:.3g} nats (text {row}, position "
        f"{column}), and close={close:g}. Other weights, quantized ones, or another precision?"
    )
