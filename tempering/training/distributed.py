"""What the processes of one run owe each other: the same start, whole steps, shared gradients and means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tempering.methods.base import Method, StepMethod
from tempering.rows import widened

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def refuse_split(method: Method, *, accumulate: int = 1, world: int = 1) -> None:
    """Refuse what would change a loss, or what is learned, by splitting a step.

    Raises:
        ValueError: for a relational method, or one that trains the teacher, in several micro-batches or processes; or
            for a learning policy in several processes.
    """
    if isinstance(method, StepMethod) and method.trains_teacher and max(accumulate, world) > 1:
        split, whole = ("accumulate", accumulate) if accumulate > 1 else ("devices", world)
        raise ValueError(
            f"{type(method).__name__} lets the teacher learn from each batch before the student does, which {split}="
            f"{whole} would change. Use {split}=1."
        )
    if method.is_relational() and max(accumulate, world) > 1:
        split, whole = ("accumulate", accumulate) if accumulate > 1 else ("devices", world)
        raise ValueError(
            f"{type(method).__name__} compares rows with each other, so its loss depends on how a step is split: "
            f"{split}={whole} would change it. Use {split}=1 and smaller batches, or a method over single rows."
        )
    if world > 1 and (learners := method.learners()):
        raise ValueError(
            f"{', '.join(type(p).__name__ for p in learners)} learns from what a step did to the rows of its own "
            f"process, so {world} processes would learn {world} different temperatures. Use devices=1, or another "
            "policy."
        )


@torch.no_grad()
def alike(module: nn.Module, fabric: Fabric) -> None:
    """Give every process the first one's parameters and buffers."""
    if fabric.world_size == 1:
        return
    for value in (*module.parameters(), *module.buffers()):
        held = value.to(fabric.device).contiguous()
        torch.distributed.broadcast(held, src=0)
        value.copy_(held)


def whole_mass(masses: list[Mapping[str, Tensor | float]], fabric: Fabric) -> dict[str, Tensor | float]:
    """Block name -> weight of its rows in the whole step, from this process's micro-batches."""
    summed: dict[str, Any] = {}
    for batch in masses:
        for name, mass in batch.items():
            summed[name] = summed.get(name, 0.0) + mass
    if fabric.world_size == 1:
        return summed
    names = sorted(summed)
    stacked = torch.stack([torch.as_tensor(summed[n], dtype=torch.float64).cpu() for n in names])
    stacked = fabric.all_reduce(stacked.to(fabric.device), reduce_op="sum")
    return dict(zip(names, stacked.unbind(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]


def share_gradients(method: nn.Module, fabric: Fabric) -> None:
    """Average the gradients of what the strategy does not wrap, as it does with the student's."""
    if fabric.world_size > 1:
        for p in method.parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = fabric.all_reduce(grad, reduce_op="mean")  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def clip(optimizer: Any, fabric: Fabric, *, max_norm: float) -> None:
    """Scale all gradients down together to this norm, those in parts on several ranks (FSDP) and those whole.

    A norm that is not finite scales them to NaN, which fp16's scaler has seen by then and skips.
    """
    from torch.distributed.tensor import DTensor

    def here(x: Tensor, whole: bool) -> Tensor:
        return (x.full_tensor() if whole else x.to_local()) if isinstance(x, DTensor) else x

    fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    kinds = ([g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)])
    norms = [widened(here(torch.nn.utils.get_total_norm(kind), True)) for kind in kinds if kind]
    if norms:
        factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        for g in grads:
            here(g, False).mul_(factor)


def mean_over_ranks(value: float, fabric: Fabric) -> float:
    """The processes' mean of a number that each has its own of."""
    if fabric.world_size == 1:
        return value
    tensor = torch.tensor(value, device=fabric.device, dtype=torch.float64)
    return float(fabric.all_reduce(tensor, reduce_op="mean"))  # pyright: ignore[reportArgumentType]


def of_every_rank(value: Any, fabric: Fabric) -> list[Any]:
    """What every process has here, in the order of ranks."""
    if fabric.world_size == 1:
        return [value]
    out: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(out, value)
    return out
