"""Inputs that a method moves while it trains: random points of an l-infinity ball, and the worst that PGD finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tempering.rows import Rows, upcast_to_float32

Bounds = Sequence[float] | None
Draw = Callable[[Tensor], Tensor]  # of the rows that take part -> what is added to them
ROOM = 1e-3  # by how much an input may miss its bounds


class PerturbationBall:
    """The l-infinity ball of radius ``eps`` round a batch of inputs, and the bounds that no input leaves.

    Args:
        owner: the method, for what it says.
        rows: of these inputs; those of weight 0 stay where they are and draw no random number.

    Raises:
        ValueError: as ``within`` does.
    """

    def __init__(self, owner: str, inputs: Tensor, rows: Rows, *, eps: float, bounds: Bounds) -> None:
        self.inputs, self.eps, self.bounds = inputs.detach(), eps, bounds
        self.center = upcast_to_float32(self.inputs)
        self.taking = None if rows.weight is None else rows.weight > 0
        check_bounds(owner, self.center, rows, bounds)

    def start(self, draw: Draw | None = None) -> Tensor:
        """Inputs moved by what is drawn, by itself uniformly in the ball."""
        moved = self.center.clone()
        rows: Tensor | slice = slice(None) if self.taking is None else self.taking
        here = moved[rows]
        moved[rows] = here + (self.eps * (2 * torch.rand_like(here) - 1) if draw is None else draw(here))
        return self._inside(moved)

    def worst(
        self,
        losses: Callable[[Tensor], Float[Tensor, " N"]],
        *,
        steps: int,
        size: float | None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Inputs where ``losses`` are large: PGD from ``start(draw)``; ``size`` None is 2 eps / steps a step.

        Reference: Madry et al., 2018, arXiv:1706.06083, section 2.1.
        """
        size, here = 2 * self.eps / steps if size is None else size, self.start(draw)
        for _ in range(steps):
            with torch.enable_grad():
                leaf = here.requires_grad_()
                each = self._only(losses(leaf.to(self.inputs.dtype)))
                slope = torch.autograd.grad(each.sum(), leaf)[0]
            here = self._inside(leaf.detach() + size * slope.sign())
        return here

    def _only(self, values: Tensor) -> Tensor:
        return values if self.taking is None else torch.where(self.taking, values, 0.0)

    def _inside(self, moved: Tensor) -> Tensor:
        moved = torch.minimum(torch.maximum(moved, self.center - self.eps), self.center + self.eps)
        moved = moved if self.bounds is None else moved.clamp(*self.bounds)
        return moved if self.taking is None else torch.where(_like(self.taking, moved), moved, self.center)


def check_bounds(owner: str, inputs: Tensor, rows: Rows, bounds: Bounds) -> None:
    """Refuse inputs outside the bounds, of rows that take part; seen on the CPU alone, where it costs nothing.

    Raises:
        ValueError: saying how far they go, and what to do.
    """
    if bounds is None or inputs.device.type != "cpu":
        return
    seen = inputs.detach() if rows.weight is None else inputs.detach()[rows.weight > 0]
    low, high = (float(seen.min()), float(seen.max())) if seen.numel() else bounds
    if not (low >= bounds[0] - ROOM and high <= bounds[1] + ROOM):
        raise ValueError(
            f"{owner} moves inputs within {bounds[0]:g} to {bounds[1]:g}, and these go from {low:.3g} to {high:.3g}. "
            "Normalize inside the model (models.Normalized) and give it pixels in [0, 1], or say bounds=(low, high), "
            "None for none."
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its statistics at rest; then as it was, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_attack(owner: str, *, eps: float, steps: int, size: float | None, bounds: Bounds) -> None:
    """Refuse an attack that is none, or bounds that hold nothing."""
    if not 0.0 <= eps < float("inf") or steps < 1 or (size is not None and not 0.0 < size < float("inf")):
        raise ValueError(
            f"{owner} attacks with a strength >= 0, 1 step or more, of a size > 0 or None; got {eps!r}, {steps!r} and "
            f"{size!r}."
        )
    if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
        raise ValueError(f"{owner} needs bounds=(low, high), the range of its inputs, or None; got {bounds!r}.")


def _like(taking: Bool[Tensor, " N"], x: Tensor) -> Tensor:
    return taking.view(-1, *[1] * (x.ndim - 1))
