"""KDExplainer's loss: KD, or labels alone, for a student that attends, whose routing hardens as the run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.methods.base import Step, StepMethod, check_policy, check_weights, only_block
from tempering.objectives import check_fraction, cross_entropy, kl, log_softmax, require_labels
from tempering.rows import Rows, expand_to_rows
from tempering.temperature.base import Policy
from tempering.temperature.static import Static
from tempering.utils.search_space import Weight


class Explainer(StepMethod):
    """soft * T_s T_t KL(teacher || student) + hard * CE + entropy * mean entropy of what the student attends to.

    The parts of the student that have an ``anneal(temperature)`` (the routing of models.explainer) are told their
    temperature before every step: ``start`` at first, falling as ``end`` / progress. Those that have an
    ``attention_entropy()`` (that routing, and the virtual blocks of models.attention: each the mean over its rows in
    nats) make up the entropy by their mean. Any other student is taught by KD.

    Args:
        soft: weight of the divergence; 0 needs no teacher.
        hard: weight of the cross entropy.
        entropy: weight of the entropy, which > 0 makes attention sparse; the paper's gamma, whose value is not known.
        smoothing: share of the label that is spread over all classes, in ``hard``; 0.1 with soft=0 and hard=1 is the
            label smoothing that KD is compared with. Its value in the paper is not known.
        start: largest temperature of the routing.
        end: its temperature at the end of the run. The code has 10 / epoch, so 10/300 after its 300 epochs.
        temperature: of the soft term, any policy; None is Static(4.0), as released.

    Reference: Xue et al., "KDExplainer: A Task-oriented Attention Model for Explaining Knowledge Distillation", IJCAI
    2021, arXiv:2105.04181. Weights and annealing are the first author's code's, of 300 epochs; here they follow the
    share of the run that is done, step by step. The entropy is after the paper's module, of which no code was released.
    """

    paper = "arXiv:2105.04181"

    def __init__(
        self,
        *,
        soft: Annotated[float, Weight()] = 0.9,
        hard: float = 0.1,
        entropy: Annotated[float, Weight()] = 0.0,
        smoothing: float = 0.0,
        start: float = 10.0,
        end: float = 10 / 300,
        temperature: Policy | None = None,
    ) -> None:
        super().__init__()
        check_weights("Explainer", soft=soft, hard=hard, entropy=entropy)
        check_fraction("Explainer", smoothing=smoothing)
        if not 0.0 < end <= start < float("inf"):
            raise ValueError(f"Explainer needs 0 < end <= start, both finite; got end={end!r}, start={start!r}.")
        self.soft, self.hard, self.entropy = soft, hard, entropy
        self.smoothing, self.start, self.end = smoothing, start, end
        self.temperature = check_policy("Explainer", Static(4.0) if temperature is None else temperature)
        self.needs_teacher = soft > 0.0  # pyright: ignore[reportAttributeAccessIssue]
        self.zero_when_equal = entropy == 0.0  # pyright: ignore[reportAttributeAccessIssue]

    def step(self, step: Step) -> Mapping[str, Tensor]:
        routing = min(self.start, self.end / step.progress) if step.progress > 0.0 else self.start
        for module in step.student.modules():
            if callable(anneal := getattr(module, "anneal", None)):
                anneal(routing)
        rows = only_block(step.forward())
        terms = {}
        if self.soft:
            terms["soft"] = self.soft * kl(rows, self.temperature(rows, step.progress))
        if self.hard or not self.soft:
            terms["hard"] = self.hard * _smoothed(rows, self.smoothing)
        if self.entropy:
            terms["entropy"] = self.entropy * expand_to_rows(_entropy(step.student), rows)
        return terms


def _smoothed(rows: Rows, smoothing: float) -> Float[Tensor, " N"]:
    """Cross entropy with labels of which ``smoothing`` is spread over the classes there are; 0 without a label."""
    if smoothing == 0.0:
        return cross_entropy(rows)
    logq = log_softmax(rows.student)
    gone = torch.isneginf(logq)
    evenly = -logq.masked_fill(gone, 0.0).sum(-1) / (~gone).sum(-1).clamp_min(1)
    evenly = torch.where(require_labels(rows, "Explainer") >= 0, evenly, 0.0)
    return (1.0 - smoothing) * cross_entropy(rows) + smoothing * evenly


def _entropy(student: nn.Module) -> Float[Tensor, ""]:
    """Mean entropy of what attends, in nats, ()."""
    asked = [getattr(m, "attention_entropy", None) for m in student.modules()]
    found = [ask() for ask in asked if ask is not None]
    if not found:
        raise ValueError(
            "Explainer(entropy=...) weighs the entropy of a student's attention, and this one attends nowhere. Wrap "
            "it: models.attention.attend(net, blocks=4), or by its name, as in vam:resnet8; or leave entropy at 0."
        )
    return torch.stack(found).mean()
