"""Detectors of torchvision and transformers as ``Detector``s; neither library is imported before it is asked for."""

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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCHVISION = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
TRANSFORMERS = ("d_fine", "rt_detr", "rt_detr_v2", "detr")
OPERATORS = ("nms", "qnms")  # what torchvision wants to be there when it is imported
_LIBRARY: list[Any] = []  # alive as long as the operators are


def detector(name: str, *, classes: int, pretrained: bool = False) -> Detector:
    """A detector by its name: of the zoo, "torchvision:NAME", or "transformers:NAME" by architecture or hub name.

    Args:
        name: such as "fcos_tiny", "torchvision:fcos_resnet50_fpn", "transformers:ustc-community/dfine-nano-coco".
        classes: how many, the background aside.
        pretrained: weights that the library has or fetches, but for what does not fit ``classes``.

    Raises:
        ValueError: for a name that there is not, or a detector that is not supported.
        ImportError: for a library that is not installed.
    """
    library, colon, inner = name.partition(":")
    if colon and library == "torchvision":
        return _from_torchvision(inner, classes, pretrained)
    if colon and library == "transformers":
        return _from_transformers(inner, classes, pretrained)
    net = build(name, classes=classes, pretrained=pretrained)
    if not isinstance(net, Detector):
        raise ValueError(
            f"{name} is no detector. The zoo has fcos_nano, fcos_tiny, fcos_wide and fcos_large, each also with _bins; "
            "others are torchvision:NAME and transformers:NAME."
        )
    return net


class _Normalized(Detector):
    """A detector that wraps a model of another library."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, classes: int, *, plain: bool = False) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        for name, value in (("mean", (0.0,) * 3 if plain else MEAN), ("std", (1.0,) * 3 if plain else STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def normalized(self, images: Tensor) -> Tensor:
        """The pixels as the model was trained on them; gray images in all three channels."""
        return (images - self.mean) / self.std


def proper(targets: Sequence[Target], size: Sequence[int]) -> list[dict[str, Tensor]]:
    """Boxes cut to images of (height, width), less those of no size or outside, which the libraries would count."""
    out = []
    for target in targets:
        boxes = clipped(target["boxes"], (size[0], size[1]))
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        out.append({"boxes": boxes[kept], "labels": target["labels"][kept]})
    return out


# torchvision


class TorchvisionDetector(_Normalized):
    """torchvision's FCOS or RetinaNet, its labels counted from 0.

    Images go to backbone and head as they come, without torchvision's own resizing. Losses are torchvision's, of one
    image at a time. Two-stage detectors choose their anchors at random and refine them, so they have no anchors to
    compare: Faster R-CNN and its kin are refused.

    Raises:
        TypeError: for another model.
    """

    shared = ("model.backbone.fpn", "model.head")

    def __init__(self, model: nn.Module) -> None:
        kind = type(model).__name__
        if kind not in ("FCOS", "RetinaNet"):
            raise TypeError(
                f"TorchvisionDetector wraps FCOS and RetinaNet; got {kind}. Two-stage detectors and SSD are not "
                f"supported: take one of {', '.join(TORCHVISION)}."
            )
        super().__init__(model, model.head.classification_head.num_classes)  # pyright: ignore

    def levels_of(self, images: Tensor) -> list[Tensor]:
        maps: Any = self.model.backbone(self.normalized(images))  # pyright: ignore
        return list(maps.values()) if isinstance(maps, Mapping) else [maps]

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        from torchvision.models.detection.image_list import ImageList  # pyright: ignore[reportMissingImports]

        levels, model = self.levels_of(images), cast(Any, self.model)
        said: dict[str, Tensor] = model.head(levels)
        size = (images.shape[2], images.shape[3])
        anchors: list[Tensor] = model.anchor_generator(ImageList(images, [size] * len(images)), levels)
        coder = model.box_coder
        decode = coder.decode if "bbox_ctrness" in said else coder.decode_single
        boxes = torch.stack([decode(own, at) for own, at in zip(said["bbox_regression"], anchors, strict=True)])
        quality = said["bbox_ctrness"].squeeze(-1) if "bbox_ctrness" in said else None
        losses = {} if targets is None else self._losses(said, proper(targets, size), anchors, levels)
        return Detected(levels, said["cls_logits"], boxes, None, losses, True, quality)

    def _losses(
        self, said: Mapping[str, Tensor], targets: Sequence[Target], anchors: list[Tensor], levels: list[Tensor]
    ) -> dict[str, Tensor]:
        points = [[x.shape[2] * x.shape[3] for x in levels]] if "bbox_ctrness" in said else []
        each = []
        for i, target in enumerate(targets):
            own = {name: value[i : i + 1].float() for name, value in said.items()}
            # targets are a copy: torchvision writes into labels of images without boxes
            each.append(self.model.compute_loss([target], own, [anchors[i]], *points))  # pyright: ignore
        named = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "quality"}
        return {named[name]: torch.stack([loss[name] for loss in each]) for name in each[0]}


def torchvision() -> Any:
    """The library, also where its compiled operators are of another build than torch: then without its own NMS.

    Raises:
        ImportError: where it is not installed, or fails for another reason.
    """
    try:
        import torchvision as library  # pyright: ignore[reportMissingImports]

        return library
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ImportError(f"torchvision does not import here ({error}): pip install 'tempering[models]'") from error
    except ImportError as error:
        raise ImportError(f"torchvision does not import here ({error}): pip install 'tempering[models]'") from error
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
            f"torchvision:{name} is not supported. These are: {', '.join(TORCHVISION)}; two-stage detectors have no "
            "anchors that two models share."
        )
    torchvision()
    from torchvision import models  # pyright: ignore[reportMissingImports]

    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    if pretrained:
        theirs, own = models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True), model.state_dict()
        fits = {n: value for n, value in theirs.items() if n in own and own[n].shape == value.shape}
        model.load_state_dict(fits, strict=False)
    return TorchvisionDetector(model)


# transformers


class TransformersDetector(_Normalized):
    """A D-FINE, RT-DETR, RT-DETRv2 or DETR of transformers.

    Losses are the library's, auxiliary ones included, of one image at a time: "class" is the parts of the class logits,
    "box" the rest. Denoising queries, which depend on the other images of a batch, are turned off. A D-FINE has bins:
    the last layer's distributions. DETR's level is its encoder's output.

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
        kind = getattr(config, "model_type", type(model).__name__)
        if kind not in TRANSFORMERS or not hasattr(model, "loss_function"):
            raise TypeError(f"TransformersDetector wraps {', '.join(TRANSFORMERS)}; got {kind}.")
        super().__init__(model, config.num_labels, plain=kind != "detr")
        self.kind = kind
        if hasattr(config, "num_denoising"):
            config.num_denoising = 0
            for unused in (p for n, p in model.named_parameters() if "denoising_class_embed" in n):
                unused.requires_grad_(False)  # no rank would have its gradient
        self._each = _EachImage(model.loss_function, 1 if kind == "detr" else 0)  # pyright: ignore[reportArgumentType]
        model.loss_function = self._each  # pyright: ignore[reportArgumentType]

    def levels_of(self, images: Tensor) -> list[Tensor]:
        return self.detect(images, None).levels

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        height, width = images.shape[2:]
        scale = images.new_tensor([width, height, width, height])
        labels = None
        if targets is not None:
            kept = proper(targets, (height, width))
            labels = [{"class_labels": t["labels"], "boxes": centered(t["boxes"].to(scale) / scale)} for t in kept]
        said = self.model(self.normalized(images), labels=labels)
        maps = said.encoder_last_hidden_state
        levels = [_map(maps, height, width)] if isinstance(maps, Tensor) else list(maps)
        bins = None
        if self.kind == "d_fine":
            bins = said.intermediate_predicted_corners[:, -1].unflatten(-1, (4, -1))
        losses = {} if targets is None else self._each.take()
        boxes = cornered(said.pred_boxes) * scale
        return Detected(levels, said.logits, boxes, bins, losses, self.kind != "detr", queries=True)


