"""Wrap detectors of torchvision and transformers as ``Detector``; the libraries are imported on first use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempering.models.boxes import centered, clipped, cornered
from tempering.models.detector import Detected, Detector, Target
from tempering.models.factory import build
from tempering.utils.tensors import numbers_on

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
TRANSFORMERS = ("d_fine", "rt_detr", "rt_detr_v2", "detr")
OPERATORS = ("nms", "qnms")  # operators that must be defined when torchvision is imported
_LIBRARY: list[Any] = []  # keeps the definitions of the operators alive


def detector(name: str, *, classes: int, pretrained: bool = False) -> Detector:
    """Build a detector by name: of the zoo, "torchvision:NAME", or "transformers:NAME" by architecture or hub name.

    Args:
        name: such as "fcos_tiny", "torchvision:fcos_resnet50_fpn", "transformers:ustc-community/dfine-nano-coco".
        classes: number of classes, without the background.
        pretrained: load the library's weights, except for layers whose shape depends on ``classes``.

    Raises:
        ValueError: for an unknown name or an unsupported detector.
        ImportError: for a library that is not installed.
    """
    library, colon, inner = name.partition(":")
    if colon and library in ("torchvision", "transformers"):
        make = _from_torchvision if library == "torchvision" else _from_transformers
        external: Any = make(inner, classes, pretrained)
        external.built = {"kind": "detector", "name": name, "classes": classes}
        return external
    net = build(name, classes=classes, pretrained=pretrained)
    if not isinstance(net, Detector):
        raise ValueError(
            f"{name} is not a detector. The zoo has fcos_nano, fcos_tiny, fcos_wide and fcos_large, each also with "
            "_bins; others are torchvision:NAME and transformers:NAME."
        )
    return net


class _Normalized(Detector):
    """Base of detectors that wrap a model of another library and normalize its inputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, classes: int, *, plain: bool = False) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        for name, value in (("mean", (0.0,) * 3 if plain else MEAN), ("std", (1.0,) * 3 if plain else STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def normalized(self, images: Tensor) -> Tensor:
        """Normalize pixels for the model."""
        return (images - self.mean) / self.std


def proper(targets: Sequence[Target], size: Sequence[int]) -> list[dict[str, Tensor]]:
    """Clip boxes to images of (height, width) and drop empty ones, which the libraries would count as positives."""
    result = []
    for target in targets:
        boxes = clipped(target["boxes"], (size[0], size[1]))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        result.append({"boxes": boxes[kept], "labels": target["labels"][kept]})
    return result


# torchvision


class TorchvisionDetector(_Normalized):
    """Wrap FCOS or RetinaNet of torchvision, with labels counted from 0.

    Images are passed to backbone and head without torchvision's resizing. Losses are torchvision's, computed for one
    image at a time. Two-stage detectors such as Faster R-CNN are not supported: they sample and refine proposals, so
    two models have no common anchors.

    Raises:
        TypeError: for another model.
    """

    shared = ("model.backbone.fpn", "model.head")

    def __init__(self, model: nn.Module) -> None:
        kind = type(model).__name__
        if kind not in ("FCOS", "RetinaNet"):
            raise TypeError(
                f"TorchvisionDetector wraps FCOS and RetinaNet; got {kind}. Two-stage detectors and SSD are not "
                f"supported: use one of {', '.join(TORCHVISION)}."
            )
        super().__init__(model, model.head.classification_head.num_classes)  # pyright: ignore

    def levels_of(self, images: Tensor) -> list[Tensor]:
        maps: Any = self.model.backbone(self.normalized(images))  # pyright: ignore
        return list(maps.values()) if isinstance(maps, Mapping) else [maps]

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        from torchvision.models.detection.image_list import ImageList  # pyright: ignore[reportMissingImports]

        levels, model = self.levels_of(images), cast(Any, self.model)
        outputs: dict[str, Tensor] = model.head(levels)
        size = (images.shape[2], images.shape[3])
        anchors: list[Tensor] = model.anchor_generator(ImageList(images, [size] * len(images)), levels)
        coder = model.box_coder
        decode = coder.decode if "bbox_ctrness" in outputs else coder.decode_single
        boxes = torch.stack(
            [decode(deltas, boxes) for deltas, boxes in zip(outputs["bbox_regression"], anchors, strict=True)]
        )
        quality = outputs["bbox_ctrness"].squeeze(-1) if "bbox_ctrness" in outputs else None
        losses = {} if targets is None else self._losses(outputs, proper(targets, size), anchors, levels)
        return Detected(levels, outputs["cls_logits"], boxes, None, losses, True, quality)

    def _losses(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Target], anchors: list[Tensor], levels: list[Tensor]
    ) -> dict[str, Tensor]:
        points = [[x.shape[2] * x.shape[3] for x in levels]] if "bbox_ctrness" in outputs else []
        losses = []
        for i, target in enumerate(targets):
            output = {name: value[i : i + 1].float() for name, value in outputs.items()}
            # targets are a copy: torchvision writes into the labels of images without boxes
            losses.append(self.model.compute_loss([target], output, [anchors[i]], *points))  # pyright: ignore
        names = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "quality"}
        return {names[name]: torch.stack([loss[name] for loss in losses]) for name in losses[0]}


