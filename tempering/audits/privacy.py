"""Privacy: whether the student, or its teacher, gives away what it was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.audits.base import Audit, Finding, answers, check_positive, data
from tempering.audits.intervals import Z, share
from tempering.audits.membership import Separation, confidence, found_at, lira, separation, separations_apart
from tempering.audits.shadows import shadow_confidence


class Privacy(Audit):
    """Membership inference: the attacker sees a sample, its label and the answer, and says whether it was trained on.

    Called with batches that were not trained on, such as the test split. The attack by loss needs nothing else; LiRA
    trains shadow models of the student's kind on random halves of both sets, by cross-entropy alone, which is a weaker
    copy of a distilled student and so a lower bound of what an attacker can do. An attack that finds nothing is no
    proof that there is nothing.

    Args:
        members: batches that were trained on, without augmentation.
        shadows: how many, an even number of 4 or more; 0 for none.
        epochs, lr, batch: of a shadow's training.
        rate: the false-positive rate at which found members are counted.
        samples: of members and of the others, each; as many of both.
        seed: of halves, first weights and order.

    Reference: Yeom et al., "Privacy Risk in Machine Learning", 2018, arXiv:1709.01604 (loss threshold); Carlini et al.,
    "Membership Inference Attacks From First Principles", 2022, arXiv:2112.03570 (LiRA, offline).
    """

    def __init__(
        self,
        members: Iterable[Any],
        *,
        shadows: int = 0,
        epochs: int = 20,
        lr: float = 0.05,
        batch: int = 64,
        rate: float = 0.01,
        samples: int | None = 2000,
        seed: int = 0,
    ) -> None:
        check_positive({"epochs": epochs, "batch": batch})
        if shadows < 0 or shadows == 2 or shadows % 2 or not lr > 0 or not 0 < rate < 1:
            raise ValueError(
                f"Privacy needs shadows of 0 or an even number from 4 on, lr > 0 and rate in (0, 1); got {shadows}, "
                f"{lr} and {rate}."
            )
        self.members, self.shadows, self.epochs, self.lr, self.batch = members, shadows, epochs, lr, batch
        self.rate, self.samples, self.seed = rate, samples, seed

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        inside, y_inside = answers(models, self.members, self.samples)
        outside, y_outside = answers(models, batches, self.samples)
        found, scores = [], {}
        for side in models:
            own, other = confidence(inside[side], y_inside), confidence(outside[side], y_outside)
            scores[side] = own, other
            found.append(_gap(side, inside[side].argmax(-1) == y_inside, outside[side].argmax(-1) == y_outside))
            found += self._attack("loss", side, own, other, "the loss alone")
        if "teacher" in models:
            apart = separations_apart(scores["student"], scores["teacher"])
            meaning = (
                "The student's AUC minus the teacher's, on the same samples. Above 0, the student gives away more of "
                "what it was trained on than its teacher does; below 0, less."
            )
            found.append(_finding("loss_auc_gap", "both", apart, meaning, len(y_inside) + len(y_outside)))
        if self.shadows:
            found += self._lira(models["student"], batches, scores["student"])
        return found

    def _lira(self, student: nn.Module, batches: Iterable[Any], scores: tuple[Tensor, Tensor]) -> list[Finding]:
        parts = [data(self.members, self.samples), data(batches, self.samples)]
        x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        how = {"epochs": self.epochs, "lr": self.lr, "batch": self.batch, "seed": self.seed}
        said, out = shadow_confidence(student, x, y, count=self.shadows, **how)
        ratio = lira(torch.cat(scores), said, out)
        own, other = ratio[: len(scores[0])], ratio[len(scores[0]) :]
        return self._attack("lira", "student", own, other, f"LiRA, offline, with {self.shadows} shadow models")

    def _attack(self, name: str, side: str, own: Tensor, other: Tensor, by: str) -> list[Finding]:
        n = len(own) + len(other)
        auc = (
            f"Membership inference by {by}: the chance that a sample trained on looks more so than one that was not. "
            "0.5 is guessing, 1 gives everything away."
        )
        at = (
            f"Of the samples trained on, those found by {by} at a false-positive rate of {self.rate:.3g}, at which "
            f"guessing finds {100 * self.rate:.3g} %. What an average hides: the few that are surely found."
        )
        if len(other) * self.rate < 1:
            at += f" With {len(other)} others the rate is 0."
        return [
            _finding(f"{name}_auc", side, separation(own, other), auc, n),
            share(f"{name}_found", side, found_at(own, other, self.rate), at),
        ]


def _gap(side: str, inside: Tensor, outside: Tensor) -> Finding:
    """Accuracy on members minus that on others, as two independent shares."""
    value = float(inside.double().mean() - outside.double().mean())
    half = Z * math.sqrt(sum(float(p * (1 - p)) / len(x) for x in (inside, outside) for p in [x.double().mean()]))
    meaning = "Accuracy on samples trained on minus accuracy on others: how much was learned by heart."
    low, high = (value - half, value + half) if half else (None, None)
    return Finding("accuracy_gap", side, value, meaning, low, high, len(inside) + len(outside), share=True)


def _finding(name: str, side: str, found: Separation, meaning: str, n: int) -> Finding:
    return Finding(name, side, found.auc, meaning, found.low, found.high, n)
