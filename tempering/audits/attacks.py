"""Attacks in pixel space: FGSM and PGD in an l-infinity or l2 ball, never outside [0, 1], and AutoAttack."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.audits.base import Answer

Norm = Literal["linf", "l2"]
LOSSES = ("ce", "margin")
ROOM = 1e-3  # by how much a pixel may miss [0, 1]: half of a gray level is 2e-3


@dataclass(frozen=True)
class Pixels:
    """Between the inputs that models see and pixels in [0, 1].

    Args:
        mean, std: of each channel, as the inputs were normalized; (0,) and (1,) for inputs that are pixels.

    Raises:
        ValueError: for lengths that differ, or a spread that is not positive.
    """

    mean: Sequence[float] = field(default=(0.0,))
    std: Sequence[float] = field(default=(1.0,))

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean and std have one value a channel, std > 0; got {self.mean} and {self.std}.")

    def pixels(self, inputs: Tensor) -> Float[Tensor, "N C H W"]:
        """The images in [0, 1] that these inputs are.

        Raises:
            ValueError: for inputs that are no such images under this mean and std.
        """
        if inputs.ndim != 4 or not inputs.is_floating_point() or inputs.shape[1] % len(self.mean):
            raise ValueError(
                f"attacks need images (N, C, H, W) of floats with {len(self.mean)} channels; got {inputs.dtype} "
                f"{tuple(inputs.shape)}."
            )
        mean, std = self._scale(inputs)
        p = inputs * std + mean
        low, high = float(p.min()), float(p.max())
        if not (low >= -ROOM and high <= 1 + ROOM):
            raise ValueError(
                f"with mean {tuple(self.mean)} and std {tuple(self.std)} the inputs are pixels from {low:.3g} to "
                f"{high:.3g}, outside [0, 1], so an attack's strength would mean nothing. Give the mean and std that "
                "the loader normalizes with."
            )
        return p.clamp(0, 1)

    def inputs(self, pixels: Tensor) -> Tensor:
        """What models see of these pixels."""
        mean, std = self._scale(pixels)
        return (pixels - mean) / std

    def of(self, answer: Answer) -> Answer:
        """The model as a function of pixels."""
        return lambda pixels: answer(self.inputs(pixels))

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.mean, self.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


@dataclass(frozen=True)
class Attacked:
    """What an attack left: images (N, C, H, W) in [0, 1], and which of them are answered wrongly, (N,)."""

    images: Tensor
    fooled: Bool[Tensor, " N"]


def fgsm(answer: Answer, p: Tensor, y: Int[Tensor, " N"], *, eps: float, norm: Norm = "linf") -> Attacked:
    """One step of the whole strength along the sign of the gradient (its direction, in l2); from the image itself.

    Reference: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015, arXiv:1412.6572.
    """
    _allowed(p, eps=eps, norm=norm)
    _, grad, wrong = _gradient(answer, p, y, "ce")
    images = _inside(p + eps * _direction(grad, norm), p, eps, norm)
    return Attacked(images, wrong | _wrong(answer, images, y))


def pgd(
    answer: Answer,
    p: Tensor,
    y: Int[Tensor, " N"],
    *,
    eps: float,
    steps: int = 20,
    step: float | None = None,
    restarts: int = 1,
    norm: Norm = "linf",
    losses: Sequence[str] = LOSSES,
    stop: bool = True,
    seed: int = 0,
) -> Attacked:
    """Projected gradient ascent from random starts; of each image the first version that fools, else the worst one.

    The image itself counts, and every point on the way, so a strength of 0 leaves the clean accuracy, and going on
    never helps the defender.

    Args:
        answer: pixels -> logits.
        p: images (N, C, H, W) in [0, 1].
        y: labels (N,).
        eps: radius of the ball, in pixels of [0, 1].
        steps: of each start.
        step: size of one; None is 2.5 eps / steps.
        restarts: random starts, each with the next of ``losses``.
        norm: "linf" or "l2".
        losses: "ce", or "margin": the largest other logit minus the label's, which keeps its slope where the softmax
            is saturated.
        stop: leave an image alone once it fools; else go on to its largest margin, for images that are to fool others.
        seed: of the starts.

    Raises:
        ValueError: for images outside [0, 1], or a strength that would leave it.

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv:1706.06083;
    the step is that of their later library. The margin: Carlini and Wagner, 2017, arXiv:1608.04644.
    """
    _allowed(p, eps=eps, norm=norm)
    if steps < 1 or restarts < 1 or (step is not None and step <= 0) or not set(losses) <= set(LOSSES) or not losses:
        raise ValueError(
            f"pgd needs steps and restarts >= 1, step > 0 and losses of {LOSSES}; got steps={steps}, "
            f"restarts={restarts}, step={step}, losses={tuple(losses)}."
        )
    size = 2.5 * eps / steps if step is None else step
    generator = torch.Generator().manual_seed(seed)
    best, (top, _, fooled) = p.clone(), _gradient(answer, p, y, losses[0])
    for r in range(restarts):
        start = _inside(p + _random(p, eps, norm, generator), p, eps, norm)
        rows = torch.nonzero(~fooled)[:, 0] if stop else torch.arange(len(p), device=p.device)
        here = start[rows]
        for i in range(steps + 1):
            if not len(rows):
                break
            value, grad, wrong = _gradient(answer, here, y[rows], losses[r % len(losses)])
            better = (wrong & ~fooled[rows]) | ((wrong == fooled[rows]) & (value > top[rows]))
            best[rows[better]], top[rows[better]] = here[better], value[better]
            fooled[rows[better]] = wrong[better]
            if stop:
                rows, here, grad = rows[~wrong], here[~wrong], grad[~wrong]
            if i < steps:
                here = _inside(here + size * _direction(grad, norm), p[rows], eps, norm)
    return Attacked(best, fooled)


@torch.no_grad()
def blind(
    answer: Answer, p: Tensor, y: Int[Tensor, " N"], *, eps: float, norm: Norm = "linf", draws: int = 20, seed: int = 0
) -> Attacked:
    """The weakest attack, of no gradient: random points of the ball, the first that fools."""
    _allowed(p, eps=eps, norm=norm)
    generator = torch.Generator().manual_seed(seed)
    images, fooled = p.clone(), _wrong(answer, p, y)
    for _ in range(draws):
        moved = _inside(p + _random(p, eps, norm, generator), p, eps, norm)
        new = _wrong(answer, moved, y) & ~fooled
        images[new], fooled = moved[new], fooled | new
    return Attacked(images, fooled)


def autoattack(
    answer: Answer, p: Tensor, y: Int[Tensor, " N"], *, eps: float, norm: Norm = "linf", batch: int = 250, seed: int = 0
) -> Attacked:
    """AutoAttack's standard version (APGD-CE, targeted APGD-DLR, targeted FAB, Square), by its authors' package.

    Reference: Croce and Hein, 2020, arXiv:2003.01690.

    Raises:
        ImportError: without pyautoattack, which extra "robustness" brings.
    """
    try:
        from pyautoattack import AutoAttack  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("AutoAttack needs its authors' package: pip install 'tempering[robustness]'.") from error
    _allowed(p, eps=eps, norm=norm)
    state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():  # it seeds the global generators
            attack = AutoAttack(
                _Module(answer), norm="Linf" if norm == "linf" else "L2", eps=eps, seed=seed, device=str(p.device)
            )
            images, _ = attack.run_standard_evaluation(p, y, batch_size=batch)
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
    images = _inside(images.detach().to(p), p, eps, norm)
    return Attacked(images, _wrong(answer, images, y))


class _Module(nn.Module):
    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, pixels: Tensor) -> Tensor:
        return self.answer(pixels)


def _allowed(p: Tensor, *, eps: float, norm: str) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f'norm is "linf" or "l2"; got {norm!r}.')
    if eps < 0 or (norm == "linf" and eps > 1):
        raise ValueError(f"a strength in {norm} lies in [0, 1], in pixels of [0, 1], such as 8/255; got eps={eps:.4g}.")
    if len(p) and not (float(p.min()) >= 0 and float(p.max()) <= 1):
        raise ValueError(
            f"an attack begins at pixels in [0, 1] and stays there; got {float(p.min()):.3g} to {float(p.max()):.3g}. "
            "Attack Pixels(mean, std).pixels(inputs), not normalized inputs."
        )


def _gradient(answer: Answer, p: Tensor, y: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(the margin (N,), the gradient of the loss in each image, whether each is answered wrongly)."""
    with torch.enable_grad():
        leaf = p.detach().requires_grad_()
        z = answer(leaf)
        by = margin(z, y)
        loss = nn.functional.cross_entropy(z, y, reduction="none") if kind == "ce" else by
        grad = torch.autograd.grad(loss.sum(), leaf)[0]
    return by.detach().to(p.dtype), grad, z.detach().argmax(-1) != y