def torchvision() -> Any:
    """Import torchvision, even if its compiled operators were built for another torch (then without its NMS).

    Raises:
        ImportError: if it is not installed, or fails for another reason.
    """
    try:
        import torchvision as library  # pyright: ignore[reportMissingImports]

        return library
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ImportError(f"torchvision cannot be imported ({error}): pip install 'tempering[models]'") from error
    except ImportError as error:
        raise ImportError(f"torchvision cannot be imported ({error}): pip install 'tempering[models]'") from error
    _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
    for name in OPERATORS:
        _LIBRARY[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torchvision as library  # pyright: ignore[reportMissingImports]

    return library


def _from_torchvision(name: str, classes: int, pretrained: bool) -> Detector:
    if name not in TORCHVISION:
        raise ValueError(
            f"torchvision:{name} is not supported. Supported are {', '.join(TORCHVISION)}; two-stage detectors have no "
            "anchors that two models share."
        )
    torchvision()
    from torchvision import models  # pyright: ignore[reportMissingImports]

    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if pretrained:
        weights, state = models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True), model.state_dict()
        equal = {n: value for n, value in weights.items() if n in state and state[n].shape == value.shape}
        model.load_state_dict(equal, strict=False)
    return TorchvisionDetector(model)


# transformers


class TransformersDetector(_Normalized):
    """Wrap D-FINE, RT-DETR, RT-DETRv2 or DETR of transformers.

    Losses are the library's, with auxiliary losses, computed for one image at a time: "class" is the classification
    loss, "box" all other losses. Denoising queries, which depend on the other images of a batch, are disabled. D-FINE
    has bins, the distributions of the last layer. The only level of DETR is the output of its encoder.

    Raises:
        TypeError: for another model.
    """

    shared = (
        "model.model.encoder_input_proj",
        "model.model.encoder",
        "model.model.decoder_input_proj",
        "model.model.enc_output",
        "model.model.enc_score_head",
        "model.model.enc_bbox_head",
        "model.model.decoder",
        "model.model.query_position_embeddings",
        "model.class_labels_classifier",
        "model.bbox_predictor",
    )

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        kind = _check_kind(config, model)
        if not hasattr(model, "loss_function"):
            raise TypeError(f"TransformersDetector needs a model with loss_function; got {type(model).__name__}.")
        super().__init__(model, config.num_labels, plain=kind != "detr")
        self.kind = kind
        if hasattr(config, "num_denoising"):
            config.num_denoising = 0
            for unused in (p for n, p in model.named_parameters() if "denoising_class_embed" in n):
                unused.requires_grad_(False)  # unused parameters have no gradient, which DDP does not accept
        self._image_losses = _PerImageLoss(model.loss_function, 1 if kind == "detr" else 0)  # pyright: ignore[reportArgumentType]
        model.loss_function = self._image_losses  # pyright: ignore[reportArgumentType]

    def levels_of(self, images: Tensor) -> list[Tensor]:
        return self.detect(images, None).levels

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        height, width = images.shape[2:]
        scale = numbers_on([width, height, width, height], images)
        labels = None
        if targets is not None:
            valid = proper(targets, (height, width))
            labels = [{"class_labels": t["labels"], "boxes": centered(t["boxes"].to(scale) / scale)} for t in valid]
        output = self.model(self.normalized(images), labels=labels)
        maps = output.encoder_last_hidden_state
        levels = [_to_map(maps, height, width)] if isinstance(maps, Tensor) else list(maps)
        bins = None
        if self.kind == "d_fine":
            bins = output.intermediate_predicted_corners[:, -1].unflatten(-1, (4, -1))
        losses = {} if targets is None else self._image_losses.pop()
        boxes = cornered(output.pred_boxes) * scale
        return Detected(levels, output.logits, boxes, bins, losses, self.kind != "detr", queries=True)


