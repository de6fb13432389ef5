"""Losses computed from hidden states: logits are computed for a chunk of rows at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tempering.kernels.chunked import OTHER_DEVICES, Chunked, ChunkedLoss, parts
from tempering.kernels.compiled import Wanted
from tempering.methods.base import Method
from tempering.rows import Rows
from tempering.teachers.outputs import Head
from tempering.utils.device import has_native_bf16

LastLayer = nn.Linear | Tensor | Head
LOGITS = {"cpu": 2**25}  # bytes of both sides' logits per chunk
ROWS = 256  # minimum rows per chunk if memory is None: with fewer, matrix products are slow and need more workspace
BLOCK = 2**22  # elements of a head upcast at once, where torch cannot accumulate in float32


def linear_loss(
    method: Method,
    hidden_student: Tensor,
    head_student: LastLayer,
    hidden_teacher: Tensor,
    head_teacher: LastLayer,
    *,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    positions: Tensor | None = None,
    privacy_score: Tensor | None = None,
    sampled_id: Tensor | None = None,
    rollout_log_prob: Tensor | None = None,
    text: Tensor | None = None,
    reward: Tensor | None = None,
    progress: float = 1.0,
    normalizer: Tensor | float | None = None,
    classes: int | None = None,
    allowed: Tensor | None = None,
    upcast: bool = True,
    memory: int | None = None,
    compile: Wanted = None,
    name: str = "logits",
) -> Chunked:
    """``total`` of the method on the logits of two heads, computed per chunk of rows, without storing (N, C) logits.

    The gradients in the student's hidden states, and in its head if that requires grad, are computed in forward, and
    backward can run once. Supports any row-wise method and policy, as ``chunked``, which it uses. A CPU without
    instructions for the inputs' half precision gets float32 copies of both sides, for the time of the call.

    Args:
        method: row-wise.
        hidden_student: (N, H), with gradient.
        head_student: nn.Linear, its weight (C, H), or ``teachers.outputs.Head`` with a logit scale and a soft cap, as
            ``teachers.cache.hidden.head_of(model)`` returns: for Gemma, Cohere, Granite.
        hidden_teacher: (N, H'), without gradient.
        head_teacher: the same for the teacher; it is never trained.
        target: (N,) class indices, negative for none.
        weight: (N,), non-negative.
        ids, positions, privacy_score, sampled_id, rollout_log_prob, text, reward: (N,) each, as in ``Rows``, for
            methods that need them.
        progress: the fraction of the run that is done.
        normalizer: as for ``total``.
        classes: number of classes of each head to use, from the first, if a vocabulary is padded.
        allowed: (C,) bool; the other classes are minus infinity on both sides.
        upcast: compute logits of half-precision inputs, and sum the head's gradient, in float32. False rounds both to
            the inputs' dtype: faster, and half the memory for the head. The error of DTKD's gradient in bf16 then has
            no bound, as its temperatures divide differences of logits: 0.2 to 28 % of its norm were measured, most
            where the logits of a row are large compared to their differences.
        memory: bytes of both sides' logits at once, and again for the computation on a chunk of them. None: 32 MiB on a
            CPU, 256 MiB elsewhere, at least 256 rows, and the default of ``chunked``.
        compile: as for ``chunked``.
        name: of the rows, in errors.

    Raises:
        ValueError: for shapes that do not match, a teacher that requires grad, or a method that is not row-wise.
        RuntimeError: in a second backward.
    """
    student, teacher = _Side(hidden_student, head_student, classes), _Side(hidden_teacher, head_teacher, classes)
    row_fields = {
        "target": target,
        "weight": weight,
        "ids": ids,
        "positions": positions,
        "privacy_score": privacy_score,
        "sampled_id": sampled_id,
        "rollout_log_prob": rollout_log_prob,
        "text": text,
        "reward": reward,
    }
    _check_shapes(student, teacher, name, row_fields, allowed=allowed)
    if hidden_teacher.requires_grad:
        raise ValueError(
            f"linear_loss(name={name!r}): the teacher's hidden states require grad, so the teacher would be trained. "
            "Compute them under torch.no_grad()."
        )
    n, C = len(hidden_student), student.weight.shape[0]
    divisor = normalizer
    if divisor is None:
        divisor = float(n) if weight is None else weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
    chunked_loss = ChunkedLoss(method, progress, divisor, memory, n)
    budget = memory or LOGITS.get(hidden_student.device.type, OTHER_DEVICES)
    chunk_size = max(1, budget // (2 * C * (8 if student.weight.dtype == torch.float64 else 4) or 1))
    chunk_size = max(ROWS, chunk_size) if memory is None else chunk_size
    slopes = student.slopes(hidden_student, head_student, upcast=upcast)
    not_allowed = None if allowed is None else ~allowed
    with torch.autocast(hidden_student.device.type, enabled=False):
        buffers = student.buffer(min(chunk_size, n)), teacher.buffer(min(chunk_size, n))
        for part in parts(n, chunk_size):
            with torch.no_grad():
                v, u = (
                    x.logits(part, not_allowed, to, upcast=upcast)
                    for x, to in zip((student, teacher), buffers, strict=True)
                )
            # the gradient may overwrite logits that are no longer needed; a cap's derivative needs the student's logits
            slope = v if student.cap is None else u if u.dtype == v.dtype else torch.empty_like(v)
            fields = {key: x[part] for key, x in row_fields.items() if x is not None}
            if not chunked_loss.chunks:
                chunked_loss.compile(compile, v, n * C)
            chunked_loss.add(Rows(v, u, name=name).replace(**fields), slope if slopes else None)
            if slopes:
                student.backward(student.undo_scale_and_cap(slope, v, not_allowed), part)
    return chunked_loss.result(slopes)


class _Side:
    """One model's last layer: hidden states, head, and the gradients in them."""

    def __init__(self, hidden: Tensor, head: LastLayer, classes: int | None) -> None:
        if not isinstance(head, LastLayer):
            raise ValueError(
                f"linear_loss needs a teachers.outputs.Head, an nn.Linear or its weight (C, H); got "
                f"{type(head).__name__}. A head with an adapter (LoRA)? Pass the merged weight, or leave the head out "
                "of its target_modules."
            )
        weight, bias = _tensors_of(head)
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.scale, self.cap = (head.scale, head.cap) if isinstance(head, Head) else (1.0, None)
        if hidden.ndim != 2 or self.weight.ndim != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"linear_loss needs hidden states (N, H) and a head (C, H); got {tuple(hidden.shape)} and "
                f"{tuple(self.weight.shape)}. More dimensions? Flatten them: hidden.flatten(0, -2)."
            )
        if hidden.dtype != self.weight.dtype:
            raise ValueError(
                f"linear_loss needs hidden states and their head in one dtype; got {hidden.dtype} and "
                f"{self.weight.dtype}. Under autocast: hidden.to(head.weight.dtype), or the head in bfloat16."
            )
        if classes is not None:
            if not 0 < classes <= len(self.weight):
                raise ValueError(f"classes must be from 1 to {len(self.weight)}, the head's own; got {classes}.")
            self.weight = self.weight[:classes]
            self.bias = None if self.bias is None else self.bias[:classes]
        self.dtype = self.weight.dtype
        self.half = self.dtype in (torch.bfloat16, torch.float16)
        if self.half and not _multiplies(self.dtype, self.weight.device):
            self.hidden, self.weight = self.hidden.float(), self.weight.float()
        self.by_hidden: Tensor | None = None
        self.by_weight: Tensor | None = None
        self.by_bias: Tensor | None = None

    def buffer(self, rows: int) -> Tensor:
        """Allocate a buffer for the logits of a chunk, reused for all chunks to avoid heap fragmentation."""
        dtype = torch.float32 if self.half else self.weight.dtype
        return torch.empty(rows, len(self.weight), dtype=dtype, device=self.weight.device)

    def logits(self, part: slice, not_allowed: Tensor | None, buffer: Tensor, *, upcast: bool) -> Tensor:
        """The logits of a slice of rows, (n, C), in at least float32, written into ``buffer``."""
        x = self.hidden[part]
        z = buffer[: len(x)]
        if x.dtype not in (torch.bfloat16, torch.float16):
            torch.mm(x, self.weight.T, out=z)
            if not upcast and self.dtype != x.dtype:
                z.copy_(z.to(self.dtype))
        elif not upcast:
            z.copy_(x @ self.weight.T)
        elif x.is_cuda:
            z = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        elif x.dtype == torch.bfloat16 and _subtracts_first():
            for block in self._blocks():
                head = self.weight[block].T
                rounded = x @ head
                z[:, block] = rounded
                z[:, block] += torch.addmm(rounded, x, head, beta=-1.0)  # the rounding error
        else:
            x = x.float()
            for block in self._blocks():
                torch.mm(x, self.weight[block].float().T, out=z[:, block])
        if self.bias is not None:
            z += self.bias
        if self.scale != 1.0:
            z *= self.scale
        if self.cap is not None:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z if not_allowed is None else z.masked_fill_(not_allowed, -torch.inf)

    def slopes(self, hidden: Tensor, head: LastLayer, *, upcast: bool) -> list[tuple[Tensor, Tensor]]:
        """Allocate gradients of inputs that require grad, (input, gradient); float32 for the head with ``upcast``."""
        weight, bias = _tensors_of(head)
        if not torch.is_grad_enabled():
            return []
        # float16 would underflow before a loss scale is applied
        dtype = torch.float32 if hidden.dtype == torch.float16 else None
        head_dtype = torch.float32 if self.half and upcast else dtype
        if hidden.requires_grad:
            self.by_hidden = torch.zeros_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
        if weight.requires_grad:
            self.by_weight = torch.zeros_like(weight, dtype=head_dtype, memory_format=torch.contiguous_format)
        if bias is not None and bias.requires_grad:
            self.by_bias = torch.zeros_like(bias, dtype=head_dtype)
        pairs = ((hidden, self.by_hidden), (weight, self.by_weight), (bias, self.by_bias))
        return [(x, buffer) for x, buffer in pairs if x is not None and buffer is not None]

    @torch.no_grad()
    def undo_scale_and_cap(self, slope: Tensor, logits: Tensor, not_allowed: Tensor | None) -> Tensor:
        """Convert the gradient in logits, (n, C), to one before scale and cap; overwrites both tensors."""
        if self.cap is not None:
            capped = logits if not_allowed is None else logits.masked_fill_(not_allowed, 0.0)
            slope *= capped.div_(self.cap).square_().neg_().add_(1.0)
        if self.scale != 1.0:
            slope *= self.scale
        return slope

    @torch.no_grad()
    def backward(self, slope: Tensor, part: slice) -> None:
        """Backpropagate the gradient in a slice's logits, (n, C), to the hidden states and the head."""
        x, C = self.hidden[part], len(self.weight)
        g = slope.to(x.dtype) if x.dtype == torch.bfloat16 else slope
        if self.by_hidden is not None:
            if x.dtype == torch.float16:
                for block in self._blocks():
                    self.by_hidden[part] += g[:, block] @ self.weight[block].float()
            else:
                self.by_hidden[part] = g @ self.weight
        if self.by_weight is not None:
            x = x.float() if x.dtype == torch.float16 else x
            for block in self._blocks():
                if g.dtype == self.by_weight.dtype:
                    self.by_weight[block].addmm_(g[:, block].T, x)
                else:
                    self.by_weight[block] += g[:, block].T @ x
        if self.by_bias is not None:
            self.by_bias[:C] += slope.sum(0)

    def _blocks(self) -> list[slice]:
        """Slices of the classes for which the part of the head has at most ``BLOCK`` elements."""
        return list(parts(len(self.weight), max(1, BLOCK // self.weight.shape[1])))


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for products in half precision: a CPU without takes up to 100 times as long."""
    return device.type != "cpu" or (dtype == torch.bfloat16 and has_native_bf16(device))


@functools.cache
def _subtracts_first() -> bool:
    """Whether this CPU's library rounds a bfloat16 product minus a tensor once, at the end.

    A product and its rounding error then have a precision of 2^-17, and are faster than a product in float32.
    """
    x, head = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (16, 32))
    rounded, exact = x @ head.T, x.double() @ head.double().T
    total = rounded.double() + torch.addmm(rounded, x, head.T, beta=-1.0)
    return bool((total - exact).norm() < 2e-5 * exact.norm())


def _tensors_of(head: LastLayer) -> tuple[Tensor, Tensor | None]:
    return (head, None) if isinstance(head, Tensor) else (head.weight, head.bias)


def _check_shapes(
    student: _Side, teacher: _Side, name: str, row_fields: Mapping[str, Tensor | None], *, allowed: Tensor | None
) -> None:
    """Raise ValueError for two sides that do not form rows."""
    C, D = len(student.weight), len(teacher.weight)
    if len(student.hidden) != len(teacher.hidden) or C != D:
        raise ValueError(
            f"linear_loss(name={name!r}) needs equal numbers of rows and classes on both sides; got hidden states "
            f"{tuple(student.hidden.shape)} and {tuple(teacher.hidden.shape)}, heads of {C} and {D} "
            f"classes. A padded vocabulary? Set classes={min(C, D)}."
        )
    for key, x in row_fields.items():
        if x is not None and x.shape != (len(student.hidden),):
            raise ValueError(
                f"linear_loss(name={name!r}) needs {key} of shape (N,) = ({len(student.hidden)},); got "
                f"{tuple(x.shape)}."
            )
    if allowed is not None and (allowed.shape != (len(student.weight),) or allowed.dtype != torch.bool):
        raise ValueError(
            f"linear_loss(name={name!r}) needs allowed of shape (C,) = ({len(student.weight)},) and bool; got "
            f"{tuple(allowed.shape)} of {allowed.dtype}."
        )
