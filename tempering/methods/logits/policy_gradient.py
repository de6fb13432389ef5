"""Policy-gradient distillation: the sampled tokens' reverse KL as their advantage."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering import objectives
from tempering.methods.base import Method
from tempering.rows import Rows, upcast_to_float32
from tempering.temperature.base import Temperatures
from tempering.utils.search_space import NonNegative, TermWeight


class PolicyGradient(Method):
    """On-policy distillation as reinforcement learning: -soft * w_t * A_t of a sampled token y_t, with the advantage
    A_t = sum over u >= t of discount^(u - t) (log p(y_u) - log q(y_u)), a constant, and w_t = q(y_t) / m(y_t); p is the
    teacher's softmax, q the student's, and m what y_t was sampled from.

    The gradient is that of REINFORCE, -soft * w_t * A_t * grad log q(y_t), and only log-probabilities of sampled tokens
    are compared. Without ``importance`` m is q itself, as a constant; with it m is ``Rows.rollout_log_prob``, that of
    other weights, a temperature or a cut.

    Texts sampled from q itself with ``discount=1`` have the gradient of the sequences' reverse KL, in expectation. With
    0 it is that of the sum over tokens of the reverse KL given the text before, less noisy, and what is used in
    practice. ``importance`` corrects each token, not the text before it.

    Rows that were not sampled, as of data and in evaluation, get the expected value over the student's own tokens, the
    reverse KL. Texts of ``Speculative`` and ``SequenceLevel`` are such rows, since they are not the student's own.

    Args:
        soft: weight of the term.
        hard: weight of the cross entropy with the labels, which generated tokens do not have.
        discount: what a token counts of the reward of the next: 0 of its own alone, 1 of all that follow in its text.
            Above 0 texts are compared as wholes: the step is not split then.
        importance: weigh tokens by their importance, q(y_t) over the probability with which they were sampled.
        clip: with importance, keep w_t from leaving [1 - clip, 1 + clip] in favor of the term, as PPO does; 0 never.

    Raises:
        ValueError: for a discount outside [0, 1], a clip outside [0, 1) or without importance; while it runs, for rows
            without what these need: rollout_log_prob, or text and positions.

    Reference: Gu et al., "MiniLLM", ICLR 2024, arXiv:2306.08543, equation 2, for texts; Lu, "On-Policy Distillation",
    Thinking Machines Lab, 2025, for tokens; the clip: Schulman et al., "Proximal Policy Optimization Algorithms",
    arXiv:1707.06347.
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
    ) -> None:
        super().__init__()
        if not 0.0 <= discount <= 1.0 or not 0.0 <= clip < 1.0:
            raise ValueError(f"PolicyGradient needs discount in [0, 1] and clip in [0, 1); got {discount} and {clip}.")
        if clip and not importance:
            raise ValueError(f"PolicyGradient clips importance weights: with clip={clip} write importance=True.")
        self.soft, self.hard, self.discount, self.importance, self.clip = soft, hard, discount, importance, clip
        self.relational = discount > 0.0  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        if rows.sampled_id is None:
            one = rows.student.new_ones((1, 1), dtype=upcast_to_float32(rows.student).dtype)
            return self.with_hard({"soft": self.soft * objectives.reverse_kl(rows, Temperatures(one, one, one))}, rows)
        q, p = (_log_prob(z, rows.sampled_id) for z in (rows.student, rows.teacher))
        advantage = self._advantage(rows, (p - q).detach())
        sampled_from = q.detach()
        if self.importance:
            if rows.rollout_log_prob is None:
                raise ValueError(
                    "PolicyGradient(importance=True) needs the log-probabilities of sampled tokens, and these rows "
                    "have none: a teacher's most likely tokens leave out the others. Use a live teacher, or "
                    "importance=False."
                )
            sampled_from = rows.rollout_log_prob.to(q.dtype)
        ratio = (q - sampled_from).exp()
        term = -ratio * advantage
        if self.clip:
            term = torch.maximum(term, -ratio.clamp(1.0 - self.clip, 1.0 + self.clip) * advantage)
        return self.with_hard({"soft": self.soft * term}, rows)

    def _advantage(self, rows: Rows, reward: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return the discounted sum of the rewards from each row on, to the end of its text."""
        if not self.discount:
            return reward
        if rows.text is None or rows.positions is None:
            raise ValueError(
                "PolicyGradient(discount>0) adds up the rewards of texts: its rows need text and positions."
            )
        reward = reward if rows.weight is None else reward.masked_fill(rows.weight == 0, 0.0)
        shape = (int(rows.text.max()) + 1, int(rows.positions.max()) + 1)
        table = reward.new_zeros(shape).index_put((rows.text, rows.positions), reward, accumulate=True)
        steps = torch.arange(shape[1], device=reward.device)
        distance = steps[:, None] - steps
        decay = torch.where(distance >= 0, self.discount ** distance.clamp_min(0).to(reward.dtype), 0.0)
        return (table @ decay)[rows.text, rows.positions]


def _log_prob(logits: Float[Tensor, "N C"], ids: Tensor) -> Float[Tensor, " N"]:
    z = upcast_to_float32(logits)
    return z.gather(1, ids[:, None]).squeeze(1) - z.logsumexp(-1)
