"""Define the interface of detectors: images to neck feature maps, class logits, boxes, and losses per image."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.models.boxes import clipped, nms

Target = Mapping[str, Tensor]  # boxes (M, 4) as xyxy in pixels, labels (M,) from 0


class Detected(NamedTuple):
    """Output of a detector for a batch of B images with A anchors, points or queries each.

    Attributes:
        levels: feature maps of the neck (B, C, h, w), shallow to deep.
        logits: (B, A, K) class logits; with a softmax the last class is the background.
        boxes: (B, A, 4) as xyxy in pixels.
        bins: (B, A, 4, n) logits of the distribution of each side; None for boxes that are regressed.
        losses: name -> (B,) if there are targets, else {}. Each is normalized by the positives of its own image, so it
            does not depend on the other images. Names of classification losses start with "class".
        sigmoid: whether class probabilities are sigmoids; else a softmax over K.
        quality: (B, A) logits of a factor of the score, such as centerness; None for none.
        queries: whether every object has one prediction, so that non-maximum suppression is not needed and predictions
            of two models have to be matched.
        layers: class logits (B, L, A, K) and boxes (B, L, A, 4), as those above, of the decoder's last L layers, of
            models whose layers predict; None: the last layer only.
        found: for models that select and refine their boxes, such as two-stage ones: returns the detections of each
            image, as ``detections`` does. ``logits`` and ``boxes`` are then those of the proposals.
    """

    levels: list[Tensor]
    logits: Tensor
    boxes: Tensor
    bins: Tensor | None
    losses: dict[str, Tensor]
    sigmoid: bool
    quality: Tensor | None = None
    queries: bool = False
    layers: tuple[Tensor, Tensor] | None = None
    found: Callable[[], list[dict[str, Tensor]]] | None = None

    @property
    def foreground(self) -> Tensor:
        """Probabilities of the classes without the background, (B, A, K)."""
        return self.logits.sigmoid() if self.sigmoid else self.logits.softmax(-1)[..., :-1]


class Detector(nn.Module, ABC):
    """Base of detectors. A detector is called with a mapping:

        detector({"images": (B, 3, H, W) in [0, 1], "targets": [{"boxes": (M, 4), "labels": (M,)}, ...]}) -> Detected
        detector({"images": images, "only": "levels"}) -> the feature maps of the neck only

    The model normalizes images. Targets may be missing or None: then there are no losses. Losses are computed in eval
    mode too.

    Attributes:
        classes: number of classes, without the background.
        shared: names of the modules, neck and head, that ``inherit`` copies from a teacher.
        family: which method ``distill_detector`` chooses: "anchor-free", "anchor-based", "two-stage" or "queries".
        image_size: height and width of the images, of a detector that is built for one size; None: any.
        needs: names of what a target needs beside boxes and labels: "masks" (M, H, W) or "keypoints" (M, K, 3).
    """

    classes: int
    shared: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    family: str | None = None
    image_size: int | None = None

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        images, targets = inputs["images"], inputs.get("targets")
        if inputs.get("only") == "levels":
            return self.levels_of(images)
        if targets is not None:
            self._validate_targets(images, targets)
        return self.detect(images, targets)

    def _validate_targets(self, images: Tensor, targets: Sequence[Target]) -> None:
        """Reject targets of other images or classes, and broken boxes; values on an accelerator are not read."""
        if len(images) != len(targets):
            raise ValueError(
                f"a detector needs targets for every image; got {len(images)} images and {len(targets)} targets."
            )
        for target in targets:
            boxes, labels = (target.get(n) if isinstance(target, Mapping) else None for n in ("boxes", "labels"))  # pyright: ignore
            if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor) or boxes.shape != (*labels.shape, 4):
                got: Any = target
                if isinstance(target, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
                    got = {n: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for n, x in target.items()}  # pyright: ignore
                raise ValueError(
                    f"a target needs tensors, boxes (M, 4) as xyxy in pixels and labels (M,) from 0; got {got}. "
                    "Without objects: torch.zeros(0, 4) and torch.zeros(0, dtype=torch.long)."
                )
            for name in self.needs:
                part = target.get(name)
                size = tuple(images.shape[2:]) if name == "masks" else None  # of keypoints: their number, any
                if not isinstance(part, Tensor) or len(part) != len(labels) or (size and part.shape[1:] != size):
                    raise _lacks(name, len(labels), images, target)
        if not targets or targets[0]["labels"].device.type != "cpu":
            return
        _validate_boxes(torch.cat([target["boxes"] for target in targets]), images.shape[2:])
        labels = [target["labels"] for target in targets if len(target["labels"])]
        values = torch.cat(labels) if labels else torch.zeros(1)
        if not 0 <= int(values.min()) <= int(values.max()) < self.classes:
            raise ValueError(
                f"this detector has {self.classes} classes, counted from 0, and there are labels from "
                f"{int(values.min())} to {int(values.max())}. Build it with the classes of the data: "
                "models.build(name, classes=data.train.classes)."
            )

    @abstractmethod
    def levels_of(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps (B, C, h, w) of the neck for images (B, 3, H, W) in [0, 1], shallow to deep."""

    @abstractmethod
    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        """Return the full output for these images."""

    def class_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the classification loss of ``inputs["images"]``, (B,), differentiable in the images."""
        losses = self.detect(inputs["images"], inputs["targets"]).losses
        return torch.stack([loss for name, loss in losses.items() if name.startswith("class")]).sum(0)


def _lacks(name: str, count: int, images: Tensor, target: Target) -> ValueError:
    got = {n: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for n, x in target.items()}  # pyright: ignore
    size = tuple(images.shape[2:])
    shape = (count, *size) if name == "masks" else f"({count}, K, 3) as x, y, visible"
    return ValueError(
        f"this detector is trained on {name}: each target needs {name!r} {shape} beside its boxes and labels; got "
        f"{got}. data.coco(..., parts=[{name!r}]) loads them; without them, use Faster R-CNN."
    )


def _validate_boxes(boxes: Tensor, size: Sequence[int]) -> None:
    """Refuse boxes (N, 4) that are no xyxy; warn of those that cannot be of images of this height and width.

    Raises:
        ValueError: for a box that is not finite, or whose sides are exchanged.
    """
    valid = torch.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    if not valid.all():
        raise ValueError(
            f"boxes are finite (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2; got {boxes[~valid][0].tolist()}. Boxes as "
            "(x, y, width, height)? Write torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1)."
        )
    limit = boxes.new_tensor([size[1], size[0]])
    outside = ((boxes[:, :2] >= limit) | (boxes[:, 2:] <= 0)).any(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    is_relative = len(boxes) > 0 and float(boxes.max()) <= 1
    if is_relative or outside.any():
        warnings.warn(
            f"there are boxes {'smaller than a pixel' if is_relative else 'outside'} of their image of {size[1]} x "
            f"{size[0]}. Boxes are in pixels of the images as they are loaded: were these resized without them?",
            stacklevel=2,
        )


@torch.no_grad()
def detections(
    output: Detected, size: tuple[int, int], *, score: float = 0.05, overlap: float = 0.6, max_detections: int = 100
) -> list[dict[str, Tensor]]:
    """Decode the detections of each image, best first: {"boxes" (D, 4) xyxy, "scores" (D,), "labels" (D,)}.

    Args:
        output: of the model.
        size: height and width of the images, to which boxes are clipped.
        score: minimal score.
        overlap: IoU threshold of non-maximum suppression by class; not used for queries.
        max_detections: maximal number of boxes per image; three times as many candidates are considered.
    """
    if output.found is not None:
        return [_best(found, score, max_detections) for found in output.found()]
    scores, results = output.foreground.float(), []
    if output.quality is not None:
        scores = (scores * output.quality.float().sigmoid().unsqueeze(-1)).sqrt()
    classes = scores.shape[-1]
    for image_scores, boxes in zip(scores.flatten(1), output.boxes.float(), strict=True):
        best, index = image_scores.topk(min(3 * max_detections, len(image_scores)))
        index, best = index[best > score], best[best > score]
        candidates, labels = clipped(boxes[index // classes], size), index % classes
        kept = slice(None) if output.queries else nms(candidates, best, labels, overlap=overlap)
        candidates, best, labels = (x[kept][:max_detections] for x in (candidates, best, labels))
        results.append({"boxes": candidates, "scores": best, "labels": labels})
    return results


def _best(found: Mapping[str, Tensor], score: float, most: int) -> dict[str, Tensor]:
    """Return the detections of at least this score, best first."""
    order = found["scores"].argsort(descending=True, stable=True)
    kept = order[found["scores"][order] > score][:most]
    return {name: value[kept] for name, value in found.items()}


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Copy the teacher's weights of neck and head to the student where shapes are equal.

    Returns:
        Names of the student's weights of neck and head that were not copied.

    Raises:
        ValueError: for detectors of different classes, or if no shape is equal.

    Reference: Kang et al., "Instance-Conditional Knowledge Distillation", NeurIPS 2021, arXiv:2110.12724, whose
    inheriting strategy FGD, MGD and Inconsistent KD use.
    """
    if type(student) is not type(teacher) or not student.shared:
        raise ValueError(
            f"a {type(student).__name__} cannot inherit the neck and head of a {type(teacher).__name__}. Leave out "
            "inherit, or use two detectors of the same class."
        )
    student_state, teacher_state = student.state_dict(), teacher.state_dict()
    names = [n for n in student_state if any(n == part or n.startswith(f"{part}.") for part in student.shared)]
    equal = [n for n in names if n in teacher_state and teacher_state[n].shape == student_state[n].shape]
    if not equal:
        raise ValueError(
            f"no weight of the teacher's {' and '.join(student.shared)} has the student's shape. Use the same neck in "
            "both, or leave out inherit."
        )
    student.load_state_dict({n: teacher_state[n] for n in equal}, strict=False)
    return [n for n in names if n not in equal]
