"""Models that are trained once, and logits that are recorded once, and reused by later runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import KEY
from tempering.teachers.cache.logits import Cached, record
from tempering.teachers.cache.recorder import as_recorded
from tempering.utils.files import file_lock, sha256_text


def train_or_load(
    model: nn.Module, name: str, folder: str | Path, train: Callable[[Path], Any], *, key: Mapping[str, Any]
) -> dict[str, Any]:
    """Load trained weights into ``model``, after training it if there are none.

    Several processes may call this at once: one trains, the others wait for its weights.

    Args:
        model: the model as built, which ``train`` trains in place.
        name: of the model, for its folder ``<folder>/<name>-<hash of key>``.
        folder: where trained models are kept.
        train: called with the model's folder if it is not trained, or not to its end; it has to resume.
        key: what the weights depend on: data, seed, length and so on.

    Returns:
        The scores of the last epoch, split -> metric -> value.
    """
    path = model_folder(name, folder, key)
    with file_lock(path.with_name(path.name + ".lock")):
        if not is_trained(path):
            train(path)
        return load_trained(model, path)


def model_folder(name: str, folder: str | Path, key: Mapping[str, Any]) -> Path:
    """The folder of a model that is trained once."""
    digest = sha256_text(json.dumps([name, key], sort_keys=True, default=str))
    return Path(folder) / f"{name}-{digest[:10]}"


def is_trained(path: Path) -> bool:
    """Whether the run in this folder is finished and has weights."""
    return _facts(path).get("status") == "done"


def load_trained(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load the weights of a finished run; its scores of the last epoch, split -> metric -> value."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path / "student.safetensors"))
    return {split: scores for split, scores in _facts(path)["result"]["last"].items() if split != "epoch"}


def _facts(path: Path) -> dict[str, Any]:
    file = path / "facts.json"
    return json.loads(file.read_text()) if file.is_file() and (path / "student.safetensors").is_file() else {}


@dataclass(frozen=True, kw_only=True)
class LogitCache:
    """Compute the teacher's logits of the training batches once, and read them from disk ever after.

    Attributes:
        batches: the training batches.
        folder: where recordings are kept.
        views: number of augmentations to record of each sample, which training then replays; 0 records clean samples.
        seed: of the augmentations.
        quiet: no progress bar.
    """

    batches: Any
    folder: Path
    views: int = 0
    seed: int = 0
    quiet: bool = False

    @property
    def replayed(self) -> Any:
        """The batches to train on: those whose logits are recorded."""
        return self.batches.replay(self.views) if self.views else self.batches

    def open(self, live: Teacher, *, dry: bool = False) -> Cached:
        """The cached teacher, recorded if it is not; ``live`` answers for other batches, such as the test split.

        Args:
            live: the teacher.
            dry: record nothing: a missing recording is replaced by ``live`` itself.
        """
        suffix = f"{self.views}-{self.seed}" if self.views else "0"
        path = self.folder / f"answers-{live.identity[:10]}-{self.batches.identity[:10]}-{suffix}"
        views = self.views or None
        if dry and not (path / KEY).is_file():
            cached = _DryCache(path, live, as_recorded(self.batches, views), clean=views is None)
        else:
            cached = record(live, self.batches, path, views=views, quiet=self.quiet)
        cached.fallback = live
        return cached


class _DryCache(Cached):
    """What ``Cached`` will be once it is recorded: accepts and rejects the same batches; asks the live teacher."""

    def __init__(self, path: Path, live: Teacher, batches: Any, *, clean: bool) -> None:
        self.path, self.clean, self.live = path, clean, live
        self.key = {"data": batches.identity, "augmentation": batches.augmentation}
        self.rows, self.identity = batches.rows, live.identity

    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        return super().__call__(inputs, ids) if ids is None else self.live(inputs, ids)

    def to(self, device: torch.device | str) -> Self:
        self.live.to(device)
        return self


_DryCache.__name__ = Cached.__name__  # errors name the class of a teacher, and a check's are the run's
