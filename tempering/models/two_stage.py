"""Wrap torchvision's two-stage detectors, Faster, Mask and Keypoint R-CNN, as ``Detector``."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempering.models.detector import Detected, Target
from tempering.models.external_base import ExternalDetector, image_list, proper

NAMES = {
    "loss_objectness": "class_proposals",
    "loss_rpn_box_reg": "box_proposals",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_keypoint": "keypoint",
}


class TwoStageDetector(ExternalDetector):
    """Wrap Faster, Mask or Keypoint R-CNN of torchvision, with labels counted from 0.

    Images are passed to the backbone without torchvision's resizing. Losses are torchvision's, with those of masks and
    keypoints, computed for one image at a time: the targets then need "masks" (M, H, W) or "keypoints" (M, K, 3). Two
    models sample and refine proposals of their own, so logits and boxes of the output are those that they share, of the
    anchors of the proposal network: one logit, whether there is an object. Detections are the model's own, and have
    "masks" (D, H, W) or "keypoints" (D, K, 3) too.

    torchvision samples anchors and proposals at random: in training mode by torch's generator, as dropout does, in eval
    mode by a fixed seed.

    Raises:
        TypeError: for another model.
    """

    family = "two-stage"
    shared = ("model.backbone.fpn", "model.rpn", "model.roi_heads")

    def __init__(self, model: nn.Module) -> None:
        heads: Any = getattr(model, "roi_heads", None)
        score = getattr(getattr(heads, "box_predictor", None), "cls_score", None)
        if not isinstance(score, nn.Linear):
            raise TypeError(
                "TwoStageDetector wraps torchvision's Faster, Mask and Keypoint R-CNN, with FastRCNNPredictor as "
                f"roi_heads.box_predictor; got {type(model).__name__}."
            )
        super().__init__(model, score.out_features - 1)
        self.needs = ("masks",) * heads.has_mask() + ("keypoints",) * heads.has_keypoint()

    def levels_of(self, images: Tensor) -> list[Tensor]:
        return list(self._maps(images).values())

    def _maps(self, images: Tensor) -> Mapping[str, Tensor]:
        maps: Any = self.model.backbone(self.normalized(images))  # pyright: ignore
        return maps if isinstance(maps, Mapping) else {"0": maps}

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        from torchvision.models.detection.rpn import concat_box_prediction_layers  # pyright: ignore

        maps, rpn = self._maps(images), cast(Any, self.model).rpn
        levels = list(maps.values())
        objectness, deltas = rpn.head(levels)
        anchors: list[Tensor] = rpn.anchor_generator(image_list(images), levels)
        counts = [x[0].numel() for x in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode(deltas.detach(), anchors).view(len(images), -1, 4)
        logits, deltas = objectness.view(len(images), -1, 1), deltas.view(len(images), -1, 4)
        size = (images.shape[2], images.shape[3])

        @torch.no_grad()
        def found() -> list[dict[str, Tensor]]:
            heads = cast(Any, self.model).roi_heads
            with _flags(self.model, training=False):
                proposals, _ = rpn.filter_proposals(boxes, logits, [size] * len(images), counts)
                results, _ = heads(maps, proposals, [size] * len(images))
            return [_detections(result, size) for result in results]

        losses: list[dict[str, Tensor]] = []
        if targets is not None:
            given = proper(targets, size, needs=self.needs)
            with _flags(self.model, training=True), _sampling(self.training, images.device) as restart:
                for i, target in enumerate(given):
                    restart()
                    part = slice(i, i + 1)
                    target = {**target, "labels": target["labels"] + 1}
                    proposals, _ = rpn.filter_proposals(boxes[part], logits[part], [size], counts)
                    labels, matched = rpn.assign_targets_to_anchors([anchors[i]], [target])
                    wanted = rpn.box_coder.encode(matched, [anchors[i]])
                    first = rpn.compute_loss(logits[part].flatten(0, 1).float(), deltas[i].float(), labels, wanted)
                    own = {name: x[part] for name, x in maps.items()}
                    _, second = cast(Any, self.model).roi_heads(own, proposals, [size], [target])
                    losses.append(dict(zip(("loss_objectness", "loss_rpn_box_reg"), first, strict=True)) | second)
        named = {NAMES[n]: torch.stack([loss[n] for loss in losses]) for n in (losses[0] if losses else ())}
        return Detected(levels, logits, boxes, None, named, True, found=found)


@contextmanager
def _flags(model: nn.Module, *, training: bool) -> Generator[None]:
    """Make both stages compute losses, or detections, whatever the mode of the model; norms keep their mode."""
    stages = cast("list[nn.Module]", [model.rpn, model.roi_heads])
    modes = [stage.training for stage in stages]
    for stage in stages:
        stage.training = training
    try:
        yield
    finally:
        for stage, mode in zip(stages, modes, strict=True):
            stage.training = mode


@contextmanager
def _sampling(random: bool, device: torch.device) -> Generator[Any]:
    """Yield a function to call before each image, which seeds torch's generator unless the draws are to be random."""
    if random:
        yield lambda: None
        return
    own: Any = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    state = own.get_state()
    try:
        yield lambda: own.manual_seed(0)
    finally:
        own.set_state(state)


def _detections(found: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """Return detections with labels from 0, and masks (D, H, W) in the image."""
    result = {name: found[name] for name in ("boxes", "scores", "labels", "keypoints") if name in found}
    result["labels"] = result["labels"] - 1
    if "masks" in found:
        from torchvision.models.detection.roi_heads import paste_masks_in_image  # pyright: ignore

        result["masks"] = paste_masks_in_image(found["masks"], found["boxes"], size)[:, 0] >= 0.5
    return result
