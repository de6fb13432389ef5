"""What a run keeps: its key, checkpoints, weights and facts, and how it takes them up again."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tempering.methods.base import Method
from tempering.teachers.base import Teacher
from tempering.training import checkpoint as checkpoints
from tempering.training import recorder as records
from tempering.training.config import TrainConfig, TrainState
from tempering.training.distributed import all_gather_objects
from tempering.utils.files import try_lock

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Hold the run's folder, so that no second process writes its records and checkpoints between ours.

    Raises:
        ValueError: where another process holds it.
    """
    if folder is None:
        yield
        return
    lock = try_lock(folder / ".lock")
    if lock is None:
        raise ValueError(f"another process is writing to {folder}. Wait for it, or give another out= (--out).")
    try:
        yield
    finally:
        lock.release()


class Keeper:
    """One run's folder: knows whether what lies there is this very run, and saves it on the first rank.

    Args:
        parts: student, method and optimizer, whose state a checkpoint holds.
        key: what makes two runs the same run; resuming under another would be neither.
    """

    def __init__(
        self, folder: Path | None, fabric: Fabric, parts: tuple[nn.Module, Method, Any], key: Mapping[str, Any]
    ) -> None:
        self.folder, self.fabric = folder, fabric
        self.student, self.method, self.optimizer = parts
        self.key: dict[str, Any] = json.loads(json.dumps(key, default=_said))

    def resume(self, *, begin_again: bool) -> tuple[TrainState, dict[str, Any] | None]:
        """Where the newest checkpoint stands and this rank's random numbers; the start where there is none.

        Raises:
            ValueError: where the folder holds another run, naming what differs.
            CorruptCheckpointError: where the newest checkpoint cannot be trusted.
        """
        if self.folder is None:
            return TrainState(), None
        place = self.folder / "checkpoints"
        if begin_again:
            self.fabric.barrier()
            if self.fabric.is_global_zero:
                shutil.rmtree(place, ignore_errors=True)
                for name in ("student.safetensors", "best.safetensors"):
                    (self.folder / name).unlink(missing_ok=True)
            self.fabric.barrier()
        state = checkpoints.load(place)
        if state is None:
            return TrainState(), None
        theirs = json.loads(state["key"])
        for name, ours in self.key.items():
            if theirs.get(name) != ours:
                raise ValueError(
                    f"{self.folder} holds another run: its {name} was {theirs.get(name)!r}, now it is {ours!r}. Give "
                    "another out=, or resume=False (--no-resume) to begin again there (the earlier run is removed)."
                )
        checkpoints.scatter(state, self.student, self.method, self.optimizer)
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        random, loss_sum = state["ranks"][self.fabric.global_rank]
        return replace(TrainState(**state["at"]), loss_sum=loss_sum), random

    def save(self, at: TrainState, *, keep: int) -> None:
        """A checkpoint of everything, where there is a folder."""
        if self.folder is None:
            return
        state = {
            "key": json.dumps(self.key),
            "at": asdict(at),
            "ranks": all_gather_objects([checkpoints.random_state(), at.loss_sum], self.fabric),
            "precision": self.fabric.strategy.precision.state_dict(),
            **checkpoints.gather(self.student, self.method, self.optimizer),
        }
        if self.fabric.is_global_zero:
            checkpoints.save(self.folder / "checkpoints", at.step, state, keep=keep)
        self.fabric.barrier()

    def write_weights(self, name: str) -> None:
        """The student's weights alone, as ``name`` in the folder."""
        if self.folder is None:
            return
        weights = checkpoints.gather(self.student, None, None)["student"]
        if self.fabric.is_global_zero:
            checkpoints.save_weights(self.folder / name, weights)


def _said(value: Any) -> str:
    """Anything as text that is the same in the next process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def key_of(
    student: nn.Module,
    teacher: Teacher | None,
    method: Method,
    optimizer: Any,
    config: TrainConfig,
    *,
    data: str | None,
    total_steps: int,
    world: int,
) -> dict[str, Any]:
    """What makes a run itself."""
    return {
        "method": {"name": type(method).__name__, **method.hyperparameters()},
        "teacher": None if teacher is None else teacher.identity,
        "student": {name: list(value.shape) for name, value in student.state_dict().items()},
        "data": data,
        "optimizer": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "total_steps": total_steps,
        "world": world,
        **{name: config.record()[name] for name in ("seed", "accumulate", "clip", "precision")},
    }


def facts_of(
    key: Mapping[str, Any],
    student: nn.Module,
    teacher: Teacher | None,
    method: Method,
    config: TrainConfig,
    *,
    best_by: str | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """facts.json as it begins; ``more`` is the caller's, and wins."""
    taught: dict[str, Any] | None = None
    if teacher is not None:
        model = teacher.model
        count = None if model is None else sum(p.numel() for p in model.parameters())
        name = type(teacher if model is None else model).__name__
        taught = {"name": name, "parameters": count, "identity": teacher.identity, **(more.get("teacher") or {})}
    return {
        **records.surroundings(),
        "seed": config.seed,
        "method": key["method"],
        "policies": {name: {"name": type(p).__name__, **p.hyperparameters()} for name, p in method.policies().items()},
        "label": type(method).__name__,
        "settings": config.record() | {"total_steps": key["total_steps"], "world": key["world"]},
        "optimizer": key["optimizer"],
        "best_by": best_by,
        "selfcheck": None,
        **more,
        "student": {
            "name": type(student).__name__,
            "parameters": sum(math.prod(p.shape) for p in student.parameters()),
            **more.get("student", {}),
        },
        "teacher": taught,
        "data": {"identity": key["data"], **more.get("data", {})},
    }
