"""Collective operations used by the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.rows import upcast_to_float32

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def check_splittable(method: Method, *, accumulate: int = 1, world: int = 1) -> None:
    """Check that splitting a step into micro-batches or over processes does not change the loss or what is learned.

    Raises:
        ValueError: for a method that compares rows or trains the teacher, in several micro-batches or processes; or
            for an adaptive policy in several processes.
    """
    split, parts = ("accumulate", accumulate) if accumulate > 1 else ("devices", world)
    if method.trains_teacher and parts > 1:
        raise ValueError(
            f"{type(method).__name__} trains the teacher on each batch before the student, which {split}="
            f"{parts} would change. Use {split}=1."
        )
    if parts > 1 and method.is_batch_dependent():
        raise ValueError(
            f"{type(method).__name__} compares rows with each other, so its loss depends on how a step is split: "
            f"{split}={parts} would change it. Use {split}=1 and smaller batches, or a method over single rows."
        )
    if world > 1 and (adaptive := method.adaptive_policies()):
        raise ValueError(
            f"{', '.join(type(p).__name__ for p in adaptive)} learns from the effect of a step on the rows of its own "
            f"process, so {world} processes would learn {world} different temperatures. Use devices=1, or another "
            "policy."
        )


@torch.no_grad()
def broadcast_parameters(module: nn.Module, fabric: Fabric) -> None:
    """Broadcast parameters and buffers from rank 0."""
    if fabric.world_size == 1:
        return
    for value in (*module.parameters(), *module.buffers()):
        tensor = value.to(fabric.device).contiguous()
        torch.distributed.broadcast(tensor, src=0)
        value.copy_(tensor)


def global_row_weights(weights: list[Mapping[str, Tensor | float]], fabric: Fabric) -> dict[str, Tensor | float]:
    """Sum the weights of rows over micro-batches and ranks: block name -> total weight in the optimizer step."""
    summed: dict[str, Any] = {}
    for batch in weights:
        for name, weight in batch.items():
            summed[name] = summed.get(name, 0.0) + weight
    if fabric.world_size == 1:
        return summed
    names = sorted(summed)
    stacked = torch.stack([torch.as_tensor(summed[n], dtype=torch.float64).cpu() for n in names])
    stacked = _all_reduce(stacked.to(fabric.device), fabric, "sum")
    return dict(zip(names, stacked.unbind(), strict=True))


def all_reduce_gradients(method: nn.Module, fabric: Fabric) -> None:
    """Average the method's gradients over ranks, as the strategy averages the student's."""
    if fabric.world_size > 1:
        for p in method.parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = _all_reduce(grad, fabric, "mean")


@torch.no_grad()
def clip_grad_norm(optimizer: Any, fabric: Fabric, max_norm: float) -> None:
    """Clip the total norm of all gradients, sharded (FSDP) and unsharded ones together.

    A norm that is not finite makes them NaN; the loss scaler of fp16 has found the overflow by then and skips the step.
    """
    from torch.distributed.tensor import DTensor

    def local(x: Tensor) -> Tensor:
        return x.to_local() if isinstance(x, DTensor) else x

    def full(x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, DTensor) else x

    fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    kinds = ([g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)])
    norms = [upcast_to_float32(full(torch.nn.utils.get_total_norm(kind))) for kind in kinds if kind]
    if norms:
        total_norm = cast("Tensor", torch.linalg.vector_norm(torch.stack(norms)))  # pyright: ignore[reportUnknownMemberType]
        factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
        for g in grads:
            local(g).mul_(factor)


def all_reduce_mean(value: float, fabric: Fabric) -> float:
    """Average a number over ranks."""
    if fabric.world_size == 1:
        return value
    tensor = torch.tensor(value, device=fabric.device, dtype=torch.float64)
    return float(_all_reduce(tensor, fabric, "mean"))


def _all_reduce(tensor: Tensor, fabric: Fabric, op: Literal["sum", "mean"]) -> Tensor:
    return cast("Tensor", fabric.all_reduce(tensor, reduce_op=op))  # pyright: ignore[reportUnknownMemberType]


def all_gather_objects(value: Any, fabric: Fabric) -> list[Any]:
    """Gather a picklable object from every rank, in the order of ranks."""
    if fabric.world_size == 1:
        return [value]
    objects: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(objects, value)  # pyright: ignore[reportUnknownMemberType]
    return objects
