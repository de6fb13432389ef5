"""A served teacher held to one at hand, on a few texts, before anything is learned from it; what differs is named."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.outputs import Sparse
from tempering.teachers.selection import keep_top_k

LIKELY = math.log(1e-3)  # log-probability of the tokens that are compared; rarer ones are the server's rounding
MOST = 0.9  # share of the positions that have to say the same for one explanation to hold
CUT = -50.0  # log-probability below which a server has cut a token off
SLOPE = 0.03  # how far the slope between two sets of log-probabilities may lie from 1


class TeacherMismatchError(RuntimeError):
    """The served teacher is not the one at hand; the message says in what."""


class VerificationResult(NamedTuple):
    """How many tokens were compared, and the largest difference in their log-probabilities, in nats."""

    tokens: int
    largest: float

    @property
    def line(self) -> str:
        """One line for the terminal."""
        return f"served teacher ok: {self.tokens} log-probabilities within {self.largest:.2g} nats"


def verify_remote(
    served: Teacher, reference: Teacher, inputs: Any, ids: Tensor | None = None, *, close: float = 0.1
) -> VerificationResult:
    """Ask both about a batch and compare: token ids, log-probabilities, their place, temperature and tail.

    Args:
        served: answers ``Sparse``, such as ``teachers.RemoteTeacher``.
        reference: the same weights at hand, ``Live(model)``; or their stored answers, ``CachedTopK``.
        inputs: what a Generation task gives to teachers, ``task.inputs(batch)[1]``.
        ids: of the samples, for stored answers.
        close: nats by which tokens of probability 0.001 and more may differ; bfloat16 on one side takes up to 0.1.

    Raises:
        TeacherMismatchError: naming the first that explains the difference: a shift by one, other token ids, another
            temperature, a missing tail; or the place where they differ most.
        ValueError: where the batch leaves nothing to compare.
    """
    ours = served(inputs, ids)
    theirs = reference(inputs, ids)
    if not isinstance(theirs, Sparse):
        logits, tokens = getattr(theirs, "logits", theirs), inputs["input_ids"]
        following = torch.cat((tokens[:, 1:], tokens[:, -1:]), 1)
        theirs = keep_top_k(logits, min(ours.ids.shape[-1], logits.shape[-1]) - 1, besides=following)
    ours, theirs = ours.to("cpu"), theirs.to("cpu")
    if ours.tail_logp.shape != theirs.tail_logp.shape:
        raise TeacherMismatchError(
            f"the served teacher answers {tuple(ours.tail_logp.shape)} positions and the one at hand "
            f"{tuple(theirs.tail_logp.shape)}: were its answers recorded with another length?"
        )
    asked = torch.isfinite(ours.logp).any(-1)
    both = _Compared(ours, theirs, asked & torch.isfinite(theirs.logp).any(-1))
    if not both.positions:
        raise ValueError("there is nothing to compare: no text of the batch has two tokens.")
    if both.same and not both.gone and both.largest <= close:
        return VerificationResult(both.count, both.largest)
    raise TeacherMismatchError(_why(ours, theirs, both, asked, close))


class _Compared:
    """Two answers at the same positions: the tokens that both name, and how their log-probabilities lie."""

    def __init__(self, ours: Sparse, theirs: Sparse, kept: Tensor) -> None:
        self.places = kept.nonzero()
        self.positions = len(self.places)
        self.ids, self.a, self.wanted, self.r = ours.ids[kept], ours.logp[kept], theirs.ids[kept], theirs.logp[kept]
        self.mass = [float((1.0 - rest[kept].exp()).mean()) for rest in (ours.tail_logp, theirs.tail_logp)]
        shared = (self.ids[:, :, None] == self.wanted[:, None]) & (self.r[:, None] >= LIKELY)
        self.shared = shared & (self.a > CUT)[:, :, None]
        self.gone = int(shared.sum() - self.shared.sum())  # likely ones that the server calls impossible
        self.count = int(self.shared.sum())
        apart = torch.where(self.shared, (self.a[:, :, None] - self.r[:, None]).abs(), 0.0)
        self.apart = apart.flatten(1).amax(1) if self.positions else apart.new_zeros(0)
        self.largest = float(self.apart.max()) if self.positions else 0.0
        # the likeliest of one side is known to the other: two of about one probability may change places
        known = (self.wanted == self.ids[:, :1]).any(1) & (self.ids == self.wanted[:, :1]).any(1)
        self.agree = float(known.float().mean()) if self.positions else 0.0

    @property
    def same(self) -> bool:
        return self.agree >= MOST and self.count > 0

    def holds(self, close: float) -> bool:
        """Whether most positions say the same."""
        return self.same and float((self.apart <= close).float().mean()) >= MOST

    def ranked(self) -> Tensor:
        """How far the two lie apart by rank, at most, position by position, (M,)."""
        k = min(self.a.shape[1], self.r.shape[1]) - 1  # the last one may be the text's own token
        a, r = (x.sort(-1, descending=True).values[:, :k] for x in (self.a, self.r))
        return torch.where(r >= LIKELY, (a - r).abs(), 0.0).amax(-1)

    def line(self) -> tuple[float, float]:
        """The slope of our log-probabilities on theirs within a position, and the largest distance from that line."""
        n = self.shared.flatten(1).sum(1).clamp_min(1)[:, None, None]
        a, r = (
            torch.where(self.shared, x - torch.where(self.shared, x, 0.0).sum((1, 2), keepdim=True) / n, 0.0)
            for x in (self.a[:, :, None].expand_as(self.shared), self.r[:, None].expand_as(self.shared))
        )
        slope = float((a * r).sum() / (r * r).sum().clamp_min(1e-12))
        return slope, float((a - slope * r).abs().max())


def _why(ours: Sparse, theirs: Sparse, both: _Compared, asked: Tensor, close: float) -> str:
    said = "the served teacher is not the one at hand: "
    for by, word in ((1, "later"), (-1, "earlier")):
        moved = Sparse(*(torch.roll(x, -by, 1) for x in (theirs.ids, theirs.logp, theirs.tail_logp)))
        there = asked & torch.roll(asked, -by, 1)
        there[:, -1 if by > 0 else 0] = False
        shifted = _Compared(ours, moved, there)
        if shifted.positions > 1 and shifted.holds(close):
            return (
                f"{said}its answers are shifted by one: at a position it says what the other says of the one {word}. "
                "Position i has to speak of the token of i + 1; does the server add a token of its own?"
            )
    if not both.same:
        why = f"the likeliest tokens are the same at {100 * both.agree:.0f} % of {both.positions} positions"
        if float((both.ranked() <= close).float().mean()) >= MOST:
            return (
                f"{said}{why}, and their probabilities agree by rank: the ids mean other tokens. Another tokenizer, or "
                f"``tokens`` of another model? First: {int(both.ids[0, 0])} there, {int(both.wanted[0, 0])} here."
            )
        return f"{said}{why} alone. Other weights, or another text?"
    slope, off = both.line()
    if off <= close and abs(slope - 1.0) > SLOPE and slope > 0 and not both.gone:
        return (
            f"{said}its log-probabilities are those of temperature {1 / slope:.3g}. Ask for raw ones, or serve it at "
            "temperature 1 (vLLM: --logprobs-mode raw_logprobs)."
        )
    if off <= close:
        return (
            f"{said}the tail is missing: its kept tokens have a mass of {both.mass[0]:.4f} together, and here of "
            f"{both.mass[1]:.4f}. Does the server cut to top-k or top-p and scale up what is left?"
        )
    worst = int(both.apart.argmax())
    row, column = both.places[worst].tolist()
    return (
        f"{said}of {both.count} log-probabilities one is off by {both.largest:.3g} nats (text {row}, position "
        f"{column}), and close={close:g}. Other weights, quantized ones, or another precision?"
    )
