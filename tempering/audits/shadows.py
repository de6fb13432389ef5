"""Shadow models: nets like the audited one, each trained here on a random half of the samples."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.audits.base import as_function, at_rest
from tempering.audits.membership import confidence


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """A copy with new first weights, in training mode; the global random state is left as it was.

    Raises:
        ValueError: for a net some of whose weights nobody knows to draw anew.
    """
    made = copy.deepcopy(model).requires_grad_(True).train()
    for name, module in made.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if own and not callable(getattr(module, "reset_parameters", None)):
            raise ValueError(
                f"shadow models need the net with new weights, and {name or 'the net'} ({type(module).__name__}) has "
                f"{own[0]} and no reset_parameters(). Give shadows=0, or a net of torch's layers."
            )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in made.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return made


def halves(n: int, count: int, seed: int) -> Bool[Tensor, "S N"]:
    """Which samples each of ``count`` shadows is trained on, half of them; a sample and its complement in pairs, so
    that every sample is left out by half of the shadows."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(count, n, dtype=torch.bool)
    for s in range(count):
        out[s] = ~out[s - 1] if s % 2 else torch.randperm(n, generator=generator) < n // 2
    return out


def train(model: nn.Module, x: Tensor, y: Int[Tensor, " N"], *, epochs: int, lr: float, batch: int, seed: int) -> None:
    """Cross-entropy by SGD (momentum 0.9, weight decay 5e-4, a cosine to 0), without augmentation, in place."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * max(1, len(y) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    answer = as_function(model, "shadow")
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        for _ in range(epochs):
            order = torch.randperm(len(y), generator=generator)
            for rows in order.tensor_split(max(1, len(y) // batch)):
                loss = nn.functional.cross_entropy(answer(x[rows]), y[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def shadow_confidence(
    model: nn.Module, x: Tensor, y: Int[Tensor, " N"], *, count: int, epochs: int, lr: float, batch: int, seed: int
) -> tuple[Float[Tensor, "S N"], Bool[Tensor, "S N"]]:
    """Each shadow's confidence in each sample, (S, N), and which samples it was not trained on, (S, N)."""
    taken, said = halves(len(y), count, seed), []
    for s in range(count):
        shadow = fresh(model, seed + s)
        train(shadow, x[taken[s]], y[taken[s]], epochs=epochs, lr=lr, batch=batch, seed=seed + s)
        with at_rest(shadow), torch.no_grad():
            z = torch.cat([as_function(shadow, "shadow")(part).cpu().double() for part in x.split(500)])
        said.append(confidence(z, y))
    return torch.stack(said), ~taken
