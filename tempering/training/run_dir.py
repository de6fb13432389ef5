"""Manage the folder of a run: its lock, key, checkpoints and weights, and the content of facts.json."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.teachers.base import Teacher, fingerprint
from tempering.training import checkpoint
from tempering.training.config import Run, TrainConfig, TrainState
from tempering.training.distributed import all_gather_objects
from tempering.training.resumable_loader import loader_settings, settings_of
from tempering.training.run_records import read_facts, surroundings
from tempering.utils.files import damaged_files, folder_path, read_json_lines, try_lock, verify_records
from tempering.utils.tensors import batch_digests, read_weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tempering.tasks.base import Task

POINTS = 256  # of the schedule, at equal distances
# student -> (folder of its last run, hash of its weights before that run, and after)
_TRAINED: WeakKeyDictionary[nn.Module, tuple[Path, str, str]] = WeakKeyDictionary()
WORDS = {  # of the parts of a run's key, in messages
    "data": "data",
    "loader": "training loader",
    "batches": "training data (hashes of the first batches)",
    "samples": "data (hashes of samples: process/split/part)",
    "splits": "evaluation data",
    "initial_weights": "initial weights of the student (sha256)",
    "optimizer_type": "optimizer",
    "schedule": "schedule",
    "task": "task",
}
HINTS = {
    "initial_weights": " Seed the student with torch.manual_seed() before it is built, so that the same command builds "
    "the same one; one with the weights of the newest checkpoint is accepted too.",
}
# options of a run's key that earlier versions did not have
ADDED: dict[str, Any] = {
    "ema": None,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "class_weights": None,
    "balanced_sampling": False,
}
WEIGHT_FILES = ("student.safetensors", "best.safetensors", "ema.safetensors")
How = Literal["new", "resumed", "extended", "finished"]


def run_folder(out: str | Path) -> Path:
    """Return the folder of a run, with ~ for the home directory.

    Raises:
        ValueError: if it cannot be a folder.
    """
    return folder_path(out, f"out={str(out)!r} (--out)", "out=")


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
        others: modules that follow the student's weights, by name, saved in checkpoints as well.

    Attributes:
        how: "new", "resumed", "extended" (a finished run, to more steps) or "finished" (nothing is left to train).
        extended: (steps before, steps now) of an extended run; None of another.
        positions: size and hash of the records at the checkpoint that was loaded; None if they are not known.
        loader_state: of the training loader at that checkpoint; None of a loader without one.
    """

    def __init__(
        self,
        folder: Path | None,
        fabric: Fabric,
        parts: tuple[nn.Module, Method, Any],
        key: Mapping[str, Any],
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.folder, self.fabric = folder, fabric
        self.student, self.method, self.optimizer = parts
        self.others = others or {}
        self.key: dict[str, Any] = json.loads(json.dumps(key, default=_to_text))
        self.how: How = "new"
        self.extended: tuple[int, int] | None = None
        self.positions: dict[str, Any] | None = None
        self.loader_state: Any = None
        # most buffers outside of the state dict are constants, such as masks; those that change are saved
        self.constants = {} if folder is None else batch_digests(checkpoint.unsaved_buffers(self.student))

    def resume(
        self, *, restart: bool, extend: bool = False, again: Mapping[str, Callable[[], Mapping[str, str]]] | None = None
    ) -> tuple[TrainState, dict[str, Any] | None]:
        """Load the newest checkpoint.

        Args:
            restart: remove checkpoints and weights of an earlier run and start from the beginning.
            extend: continue a finished run to more steps.
            again: part of the key, "batches" or "samples" -> a function that loads them again and returns their hashes,
                called if they differ from those of the saved run. Parts that differ each time, as of an unseeded
                augmentation, are not compared.

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
                for name in WEIGHT_FILES:
                    (self.folder / name).unlink(missing_ok=True)
            self.fabric.barrier()
        state = checkpoint.load(path)
        facts: dict[str, Any] = (
            {} if restart else self.fabric.broadcast(read_facts(self.folder))
        )  # rank 0 changes it later
        if state is None:
            if facts.get("status") == "done":
                raise ValueError(
                    f"{self.folder} holds a finished run without checkpoints, so it is not known whether it is this "
                    "one. `tempering report` shows it. Give another out=, or resume=False (--no-resume) to train again."
                )
            return TrainState(), None
        saved_key = ADDED | json.loads(state["key"])
        at = TrainState(**state["at"])
        result: dict[str, Any] = facts.get("result") or {}
        steps = result.get("steps") if facts.get("status") == "done" else None
        done = steps == at.step and (self.folder / "student.safetensors").is_file()
        is_finished = at.stopped or done
        self._check_same(saved_key, state["student"], is_finished=is_finished, extend=extend, again=again or {})
        checkpoint.scatter(state, self.student, self.method, self.optimizer)
        checkpoint.load_buffers(self.student, state.get("buffers", {}))
        for name, module in self.others.items():
            module.load_state_dict(state[name])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.positions = checkpoint.load_records(path)
        random_state, loss_sum, *loader = state["ranks"][self.fabric.global_rank]
        self.loader_state = next(iter(loader), None)
        at = replace(at, loss_sum=loss_sum)
        self.how = "resumed"
        if extend and is_finished and self.key["total_steps"] > saved_key["total_steps"]:
            self.how, self.extended = "extended", (at.step, self.key["total_steps"])
            at = replace(at, stopped=False, stale=0, length=None)
        elif done:
            self.how = "finished"
        return at, random_state

    def _check_same(
        self,
        saved: dict[str, Any],
        weights: Mapping[str, Any],
        *,
        is_finished: bool,
        extend: bool,
        again: Mapping[str, Callable[[], Mapping[str, str]]],
    ) -> None:
        """Raise an error that names what differs if the saved run is another one."""
        longer = self.key["total_steps"] > saved["total_steps"]
        different = differences(saved, self.key, without=("total_steps", "patience") if extend and is_finished else ())
        if "initial_weights" in different and same_weights(self.student, weights):
            different.remove("initial_weights")  # of the student in the folder, such as after an earlier call
        for part in set(again) & set(different):
            second = again[part]()
            stable = {name: digest for name, digest in self.key[part].items() if second.get(name) == digest}
            if all(saved[part].get(name) == digest for name, digest in stable.items()):
                different.remove(part)
        if extend and not is_finished and "total_steps" in different:
            raise ValueError(
                f"{self.folder} holds a run that is not finished, and extend=True (--extend) continues a finished one. "
                f"Finish it first, with its own length: total_steps {saved['total_steps']}."
            )
        if extend and self.key["total_steps"] < saved["total_steps"]:
            raise ValueError(
                f"{self.folder} holds a run of {saved['total_steps']} steps, and extend=True (--extend) continues it "
                f"to more; got {self.key['total_steps']}."
            )
        if not different:
            return
        hint = "".join(HINTS.get(name, "") for name in different)
        if different == ["total_steps"] and is_finished and longer:
            hint = " extend=True (--extend) continues this finished run to the new length."
        raise ValueError(
            f"{self.folder} holds another run: "
            f"{'; '.join(in_words(name, saved[name], self.key[name]) for name in different)}. "
            "Give another out=, or resume=False (--no-resume) to restart there (the earlier run is removed)." + hint
        )

    def read_finished(self) -> Run:
        """Return the result of the finished run in the folder, whose weights ``resume`` has loaded.

        Raises:
            ValueError: if its records or its weights are damaged, naming the file.
        """
        assert self.folder is not None
        facts = read_facts(self.folder)
        verify_records(self.folder, facts)
        for name in WEIGHT_FILES:
            if (self.folder / name).is_file():
                read_weights(self.folder / name)
        if damaged := damaged_files(self.folder, facts.get("files", {}), sizes_only=True):
            warnings.warn(f"{'; '.join(damaged)}, though the run is finished.", stacklevel=2)
        epochs = read_json_lines(self.folder / "epochs.jsonl", "epoch")
        return Run(self.student, self.folder, facts, epochs, "finished")

    def save(
        self, state: TrainState, *, keep: int, records: Mapping[str, Any] | None = None, loader: Any = None
    ) -> None:
        """Write a checkpoint of the run, and remove all but the newest ``keep``; for ``records`` see ``checkpoint``.

        ``loader`` is the state of a stateful training loader.
        """
        if self.folder is None:
            return
        content = checkpoint.collect(
            self.student,
            self.method,
            self.optimizer,
            key=json.dumps(self.key),
            progress=asdict(state),
            ranks=all_gather_objects([checkpoint.random_state(), state.loss_sum, loader], self.fabric),
            precision=self.fabric.strategy.precision.state_dict(),
            others=self.others,
            buffers=self._changed_buffers(),
        )
        if self.fabric.is_global_zero:
            checkpoint.save(self.folder / "checkpoints", state.step, content, keep=keep, records=records)
        self.fabric.barrier()

    def _changed_buffers(self) -> dict[str, Tensor]:
        buffers = checkpoint.unsaved_buffers(self.student)
        now = batch_digests(buffers)
        return {name: x for name, x in buffers.items() if now[f"/{name}"] != self.constants.get(f"/{name}")}

    def write_weights(self, name: str, metadata: Mapping[str, str] | None = None) -> None:
        """Write the student's weights as the file ``name`` in the folder, with metadata."""
        if self.folder is None:
            return
        weights = checkpoint.gather(self.student, None, None)["student"]
        if self.fabric.is_global_zero:
            checkpoint.save_weights(self.folder / name, weights, metadata)


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
    task: Task,
    schedule: Callable[[float], float] | None,
    loader: Any,
    splits: Mapping[str, Any],
    initial_weights: str | None,
    total_steps: int,
    world: int,
) -> dict[str, Any]:
    """Return the key of a run: everything that its weights depend on, except for the hashes of its first batches.

    Args:
        loader: the training batches.
        splits: the evaluation batches, name -> batches.
        initial_weights: hash of the student's; None if it is not known.
    """
    named = {"initial_weights": initial_weights} if initial_weights is not None else {}
    return {
        "method": {"name": type(method).__name__, **method.hyperparameters()},
        "teacher": None if teacher is None else teacher.identity,
        "student": {name: list(value.shape) for name, value in student.state_dict().items()},
        **named,
        "data": getattr(loader, "identity", None),
        "loader": loader_settings(loader),
        "splits": {name: getattr(b, "identity", None) or loader_settings(b) for name, b in splits.items()},
        "task": settings_of(task),
        "schedule": schedule_values(schedule),
        "optimizer_type": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "optimizer": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "total_steps": total_steps,
        "world": world,
        **{name: config.record()[name] for name in ("seed", "accumulate", "clip", "precision", "patience", *ADDED)},
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
        models = teacher.models
        count = sum(p.numel() for model in models for p in model.parameters()) if models else None
        name = type(teacher if teacher.parts or not models else models[0]).__name__
        teacher_facts = {
            "name": name,
            "parameters": count,
            "identity": teacher.identity,
            **_named(facts.get("teacher")),
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
            **_named(facts.get("student")),
        },
        "teacher": teacher_facts,
        "data": {"identity": key["data"], **_named(facts.get("data"))},
    }


