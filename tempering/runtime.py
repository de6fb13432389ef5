"""What the loop stands on: Fabric, streams of batches that can be resumed and shared out, the progress bar."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tempering.temperature.base import Policy, sharpness_gap

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tempering.rows import Rows
    from tempering.taps import Taps
    from tempering.teachers.base import Teacher

LOGGERS = ("tensorboard", "csv", "wandb")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true")


def fabric_for(
    *, accelerator: str, devices: int | str, strategy: str, precision: str, loggers: Sequence[Any], folder: Any
) -> Fabric:
    """A launched Fabric; ``strategy="fsdp"`` is torch's FSDP2, which runs on the CPU too.

    Raises:
        ValueError: for a precision or a logger that there is not.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}. bf16 is 'bf16-mixed'.")
    chosen: Any = strategy
    if strategy == "fsdp":
        count = devices if isinstance(devices, int) and devices > 0 else "auto"
        chosen = ModelParallelStrategy(parallelize_fn=_fully_shard, data_parallel_size=count, tensor_parallel_size=1)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy=chosen,
        precision=precision,  # pyright: ignore[reportArgumentType]
        loggers=[_logger(x, folder) for x in loggers],
    )
    fabric.launch()
    return fabric


def _fully_shard(model: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2 on every direct child that has parameters, then on the whole."""
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        # a list or dict of modules has no forward for FSDP to hook
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def _logger(wanted: Any, folder: Any) -> Any:
    if not isinstance(wanted, str):
        return wanted
    if wanted not in LOGGERS:
        raise ValueError(f"loggers are {', '.join(LOGGERS)} or objects of lightning_fabric; got {wanted!r}.")
    if folder is None:
        raise ValueError(f"the logger {wanted!r} needs a place to write: give out=FOLDER.")
    try:
        if wanted == "wandb":
            from tempering.wandb_logger import WandbLogger

            return WandbLogger(folder)
        from lightning_fabric.loggers.csv_logs import CSVLogger
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        kind = TensorBoardLogger if wanted == "tensorboard" else CSVLogger
        return kind(root_dir=folder, name="logs", version=wanted)
    except ImportError as error:
        raise ImportError(f'the logger {wanted!r} is not installed: pip install "tempering[{wanted}]"') from error


def reseed(seed: int, epoch: int, rank: int) -> None:
    """Set every global generator from (seed, epoch, rank), so an epoch's randomness depends on nothing before it."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class Stream:
    """The training batches as the loop wants them: by epoch, from any batch on, each rank its share.

    A loader that can jump (``iterate(start)``), knows epochs (``set_epoch``), or can share itself out
    (``shard(rank, world)``) is asked to; a DataLoader gets a distributed sampler from Fabric; any other iterable is
    walked from its start.
    """

    def __init__(self, batches: Iterable[Any], fabric: Fabric) -> None:
        if isinstance(batches, Iterator):
            raise ValueError(
                "batches is an iterator, which can be walked only once and not resumed. Pass something that starts "
                "again at every iter(), such as a DataLoader, a list, or tempering.data.Batches."
            )
        if isinstance(batches, torch.utils.data.DataLoader):
            batches = fabric.setup_dataloaders(batches, move_to_device=False)
        elif fabric.world_size > 1:
            if not hasattr(batches, "shard"):
                raise ValueError(
                    f"{type(batches).__name__} cannot be shared out over {fabric.world_size} processes. Use a "
                    "DataLoader, or give it shard(rank, world)."
                )
            batches = batches.shard(fabric.global_rank, fabric.world_size)  # pyright: ignore[reportAttributeAccessIssue]
        if fabric.device.type != "cpu" and hasattr(batches, "to"):
            batches = batches.to(fabric.device)  # pyright: ignore[reportAttributeAccessIssue]
        self.batches: Any = batches

    def __len__(self) -> int:
        try:
            return len(self.batches)
        except TypeError:
            raise ValueError(
                f"{type(self.batches).__name__} has no length, so an epoch has none. Give steps= in place of epochs=."
            ) from None

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from batch ``start`` on."""
        for owner in (self.batches, getattr(self.batches, "sampler", None), getattr(self.batches, "dataset", None)):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(number)  # pyright: ignore[reportOptionalMemberAccess]
        if hasattr(self.batches, "iterate"):
            return iter(self.batches.iterate(start))
        iterator = iter(self.batches)
        for _ in range(start):
            next(iterator)
        return iterator


def grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` micro-batches, the last one shorter if they do not divide."""
    while group := list(itertools.islice(batches, size)):
        yield group


class Tapped:
    """The features of both models' last forwards, by the names a task gives them."""

    def __init__(self, student: Taps, teacher: Taps, names: Mapping[str, tuple[str, str]]) -> None:
        self.student, self.teacher, self.names = student, teacher, names

    @classmethod
    def between(
        cls, student: nn.Module, teacher: Teacher | None, names: Mapping[str, tuple[str, str]]
    ) -> Tapped | None:
        """Taps on both; None where nothing is named.

        Raises:
            ValueError: for a teacher without a live module, which has no features.
        """
        if not names:
            return None
        from tempering.taps import Taps

        if teacher is None or teacher.model is None:
            raise ValueError(
                f"the task taps {', '.join(names)}, but {'no teacher' if teacher is None else type(teacher).__name__} "
                "has features. Give the live model: teachers.Live(model)."
            )
        sides = [Taps(m, [pair[i] for pair in names.values()]) for i, m in enumerate((student, teacher.model))]
        return cls(sides[0].__enter__(), sides[1].__enter__(), names)

    def features(self) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (student's, teacher's) of the last forwards."""
        return {name: (self.student[s], self.teacher[t].detach()) for name, (s, t) in self.names.items()}


class Remembered:
    """A teacher whose answers to a fixed, unshuffled loader are kept, so scoring every epoch asks it once.

    Kept by position and sample ids; batches without ids are asked every time.
    """

    def __init__(self, teacher: Callable[[Any, Tensor | None], Any]) -> None:
        self.teacher = teacher
        self.kept: list[tuple[Tensor, Any]] = []
        self.place = 0

    def rewind(self) -> Remembered:
        """Begin the loader again."""
        self.place = 0
        return self

    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        place, self.place = self.place, self.place + 1
        if ids is None:
            return self.teacher(inputs, ids)
        if place < len(self.kept) and torch.equal(self.kept[place][0], ids):
            return self.kept[place][1]
        answer = self.teacher(inputs, ids)
        if place == len(self.kept):
            self.kept.append((ids, answer))
        return answer


def measured(rows: Rows, terms: Mapping[str, Tensor], policies: Mapping[str, Policy]) -> dict[str, Any]:
    """What a line of steps.jsonl says of a batch: mean terms, and the temperatures with their spread."""
    line: dict[str, Any] = {"terms": {name: float(term.detach().float().mean()) for name, term in terms.items()}}
    policy = next((p for p in policies.values() if p.last is not None), None)
    if policy is None or policy.last is None or not len(rows):
        return line
    for side, T in (("T_teacher", policy.last.teacher), ("T_student", policy.last.student)):
        values = T.flatten().float()
        low, high = torch.quantile(values[:100_000], values.new_tensor([0.05, 0.95])).tolist()
        line[side] = {"mean": float(values.mean()), "p5": low, "p95": high}
    line["policy"] = {name: float(count) for name, count in policy.report().items()}
    line["gap"] = float(sharpness_gap(rows.with_(student=rows.student.detach()), policy.last))
    return line


class Display:
    """The progress bar of a run on a terminal; nothing where ``quiet`` or on another rank than the first."""

    def __init__(self, total: int, done: int, label: str, *, quiet: bool) -> None:
        self.progress: Any = None
        if quiet:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), transient=True)
        self.task = self.progress.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Display:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def show(self, step: int, note: str | None = None) -> None:
        """Move to ``step``; a new note replaces the old one."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step, **({} if note is None else {"note": note}))
