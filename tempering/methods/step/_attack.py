"""Perturbed inputs for adversarial training: random points of an l-infinity ball, and PGD attacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.rows import Rows, upcast_to_float32

Bounds = Sequence[float] | None
Draw = Callable[[Tensor], Tensor]  # inputs -> random perturbation
TOLERANCE = 1e-3  # by which inputs may exceed their bounds


class PerturbationBall:
    """The l-infinity ball of radius ``eps`` around a batch of inputs, intersected with bounds.

    Args:
        owner: name of the method, for error messages.
        rows: the rows of these inputs; inputs of rows of weight 0 are not perturbed and draw no random numbers.

    Raises:
        ValueError: as in ``check_bounds``.
    """

    def __init__(self, owner: str, inputs: Tensor, rows: Rows, *, eps: float, bounds: Bounds) -> None:
        self.inputs, self.eps, self.bounds = inputs.detach(), eps, bounds
        self.center = upcast_to_float32(self.inputs)
        self.active = None if rows.weight is None else rows.weight > 0
        check_bounds(owner, self.center, rows, bounds)

    def start(self, draw: Draw | None = None) -> Tensor:
        """Return randomly perturbed inputs; default: uniform in the ball."""
        perturbed = self.center.clone()
        rows: Tensor | slice = slice(None) if self.active is None else self.active
        x = perturbed[rows]
        perturbed[rows] = x + (self.eps * (2 * torch.rand_like(x) - 1) if draw is None else draw(x))
        return self._project(perturbed)

    def worst(
        self,
        losses: Callable[[Tensor], Float[Tensor, " N"]],
        *,
        steps: int,
        size: float | None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Maximize ``losses`` by PGD from ``start(draw)``; a step size of None is 2 eps / steps.

        Reference: Madry et al., 2018, arXiv:1706.06083, section 2.1.
        """
        size, x = 2 * self.eps / steps if size is None else size, self.start(draw)
        for _ in range(steps):
            with torch.enable_grad():
                leaf = x.requires_grad_()
                active_losses = self._mask(losses(leaf.to(self.inputs.dtype)))
                gradient = torch.autograd.grad(active_losses.sum(), leaf)[0]
            x = self._project(leaf.detach() + size * gradient.sign())
        return x

    def _mask(self, values: Tensor) -> Tensor:
        """Set the values of rows of weight 0 to 0."""
        return values if self.active is None else torch.where(self.active, values, 0.0)

    def _project(self, x: Tensor) -> Tensor:
        """Project inputs onto the ball and the bounds; rows of weight 0 keep their inputs."""
        x = torch.minimum(torch.maximum(x, self.center - self.eps), self.center + self.eps)
        x = x if self.bounds is None else x.clamp(*self.bounds)
        return x if self.active is None else torch.where(_broadcast(self.active, x), x, self.center)


def check_bounds(owner: str, inputs: Tensor, rows: Rows, bounds: Bounds) -> None:
    """Check that the inputs of rows of weight > 0 are within the bounds; on the CPU only, to avoid a synchronization.

    Raises:
        ValueError: if they are not, with their range and the remedy.
    """
    if bounds is None or inputs.device.type != "cpu":
        return
    x = inputs.detach() if rows.weight is None else inputs.detach()[rows.weight > 0]
    low, high = (float(x.min()), float(x.max())) if x.numel() else bounds
    if not (low >= bounds[0] - TOLERANCE and high <= bounds[1] + TOLERANCE):
        raise ValueError(
            f"{owner} perturbs inputs in {bounds[0]:g} to {bounds[1]:g}, and these are from {low:.3g} to {high:.3g}. "
            "Normalize inside the model (models.Normalized) and give it pixels in [0, 1], or give bounds=(low, high), "
            "None for none."
        )


def check_attack(owner: str, *, eps: float, steps: int, size: float | None, bounds: Bounds) -> None:
    """Raise ValueError for invalid settings of an attack, or empty bounds."""
    if not 0.0 <= eps < float("inf") or steps < 1 or (size is not None and not 0.0 < size < float("inf")):
        raise ValueError(
            f"{owner} needs an attack with strength >= 0, 1 step or more, and step size > 0 or None; got {eps!r}, "
            f"{steps!r} and {size!r}."
        )
    if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
        raise ValueError(f"{owner} needs bounds=(low, high), the range of its inputs, or None; got {bounds!r}.")


def _broadcast(active: Bool[Tensor, " N"], x: Tensor) -> Tensor:
    return active.view(-1, *[1] * (x.ndim - 1))
