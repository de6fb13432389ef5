"""MiniLLM: the reverse KL of sequences, with its single-step part computed over all tokens."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from tempering.methods.base import Method
from tempering.methods.logits._sampled import (
    clipped_gain,
    reverse_kl_at_1,
    rollout_log_prob,
    sampled_log_prob,
    sum_of_rest,
)
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class MiniLLM(Method):
    """The reverse KL of sequences on texts of ``rollouts.TeacherMixed``, by equation 7 of the paper: per token y_t
    soft * w_t KL(q || p) + future * (-w_t R_{t+1}), with a constant w_t in the first, and w_t = q(y_t) / m(y_t).

    p is the teacher's softmax, q the student's, and m what y_t was sampled from (``Rows.rollout_log_prob``): the
    mixture of both. R_{t+1} is the mean, over the tokens after t in its text, of log p - log q, a constant; 0 after the
    last. Without length normalization it is their sum, and with ``clip=0`` and m = q the gradient then is that of the
    sequences' reverse KL in expectation. w_t corrects its own token alone, as in the paper, not those before it.

    The paper divides R_{t+1} by T - t - 1 where T - t tokens are added up, which is 0 for the last but one; this is the
    mean. The released code sums from t instead of t + 1, whitens, and does not weigh the single-step part.

    Rows that were not sampled are of data, mixed in by ``generated_fraction`` below 1: with ``hard`` they are the
    paper's language modeling loss L_PT, the cross entropy alone; without it they get the reverse KL, as in evaluation.

    Args:
        soft: weight of the single-step part.
        future: weight of the part of the tokens that follow; with 0 texts are not compared as wholes.
        hard: weight of the cross entropy of data.
        clip: keep w_t of the second part from leaving [1 - clip, 1 + clip] in favor of the term, as PPO does; 0 never.
        length_normalization: R_{t+1} is a mean, without which a student learns to be short.

    Raises:
        ValueError: for a clip outside [0, 1); while it runs, for sampled rows without rollout_log_prob, text or
            positions.

    Reference: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, arXiv:2306.08543,
    equations 3 to 7 and algorithm 1.
    """

    paper = "arXiv:2306.08543"
    non_negative = False

    def __init__(
        self,
        *,
        soft: TermWeight = 1.0,
        future: NonNegative = 1.0,
        hard: NonNegative = 0.0,
        clip: float = 0.2,
        length_normalization: bool = True,
    ) -> None:
        super().__init__()
        if not 0.0 <= clip < 1.0:
            raise ValueError(f"MiniLLM needs clip in [0, 1); got {clip}.")
        self.soft, self.future, self.hard, self.clip = soft, future, hard, clip
        self.length_normalization = length_normalization
        self.relational = future > 0.0  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def example(cls) -> Self:
        return cls(future=0.0)  # rows that were not sampled have no texts to compare

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        if rows.sampled_id is None:
            single = reverse_kl_at_1(rows)
            return self.with_hard({"soft": (0.0 if self.hard else self.soft) * single}, rows)
        q, p = (sampled_log_prob(z, rows.sampled_id) for z in (rows.student, rows.teacher))
        ratio = (q - rollout_log_prob(rows, "MiniLLM").to(q.dtype)).exp()
        terms = {"soft": self.soft * ratio.detach() * reverse_kl_at_1(rows)}
        if self.future:
            gain = (p - q).detach()
            rest = sum_of_rest(rows, gain, 1.0, "MiniLLM") - gain
            if self.length_normalization:
                count = sum_of_rest(rows, torch.ones_like(gain), 1.0, "MiniLLM") - 1.0
                rest = torch.where(count > 0.5, rest / count.clamp_min(1.0), 0.0)
            terms["future"] = self.future * clipped_gain(ratio, rest, self.clip)
        return self.with_hard(terms, rows)
