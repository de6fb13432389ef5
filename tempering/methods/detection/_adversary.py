"""Images that a detector takes for something else: momentum, input-diverse FGSM on its classification loss."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

PIXEL = 255.0
NEAR = 1e-3  # of a pixel's 1/255: by how much sums of float32 steps may miss a whole one
Target = Mapping[str, Tensor]


@dataclass(frozen=True)
class FeatureAttack:
    """The settings of one attack; see ``InconsistentDetection``. Its draws depend on ``seed`` and the image alone."""

    eps: float
    step_size: float
    steps: int
    decay: float
    resize: float
    diversity: float
    seed: int

    def __call__(
        self, detector: nn.Module, images: Float[Tensor, "B 3 H W"], targets: Sequence[Target], names: Sequence[str]
    ) -> Int8[Tensor, "B 3 H W"]:
        """How many 1/255 to add to every pixel, rounded towards the image: at most eps, and within [0, 1].

        Args:
            detector: has ``class_loss({"images", "targets"})``, (B,).
            images: in [0, 1].
            targets: boxes (M, 4) as xyxy in pixels, and labels (M,), of each.
            names: of the images, for their draws; see ``digest``.
        """
        draws = [self._draw(name) for name in names]
        kind = next((p.dtype for p in detector.parameters() if p.is_floating_point()), images.dtype)
        delta, momentum = torch.zeros_like(images), torch.zeros_like(images)
        for _ in range(self.steps):
            seen = (images + delta).requires_grad_()
            with torch.enable_grad():
                shown, moved = self._diverse(seen, targets, draws)
                loss = detector.class_loss({"images": shown.to(kind), "targets": moved}).sum()  # pyright: ignore
                slope = torch.autograd.grad(loss, seen)[0].detach() if loss.requires_grad else torch.zeros_like(seen)
            size = slope.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
            momentum = self.decay * momentum + slope / torch.where(size > 0, size, 1.0)
            delta = (delta + self.step_size * momentum.sign()).clamp(-self.eps, self.eps)
            delta = (images + delta).clamp(0.0, 1.0) - images
        return (delta.sign() * (PIXEL * delta.abs() + NEAR).floor()).to(torch.int8)

    def perturbed(self, images: Float[Tensor, "B 3 H W"], by: Int8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """The images with so many 1/255 added, never more than eps away and in [0, 1], rounding included."""
        clean = images.double()
        there = (clean + by.double() / PIXEL).clamp(0.0, 1.0).to(images.dtype)
        beyond = (there.double() - clean).abs() > self.eps
        return torch.where(beyond, torch.nextafter(there, images), there)

    def _draw(self, name: str) -> torch.Generator:
        word = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(word, "little") >> 1)

    def _diverse(
        self, images: Tensor, targets: Sequence[Target], draws: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Some images shrunk to a random size and place on black, and their boxes with them."""
        height, width = images.shape[-2:]
        shown, moved = [], []
        for image, target, draw in zip(images, targets, draws, strict=True):
            coin, size, down, across = torch.rand(4, generator=draw).tolist()
            shrink = self.resize + size * (1.0 - self.resize)
            h, w = max(1, int(shrink * height)), max(1, int(shrink * width))
            top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
            if coin < self.diversity and (h, w) != (height, width):
                small = F.interpolate(image[None], (h, w), mode="bilinear", align_corners=False)[0]
                image = F.pad(small, (left, width - w - left, top, height - h - top))
                scale, shift = ((w / width, h / height) * 2, (left, top) * 2)
                boxes = target["boxes"]
                target = {**target, "boxes": boxes * boxes.new_tensor(scale) + boxes.new_tensor(shift)}
            shown.append(image)
            moved.append(dict(target))
        return torch.stack(shown), moved


def digest(image: Float[Tensor, "3 H W"], target: Target) -> str:
    """sha256 of an image in bytes and of its boxes and labels, in hexadecimal: what its adversary is known by."""
    pixels = (PIXEL * image).round().to(torch.uint8)
    parts: list[Any] = [pixels, target["boxes"].float(), target["labels"].long()]
    found = hashlib.sha256(str([list(x.shape) for x in parts]).encode())
    for part in parts:
        found.update(part.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()
