"""Robustness: to attacks, to certified noise, to common corruptions, and how much of it comes from the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tempering.audits.attacks import Attacked, Norm, Pixels, autoattack, blind, fgsm, pgd
from tempering.audits.base import Answer, Audit, Finding, as_function, check_positive, count_classes, data
from tempering.audits.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from tempering.audits.intervals import average, share
from tempering.audits.smoothing import certify
from tempering.utils.text import counted

Attack = Callable[[Answer, Tensor, Tensor], Attacked]


class Robustness(Audit):
    """Measure accuracy under FGSM and PGD, check for gradient masking, and compare with the teacher.

    Also measures the certified accuracy of the smoothed models, and accuracy under CIFAR-C's fifteen corruptions.
    Attacks work on pixels and stay in [0, 1], whatever normalization the models use. Accuracy under an attack is an
    upper bound of robust accuracy: a stronger attack may lower it.

    Args:
        mean, std: normalization of the batches, one value per channel.
        eps: strength of the attacks, in pixels of [0, 1].
        norm: "linf" or "l2".
        steps, step, restarts: PGD settings; a step of None is 2.5 eps / steps.
        checks: check for gradient masking (several times the cost of PGD).
        certified: number of images to certify, 0 for none; expensive, ``votes`` forward passes each.
        sigma: standard deviation of the certified noise, in pixels.
        votes: noisy samples per certificate.
        radii: l2 radii at which certified accuracy is reported; those that ``votes`` cannot reach give 0.
        corruptions: names of corruptions; default: all; () for none.
        auto: run AutoAttack too (extra "robustness"); for models with 4 classes or more.
        samples: number of images, None for all.
        batch: images per forward pass.
        seed: seed of starts and noise.

    Reference: attacks.py, smoothing.py and corruptions.py have the papers; the checks are those of Athalye et al.,
    2018, arXiv:1802.00420, section 3.1, and of Carlini et al., "On Evaluating Adversarial Robustness", 2019,
    arXiv:1902.06705.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        eps: float = 8 / 255,
        norm: Norm = "linf",
        steps: int = 20,
        step: float | None = None,
        restarts: int = 2,
        checks: bool = True,
        certified: int = 50,
        sigma: float = 0.25,
        votes: int = 1000,
        radii: Sequence[float] = (0.0, 0.25, 0.5),
        corruptions: Sequence[str] | None = None,
        auto: bool = False,
        samples: int | None = 1000,
        batch: int = 250,
        seed: int = 0,
    ) -> None:
        check_positive({"steps": steps, "restarts": restarts, "votes": votes, "batch": batch})
        self.mean, self.std, self.eps = tuple(mean), tuple(std), eps
        self.norm: Norm = norm
        self.steps, self.step, self.restarts, self.checks = steps, step, restarts, checks
        self.certified, self.sigma, self.votes, self.radii = certified, sigma, votes, tuple(radii)
        self.corruptions = tuple(CORRUPTIONS if corruptions is None else corruptions)
        self.auto, self.samples, self.batch, self.seed = auto, samples, batch, seed
        if unknown := set(self.corruptions) - set(CORRUPTIONS):
            raise ValueError(f"unknown corruptions {sorted(unknown)}; choose from {', '.join(CORRUPTIONS)}.")

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        x, y = data(batches, self.samples)
        count_classes(models, x, y)
        pixels = Pixels(self.mean, self.std)
        p = pixels.pixels(x)
        sides = {side: pixels.of(_on_input_device(model, side)) for side, model in models.items()}
        attacked = {side: self._run(self._pgd(), answer, p, y) for side, answer in sides.items()}
        results: list[Finding] = []
        for side, answer in sides.items():
            results += self._attacks(side, answer, p, y, attacked[side])
        if self.checks:
            results += self._masking(sides, p, y, attacked["student"])
        if "teacher" in sides:
            results += self._inherited(sides, y, attacked)
        for side, answer in sides.items():
            results += self._smoothed(side, answer, p, y) + self._corrupted(side, answer, p, y)
        return results

    # attacks

    def _pgd(self, **changes: Any) -> Attack:
        options = {"eps": self.eps, "steps": self.steps, "step": self.step, "restarts": self.restarts}
        return partial(pgd, norm=self.norm, seed=self.seed, **(options | changes))

    def _run(self, attack: Attack, answer: Answer, p: Tensor, y: Tensor) -> Attacked:
        parts = [attack(answer, a, b) for a, b in zip(p.split(self.batch), y.split(self.batch), strict=True)]
        return Attacked(torch.cat([a.images for a in parts]), torch.cat([a.fooled for a in parts]))

    def _attacks(self, side: str, answer: Answer, p: Tensor, y: Tensor, attacked: Attacked) -> list[Finding]:
        ball = f"{self.norm} {self.eps:.4g}"
        clean = self._predicted(answer, p) == y
        single = self._run(partial(fgsm, eps=self.eps, norm=self.norm), answer, p, y)
        setup = (
            f"{counted(self.steps, 'step')}, {counted(self.restarts, 'random start')}, cross-entropy and margin in turn"
        )
        results = [
            share("clean", side, clean, "Accuracy on the same images, not attacked."),
            share("fgsm", side, ~single.fooled, f"Accuracy under FGSM, {ball}: one step, a weak attack."),
            share(
                "pgd",
                side,
                ~attacked.fooled,
                f"Accuracy under PGD, {ball}, {setup}: an upper bound of robust accuracy.",
            ),
        ]
        if self.auto:
            attack = partial(autoattack, eps=self.eps, norm=self.norm, batch=self.batch, seed=self.seed)
            # images that PGD fools count as fooled, so the ensemble is at least as strong as PGD alone
            remaining = ~attacked.fooled
            robust = remaining.clone()
            if remaining.any():
                robust[remaining] = ~attack(answer, p[remaining], y[remaining]).fooled
            results.append(share("autoattack", side, robust, f"Accuracy under PGD and AutoAttack, {ball}."))
        return results

    def _masking(self, sides: Mapping[str, Answer], p: Tensor, y: Tensor, attacked: Attacked) -> list[Finding]:
        """Check whether the student's accuracy under PGD is due to masked gradients."""
        student, clean = sides["student"], self._predicted(sides["student"], p) == y
        single = self._run(partial(fgsm, eps=self.eps, norm=self.norm), student, p, y).fooled
        more_steps = self._run(self._pgd(steps=5 * self.steps), student, p, y).fooled
        one_start = self._run(self._pgd(restarts=1), student, p, y).fooled
        full_radius = 1.0 if self.norm == "linf" else float(p[0].numel()) ** 0.5
        unbounded = self._run(self._pgd(eps=full_radius, step=None, steps=max(20, self.steps)), student, p, y).fooled
        gain = more_steps.double() - attacked.fooled.double()
        results = [
            average(
                "check_more_steps",
                "student",
                gain,
                "Additional fraction fooled by five times the steps. Near 0: converged; clearly above: use more steps; "
                "clearly below: more steps help the defender, a sign of masked gradients.",
                share=True,
            ),
            share(
                "check_restarts",
                "student",
                attacked.fooled & ~one_start,
                "Images fooled by later random starts but not by the first. Much above 0: use more restarts.",
            ),
            share(
                "check_one_step",
                "student",
                single & ~attacked.fooled,
                "Images fooled by one step but not by PGD. Clearly above 0 is a sign of masked gradients.",
            ),
            share(
                "check_unbounded",
                "student",
                ~unbounded,
                "Accuracy under PGD with an unbounded radius. Clearly above 0: the gradients are uninformative, and "
                "accuracy under PGD is no evidence of robustness.",
            ),
        ]
        random_fooled = self._run(partial(blind, eps=self.eps, norm=self.norm, seed=self.seed), student, p, y).fooled
        meaning = "Images fooled by 20 random points of the ball but not by PGD. Clearly above 0: masked gradients."
        results.append(share("check_random", "student", random_fooled & ~attacked.fooled, meaning))
        return results + (self._transferred(sides, p, y, attacked, clean) if "teacher" in sides else [])

    def _transferred(
        self, sides: Mapping[str, Answer], p: Tensor, y: Tensor, attacked: Attacked, clean: Tensor
    ) -> list[Finding]:
        """Transfer an attack on the teacher to the student, a black-box attack without the student's gradients."""
        images = self._run(self._pgd(stop=False), sides["teacher"], p, y).images
        fooled = self._predicted(sides["student"], images) != y
        return [
            share(
                "check_black_box",
                "student",
                fooled & ~attacked.fooled,
                "Images on which the student is fooled by an attack on the teacher but not by one on itself. Clearly "
                "above 0 is a sign of masked gradients.",
            ),
            share(
                "transferred_attack",
                "student",
                ~fooled[clean],
                "Of the images it classifies correctly, those still correct under attacks on the teacher.",
            ),
        ]

    def _inherited(self, sides: Mapping[str, Answer], y: Tensor, attacked: Mapping[str, Attacked]) -> list[Finding]:
        images, robust = attacked["student"].images, {side: ~a.fooled for side, a in attacked.items()}
        predicted = {side: self._predicted(answer, images) for side, answer in sides.items()}
        return [
            share(
                "agreement_attacked",
                "both",
                predicted["student"] == predicted["teacher"],
                "Same prediction of both on images attacked to fool the student. If it is high while the student is "
                "fooled, the two share their weaknesses.",
            ),
            share(
                "inherited",
                "both",
                robust["student"][robust["teacher"]],
                "Of the images on which the teacher withstands attacks on itself, those on which the student does: "
                "how much of the teacher's robustness the student inherited.",
            ),
            share(
                "teacher_on_students",
                "teacher",
                predicted["teacher"] == y,
                "The teacher's accuracy on images attacked to fool the student.",
            ),
        ]

    # noise

    def _smoothed(self, side: str, answer: Answer, p: Tensor, y: Tensor) -> list[Finding]:
        if not self.certified:
            return []
        p, y = p[: self.certified], y[: self.certified]
        predicted, radius = certify(answer, p, sigma=self.sigma, votes=self.votes, batch=2 * self.batch, seed=self.seed)
        right = predicted == y
        results = [
            share(
                f"certified_{r:g}",
                side,
                right & (radius >= r),
                f"Correct and certified at an l2 radius of {r:g} (pixels of [0, 1]): no change of that length alters "
                f"the prediction of the model smoothed with sigma {self.sigma:g}, except for 1 image in 1000. A lower "
                "bound, for the smoothed model.",
            )
            for r in self.radii
        ]
        votes = counted(self.votes, "noisy sample")
        meaning = f"Mean certified l2 radius, 0 if wrong or abstaining; sigma {self.sigma:g}, {votes}."
        results.append(average("certified_radius", side, torch.where(right, radius, 0.0), meaning))
        return results

    # corruptions

    def _corrupted(self, side: str, answer: Answer, p: Tensor, y: Tensor) -> list[Finding]:
        results, all_images = [], []
        for name in self.corruptions:
            correct = [self._predicted(answer, corrupt(p, name, s, seed=self.seed).to(p)) == y for s in SEVERITIES]
            per_image = torch.stack(correct).double().mean(0)
            all_images.append(per_image)
            accuracies = ", ".join(f"{100 * float(a.double().mean()):.1f}" for a in correct)
            meaning = (
                f"Accuracy under {name.replace('_', ' ')}, mean of CIFAR-C's five severities; from 1 to 5: "
                f"{accuracies} %."
            )
            results.append(average(f"corrupted_{name}", side, per_image, meaning, share=True))
        if all_images:
            meaning = (
                f"Mean accuracy over {', '.join(self.corruptions)}: not the mCE, which is relative to a baseline. The "
                "published files use other random numbers, and photographs of frost."
            )
            results.append(average("corrupted", side, torch.stack(all_images).mean(0), meaning, share=True))
        return results

    @torch.no_grad()
    def _predicted(self, answer: Answer, p: Tensor) -> Tensor:
        return torch.cat([answer(part).argmax(-1) for part in p.split(self.batch)])


def _on_input_device(model: nn.Module, side: str) -> Answer:
    """Return the model as a function whose logits are moved to the device of the images."""
    answer = as_function(model, side)
    return lambda inputs: answer(inputs).to(inputs.device)
