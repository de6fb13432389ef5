"""Teacher outputs other than dense logits: hidden states with their head, precomputed logits, top-k tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.rows import IGNORE_INDEX, upcast_to_float32
from tempering.utils.tensors import on_host, to_device


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """A language model's last layer: cap * tanh(scale * (H W^T + b) / cap), without the tanh if cap is None.

    Args:
        weight: (V, H).
        bias: (V,) or None.
        scale: scale of the logits, as in Cohere and Granite.
        cap: soft cap of the logits, as in Gemma.

    Raises:
        ValueError: for a cap that is not positive.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"Head needs cap > 0; got {self.cap}. None means no cap.")

    def __call__(self, hidden: Float[Tensor, "*N H"]) -> Float[Tensor, "*N V"]:
        """Return the logits, in float32 at least."""
        with torch.autocast(hidden.device.type, enabled=False):
            x, weight = upcast_to_float32(hidden), upcast_to_float32(self.weight)
            dtype = torch.promote_types(x.dtype, weight.dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            z = self.scale * nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    def to(self, device: torch.device | str) -> Head:
        """Return a copy on ``device``."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)


@dataclasses.dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states (B, L, H) and the head that computes logits, of the requested positions only.

    ``stored``: the positions that a cache has, NaN elsewhere; None: all.
    """

    states: Float[Tensor, "B L H"]
    head: Head
    stored: Bool[Tensor, "B L"] | None = None

    def gather_positions(self, positions: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N V"]:
        """Return the logits of positions that index the flattened batch of this shape (B, L).

        Raises:
            ValueError: if the hidden states have another shape, or a cache does not have one of the positions.
        """
        return self.head(self.rows(positions, shape))

    def rows(self, positions: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N H"]:
        """Return the hidden states of positions, as ``kernels.linear_loss`` takes them."""
        _check_shape(tuple(self.states.shape[:2]), shape)
        _check_stored(self.stored, positions)
        return self.states.flatten(0, 1).index_select(0, positions)


@dataclasses.dataclass(frozen=True, slots=True)
class PrecomputedLogits:
    """A model's logits of a batch's rows, (N, V), from generation; ``producer`` is the model that computed them."""

    logits: Float[Tensor, "N V"]
    producer: nn.Module

    def gather_positions(self, positions: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N V"]:
        """Return all logits; the rows are those of the batch, in its order.

        Raises:
            ValueError: for another number of positions.
        """
        if len(positions) != len(self.logits):
            raise ValueError(
                f"the batch contains the teacher's logits of {len(self.logits)} tokens, and {len(positions)} are "
                'learned: its masks were changed since. Remove "teacher_outputs" from it to run the teacher.'
            )
        return upcast_to_float32(self.logits)


def _check_shape(got: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if got != tuple(shape):
        raise ValueError(
            f"the teacher's hidden states have {got} positions, and the batch has {tuple(shape)}: were they recorded "
            "with other texts or another length?"
        )


def _check_stored(stored: Tensor | None, positions: Tensor) -> None:
    # of tensors made on an accelerator the check would synchronize every step; there NaN makes the loss NaN, which the
    # trainer reports
    if stored is None:
        return
    known, positions = on_host((stored, positions))
    if positions.device.type != "cpu":
        return
    missing = ~known.flatten()[positions]
    if missing.any() and not (len(positions) == 1 and not positions.any()):  # the row of weight 0 of an empty batch
        raise ValueError(
            f"the teacher's cache does not have {int(missing.sum())} of the {len(positions)} learned positions: it "
            "stores those that were learned when it was recorded. Has the batch other labels, or another mask? Call "
            "record_...() for these batches again: it adds them."
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Sparse:
    """Log-probabilities of K tokens per position, the likeliest first, and of all other tokens together.

    Args:
        ids: (..., K) token ids, different ones in a position; an empty slot has a logp of minus infinity and any id.
        logp: (..., K) their log-probabilities.
        tail_logp: (...) log-probability of all other tokens; minus infinity if their probability is 0, as in sampled
            targets.
        stored: (...) the positions that a cache has, NaN elsewhere; None: all.
    """

    ids: Int[Tensor, "*N K"]
    logp: Float[Tensor, "*N K"]
    tail_logp: Float[Tensor, "*N"]
    stored: Bool[Tensor, "*N"] | None = None

    def gather_positions(self, positions: Int[Tensor, " M"], shape: tuple[int, ...]) -> Sparse:
        """Return the rows of positions that index the flattened batch of this shape (B, L).

        Raises:
            ValueError: if the outputs have another shape, or a cache does not have one of the positions.
        """
        if tuple(self.tail_logp.shape) != tuple(shape):
            raise ValueError(
                f"the sparse teacher's outputs have {tuple(self.tail_logp.shape)} positions, and the batch has "
                f"{tuple(shape)}: was it recorded with other texts or another length?"
            )
        _check_stored(self.stored, positions)
        flat = (self.ids.flatten(0, -2), self.logp.flatten(0, -2), self.tail_logp.flatten())
        return Sparse(*(x.index_select(0, positions) for x in flat))

    def to(self, device: torch.device | str) -> Sparse:
        """Return a copy on ``device``."""
        return Sparse(*to_device((self.ids, self.logp, self.tail_logp, self.stored), device))


@dataclasses.dataclass(frozen=True, slots=True)
class Referenced:
    """A teacher's output with the logits of a reference model for the same inputs."""

    output: Any
    reference: Any

    @property
    def logits(self) -> Any:
        """The teacher's logits."""
        return getattr(self.output, "logits", self.output)


def to_top_k_plus_tail(
    student: Float[Tensor, "N V"], teacher: Sparse, target: Int[Tensor, " N"] | None = None
) -> tuple[Float[Tensor, "N K+1"], Float[Tensor, "N K+1"], Int[Tensor, " N"] | None]:
    """Return student and teacher over the K tokens and the tail as K + 1 classes, and the targets among them.

    The values are log-probabilities at temperature 1. Both are distributions over the same K + 1 outcomes, so a
    divergence of them is never negative, is 0 if they are equal, and at most that over all tokens (equal to it for
    sampled targets, whose tail is empty). A temperature above 1 softens the K + 1 outcomes, not the V tokens: the tail
    counts as one. A target that is not among the K tokens becomes -100.

    Raises:
        ValueError: for a token id that the student does not have.
    """
    z, vocabulary = upcast_to_float32(student), student.shape[1]
    empty = torch.isneginf(teacher.logp)
    ids = teacher.ids.long().masked_fill(empty, 0)
    if ids.device.type == "cpu" and ids.numel() and int(ids.max()) >= vocabulary:
        raise ValueError(
            f"the sparse teacher has token {int(ids.max())}, and the student has {vocabulary} tokens. Has the teacher "
            "another tokenizer? See tasks.shared_vocabulary."
        )
    total = torch.logsumexp(z, -1, keepdim=True)
    kept = (z.gather(1, ids) - total).masked_fill(empty, -torch.inf)
    student_logp = torch.cat((kept, _tail_logsumexp(z, ids, empty) - total), -1)
    teacher_logp = torch.cat((teacher.logp, teacher.tail_logp[:, None]), -1).to(student_logp.dtype)
    if target is not None:
        matches = (ids == target[:, None]) & ~empty
        target = torch.where(matches.any(-1), matches.int().argmax(-1), torch.full_like(target, IGNORE_INDEX))
    return student_logp, teacher_logp, target


def _tail_logsumexp(z: Tensor, ids: Tensor, empty: Tensor) -> Tensor:
    """Return the logsumexp of all logits but those of ``ids``, (N, 1), without the cancellation of 1 - sum."""
    # one column more, for the empty slots
    kept = z.new_zeros((len(z), z.shape[1] + 1), dtype=torch.bool)
    kept = kept.scatter_(1, ids.masked_fill(empty, z.shape[1]), True)[:, :-1]
    tail = z.masked_fill(kept, -torch.inf)
    no_tail = torch.isneginf(tail.amax(-1, keepdim=True))
    return torch.logsumexp(tail.masked_fill(no_tail, 0.0), -1, keepdim=True).masked_fill(no_tail, -torch.inf)
