"""Attacks in pixel space: FGSM and PGD in an l-infinity or l2 ball within [0, 1], and AutoAttack."""

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
ROOM = 1e-3  # tolerance for pixels outside [0, 1]: half of a gray level is 2e-3


@dataclass(frozen=True)
class Pixels:
    """Convert between normalized model inputs and pixels in [0, 1].

    Args:
        mean, std: per-channel normalization of the inputs; (0,) and (1,) for inputs that are pixels.

    Raises:
        ValueError: if the lengths differ, or a std is not positive.
    """

    mean: Sequence[float] = field(default=(0.0,))
    std: Sequence[float] = field(default=(1.0,))

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean and std need one value per channel, std > 0; got {self.mean} and {self.std}.")

    def pixels(self, inputs: Tensor) -> Float[Tensor, "N C H W"]:
        """Return the images in [0, 1] of these inputs.

        Raises:
            ValueError: if the inputs are not images in [0, 1] under this mean and std.
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
                f"{high:.3g}, outside [0, 1], so an attack's strength would be meaningless. Pass the mean and std that "
                "the loader normalizes with."
            )
        return p.clamp(0, 1)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return the normalized model inputs of these pixels."""
        mean, std = self._scale(pixels)
        return (pixels - mean) / std

    def of(self, answer: Answer) -> Answer:
        """Return the model as a function of pixels."""
        return lambda pixels: answer(self.inputs(pixels))

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.mean, self.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


@dataclass(frozen=True)
class Attacked:
    """Result of an attack: images (N, C, H, W) in [0, 1], and which of them are misclassified, (N,)."""

    images: Tensor
    fooled: Bool[Tensor, " N"]


def fgsm(answer: Answer, p: Tensor, y: Int[Tensor, " N"], *, eps: float, norm: Norm = "linf") -> Attacked:
    """Take one step of size ``eps`` along the sign of the gradient (its direction, in l2), starting at the image.

    Reference: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015, arXiv:1412.6572.
    """
    _check_attack(p, eps=eps, norm=norm)
    _, grad, wrong = _gradient(answer, p, y, "ce")
    images = _project(p + eps * _direction(grad, norm), p, eps, norm)
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
    """Run projected gradient ascent from random starts; keep each image's first adversarial version, else the worst.

    The clean image and every iterate count, so a strength of 0 gives the clean accuracy, and more steps never help the
    defender.

    Args:
        answer: pixels -> logits.
        p: images (N, C, H, W) in [0, 1].
        y: labels (N,).
        eps: radius of the ball, in pixels of [0, 1].
        steps: steps per start.
        step: step size; None is 2.5 eps / steps.
        restarts: random starts, each with the next of ``losses``.
        norm: "linf" or "l2".
        losses: "ce", or "margin": the largest other logit minus the label's, whose gradient does not vanish where the
            softmax is saturated.
        stop: stop at an image's first adversarial version; else maximize its margin, for transfer to other models.
        seed: seed of the starts.

    Raises:
        ValueError: if images or the strength are outside [0, 1].

    Reference: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018, arXiv:1706.06083;
    the step is that of their later library. The margin: Carlini and Wagner, 2017, arXiv:1608.04644.
    """
    _check_attack(p, eps=eps, norm=norm)
    if steps < 1 or restarts < 1 or (step is not None and step <= 0) or not set(losses) <= set(LOSSES) or not losses:
        raise ValueError(
            f"pgd needs steps and restarts >= 1, step > 0 and losses of {LOSSES}; got steps={steps}, "
            f"restarts={restarts}, step={step}, losses={tuple(losses)}."
        )
    size = 2.5 * eps / steps if step is None else step
    generator = torch.Generator().manual_seed(seed)
    best, (best_margin, _, fooled) = p.clone(), _gradient(answer, p, y, losses[0])
    for r in range(restarts):
        start = _project(p + _random(p, eps, norm, generator), p, eps, norm)
        rows = torch.nonzero(~fooled)[:, 0] if stop else torch.arange(len(p), device=p.device)
        current = start[rows]
        for i in range(steps + 1):
            if not len(rows):
                break
            value, grad, wrong = _gradient(answer, current, y[rows], losses[r % len(losses)])
            better = (wrong & ~fooled[rows]) | ((wrong == fooled[rows]) & (value > best_margin[rows]))
            best[rows[better]], best_margin[rows[better]] = current[better], value[better]
            fooled[rows[better]] = wrong[better]
            if stop:
                rows, current, grad = rows[~wrong], current[~wrong], grad[~wrong]
            if i < steps:
                current = _project(current + size * _direction(grad, norm), p[rows], eps, norm)
    return Attacked(best, fooled)


