"""Losses of any row-wise method computed in chunks of rows, with the memory of one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempering.kernels.analytic import FastFunctions
from tempering.kernels.compiled import Versions, Wanted, fast_versions
from tempering.methods.base import Method
from tempering.rows import PER_ROW, Rows, total, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.utils.registry import override_with

COPIES = 8  # live float32 copies of a chunk's logits if nothing is compiled
MEMORY = {"cpu": 2**24}  # bytes of these copies; a CPU is fastest while they fit in its cache
FUSED = {"cpu": 2**25}  # maximum bytes if compiled, where fewer copies are live; also at most a quarter of all logits
OTHER_DEVICES = 2**28


class Path(NamedTuple):
    """How the loss was computed: number of chunks, largest number of rows, functions, compiler, reason for none.

    ``analytic`` lists functions with closed-form gradients, ``autograd`` those that ran plainly. ``compiled`` is
    "triton", "inductor" or "".
    """

    chunks: int
    rows: int
    analytic: tuple[str, ...]
    autograd: tuple[str, ...]
    compiled: str
    why: str


class Chunked(NamedTuple):
    """The loss, (), with its gradient; the terms, {name: (N,)}, without; and how they were computed."""

    loss: Tensor
    terms: dict[str, Tensor]
    path: Path


def chunked(
    method: Method,
    rows: Rows,
    progress: float = 1.0,
    *,
    normalizer: Tensor | float | None = None,
    memory: int | None = None,
    compile: Wanted = None,
) -> Chunked:
    """``total(method(rows, progress), rows, normalizer=...)``, with the gradient computed chunk by chunk in forward.

    Besides the gradient itself, (N, C), only the copies of one chunk are kept in memory. Supports any row-wise method
    and policy, including their trainable parameters. ``objectives.kl`` (KD, DTKD and others) and the cross entropy have
    closed-form gradients if the temperatures carry none; other terms use autograd within the chunk. Half-precision
    chunks are computed in float32, and their gradient is rounded once.

    Backward can run once. There is no second derivative.

    Args:
        method: row-wise; a relational method raises ValueError.
        rows: all rows.
        progress: the fraction of the run that is done.
        normalizer: as for ``total``.
        memory: bytes for the copies of one chunk. None: 16 MiB on a CPU, up to 32 if compiled, and 256 MiB elsewhere. A
            chunk has at least one row.
        compile: True compiles the KL, the cross entropy and the solver of Sharpness, with Triton on CUDA if it is
            installed and else with Inductor; "triton" and "inductor" require that compiler; False does not compile;
            None compiles for 2^24 logits and more on a CPU, 2^20 elsewhere, unless there is no compiler (``path.why``
            has the reason).

    Raises:
        ValueError: for a method that is relational or owns its step, or memory that is not positive.
        RuntimeError: if compile=True is not possible; or in a second backward.
    """
    chunked_loss = ChunkedLoss(method, progress, _normalizer(rows, normalizer), memory, len(rows))
    chunked_loss.compile(compile, rows.student)
    needs_grad = rows.student.requires_grad and torch.is_grad_enabled()
    # float16 would underflow before a loss scale is applied
    dtype = torch.float32 if rows.student.dtype == torch.float16 else rows.student.dtype
    slope = torch.empty_like(rows.student, dtype=dtype, memory_format=torch.contiguous_format) if needs_grad else None
    chunked_loss.add(rows, slope)
    return chunked_loss.result([] if slope is None else [(rows.student, slope)])


class ChunkedLoss:
    """A loss of ``n`` rows in progress: the sums over the chunks so far."""

    def __init__(self, method: Method, progress: float, normalizer: Tensor | float, memory: int | None, n: int) -> None:
        _check_method(method)
        if memory is not None and memory <= 0:
            raise ValueError(f"memory is bytes for a chunk, > 0; got {memory!r}. None chooses.")
        self.method, self.progress, self.normalizer, self.memory, self.n = method, progress, normalizer, memory, n
        self.chunks, self.done = 0, 0
        self.loss: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self.policies = [_PolicyReport(policy, n) for policy in method.policies().values()]
        self.trained = [p for p in method.parameters() if p.requires_grad and torch.is_grad_enabled()]
        self.slopes = [torch.zeros_like(p) for p in self.trained]
        # running means change once per step: every chunk starts with the buffers of the first
        self.state = [(b, b.clone()) for b in method.buffers()]
        self.features: list[tuple[Tensor, Tensor]] = []
        self.largest = 0
        self.fast_functions, self.fast = FastFunctions({}), Versions({}, "", "")

    def compile(self, wanted: Wanted, logits: Tensor, numel: int | None = None) -> None:
        """Select compiled functions for logits of this size and device."""
        self.fast = fast_versions(wanted, logits.device, logits.numel() if numel is None else numel)
        self.fast_functions = FastFunctions(self.fast.functions, double=self.fast.compiler != "triton")

    def add(self, rows: Rows, slope: Tensor | None) -> None:
        """Add rows, and write their gradient into ``slope``, (N, C), which may be the student's logits themselves.

        None if no gradient is needed.
        """
        if rows.task_loss is not None:
            raise ValueError(
                f"Rows(name={rows.name!r}) have a task_loss, whose gradient chunks would lose. Use "
                "the plain loss: total(method(rows, progress), rows)."
            )
        features = {name: s for name, (s, _) in rows.features.items() if s.requires_grad and torch.is_grad_enabled()}
        by_name = {name: torch.zeros_like(s) for name, s in features.items()}
        self.features += [(s, by_name[name]) for name, s in features.items()]
        size = max(1, self._budget(rows) // (COPIES * rows.student.shape[1] * _element_size(rows) or 1))
        for part in parts(len(rows), size):
            leaf = upcast_to_float32(rows.student[part]).detach()
            leaf.requires_grad_(slope is not None)
            chunk_features = {n: s[part].detach().requires_grad_(n in features) for n, (s, _) in rows.features.items()}
            chunk = _slice_rows(rows, part, leaf, chunk_features)
            grads = self._chunk(chunk, [leaf, *(chunk_features[n] for n in features)])
            self.largest = max(self.largest, len(leaf))
            if slope is not None:
                no_weight = None if rows.weight is None else (rows.weight[part] <= 0).unsqueeze(1)
                slope[part] = grads[0] if no_weight is None else grads[0].masked_fill(no_weight, 0.0)
            for by, grad in zip(by_name.values(), grads[1 : 1 + len(features)], strict=True):
                by[part] = grad
            for slope_sum, grad in zip(self.slopes, grads[1 + len(features) :], strict=True):
                slope_sum.add_(grad)

    def _chunk(self, rows: Rows, leaves: list[Tensor]) -> list[Tensor]:
        """The chunk's gradients in its leaves and in the trained parameters; 0 for those that take no part."""
        inputs = [x for x in [*leaves, *self.trained] if x.requires_grad]
        for buffer, initial in self.state if self.chunks else ():
            buffer.copy_(initial)
        with torch.set_grad_enabled(bool(inputs)), override_with(self.fast_functions.functions()):
            terms = self.method(rows, self.progress)
            loss = total(terms, rows, normalizer=self.normalizer)
        self._keep(loss.detach(), terms)
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in [*leaves, *self.trained]]
        grads = iter(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
        return [next(grads) if x.requires_grad else x for x in [*leaves, *self.trained]]

    def _keep(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Store a chunk's results in buffers that are allocated with the first chunk.

        Small tensors allocated per chunk would fragment the heap, which would grow with the number of chunks.
        """
        if self.loss is None:
            self.loss = loss.clone() if loss.device.type == "mps" else loss.double()  # MPS has no float64
            self.terms = {name: term.new_empty(self.n) for name, term in terms.items()}
        else:
            self.loss += loss
        n = len(next(iter(terms.values())))
        for name, term in terms.items():
            self.terms[name][self.done : self.done + n] = term.detach()
        for report in self.policies:
            report.keep(self.done, n)
        self.chunks, self.done = self.chunks + 1, self.done + n

    def result(self, slopes: list[tuple[Tensor, Tensor]]) -> Chunked:
        """The loss, with the gradients attached, the terms and the path."""
        assert self.loss is not None
        loss = self.loss.to(next(iter(self.terms.values())).dtype)
        slopes = [*slopes, *self.features, *zip(self.trained, self.slopes, strict=True)]
        if slopes:
            loss = _PrecomputedGradient.apply(loss, [slope for _, slope in slopes], *(x for x, _ in slopes))
        for report in self.policies:
            report.remember(self.chunks)
        path = Path(
            self.chunks,
            self.largest,
            tuple(sorted(self.fast_functions.used)),
            tuple(sorted(self.fast_functions.plain)),
            self.fast.compiler,
            self.fast.why,
        )
        return Chunked(loss, self.terms, path)  # pyright: ignore

    def _budget(self, rows: Rows) -> int:
        minimum, maximum = (limits.get(rows.student.device.type, OTHER_DEVICES) for limits in (MEMORY, FUSED))
        total_bytes = self.n * rows.student.shape[1] * _element_size(rows)
        return self.memory or (min(maximum, max(minimum, total_bytes // 4)) if self.fast.compiler else minimum)


class _PrecomputedGradient(torch.autograd.Function):
    """A loss with precomputed gradients, which backward consumes, so it runs once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, slopes: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.slopes, ctx.dtypes = slopes, [x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.slopes is None:
            raise RuntimeError(
                "backward of a chunked loss runs once: it consumes the gradient that forward computed. Compute the "
                "loss again, or use the plain loss, total(method(rows, progress), rows), with retain_graph=True."
            )
        slopes, ctx.slopes = ctx.slopes, None
        grads_out = [
            slope.mul_(grads[0].to(slope.device)).to(dtype) for slope, dtype in zip(slopes, ctx.dtypes, strict=True)
        ]
        return None, None, *grads_out


def parts(n: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` rows, the last one shorter; one empty slice for no rows."""
    yield from (slice(start, min(start + size, n)) for start in range(0, max(n, 1), size))


def _check_method(method: Method) -> None:
    owner = type(method).__name__
    if method.owns_step:
        raise ValueError(f"{owner} owns its step and cannot be computed in chunks; run it with tempering.distill.")
    if method.is_batch_dependent():
        relational = [m for m in method.modules() if isinstance(m, Method | Policy) and m.relational]
        raise ValueError(
            f"{', '.join(dict.fromkeys(type(m).__name__ for m in relational))} compares rows with each other, so the "
            "loss of chunks is not that of all rows. Use the plain loss: total(method(rows, progress), rows)."
        )


def _normalizer(rows: Rows, normalizer: Tensor | float | None) -> Tensor | float:
    if normalizer is not None:
        return normalizer
    return rows.total_weight if rows.weight is not None else float(len(rows))


def _element_size(rows: Rows) -> int:
    return 8 if torch.float64 in (rows.student.dtype, rows.teacher.dtype) else 4


def _slice_rows(rows: Rows, part: slice, student: Tensor, features: dict[str, Tensor]) -> Rows:
    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[part]

    return rows.replace(
        student=student,
        teacher=upcast_to_float32(rows.teacher[part]),
        reference=cut(rows.reference),
        **{name: cut(getattr(rows, name)) for name in PER_ROW},
        features={name: (features[name], t[part]) for name, (_, t) in rows.features.items()},
    )


class _PolicyReport:
    """Combines the temperatures and counts of a policy over chunks into those of one call on all rows."""

    def __init__(self, policy: Policy, n: int) -> None:
        self.policy, self.n = policy, n
        self.last: list[Tensor | None] = []
        self.counts: dict[str, Tensor] = {}

    def keep(self, done: int, n: int) -> None:
        """Add the output of the last call, on ``n`` rows after ``done`` rows; (1, 1) for many rows is global."""
        T = self.policy.last
        if T is None:
            return
        if not self.last:
            # (1, 1) of a single row may be per row, so a buffer for all rows is allocated then too
            self.last = [None if x is None else x.clone() if len(x) < n else x.new_empty(self.n, 1) for x in T]
        for buffer, x in zip(self.last, T, strict=True):
            if buffer is not None and x is not None and len(x) == n and len(buffer) == self.n:
                buffer[done : done + n] = x
        for name, count in getattr(self.policy, "counts", {}).items():
            self.counts[name] = self.counts[name] + count if name in self.counts else count.clone()

    def remember(self, chunks: int) -> None:
        """Set the policy's last output and counts to those of all rows."""
        if chunks < 2 or not self.last:
            return
        self.policy.last = Temperatures(*self.last)  # pyright: ignore
        if self.last[0] is not None and len(self.last[0]) == self.n:
            self.policy.counts = self.counts  # pyright: ignore
