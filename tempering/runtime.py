"""What the loop stands on: Fabric, streams of batches that can be resumed and shared out, the progress bar."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tempering.hardware import warn_of_imitated_bf16
from tempering.temperature.base import Policy, sharpness_gap

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tempering.methods.base import StepMethod
    from tempering.rows import Rows
    from tempering.settings import Settings
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
    from lightning_fabric.plugins.precision.double import DoublePrecision
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}. bf16 is 'bf16-mixed'.")
    if precision == "16-mixed" and (accelerator == "cpu" or not torch.accelerator.is_available()):
        raise ValueError("precision='16-mixed' needs a GPU; on a CPU use 'bf16-mixed' or '32-true'.")
    chosen: Any = strategy
    double = DoublePrecision()
    double.convert_output = _as_it_is  # Fabric goes back to float32, and the loss would be computed there
    if strategy == "fsdp":
        count = devices if isinstance(devices, int) and devices > 0 else "auto"
        chosen = ModelParallelStrategy(parallelize_fn=_fully_shard, data_parallel_size=count, tensor_parallel_size=1)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy=chosen,
        precision=None if precision == "64-true" else precision,  # pyright: ignore[reportArgumentType]
        plugins=[double] if precision == "64-true" else [],
        loggers=[_logger(x, folder) for x in loggers],
    )
    fabric.launch()
    warn_of_imitated_bf16(precision, fabric.device)
    return fabric


def _as_it_is(data: Any) -> Any:
    return data


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

        if wanted == "tensorboard":
            return TensorBoardLogger(root_dir=folder, name="logs", version=wanted)
        # a file for each time that the run was started: Fabric's logger removes what it finds
        taken = len(list(Path(folder, "logs").glob("csv*")))
        version = f"csv-{taken + 1}" if taken else "csv"
        return CSVLogger(root_dir=folder, name="logs", version=version, flush_logs_every_n_steps=1)
    except ImportError as error:
        raise ImportError(f'the logger {wanted!r} is not installed: pip install "tempering[{wanted}]"') from error


def apart(student: nn.Module, teacher: Teacher | None) -> None:
    """Refuse a student with nothing to train, or one that is a part of its teacher or has it as a part.

    Raises:
        ValueError: saying which.
    """
    model = None if teacher is None else teacher.model
    if model is not None and (model in student.modules() or student in model.modules()):
        raise ValueError(
            "the teacher is a part of the student, or the student of the teacher, so a frozen teacher would freeze "
            "what is to be trained. Give copies: copy.deepcopy(model)."
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("the student has no parameter that requires grad: there is nothing to train.")


def fits(method: StepMethod, teacher: Teacher | None, settings: Settings) -> None:
    """Refuse a setting or a teacher with which a method that owns its step cannot work.

    Raises:
        ValueError: saying which, and what to do.
    """
    owner = type(method).__name__
    if method.needs_live and (teacher is None or teacher.model is None):
        raise ValueError(
            f"{owner} goes back through the teacher, and {'None' if teacher is None else type(teacher).__name__} has "
            "no gradient. Give the model itself: teachers.Live(model)."
        )
    if method.needs_double_backward:
        cannot = {
            f"compile={settings.compile!r}": bool(settings.compile),
            "strategy='fsdp'": settings.strategy == "fsdp",
            "precision='16-mixed'": settings.precision == "16-mixed",
        }
        if found := [name for name, here in cannot.items() if here]:
            raise ValueError(
                f"{owner} takes derivatives within its step, which does not go with {', '.join(found)}. Leave it out; "
                "strategy='ddp' and precision='bf16-mixed' work."
            )


def may_differentiate(model: Any, method: StepMethod) -> None:
    """Let a method take derivatives of the wrapped model by itself.

    Fabric's hook on every output would refuse any way back but fabric.backward(), for the sake of a loss scale.
    """
    if method.needs_double_backward:
        vars(model)["_register_backward_hook"] = _as_it_is


def peak_mb(device: torch.device) -> float:
    """The most memory held so far, in MB: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # getrusage would count what the process held that started this one
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reseed(seed: int, epoch: int, rank: int) -> None:
    """Set every global generator from (seed, epoch, rank), so an epoch's randomness depends on nothing before it."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def repeatable(name: str, batches: Iterable[Any]) -> None:
    """Refuse what can be walked only once."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be walked only once and not resumed. Pass something that starts again "
            "at every iter(), such as a DataLoader, a list, or tempering.data.Batches."
        )


def _distributed(loader: Any, fabric: Fabric, seed: int) -> Any:
    """The DataLoader with a sampler for this rank, its order drawn from the run's seed."""
    mine = fabric.setup_dataloaders(loader, move_to_device=False)
    # without Fabric's wrapper: it counts epochs by itself, also those that were only looked into
    mine = mine._dataloader  # pyright: ignore[reportAttributeAccessIssue]
    if mine.sampler is not loader.sampler and hasattr(mine.sampler, "seed"):
        mine.sampler.seed = seed
    return mine


