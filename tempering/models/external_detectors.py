"""Wrap detectors of torchvision and transformers as ``Detector``; the libraries are imported on first use."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempering.models.boxes import centered, cornered, iou, nms
from tempering.models.detector import Detected, Detector, Target
from tempering.models.external_base import ExternalDetector, image_list, proper
from tempering.models.factory import build
from tempering.utils.tensors import numbers_on

TRANSFORMERS = ("d_fine", "rt_detr", "rt_detr_v2", "detr", "conditional_detr", "deformable_detr")
LAYERS_FIRST = ("detr", "conditional_detr", "deformable_detr")  # the losses' outputs of all layers are (L, B, ...)
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


def wrap(model: nn.Module) -> Detector:
    """Return a detector of torchvision or transformers as a ``Detector``; one that is a ``Detector`` is returned as is.

    Raises:
        TypeError: for a model that is not supported.
    """
    if isinstance(model, Detector):
        return model
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("torchvision.")]
    if {"FasterRCNN", "GeneralizedRCNN"} & set(kinds):
        from tempering.models.two_stage import TwoStageDetector

        return TwoStageDetector(model)
    if kinds:
        return TorchvisionDetector(model)
    if hasattr(model, "config"):
        return TransformersDetector(model)
    raise TypeError(
        f"{type(model).__name__} is no detector that is supported: those are models.detector.Detector, torchvision's "
        f"FCOS, RetinaNet, SSD, Faster, Mask and Keypoint R-CNN, and transformers' {', '.join(TRANSFORMERS)}. Another "
        "model needs a subclass of Detector with levels_of(images) and detect(images, targets), whose losses are those "
        "that the model is trained with."
    )


# torchvision


class TorchvisionDetector(ExternalDetector):
    """Wrap FCOS, RetinaNet or SSD of torchvision, with labels counted from 0.

    Images are passed to backbone and head without torchvision's resizing. Losses are torchvision's, computed for one
    image at a time. SSD's logits have the background last, where torchvision has it first.

    Raises:
        TypeError: for another model.
    """

    shared = ("model.backbone.fpn", "model.head")

    def __init__(self, model: nn.Module) -> None:
        kinds = {kind.__name__ for kind in type(model).__mro__} & {"FCOS", "RetinaNet", "SSD"}
        if not kinds:
            raise TypeError(
                f"TorchvisionDetector wraps FCOS, RetinaNet and SSD; got {type(model).__name__}. "
                "models.external_detectors.wrap(model) chooses the class for a model."
            )
        self.is_ssd = "SSD" in kinds
        self.family = "anchor-free" if "FCOS" in kinds else "anchor-based"
        head: Any = model.head.classification_head  # pyright: ignore
        super().__init__(model, head.num_columns - 1 if self.is_ssd else head.num_classes)
        fixed: Any = getattr(getattr(model, "transform", None), "fixed_size", None)
        self.image_size = None if fixed is None else int(fixed[0])

    def levels_of(self, images: Tensor) -> list[Tensor]:
        maps: Any = self.model.backbone(self.normalized(images))  # pyright: ignore
        return list(maps.values()) if isinstance(maps, Mapping) else [maps]

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        levels, model = self.levels_of(images), cast(Any, self.model)
        outputs: dict[str, Tensor] = model.head(levels)
        size = (images.shape[2], images.shape[3])
        anchors: list[Tensor] = model.anchor_generator(image_list(images), levels)
        coder = model.box_coder
        decode = coder.decode if "bbox_ctrness" in outputs else coder.decode_single
        boxes = torch.stack(
            [decode(deltas, boxes) for deltas, boxes in zip(outputs["bbox_regression"], anchors, strict=True)]
        )
        quality = outputs["bbox_ctrness"].squeeze(-1) if "bbox_ctrness" in outputs else None
        losses = {} if targets is None else self._losses(outputs, proper(targets, size), anchors, levels)
        logits = outputs["cls_logits"]
        if self.is_ssd:
            logits = torch.cat((logits[..., 1:], logits[..., :1]), -1)
        return Detected(levels, logits, boxes, None, losses, not self.is_ssd, quality)

    def _losses(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Target], anchors: list[Tensor], levels: list[Tensor]
    ) -> dict[str, Tensor]:
        points = [[x.shape[2] * x.shape[3] for x in levels]] if "bbox_ctrness" in outputs else []
        losses, model = [], cast(Any, self.model)
        for i, target in enumerate(targets):
            output = {name: value[i : i + 1].float() for name, value in outputs.items()}
            if self.is_ssd:
                target = {"boxes": target["boxes"], "labels": target["labels"] + 1}
                points = [[_matched(model, target["boxes"], anchors[i])]]
            # targets are a copy: torchvision writes into the labels of images without boxes
            losses.append(model.compute_loss([target], output, [anchors[i]], *points))
        names = {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "quality"}
        return {names[name]: torch.stack([loss[name] for loss in losses]) for name in losses[0]}


def _matched(ssd: Any, boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the index of the box of each anchor, -1 for none, as SSD's forward pass does."""
    if not len(boxes):
        return torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    return ssd.proposal_matcher(iou(boxes[:, None], anchors[None]))