def _named(facts: Any) -> Mapping[str, Any]:
    """Return the caller's facts about a part; text is its name."""
    named = {} if facts is None else {"name": str(facts)}
    return cast("Mapping[str, Any]", facts) if isinstance(facts, Mapping) else named


def schedule_values(schedule: Callable[[float], Any] | None) -> dict[str, Any] | None:
    """Return the factors of a schedule: some of them for people, and a hash of many."""
    if schedule is None:
        return None
    values = [float(schedule(i / POINTS)) for i in range(POINTS)]
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    return {"factors": [round(v, 6) for v in values[:: POINTS // 8]], "sha256": digest}


def differences(saved: Mapping[str, Any], key: Mapping[str, Any], *, without: Iterable[str] = ()) -> list[str]:
    """Return the parts of a key in which two runs differ; a part that the saved one does not have is not compared."""
    return [name for name, value in key.items() if name in saved and name not in without and saved[name] != value]


def in_words(name: str, before: Any, now: Any) -> str:
    """Say how a part of a run's key differs."""
    if isinstance(before, dict) and isinstance(now, dict) and name not in ("method", "student", "schedule"):
        old, new = cast("dict[str, Any]", before), cast("dict[str, Any]", now)
        names = [key for key in {**old, **new} if old.get(key) != new.get(key)][:3]
        before, now = ({key: value.get(key) for key in names} for value in (old, new))
    return f"its {WORDS.get(name, name)} was {_short(before)}, now it is {_short(now)}"


def _short(value: Any, limit: int = 600) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def initial_weights(student: nn.Module, folder: Path) -> str:
    """Return the hash of the weights that a run in this folder begins with.

    For a student that an earlier call in this process has trained into the same folder, and that nobody has changed
    since, these are the weights that it had before that call.
    """
    digest = fingerprint(student)
    trained_in, before, after = _TRAINED.get(student, (None, "", ""))
    return before if (trained_in, after) == (folder.resolve(), digest) else digest


def remember_weights(student: nn.Module, folder: Path, before: str) -> None:
    """Note the weights that a call leaves in a student, for ``initial_weights``."""
    _TRAINED[student] = (folder.resolve(), before, fingerprint(student))


def same_weights(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Return whether the module has exactly these weights."""
    if any(hasattr(p, "to_local") for p in module.parameters()):  # sharded
        return False
    own = module.state_dict()
    return own.keys() == state.keys() and all(
        torch.equal(own[name].cpu(), state[name].cpu()) if isinstance(own[name], Tensor) else own[name] == state[name]
        for name in own
    )
