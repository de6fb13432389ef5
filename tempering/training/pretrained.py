"""Train a model once and load its weights in later runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tempering.utils.files import file_lock, read_json, sha256_text


def train_or_load(
    model: nn.Module, name: str, folder: str | Path, train: Callable[[Path], Any], *, key: Mapping[str, Any]
) -> dict[str, Any]:
    """Load trained weights into ``model``, after training it if there are none.

    Several processes may call this at once: one trains, the others wait for its weights.

    Args:
        model: the model with its initial weights, which ``train`` trains in place.
        name: of the model, for its folder ``<folder>/<name>-<hash of key>``.
        folder: where trained models are kept.
        train: called with the model's folder if its training is not finished; it has to resume an interrupted run.
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
    """Return the folder of a model that is trained once."""
    digest = sha256_text(json.dumps([name, key], sort_keys=True, default=str))
    return Path(folder) / f"{name}-{digest[:10]}"


def is_trained(path: Path) -> bool:
    """Whether the run in this folder is finished and has weights."""
    return _facts(path).get("status") == "done"


def load_trained(model: nn.Module, path: Path) -> dict[str, Any]:
    """Load the weights of a finished run; return its scores of the last epoch, split -> metric -> value."""
    from tempering.models import load

    load(model, path / "student.safetensors")
    return {split: scores for split, scores in _facts(path)["result"]["last"].items() if split != "epoch"}


def _facts(path: Path) -> dict[str, Any]:
    return read_json(path / "facts.json") if (path / "student.safetensors").is_file() else {}
