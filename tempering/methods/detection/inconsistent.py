"""Inconsistent KD: also what the teacher sees where it is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.methods.base import Step, StepMethod, check_run_fraction, check_weights, only_block, zero_term
from tempering.methods.detection._adversary import FeatureAttack, Target, digest
from tempering.methods.detection._stored import Store
from tempering.methods.detection.base import LEVEL, NeckMethod, between, over_levels, resized, summed
from tempering.methods.detection.fgd import FGD
from tempering.methods.features.base import spread_out
from tempering.rows import Rows, upcast_to_float32
from tempering.teachers.base import fingerprint
from tempering.utils.search_space import Weight


class InconsistentDetection(StepMethod):
    """The terms of a method over necks + adversarial * sum (phi(F_s(x')) - F_t(x'))^2 over positions, channels, levels.

    x' is the image with what most raises the teacher's classification loss at its true boxes: momentum FGSM within
    ``eps``, through images of random size. phi is a 1x1 convolution where channels differ. The sum is an image's own;
    ``total`` takes the mean over images, which is the released code's sum / N. The student's passes on x' come on top
    of its step, and ``steps`` passes of the teacher there and back, where x' is not on disk already. The other half of
    the paper, augmentation by the size of the objects, is data.inconsistent.

    The released code attacks once, offline: whole images before any augmentation, which are then cropped and flipped
    with the clean ones, and stored as JPEG, so that they are neither exact nor within eps. It measures eps in each
    image's own range of normalized values, and shrinks an image to a square whatever its shape while boxes stay where
    they were. Here the image is attacked as the student sees it, in pixels of [0, 1]; it shrinks in proportion, and its
    boxes with it; and x' differs from x by whole 1/255, rounded towards x, which int8 keeps without loss.

    The task gives one block: tasks.Detection(class_rows=False). The teacher is a detector (models.detector.Detector).

    Args:
        base: FGD, MGD or any other method over necks, with its weights and the hard term; None is FGD().
        adversarial: weight; the released values are 1e-5 for RetinaNet and RepPoints, 2.5e-7 for Mask R-CNN.
        until: share of the run after which there is no adversarial term; the released schedule's 16 of 24 epochs.
        eps: how far a pixel of [0, 1] may move, at most 127/255.
        step_size, steps, decay: of the attack and its momentum.
        resize: smallest size of the random ones, against the image's.
        diversity: probability that a step sees the image shrunk.
        seed: of these draws, which depend on nothing else but the image and its boxes: not on batches or ranks.
        cache: folder to keep x' - x in, by the teacher, the settings and the image with its boxes; None makes them anew
            every time. It pays where the same image comes back, so without random augmentation.

    Reference: Liang et al., "Inconsistent Knowledge Distillation for Object Detection", ACM MM 2023, arXiv:2209.09841;
    weights, schedule and attack are the released code's. The attack is Xie et al., CVPR 2019, arXiv:1803.06978.
    """

    paper = "arXiv:2209.09841"
    needs_live = True

    def __init__(
        self,
        base: NeckMethod | None = None,
        *,
        adversarial: Annotated[float, Weight()] = 1e-5,
        until: float = 16 / 24,
        eps: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 5,
        decay: float = 1.0,
        resize: float = 0.9,
        diversity: float = 0.5,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        owner = "InconsistentDetection"
        if base is not None and not isinstance(base, NeckMethod):
            raise TypeError(f"{owner} goes on top of a method over necks, such as FGD() or MGD(); got {base!r}.")
        check_weights(owner, adversarial=adversarial, decay=decay)
        check_run_fraction(owner, until=until)
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
        self._met: tuple[nn.Module, Store | None] | None = None

    @classmethod
    def example(cls) -> Self:
        return cls(FGD(foreground=1.0, background=1.0), adversarial=1.0, until=1.0)

    @property
    def attack(self) -> FeatureAttack:
        """Its settings."""
        return FeatureAttack(self.eps, self.step_size, self.steps, self.decay, self.resize, self.diversity, self.seed)

    def setup(self, rows: Rows) -> None:
        self.base.setup(rows)
        if not len(self.projectors):
            pairs = self.base.pairs(rows)
            self.projectors.extend(between(s, t) for s, t in pairs)
            self.projectors.to(pairs[0][0])

    def bind_teacher(self, teacher: nn.Module | None) -> None:
        """Take the detector on, and open its cache.

        Raises:
            TypeError: for a teacher that is no detector.
            ValueError: for a cache of another teacher or attack.
        """
        if teacher is None or not callable(getattr(teacher, "class_loss", None)):
            raise TypeError(
                "InconsistentDetection attacks the teacher's classification loss: it needs a detector with "
                f"class_loss(inputs), as models.detector.Detector has it; got {type(teacher).__name__}."
            )
        store = None
        if self.cache is not None:
            store = Store(self.cache, teacher=fingerprint(teacher), attack=asdict(self.attack))
        self._met = (teacher, store)

    def step(self, step: Step) -> Mapping[str, Tensor]:
        rows = only_block(step.forward())
        terms = dict(self.base(rows, step.progress))
        on = self.adversarial > 0 and step.progress <= self.until
        terms["adversarial"] = self.adversarial * self._inconsistent(step, rows) if on else zero_term(rows)
        return terms

    def _inconsistent(self, step: Step, rows: Rows) -> Float[Tensor, " N"]:
        """How far the two necks are apart on the adversaries, (N,); 0 on rows of weight 0."""
        images, targets = seen(step.student_inputs)
        kept = list(range(len(rows))) if rows.weight is None else (rows.weight > 0).nonzero().flatten().tolist()
        if not kept:
            return zero_term(rows)
        own = images[kept]
        adversaries = self.adversaries(upcast_to_float32(own), [targets[i] for i in kept])
        said = step.student({"images": adversaries.to(own.dtype), "only": "levels"})
        taught = step.teacher({"images": adversaries, "only": "levels"}, None)
        compared = [(said[i], taught[i]) for i in self._levels(rows)]
        with torch.autocast(images.device.type, enabled=False):
            errors = [
                summed((resized(phi(upcast_to_float32(s)), t) - upcast_to_float32(t)).square())
                for phi, (s, t) in zip(self.projectors, compared, strict=True)
            ]
            return spread_out(over_levels(errors), rows)

    def _levels(self, rows: Rows) -> list[int]:
        """Which of a neck's levels the base compares."""
        names = self.base.chosen(rows)
        found = [LEVEL.fullmatch(name) for name in names]
        if not all(found):
            raise ValueError(
                f"InconsistentDetection needs a base over levels, such as names=('p0', 'p1'); got names={names}."
            )
        return [int(m[1]) for m in found if m]

    def adversaries(self, images: Float[Tensor, "B 3 H W"], targets: Sequence[Target]) -> Float[Tensor, "B 3 H W"]:
        """The images of [0, 1] as the teacher errs on them; read from the cache where they lie there.

        Raises:
            RuntimeError: before a teacher was met; for a broken cache, naming the file.
            ValueError: for pixels outside [0, 1].
        """
        if self._met is None:
            raise RuntimeError(
                "InconsistentDetection has no teacher: call method.bind_teacher(teacher.model) before the first step."
            )
        low, high = float(images.min()), float(images.max())
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                f"InconsistentDetection needs pixels in [0, 1]; got {low:g} to {high:g}. Normalize inside the models."
            )
        (detector, store), size = self._met, tuple(images.shape[1:])
        names = [digest(image, target) for image, target in zip(images, targets, strict=True)]
        by = [None if store is None else store.get(name, size) for name in names]
        if fresh := [i for i, found in enumerate(by) if found is None]:
            made = self.attack(detector, images[fresh], [targets[i] for i in fresh], [names[i] for i in fresh])
            for i, value in zip(fresh, made, strict=True):
                by[i] = value
                if store is not None:
                    store.put(names[i], value)
        whole = torch.stack([x.to(images.device) for x in by if x is not None])
        return self.attack.perturbed(images, whole)


def seen(inputs: Any) -> tuple[Tensor, Sequence[Target]]:
    """The images and targets of what a detector is given.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(inputs, Mapping) and isinstance(inputs.get("images"), Tensor) and inputs.get("targets") is not None:
        return inputs["images"].detach(), inputs["targets"]
    raise ValueError(
        "InconsistentDetection needs a detector's inputs, {'images': (B, 3, H, W), 'targets': [{'boxes', 'labels'}]}; "
        f"got {type(inputs).__name__}. Use tasks.Detection(class_rows=False)."
    )
