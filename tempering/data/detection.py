"""Load batches of images with boxes from memory; every draw is a pure function of (seed, epoch, sample)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tempering.data.batches import EpochLoader, check_held_out, epoch_order, random_bits
from tempering.utils.tensors import to_device

Target = dict[str, Any]
# (image (3, H, W) uint8, target, generator, progress in [0, 1)) -> augmented image of the same size, augmented target
Augment = Callable[[Tensor, Target, torch.Generator, float], tuple[Tensor, Target]]


class DetectionLoader(EpochLoader[dict[str, Any]]):
    """Load {"images" (B, 3, H, W) float32 in [0, 1], "targets" [{"boxes" (M, 4), "labels" (M,)}], "ids" (B,)}.

    Boxes are xyxy in pixels; an image may have none. Order and augmentation of an epoch depend on (seed, epoch, sample)
    alone: no global random number is drawn, and ``iterate(start)`` starts at any batch at no cost.

    Args:
        images: (N, 3, H, W) uint8.
        boxes: (M, 4) per image. They are clipped to the image; boxes that are then empty are dropped and counted in
            ``dropped``.
        labels: (M,) int64 per image, from 0.
        batch_size: images per step, over all ranks.
        class_names: one per class.
        scales: scale of each image relative to the original, (N,); None: the images are the originals.
        shuffle: draw a new order every epoch.
        flip: flip horizontally with probability 1/2.
        augment: called one after another on each image, before it is flipped. A target has "boxes", "labels" and
            "scale", the image's entry of ``scales``; progress is epoch / ``epochs``.
        epochs: number of epochs of the run, for augmentations that end before the run does.
        seed: of order and augmentation.
        name: of the data set, for records.
        dropped: reason -> number of boxes already dropped.
        scored: per image None, or what scores compare detections with in place of its boxes: {"boxes" (K, 4), "labels"
            (K,), "crowd" (K,) bool}, as boxes that leave their image, and crowds, in which detections are not counted.
            A target of a batch that is not augmented has it as "scored".
        parts: what targets have beside boxes and labels, per image: "masks" (M, H, W) bool, and "keypoints" (M, K, 3)
            float32, x and y in pixels and whether it is labeled (> 0).
        mirrored: number of the keypoint that each one is after a horizontal flip, (K,), such as right eye for left eye.

    Raises:
        ValueError: for an invalid argument, stating what is accepted.
    """

    def __init__(
        self,
        images: UInt8[Tensor, "N 3 H W"],
        boxes: Sequence[Float[Tensor, "M 4"]],
        labels: Sequence[Tensor],
        *,
        batch_size: int,
        class_names: Sequence[str],
        scales: Tensor | None = None,
        shuffle: bool = False,
        flip: bool = False,
        augment: Sequence[Augment] = (),
        epochs: int = 1,
        seed: int = 0,
        name: str = "data",
        dropped: Mapping[str, int] | None = None,
        scored: Sequence[Mapping[str, Tensor] | None] | None = None,
        parts: Mapping[str, Sequence[Tensor]] | None = None,
        mirrored: Sequence[int] | None = None,
    ) -> None:
        self.images, self.batch_size, self.class_names = images, batch_size, tuple(class_names)
        self.shuffle, self.flip, self.augment, self.epochs = shuffle, flip, tuple(augment), epochs
        self.seed, self.name, self.dropped = seed, name, dict(dropped or {})
        self.scales = torch.ones(len(images)) if scales is None else scales
        self.epoch, self.rank, self.world = 0, 0, 1
        self._hash_cache: dict[str, str] = {}
        self.boxes, self.labels = list(boxes), list(labels)
        self.scored = [None] * len(images) if scored is None else list(scored)
        self.parts = {name: list(part) for name, part in (parts or {}).items()}
        self.mirrored = None if mirrored is None else list(mirrored)
        self._validate()
        for i, (image_boxes, image_labels) in enumerate(zip(self.boxes, self.labels, strict=True)):
            clipped, kept, removed = _inside(image_boxes.float(), self.shape)
            self.boxes[i], self.labels[i] = clipped[kept], image_labels[kept]
            for part in self.parts.values():
                part[i] = part[i][kept]
            for reason, count in removed.items():
                self.dropped[reason] = self.dropped.get(reason, 0) + count

    def _validate(self) -> None:
        images = self.images
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
            raise ValueError(
                f"DetectionLoader needs images (N, 3, H, W) in uint8, N > 0; got {tuple(images.shape)} {images.dtype}. "
                "Grayscale images: images.expand(-1, 3, -1, -1)."
            )
        counts = {"boxes": len(self.boxes), "labels": len(self.labels), "scales": len(self.scales)}
        counts["scored"] = len(self.scored)
        if set(counts.values()) != {len(images)}:
            raise ValueError(
                f"DetectionLoader needs boxes, labels and a scale for each of {len(images)} images; got {counts}."
            )
        for i, (boxes, labels) in enumerate(zip(self.boxes, self.labels, strict=True)):
            if boxes.ndim != 2 or boxes.shape[1:] != (4,) or labels.shape != boxes.shape[:1]:
                raise ValueError(
                    f"image {i} needs boxes (M, 4) as xyxy and labels (M,); got {tuple(boxes.shape)} and "
                    f"{tuple(labels.shape)}. An image without boxes has torch.zeros(0, 4)."
                )
            if not bool(torch.isfinite(boxes).all()):
                raise ValueError(f"image {i} has a box that is not finite: {boxes.tolist()}.")
            if labels.dtype != torch.int64:
                raise ValueError(f"image {i} needs labels in int64; got {labels.dtype}. Write labels.long().")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
                raise ValueError(
                    f"image {i} has the label {int(labels.max())} or {int(labels.min())}, and there are "
                    f"{len(self.class_names)} classes, counted from 0: {', '.join(self.class_names[:5])}."
                )
        self._validate_parts()
        for name in ("batch_size", "epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"DetectionLoader needs {name} >= 1; got {getattr(self, name)!r}.")

    def _validate_parts(self) -> None:
        sizes = {"masks": self.shape, "keypoints": (-1, 3)}
        for name, part in self.parts.items():
            if name not in sizes or len(part) != len(self.images):
                raise ValueError(
                    f"DetectionLoader needs parts 'masks' and 'keypoints', of {len(self.images)} images each; got "
                    f"{name!r} of {len(part)}."
                )
            for i, (one, labels) in enumerate(zip(part, self.labels, strict=True)):
                wanted = (len(labels), *sizes[name])
                if one.ndim != 3 or any(w not in (-1, n) for w, n in zip(wanted, one.shape, strict=True)):
                    shape = str(wanted).replace("-1", "K")
                    raise ValueError(f"image {i} needs {name} {shape}, one for each box; got {tuple(one.shape)}.")
        if self.parts and self.augment:
            raise ValueError(f"augment= changes images and boxes, not {' and '.join(self.parts)}. Use flip alone.")
        if "keypoints" in self.parts and self.flip and self.mirrored is None:
            raise ValueError(
                "a flip exchanges left and right keypoints: give mirrored=, the number of each one's mirror image, "
                "such as [0, 2, 1] for nose, left eye and right eye; or flip=False."
            )

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        facts = f"{self.name}: {self.size} images {shape}, {self.classes} classes, batch_size={self.batch_size}"
        return f"DetectionLoader({facts})"

    @property
    def size(self) -> int:
        """Number of images in the data set."""
        return len(self.images)

    @property
    def rows(self) -> int:
        """Number of different ids: that of the images."""
        return self.size

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[2], self.images.shape[3]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def augmented(self) -> bool:
        """Whether the images are augmented."""
        return self.flip or bool(self.augment)

    @property
    def augmentation(self) -> dict[str, Any]:
        """Description of the augmentation, JSON-able; ``seed`` is None where nothing is random."""
        names = [getattr(a, "__name__", None) or repr(a) for a in self.augment]
        return {"flip": self.flip, "augment": names, "seed": self.seed if self.augmented else None, "views": None}

    @property
    def identity(self) -> str:
        """SHA-256 of images, boxes, labels and class names, in hexadecimal."""
        if "identity" not in self._hash_cache:
            digest = hashlib.sha256(json.dumps([list(self.images.shape), self.class_names]).encode())
            scored = [x for one in self.scored if one is not None for x in one.values()]
            parts = [x for part in self.parts.values() for x in part]
            for part in (self.images, *self.boxes, *self.labels, *scored, *parts):
                digest.update(json.dumps(list(part.shape)).encode())
                digest.update(part.cpu().contiguous().numpy().data)
            self._hash_cache["identity"] = digest.hexdigest()
        return self._hash_cache["identity"]

    # iteration

    def __len__(self) -> int:
        return self._num_batches(self.size)

    def _iterate_epoch(self, start: int, epoch: int) -> Iterator[dict[str, Any]]:
        order = self._order(self.size, epoch)
        bits = random_bits(self.size, self.seed, "augment", epoch) if self.augmented else None
        for step in range(start, len(self)):
            index = order[self._shard_slice(step, self.size)]
            yield self._batch(index, None if bits is None else bits[index], epoch)

    def _batch(self, index: Tensor, bits: Tensor | None, epoch: int) -> dict[str, Any]:
        device = self.images.device
        ids = to_device(index, device)
        pixels = self.images.index_select(0, ids)
        of_boxes = {"boxes": self.boxes, "labels": self.labels} | self.parts
        targets: list[Target] = [{name: part[i] for name, part in of_boxes.items()} for i in index.tolist()]
        if bits is None:
            for i, target in zip(index.tolist(), targets, strict=True):
                target |= {} if self.scored[i] is None else {"scored": self.scored[i]}
        else:
            flips = bits < 0 if self.flip else torch.zeros_like(bits, dtype=torch.bool)
            for i, seed in enumerate(bits.tolist()) if self.augment else ():
                pixels[i], targets[i] = self._augment_image(pixels[i], targets[i], int(index[i]), seed, epoch)
            pixels = torch.where(to_device(flips, device)[:, None, None, None], pixels.flip(3), pixels)
            targets = [self._flipped(t) if f else t for t, f in zip(targets, flips.tolist(), strict=True)]
        return {"images": pixels.float().div_(255), "targets": targets, "ids": ids}

    def _augment_image(self, image: Tensor, target: Target, i: int, seed: int, epoch: int) -> tuple[Tensor, Target]:
        generator = torch.Generator().manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        shape, target = image.shape, {**target, "scale": float(self.scales[i])}
        for augment in self.augment:
            image, target = augment(image, target, generator, min(epoch / self.epochs, 1.0))
            if image.shape != shape or image.dtype != torch.uint8:
                raise ValueError(
                    f"{augment!r} must keep an image {tuple(shape)} uint8; got {tuple(image.shape)} {image.dtype}."
                )
        boxes, labels, _ = inside(target["boxes"], target["labels"], self.shape)
        return image, {"boxes": boxes, "labels": labels}

    def _flipped(self, target: Target) -> Target:
        boxes, width = target["boxes"], self.shape[1]
        flipped = torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)
        result = {**target, "boxes": flipped}
        if "masks" in target:
            result["masks"] = target["masks"].flip(-1)
        if "keypoints" in target:
            points = target["keypoints"][:, self.mirrored]
            x = torch.where(points[..., 2] > 0, width - points[..., 0], points[..., 0])
            result["keypoints"] = torch.cat((x.unsqueeze(-1), points[..., 1:]), -1)
        return result

    def gather(self, ids: Tensor) -> Any:
        """Raise, since detector outputs cannot be cached.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the outputs of a detector are feature maps, boxes and logits of every anchor, which are not cached. Run "
            "the teacher in every step: teachers.Live(model)."
        )

    def replay(self, views: int) -> Any:
        """Raise, as ``gather`` does.

        Raises:
            ValueError: always.
        """
        return self.gather(torch.zeros(0))

    # copies that share the images

    def clean(self) -> DetectionLoader:
        """Return a loader of the same data in its stored order, without augmentation."""
        return self._replace(shuffle=False, flip=False, augment=())

    def to(self, device: torch.device | str) -> DetectionLoader:
        """Return a loader of the same data on ``device``; augmentations of single images run there too."""
        boxes, labels = ([x.to(device) for x in parts] for parts in (self.boxes, self.labels))
        scored, beside = to_device(self.scored, device), to_device(self.parts, device)
        images = self.images.to(device)
        return self._replace(images=images, boxes=boxes, labels=labels, scored=scored, parts=beside)

    def subset(self, n: int) -> DetectionLoader:
        """Return a loader of the first ``n`` images of a fixed random order, in their stored order."""
        if not 0 < n <= self.size:
            raise ValueError(f"cannot take {n} of {self.size} images.")
        return self if n == self.size else self._select(epoch_order(self.size, 0, 0)[:n])

    def split(self, n_validation: int, seed: int = 0) -> tuple[DetectionLoader, DetectionLoader]:
        """Return (the remaining images, a clean held-out split of ``n_validation`` images), drawn with ``seed``."""
        check_held_out(n_validation, self.size, "images")
        order = epoch_order(self.size, seed, 0)
        return self._select(order[n_validation:]), self._select(order[:n_validation]).clean()

    def _select(self, index: Tensor) -> DetectionLoader:
        kept = np.sort(index.numpy()).tolist()
        boxes, labels, scored = ([parts[i] for i in kept] for parts in (self.boxes, self.labels, self.scored))
        beside = {name: [part[i] for i in kept] for name, part in self.parts.items()}
        parts = {"boxes": boxes, "labels": labels, "scored": scored, "parts": beside, "scales": self.scales[kept]}
        return self._replace(images=self.images[kept], **parts, dropped={}, _hash_cache={})


def inside(boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Clip boxes to an image of (height, width) and drop the empty ones.

    Returns:
        The boxes, their labels, and reason -> number of dropped boxes.
    """
    clipped, kept, dropped = _inside(boxes, size)
    return clipped[kept], labels[kept], dropped


def _inside(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return the clipped boxes, which of them are kept, and reason -> number of the others."""
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    clipped = torch.minimum(boxes.clamp_min(0), limit)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(1)
    dropped = {"zero size": int(empty.sum()), "outside the image": int((~kept & ~empty).sum())}
    return clipped, kept, {reason: count for reason, count in dropped.items() if count}