def torchvision() -> Any:
    """Import torchvision, even if its compiled operators were built for another torch.

    Its NMS and RoIAlign are then Python functions: they compute the same, more slowly.

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
    operators = torch.library.Library("torchvision", "DEF")
    _LIBRARY.append(operators)
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torchvision as library  # pyright: ignore[reportMissingImports]
    from torchvision import extension  # pyright: ignore[reportMissingImports]

    roi_align: Any = sys.modules["torchvision.ops.roi_align"]
    operators.impl("nms", _nms, "CompositeImplicitAutograd")
    operators.impl("roi_align", roi_align._roi_align.__wrapped__, "CompositeImplicitAutograd")
    extension._has_ops = roi_align._has_ops = lambda: True
    return library


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return nms(dets, scores, torch.zeros(len(dets), dtype=torch.long, device=dets.device), overlap=iou_threshold)


def _from_torchvision(name: str, classes: int, pretrained: bool) -> Detector:
    library = torchvision()
    from torchvision import models  # pyright: ignore[reportMissingImports]

    names = models.list_models(module=models.detection)
    if name not in names:
        raise ValueError(f"torchvision {library.__version__} has no detector {name!r}; it has {', '.join(names)}.")
    count = classes + (not name.startswith(("fcos", "retinanet")))  # the others count the background
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=count)
    if pretrained:
        weights, state = models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True), model.state_dict()
        equal = {n: value for n, value in weights.items() if n in state and state[n].shape == value.shape}
        model.load_state_dict(equal, strict=False)
    return wrap(model)


# transformers


class TransformersDetector(ExternalDetector):
    """Wrap D-FINE, RT-DETR, RT-DETRv2, DETR, Conditional or Deformable DETR of transformers.

    Losses are the library's, with auxiliary losses, computed for one image at a time: "class" is the classification
    loss, "box" all other losses. Denoising queries, which depend on the other images of a batch, are disabled. D-FINE
    has bins, the distributions of the last layer. The only level of DETR and Conditional DETR is the output of the
    encoder; those of Deformable DETR are the maps of its encoder. D-FINE, RT-DETR and RT-DETRv2 return the predictions
    of all decoder layers, D-FINE in training mode only.

    Raises:
        TypeError: for another model.
    """

    family = "queries"
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
        super().__init__(model, config.num_labels, plain=kind not in LAYERS_FIRST)
        self.kind = kind
        if hasattr(config, "num_denoising"):
            config.num_denoising = 0
            for unused in (p for n, p in model.named_parameters() if "denoising_class_embed" in n):
                unused.requires_grad_(False)  # unused parameters have no gradient, which DDP does not accept
        layers = 1 if kind in LAYERS_FIRST else 0
        self._image_losses = _PerImageLoss(model.loss_function, layers)  # pyright: ignore[reportArgumentType]

    def levels_of(self, images: Tensor) -> list[Tensor]:
        return self.detect(images, None).levels

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        height, width = images.shape[2:]
        scale = numbers_on([width, height, width, height], images)
        labels = None
        if targets is not None:
            valid = proper(targets, (height, width))
            labels = [{"class_labels": t["labels"], "boxes": centered(t["boxes"].to(scale) / scale)} for t in valid]
        model: Any = self.model
        own, model.loss_function = model.loss_function, self._image_losses  # for this call: the model is the caller's
        try:
            output = model(self.normalized(images), labels=labels)
        finally:
            model.loss_function = own
        maps = output.encoder_last_hidden_state
        if not isinstance(maps, Tensor):
            levels = list(maps)
        elif self.kind == "deformable_detr" and model.config.num_feature_levels > 1:
            levels = _to_maps(maps, height, width, model.config.num_feature_levels)
        else:
            levels = [_to_map(maps, height, width)]
        bins = layers = None
        if self.kind == "d_fine":
            bins = output.intermediate_predicted_corners[:, -1].unflatten(-1, (4, -1))
        if self.kind not in LAYERS_FIRST:
            layers = output.intermediate_logits, cornered(output.intermediate_reference_points) * scale
        losses = {} if targets is None else self._image_losses.pop()
        boxes = cornered(output.pred_boxes) * scale
        sigmoid = self.kind != "detr"
        return Detected(levels, output.logits, boxes, bins, losses, sigmoid, queries=True, layers=layers)


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


def _to_maps(sequence: Tensor, height: int, width: int, levels: int) -> list[Tensor]:
    """Split (B, sum of h * w, C) into maps (B, C, h, w) of strides 8, 16, ... of the image."""
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (8 * 2**i for i in range(levels))]
    counts = [h * w for h, w in sizes]
    if sum(counts) != sequence.shape[1]:
        raise ValueError(
            f"{sequence.shape[1]} positions are not {levels} feature maps of strides 8, 16, ... of an image of "
            f"{height} x {width}. Use multiples of 64."
        )
    parts = sequence.transpose(1, 2).split(counts, 2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


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
