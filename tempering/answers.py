"""What a teacher may answer in place of (B, L, V) logits: hidden states with its head, or logits of the rows alone."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.rows import widened


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
            x, weight = widened(hidden), widened(self.weight)
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

    def at(self, place: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N V"]:
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
class Taught:
    """A model's logits of a batch's rows, (N, V), made on the way: ``by`` need not be asked for them again."""

    logits: Float[Tensor, "N V"]
    by: nn.Module

    def at(self, place: Int[Tensor, " N"], shape: tuple[int, ...]) -> Float[Tensor, "N V"]:
        """All of them; the rows are those of the batch, in its order.

        Raises:
            ValueError: for another number of rows.
        """
        if len(place) != len(self.logits):
            raise ValueError(
                f"the batch holds the teacher's answers to {len(self.logits)} tokens, and {len(place)} are learned: "
                'its masks were changed after it was written. Leave out its "taught", and the teacher is asked.'
            )
        return widened(self.logits)


def _same(got: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if got != tuple(shape):
        raise ValueError(
            f"the teacher's hidden states are of {got} positions, and the batch has {tuple(shape)}: were they recorded "
            "with other texts or another length?"
        )
