"""Load the student of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tempering.export.quantization import load_quantized
from tempering.models import load, rebuild
from tempering.training.pretrained import CONFIG, METADATA, WEIGHTS
from tempering.utils.files import read_json

if TYPE_CHECKING:
    from tempering.training.experiment import Experiment

HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "tempering.json"


def load_student(run: str | Path, *, model: nn.Module | None = None, best: bool = False) -> nn.Module:
    """Return the student of a finished run in eval mode.

    Args:
        run: the run's folder, its student.safetensors, or a folder of ``hub_folder``, also one of int8 or int4.
        model: the network, for one that config.json does not describe: a module of your own. Without it, such a network
            is built by the recipe that the run was started with.
        best: load the weights of the best epoch instead of the last.

    Raises:
        FileNotFoundError: if there are no weights.
        ImportError: for int8 and int4 without torchao.
        ValueError: for a network that cannot be built, weights of another network, or damaged files.
    """
    run = Path(run)
    weights = run if run.is_file() else _weights(run, "best.safetensors" if best else WEIGHTS)
    hub = weights.with_name(HUB_CONFIG).is_file()
    config = read_config(weights.parent if hub else run) if hub or model is None else {}
    to = config.get("quantized")
    if model is None:
        spec = config.get("network")
        if hub and spec is not None and spec["kind"] == "transformers" and to is None:
            return rebuild(spec, weights.parent).eval()  # its library saves weights under other names
        model = rebuild(spec) if spec is not None else _from_recipe(run)
    return load_quantized(model, weights, to) if to else load(model, weights).eval()


def read_config(run: str | Path) -> dict[str, Any]:
    """Return what a run has written about its student: network, inputs, normalization, scores and so on.

    Raises:
        FileNotFoundError: if there is neither a config.json nor one in the weights' metadata.
    """
    run = Path(run)
    names = () if run.is_file() else (HUB_CONFIG, CONFIG)
    found = {run / name: read_json(run / name) for name in names}
    path = next((path for path, config in found.items() if "network" in config), None)
    weights = run if run.is_file() else run / (HUB_WEIGHTS if path == run / HUB_CONFIG else WEIGHTS)
    stored = _metadata(weights)
    if path is not None:
        config = found[path]
        if stored is not None and (other := _difference(config, stored)) is not None:
            raise ValueError(
                f"{path} is not as it was written: {other!r} differs from the metadata of {weights.name}. Restore one "
                f"of the two; without {path.name}, the metadata are read."
            )
        return config
    if stored is not None:
        return stored
    raise FileNotFoundError(
        f"there is no description of a student in {run}: a run writes config.json when it ends, since version 0.2. "
        "Give the network: tempering.load_student(run, model=net)."
    )


def _metadata(weights: Path) -> dict[str, Any] | None:
    """Return the description in the metadata of a file of weights; None without one."""
    if not weights.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(METADATA, "null"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{weights} is damaged: {error}. Restore the file, or train again.") from error


def _difference(config: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """Return the first part of a config that the metadata have otherwise; they do not have the best scores."""
    sides = [{**part, "scores": (part.get("scores") or {}).get("last")} for part in (config, stored)]
    # as text, in which NaN equals NaN
    texts = [{name: json.dumps(value, sort_keys=True) for name, value in side.items()} for side in sides]
    return next((name for name in {**texts[0], **texts[1]} if texts[0].get(name) != texts[1].get(name)), None)


def experiment_of(run: Path) -> Experiment:
    """Return the Experiment of the recipe that a run was started with, which has its data; nothing is trained.

    Raises:
        ValueError: if the run was not started by ``tempering run``.
    """
    from tempering.experiments.flag_files import flags_from
    from tempering.experiments.recipe import describe

    recipe, argv = flags_from(run / "facts.json", None, ())
    return describe(recipe, argv, prog=f"tempering export {run}")


def example_inputs(config: Mapping[str, Any], batch: int = 2) -> Any:
    """Return inputs of the student, random images or ones as tokens: a tensor (batch, ...), or name -> tensor.

    Raises:
        ValueError: if the inputs of the student are not known.
    """

    def example(described: Mapping[str, Any]) -> Tensor:
        dtype, shape = getattr(torch, described["dtype"]), (batch, *described["shape"])
        if not dtype.is_floating_point:
            return torch.ones(shape, dtype=dtype)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    inputs = config.get("inputs")
    if not inputs:
        raise ValueError("the inputs of this student are neither a tensor nor named tensors; give inputs=.")
    return example(inputs) if "dtype" in inputs else {name: example(value) for name, value in inputs.items()}


def _weights(run: Path, name: str) -> Path:
    if not run.is_dir():
        raise FileNotFoundError(f"there is no {run}. Give a run's folder, or its student.safetensors.")
    hub = run / HUB_WEIGHTS
    return hub if hub.is_file() and not (run / name).is_file() else run / name


def _from_recipe(run: Path) -> nn.Module:
    try:
        return experiment_of(run if run.is_dir() else run.parent).student
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"the student of {run} is a module that config.json does not describe, and its recipe cannot build it "
            f"({str(error).rstrip('.')}). Give it: tempering.load_student({str(run)!r}, model=net), or "
            "--model net.py:Net to tempering export."
        ) from error
