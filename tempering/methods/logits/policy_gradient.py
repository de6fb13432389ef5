"""Policy-gradient distillation: the sampled tokens' reverse KL as their advantage."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tempering.methods.base import Method
from tempering.methods.logits._sampled import (
    clipped_gain,
    reference_term,
    reverse_kl_at_1,
    rollout_log_prob,
    sampled_log_prob,
    sum_of_rest,
)
from tempering.rows import Rows
from tempering.utils.search_space import NonNegative, TermWeight


class PolicyGradient(Method):
    """On-policy distillation as reinforcement learning: -w_t * (soft * A_t + reward * R) of a sampled token y_t, with
    the advantage A_t = sum over u >= t of discount^(u - t) (log p(y_u) - log q(y_u)), a constant, and w_t = q(y_t) /
    m(y_t); p is the teacher's softmax, q the student's, and m what y_t was sampled from. R is the reward of its text.

    The gradient is that of REINFORCE, -soft * w_t * A_t * grad log q(y_t), and only log-probabilities of sampled tokens
    are compared. Without ``importance`` m is q itself, as a constant; with it m is ``Rows.rollout_log_prob``, that of
    other weights, a temperature or a cut.

    Texts sampled from q itself with ``discount=1`` have the gradient of the sequences' reverse KL, in expectation. With
    0 it is that of the sum over tokens of the reverse KL given the text before, less noisy, and what is used in
    practice. ``importance`` corrects each token, not the text before it.

    Rows that were not sampled, as of data and in evaluation, get the expected value over the student's own tokens, the
    reverse KL. Texts of ``Speculative`` and ``SequenceLevel`` are such rows, since they are not the student's own.

    Args:
        soft: weight of the distillation.
        hard: weight of the cross entropy with the labels, which generated tokens do not have.
        discount: what a token counts of the reward of the next: 0 of its own alone, 1 of all that follow in its text.
            Above 0 texts are compared as wholes: the step is not split then.
        importance: weigh tokens by their importance, q(y_t) over the probability with which they were sampled.
        clip: with importance, keep w_t from leaving [1 - clip, 1 + clip] in favor of the term, as PPO does; 0 never.
        truncate: with importance, the largest w_t; a larger one is a constant, truncate, whose token still has a
            gradient. For texts of older weights; 0 never.
        reward: weight of the texts' rewards, ``OnPolicy(reward=...)``: an expected reward of the text, less a
            baseline, against the sum of the reverse KL of its tokens.
        reference: weight of the term "reference", KL(student || reference) per token, with
            ``teachers.WithReference``, such as the initial student.

    Raises:
        ValueError: for a discount outside [0, 1], a clip outside [0, 1), a truncate below 1, or one of them without
            importance; while it runs, for rows without what these need: rollout_log_prob, text and positions, reward,
            or reference.

    Reference: Gu et al., "MiniLLM", ICLR 2024, arXiv:2306.08543, equation 2, for texts; Lu, "On-Policy Distillation",
    Thinking Machines Lab, 2025, for tokens; the clip: Schulman et al., "Proximal Policy Optimization Algorithms",
    arXiv:1707.06347; truncation: Ionides, "Truncated Importance Sampling", 2008, Journal of Computational and Graphical
    Statistics 17.
    """

    paper = "arXiv:2306.08543"
    non_negative = False

    def __init__(
        self,
        *,
        soft: TermWeight = 1.0,
        hard: NonNegative = 0.0,
        discount: float = 0.0,
        importance: bool = False,
        clip: float = 0.0,
        truncate: float = 0.0,
        reward: NonNegative = 0.0,
        reference: NonNegative = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= discount <= 1.0 or not 0.0 <= clip < 1.0 or not (truncate == 0.0 or truncate >= 1.0):
            raise ValueError(
                f"PolicyGradient needs discount in [0, 1] and clip in [0, 1), and truncate >= 1 or 0; got {discount}, "
                f"{clip} and {truncate}."
            )
        if (clip or truncate) and not importance:
            wrong = f"clip={clip}" if clip else f"truncate={truncate}"
            raise ValueError(f"PolicyGradient clips importance weights: with {wrong} write importance=True.")
        self.soft, self.hard, self.discount, self.importance, self.clip = soft, hard, discount, importance, clip
        self.truncate, self.reward, self.reference = truncate, reward, reference
        self.relational = discount > 0.0  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        terms = {"soft": self.soft * reverse_kl_at_1(rows) if rows.sampled_id is None else self._sampled(rows)}
        return self.with_hard(terms | reference_term(rows, self.reference, "PolicyGradient"), rows)

    def _sampled(self, rows: Rows) -> Float[Tensor, " N"]:
        assert rows.sampled_id is not None
        q, p = (sampled_log_prob(z, rows.sampled_id) for z in (rows.student, rows.teacher))
        gain = (p - q).detach()
        if self.discount:
            gain = sum_of_rest(rows, gain, self.discount, "PolicyGradient(discount>0)")
        advantage = self.soft * gain
        if self.reward:
            if rows.reward is None:
                raise ValueError(
                    f"PolicyGradient(reward={self.reward:g}) needs rows with rewards: give what generates the texts "
                    "one, rollouts.OnPolicy(..., reward=function)."
                )
            advantage = advantage + self.reward * rows.reward.to(advantage.dtype)
        sampled_from = q.detach()
        if self.importance:
            sampled_from = rollout_log_prob(rows, "PolicyGradient(importance=True)").to(q.dtype)
        ratio = (q - sampled_from).exp()
        if self.truncate:
            ratio = ratio * (self.truncate / ratio.detach()).clamp_max(1.0)
        return clipped_gain(ratio, advantage, self.clip)
