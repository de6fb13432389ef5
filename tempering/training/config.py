"""Define the options of training, its progress, and the results of a run. Imports no torch, for fast commands."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from tyro.constructors import PrimitiveConstructorSpec

if TYPE_CHECKING:
    from torch import nn

Schedule = Literal["constant", "cosine", "linear", "step"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true"]
VERDICTS = "TEMPERING_TEACHER_VERDICTS"  # environment variable: folder in which the runs of a grid share verdicts
POSITIVE = ("steps", "epochs", "evaluate_every", "accumulate", "log_every", "checkpoint_every", "keep", "patience")
RECORDED_AS = {"max_grad_norm": "clip"}  # options whose key in records and checkpoints is another name
ENDLESS = 100  # a loader that yields more than this many times its length has no end
BEFORE_END = math.nextafter(1.0, 0.0)  # a schedule's progress is below 1
NOT_RECORDED = ("threads", "extend", "requeue")
# --compile alone is True, --compile reduce-overhead is a mode
CompileFlag = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[MODE]",
    instance_from_str=lambda words: words[0] if words else True,
    is_instance=lambda value: isinstance(value, bool | str),
    str_from_instance=lambda value: [] if value is True else [str(value)],
)


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of training that do not depend on model, method and data.

    The fields are the training flags of every recipe: ``main(*, config: TrainConfig = TrainConfig(epochs=20), ...)``
    has ``--epochs`` with default 20, ``--seed``, ``--precision`` and so on.
    """

    epochs: int | None = None
    """Number of epochs. Schedules, decay and warm-up are fractions of the run."""
    steps: int | None = None
    """Number of optimizer steps; overrides epochs."""
    seed: int = 0
    """Random seed of the student's initialization, the data order, augmentation and dropout."""
    accumulate: int = 1
    """Batches per optimizer step (gradient accumulation). The loss is the mean over all their rows."""
    max_grad_norm: float | None = None
    """Maximum gradient norm; None does not clip."""
    precision: Precision = "32-true"
    """Precision of training, as in Lightning Fabric."""
    accelerator: str = "auto"
    """auto, cpu, cuda or mps."""
    devices: int | str = 1
    """Number of devices of each machine, or auto."""
    num_nodes: int | str = "auto"
    """Number of machines; auto takes it from torchrun, srun or mpirun, and is 1 without them."""
    strategy: str = "auto"
    """auto, ddp or fsdp (FSDP2), for more than one device."""
    schedule: Schedule | None = None
    """Schedule of the learning rate, in place of the recipe's: constant, cosine, linear, step (thirds)."""
    warmup: float = 0.0
    """Share of the run in which the learning rate rises linearly from 0; the schedule spans the rest."""
    decay_norms: bool = True
    """Weight decay on norms and biases, too; --no-decay-norms leaves it out, as timm does."""
    ema: float | None = None
    """Decay of a moving average of the student's weights, such as 0.999; it is scored and saved beside the student."""
    label_smoothing: float = 0.0
    """Share of the label's probability that the cross entropy spreads over all classes."""
    mixup: float = 0.0
    """Alpha of MixUp, such as 0.2, which mixes images and labels; 0 for none. With CutMix, each has half of them."""
    cutmix: float = 0.0
    """Alpha of CutMix, such as 1.0; 0 for none."""
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None
    """Weights of the samples by class, one per class, or balanced: inverse to the count of the class."""
    balanced_sampling: bool = False
    """Draw the training samples with replacement, every class equally often; an epoch has as many as before."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass, to save memory; of models that have it."""
    compile: Annotated[bool | str, CompileFlag] = False
    """torch.compile the student; takes a mode of torch.compile, such as reduce-overhead, which replays CUDA graphs."""
    chunks: bool | None = None
    """Compute the loss in chunks of rows, to save memory; None does so from 2^22 logits if the method allows it."""
    threads: int | None = None
    """CPU threads of torch; default: one per core."""
    evaluate_every: int = 1
    """Epochs between evaluations."""
    patience: int | None = None
    """Stop after this many evaluations without a better score."""
    log_every: int = 50
    """Steps between log lines."""
    examples: int = 6
    """Scored samples in the report, those on which student and teacher differ most; 0 keeps data out of records."""
    checkpoint_every: int | None = None
    """Steps between checkpoints within an epoch; a checkpoint is always written at the end of an epoch."""
    keep: int = 2
    """Number of checkpoints to keep."""
    resume: bool = True
    """Resume from the last checkpoint in the run's folder; --no-resume removes an earlier run and restarts."""
    extend: bool = False
    """Continue a finished run in the folder to more epochs or steps; schedules see the share of the new length."""
    requeue: bool = False
    """Queue the Slurm job again when a signal interrupts the run (scontrol requeue)."""
    selfcheck: bool = True
    """Check models, data and method on the first batches before training."""
    skip_checks: tuple[str, ...] = ()
    """Checks of the self-check to turn off, by the names in its line, such as "above chance"."""
    quiet: bool = False
    """No progress bar, and no lines about epochs."""

    def validate(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the option and its value.
        """
        from tempering.utils.device import validate_compile_mode

        if self.steps is None and self.epochs is None:
            raise ValueError("give either steps= or epochs=; got steps=None, epochs=None.")
        validate_compile_mode(self.compile)
        Results(self.skip_checks)  # its names
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more; got {value}.")
        if self.examples < 0:
            raise ValueError(f"examples must be 0 or more; got {self.examples}.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be > 0; got {self.max_grad_norm}. None does not clip.")
        self._validate_everyday()

    def _validate_everyday(self) -> None:
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"ema must be in (0, 1), such as 0.999; got {self.ema}. None has no average.")
        if self.ema is not None and self.strategy == "fsdp":
            raise ValueError("ema= (--ema) does not go with strategy='fsdp'. Use strategy='ddp'.")
        for name in ("warmup", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}.")
        for name in ("mixup", "cutmix"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be an alpha > 0, or 0 for none; got {getattr(self, name)}.")
        weights = self.class_weights
        if weights is None or weights == "balanced":
            return
        if isinstance(weights, str) or not weights or not all(0.0 <= w < math.inf for w in weights):
            raise ValueError(f"class_weights must be numbers >= 0, one per class, or 'balanced'; got {weights!r}.")

    @property
    def changes_batches(self) -> bool:
        """Whether an option changes the training batches."""
        return bool(self.mixup or self.cutmix or self.class_weights)

    def for_teacher(self, epochs: int | None) -> TrainConfig:
        """Return the options of the teacher's training: its own length, seed 0, one device.

        Precision, accelerator, compile and options that do not change weights are the student's. All others have
        their defaults, so that all students share one trained teacher.
        """
        shared = ("precision", "accelerator", "compile", "threads", "evaluate_every", "log_every", "checkpoint_every")
        shared = (*shared, "examples", "keep", "resume", "selfcheck", "skip_checks", "quiet")
        return TrainConfig(epochs=epochs, **{name: getattr(self, name) for name in shared})

    def changed(self, *names: str) -> dict[str, Any]:
        """Return those of the named options whose value is not the default."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    def record(self) -> dict[str, Any]:
        """Return the options by their names in records and checkpoints."""
        return {RECORDED_AS.get(name, name): v for name, v in asdict(self).items() if name not in NOT_RECORDED}


@dataclass
class TrainState:
    """Training progress, saved in checkpoints with weights and random states."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch, in micro-batches
    seconds: float = 0.0  # of training, without evaluation
    loss_sum: float = 0.0  # of the epoch so far, of this rank
    best_value: float | None = None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    stale: int = 0  # evaluations since the best one
    length: list[int] | None = None  # steps of the run and of an epoch, if the loader's length was wrong
    stopped: bool = False


class RunLength:
    """How long a run is. An epoch is one pass over the loader, whatever its length is said to be.

    Args:
        loader: the training batches; its length is needed if the run's length is given in epochs.

    Attributes:
        total: number of steps; with epochs, it is corrected at an epoch's end if the loader's length was wrong.
        epochs: number of epochs; None if the length is given in steps.
        epoch_end: the fraction of the run that is done at the end of the present epoch; its steps have at most that.
    """

    epoch_end: float = 1.0

    def __init__(self, config: TrainConfig, loader: Any) -> None:
        self.loader, self.accumulate = loader, config.accumulate
        self.epochs = None if config.steps else config.epochs
        self.steps_per_epoch = 0 if self.epochs is None else math.ceil(len(loader) / config.accumulate)
        self.total = config.steps or (self.epochs or 0) * self.steps_per_epoch

    def is_done(self, state: TrainState) -> bool:
        """Whether the run has reached its length, or was stopped early."""
        if self.epochs is not None:
            return state.stopped or state.epoch >= self.epochs
        return state.stopped or (state.step >= self.total and not state.batch)  # a last epoch is evaluated, too

    def ends_epoch(self, state: TrainState) -> bool:
        """Whether the run ends here, in the middle of an epoch.

        Raises:
            ValueError: if an epoch does not end.
        """
        if self.epochs is None:
            return state.step >= self.total
        if state.batch > ENDLESS * (len(self.loader) + 10):
            raise ValueError(
                f"{self._name} has the length {len(self.loader)}, and has yielded {state.batch} batches in one epoch. "
                "If it is endless, give steps= instead of epochs=."
            )
        return False

    def begin_epoch(self, epoch: int) -> None:
        """Set ``epoch_end`` for the epoch of this number, from 0."""
        self.epoch_end = 1.0 if self.epochs is None else (epoch + 1) / self.epochs

    def correct(self, state: TrainState, steps: int) -> None:
        """Set the length of the rest of the run by the ``steps`` of the epoch that has ended; warn if it changes."""
        if self.epochs is None or steps == self.steps_per_epoch:
            return
        warnings.warn(
            f"{self._name} has the length {len(self.loader)}, which is {self.steps_per_epoch} steps, and epoch "
            f"{state.epoch} had {steps}. An epoch is one pass over it; schedules see the new length.",
            stacklevel=5,
        )
        self.steps_per_epoch, self.total = steps, state.step + (self.epochs - state.epoch) * steps
        state.length = [self.total, steps]

    def resume(self, state: TrainState) -> None:
        """Take up the length of an earlier call that was corrected there."""
        if state.length is not None:
            self.total, self.steps_per_epoch = state.length

    @property
    def _name(self) -> str:
        return type(self.loader.batches).__name__


@dataclass
class Run:
    """The result of a run.

    Attributes:
        student: the trained model, unwrapped, with its last weights, in the modes in which it was given: call
            ``student.eval()`` before using one that was in training mode.
        folder: where the records are; None for a run without records.
        facts: the content of facts.json.
        ema: the average of the student's weights, in eval mode; None without ``TrainConfig.ema``.
        epochs: the lines of epochs.jsonl.
        how: "new", "resumed", "extended" (a finished run, to more steps), or "finished": nothing was left to train.
    """

    student: nn.Module
    folder: Path | None
    facts: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    how: str = "new"
    ema: nn.Module | None = None

    @property
    def last(self) -> dict[str, Any]:
        """The last evaluation, {"epoch", "validation": {...}, "test": {...}}."""
        return self.facts["result"]["last"]

    @property
    def best(self) -> dict[str, Any]:
        """The best evaluation, by ``facts["best_by"]``."""
        return self.facts["result"]["best"]


CHECKS = (  # names of the self-check's parts, each of which can be turned off
    "row weights",
    "method",
    "teacher frozen",
    "in eval",
    "deterministic",
    "label names",
    "logits",
    "vocabulary",
    "above chance",
    "zero at agreement",
    "same when split",
    "same when padded",
    "same when shifted",
    "finite gradients",
    "can learn",
    "teacher effect",
    "training mode",
    "workers",
    "scores",
)


class SelfCheckError(RuntimeError):
    """The first batches show that the run would be wrong; the message names the problem and what to do."""


# results whose numbers are for the reader, not only for the record: what is cut off, frozen or has no label
SHOWN = ("vocabulary", "labels", "samples", "trained parameters")


class Checked(NamedTuple):
    """The result of the self-check.

    Attributes:
        checks: check -> "ok", or why it does not apply.
    """

    checks: dict[str, str]

    @property
    def line(self) -> str:
        """The result in one line, for the terminal and the record."""
        passed = [
            f"{name} {result.removeprefix('ok ')}" if name in SHOWN else name
            for name, result in self.checks.items()
            if result.startswith("ok")
        ]
        skipped = [f"{name} ({result})" for name, result in self.checks.items() if not result.startswith("ok")]
        return f"self-check ok: {', '.join(passed)}" + (f"; not checked: {', '.join(skipped)}" if skipped else "")


class Results(dict[str, str]):
    """Results of the checks by name, without those that are turned off.

    Args:
        skip: names in ``CHECKS``.

    Raises:
        ValueError: for another name.
    """

    def __init__(self, skip: Collection[str] = ()) -> None:
        super().__init__()
        if unknown := [name for name in ([skip] if isinstance(skip, str) else skip) if name not in CHECKS]:
            raise ValueError(f"{unknown[0]!r} is no check of the self-check, to be turned off: {', '.join(CHECKS)}.")
        self.skip = frozenset(skip)

    def wants(self, name: str) -> bool:
        """Whether this check is to be made; records that it is turned off if it is."""
        if name in self.skip:
            self[name] = "turned off"
        return name not in self.skip
