"""Forms of teacher output besides dense logits: hidden states with their head, precomputed rows, top-k lists."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.rows import IGNORE_INDEX, upcast_to_float32


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """A language model's last layer: cap * tanh(scale * (H W^T + b) / cap), without the cap where it is None.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        scale: of the logits, as Cohere's and Granite's have one.
        cap: soft cap, as Gemma's have one.

    Raises:
        ValueError: for a cap that is not positive.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"Head needs cap > 0; got {self.cap}. None is no cap.")

    def __call__(self, hidden: Float[Tensor, "*N H"]) -> Float[Tensor, "*N V"]:
        """The logits, in float32 at least."""
        with torch.autocast(hidden.device.type, enabled=False):
            x, weight = upcast_to_float32(hidden), upcast_to_float32(self.weight)
            dtype = torch.promote_types(x.dtype, weight.dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            z = self.scale * nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def to(self, device: torch.device | str) -> Head:
        """The same on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)


@dataclasses.dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states (B, L, H) before a head, which makes logits of the rows that are asked for, and of no others."""

    states: Float[Tensor, "B L H"]
    head: Head

    def gather_positions(self, place: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N V"]:
        """The logits of some positions, counted over the flat batch of that shape (B, L).

        Raises:
            ValueError: for answers to another shape.
        """
        return self.head(self.rows(place, shape))

    def rows(self, place: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N H"]:
        """The hidden states of some positions, such as ``kernels.linear_loss`` takes."""
        _same(tuple(self.states.shape[:2]), shape)
        return self.states.flatten(0, 1).index_select(0, place)


@dataclasses.dataclass(frozen=True, slots=True)
class PrecomputedLogits:
    """A model's logits of a batch's rows, (N, V), made on the way: ``by`` need not be asked for them again."""

    logits: Float[Tensor, "N V"]
    producer: nn.Module

    def gather_positions(self, place: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N V"]:
        """All of them; the rows are those of the batch, in its order.

        Raises:
            ValueError: for another number of rows.
        """
        if len(place) != len(self.logits):
            raise ValueError(
                f"the batch holds the teacher's answers to {len(self.logits)} tokens, and {len(place)} are learned: "
                'its masks were changed after it was written. Leave out its "taught", and the teacher is asked.'
            )
        return upcast_to_float32(self.logits)


def _same(got: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if got != tuple(shape):
        raise ValueError(
            f"the teacher's hidden states are of {got} positions, and the batch has {tuple(shape)}: were they recorded "
            "with other texts or another length?"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Sparse:
    """Log-probabilities of K tokens a position, the likeliest first, and of all others together.

    Args:
        ids: (..., K) token ids, different ones in a position; a place that holds none has a logp of minus infinity and
            any id.
        logp: (..., K) their log-probabilities.
        rest: (...) that of all other tokens; minus infinity where there is nothing left, as in sampled targets.
    """

    ids: Int[Tensor, "*N K"]
    logp: Float[Tensor, "*N K"]
    tail_logp: Float[Tensor, "*N"]

    def gather_positions(self, place: Int[Tensor, " M"], shape: tuple[int, ...]) -> Sparse:
        """Those of some positions, counted over the flat batch of that shape (B, L).

        Raises:
            ValueError: for answers to another shape.
        """
        if tuple(self.tail_logp.shape) != tuple(shape):
            raise ValueError(
                f"the sparse teacher answers {tuple(self.tail_logp.shape)} positions, and the batch has "
                f"{tuple(shape)}: was it recorded with other texts or another length?"
            )
        flat = (self.ids.flatten(0, -2), self.logp.flatten(0, -2), self.tail_logp.flatten())
        return Sparse(*(x.index_select(0, place) for x in flat))

    def to(self, device: torch.device | str) -> Sparse:
        """The same on a device."""
        return Sparse(self.ids.to(device), self.logp.to(device), self.tail_logp.to(device))


def to_top_k_plus_tail(
    student: Float[Tensor, "N V"], teacher: Sparse, target: Int[Tensor, " N"] | None = None
) -> tuple[Float[Tensor, "N K+1"], Float[Tensor, "N K+1"], Int[Tensor, " N"] | None]:
    """Both sides over the kept tokens and the bucket of all others: student, teacher, and the targets' places.

    The values are log-probabilities at temperature 1. Both are distributions over the same K + 1 outcomes, so a
    divergence of them is never negative, is 0 where the two agree, and never more than that over all tokens (exactly
    that of the sampled targets, whose bucket is empty). A temperature above 1 softens the K + 1 outcomes, not the V
    tokens: the bucket counts as one. A target that is not among the kept tokens becomes -100.

    Raises:
        ValueError: for a kept id that the student does not have.
    """
    z, vocabulary = upcast_to_float32(student), student.shape[1]
    none = torch.isneginf(teacher.logp)
    ids = teacher.ids.long().masked_fill(none, 0)
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= vocabulary:
        raise ValueError(
            f"the sparse teacher speaks of token {int(ids.max())}, and the student has {vocabulary}. Is it another "
            "tokenizer's teacher? See tasks.shared_vocabulary."
        )
    whole = torch.logsumexp(z, -1, keepdim=True)
    kept = (z.gather(1, ids) - whole).masked_fill(none, -torch.inf)
    said = torch.cat((kept, _others(z, ids, none) - whole), -1)
    taught = torch.cat((teacher.logp, teacher.tail_logp[:, None]), -1).to(said.dtype)
    if target is not None:
        same = (ids == target[:, None]) & ~none
        target = torch.where(same.any(-1), same.int().argmax(-1), torch.full_like(target, IGNORE_INDEX))
    return said, taught, target


def _others(z: Tensor, ids: Tensor, none: Tensor) -> Tensor:
    """logsumexp of all logits but those kept, (N, 1), without the cancellation of 1 - sum; minus infinity for none."""
    # a column more, for the places that hold nothing
    gone = z.new_zeros((len(z), z.shape[1] + 1), dtype=torch.bool)
    gone = gone.scatter_(1, ids.masked_fill(none, z.shape[1]), True)[:, :-1]
    left = z.masked_fill(gone, -torch.inf)
    empty = torch.isneginf(left.amax(-1, keepdim=True))
    return torch.logsumexp(left.masked_fill(empty, 0.0), -1, keepdim=True).masked_fill(empty, -torch.inf)
