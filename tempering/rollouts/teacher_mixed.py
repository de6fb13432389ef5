"""Teacher-mixed sampling: every token is sampled from a mixture of the teacher and the student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from torch import nn

from tempering.rollouts.on_policy import GenerationOptions, OnPolicy, model_of


class TeacherMixed(OnPolicy):
    """Replaces the completions of a loader's batches by ones whose tokens are sampled from a mixture of both models.

    A token is of alpha p + (1 - alpha) q, with the teacher's p and the student's q given the text before. Its
    log-probability in the mixture is "rollout_log_prob", from which ``methods.MiniLLM`` and
    ``PolicyGradient(importance=True)`` compute importance weights.

    Args:
        student: the trained transformers model.
        teacher: a model, or a Teacher with one, such as Live(model).
        batches: any loader of ``LanguageModeling`` batches; as in ``OnPolicy``.
        alpha: share of the teacher, in [0, 1).
        sampling: of both models; None samples from their own distributions, as in the paper.
        generated_fraction, max_new_tokens, eos, pad, prompt_length, vocabulary, seed, turn: as in ``OnPolicy``.

    Raises:
        ValueError: as ``OnPolicy`` does, and for alpha outside [0, 1), or greedy sampling.
        TypeError: for a teacher without a model.

    Reference: Gu et al., "MiniLLM", ICLR 2024, arXiv:2306.08543, equation 4, with its alpha.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        batches: Iterable[Any],
        *,
        alpha: float = 0.2,
        sampling: Any = None,
        **options: Unpack[GenerationOptions],
    ) -> None:
        super().__init__(student, batches, sampling=sampling, **{"generated_fraction": 1.0, **options})
        if not 0.0 <= alpha < 1.0 or (self.sampling is not None and self.sampling.temperature == 0.0):
            raise ValueError(f"TeacherMixed needs alpha in [0, 1) and sampling that is not greedy; got {alpha}.")
        self.teacher, self.alpha = model_of(teacher, "TeacherMixed"), alpha

    def generate(self, batch: Any, seed: int) -> dict[str, Any]:
        """Return the batch with completions sampled from the mixture."""
        return self._generate(batch, seed, self.teacher, {"mixture": self.alpha})
