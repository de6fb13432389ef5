"""Efficient exploration: batches some of whose samples are mixed with others, ranked by the student's entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Mix(NamedTuple):
    """For each sample which other it is mixed with, itself where it is not, and the other's share; (S,) each."""

    other: Int[Tensor, " S"]
    share: Float[Tensor, " S"]


def ranked(entropy: Float[Tensor, " S"], times: Float[Tensor, " S"], mix: float) -> Mix:
    """Samples from rank 80 % on get those from rank 10 % on, ``mix`` of the set each; the share falls from 1 to 0.7.

    Ranked by (times / 40)^0.03 times the mean entropy, highest first, as released; a sample never seen comes last.
    """
    size = len(entropy)
    score = (times / 40.0) ** 0.03 * entropy / times.clamp_min(1.0)
    order = torch.argsort(score, descending=True, stable=True)
    n = int(mix * size)
    high, low = (order[int(start * size) : int(start * size) + n] for start in (0.1, 0.8))
    other = torch.arange(size, device=entropy.device).index_copy(0, low, high)
    shares = 1.0 - 0.3 * torch.arange(n, device=entropy.device, dtype=entropy.dtype) / max(n, 1)
    return Mix(other, torch.zeros_like(entropy).index_copy(0, low, shares))


class MixUpLoader:
    """The batches (inputs, labels, ids), mixed as ``mixes`` says when a batch is made; all else is the inner ones'.

    share * other + (1 - share) * own, of normalized images as this epoch augments them (the released code mixes first).

    Args:
        batches: what is walked; ``at(ids)`` answers a batch.
        mixes: the present mixture, None for none.
        larger: whether a mixed sample's label is that of its larger part, or stays its own.
    """

    def __init__(self, batches: Any, mixes: Callable[[], Mix | None], *, larger: bool) -> None:
        self.batches, self.mixes, self.larger = batches, mixes, larger

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # not there yet, in a copy that is being made
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """The epoch's batches from number ``start`` on."""
        return map(self._mixed, self.batches.iterate(start))

    def to(self, device: torch.device | str) -> MixUpLoader:
        """The same, on ``device``."""
        return MixUpLoader(self.batches.to(device), self.mixes, larger=self.larger)

    def _mixed(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        mix = self.mixes()
        if mix is None:
            return batch
        inputs, labels, ids = batch
        place = ids.to(mix.other.device)
        other, share = mix.other[place].to(ids.device), mix.share[place].to(inputs)
        changed = (other != ids).nonzero().squeeze(1)
        if not len(changed):
            return batch
        theirs, their_labels, _ = self.batches.gather(other[changed])
        share = share[changed].view(-1, *[1] * (inputs.ndim - 1))
        inputs = inputs.index_copy(0, changed, torch.lerp(inputs[changed], theirs, share))
        if self.larger:
            labels = labels.index_copy(0, changed, their_labels)
        return inputs, labels, ids