class Stream:
    """The training batches as the loop wants them: by epoch, from any batch on, each rank its share.

    A loader that can jump (``iterate(start)``), knows epochs (``set_epoch``), or can share itself out
    (``shard(rank, world)``) is asked to; a DataLoader gets a distributed sampler from Fabric, and a generator of its
    own is seeded by its first seed and the epoch; any other iterable is walked from its start. Augmentation in
    persistent workers goes on from epoch to epoch, and is the one thing that a resumed run draws anew.
    """

    def __init__(self, batches: Iterable[Any], fabric: Fabric, *, seed: int = 0) -> None:
        repeatable("batches", batches)
        if isinstance(batches, torch.utils.data.DataLoader):
            if fabric.world_size > 1:
                batches = _distributed(batches, fabric, seed)
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
        sampler = getattr(batches, "sampler", None)
        self.parts = [batches, sampler, getattr(batches, "batch_sampler", None), getattr(batches, "dataset", None)]
        generators = [getattr(part, "generator", None) for part in self.parts]
        self.seeds = {g: g.initial_seed() for g in generators if isinstance(g, torch.Generator)}

    def __len__(self) -> int:
        try:
            return len(self.batches)
        except TypeError:
            raise ValueError(
                f"{type(self.batches).__name__} has no length, so an epoch has none. Give steps= in place of epochs=."
            ) from None

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """The batches of an epoch from batch ``start`` on."""
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        for generator, seed in self.seeds.items():
            generator.manual_seed((seed + number) % 2**63)
        if hasattr(self.batches, "iterate"):
            return iter(self.batches.iterate(start))
        iterator = iter(self.batches)
        for _ in range(start):
            next(iterator, None)
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

    Kept by position and sample ids; batches without ids are asked every time, and so is a teacher that is not
    ``still``, since it learns.
    """

    def __init__(self, teacher: Callable[[Any, Tensor | None], Any], *, still: bool = True) -> None:
        self.teacher, self.still = teacher, still
        self.kept: list[tuple[Tensor, Any]] = []
        self.place = 0

    def rewind(self) -> Remembered:
        """Begin the loader again."""
        self.place = 0
        return self

    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        place, self.place = self.place, self.place + 1
        if ids is None or not self.still:
            return self.teacher(inputs, ids)
        if place < len(self.kept) and torch.equal(self.kept[place][0], ids):
            return self.kept[place][1]
        answer = self.teacher(inputs, ids)
        if place == len(self.kept):
            self.kept.append((ids, answer))
        return answer


def not_finite(
    value: float, step: int, folder: Path | None, *, blocks: Sequence[Rows] = (), terms: Sequence[Mapping] = ()
) -> FloatingPointError:
    """What is known of a loss that is no number, as the error to raise."""
    if blocks:
        sides = {"student": blocks[-1].student, "teacher": blocks[-1].teacher}
        bad = [side for side, z in sides.items() if (torch.isnan(z) | torch.isposinf(z)).any()]
        named = {k: float(v.detach().sum()) for part in terms for k, v in part.items()}
        where = (
            f"the {' and the '.join(bad)}'s logits hold NaN or infinity" if bad else "both models' logits are finite"
        )
        said = f"the loss is {value} at step {step}: {where}; terms {named}."
    else:
        said = f"the loss is {value} at step {step}, or was so at one before it."
    saved = "" if folder is None else f" The last checkpoint under {folder} is from before."
    return FloatingPointError(f"{said} A lower learning rate, clip=1.0, or precision='32-true' are what to try.{saved}")


def on_cpu(ask: Callable[[Rows], Any] | None, device: torch.device) -> Callable[[Rows], Any] | None:
    """A policy that lives on ``device``, asked with rows that live on the CPU."""
    if ask is None:
        return None

    def asked(rows: Rows) -> Any:
        target = None if rows.target is None else rows.target.to(device)
        T = ask(rows.with_(student=rows.student.to(device), teacher=rows.teacher.to(device), target=target))
        return type(T)(*(None if x is None else x.detach().cpu() for x in T))

    return asked


def measured(
    blocks: Sequence[Rows], terms: Sequence[Mapping[str, Tensor]], policies: Mapping[str, Policy]
) -> dict[str, Any]:
    """What a line of steps.jsonl says of a batch: the blocks' mean terms, and the temperatures with their spread.

    Terms of one name add up over the blocks, as they do in the loss. Temperatures are those of the last block that has
    classes.
    """
    summed: dict[str, float] = {}
    for name, term in (item for named in terms for item in named.items()):
        summed[name] = summed.get(name, 0.0) + float(term.detach().float().mean())
    line: dict[str, Any] = {"terms": summed}
    rows = next((block for block in reversed(blocks) if block.student.shape[1] > 1), blocks[-1])
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
