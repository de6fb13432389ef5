"""Build a small anchor-free one-stage detector that trains on a CPU in minutes; a teacher is a wider one.

Reference: Tian et al., "FCOS", ICCV 2019, arXiv:1904.01355; its losses, with GIoU as in the authors' later version.
It is smaller: four stages, three levels, two convolutions per tower. With ``bins`` the sides are distributions, as in
Li et al., "Generalized Focal Loss", NeurIPS 2020, arXiv:2006.04388.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering.models.boxes import areas, giou
from tempering.models.detector import Detected, Detector, Target

WIDTHS = (16, 32, 48, 64, 96)  # of the stem and the stages at width 1
STRIDES = (8, 16, 32)
REACH = (
    4.0  # a level is assigned boxes whose farthest side is up to this many strides from a point; the last, all larger
)
RADIUS = 1.5  # maximal distance of positive points from the center of a box, in strides
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DFL = 0.25  # weight of the distribution focal loss, as in Generalized Focal Loss


class Assigned(NamedTuple):
    """The object assigned to each point: its label (B, A), -1 for none, and its box (B, A, 4)."""

    labels: Tensor
    boxes: Tensor


class FCOS(Detector):
    """A detector for images whose height and width are multiples of 32.

    Args:
        classes: number of classes, without the background.
        width: factor of the backbone's channels; neck and head are not scaled, so that they can be inherited.
        neck: channels of neck and head, a multiple of 8.
        bins: number of bins of each side's distribution over 0, 1, ..., bins - 1 strides; None: regress the sides.
        norm: of the backbone: "batch", or "group", with which images of a batch are independent in training too.

    Raises:
        ValueError: for invalid sizes.
    """

    mean: Tensor
    std: Tensor
    family = "anchor-free"
    shared = ("outputs", "class_tower", "box_tower", "class_head", "box_head", "quality_head", "scales", "laterals")

    def __init__(
        self,
        classes: int,
        *,
        width: float = 1.0,
        neck: int = 48,
        bins: int | None = None,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        if classes < 1 or width <= 0 or neck < 8 or neck % 8 or (bins is not None and bins < 2):
            raise ValueError(
                "FCOS needs classes >= 1, width > 0, neck a multiple of 8 and bins >= 2 or None; got "
                f"classes={classes}, width={width}, neck={neck}, bins={bins}."
            )
        if norm not in ("batch", "group"):
            raise ValueError(f"FCOS needs norm 'batch' or 'group'; got {norm!r}.")
        self.classes, self.width, self.neck, self.bins, self.norm = classes, width, neck, bins, norm
        widths = [max(8, round(w * width / 8) * 8) for w in WIDTHS]
        self.stem = _conv_norm_relu(3, widths[0], 2, norm)
        self.stages = nn.ModuleList(_Stage(a, b, norm) for a, b in itertools.pairwise(widths))
        self.laterals = nn.ModuleList(nn.Conv2d(w, neck, 1) for w in widths[2:])
        self.outputs = nn.ModuleList(nn.Conv2d(neck, neck, 3, padding=1) for _ in STRIDES)
        self.class_tower, self.box_tower = (nn.Sequential(*(_tower(neck) for _ in range(2))) for _ in range(2))
        self.class_head = nn.Conv2d(neck, classes, 3, padding=1)
        self.box_head = nn.Conv2d(neck, 4 * (bins or 1), 3, padding=1)
        self.quality_head = nn.Conv2d(neck, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        for head in (self.class_head, self.box_head, self.quality_head):
            nn.init.normal_(head.weight, 0.0, 0.01)
            nn.init.zeros_(head.bias)  # pyright: ignore[reportArgumentType]
        nn.init.constant_(self.class_head.bias, -math.log(99.0))  # pyright: ignore[reportArgumentType]
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def levels_of(self, images: Tensor) -> list[Tensor]:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % STRIDES[-1] or images.shape[3] % STRIDES[-1]:
            raise ValueError(
                f"FCOS needs images (B, 3, H, W) with sides that are multiples of {STRIDES[-1]}; got "
                f"{tuple(images.shape)}. Choose such a size where they are loaded."
            )
        x, maps = self.stem((images - self.mean) / self.std), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top_down, out = None, []
        for lateral, output, x in reversed(list(zip(self.laterals, self.outputs, maps[1:], strict=True))):
            top_down = lateral(x) if top_down is None else lateral(x) + F.interpolate(top_down, scale_factor=2.0)
            out.append(output(top_down))
        return out[::-1]

    def detect(self, images: Tensor, targets: Sequence[Target] | None) -> Detected:
        levels = self.levels_of(images)
        logits, quality, sides = [], [], []
        for x, scale in zip(levels, self.scales, strict=True):
            features = self.box_tower(x)
            logits.append(_points(self.class_head(self.class_tower(x))))
            quality.append(_points(self.quality_head(features)))
            sides.append(_points(self.box_head(features)) * scale)
        points, strides = (x.to(images.device, non_blocking=True) for x in grid([x.shape[2:] for x in levels]))
        raw = torch.cat(sides, 1)
        bins = raw.unflatten(-1, (4, self.bins)) if self.bins else None
        distances = (raw.clamp(max=6.0).exp() if bins is None else _expected(bins)) * strides[:, None]
        boxes = torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)
        output = Detected(levels, torch.cat(logits, 1), boxes, bins, {}, True, torch.cat(quality, 1).squeeze(-1))
        if targets is None:
            return output
        return output._replace(losses=losses(output, assign(targets, points, strides, output.boxes), points, strides))

    def class_loss(self, inputs: object) -> Tensor:
        images, targets = inputs["images"], inputs["targets"]  # pyright: ignore[reportIndexIssue]
        levels = self.levels_of(images)
        logits = torch.cat([_points(self.class_head(self.class_tower(x))) for x in levels], 1)
        points, strides = (x.to(images.device, non_blocking=True) for x in grid([x.shape[2:] for x in levels]))
        return focal(logits, assign(targets, points, strides, images.new_zeros(())).labels)


class _Stage(nn.Module):
    """Apply a convolution of stride 2 and a residual block."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__()
        self.down = _conv_norm_relu(in_channels, out_channels, 2, norm)
        self.block = nn.Sequential(
            _conv_norm_relu(out_channels, out_channels, 1, norm),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            _norm(out_channels, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return F.relu(x + self.block(x))


def _norm(out_channels: int, norm: str) -> nn.Module:
    return nn.BatchNorm2d(out_channels) if norm == "batch" else nn.GroupNorm(8, out_channels)


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int, norm: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), _norm(out_channels, norm), nn.ReLU()
    )


