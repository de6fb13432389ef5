"""KDExplainer: the loss of students with attention or routing, whose routing temperature is annealed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.methods.base import Step, StepMethod, check_policy, only_block
from tempering.objectives import cross_entropy, kl
from tempering.rows import expand_to_rows
from tempering.temperature.base import PolicyLike
from tempering.utils.search_space import NonNegative, TermWeight, UnitInterval


class Explainer(StepMethod):
    """KDExplainer: soft * T_s T_t KL(teacher || student) + hard * cross entropy + entropy * mean entropy of the
    student's attention.

    Before every step, the routing temperature of student modules with a method ``anneal(temperature)``
    (models.explainer) is set to ``end`` / progress, at most ``start``. The entropy is the mean over student modules
    with a method ``attention_entropy()`` (this routing, and the virtual blocks of models.attention), each the mean over
    its rows in nats. For other students the loss is that of KD.

    Args:
        soft: weight of the divergence; with 0 no teacher is needed.
        hard: weight of the cross entropy.
        entropy: weight of the entropy; > 0 makes attention sparse. The paper's gamma, whose value is not known.
        smoothing: label smoothing of ``hard``; 0.1 with soft=0 and hard=1 is the baseline that KD is compared with. Its
            value in the paper is not known.
        start: maximum temperature of the routing.
        end: temperature of the routing at the end of the run. The code has 10 / epoch, so 10/300 after its 300 epochs.
        temperature: a temperature policy for the soft term; None: Static(4.0), as released.

    Reference: Xue et al., "KDExplainer: A Task-oriented Attention Model for Explaining Knowledge Distillation", IJCAI
    2021, arXiv:2105.04181. Weights and annealing are those of the first author's code for 300 epochs; here annealing
    follows the completed fraction of the run, step by step. The entropy follows the paper; its code was not released.
    """

    paper = "arXiv:2105.04181"

    def __init__(
        self,
        *,
        soft: TermWeight = 0.9,
        hard: NonNegative = 0.1,
        entropy: TermWeight = 0.0,
        smoothing: UnitInterval = 0.0,
        start: float = 10.0,
        end: float = 10 / 300,
        temperature: PolicyLike = None,
    ) -> None:
        super().__init__()
        if not 0.0 < end <= start < float("inf"):
            raise ValueError(f"Explainer needs 0 < end <= start, both finite; got end={end!r}, start={start!r}.")
        self.soft, self.hard, self.entropy = soft, hard, entropy
        self.smoothing, self.start, self.end = smoothing, start, end
        self.temperature = check_policy("Explainer", temperature, default=4.0)
        self.needs_teacher = soft > 0.0  # pyright: ignore[reportAttributeAccessIssue]
        self.zero_when_equal = entropy == 0.0  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, step: Step) -> Mapping[str, Tensor]:
        routing_temperature = min(self.start, self.end / step.progress) if step.progress > 0.0 else self.start
        for module in step.student.modules():
            if callable(anneal := getattr(module, "anneal", None)):
                anneal(routing_temperature)
        rows = only_block(step.forward())
        terms: dict[str, Tensor] = {}
        if self.soft:
            terms["soft"] = self.soft * kl(rows, self.temperature(rows, step.progress))
        if self.hard or not self.soft:
            smoothed = rows.replace(label_smoothing=self.smoothing) if self.smoothing else rows
            terms["hard"] = self.hard * cross_entropy(smoothed)
        if self.entropy:
            terms["entropy"] = self.entropy * expand_to_rows(_entropy(step.student), rows)
        return terms


def _entropy(student: nn.Module) -> Float[Tensor, ""]:
    """Return the mean attention entropy of the student's modules, in nats, ()."""
    methods = [getattr(m, "attention_entropy", None) for m in student.modules()]
    entropies = [method() for method in methods if method is not None]
    if not entropies:
        raise ValueError(
            "Explainer(entropy=...) needs a student with attention, and this one has none. Wrap it: "
            "models.attention.attend(net, blocks=4), or by its name, as in vam:resnet8; or use entropy=0."
        )
    return torch.stack(entropies).mean()