def margin(z: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The largest other logit minus the label's, (N,): positive where the answer is wrong; 0 of one class."""
    if z.shape[1] == 1:
        return 0 * z[:, 0]
    own = nn.functional.one_hot(y, z.shape[1]).bool()
    return z.masked_fill(own, -torch.inf).max(-1).values - z.gather(1, y[:, None])[:, 0]


@torch.no_grad()
def _wrong(answer: Answer, p: Tensor, y: Tensor) -> Tensor:
    return answer(p).argmax(-1) != y


def _direction(grad: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return grad.sign()
    length = torch.linalg.vector_norm(grad.flatten(1), dim=1).clamp_min(1e-12)
    return grad / length.view(-1, 1, 1, 1)


def _random(p: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """Uniform in the ball; drawn on the CPU, so that every device begins at the same points."""
    if norm == "linf":
        return eps * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1).to(p.device)
    drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
    radius = torch.rand(len(p), generator=generator, dtype=p.dtype).to(p.device) ** (1 / max(1, p[0].numel()))
    return eps * radius.view(-1, 1, 1, 1) * _direction(drawn, norm)


def _inside(moved: Tensor, p: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest point in the ball round ``p``, then in [0, 1], which stays in the ball."""
    delta = moved - p
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = delta * (eps / length).clamp(max=1)
    return (p + delta).clamp(0, 1)
