"""What a run is told, where it stands, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tempering.utils.device import validate_compile_mode

COUNTS = ("steps", "epochs", "evaluate_every", "accumulate", "log_every", "checkpoint_every", "keep", "patience")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run, whatever is run; written into facts.json as it is."""

    steps: int | None
    epochs: int | None
    evaluate_every: int
    seed: int
    accumulate: int
    clip: float | None
    precision: str
    accelerator: str
    devices: int | str
    strategy: str
    compile: bool | str
    chunks: bool | None
    log_every: int
    checkpoint_every: int | None
    keep: int
    patience: int | None
    resume: bool
    selfcheck: bool
    quiet: bool

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give steps= or epochs=, one of them; got steps={self.steps}, epochs={self.epochs}.")
        validate_compile_mode(self.compile)
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more; got {value}.")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip is the largest norm of the gradient, > 0; got {self.clip}. None leaves it alone.")


@dataclass
class TrainState:
    """Training progress, saved in checkpoints."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # of the epoch, in micro-batches
    seconds: float = 0.0  # of training, evaluation left out
    loss_sum: float = 0.0  # of the epoch so far, of this rank
    best_value: float | None = None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    stale: int = 0  # evaluations since the best one
    stopped: bool = False


@dataclass
class Run:
    """What ``distill`` returns.

    Attributes:
        student: the trained net, unwrapped, with its last weights.
        folder: where the records are; None for a run that wrote none.
        facts: the content of facts.json.
        epochs: the lines of epochs.jsonl.
    """

    student: nn.Module
    folder: Path | None
    facts: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, Any]:
        """The last evaluation, {"epoch", "validation": {...}, "test": {...}}."""
        return self.facts["result"]["last"]

    @property
    def best(self) -> dict[str, Any]:
        """The best evaluation, by ``facts["best_by"]``."""
        return self.facts["result"]["best"]
