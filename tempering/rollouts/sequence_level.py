"""Sequence-level distillation: train the student on texts that the teacher generates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch

from tempering.rollouts.generation_config import Sampling
from tempering.rollouts.on_policy import GenerationOptions, OnPolicy, model_of
from tempering.rows import IGNORE_INDEX


class SequenceLevel(OnPolicy):
    """Replaces the completions of a fraction of a loader's batches by the teacher's, with their tokens as labels.

    ``Supervised`` on them is sequence-level KD; a divergence, in addition or alone, uses the teacher's logits on its
    own texts. Greedy by default: then every epoch has the same texts, which are generated again all the same.

    Args:
        teacher: the transformers model that generates, or a Teacher with one, such as Live(model).
        batches, generated_fraction, max_new_tokens, eos, pad, prompt_length, vocabulary, seed, turn: as in
            ``OnPolicy``.
        sampling: how the teacher's tokens are sampled; None is greedy.

    Raises:
        ValueError: as ``OnPolicy`` does.
        TypeError: for a teacher without a model.

    Reference: Kim & Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, arXiv:1606.07947, section 3.2. The paper
    uses beam search; this is greedy or samples.
    """

    def __init__(
        self, teacher: Any, batches: Iterable[Any], *, sampling: Any = None, **options: Unpack[GenerationOptions]
    ) -> None:
        model = model_of(teacher, "SequenceLevel")
        sampling = sampling or Sampling(temperature=0.0)
        super().__init__(model, batches, sampling=sampling, **{"generated_fraction": 1.0, **options})

    def generate(self, batch: Any, seed: int) -> dict[str, Any]:
        """Return the batch with the teacher's completions as labels."""
        out = super().generate(batch, seed)
        ids = out.pop("generated", out["input_ids"])
        out.pop("rollout_log_prob", None)  # the teacher's
        return {**out, "labels": torch.where(out.pop("learn"), ids, IGNORE_INDEX)}
