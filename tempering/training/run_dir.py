"""Manage the folder of a run: its lock, key, checkpoints and weights, and the content of facts.json."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tempering.methods.base import Method
from tempering.teachers.base import Teacher
from tempering.training import checkpoint
from tempering.training.config import TrainConfig, TrainState
from tempering.training.distributed import all_gather_objects
from tempering.training.recorder import surroundings
from tempering.utils.files import try_lock

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@contextmanager
def lock_run_dir(folder: Path | None) -> Generator[None]:
    """Lock the run's folder, so that no second process writes records and checkpoints there.

    Raises:
        ValueError: if another process has the lock.
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


class RunDirectory:
    """Save a run to its folder and resume it from there; only rank 0 writes.

    Args:
        folder: None saves nothing.
        parts: student, method and optimizer, whose state is saved in checkpoints.
        key: of the run, from ``run_key``; a run with another key is not resumed.
    """

    def __init__(
        self, folder: Path | None, fabric: Fabric, parts: tuple[nn.Module, Method, Any], key: Mapping[str, Any]
    ) -> None:
        self.folder, self.fabric = folder, fabric
        self.student, self.method, self.optimizer = parts
        self.key: dict[str, Any] = json.loads(json.dumps(key, default=_to_text))

    def resume(self, *, restart: bool) -> tuple[TrainState, dict[str, Any] | None]:
        """Load the newest checkpoint.

        Args:
            restart: remove checkpoints and weights of an earlier run and start from the beginning.

        Returns:
            The training progress, and this rank's random state; a new TrainState and None if there is no checkpoint.

        Raises:
            ValueError: if the folder has the checkpoint of another run; names the difference.
            CorruptCheckpointError: if the newest checkpoint is truncated or edited.
        """
        if self.folder is None:
            return TrainState(), None
        path = self.folder / "checkpoints"
        if restart:
            self.fabric.barrier()
            if self.fabric.is_global_zero:
                shutil.rmtree(path, ignore_errors=True)
                for name in ("student.safetensors", "best.safetensors"):
                    (self.folder / name).unlink(missing_ok=True)
            self.fabric.barrier()
        state = checkpoint.load(path)
        if state is None:
            return TrainState(), None
        saved_key = json.loads(state["key"])
        for name, value in self.key.items():
            if saved_key.get(name) != value:
                raise ValueError(
                    f"{self.folder} holds another run: its {name} was {saved_key.get(name)!r}, now it is {value!r}. "
                    "Give another out=, or resume=False (--no-resume) to restart there (the earlier run is removed)."
                )
        checkpoint.scatter(state, self.student, self.method, self.optimizer)
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        random_state, loss_sum = state["ranks"][self.fabric.global_rank]
        return replace(TrainState(**state["at"]), loss_sum=loss_sum), random_state

    def save(self, state: TrainState, *, keep: int) -> None:
        """Write a checkpoint of the run, and remove all but the newest ``keep``."""
        if self.folder is None:
            return
        content = checkpoint.collect(
            self.student,
            self.method,
            self.optimizer,
            key=json.dumps(self.key),
            progress=asdict(state),
            ranks=all_gather_objects([checkpoint.random_state(), state.loss_sum], self.fabric),
            precision=self.fabric.strategy.precision.state_dict(),
        )
        if self.fabric.is_global_zero:
            checkpoint.save(self.folder / "checkpoints", state.step, content, keep=keep)
        self.fabric.barrier()

    def write_weights(self, name: str) -> None:
        """Write the student's weights as the file ``name`` in the folder."""
        if self.folder is None:
            return
        weights = checkpoint.gather(self.student, None, None)["student"]
        if self.fabric.is_global_zero:
            checkpoint.save_weights(self.folder / name, weights)


def _to_text(value: Any) -> str:
    """Convert to text that is equal in another process: without memory addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def run_key(
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
    """Return the key of a run: everything that its weights depend on."""
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


def run_metadata(
    key: Mapping[str, Any],
    student: nn.Module,
    teacher: Teacher | None,
    method: Method,
    config: TrainConfig,
    *,
    best_by: str | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of facts.json at the start of a run; ``facts`` are the caller's and override the rest."""
    teacher_facts: dict[str, Any] | None = None
    if teacher is not None:
        model = teacher.model
        count = None if model is None else sum(p.numel() for p in model.parameters())
        name = type(teacher if model is None else model).__name__
        teacher_facts = {
            "name": name,
            "parameters": count,
            "identity": teacher.identity,
            **(facts.get("teacher") or {}),
        }
    return {
        **surroundings(),
        "seed": config.seed,
        "method": key["method"],
        "policies": {name: {"name": type(p).__name__, **p.hyperparameters()} for name, p in method.policies().items()},
        "label": type(method).__name__,
        "settings": config.record() | {"total_steps": key["total_steps"], "world": key["world"]},
        "optimizer": key["optimizer"],
        "best_by": best_by,
        "selfcheck": None,
        **facts,
        "student": {
            "name": type(student).__name__,
            "parameters": sum(math.prod(p.shape) for p in student.parameters()),
            **facts.get("student", {}),
        },
        "teacher": teacher_facts,
        "data": {"identity": key["data"], **facts.get("data", {})},
    }