@torch.no_grad()
def blind(
    answer: Answer, p: Tensor, y: Int[Tensor, " N"], *, eps: float, norm: Norm = "linf", draws: int = 20, seed: int = 0
) -> Attacked:
    """Run the weakest attack, without gradients: keep the first adversarial one of random points of the ball."""
    _check_attack(p, eps=eps, norm=norm)
    generator = torch.Generator().manual_seed(seed)
    images, fooled = p.clone(), _wrong(answer, p, y)
    for _ in range(draws):
        moved = _project(p + _random(p, eps, norm, generator), p, eps, norm)
        new = _wrong(answer, moved, y) & ~fooled
        images[new], fooled = moved[new], fooled | new
    return Attacked(images, fooled)


def autoattack(
    answer: Answer, p: Tensor, y: Int[Tensor, " N"], *, eps: float, norm: Norm = "linf", batch: int = 250, seed: int = 0
) -> Attacked:
    """Run AutoAttack's standard version (APGD-CE, targeted APGD-DLR, targeted FAB, Square) from its authors' package.

    Reference: Croce and Hein, 2020, arXiv:2003.01690.

    Raises:
        ImportError: if pyautoattack is not installed (extra "robustness").
    """
    try:
        from pyautoattack import AutoAttack  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("AutoAttack needs its authors' package: pip install 'tempering[robustness]'.") from error
    _check_attack(p, eps=eps, norm=norm)
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
    images = _project(images.detach().to(p), p, eps, norm)
    return Attacked(images, _wrong(answer, images, y))


class _Module(nn.Module):
    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, pixels: Tensor) -> Tensor:
        return self.answer(pixels)


def _check_attack(p: Tensor, *, eps: float, norm: str) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f'norm must be "linf" or "l2"; got {norm!r}.')
    if eps < 0 or (norm == "linf" and eps > 1):
        raise ValueError(f"eps in {norm} must be in [0, 1], in pixels of [0, 1], such as 8/255; got eps={eps:.4g}.")
    if len(p) and not (float(p.min()) >= 0 and float(p.max()) <= 1):
        raise ValueError(
            f"an attack starts at pixels in [0, 1] and stays there; got {float(p.min()):.3g} to {float(p.max()):.3g}. "
            "Attack Pixels(mean, std).pixels(inputs), not normalized inputs."
        )


def _gradient(answer: Answer, p: Tensor, y: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (the margin (N,), the gradient of the loss in each image, whether each is misclassified)."""
    with torch.enable_grad():
        leaf = p.detach().requires_grad_()
        z = answer(leaf)
        margins = margin(z, y)
        loss = nn.functional.cross_entropy(z, y, reduction="none") if kind == "ce" else margins
        grad = torch.autograd.grad(loss.sum(), leaf)[0]
    return margins.detach().to(p.dtype), grad, z.detach().argmax(-1) != y


def margin(z: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the largest other logit minus the label's, (N,): positive if misclassified; 0 with one class."""
    if z.shape[1] == 1:
        return 0 * z[:, 0]
    label_mask = nn.functional.one_hot(y, z.shape[1]).bool()
    return z.masked_fill(label_mask, -torch.inf).max(-1).values - z.gather(1, y[:, None])[:, 0]


@torch.no_grad()
def _wrong(answer: Answer, p: Tensor, y: Tensor) -> Tensor:
    return answer(p).argmax(-1) != y


def _direction(grad: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return grad.sign()
    length = torch.linalg.vector_norm(grad.flatten(1), dim=1).clamp_min(1e-12)
    return grad / length.view(-1, 1, 1, 1)


def _random(p: Tensor, eps: float, norm: str, generator: torch.Generator) -> Tensor:
    """Sample uniformly in the ball, on the CPU, so that every device starts at the same points."""
    if norm == "linf":
        return eps * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1).to(p.device)
    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
    radius = torch.rand(len(p), generator=generator, dtype=p.dtype).to(p.device) ** (1 / max(1, p[0].numel()))
    return eps * radius.view(-1, 1, 1, 1) * _direction(noise, norm)


def _project(moved: Tensor, p: Tensor, eps: float, norm: str) -> Tensor:
    """Project onto the ball around ``p``, then onto [0, 1], which stays in the ball."""
    delta = moved - p
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        delta = delta * (eps / length).clamp(max=1)
    return (p + delta).clamp(0, 1)
