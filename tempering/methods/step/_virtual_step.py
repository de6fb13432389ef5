"""Virtual steps: a student's rows at other weights, and directional derivatives of its logits."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tempering.methods.base import Step
from tempering.rows import Rows, upcast_to_float32

Weights = Mapping[str, Tensor]
STEP = 0.01  # of the finite difference, divided by the norm of the direction


class VirtualStep:
    """Forward passes of a student with other weights than its own.

    Every call draws the same random numbers, so that dropout masks are equal; buffers and random generators are
    restored afterwards.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        # every path of a parameter (tied ones have several) -> its first path; wrappers may contain a module twice
        first: dict[Tensor, str] = {}
        self.modules: dict[str, str] = {}
        for path, module in cast("Iterable[tuple[str, nn.Module]]", student.named_modules()):
            for name, p in module.named_parameters(path, recurse=False):
                if p.requires_grad:
                    self.modules[name] = first.setdefault(p, name)
        self.weights = {name: p for p, name in first.items()}
        self.device = next(iter(self.weights.values())).device
        self.seed = int(torch.randint(2**31, ()))

    def rows(self, step: Step, weights: Weights) -> Rows:
        """Return the student's rows for the step's inputs, without a teacher."""
        values = {name: b.clone() for name, b in self.student.named_buffers()}
        values |= {path: weights[name] for path, name in self.modules.items()}
        with self._fixed_rng():
            output = functional_call(self.student, values, (step.student_inputs,), tie_weights=False)
            return step.student_rows(output)

    def gradient(self, loss: Float[Tensor, ""], weights: Weights) -> dict[str, Tensor]:
        """Return the gradient of ``loss`` with respect to the weights; 0 for unused ones."""
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(weights, gradients, strict=True))

    @torch.no_grad()
    def along(self, step: Step, direction: Weights, *, exact: bool) -> Float[Tensor, "N C"]:
        """Return the directional derivative of the logits of the step's rows along ``direction`` of the weights, (N,
        C).

        ``exact``: one pass with forward-mode differentiation, with attention by torch's math kernel; otherwise a
        central difference of two passes, for any kernel. The derivative of a masked class is 0.
        """
        if exact:
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                dual = {name: _dual(w.detach(), direction[name]) for name, w in self.weights.items()}
                z = self.rows(step, dual).student
                primal, tangent = forward_ad.unpack_dual(z)  # pyright: ignore[reportUnknownMemberType]
                derivative = torch.zeros_like(primal) if tangent is None else tangent
        else:
            norm = torch.stack([v.double().square().sum() for v in direction.values()]).sum().sqrt()
            eps = STEP / float(norm) if norm > 0 else 1.0
            primal, below = (
                self.rows(step, {n: w + shift * direction[n] for n, w in self.weights.items()}).student
                for shift in (eps, -eps)
            )
            derivative = (upcast_to_float32(primal) - upcast_to_float32(below)) / (2.0 * eps)
        return upcast_to_float32(derivative).masked_fill(torch.isneginf(primal), 0.0)

    @contextmanager
    def _fixed_rng(self) -> Generator[None, None, None]:
        on_gpu = self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if on_gpu else []):  # pyright: ignore[reportUnknownMemberType]
            torch.default_generator.manual_seed(self.seed)
            if on_gpu:
                torch.cuda.manual_seed(self.seed)
            yield


def split_step(step: Step, share: float) -> tuple[Step, Step] | None:
    """Split the step's samples into the first ones and the last fraction ``share``; None for fewer than two samples."""
    n = _count(step.student_inputs)
    last_n = min(max(1, round(share * n)), n - 1)
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
        for part in (slice(None, n - last_n), slice(n - last_n, None))
    )
    return first, last


def _count(value: Any) -> int:
    """Return the number of samples in a nested structure of tensors."""
    if isinstance(value, Tensor):
        return len(value)
    parts = cast("Iterable[Any]", value.values() if isinstance(value, Mapping) else value)
    return _count(next(part for part in parts if not isinstance(part, (str, int, float, bool, type(None)))))


def _cut(value: Any, part: slice, n: int) -> Any:
    """Slice the samples of every tensor of length ``n`` in a nested structure."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim and len(value) == n else value
    if isinstance(value, Mapping):
        return {key: _cut(item, part, n) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (tuple, list)):
        items = [_cut(item, part, n) for item in cast("Iterable[Any]", value)]
        kind = cast("type[Any]", type(value))  # pyright: ignore[reportUnknownArgumentType]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return value


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # raised by torch at the first dual number
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
        return forward_ad.make_dual(primal, tangent)  # pyright: ignore[reportUnknownMemberType]
