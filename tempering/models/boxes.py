"""Compute IoU, non-maximum suppression, matches and conversions of boxes, as xyxy in pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from tempering.utils.tensors import numbers_on

MATCH_COSTS = {"classes": 2.0, "l1": 5.0, "giou": 2.0}  # of Deformable DETR, arXiv:2010.04159, and its successors


def areas(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4), never negative."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersection over union of boxes (..., 4) and (..., 4), broadcast; 0 where both are empty."""
    intersection = _intersection(a, b)
    union = areas(a) + areas(b) - intersection
    return intersection / torch.where(union > 0, union, torch.ones_like(union))


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized IoU of boxes (..., 4) and (..., 4), broadcast, in [-1, 1].

    Reference: Rezatofighi et al., CVPR 2019, arXiv:1902.09630.
    """
    intersection = _intersection(a, b)
    union = areas(a) + areas(b) - intersection
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    one = torch.ones_like(union)
    overlap = intersection / torch.where(union > 0, union, one)
    return overlap - (hull - union) / torch.where(hull > 0, hull, one)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    return size.clamp_min(0).prod(-1)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes (..., 4) to an image of (height, width)."""
    height, width = size
    limit = numbers_on([width, height, width, height], boxes)
    return torch.minimum(boxes.clamp_min(0), limit)


def centered(boxes: Tensor) -> Tensor:
    """Convert xyxy to center, width and height."""
    return torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), -1)


def cornered(boxes: Tensor) -> Tensor:
    """Convert center, width and height to xyxy."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, *, overlap: float) -> Tensor:
    """Apply greedy non-maximum suppression by class to boxes (D, 4); return the kept indices, best first.

    Greedy suppression keeps the unique set in which a box is kept if no better kept box of its class has a larger IoU
    with it than ``overlap``. The set is computed for all boxes in parallel, as a fixed point, in at most as many
    iterations as the longest chain of suppressed boxes has.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    covers = (iou(boxes[:, None], boxes[None]) > overlap) & (labels[:, None] == labels[None])
    covers = covers.triu(1)  # [i, j]: i is better than j and covers it
    kept = torch.ones_like(labels, dtype=torch.bool)
    while True:
        updated = ~(covers & kept[:, None]).any(0)
        if torch.equal(updated, kept):
            return order[kept]
        kept = updated


def match_costs(q: Tensor, t_boxes: Tensor, p: Tensor, s_boxes: Tensor) -> Tensor:
    """Return the costs (N, K, Q) of matching K queries to Q, by their class probabilities (N, *, C) and boxes.

    Boxes (N, *, 4) are center, width and height in [0, 1].
    """
    corners, others = cornered(t_boxes).unsqueeze(-2), cornered(s_boxes).unsqueeze(-3)
    cost = MATCH_COSTS["classes"] * (q.unsqueeze(-2) - p.unsqueeze(-3)).abs().sum(-1)
    cost = cost + MATCH_COSTS["l1"] * (t_boxes.unsqueeze(-2) - s_boxes.unsqueeze(-3)).abs().sum(-1)
    return cost + MATCH_COSTS["giou"] * (1.0 - giou(corners, others))


def match_one_to_one(costs: Tensor) -> Tensor:
    """Return the column of each row, (N, K), of the smallest totals of costs (N, K, Q), by the Hungarian algorithm.

    K <= Q. The host reads the costs once.

    Raises:
        ImportError: without scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("queries are matched by scipy: pip install 'tempering[detection]'") from error
    found = torch.nan_to_num(costs.cpu(), nan=1e6, posinf=1e6).numpy()
    return torch.stack([torch.from_numpy(linear_sum_assignment(one)[1]) for one in found]).to(costs.device)
