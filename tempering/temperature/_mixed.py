"""Efficient exploration: mixes samples in training batches, ranked by the student's entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Mix(NamedTuple):
    """For each sample the index of the sample to mix in (its own for none) and that sample's share; (S,) each."""

    other: Int[Tensor, " S"]
    share: Float[Tensor, " S"]


def ranked(entropy: Float[Tensor, " S"], times: Float[Tensor, " S"], mix: float) -> Mix:
    """Mix the samples from rank 80 % with those from rank 10 %, ``mix`` of the set each; shares fall from 1 to 0.7.

    Ranked by (times / 40)^0.03 times the mean entropy, highest first, as released; samples never counted come last.
    """
    size = len(entropy)
    score = (times / 40.0) ** 0.03 * entropy / times.clamp_min(1.0)
    order = torch.argsort(score, descending=True, stable=True)
    n = int(mix * size)
    sources, targets = (order[int(start * size) : int(start * size) + n] for start in (0.1, 0.8))
    other = torch.arange(size, device=entropy.device).index_copy(0, targets, sources)
    shares = 1.0 - 0.3 * torch.arange(n, device=entropy.device, dtype=entropy.dtype) / max(n, 1)
    return Mix(other, torch.zeros_like(entropy).index_copy(0, targets, shares))


class MixUpLoader:
    """Batches (inputs, labels, ids) with samples mixed by ``mixes()``; other attributes are the wrapped loader's.

    share * other + (1 - share) * own, of normalized and augmented images (the released code mixes before augmentation).

    Args:
        batches: the loader to wrap; ``gather(ids)`` returns a batch.
        mixes: returns the current mixture, None for none.
        larger: label a mixed sample by its larger part; False keeps its own label.
    """

    def __init__(self, batches: Any, mixes: Callable[[], Mix | None], *, larger: bool) -> None:
        self.batches, self.mixes, self.larger = batches, mixes, larger

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # not set yet while a copy is created
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """Iterate over the epoch's batches from index ``start``."""
        return map(self._mix_batch, self.batches.iterate(start))

    def to(self, device: torch.device | str) -> MixUpLoader:
        """Return a copy on ``device``."""
        return MixUpLoader(self.batches.to(device), self.mixes, larger=self.larger)

    def _mix_batch(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        mix = self.mixes()
        if mix is None:
            return batch
        inputs, labels, ids = batch
        index = ids.to(mix.other.device)
        other, share = mix.other[index].to(ids.device), mix.share[index].to(inputs)
        mixed_index = (other != ids).nonzero().squeeze(1)
        if not len(mixed_index):
            return batch
        other_inputs, other_labels, _ = self.batches.gather(other[mixed_index])
        share = share[mixed_index].view(-1, *[1] * (inputs.ndim - 1))
        inputs = inputs.index_copy(0, mixed_index, torch.lerp(inputs[mixed_index], other_inputs, share))
        if self.larger:
            labels = labels.index_copy(0, mixed_index, other_labels)
        return inputs, labels, ids
