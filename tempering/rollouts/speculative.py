"""Speculative distillation: the student writes, and the teacher replaces what it would not have said."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tempering.rollouts.on_policy import OnPolicy
from tempering.rollouts.sampling import Sampling


class Speculative(OnPolicy):
    """The batches of a loader, a ``share`` of them written by student and teacher together.

    The student proposes ``block`` tokens, the teacher reads them in one forward; a token that is not among the
    ``top_k`` of its raw logits is replaced by one that it draws. Accepted and replaced tokens are learned alike.
    ``top_k`` of the whole vocabulary is on-policy; 1 leaves the student its word only where it is the teacher's first.
    ``report()`` has the acceptance, whose rise is the sign that the student comes near.

    As in the paper no token is won where a whole block is accepted. ``share`` below 1 mixes batches of the loader in.

    Args:
        student: the model that is trained, of transformers.
        teacher: the model that checks, or a Teacher with one, such as Live(model).
        batches: any loader of a Generation task's batches; what comes before the first learned token is the prompt.
        top_k: how far down the teacher's order a token may stand.
        block: how many tokens are proposed at a time; the texts are the same in distribution whatever it is.
        sampling, resampling: of the student and of the teacher that replaces; None are the released code's values,
            temperatures 0.5 and 0.2, both with top_p 0.5.
        reuse: hand the logits by which the teacher checked on to the loss, which then does not ask it again: by
            rounding the same, since it checks in eval mode and in its own dtype. They take V numbers a written token
            until the step is done. A teacher of the loss that is another model than this one is asked all the same.
        share, length, eos, pad, prompt, vocabulary, seed: as in ``OnPolicy``.

    Raises:
        ValueError: as ``OnPolicy`` does, and for top_k or block below 1.
        TypeError: for a teacher without a model.

    Reference: Xu et al., "Speculative Knowledge Distillation", ICLR 2025, arXiv:2410.11325, algorithm 1. Unlike in the
    released code the student draws by its own settings, the token that is judged is the one that is kept, and what is
    learned from includes the first token of the answer.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        batches: Iterable[Any],
        *,
        top_k: int = 25,
        block: int = 5,
        share: float = 1.0,
        length: int = 128,
        eos: int | None = None,
        pad: int = 0,
        sampling: Sampling | None = None,
        resampling: Sampling | None = None,
        reuse: bool = False,
        prompt: int = 1,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            student,
            batches,
            share=share,
            length=length,
            eos=eos,
            pad=pad,
            sampling=sampling or Sampling(temperature=0.5, top_p=0.5),
            prompt=prompt,
            vocabulary=vocabulary,
            seed=seed,
        )
        if top_k < 1 or block < 1:
            raise ValueError(f"Speculative needs top_k and block >= 1; got {top_k} and {block}.")
        model = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "model", None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"Speculative asks a teacher's model; got {type(teacher).__name__}, which has none.")
        self.teacher, self.top_k, self.block, self.reuse = model, top_k, block, reuse
        self.resampling = resampling or Sampling(temperature=0.2, top_p=0.5)

    def generate(self, batch: Any, seed: int) -> dict[str, Any]:
        """The batch with completions that both have written."""
        judging = {"top_k": self.top_k, "block": self.block, "resampling": self.resampling, "reuse": self.reuse}
        return self._generate(batch, seed, self.teacher, judging)
