"""What a detector is to the rest: images in, its neck's maps, class logits and boxes out, and its losses an image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.models.boxes import clipped, nms

Target = Mapping[str, Tensor]  # boxes (M, 4) as xyxy in pixels, labels (M,) from 0


class Detected(NamedTuple):
    """What a detector says of a batch of B images: A anchors, points or queries each.

    Attributes:
        levels: maps of the neck (B, C, h, w), shallow to deep.
        logits: (B, A, K) class logits; with a softmax the last class is the background.
        boxes: (B, A, 4) as xyxy in pixels.
        bins: (B, A, 4, n) logits of each side's distribution; None for boxes that are regressed.
        losses: name -> (B,), where targets were given; {} else. Each is normalized by its own image's positives, so it
            does not depend on the other images. Those of the classes have names that begin with "class".
        sigmoid: whether each class is a yes or no of its own; else a softmax over K.
        quality: (B, A) logits that the sigmoid of the score is multiplied with; None for none.
        queries: whether every object has one prediction, so that nothing is to be suppressed, and two models' ones are
            to be matched.
    """

    levels: list[Tensor]
    logits: Tensor
    boxes: Tensor
    bins: Tensor | None
    losses: dict[str, Tensor]
    sigmoid: bool
    quality: Tensor | None = None
    queries: bool = False

    @property
    def foreground(self) -> Tensor:
        """Probabilities of the K classes that are no background, (B, A, K)."""
        return self.logits.sigmoid() if self.sigmoid else self.logits.softmax(-1)[..., :-1]


class Detector(nn.Module, ABC):
    """A detector of ``classes`` classes. It is called with a mapping, and may be wrapped:

        detector({"images": (B, 3, H, W) in [0, 1], "targets": [{"boxes": (M, 4), "labels": (M,)}, ...]}) -> Detected
        detector({"images": images, "only": "levels"}) -> the neck's maps alone

    Normalization is the model's own. Targets may be missing or None: then there are no losses. They are made in eval
    mode too.

    Attributes:
        classes: how many, the background aside.
        shared: names of the modules that ``inherit`` copies from a teacher: neck and head.
    """

    classes: int
    shared: tuple[str, ...] = ()

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        images, targets = inputs["images"], inputs.get("targets")
        if inputs.get("only") == "levels":
            return self.levels_of(images)
        if targets is not None:
            self._look(images, targets)
        return self.detect(images, targets)

    def _look(self, images: Tensor, targets: Sequence[Target]) -> None:
        """Refuse targets of other images or classes; labels on a device are not waited for."""
        if len(images) != len(targets):
            raise ValueError(f"a detector needs targets of every image; got {len(images)} images and {len(targets)}.")
        labels = [target["labels"] for target in targets if len(target["labels"])]
        found = torch.cat(labels) if labels and labels[0].device.type == "cpu" else torch.zeros(1)
        if not 0 <= int(found.min()) <= int(found.max()) < self.classes:
            raise ValueError(
                f"this detector has {self.classes} classes, counted from 0, and there are labels from "
                f"{int(found.min())} to {int(found.max())}. Build it with the classes of the data: "
                "models.build(name, classes=data.train.classes)."
            )

    @abstractmethod
    def levels_of(self, images: Tensor) -> list[Tensor]:
        """The neck's maps (B, C, h, w) of images (B, 3, H, W) in [0, 1], shallow to deep."""

    @abstractmethod
    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        """Everything it says of these images."""

    def class_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """The classification losses of ``inputs["images"]`` with their targets, (B,), with a gradient to the images."""
        losses = self.detect(inputs["images"], inputs["targets"]).losses
        return torch.stack([loss for name, loss in losses.items() if name.startswith("class")]).sum(0)


@torch.no_grad()
def detections(
    output: Detected, size: tuple[int, int], *, score: float = 0.05, overlap: float = 0.6, most: int = 100
) -> list[dict[str, Tensor]]:
    """The boxes of each image, the best first: {"boxes" (D, 4) xyxy, "scores" (D,), "labels" (D,)}.

    Args:
        said: of the model.
        size: height and width of the images, to which boxes are cut.
        score: those below are left out.
        overlap: of two boxes of one class with a larger IoU the better one stays; not for queries.
        most: boxes an image, at most; three times as many are looked at.
    """
    scores, out = output.foreground.float(), []
    if output.quality is not None:
        scores = (scores * output.quality.float().sigmoid().unsqueeze(-1)).sqrt()
    classes = scores.shape[-1]
    for own, boxes in zip(scores.flatten(1), output.boxes.float(), strict=True):
        best, place = own.topk(min(3 * most, len(own)))
        place, best = place[best > score], best[best > score]
        found, labels = clipped(boxes[place // classes], size), place % classes
        kept = slice(None) if output.queries else nms(found, best, labels, overlap=overlap)
        found, best, labels = (x[kept][:most] for x in (found, best, labels))
        out.append({"boxes": found, "scores": best, "labels": labels})
    return out


def inherit(student: Detector, teacher: Detector) -> list[str]:
    """Give the student the teacher's weights of neck and head where they have equal shapes; names of what did not fit.

    Reference: Kang et al., "Instance-Conditional Knowledge Distillation", NeurIPS 2021, arXiv:2110.12724, whose
    inheriting strategy FGD, MGD and Inconsistent KD take over.

    Raises:
        ValueError: for detectors of two kinds, or where nothing fits.
    """
    if type(student) is not type(teacher) or not student.shared:
        raise ValueError(
            f"a {type(student).__name__} cannot inherit the neck and head of a {type(teacher).__name__}. Leave out "
            "inherit, or take two detectors of one kind."
        )
    own, theirs = student.state_dict(), teacher.state_dict()
    asked = [n for n in own if any(n == part or n.startswith(f"{part}.") for part in student.shared)]
    fits = [n for n in asked if n in theirs and theirs[n].shape == own[n].shape]
    if not fits:
        raise ValueError(
            f"nothing of the teacher's {' and '.join(student.shared)} fits the student, whose widths are others. Give "
            "both the same neck, or leave out inherit."
        )
    student.load_state_dict({n: theirs[n] for n in fits}, strict=False)
    return [n for n in asked if n not in fits]