def _tower(neck: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(neck, neck, 3, padding=1, bias=False), nn.GroupNorm(8, neck), nn.ReLU())


def _points(x: Tensor) -> Tensor:
    """Flatten (B, C, h, w) to (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def _expected(bins: Tensor) -> Tensor:
    """Return the mean of each side's distribution, (..., 4), in strides."""
    return bins.softmax(-1) @ torch.arange(bins.shape[-1], dtype=bins.dtype, device=bins.device)


def grid(sizes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the centers (A, 2) of the cells of all levels as xy in pixels, and the stride (A,) of each."""
    points, strides = [], []
    for (height, width), stride in zip(sizes, STRIDES, strict=True):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append((torch.stack((x, y), -1).view(-1, 2) + 0.5) * stride)
        strides.append(torch.full((height * width,), float(stride)))
    return torch.cat(points), torch.cat(strides)


@torch.no_grad()
def assign(targets: Sequence[Target], points: Tensor, strides: Tensor, like: Tensor) -> Assigned:
    """Assign to each point the smallest box that contains it, is centered near it, and is of a size for its level.

    A box that contains no point, smaller than the finest stride, is not assigned.
    """
    most = max((len(target["labels"]) for target in targets), default=0)
    boxes, labels = like.new_zeros(len(targets), most + 1, 4), points.new_full((len(targets), most + 1), -1).long()
    for i, target in enumerate(targets):
        boxes[i, : len(target["labels"])], labels[i, : len(target["labels"])] = target["boxes"], target["labels"]
    low, high = points[:, None] - boxes[:, None, :, :2], boxes[:, None, :, 2:] - points[:, None]  # (B, A, M, 2)
    near, far = torch.cat((low, high), -1).amin(-1), torch.cat((low, high), -1).amax(-1)
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    central = (points[:, None] - center[:, None]).abs().amax(-1) < RADIUS * strides[:, None]
    least = torch.where(strides == STRIDES[0], 0.0, REACH * strides / 2)
    largest = torch.where(strides == STRIDES[-1], torch.inf, REACH * strides)
    valid = (near > 0) & central & (far > least[:, None]) & (far <= largest[:, None]) & (labels[:, None] >= 0)
    size = areas(boxes)[:, None].expand_as(valid).masked_fill(~valid, torch.inf)
    best = size.min(-1)
    assigned = torch.where(torch.isfinite(best.values), labels.gather(1, best.indices), -1)
    return Assigned(assigned, boxes.gather(1, best.indices.unsqueeze(-1).expand(-1, -1, 4)))


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the focal loss (alpha 0.25, gamma 2) of each image, normalized by its positives, (B,); -1: background.

    Reference: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
    """
    truth = F.one_hot(labels + 1, logits.shape[-1] + 1)[..., 1:].to(logits.dtype)
    p = logits.sigmoid()
    error = torch.where(truth > 0, 1.0 - p, p)
    weight = torch.where(truth > 0, 0.25, 0.75) * error.square()
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (weight * loss).sum((1, 2)) / (labels >= 0).sum(1).clamp_min(1)


def losses(output: Detected, assigned: Assigned, points: Tensor, strides: Tensor) -> dict[str, Tensor]:
    """Return the losses of each image, (B,): "class", "box" (GIoU), "quality" (centerness), and "bins" with bins."""
    assert output.quality is not None
    parts = (output.logits, output.quality, output.boxes)
    logits, quality, boxes = (x.float() if x.dtype.itemsize < 4 else x for x in parts)
    positive, truth = assigned.labels >= 0, assigned.boxes.to(boxes.dtype)
    count = positive.sum(1).clamp_min(1)
    sides = torch.cat((points - truth[..., :2], truth[..., 2:] - points), -1).clamp_min(0)
    x, y = sides[..., 0::2], sides[..., 1::2]
    ratios = [s.amin(-1) / s.amax(-1).clamp_min(1e-9) for s in (x, y)]
    centerness = (ratios[0] * ratios[1]).sqrt().masked_fill(~positive, 0.0)
    weight = centerness / centerness.sum(1, keepdim=True).clamp_min(1e-9)

    def over_positives(loss: Tensor) -> Tensor:
        return torch.where(positive, loss, 0.0)

    out = {
        "class": focal(logits, assigned.labels),
        "box": (over_positives(1.0 - giou(boxes, truth)) * weight).sum(1),
        "quality": over_positives(F.binary_cross_entropy_with_logits(quality, centerness, reduction="none")).sum(1)
        / count,
    }
    if output.bins is not None:
        loss = DFL * _distribution_focal(output.bins.to(boxes.dtype), sides / strides[:, None]).mean(-1)
        out["bins"] = (over_positives(loss) * weight).sum(1)
    return out


def _distribution_focal(bins: Tensor, value: Tensor) -> Tensor:
    """Return the cross entropy to the two bins next to ``value``, weighted linearly by distance, (B, A, 4)."""
    value = value.clamp(0, bins.shape[-1] - 1 - 1e-3)
    low = value.floor().long()
    logp, fraction = bins.log_softmax(-1), value - low
    lower, upper = (logp.gather(-1, index.unsqueeze(-1)).squeeze(-1) for index in (low, low + 1))
    return -(lower * (1.0 - fraction) + upper * fraction)


def _net(classes: int, channels: int, *, width: float, bins: int | None) -> nn.Module:
    if channels != 3:
        raise ValueError(f"detectors take images of 3 channels; got channels={channels}.")
    return FCOS(classes, width=width, bins=bins)


NETS = {
    f"fcos_{name}{'_bins' if bins else ''}": partial(_net, width=width, bins=bins)
    for name, width in (("nano", 0.5), ("tiny", 1.0), ("wide", 2.0), ("large", 4.0))
    for bins in (None, 17)
}
