"""Boxes as xyxy in pixels, in plain torch: IoU, suppression, conversions."""

from __future__ import annotations

import torch
from torch import Tensor


def areas(boxes: Tensor) -> Tensor:
    """Areas of boxes (..., 4), (...), never negative."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) and (..., 4), broadcast; 0 where both are empty."""
    inside = _inside(a, b)
    union = areas(a) + areas(b) - inside
    return inside / torch.where(union > 0, union, torch.ones_like(union))


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of boxes (..., 4) and (..., 4), broadcast, in [-1, 1].

    Reference: Rezatofighi et al., CVPR 2019, arXiv:1902.09630.
    """
    inside = _inside(a, b)
    union = areas(a) + areas(b) - inside
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    one = torch.ones_like(union)
    share = inside / torch.where(union > 0, union, one)
    return share - (hull - union) / torch.where(hull > 0, hull, one)


def _inside(a: Tensor, b: Tensor) -> Tensor:
    size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    return size.clamp_min(0).prod(-1)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) cut to an image of (height, width)."""
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp_min(0), limit)


def centered(boxes: Tensor) -> Tensor:
    """xyxy to center, width and height."""
    return torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), -1)


def cornered(boxes: Tensor) -> Tensor:
    """Center, width and height to xyxy."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, *, overlap: float) -> Tensor:
    """Indices of boxes (D, 4) that no better one of their class overlaps by more than ``overlap``, best first.

    What greedy suppression keeps is the one set in which a box is kept if no kept better one covers it; it is found by
    asking all boxes at once until nothing changes, in as many rounds as the longest chain of boxes has.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    covers = (iou(boxes[:, None], boxes[None]) > overlap) & (labels[:, None] == labels[None])
    covers = covers.triu(1)  # [i, j]: i is better than j and covers it
    kept = torch.ones_like(labels, dtype=torch.bool)
    while True:
        now = ~(covers & kept[:, None]).any(0)
        if torch.equal(now, kept):
            return order[kept]
        kept = now
