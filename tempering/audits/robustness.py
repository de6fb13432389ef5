"""Robustness: under attack, under certified noise, under common corruptions; and how much of it is the teacher's."""

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

Attack = Callable[[Answer, Tensor, Tensor], Attacked]


class Robustness(Audit):
    """Accuracy of both models under FGSM and PGD, whether it may be believed, and how much of it is the teacher's.

    Beside it: the certified accuracy of the smoothed models, and accuracy under CIFAR-C's fifteen corruptions. Attacks
    work on pixels in [0, 1], whatever the models are normalized with, and never leave it. Accuracy under an attack is
    an upper bound of robust accuracy: a stronger attack may find less.

    Args:
        mean, std: with which the batches are normalized, one value a channel.
        eps: strength of the attacks, in pixels of [0, 1].
        norm: "linf" or "l2".
        steps, step, restarts: of PGD; a step of None is 2.5 eps / steps.
        checks: ask whether masked gradients feign robustness (several times the cost of PGD).
        certified: images that are certified, 0 for none; the dear part, ``votes`` forwards each.
        sigma: of the noise that is certified against, in pixels.
        votes: of each certificate.
        radii: l2 radii at which certified accuracy is named; those that ``votes`` can never reach are 0.
        corruptions: which, all by themselves; () for none.
        auto: AutoAttack too, by extra "robustness"; for models of 4 classes or more.
        samples: images to attack, None for all.
        batch: images at once.
        seed: of starts and noise.

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
            raise ValueError(f"there is no corruption {sorted(unknown)}; there are {', '.join(CORRUPTIONS)}.")

    def examine(self, models: Mapping[str, nn.Module], batches: Iterable[Any]) -> list[Finding]:
        x, y = data(batches, self.samples)
        count_classes(models, x, y)
        view = Pixels(self.mean, self.std)
        p = view.pixels(x)
        sides = {side: view.of(_placed(model, side)) for side, model in models.items()}
        struck = {side: self._run(self._pgd(), answer, p, y) for side, answer in sides.items()}
        found: list[Finding] = []
        for side, answer in sides.items():
            found += self._attacks(side, answer, p, y, struck[side])
        if self.checks:
            found += self._masking(sides, p, y, struck["student"])
        if "teacher" in sides:
            found += self._inherited(sides, y, struck)
        for side, answer in sides.items():
            found += self._smoothed(side, answer, p, y) + self._corrupted(side, answer, p, y)
        return found

    # attacks

    def _pgd(self, **changes: Any) -> Attack:
        how = {"eps": self.eps, "steps": self.steps, "step": self.step, "restarts": self.restarts}
        return partial(pgd, norm=self.norm, seed=self.seed, **(how | changes))

    def _run(self, attack: Attack, answer: Answer, p: Tensor, y: Tensor) -> Attacked:
        parts = [attack(answer, a, b) for a, b in zip(p.split(self.batch), y.split(self.batch), strict=True)]
        return Attacked(torch.cat([a.images for a in parts]), torch.cat([a.fooled for a in parts]))

    def _attacks(self, side: str, answer: Answer, p: Tensor, y: Tensor, struck: Attacked) -> list[Finding]:
        ball = f"{self.norm} {self.eps:.4g}"
        clean = self._predicted(answer, p) == y
        single = self._run(partial(fgsm, eps=self.eps, norm=self.norm), answer, p, y)
        how = f"{self.steps} steps, {self.restarts} random starts, cross-entropy and margin in turn"
        found = [
            share("clean", side, clean, "Accuracy on the same images, not attacked."),
            share("fgsm", side, ~single.fooled, f"Accuracy under FGSM, {ball}: one step, a weak attack."),
            share(
                "pgd", side, ~struck.fooled, f"Accuracy under PGD, {ball}, {how}: an upper bound of robust accuracy."
            ),
        ]
        if self.auto:
            attack = partial(autoattack, eps=self.eps, norm=self.norm, batch=self.batch, seed=self.seed)
            # what PGD fools is fooled, so the ensemble is never weaker than PGD alone
            left = ~struck.fooled
            stands = left.clone()
            if left.any():
                stands[left] = ~attack(answer, p[left], y[left]).fooled
            found.append(share("autoattack", side, stands, f"Accuracy under PGD and AutoAttack, {ball}."))
        return found

    def _masking(self, sides: Mapping[str, Answer], p: Tensor, y: Tensor, struck: Attacked) -> list[Finding]:
        """Whether the student's accuracy under PGD is robustness, or gradients that lead nowhere."""
        student, clean = sides["student"], self._predicted(sides["student"], p) == y
        single = self._run(partial(fgsm, eps=self.eps, norm=self.norm), student, p, y).fooled
        long = self._run(self._pgd(steps=5 * self.steps), student, p, y).fooled
        once = self._run(self._pgd(restarts=1), student, p, y).fooled
        whole = 1.0 if self.norm == "linf" else float(p[0].numel()) ** 0.5
        free = self._run(self._pgd(eps=whole, step=None, steps=max(20, self.steps)), student, p, y).fooled
        gain = long.double() - struck.fooled.double()
        found = [
            average(
                "check_more_steps",
                "student",
                gain,
                "Further share fooled by five times the steps. Near 0 is converged; clearly above, take more steps; "
                "clearly below, more steps help the defender, a sign of masked gradients.",
                share=True,
            ),
            share(
                "check_restarts",
                "student",
                struck.fooled & ~once,
                "Images that the first random start did not fool and the others did. Much above 0: take more restarts.",
            ),
            share(
                "check_one_step",
                "student",
                single & ~struck.fooled,
                "Images that one step fools and PGD does not. Clearly above 0 is a sign of masked gradients.",
            ),
            share(
                "check_unbounded",
                "student",
                ~free,
                "Accuracy where PGD may change the image at will. Clearly above 0: the gradients lead nowhere, and "
                "accuracy under PGD says nothing of robustness.",
            ),
        ]
        lost = self._run(partial(blind, eps=self.eps, norm=self.norm, seed=self.seed), student, p, y).fooled
        said = "Images that 20 random points of the ball fool and PGD does not. Clearly above 0: masked gradients."
        found.append(share("check_random", "student", lost & ~struck.fooled, said))
        return found + (self._sent(sides, p, y, struck, clean) if "teacher" in sides else [])

    def _sent(
        self, sides: Mapping[str, Answer], p: Tensor, y: Tensor, struck: Attacked, clean: Tensor
    ) -> list[Finding]:
        """What an attack on the teacher does to the student: an attack that sees none of its gradients."""
        images = self._run(self._pgd(stop=False), sides["teacher"], p, y).images
        fooled = self._predicted(sides["student"], images) != y
        return [
            share(
                "check_black_box",
                "student",
                fooled & ~struck.fooled,
                "Images that an attack on the teacher makes the student miss, and an attack on the student itself does "
                "not. Clearly above 0 is a sign of masked gradients.",
            ),
            share(
                "transferred_attack",
                "student",
                ~fooled[clean],
                "Of the images it has right, those it keeps under attacks made on the teacher.",
            ),
        ]

    def _inherited(self, sides: Mapping[str, Answer], y: Tensor, struck: Mapping[str, Attacked]) -> list[Finding]:
        images, stands = struck["student"].images, {side: ~a.fooled for side, a in struck.items()}
        said = {side: self._predicted(answer, images) for side, answer in sides.items()}
        return [
            share(
                "agreement_attacked",
                "both",
                said["student"] == said["teacher"],
                "Same answer of both on images attacked to fool the student. High with a student that is fooled: the "
                "two share their weaknesses.",
            ),
            share(
                "inherited",
                "both",
                stands["student"][stands["teacher"]],
                "Of the images on which the teacher stands attacks on itself, those on which the student stands "
                "attacks on itself: how much of the teacher's robustness came over.",
            ),
            share(
                "teacher_on_students",
                "teacher",
                said["teacher"] == y,
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
        found = [
            share(
                f"certified_{r:g}",
                side,
                right & (radius >= r),
                f"Right and certified at an l2 radius of {r:g} (pixels of [0, 1]): no change of that length makes the "
                f"model smoothed with sigma {self.sigma:g} answer otherwise, but for 1 image in 1000. A lower bound, "
                "and of the smoothed model.",
            )
            for r in self.radii
        ]
        meaning = (
            f"Mean certified l2 radius, 0 where it is wrong or abstains; sigma {self.sigma:g}, {self.votes} votes."
        )
        found.append(average("certified_radius", side, torch.where(right, radius, 0.0), meaning))
        return found

    # corruptions

    def _corrupted(self, side: str, answer: Answer, p: Tensor, y: Tensor) -> list[Finding]:
        found, every = [], []
        for name in self.corruptions:
            at = [self._predicted(answer, corrupt(p, name, s, seed=self.seed).to(p)) == y for s in SEVERITIES]
            per_image = torch.stack(at).double().mean(0)
            every.append(per_image)
            said = ", ".join(f"{100 * float(a.double().mean()):.1f}" for a in at)
            meaning = (
                f"Accuracy under {name.replace('_', ' ')}, mean of five strengths of CIFAR-C; from 1 to 5: {said} %."
            )
            found.append(average(f"corrupted_{name}", side, per_image, meaning, share=True))
        if every:
            meaning = (
                f"Mean accuracy over {', '.join(self.corruptions)}: not the mCE, which is relative to a baseline. The "
                "published files have other random numbers, and photographs of frost."
            )
            found.append(average("corrupted", side, torch.stack(every).mean(0), meaning, share=True))
        return found

    @torch.no_grad()
    def _predicted(self, answer: Answer, p: Tensor) -> Tensor:
        return torch.cat([answer(part).argmax(-1) for part in p.split(self.batch)])


def _placed(model: nn.Module, side: str) -> Answer:
    """The model, its answers brought back to where the images are."""
    answer = as_function(model, side)
    return lambda inputs: answer(inputs).to(inputs.device)
