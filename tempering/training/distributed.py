"""Collective operations used by the trainer, and signals on which all processes of a run stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.rows import upcast_to_float32
from tempering.training.config import SelfCheckError
from tempering.utils.device import is_distributed
from tempering.utils.files import BATCH_SIGNALS, forget_interrupts, raise_lost_interrupt

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tempering.tasks.base import Task

REQUEUE_CODE = 99  # Grid Engine queues a job that exits with 99 again; LSF and Slurm if configured (docs/runs.md)

T = TypeVar("T")

EVERY = 10  # steps between looks for a signal with several GPUs
GRACE = 0.5  # seconds in which the processes of a job get the same signal


def check_splittable(method: Method, task: Task, *, accumulate: int = 1, world: int = 1) -> None:
    """Check that splitting a step into micro-batches or over processes does not change the loss or what is learned.

    Raises:
        ValueError: for a task whose rows depend on the batch, or a method that compares rows or trains the teacher, in
            several micro-batches or processes; or for an adaptive policy in several processes.
    """
    split, parts = ("accumulate", accumulate) if accumulate > 1 else ("devices", world)
    if method.trains_teacher and not method.teacher_is_student and parts > 1:
        raise ValueError(
            f"{type(method).__name__} trains the teacher on each batch before the student, which {split}="
            f"{parts} would change. Use {split}=1."
        )
    if parts > 1 and not task.splittable:
        raise ValueError(whole_rows(task, f"{split}={parts}"))
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


def whole_rows(task: Task, split: str) -> str:
    """Return the error for a step that is split, such as by "accumulate=2", with a task that does not allow it."""
    return (
        f"the rows of tasks.{type(task).__name__} depend on the whole batch, as with candidates='batch', so {split} "
        f"would change the loss. Use {split.partition('=')[0]}=1, or give each query its own candidates."
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
    """Clip the total norm of all gradients, sharded (FSDP), unsharded and sparse ones together.

    A norm that is not finite makes them NaN; the loss scaler of fp16 has found the overflow by then and skips the step.
    """
    from torch.distributed.tensor import DTensor

    def local(x: Tensor) -> Tensor:
        return x.to_local() if isinstance(x, DTensor) else x

    def full(x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, DTensor) else x

    fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    dense = [g.coalesce().values() if g.layout == torch.sparse_coo else g for g in grads]
    kinds = ([g for g in dense if isinstance(g, DTensor)], [g for g in dense if not isinstance(g, DTensor)])
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
    return gather_objects(value)


# checks that processes make together


class _Failure(NamedTuple):
    """What ended the checks of a process, for the others."""

    message: str


class OtherProcessError(SelfCheckError):
    """Raised where the self-check of another process of the run failed."""


@contextmanager
def checked_together(world: int | None = None) -> Generator[None]:
    """Check in ``world`` processes that decide alike, by ``from_all_processes``, and that all stop if one fails.

    None is all processes of the process group.

    Without it a process would wait forever for one that stopped, or that took another number of batches to be sure.

    Raises:
        OtherProcessError: if another process failed, with its message.
    """
    if (world_size() if world is None else world) == 1:
        yield
        return
    token = _TOGETHER.set(True)
    try:
        yield
        from_all_processes(None)
    except OtherProcessError:
        raise
    except Exception as error:
        gather_objects(_Failure(f"{type(error).__name__}: {error}"))
        raise
    finally:
        _TOGETHER.reset(token)


_TOGETHER: ContextVar[bool] = ContextVar("together", default=False)


def world_size() -> int:
    """Return the number of processes of the process group; 1 where there is none."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def is_first_process() -> bool:
    """Whether this process is the first of those that check together; one outside of ``checked_together`` is."""
    return not _TOGETHER.get() or torch.distributed.get_rank() == 0


def from_all_processes(value: T) -> list[T]:
    """Return the objects of all processes in the order of ranks; [value] outside of ``checked_together``.

    Raises:
        OtherProcessError: if another process failed, with its message.
    """
    if not _TOGETHER.get():
        return [value]
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if isinstance(other, _Failure):
            raise OtherProcessError(f"process {rank} of {len(values)} stopped, {other.message}")
    return values


