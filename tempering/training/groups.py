"""Parameter groups without weight decay for norms and biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tempering.training.checks import Optimizer, make_optimizer


def split_by_decay(model: nn.Module, student: nn.Module) -> list[dict[str, Any]]:
    """Return the student's trained parameters in two groups: with weight decay, and with ``weight_decay=0``.

    Without decay are parameters of one dimension or none, those named "bias", and those whose names
    ``student.no_weight_decay()`` returns (timm's models), as in timm's ``param_groups_weight_decay``.

    Args:
        model: the student as it is trained, with its wrappers.
        student: the plain model.
    """
    listed: Any = getattr(student, "no_weight_decay", tuple)  # a method of timm's models
    without: tuple[str, ...] = tuple(listed())
    decayed, exempt = list[Tensor](), list[Tensor]()
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_exempt = p.ndim <= 1 or any(f".{name}".endswith(f".{end}") for end in ("bias", *without))
            (exempt if is_exempt else decayed).append(p)
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_without_decay(
    optimizer: Optimizer, model: nn.Module, student: nn.Module, others: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Create the optimizer of the student's two groups and of the others, those of the method.

    Raises:
        ValueError: for an optimizer that decays the exempt parameters all the same.
    """
    groups = split_by_decay(model, student)
    made = make_optimizer(optimizer, [*groups, *others])
    _check_exempt(made, groups)
    return made


def _check_exempt(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    exempt = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(p) in exempt for p in group["params"]):
            raise ValueError(
                f"decay_norms=False (--no-decay-norms) sets weight_decay=0 in groups of norms and biases, and this "
                f"{type(optimizer).__name__} decays them by {group['weight_decay']:g}. Give a function of parameter "
                "groups, such as optimizer=partial(torch.optim.AdamW, lr=1e-3), or leave decay_norms=True."
            )
