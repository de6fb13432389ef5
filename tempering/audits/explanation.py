"""Explanation: what came over from the teacher, by class and by difficulty, in gradients and in representations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.audits import gradcam, hardness
from tempering.audits.base import Audit, Finding, answered, as_function, check_positive, count_classes, data
from tempering.audits.intervals import average, share
from tempering.audits.membership import confidence
from tempering.audits.similarity import agreement, cka, cka_interval, slopes
from tempering.audits.trees import findings, tree_of
from tempering.temperature.base import Policy
from tempering.utils.hooks import FeatureExtractor

PARTS = ("hardest", "hard", "middling", "easy", "easiest")


class Explanation(Audit):
    """Agreement of student and teacher by class and by difficulty, likeness of their input gradients, of their Grad-CAM
    maps and of their representations (linear CKA), and which samples a dynamic temperature treats as hard.

    Difficulty is the teacher's log-odds of the label, in fifths. Gradients are those of each model's own cross-entropy
    in the inputs as they are given. It needs a teacher, and models of one input. A student with a ``tree()``, which is
    KDExplainer's, is asked for that too.

    Args:
        layers: name -> (student's module, teacher's module), whose outputs are compared by CKA; the logits always are.
        policy: whose temperatures are looked at, such as the run's own; None is Sharpness(4.0), as the findings say.
        classes: how many classes are named, those with the least agreement.
        class_names: one a class.
        samples: rows to look at, None for all.
        inside: of these, how many for gradients, Grad-CAM and CKA, whose cost grows with their square.
        batch: inputs at once.
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
        said, y, ids = answered(models, batches, self.samples)
        student, teacher = said["student"], said["teacher"]
        same = student.argmax(-1) == teacher.argmax(-1)
        wrong = teacher.argmax(-1) != y
        kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
        found = [
            share("agreement", "both", same, "Same answer of both."),
            share("agreement_wrong", "both", same[wrong], "Same answer where the teacher is wrong: its mistakes too."),
            average("kl", "both", kl, "KL(teacher || student) at temperature 1, nats a sample; 0 is a perfect copy."),
        ]
        found += self._by_class(same, y) + self._by_difficulty(same, confidence(teacher, y))
        hard = hardness.hardness(self.policy, student, teacher, y)
        found += hardness.findings(hard, ids.tolist())
        self._report_data = {"temperatures": hardness.by_difficulty(hard)}
        if (tree := tree_of(models["student"])) is not None:
            found += findings(tree, teacher, y)
        x, y = data(batches, min(self.inside, len(y)))
        count_classes(models, x, y)
        return found + self._inside(models, x, y)

    def report_data(self, student: nn.Module) -> dict[str, Any]:
        """Temperatures by difficulty, and the concept tree of a student that has one."""
        tree = tree_of(student)
        return self._report_data | ({} if tree is None else {"tree": tree, "class_names": list(self.class_names or ())})

    def _by_class(self, same: Tensor, y: Tensor) -> list[Finding]:
        present = y.unique().tolist()
        by_class = {k: same[y == k] for k in present}
        least = sorted(present, key=lambda k: (float(by_class[k].double().mean()), k))[: self.classes]
        names = self.class_names
        found = []
        for k in least:
            name = names[k] if names is not None and k < len(names) else f"class {k}"
            meaning = (
                f"Same answer of both on {name}, among the {len(least)} of {len(present)} with the least agreement."
            )
            found.append(share(f"agreement_class_{k}", "both", by_class[k], meaning))
        return found

    def _by_difficulty(self, same: Tensor, odds: Float[Tensor, " N"]) -> list[Finding]:
        parts = torch.argsort(odds, stable=True).tensor_split(len(PARTS))
        return [
            share(
                f"agreement_{name}",
                "both",
                same[part],
                f"Same answer of both on the {name} fifth by the teacher's log-odds of the label, mean "
                f"{float(odds[part].mean()):.2f}.",
            )
            for name, part in zip(PARTS, parts, strict=True)
            if len(part)
        ]

    def _inside(self, models: Mapping[str, nn.Module], x: Tensor, y: Tensor) -> list[Finding]:
        """Gradients and representations of the first samples."""
        sides = tuple(models)
        ends: dict[str, dict[str, Tensor]] = {}
        toward: dict[str, list[Tensor]] = {side: [] for side in sides}
        for i, side in enumerate(sides):
            answer, kept = as_function(models[side], side), {"logits": []} | {name: [] for name in self.layers}
            with FeatureExtractor(models[side], [pair[i] for pair in self.layers.values()]) as taps:
                for a, b in zip(x.split(self.batch), y.split(self.batch), strict=True):
                    if x.is_floating_point():
                        toward[side].append(slopes(lambda z, f=answer: f(z).to(z.device), a, b))
                    with torch.no_grad():
                        kept["logits"].append(answer(a).cpu())
                    for name, pair in self.layers.items():
                        kept[name].append(taps[pair[i]].detach().flatten(1).cpu())
            ends[side] = {name: torch.cat(parts) for name, parts in kept.items()}
        found = []
        if x.is_floating_point():
            cosine = agreement(*(torch.cat(toward[side]) for side in ("student", "teacher")))
            meaning = (
                "Cosine of the angle between the two models' input gradients, mean over samples: whether both would be "
                "moved by the same pixels. Unrelated models are near 0."
            )
            found.append(average("gradient_cosine", "both", cosine, meaning))
            found.append(gradcam.looks_alike(models, self.layers, x, y, batch=self.batch))
        for name in ends["student"]:
            pair = ends["student"][name], ends["teacher"][name]
            meaning = (
                f"Linear CKA (unbiased) of both models' {name}: 1 is one representation up to rotation and scale, 0 "
                "nothing in common. It is led by the directions of largest variance."
            )
            interval = cka_interval(*pair) if len(y) >= 8 else (None, None)
            value = cka(*pair) if len(y) >= 4 else None
            found.append(Finding(f"cka_{name}", "both", value, meaning, *interval, n=len(y)))
        return found
