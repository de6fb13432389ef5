"""Inconsistent KD for detectors: also match the teacher's features on adversarial images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.methods.base import Step, StepMethod, only_block, zero_term
from tempering.methods.detection._adversary import AttackableDetector, FeatureAttack, Target, digest
from tempering.methods.detection._stored import Store
from tempering.methods.detection.base import LEVEL, NeckMethod, between, over_levels, resized, summed
from tempering.methods.detection.fgd import FGD
from tempering.methods.features.base import spread_out
from tempering.rows import Rows, upcast_to_float32
from tempering.teachers.base import fingerprint
from tempering.utils.search_space import RUN_FRACTION, NonNegative, TermWeight


class InconsistentDetection(StepMethod):
    """Inconsistent KD: the terms of a neck method + adversarial * sum (phi(F_s(x')) - F_t(x'))^2 over positions,
    channels and levels.

    x' is an adversarial image that increases the teacher's classification loss at the true boxes: momentum FGSM within
    ``eps``, on images of random size. phi is a 1x1 convolution if the channels differ. The sum is per image; ``total``
    computes the mean over images, which is the released code's sum / N. This costs one more pass of both models, and
    ``steps`` forward and backward passes of the teacher unless x' is cached. The other part of the paper, augmentation
    by the size of objects, is in data.inconsistent.

    The released code attacks once, offline: on images before augmentation, which are then cropped and flipped like the
    clean ones, and stored as JPEG, so that they are neither exact nor within eps. It measures eps in each image's own
    range of normalized values, and shrinks every image to a square without moving its boxes. Here the augmented image
    is attacked, in pixels in [0, 1]; shrinking keeps its aspect ratio and moves its boxes; and x' - x is a multiple of
    1/255, rounded toward 0, which int8 stores without loss.

    The task must make one block: tasks.Detection(class_rows=False). The teacher is a detector
    (models.detector.Detector).

    Args:
        base: FGD, MGD or any other neck method, with its weights and the hard term; None: FGD().
        adversarial: weight; the released values are 1e-5 for RetinaNet and RepPoints, 2.5e-7 for Mask R-CNN.
        until: fraction of the run after which the adversarial term is 0; released: 16 of 24 epochs.
        eps: maximum change of a pixel in [0, 1], at most 127/255.
        step_size, steps, decay: of the attack and its momentum.
        resize: minimum random size, relative to the image's size.
        diversity: probability that a step of the attack uses a shrunk image.
        seed: of the random draws, which depend only on it, the image and its boxes, not on batches or ranks.
        cache: folder in which to store x' - x, by teacher, settings, image and boxes; None: compute it every time. It
            saves time if images recur, so without random augmentation.

    Reference: Liang et al., "Inconsistent Knowledge Distillation for Object Detection", ACM MM 2023, arXiv:2209.09841;
    weights, schedule and attack are the released code's. The attack is Xie et al., CVPR 2019, arXiv:1803.06978.
    """

    paper = "arXiv:2209.09841"
    needs_live = True

    def __init__(
        self,
        base: NeckMethod | None = None,
        *,
        adversarial: TermWeight = 1e-5,
        until: Annotated[float, RUN_FRACTION] = 16 / 24,
        eps: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 5,
        decay: NonNegative = 1.0,
        resize: float = 0.9,
        diversity: float = 0.5,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        owner = "InconsistentDetection"
        if base is not None:
            _check_base(owner, base)
        if not 0.0 < eps <= 127 / 255 or not 0.0 < step_size <= 1.0:
            raise ValueError(
                f"{owner} needs eps in (0, 127/255] and step_size in (0, 1], of pixels in [0, 1]; got {eps!r} and "
                f"{step_size!r}. Eight of 255 gray levels are 8/255."
            )
        if steps < 1 or not 0.0 < resize <= 1.0 or not 0.0 <= diversity <= 1.0:
            raise ValueError(
                f"{owner} needs steps >= 1, resize in (0, 1] and diversity in [0, 1]; got {steps!r}, {resize!r} and "
                f"{diversity!r}."
            )
        self.base = FGD() if base is None else base
        self.adversarial, self.until, self.eps, self.step_size = adversarial, until, eps, step_size
        self.steps, self.decay, self.resize, self.diversity = steps, decay, resize, diversity
        self.seed, self.cache = seed, cache
        self.projectors = nn.ModuleList()
        self._teacher: tuple[AttackableDetector, Store | None] | None = None

    @classmethod
    def example(cls) -> Self:
        return cls(FGD(foreground=1.0, background=1.0), adversarial=1.0, until=1.0)

    @property
    def attack(self) -> FeatureAttack:
        """Return the attack with these settings."""
        return FeatureAttack(self.eps, self.step_size, self.steps, self.decay, self.resize, self.diversity, self.seed)

    def setup(self, rows: Rows) -> None:
        self.base.setup(rows)
        if not len(self.projectors):
            pairs = self.base.pairs(rows)
            self.projectors.extend(between(s, t) for s, t in pairs)
            self.projectors.to(pairs[0][0])

    def bind_teacher(self, teacher: nn.Module | None) -> None:
        """Set the detector, and open its cache.

        Raises:
            TypeError: if the teacher is not a detector.
            ValueError: for a cache of another teacher or attack.
        """
        if teacher is None or not callable(getattr(teacher, "class_loss", None)):
            raise TypeError(
                "InconsistentDetection attacks the teacher's classification loss: it needs a detector with "
                f"class_loss(inputs), such as models.detector.Detector; got {type(teacher).__name__}."
            )
        store = None
        if self.cache is not None:
            store = Store(self.cache, teacher=fingerprint(teacher), attack=asdict(self.attack))
        self._teacher = (cast("AttackableDetector", teacher), store)

    def step(self, step: Step) -> Mapping[str, Tensor]:
        rows = only_block(step.forward())
        terms = dict(self.base(rows, step.progress))
        active = self.adversarial > 0 and step.progress <= self.until
        terms["adversarial"] = self.adversarial * self._inconsistent(step, rows) if active else zero_term(rows)
        return terms

    def _inconsistent(self, step: Step, rows: Rows) -> Float[Tensor, " N"]:
        """Return the squared distance of the two necks on adversarial images, (N,); 0 on rows of weight 0."""
        images, targets = detection_inputs(step.student_inputs)
        kept = list(range(len(rows)))
        if rows.weight is not None:
            kept = [int(i) for i in (rows.weight > 0).nonzero().flatten().cpu()]
        if not kept:
            return zero_term(rows)
        clean = images[kept]
        adversaries = self.adversaries(upcast_to_float32(clean), [targets[i] for i in kept])
        student_levels = step.student({"images": adversaries.to(clean.dtype), "only": "levels"})
        teacher_levels = step.teacher({"images": adversaries, "only": "levels"}, None)
        pairs = [(student_levels[i], teacher_levels[i]) for i in self._levels(rows)]
        with torch.autocast(images.device.type, enabled=False):
            errors = [
                summed((resized(phi(upcast_to_float32(s)), t) - upcast_to_float32(t)).square())
                for phi, (s, t) in zip(self.projectors, pairs, strict=True)
            ]
            return spread_out(over_levels(errors), rows)

    def _levels(self, rows: Rows) -> list[int]:
        """Return the indices of the neck's levels that the base method compares."""
        names = self.base.chosen(rows)
        matches = [LEVEL.fullmatch(name) for name in names]
        if not all(matches):
            raise ValueError(
                f"InconsistentDetection needs a base over levels, such as names=('p0', 'p1'); got names={names}."
            )
        return [int(m[1]) for m in matches if m]

    def adversaries(self, images: Float[Tensor, "B 3 H W"], targets: Sequence[Target]) -> Float[Tensor, "B 3 H W"]:
        """Return the adversarial images of images in [0, 1]; read perturbations from the cache if they are there.

        Raises:
            RuntimeError: before ``bind_teacher``; for a corrupt cache, naming the file.
            ValueError: for pixels outside [0, 1].
        """
        if self._teacher is None:
            raise RuntimeError(
                "InconsistentDetection has no teacher: call method.bind_teacher(teacher.model) before the first step."
            )
        low, high = float(images.min()), float(images.max())
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"InconsistentDetection needs pixels in [0, 1]; got {low:g} to {high:g}. Normalize inside the models."
            )
        (detector, store), size = self._teacher, tuple(images.shape[1:])
        names = [digest(image, target) for image, target in zip(images, targets, strict=True)]
        deltas = [None if store is None else store.get(name, size) for name in names]
        if missing := [i for i, delta in enumerate(deltas) if delta is None]:
            new = self.attack(detector, images[missing], [targets[i] for i in missing], [names[i] for i in missing])
            for i, delta in zip(missing, new, strict=True):
                deltas[i] = delta
                if store is not None:
                    store.put(names[i], delta)
        stacked = torch.stack([delta.to(images.device) for delta in deltas if delta is not None])
        return self.attack.perturbed(images, stacked)


def _check_base(owner: str, base: object) -> None:
    if not isinstance(base, NeckMethod):
        raise TypeError(f"{owner} needs a method over necks as base, such as FGD() or MGD(); got {base!r}.")


def detection_inputs(inputs: object) -> tuple[Tensor, Sequence[Target]]:
    """Return the images and targets of a detector's inputs.

    Raises:
        ValueError: for other inputs.
    """
    got = type(inputs).__name__
    if isinstance(inputs, Mapping):
        mapping = cast("Mapping[str, Any]", inputs)
        images, targets = mapping.get("images"), mapping.get("targets")
        if isinstance(images, Tensor) and targets is not None:
            return images.detach(), targets
    raise ValueError(
        "InconsistentDetection needs a detector's inputs, {'images': (B, 3, H, W), 'targets': [{'boxes', 'labels'}]}; "
        f"got {got}. Use tasks.Detection(class_rows=False)."
    )
