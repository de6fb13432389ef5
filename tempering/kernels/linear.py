"""From hidden states to the loss: the logits of a few rows at a time, never all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tempering.kernels.chunked import ELSEWHERE, Chunked, Walk, parts
from tempering.kernels.compiled import Wanted
from tempering.methods.base import Method
from tempering.rows import Rows
from tempering.teachers.outputs import Head

Last = nn.Linear | Tensor | Head
LOGITS = {"cpu": 2**25}  # bytes of both sides' logits
ROWS = 256  # at least, where nobody sets the bytes: with fewer the products are slow, and their library takes more room
BLOCK = 2**22  # numbers of a head that are widened at once, where torch cannot accumulate in float32 by itself


def linear_loss(
    method: Method,
    hidden_student: Tensor,
    head_student: Last,
    hidden_teacher: Tensor,
    head_teacher: Last,
    *,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    positions: Tensor | None = None,
    privacy_score: Tensor | None = None,
    progress: float = 1.0,
    normalizer: Tensor | float | None = None,
    classes: int | None = None,
    allowed: Tensor | None = None,
    wide: bool = True,
    memory: int | None = None,
    compile: Wanted = None,
    name: str = "logits",
) -> Chunked:
    """``total`` of the method on the logits of two heads, made and used a few rows at a time: (N, C) is never held.

    The gradient in the student's hidden states, and in its head where that requires grad, is made on the way, and is
    open once. Any row-wise method and policy will do: see ``chunked``, which runs within.

    Args:
        method: row-wise.
        hidden_student: (N, H), carrying the gradient.
        head_student: nn.Linear, its weight (C, H), or ``answers.Head`` with a logit scale and a soft cap, which
            ``teachers.hidden.head_of(model)`` finds: Gemma's, Cohere's, Granite's.
        hidden_teacher: (N, H'), carrying none.
        head_teacher: the same for the teacher; it is never trained.
        target: (N,) class indices, negative for none.
        weight: (N,), non-negative.
        ids, places, private: (N,) each, as ``Rows`` has them, for methods that ask.
        progress: the share of the run that is done.
        normalizer: as for ``total``.
        classes: how many classes of each head take part, the first ones, where a vocabulary is padded.
        allowed: (C,) bool; the others are minus infinity on both sides.
        wide: make logits of half-precision inputs, and sum the head's gradient, in float32. False rounds both to the
            inputs' dtype: faster, half the memory for the head, and DTKD's gradient is off by 5 to 12 %, since its
            temperatures divide small differences.
        memory: bytes of both sides' logits at once, and again for what is computed on a chunk of them; None is 32 MiB
            on a CPU, 256 MiB elsewhere, 256 rows at least, and what ``chunked`` takes.
        compile: as for ``chunked``.
        name: of the rows, in errors.

    Raises:
        ValueError: for shapes that do not fit, a teacher that requires grad, or a method that is not row-wise.
        RuntimeError: going back a second time.
    """
    student, teacher = _Side(hidden_student, head_student, classes), _Side(hidden_teacher, head_teacher, classes)
    of_rows = {"target": target, "weight": weight, "ids": ids, "positions": positions, "privacy_score": privacy_score}
    _fit(student, teacher, name, of_rows, allowed=allowed)
    if hidden_teacher.requires_grad:
        raise ValueError(
            f"linear_loss(name={name!r}): the teacher's hidden states require grad, so the teacher would be trained. "
            "Make them under torch.no_grad()."
        )
    n, C = len(hidden_student), student.weight.shape[0]
    whole = normalizer
    if whole is None:
        whole = float(n) if weight is None else weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
    walk = Walk(method, progress, whole, memory, n)
    budget = memory or LOGITS.get(hidden_student.device.type, ELSEWHERE)
    size = max(1, budget // (2 * C * (8 if student.weight.dtype == torch.float64 else 4) or 1))
    size = max(ROWS, size) if memory is None else size
    slopes = student.slopes(hidden_student, head_student, wide=wide)
    gone = None if allowed is None else ~allowed
    with torch.autocast(hidden_student.device.type, enabled=False):
        room = student.room(min(size, n)), teacher.room(min(size, n))
        for part in parts(n, size):
            with torch.no_grad():
                v, u = (x.logits(part, gone, to, wide=wide) for x, to in zip((student, teacher), room, strict=True))
            # the slope may go where logits of rows that are done with stood; a cap's own slope needs the student's
            into = v if student.cap is None else u if u.dtype == v.dtype else torch.empty_like(v)
            cut = {key: x[part] for key, x in of_rows.items() if x is not None}
            if not walk.chunks:
                walk.compile(compile, v, n * C)
            walk.over(Rows(v, u, name=name).replace(**cut), into if slopes else None)
            if slopes:
                student.back(student.unbent(into, v, gone), part)
    return walk.result(slopes)


class _Side:
    """One model's last layer: hidden states, a head, and the slopes in them."""

    def __init__(self, hidden: Tensor, head: Last, classes: int | None) -> None:
        if not isinstance(head, Last):
            raise ValueError(
                f"linear_loss needs an answers.Head, an nn.Linear or its weight (C, H); got {type(head).__name__}. A "
                "head with an adapter (LoRA)? Give the weight that it amounts to, or leave the head out of its "
                "target_modules."
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
        self.half = self.weight.dtype in (torch.bfloat16, torch.float16)
        self.by_hidden: Tensor | None = None
        self.by_weight: Tensor | None = None
        self.by_bias: Tensor | None = None

    def room(self, rows: int) -> Tensor:
        """Where some rows' logits go, chunk after chunk: a heap that gives and takes them anew does not shrink."""
        dtype = torch.float32 if self.half else self.weight.dtype
        return torch.empty(rows, len(self.weight), dtype=dtype, device=self.weight.device)

    def logits(self, part: slice, gone: Tensor | None, room: Tensor, *, wide: bool) -> Tensor:
        """The logits of some rows, (n, C), in float32 at least, written into ``room``."""
        x = self.hidden[part]
        z = room[: len(x)]
        if not self.half:
            torch.mm(x, self.weight.T, out=z)
        elif not wide:
            z.copy_(x @ self.weight.T)
        elif x.is_cuda:
            z = torch.mm(x, self.weight.T, out_dtype=torch.float32)
        elif x.dtype == torch.bfloat16 and _subtracts_first():
            for block in self._blocks():
                head = self.weight[block].T
                near = x @ head
                z[:, block] = near
                z[:, block] += torch.addmm(near, x, head, beta=-1.0)  # what rounding took away
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
        return z if gone is None else z.masked_fill_(gone, -torch.inf)

    def slopes(self, hidden: Tensor, head: Last, *, wide: bool) -> list[tuple[Tensor, Tensor]]:
        """Room for the slopes in what requires grad, as (input, slope); ``wide`` sums the head's in float32."""
        weight, bias = _tensors_of(head)
        if not torch.is_grad_enabled():
            return []
        # float16 would lose small slopes before a loss scale has met them
        kept = torch.float32 if hidden.dtype == torch.float16 else None
        summed = torch.float32 if self.half and wide else kept
        if hidden.requires_grad:
            self.by_hidden = torch.zeros_like(hidden, dtype=kept, memory_format=torch.contiguous_format)
        if weight.requires_grad:
            self.by_weight = torch.zeros_like(weight, dtype=summed, memory_format=torch.contiguous_format)
        if bias is not None and bias.requires_grad:
            self.by_bias = torch.zeros_like(bias, dtype=summed)
        rooms = ((hidden, self.by_hidden), (weight, self.by_weight), (bias, self.by_bias))
        return [(x, room) for x, room in rooms if x is not None and room is not None]

    @torch.no_grad()
    def unbent(self, slope: Tensor, logits: Tensor, gone: Tensor | None) -> Tensor:
        """The slope in some rows' logits, (n, C), before their scale and cap; both tensors are used up."""
        if self.cap is not None:
            bent = logits if gone is None else logits.masked_fill_(gone, 0.0)
            slope *= bent.div_(self.cap).square_().neg_().add_(1.0)
        if self.scale != 1.0:
            slope *= self.scale
        return slope

    @torch.no_grad()
    def back(self, slope: Tensor, part: slice) -> None:
        """Take the slope in some rows' logits, (n, C), on to the hidden states and the head."""
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
        """Slices of the classes whose part of the head has at most ``BLOCK`` numbers."""
        return list(parts(len(self.weight), max(1, BLOCK // self.weight.shape[1])))


@functools.cache
def _subtracts_first() -> bool:
    """Whether a product in bfloat16 less a tensor is rounded once, at the end, by this CPU's library.

    Then a product and what its rounding took away are as good as 2^-17, and faster than a product in float32.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x, head = (torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (16, 32))
    near, exact = x @ head.T, x.double() @ head.double().T
    found = near.double() + torch.addmm(near, x, head.T, beta=-1.0)
    return bool((found - exact).norm() < 2e-5 * exact.norm())


def _tensors_of(head: Last) -> tuple[Tensor, Tensor | None]:
    return (head, None) if isinstance(head, Tensor) else (head.weight, head.bias)


def _fit(
    student: _Side, teacher: _Side, name: str, of_rows: Mapping[str, Tensor | None], *, allowed: Tensor | None
) -> None:
    """Refuse sides that do not make rows together."""
    C, D = len(student.weight), len(teacher.weight)
    if len(student.hidden) != len(teacher.hidden) or C != D:
        raise ValueError(
            f"linear_loss(name={name!r}) needs as many rows and classes on both sides; got hidden states "
            f"{tuple(student.hidden.shape)} and {tuple(teacher.hidden.shape)}, heads of {C} and {D} "
            f"classes. A padded vocabulary? Give classes={min(C, D)}."
        )
    for key, x in of_rows.items():
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
