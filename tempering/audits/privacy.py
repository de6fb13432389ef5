"""Privacy: whether the student, or its teacher, reveals its training data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.audits.base import Audit, Finding, check_positive, collect_logits, data, labeled
from tempering.audits.intervals import Z, share
from tempering.audits.membership import Separation, confidence, found_at, lira, separation, separations_apart
from tempering.audits.shadows import shadow_confidence
from tempering.utils.text import counted


class Privacy(Audit):
    """Run membership inference: given a sample, its label and the output, decide whether it was in the training set.

    Call it with batches that were not trained on, such as the test split. The loss attack needs nothing else. LiRA
    trains shadow models with the student's architecture on random halves of both sets, with cross-entropy only, which
    is a weaker copy of a distilled student and so a lower bound on an attacker. A failed attack does not prove privacy.

    Args:
        members: batches of the training set, without augmentation.
        shadows: number of shadow models, an even number from 4 on; 0 for none.
        epochs, lr, batch: training settings of the shadow models.
        rate: false-positive rate at which detected members are counted.
        samples: number of members and of others, each.
        seed: seed of the halves, initial weights and data order.

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
        members, others = self.members, batches
        if self.shadows:  # one pass over each, since another would have another order or augmentation
            members, others = (list(labeled(part, self.samples)) for part in (members, others))
        inside, y_inside = collect_logits(models, members, self.samples)
        outside, y_outside = collect_logits(models, others, self.samples)
        results, scores = [], {}
        for side in models:
            member_scores, other_scores = confidence(inside[side], y_inside), confidence(outside[side], y_outside)
            scores[side] = member_scores, other_scores
            results.append(_gap(side, inside[side].argmax(-1) == y_inside, outside[side].argmax(-1) == y_outside))
            results += self._attack("loss", side, member_scores, other_scores, "the loss alone")
        if "teacher" in models:
            gap = separations_apart(scores["student"], scores["teacher"])
            meaning = (
                "The student's AUC minus the teacher's, on the same samples. Above 0, the student reveals more of its "
                "training data than the teacher does; below 0, less."
            )
            results.append(_finding("loss_auc_gap", "both", gap, meaning, len(y_inside) + len(y_outside)))
        if self.shadows:
            results += self._lira(models["student"], (members, others), scores["student"])
        return results

    def _lira(
        self, student: nn.Module, batches: tuple[Iterable[Any], Iterable[Any]], scores: tuple[Tensor, Tensor]
    ) -> list[Finding]:
        """Return LiRA's findings; ``scores`` are those of the samples of ``batches``, members and others, in order."""
        parts = [data(part, self.samples) for part in batches]
        x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        options = {"epochs": self.epochs, "lr": self.lr, "batch": self.batch, "seed": self.seed}
        shadow_scores, out = shadow_confidence(student, x, y, count=self.shadows, **options)
        ratio = lira(torch.cat(scores), shadow_scores, out)
        member_ratio, other_ratio = ratio[: len(scores[0])], ratio[len(scores[0]) :]
        return self._attack(
            "lira", "student", member_ratio, other_ratio, f"LiRA, offline, with {counted(self.shadows, 'shadow model')}"
        )

    def _attack(self, name: str, side: str, members: Tensor, others: Tensor, attack: str) -> list[Finding]:
        n = len(members) + len(others)
        auc_meaning = (
            f"Membership inference by {attack}: the probability that a training sample scores higher than another one. "
            "0.5 is guessing, 1 is a full leak."
        )
        tpr_meaning = (
            f"Of the training samples, those detected by {attack} at a false-positive rate of {self.rate:.3g}, at "
            f"which guessing detects {100 * self.rate:.3g} %. It shows the few sure detections that an average hides."
        )
        if len(others) * self.rate < 1:
            tpr_meaning += f" With {len(others)} others the rate is 0."
        return [
            _finding(f"{name}_auc", side, separation(members, others), auc_meaning, n),
            share(f"{name}_found", side, found_at(members, others, self.rate), tpr_meaning),
        ]


def _gap(side: str, inside: Tensor, outside: Tensor) -> Finding:
    """Return accuracy on members minus accuracy on others, as independent proportions."""
    value = float(inside.double().mean() - outside.double().mean())
    half = Z * math.sqrt(sum(float(p * (1 - p)) / len(x) for x in (inside, outside) for p in [x.double().mean()]))
    meaning = "Accuracy on training samples minus accuracy on others: how much was memorized."
    low, high = (value - half, value + half) if half else (None, None)
    return Finding("accuracy_gap", side, value, meaning, low, high, len(inside) + len(outside), share=True)


def _finding(name: str, side: str, result: Separation, meaning: str, n: int) -> Finding:
    return Finding(name, side, result.auc, meaning, result.low, result.high, n)