class _EachImage:
    """In the place of a model's loss function: that function on one image at a time, its losses kept apart."""

    def __init__(self, function: Callable[..., Any], layers: int) -> None:
        self.function, self.layers = function, layers  # the dimension of the batch in outputs of all layers
        self.losses: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, logits: Tensor, labels: Any, device: Any, boxes: Tensor, config: Any, *more: Any, **kept: Any
    ) -> Any:
        self.losses = []
        for i in range(len(labels)):
            args = (logits[i : i + 1], labels[i : i + 1], device, boxes[i : i + 1], config)
            rest = [x.narrow(self.layers, i, 1) if isinstance(x, Tensor) else x for x in more]
            named = {n: x[i : i + 1] if isinstance(x, Tensor) else x for n, x in kept.items()}
            whole, parts, _ = self.function(*args, *rest, **named)
            of_class = [v for n, v in parts.items() if any(kind in n for kind in ("_ce", "_vfl", "_focal", "_bce"))]
            self.losses.append((torch.stack(of_class).sum(), torch.as_tensor(whole)))
        total = torch.stack([whole for _, whole in self.losses])
        return total.mean(), {}, None

    def take(self) -> dict[str, Tensor]:
        """name -> (B,) of the last call."""
        classes, whole = (torch.stack(side) for side in zip(*self.losses, strict=True))
        self.losses = []
        return {"class": classes, "box": whole - classes}


def _map(sequence: Tensor, height: int, width: int) -> Tensor:
    """(B, h * w, C) as (B, C, h, w), in the image's proportions."""
    count = sequence.shape[1]
    high = round((count * height / width) ** 0.5)
    if count % high:
        raise ValueError(f"{count} positions are no map of an image of {height} x {width}. Use sides that 32 divides.")
    return sequence.transpose(1, 2).unflatten(2, (high, count // high))


def _from_transformers(name: str, classes: int, pretrained: bool) -> Detector:
    with contextlib.suppress(ImportError):
        torchvision()  # one of another build would keep transformers' detectors from being imported
    try:
        from transformers import AutoConfig, AutoModelForObjectDetection
    except ImportError as error:
        raise ImportError(f"transformers:{name} needs transformers: pip install 'tempering[models]'") from error
    if pretrained:
        model = AutoModelForObjectDetection.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    else:
        try:
            config = AutoConfig.for_model(name, num_labels=classes)  # an architecture: nothing is fetched
        except ValueError:
            config = AutoConfig.from_pretrained(name, num_labels=classes, trust_remote_code=False)
        model = AutoModelForObjectDetection.from_config(config, trust_remote_code=False)
    return TransformersDetector(model)
