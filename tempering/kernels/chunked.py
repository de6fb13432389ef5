"""Any row-wise method, a few rows at a time: the loss of the whole, in the memory of a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempering.kernels.analytic import FastFunctions
from tempering.kernels.compiled import Versions, Wanted, fast_versions
from tempering.methods.base import Method
from tempering.rows import Rows, total, upcast_to_float32
from tempering.temperature.base import Policy, Temperatures
from tempering.utils.override import override_with

COPIES = 8  # of a chunk's logits that are alive at once, in float32, where nothing is fused
MEMORY = {"cpu": 2**24}  # bytes of them; a CPU is fastest while they stay in its cache
FUSED = {"cpu": 2**25}  # at most, where they are fused and fewer are alive; and a quarter of all logits
ELSEWHERE = 2**28


class Path(NamedTuple):
    """Which path ran: how many chunks of how many rows at most, what was fused, who compiled it and why nobody did.

    ``compiled`` is "triton", "inductor" or "".
    """

    chunks: int
    rows: int
    analytic: tuple[str, ...]
    autograd: tuple[str, ...]
    compiled: str
    why: str


class Chunked(NamedTuple):
    """The loss, (), with its gradient; the terms, {name: (N,)}, without; and the path that ran."""

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
    """``total(method(rows, progress), rows, normalizer=...)``, whose gradient is made chunk by chunk on the way.

    Beside the gradient itself, (N, C), only a chunk's copies are held. Any method and policy that looks at a row at a
    time will do, with what it trains. ``objectives.kl`` (KD, DTKD and others) and the cross entropy have their
    gradients in closed form where the temperatures carry none; other terms go by autograd within the chunk. Chunks of
    half precision are computed in float32, and their gradient rounded once.

    The way back is open once. There is no second derivative.

    Args:
        method: row-wise; a relational one is refused.
        rows: the whole.
        progress: the share of the run that is done.
        normalizer: as for ``total``.
        memory: bytes for the copies of one chunk; None is 16 MiB on a CPU, up to 32 where it is compiled, and
            256 MiB elsewhere. A chunk is one row at least.
        compile: True compiles the KL, the cross entropy and the solver of Sharpness, by Triton on CUDA where it is
            installed and else by Inductor; "triton" and "inductor" insist; False does not; None does for 2^24 logits
            and more on a CPU, 2^20 elsewhere, and goes without where there is no compiler (``path.why`` says so).

    Raises:
        ValueError: for a method that is relational or owns its step, or memory that is not positive.
        RuntimeError: with compile=True where that is not possible; or going back a second time.
    """
    walk = Walk(method, progress, _normalizer(rows, normalizer), memory, len(rows))
    walk.compile(compile, rows.student)
    wanted = rows.student.requires_grad and torch.is_grad_enabled()
    # float16 would lose small slopes before a loss scale has met them
    kept = torch.float32 if rows.student.dtype == torch.float16 else rows.student.dtype
    slope = torch.empty_like(rows.student, dtype=kept, memory_format=torch.contiguous_format) if wanted else None
    walk.over(rows, slope)
    return walk.result([] if slope is None else [(rows.student, slope)])


class Walk:
    """One loss of ``n`` rows under way: what the chunks so far add up to."""

    def __init__(self, method: Method, progress: float, whole: Tensor | float, memory: int | None, n: int) -> None:
        _check_method(method)
        if memory is not None and memory <= 0:
            raise ValueError(f"memory is bytes for a chunk, > 0; got {memory!r}. None chooses.")
        self.method, self.progress, self.whole, self.memory, self.n = method, progress, whole, memory, n
        self.chunks, self.done = 0, 0
        self.loss: Tensor | None = None
        self.terms: dict[str, Tensor] = {}
        self.policies = [_PolicyReport(policy, n) for policy in method.policies().values()]
        self.trained = [p for p in method.parameters() if p.requires_grad and torch.is_grad_enabled()]
        self.slopes = [torch.zeros_like(p) for p in self.trained]
        # a running mean moves once a step: every chunk finds what the first one found
        self.state = [(b, b.clone()) for b in method.buffers()]
        self.features: list[tuple[Tensor, Tensor]] = []
        self.largest = 0
        self.fast_functions, self.fast = FastFunctions({}), Versions({}, "", "")

    def compile(self, wanted: Wanted, logits: Tensor, numel: int | None = None) -> None:
        """Take compiled versions for logits like these."""
        self.fast = fast_versions(wanted, logits.device, logits.numel() if numel is None else numel)
        self.fast_functions = FastFunctions(self.fast.functions, double=self.fast.compiler != "triton")

    def over(self, rows: Rows, slope: Tensor | None) -> None:
        """Add these rows, and write their slope into ``slope``, (N, C), which may be the student's logits themselves.

        None where none is wanted.
        """
        if rows.task_loss is not None:
            raise ValueError(
                f"Rows(name={rows.name!r}) carry their task's own losses (hard), whose gradient chunks would lose. Use "
                "the plain loss: total(method(rows, progress), rows)."
            )
        features = {name: s for name, (s, _) in rows.features.items() if s.requires_grad and torch.is_grad_enabled()}
        by_name = {name: torch.zeros_like(s) for name, s in features.items()}
        self.features += [(s, by_name[name]) for name, s in features.items()]
        size = max(1, self._budget(rows) // (COPIES * rows.student.shape[1] * _bytes(rows) or 1))
        for part in parts(len(rows), size):
            leaf = upcast_to_float32(rows.student[part]).detach()
            leaf.requires_grad_(slope is not None)
            cut = {n: s[part].detach().requires_grad_(n in features) for n, (s, _) in rows.features.items()}
            chunk = _cut(rows, part, leaf, cut)
            found = self._chunk(chunk, [leaf, *(cut[n] for n in features)])
            self.largest = max(self.largest, len(leaf))
            if slope is not None:
                gone = None if rows.weight is None else (rows.weight[part] <= 0).unsqueeze(1)
                slope[part] = found[0] if gone is None else found[0].masked_fill(gone, 0.0)
            for by, grad in zip(by_name.values(), found[1 : 1 + len(features)], strict=True):
                by[part] = grad
            for grown, grad in zip(self.slopes, found[1 + len(features) :], strict=True):
                grown.add_(grad)

    def _chunk(self, rows: Rows, leaves: list[Tensor]) -> list[Tensor]:
        """The chunk's slopes in its leaves and in what the method trains; 0 where they take no part."""
        wanted = [x for x in [*leaves, *self.trained] if x.requires_grad]
        for buffer, found in self.state if self.chunks else ():
            buffer.copy_(found)
        with torch.set_grad_enabled(bool(wanted)), override_with(self.fast_functions.functions()):
            terms = self.method(rows, self.progress)
            loss = total(terms, rows, normalizer=self.whole)
        self._keep(loss.detach(), terms)
        if not loss.requires_grad:
            return [torch.zeros_like(x) for x in [*leaves, *self.trained]]
        grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
        return [next(grads) if x.requires_grad else x for x in [*leaves, *self.trained]]

    def _keep(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Write down a chunk's answers, in room that is there from the first chunk on.

        Small tensors that each chunk left behind would hold the heap's large holes apart, and it would grow with them.
        """
        if self.loss is None:
            self.loss = loss.clone() if loss.device.type == "mps" else loss.double()  # which has no float64
            self.terms = {name: term.new_empty(self.n) for name, term in terms.items()}
        else:
            self.loss += loss
        n = len(next(iter(terms.values())))
        for name, term in terms.items():
            self.terms[name][self.done : self.done + n] = term.detach()
        for said in self.policies:
            said.keep(self.done, n)
        self.chunks, self.done = self.chunks + 1, self.done + n

    def result(self, slopes: list[tuple[Tensor, Tensor]]) -> Chunked:
        """The loss with the slopes in its inputs attached to it, and its parts put together."""
        assert self.loss is not None
        loss = self.loss.to(next(iter(self.terms.values())).dtype)
        slopes = [*slopes, *self.features, *zip(self.trained, self.slopes, strict=True)]
        if slopes:
            loss = _Attached.apply(loss, [slope for _, slope in slopes], *(x for x, _ in slopes))
        for said in self.policies:
            said.remember(self.chunks)
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
        least, most = (of.get(rows.student.device.type, ELSEWHERE) for of in (MEMORY, FUSED))
        whole = self.n * rows.student.shape[1] * _bytes(rows)
        return self.memory or (min(most, max(least, whole // 4)) if self.fast.compiler else least)


class _Attached(torch.autograd.Function):
    """A loss whose slopes are already known; they are used up by the one way back."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, slopes: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.slopes, ctx.dtypes = slopes, [x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        if ctx.slopes is None:
            raise RuntimeError(
                "a chunked loss goes back once: its gradient was made on the way and is used up. Call it again, or use "
                "the plain loss, total(method(rows, progress), rows), where the graph is to be kept."
            )
        slopes, ctx.slopes = ctx.slopes, None
        found = [
            slope.mul_(grads[0].to(slope.device)).to(dtype) for slope, dtype in zip(slopes, ctx.dtypes, strict=True)
        ]
        return None, None, *found


def parts(n: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` rows, the last one shorter; one of none for no rows."""
    yield from (slice(start, min(start + size, n)) for start in range(0, max(n, 1), size))


def _check_method(method: Method) -> None:
    owner = type(method).__name__
    if method.owns_step:
        raise ValueError(f"{owner} owns its step and cannot be taken in chunks; run it by tempering.distill.")
    if method.is_batch_dependent():
        inside = [m for m in method.modules() if isinstance(m, Method | Policy) and m.relational]
        raise ValueError(
            f"{', '.join(dict.fromkeys(type(m).__name__ for m in inside))} compares rows with each other, so the loss "
            "of chunks is not that of the whole. Use the plain loss: total(method(rows, progress), rows)."
        )


def _normalizer(rows: Rows, normalizer: Tensor | float | None) -> Tensor | float:
    if normalizer is not None:
        return normalizer
    return rows.total_weight if rows.weight is not None else float(len(rows))


def _bytes(rows: Rows) -> int:
    return 8 if torch.float64 in (rows.student.dtype, rows.teacher.dtype) else 4


def _cut(rows: Rows, part: slice, student: Tensor, features: dict[str, Tensor]) -> Rows:
    def of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[part]

    return rows.replace(
        student=student,
        teacher=upcast_to_float32(rows.teacher[part]),
        target=of(rows.target),
        weight=of(rows.weight),
        ids=of(rows.ids),
        positions=of(rows.positions),
        privacy_score=of(rows.privacy_score),
        features={name: (features[name], t[part]) for name, (_, t) in rows.features.items()},
    )


class _PolicyReport:
    """What a policy said of each chunk, put together to what it would say of its last call, had it seen all rows."""

    def __init__(self, policy: Policy, n: int) -> None:
        self.policy, self.n = policy, n
        self.last: list[Tensor | None] = []
        self.counts: dict[str, Tensor] = {}

    def keep(self, done: int, n: int) -> None:
        """Take what it says after ``n`` more rows than ``done``; (1, 1) of many rows is one temperature for all."""
        T = self.policy.last
        if T is None:
            return
        if not self.last:
            # one row's (1, 1) may be its own, so room for all is taken then too
            self.last = [None if x is None else x.clone() if len(x) < n else x.new_empty(self.n, 1) for x in T]
        for room, x in zip(self.last, T, strict=True):
            if room is not None and x is not None and len(x) == n and len(room) == self.n:
                room[done : done + n] = x
        for name, count in getattr(self.policy, "counts", {}).items():
            self.counts[name] = self.counts[name] + count if name in self.counts else count.clone()

    def remember(self, chunks: int) -> None:
        """Tell the policy."""
        if chunks < 2 or not self.last:
            return
        self.policy.last = Temperatures(*self.last)  # pyright: ignore
        if self.last[0] is not None and len(self.last[0]) == self.n:
            self.policy.counts = self.counts  # pyright: ignore
