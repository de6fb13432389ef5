"""Adversarial images for detectors: momentum, input-diverse FGSM on the classification loss."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from tempering.utils.tensors import numbers_on

PIXEL = 255.0
ROUNDING = 1e-3  # in units of 1/255: tolerance of float32 sums that should be integers
Target = Mapping[str, Tensor]


class AttackableDetector(Protocol):
    """A detector module with a classification loss, {"images", "targets"} -> (B,)."""

    def class_loss(self, inputs: Mapping[str, Any], /) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass(frozen=True)
class FeatureAttack:
    """Attack with the settings of ``InconsistentDetection``; its random draws depend on ``seed`` and the image only."""

    eps: float
    step_size: float
    steps: int
    decay: float
    resize: float
    diversity: float
    seed: int

    def __call__(
        self,
        detector: AttackableDetector,
        images: Float[Tensor, "B 3 H W"],
        targets: Sequence[Target],
        names: Sequence[str],
    ) -> Int8[Tensor, "B 3 H W"]:
        """Return the perturbation of every pixel in units of 1/255, rounded toward 0: at most eps, and within [0, 1].

        Args:
            detector: has ``class_loss({"images", "targets"})``, (B,).
            images: in [0, 1].
            targets: boxes (M, 4) as xyxy in pixels, and labels (M,), of each image.
            names: of the images, to seed their random draws; see ``digest``.
        """
        draws = [self._draw(name) for name in names]
        dtype = next((p.dtype for p in detector.parameters() if p.is_floating_point()), images.dtype)
        delta, momentum = torch.zeros_like(images), torch.zeros_like(images)
        for _ in range(self.steps):
            perturbed = (images + delta).requires_grad_()
            with torch.enable_grad():
                shown, moved = self._diverse(perturbed, targets, draws)
                loss = detector.class_loss({"images": shown.to(dtype), "targets": moved}).sum()
                gradient = (
                    torch.autograd.grad(loss, perturbed)[0].detach() if loss.requires_grad else torch.zeros_like(images)
                )
            norm = gradient.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
            momentum = self.decay * momentum + gradient / torch.where(norm > 0, norm, 1.0)
            delta = (delta + self.step_size * momentum.sign()).clamp(-self.eps, self.eps)
            delta = (images + delta).clamp(0.0, 1.0) - images
        return (delta.sign() * (PIXEL * delta.abs() + ROUNDING).floor()).to(torch.int8)

    def perturbed(self, images: Float[Tensor, "B 3 H W"], by: Int8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Add a perturbation in units of 1/255 to images; the result differs by at most eps and is in [0, 1]."""
        clean = images.double()
        perturbed = (clean + by.double() / PIXEL).clamp(0.0, 1.0).to(images.dtype)
        too_far = (perturbed.double() - clean).abs() > self.eps
        return torch.where(too_far, torch.nextafter(perturbed, images), perturbed)

    def _draw(self, name: str) -> torch.Generator:
        word = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(word, "little") >> 1)

    def _diverse(
        self, images: Tensor, targets: Sequence[Target], draws: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Shrink some images to a random size, pad them with black at a random position, and move their boxes."""
        height, width = images.shape[-2:]
        shown: list[Tensor] = []
        moved: list[dict[str, Tensor]] = []
        for image, target, draw in zip(images, targets, draws, strict=True):
            coin, size, down, across = (float(x) for x in torch.rand(4, generator=draw))
            shrink = self.resize + size * (1.0 - self.resize)
            h, w = max(1, int(shrink * height)), max(1, int(shrink * width))
            top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
            if coin < self.diversity and (h, w) != (height, width):
                small = F.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)[0]
                image = F.pad(small, (left, width - w - left, top, height - h - top))
                scale, shift = ((w / width, h / height) * 2, (left, top) * 2)
                boxes = target["boxes"]
                target = {**target, "boxes": boxes * numbers_on(scale, boxes) + numbers_on(shift, boxes)}
            shown.append(image)
            moved.append(dict(target))
        return torch.stack(shown), moved


def digest(image: Float[Tensor, "3 H W"], target: Target) -> str:
    """Return the sha256 of an image in bytes and of its boxes and labels, the key of its adversarial image."""
    pixels = (PIXEL * image).round().to(torch.uint8)
    parts: list[Tensor] = [pixels, target["boxes"].float(), target["labels"].long()]
    result = hashlib.sha256(str([list(x.shape) for x in parts]).encode())
    for part in parts:
        result.update(part.detach().cpu().contiguous().numpy().data)
    return result.hexdigest()