def while_all(values: Iterable[T]) -> Iterator[T]:
    """Iterate as long as every process has a value."""
    iterator = iter(values)
    while all(from_all_processes((value := next(iterator, _END)) is not _END)):
        yield cast("T", value)


_END = object()


def gather_objects(value: Any) -> list[Any]:
    """Gather a picklable object from every process of the process group, in the order of ranks."""
    objects: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(objects, value)  # pyright: ignore[reportUnknownMemberType]
    return objects


# signals


class RunInterrupted(SystemExit):
    """A signal ended the run after a checkpoint; the process exits with code 99, and the same command resumes."""


class WorkersEndedError(RuntimeError):
    """The workers of a DataLoader were ended by a signal that this process has received too."""


class StopSignals:
    """Note the first of the signals that ask for an end, in a context; a second one acts as it did before.

    Handlers of the caller, and signals that are ignored (nohup), stay as they are; so does everything outside the main
    thread. A signal that comes too late for a run, which then finishes, is the first of the next run in this process,
    such as of the student after its teacher's.

    Args:
        folder: of the run; None, without which there is no checkpoint, changes nothing.

    Attributes:
        received: the signal's name; None: there was none.
        late: one that came too late for an earlier run.
    """

    late: ClassVar[str | None] = None

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.received: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        raise_lost_interrupt()
        if self.folder is not None and threading.current_thread() is threading.main_thread():
            self.received, StopSignals.late = StopSignals.late, None
            for number in BATCH_SIGNALS:
                handler = signal.getsignal(number)
                ours = getattr(handler, "__module__", "").startswith("tempering.")  # of the command line
                if handler in (signal.SIG_DFL, signal.default_int_handler) or ours:
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            forget_interrupts()
        if self.before and kind is None:
            StopSignals.late = self.received
        self.before = {}

    def _receive(self, number: int, _: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self.before[number])
        child = getattr(signal, "SIGCHLD", None)
        if child and callable(signal.getsignal(child)):  # torch's, which would break off the step as workers end
            self.before.setdefault(child, signal.signal(child, _pass))

    def requested(self, fabric: Fabric, step: int) -> str | None:
        """Return the name of a signal that a rank has received, the same on all ranks; None: train on.

        Several GPUs, which have to wait for each other here, look every ``EVERY`` steps.
        """
        if fabric.world_size == 1 or self.folder is None:
            return self.received
        if fabric.device.type != "cpu" and step % EVERY:
            return None
        return next((name for name in all_gather_objects(self.received, fabric) if name), None)

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Iterate over batches.

        Raises:
            WorkersEndedError: in place of a batch whose workers got the signal, as those of a job's every process do.
        """
        try:
            yield from batches
        except RuntimeError as error:
            if not self.ended_workers(error):
                raise
            raise WorkersEndedError(str(error)) from error

    def ended_workers(self, error: BaseException) -> bool:
        """Return whether the error is that workers of a DataLoader ended by a signal that this process gets too."""
        if not (self.before and isinstance(error, RuntimeError) and "DataLoader worker" in str(error)):
            return False
        if self.received is None:
            time.sleep(GRACE)
        return self.received is not None

    def interrupted(self, name: str, step: int, *, requeued: bool, saved: bool = True) -> RunInterrupted:
        """Print that the run was interrupted and how it resumes; return the error to raise."""
        written = f"checkpoint written to {self.folder}" if saved else "together with the loader's workers"
        lines = [f"interrupted by {name} at step {step}, {written}; the same command resumes"]
        lines += [requeue()] if requeued else []
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        return RunInterrupted(REQUEUE_CODE)


def _pass(number: int, _: object) -> None:
    return


def requeue() -> str:
    """Let Slurm queue this job again, and return what was done, for people."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "requeue=True (--requeue) has no effect: this is no Slurm job (SLURM_JOB_ID is not set)"
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the Slurm job {job} could not be queued again: scontrol requeue {job}: {error}"
    if done.returncode:
        return f"the Slurm job {job} could not be queued again: {done.stderr.strip() or f'exit code {done.returncode}'}"
    return f"the Slurm job {job} is queued again"
