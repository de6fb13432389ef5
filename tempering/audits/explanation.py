"""Explanation: similarity of student and teacher by class, by difficulty, in gradients and in representations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.audits import gradcam, hardness
from tempering.audits.base import (
    Audit,
    Finding,
    as_function,
    check_positive,
    collect_logits_and_ids,
    count_classes,
    data,
)
from tempering.audits.intervals import average, share
from tempering.audits.membership import confidence
from tempering.audits.similarity import agreement, cka, cka_interval, slopes
from tempering.audits.trees import findings, tree_of
from tempering.temperature.base import Policy
from tempering.utils.hooks import FeatureExtractor

PARTS = ("hardest", "hard", "middling", "easy", "easiest")


class Explanation(Audit):
    """Compare student and teacher, and show which samples a dynamic temperature treats as hard.

    Measures agreement by class and by difficulty, and the similarity of input gradients, Grad-CAM maps and
    representations (linear CKA). Difficulty is the teacher's log-odds of the label, in fifths. Gradients are those of
    each model's own cross-entropy with respect to the inputs. It needs a teacher, and models with one input. For a
    student with a ``tree()``, such as KDExplainer's, the concept tree is reported too.

    Args:
        layers: name -> (student's module, teacher's module), whose outputs are compared by CKA; logits are always
            compared.
        policy: temperature policy to examine, such as the run's own; None is Sharpness(4.0), as the findings state.
        classes: number of classes to list, those with the lowest agreement.
        class_names: one per class.
        samples: number of rows, None for all.
        inside: number of these rows for gradients, Grad-CAM and CKA, whose cost grows quadratically.
        batch: inputs per forward pass.
    """

    def __init__(
        self,
        *,
        layers: Mapping[str, tuple[str, str]] | None = None,
        policy: Policy | None = None,
        classes: int = 5,
        class_names: Sequence[str] | None = None,
        samples: int | None = None,
        inside: int = 500,
        batch: int = 250,
    ) -> None:
        check_positive({"inside": inside, "batch": batch})
        self.layers, self.classes, self.class_names = dict(layers or {}), classes, class_names
        self.policy, self._report_data = policy, {}
        self.samples, self.inside, self.batch = samples, inside, batch

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        if "teacher" not in models:
            raise ValueError("Explanation compares a student with its teacher, and there is none.")
        logits, y, ids = collect_logits_and_ids(models, batches, self.samples)
        student, teacher = logits["student"], logits["teacher"]
        same = student.argmax(-1) == teacher.argmax(-1)
        wrong = teacher.argmax(-1) != y
        kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
        results = [
            share("agreement", "both", same, "Both predict the same class."),
            share(
                "agreement_wrong", "both", same[wrong], "Same prediction where the teacher is wrong: shared mistakes."
            ),
            average("kl", "both", kl, "KL(teacher || student) at temperature 1, nats per sample; 0 is a perfect copy."),
        ]
        results += self._by_class(same, y) + self._by_difficulty(same, confidence(teacher, y))
        temperatures = hardness.hardness(self.policy, student, teacher, y)
        results += hardness.findings(temperatures, ids.tolist())
        self._report_data = {"temperatures": hardness.by_difficulty(temperatures)}
        if (tree := tree_of(models["student"])) is not None:
            results += findings(tree, teacher, y)
        x, y = data(batches, min(self.inside, len(y)))
        count_classes(models, x, y)
        return results + self._internals(models, x, y)

    def report_data(self, student: nn.Module) -> dict[str, Any]:
        """Return temperatures by difficulty, and the concept tree if the student has one."""
        tree = tree_of(student)
        return self._report_data | ({} if tree is None else {"tree": tree, "class_names": list(self.class_names or ())})

    def _by_class(self, same: Tensor, y: Tensor) -> list[Finding]:
        present = y.unique().tolist()
        by_class = {k: same[y == k] for k in present}
        lowest = sorted(present, key=lambda k: (float(by_class[k].double().mean()), k))[: self.classes]
        names = self.class_names
        results = []
        for k in lowest:
            name = names[k] if names is not None and k < len(names) else f"class {k}"
            meaning = (
                f"Same prediction of both on {name}, among the {len(lowest)} of {len(present)} classes with the lowest "
                "agreement."
            )
            results.append(share(f"agreement_class_{k}", "both", by_class[k], meaning))
        return results

    def _by_difficulty(self, same: Tensor, odds: Float[Tensor, " N"]) -> list[Finding]:
        parts = torch.argsort(odds, stable=True).tensor_split(len(PARTS))
        return [
            share(
                f"agreement_{name}",
                "both",
                same[part],
                f"Same prediction of both on the {name} fifth by the teacher's log-odds of the label, mean "
                f"{float(odds[part].mean()):.2f}.",
            )
            for name, part in zip(PARTS, parts, strict=True)
            if len(part)
        ]

    def _internals(self, models: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> list[Finding]:
        """Compare gradients and representations of the first samples."""
        sides = tuple(models)
        features: dict[str, dict[str, Tensor]] = {}
        gradients: dict[str, list[Tensor]] = {side: [] for side in sides}
        for i, side in enumerate(sides):
            forward, outputs = as_function(models[side], side), {"logits": []} | {name: [] for name in self.layers}
            with FeatureExtractor(models[side], [pair[i] for pair in self.layers.values()]) as extractor:
                for a, b in zip(x.split(self.batch), y.split(self.batch), strict=True):
                    if x.is_floating_point():
                        gradients[side].append(slopes(lambda z, f=forward: f(z).to(z.device), a, b))
                    with torch.no_grad():
                        outputs["logits"].append(forward(a).cpu())
                    for name, pair in self.layers.items():
                        outputs[name].append(extractor[pair[i]].detach().flatten(1).cpu())
            features[side] = {name: torch.cat(parts) for name, parts in outputs.items()}
        results = []
        if x.is_floating_point():
            cosine = agreement(*(torch.cat(gradients[side]) for side in ("student", "teacher")))
            meaning = (
                "Cosine similarity of the two models' input gradients, mean over samples: whether both depend on the "
                "same pixels. Unrelated models are near 0."
            )
            results.append(average("gradient_cosine", "both", cosine, meaning))
            results.append(gradcam.looks_alike(models, self.layers, x, y, batch=self.batch))
        for name in features["student"]:
            pair = features["student"][name], features["teacher"][name]
            meaning = (
                f"Linear CKA (unbiased) of both models' {name}: 1 means equal up to rotation and scale, 0 nothing in "
                "common. It is dominated by the directions of largest variance."
            )
            interval = cka_interval(*pair) if len(y) >= 8 else (None, None)
            value = cka(*pair) if len(y) >= 4 else None
            results.append(Finding(f"cka_{name}", "both", value, meaning, *interval, n=len(y)))
        return results
