"""What a student would say: its rows at other weights, and how its logits move along a direction. No trace is left."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempering.methods.base import Step
from tempering.rows import Rows, upcast_to_float32

Weights = Mapping[str, Tensor]
STEP = 0.01  # of the finite difference, over the direction's length


class VirtualStep:
    """A student at weights that need not be its own.

    Every call draws the same random numbers, so that dropout leaves out the same units; buffers and the generators are
    afterwards as they were.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        # every place of a parameter (tied ones have several) by the name of its first; a wrapper shows one module twice
        first: dict[Tensor, str] = {}
        self.modules: dict[str, str] = {}
        for path, module in student.named_modules():
            for name, p in module.named_parameters(path, recurse=False):
                if p.requires_grad:
                    self.modules[name] = first.setdefault(p, name)
        self.weights = {name: p for p, name in first.items()}
        self.device = next(iter(self.weights.values())).device
        self.seed = int(torch.randint(2**31, ()))

    def rows(self, step: Step, weights: Weights) -> Rows:
        """What the student answers to the step's inputs, as rows without a teacher."""
        values = {name: b.clone() for name, b in self.student.named_buffers()}
        values |= {place: weights[name] for place, name in self.modules.items()}
        with self._same_draws():
            said = functional_call(self.student, values, (step.student_inputs,), tie_weights=False)
            return step.student_rows(said)

    def slope(self, loss: Float[Tensor, ""], weights: Weights) -> dict[str, Tensor]:
        """The gradient of ``loss`` in the weights; 0 in those that take no part."""
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(weights, found, strict=True))

    @torch.no_grad()
    def along(self, step: Step, direction: Weights, *, exact: bool) -> Float[Tensor, "N C"]:
        """How fast the logits of the step's rows move as the student's weights go in ``direction``, (N, C).

        ``exact`` is one forward pass in forward mode, with attention through torch's math kernel; else a central
        difference of two passes, which any kernel can do. A masked class does not move.
        """
        if exact:
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                dual = {name: _dual(w.detach(), direction[name]) for name, w in self.weights.items()}
                z = self.rows(step, dual).student
                primal, tangent = forward_ad.unpack_dual(z)
                moved = torch.zeros_like(primal) if tangent is None else tangent
        else:
            length = torch.stack([v.double().square().sum() for v in direction.values()]).sum().sqrt()
            eps = STEP / float(length) if length > 0 else 1.0
            primal, below = (
                self.rows(step, {n: w + by * direction[n] for n, w in self.weights.items()}).student
                for by in (eps, -eps)
            )
            moved = (upcast_to_float32(primal) - upcast_to_float32(below)) / (2.0 * eps)
        return upcast_to_float32(moved).masked_fill(torch.isneginf(primal), 0.0)

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):
            torch.default_generator.manual_seed(self.seed)
            if on_gpu:
                torch.cuda.manual_seed(self.seed)
            yield


def split_step(step: Step, share: float) -> tuple[Step, Step] | None:
    """The step's samples in two: the first ones, and the last ``share`` of them; None for fewer than two samples."""
    n = _count(step.student_inputs)
    held = min(max(1, round(share * n)), n - 1)
    if n < 2:
        return None
    first, last = (
        replace(
            step,
            student_inputs=_cut(step.student_inputs, part, n),
            teacher_inputs=_cut(step.teacher_inputs, part, n),
            ids=_cut(step.ids, part, n),
            batch=_cut(step.batch, part, n),
        )
        for part in (slice(None, n - held), slice(n - held, None))
    )
    return first, last


def _count(value: Any) -> int:
    """How many samples a nest of tensors holds."""
    if isinstance(value, Tensor):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value
    return _count(next(part for part in parts if not isinstance(part, (str, int, float, bool, type(None)))))


def _cut(value: Any, part: slice, n: int) -> Any:
    """The same nest with those samples of every tensor that has ``n``."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == n else value
    if isinstance(value, Mapping):
        return {key: _cut(item, part, n) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut(item, part, n) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(item, part, n) for item in value)
    return value


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # torch's own, where it first makes a dual number
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
        return forward_ad.make_dual(primal, tangent)
