"""Files of a trained student: weights, their description and cost; and training a model once, to load it later."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempering._version import __version__
from tempering.tasks.base import Task, tokenizer_of
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.training.config import TrainState
from tempering.training.selfcheck import one_sample
from tempering.utils.files import file_lock, read_verified, sha256_text
from tempering.utils.tensors import eval_mode

CONFIG = "config.json"
WEIGHTS = "student.safetensors"
TOKENIZER = "tokenizer"  # folder
METADATA = "tempering"  # key in the metadata of student.safetensors, whose value is the config as JSON
REPEATS = 3  # timed forwards


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
    return read_verified(path / "facts.json") if (path / "student.safetensors").is_file() else {}


# the description of a student


def student_config(
    student: nn.Module, batch: Any, *, task: Task, data: Any, facts: Mapping[str, Any], state: TrainState
) -> dict[str, Any]:
    """Return the content of config.json, JSON-able; the same for the same run, whenever and wherever it ran.

    The metadata of the weights have all of it but the best scores, which depend on how often a run is scored.

    Args:
        batch: of the training data.
        data: the training loader, whose attributes tell classes, normalization and tokenizer.
        facts: the content of facts.json.
        state: the progress at the end, with the scores.
    """
    tokenizer = tokenizer_of(data)
    name = None if tokenizer is None else getattr(tokenizer, "name_or_path", "") or TOKENIZER
    teacher: dict[str, Any] | None = facts.get("teacher")
    data_facts: dict[str, Any] = facts.get("data") or {}
    config: dict[str, Any] = {
        "format": 1,
        "library": {"name": "tempering", "version": __version__},
        "network": describe(student),
        "student": facts.get("student"),
        "inputs": shapes(first_inputs(task.inputs(batch)[0])),
        "classes": getattr(data, "classes", None),
        "class_names": getattr(data, "class_names", None),
        "mean": getattr(data, "mean", None),
        "std": getattr(data, "std", None),
        "tokenizer": name,
        "task": type(task).__name__,
        "teacher": None if teacher is None else {key: teacher.get(key) for key in ("name", "parameters", "identity")},
        "method": facts.get("method"),
        "label": facts.get("label"),
        "seed": facts.get("seed"),
        "data": data_facts.get("name"),
        "best_by": facts.get("best_by"),
        "scores": {"last": state.last, "best": state.best},
    }
    return json.loads(json.dumps(config, default=str))


def shapes(inputs: Any) -> Any:
    """Return shape without the batch, and dtype, of every tensor in a model's inputs; None for other inputs."""
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape[1:]), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        named = cast("Mapping[Any, Any]", inputs)
        return {str(name): shapes(value) for name, value in named.items() if isinstance(value, Tensor)}
    return None


def first_inputs(inputs: Any) -> Any:
    """Return a model's inputs for the first sample, without what is no tensor, such as a detector's targets."""
    if isinstance(inputs, Mapping):
        named = cast("Mapping[Any, Any]", inputs)
        inputs = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    return one_sample(inputs)


def costs(student: nn.Module, teacher: Teacher | None, batch: Any, task: Task) -> dict[str, Any]:
    """Measure both models on one sample: "student" and, if it is live, "teacher" -> what ``cost`` returns.

    "measured" says under which conditions.
    """
    student_inputs, teacher_inputs, ids = map(first_inputs, task.inputs(batch))
    measured = {"student": cost(student, lambda: student(student_inputs))}
    if isinstance(teacher, Live):
        measured["teacher"] = cost(teacher.model, lambda: teacher(teacher_inputs, ids))
    return {**measured, "measured": conditions(student)}


def conditions(model: nn.Module) -> dict[str, Any]:
    """Return what times depend on: "device", "threads", "cores", and "load", processes that ran in the last minute."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": load}


def cost(model: nn.Module, forward: Callable[[], object]) -> dict[str, Any]:
    """Measure a model.

    Returns:
        "parameters"; "bytes" of its weights; "flops" of a forward pass, a multiplication and an addition being two;
        "latency_ms", the median time of three passes on the device, with the threads, of this process. Without the
        last two if the forward fails.
    """
    tensors = list(model.state_dict().values())
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": size}
    try:
        from torch.utils.flop_counter import FlopCounterMode

        # compiled code would lack hooks that are added later, and hides operations from the counter
        with torch.no_grad(), eval_mode(model), torch.compiler.set_stance("force_eager"):
            with FlopCounterMode(display=False) as counter:
                forward()
            latency = 1000.0 * median(_timed(forward) for _ in range(REPEATS))
    except Exception as error:  # such as of a model that splits its batch; a finished run is not lost for it
        return found | {"error": f"{type(error).__name__}: {error}"[:200]}
    return found | {"flops": counter.get_total_flops(), "latency_ms": latency}


def _timed(forward: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    forward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def save_tokenizer(data: Any, folder: Path) -> None:
    """Save the loader's tokenizer beside the weights, if it has one that can be saved."""
    tokenizer = tokenizer_of(data)
    if callable(getattr(tokenizer, "save_pretrained", None)):
        tokenizer.save_pretrained(str(folder / TOKENIZER))


def describe(net: Any) -> dict[str, Any] | None:
    """Return a JSON-able description of a network; None for a module that only its own code can build.

    Networks of ``models.build`` and ``detector`` have one, and models of timm and transformers that were built by their
    libraries. ``models.rebuild`` builds the network again.
    """
    if _is(net, "normalized", "Normalized"):
        inner = describe(net.net)
        values = {name: getattr(net, name).flatten().tolist() for name in ("mean", "std")}
        return None if inner is None else {"kind": "normalized", **values, "net": inner}
    model: Any = net.model if (wrapped := _is(net, "external", "Logits")) else net
    if callable(getattr(model, "save_pretrained", None)) and hasattr(getattr(model, "config", None), "to_json_string"):
        config = json.loads(model.config.to_json_string())
        return {"kind": "transformers", "class": type(model).__name__, "logits": wrapped, "config": config}
    if isinstance(built := getattr(net, "built", None), Mapping):
        return dict(cast("Mapping[str, Any]", built))
    own: Any = getattr(net, "pretrained_cfg", None)
    if isinstance(own, Mapping) and (name := cast("Mapping[str, Any]", own).get("architecture")):
        return {"kind": "timm", "name": name, "arguments": timm_arguments(net)}
    return None


def timm_arguments(net: Any) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` that give a model of timm its shapes."""
    channels = next((m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)), 3)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)
    return {"num_classes": net.num_classes, "in_chans": channels, **({"img_size": list(size)} if size else {})}


def _is(net: object, module: str, name: str) -> bool:
    """Whether it is an instance of a class of tempering.models, which is not imported for the question."""
    found = sys.modules.get(f"tempering.models.{module}")
    return found is not None and isinstance(net, getattr(found, name))
