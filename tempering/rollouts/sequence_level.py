"""Sequence-level distillation: the teacher writes the texts, and the student learns them as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tempering.rollouts.on_policy import OnPolicy
from tempering.rollouts.sampling import Sampling
from tempering.rows import IGNORE_INDEX


class SequenceLevel(OnPolicy):
    """The batches of a loader, a ``share`` of them with completions that the teacher writes, which are their labels.

    ``Supervised`` on them is sequence-level KD; a divergence beside it, or alone, learns from the teacher's answers on
    its own texts. Greedy unless told otherwise: then the texts of an epoch are those of every other, and are written
    anew all the same.

    Args:
        teacher: the model that writes, of transformers, or a Teacher with one, such as Live(model).
        batches, share, length, eos, pad, prompt, vocabulary, seed: as in ``OnPolicy``.
        sampling: of the teacher; None takes the likeliest token.

    Raises:
        ValueError: as ``OnPolicy`` does.
        TypeError: for a teacher without a model.

    Reference: Kim & Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, arXiv:1606.07947, section 3.2. The paper
    searches with a beam; this takes one token after the other.
    """

    def __init__(
        self,
        teacher: Any,
        batches: Iterable[Any],
        *,
        share: float = 1.0,
        length: int = 128,
        eos: int | None = None,
        pad: int = 0,
        sampling: Sampling | None = None,
        prompt: int = 1,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> None:
        model = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "model", None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"SequenceLevel has a teacher's model write; got {type(teacher).__name__}, which has none.")
        super().__init__(
            model,
            batches,
            share=share,
            length=length,
            eos=eos,
            pad=pad,
            sampling=sampling or Sampling(temperature=0.0),
            prompt=prompt,
            vocabulary=vocabulary,
            seed=seed,
        )

    def generate(self, batch: Any, seed: int) -> dict[str, Any]:
        """The batch with the teacher's completions, each of its tokens a label."""
        out = super().generate(batch, seed)
        ids = out.pop("generated", out["input_ids"])
        return {**out, "labels": torch.where(out.pop("learn"), ids, IGNORE_INDEX)}