def _check_kind(config: Any, model: nn.Module | None = None) -> str:
    """Return the architecture of a config.

    Raises:
        TypeError: for one that is not supported.
    """
    kind = getattr(config, "model_type", type(config if model is None else model).__name__)
    if kind not in TRANSFORMERS:
        raise TypeError(f"TransformersDetector wraps {', '.join(TRANSFORMERS)}; got {kind}.")
    return kind


class _PerImageLoss:
    """Replace a model's loss function: compute it for one image at a time and store the losses by image."""

    def __init__(self, function: Callable[..., Any], layers: int) -> None:
        self.function, self.layers = function, layers  # batch dimension of outputs of all layers
        self.losses: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, logits: Tensor, labels: Any, device: Any, boxes: Tensor, config: Any, *more: Any, **named: Any
    ) -> Any:
        self.losses = []
        for i in range(len(labels)):
            args = (logits[i : i + 1], labels[i : i + 1], device, boxes[i : i + 1], config)
            more_args = [x.narrow(self.layers, i, 1) if isinstance(x, Tensor) else x for x in more]
            kwargs = {n: x[i : i + 1] if isinstance(x, Tensor) else x for n, x in named.items()}
            loss, parts, _ = self.function(*args, *more_args, **kwargs)
            class_parts = [v for n, v in parts.items() if any(kind in n for kind in ("_ce", "_vfl", "_focal", "_bce"))]
            self.losses.append((torch.stack(class_parts).sum(), torch.as_tensor(loss)))
        total = torch.stack([loss for _, loss in self.losses])
        return total.mean(), {}, None

    def pop(self) -> dict[str, Tensor]:
        """Return name -> (B,) of the last call, and forget it."""
        classes, total = (torch.stack(side) for side in zip(*self.losses, strict=True))
        self.losses = []
        return {"class": classes, "box": total - classes}


def _to_map(sequence: Tensor, height: int, width: int) -> Tensor:
    """Reshape (B, h * w, C) to (B, C, h, w), with the aspect ratio of the image."""
    count = sequence.shape[1]
    rows = round((count * height / width) ** 0.5)
    if count % rows:
        raise ValueError(
            f"{count} positions are not a feature map of an image of {height} x {width}. Use multiples of 32."
        )
    return sequence.transpose(1, 2).unflatten(2, (rows, count // rows))


def _from_transformers(name: str, classes: int, pretrained: bool) -> Detector:
    with contextlib.suppress(ImportError):
        torchvision()  # a build for another torch would make the import of transformers' detectors fail
    try:
        from transformers import AutoConfig, AutoModelForObjectDetection
    except ImportError as error:
        raise ImportError(f"transformers:{name} needs transformers: pip install 'tempering[models]'") from error
    try:
        config = AutoConfig.for_model(name, num_labels=classes)  # an architecture: nothing is downloaded
    except ValueError:
        config = AutoConfig.from_pretrained(name, num_labels=classes, trust_remote_code=False)
    _check_kind(config)  # before anything is built
    if pretrained:
        model = AutoModelForObjectDetection.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    else:
        model = AutoModelForObjectDetection.from_config(config, trust_remote_code=False)
    return TransformersDetector(model)
