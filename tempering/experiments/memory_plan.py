"""Plan the memory and the computation of a distillation step of language models, without allocating either."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.conformance.memory import peak_bytes
from tempering.kernels.chunked import OTHER_DEVICES
from tempering.methods.base import Method
from tempering.rows import Rows, total
from tempering.training.checks import MIN_LOGITS, chunking_for
from tempering.training.gradient_checkpointing import gradient_checkpointing

Loss = Literal["default", "logits", "chunks", "linear"]
Precision = Literal["32-true", "bf16-true", "bf16-mixed"]
Optimizer = Literal["adamw", "sgd", "adamw8bit"]
Build = Callable[[torch.dtype], nn.Module]
STATE = {"adamw": 2.0, "sgd": 1.0, "adamw8bit": 0.5}  # bytes of state per byte of the trained weights


@dataclass(frozen=True)
class StepPlan:
    """Memory in bytes, and operations, of one step on one device.

    ``working`` is what the step needs at its most beside the gradients: activations, logits and copies of the loss.
    ``accumulating`` is the same where all gradients are there from the start, as in a second micro-batch, or sharded.
    ``flops`` counts a multiplication and an addition as two, in the teacher's forward, the student's, and backward.
    ``loss`` is how the loss is computed, never "default". ``largest`` is the largest module that sharding gathers.
    """

    parameters: int
    trained: int
    teacher_parameters: int
    rows: int
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    working: int
    accumulating: int
    largest: int
    flops: int
    loss: Loss

    @property
    def peak(self) -> int:
        """Return the bytes of everything together."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.working

    def sharded(self, processes: int) -> int:
        """Return the bytes per device where FSDP2 shards both models' weights, gradients and state over processes.

        One module of the student is whole at a time, and the next one is gathered while it computes.
        """
        if processes == 1:
            return self.peak
        shared = self.weights + self.gradients + self.optimizer + self.teacher
        return -(-shared // processes) + self.accumulating + 2 * self.largest


def plan_step(
    student: Build,
    teacher: Build | None,
    *,
    batch_size: int,
    length: int,
    method: Method,
    loss: Loss = "default",
    precision: Precision = "bf16-mixed",
    teacher_dtype: torch.dtype = torch.bfloat16,
    optimizer: Optimizer = "adamw",
    checkpointing: bool = False,
    memory: int | None = None,
) -> StepPlan:
    """Run a step of causal language models of transformers on tensors without values, and return what it would take.

    Both models run whole: their activations are those that autograd stores, with an attention that does not store its
    (T, T) scores. The copies of the logits that the method makes are measured on a few rows with values. Not included:
    an allocator's fragmentation, the context of a device, the workspaces of its kernels, and the updates of optimizers
    that are not fused.

    Args:
        student, teacher: build the models in a dtype; called where tensors have no values. None: no live teacher.
        batch_size: texts in the micro-batch.
        length: tokens per text. Every token but the first is learned.
        loss: "default": as the engine and the adapters compute it, in chunks from 2^22 logits on; "logits": from whole
            logits; "chunks": ``kernels.chunked``; "linear": ``kernels.linear_loss``.
        precision: of the student, as ``TrainConfig.precision``; "bf16-mixed" stores float32 weights.
        optimizer: "adamw", "sgd" (with momentum) or "adamw8bit", with fused updates.
        checkpointing: whether the student's layers compute their activations again in backward.
        memory: bytes for the copies of one chunk; None: the kernels' own on devices other than the CPU.

    Raises:
        ValueError: for sizes below 1, lengths below 2, or a method that cannot be computed in chunks.
    """
    if batch_size < 1 or length < 2:
        raise ValueError(f"a step needs batch_size >= 1 and length >= 2; got {batch_size} and {length}.")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    copies, counter = logit_copies(method), FlopCounterMode(display=False)
    with FakeTensorMode():
        net = _without_values(student, torch.bfloat16 if precision == "bf16-true" else torch.float32).train()
        other = None if teacher is None else _without_values(teacher, teacher_dtype).requires_grad_(False).eval()
        rows, vocabulary = batch_size * (length - 1), len(net.get_output_embeddings().weight)
        chosen = _chosen(loss, method, rows * vocabulary)
        ids = torch.zeros(batch_size, length, dtype=torch.long)
        step = _Step(net, other, ids, chosen, copies, memory or OTHER_DEVICES, precision == "bf16-mixed")
        with gradient_checkpointing(net, nullcontext()) if checkpointing else nullcontext():
            peak = peak_bytes(step)
            later = peak_bytes(step)
            with counter:  # apart: its hooks keep activations that checkpointing frees
                step()
        gradients = _bytes(p for p in net.parameters() if p.requires_grad)
        return StepPlan(
            parameters=sum(p.numel() for p in net.parameters()),
            trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
            teacher_parameters=0 if other is None else sum(p.numel() for p in other.parameters()),
            rows=rows,
            weights=_bytes([*net.parameters(), *net.buffers()]),
            gradients=gradients,
            optimizer=int(STATE[optimizer] * gradients),
            teacher=0 if other is None else _bytes([*other.parameters(), *other.buffers()]),
            working=peak - gradients,
            accumulating=later,
            largest=max(_bytes(m.parameters()) for m in _gathered(net)),
            flops=counter.get_total_flops() + (step.head_flops() if chosen == "linear" else 0),
            loss=chosen,
        )


def logit_copies(method: Method, rows: int = 32, classes: int = 1024) -> float:
    """Measure the memory of a method's loss and its backward on a few rows, in float32 arrays of their logits."""
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    held = Rows(z.requires_grad_(), t, torch.randint(classes, (rows,), generator=generator))
    return peak_bytes(lambda: total(method(held), held).backward()) / (4 * rows * classes)


def _chosen(loss: Loss, method: Method, logits: int) -> Loss:
    """Return how this number of logits becomes the loss.

    Raises:
        ValueError: for a method that chunks cannot compute.
    """
    independent = chunking_for(method) is not None
    if loss in ("chunks", "linear") and not independent:
        raise ValueError(f"{method} compares rows or owns its step, which chunks cannot compute. Use loss='logits'.")
    if loss == "default":
        return "chunks" if independent and logits >= MIN_LOGITS else "logits"
    return loss


@dataclass(frozen=True)
class _Step:
    """One step of both models on tensors without values, with a loss that only takes its memory."""

    student: Any
    teacher: Any
    ids: Tensor
    loss: Loss
    copies: float
    memory: int
    mixed: bool

    def __call__(self) -> Tensor | None:
        with torch.no_grad():
            t = None if self.teacher is None else self._rows(self.teacher)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            z = self._rows(self.student)
        if self.loss == "linear":
            head = self.student.get_output_embeddings().weight
            logits = 4 * len(z) * len(head)
            # both sides' logits, and the copies made of them
            value = _Taken.apply(z, min(self.memory, 2 * logits) + min(self.memory, int(self.copies * logits)), True)
            if head.requires_grad:
                value = value + _Taken.apply(head, 0, True)
        else:
            copied = int(self.copies * 4 * z.numel())
            in_chunks = self.loss == "chunks"
            value = _Taken.apply(z, min(copied, self.memory) if in_chunks else copied, in_chunks)
        value.backward()
        return t

    def head_flops(self) -> int:
        """Return the operations of both heads: their products run inside the loss."""
        rows = self.ids.shape[0] * (self.ids.shape[1] - 1)
        heads = [model.get_output_embeddings().weight for model in (self.student, self.teacher) if model is not None]
        products = [2 * rows * head.numel() for head in heads]
        return products[0] * (3 if heads[0].requires_grad else 2) + sum(products[1:])

    def _rows(self, model: Any) -> Tensor:
        """Return a copy of the logits of learned tokens, (N, V), or of the states before the head, (N, H)."""
        if self.loss == "linear":
            out = model.get_decoder()(input_ids=self.ids, use_cache=False).last_hidden_state
        else:
            out = model(input_ids=self.ids, use_cache=False).logits
        return out.flatten(0, 1).index_select(0, torch.arange(self.ids.shape[0] * (self.ids.shape[1] - 1)))


class _Taken(torch.autograd.Function):
    """A scalar whose computation takes this many bytes, with a gradient of its input's shape.

    With ``early`` the gradient is computed in forward, beside these bytes; otherwise it is part of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: int, early: bool) -> Tensor:
        ctx.slope = torch.empty_like(x) if early else None
        ctx.like = x
        torch.empty(held, dtype=torch.uint8)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        slope, ctx.slope = ctx.slope, None  # given away: a gradient that is held elsewhere would be copied
        return torch.empty_like(ctx.like) if slope is None else slope, None, None


def _without_values(build: Build, dtype: torch.dtype) -> Any:
    """Build a model with shapes alone, and put tensors of the current mode in place of its weights."""
    with torch.device("meta"):
        model = build(dtype)
    made: dict[Tensor, Tensor] = {}  # shared weights stay shared
    for module in model.modules():
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name, x in held.items():
                if x is not None and x not in made:
                    y = torch.empty(x.shape, dtype=x.dtype)
                    made[x] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
                held[name] = None if x is None else made[x]
    return model


def _gathered(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 gathers one after the other: each layer of a stack, and the embeddings."""
    layers = [m for stack in model.modules() if isinstance(stack, nn.ModuleList) for m in stack]
    return [*layers, *(m for m in model.modules() if isinstance(m, nn.Embedding))]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
