"""Shadow models: networks with the audited architecture, each trained on a random half of the samples."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.audits.base import as_function, frozen_eval_mode
from tempering.audits.membership import confidence
from tempering.utils.tensors import copy_model


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy with new initial weights, in training mode; the global random state is restored.

    Raises:
        ValueError: if some module with parameters has no ``reset_parameters``.
    """
    shadow = copy_model(model).requires_grad_(True).train()
    for name, module in shadow.named_modules():
        parameters = [n for n, _ in module.named_parameters(recurse=False)]
        if parameters and not callable(getattr(module, "reset_parameters", None)):
            raise ValueError(
                f"shadow models need the net with new weights, and {name or 'the net'} ({type(module).__name__}) has "
                f"{parameters[0]} but no reset_parameters(). Give shadows=0, or a net of torch's layers."
            )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in shadow.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return shadow


def halves(n: int, count: int, seed: int) -> Bool[Tensor, "S N"]:
    """Return which half of the samples each of ``count`` shadows is trained on.

    Halves come in complementary pairs, so every sample is left out by half of the shadows.
    """
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(count, n, dtype=torch.bool)
    for s in range(count):
        out[s] = ~out[s - 1] if s % 2 else torch.randperm(n, generator=generator) < n // 2
    return out


def train(model: nn.Module, x: Tensor, y: Int[Tensor, " N"], *, epochs: int, lr: float, batch: int, seed: int) -> None:
    """Train in place with cross-entropy by SGD (momentum 0.9, weight decay 5e-4, cosine to 0), without augmentation."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * max(1, len(y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    forward = as_function(model, "shadow")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        for _ in range(epochs):
            order = torch.randperm(len(y), generator=generator)
            for rows in order.tensor_split(max(1, len(y) // batch)):
                loss = nn.functional.cross_entropy(forward(x[rows]), y[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def shadow_confidence(
    model: nn.Module, x: Tensor, y: Int[Tensor, " N"], *, count: int, epochs: int, lr: float, batch: int, seed: int
) -> tuple[Float[Tensor, "S N"], Bool[Tensor, "S N"]]:
    """Train shadows; return their confidence in each sample, and which samples each was not trained on, (S, N) each."""
    trained_on, scores = halves(len(y), count, seed), []
    for s in range(count):
        shadow = fresh(model, seed + s)
        train(shadow, x[trained_on[s]], y[trained_on[s]], epochs=epochs, lr=lr, batch=batch, seed=seed + s)
        with frozen_eval_mode(shadow), torch.no_grad():
            z = torch.cat([as_function(shadow, "shadow")(part).cpu().double() for part in x.split(500)])
        scores.append(confidence(z, y))
    return torch.stack(scores), ~trained_on
