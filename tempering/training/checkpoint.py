"""Write and read atomic checkpoints: tensors as safetensors, the rest as JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tempering.utils import files
from tempering.utils.state import random_state as random_state
from tempering.utils.state import set_random_state as set_random_state
from tempering.utils.tensors import tensors_to_bytes

NAME = "step-{:08d}"
OLD = ".replaced"  # suffix of a checkpoint while a newer one of the same step replaces it
STATE, TENSORS = "state.json", "tensors.safetensors"
FORMAT = 1


class CorruptCheckpointError(RuntimeError):
    """A checkpoint is truncated, edited or unreadable; the message names it and what to do."""


def save(
    folder: Path, step: int, state: Mapping[str, Any], *, keep: int = 2, records: Mapping[str, Any] | None = None
) -> Path:
    """Write the checkpoint of ``step``, and remove all but the newest ``keep``.

    It is written to a temporary folder, flushed and renamed, so that a run killed at any moment leaves a complete one.

    Args:
        state: nested dicts and lists of tensors and plain values.
        records: size and hash of the run's records at this step, JSON-able; ``load_records`` returns them.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written, with the required size; older checkpoints are kept.
    """
    path = folder / NAME.format(step)
    tmp_path, old = path.with_name(path.name + ".partial"), path.with_name(path.name + OLD)
    tensors: dict[str, Tensor] = {}
    plain = _extract_tensors(state, "", tensors)
    shutil.rmtree(tmp_path, ignore_errors=True)
    try:
        tmp_path.mkdir(parents=True)
        files.write_file(tmp_path / TENSORS, tensors_to_bytes(tensors))
        record = {"format": FORMAT, "step": step, TENSORS: files.sha256_file(tmp_path / TENSORS), "state": plain}
        record |= {} if records is None else {"records": records}
        files.write_file(tmp_path / STATE, json.dumps({**record, "sha256": _digest(record)}).encode())
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        tmp_path.rename(path)
    except OSError as error:
        shutil.rmtree(tmp_path, ignore_errors=True)
        raise _write_error(f"the checkpoint of step {step}", tensors, folder, error) from error
    expired = [NAME.format(step) for step in sorted(list_steps(folder))[:-keep]]
    partial = [p.name for p in folder.glob("*.partial")]
    for name in (old.name, *expired, *(f"{name}{OLD}" for name in expired), *partial):
        shutil.rmtree(folder / name, ignore_errors=True)
    return path


def list_steps(folder: Path) -> list[int]:
    """List the steps that have a checkpoint in the folder, in any order."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(rf"step-(\d{{8,}})({re.escape(OLD)})?", p.name) for p in folder.iterdir())
    return list({int(m.group(1)) for m in matches if m})


def load(folder: Path) -> dict[str, Any] | None:
    """Load the state of the newest checkpoint; None if there is none.

    Raises:
        CorruptCheckpointError: if the newest one is truncated, edited or unreadable.
    """
    path = _newest(folder)
    if path is None:
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        steps = list_steps(folder)
        older_steps = [s for s in steps if s != max(steps)]
        older = f"from step {max(older_steps)}" if older_steps else "from the start: there is no older one"
        raise CorruptCheckpointError(
            f"the checkpoint {path} is broken: {error}. Remove that folder to resume {older}."
        ) from error


def load_records(folder: Path) -> dict[str, Any] | None:
    """Load the size and hash of the run's records at the newest checkpoint, which ``load`` has verified.

    None if there is no checkpoint, or in one that an earlier version wrote.
    """
    path = _newest(folder)
    return None if path is None else json.loads((path / STATE).read_bytes()).get("records")


def _newest(folder: Path) -> Path | None:
    steps = list_steps(folder)
    if not steps:
        return None
    path = folder / NAME.format(max(steps))
    return path if path.is_dir() else path.with_name(path.name + OLD)


def read(path: Path) -> dict[str, Any]:
    """Read the state in a checkpoint's folder, after comparing each file with its hash.

    Raises:
        ValueError: if a file has been changed or has another format.
    """
    record = json.loads((path / STATE).read_bytes())
    if record.pop("sha256") != _digest(record):
        raise ValueError(f"{STATE} is not as it was written (edited)")
    if record["format"] != FORMAT:
        raise ValueError(f"its format is {record['format']!r}, and this version reads {FORMAT}")
    if files.sha256_file(path / TENSORS) != record[TENSORS]:
        raise ValueError(f"{TENSORS} is not as it was written (truncated or edited)")
    return _insert_tensors(record["state"], _read_tensors(path / TENSORS))


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write weights to a safetensors file with a checksum and other metadata, atomically.

    Raises:
        OSError: if it cannot be written; an existing file is kept.
    """
    try:
        files.write_atomic(path, tensors_to_bytes(tensors, checksum=True, metadata=metadata), fsync=True)
    except OSError as error:
        raise _write_error(f"the weights {path.name}", tensors, path.parent, error) from error


def collect(
    student: nn.Module,
    method: nn.Module,
    optimizer: Any,
    *,
    key: str,
    progress: Mapping[str, Any],
    ranks: Sequence[Any],
    precision: Mapping[str, Any],
    others: Mapping[str, nn.Module] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return the content of a checkpoint, which resuming reads.

    Args:
        student, method, optimizer: their full state is included.
        key: identity of the run, JSON.
        progress: fields of TrainState.
        ranks: (random state, sum of losses of the epoch, state of the loader or None) of each rank.
        precision: state of Fabric's precision plugin, such as a loss scale.
        others: modules that follow the student's weights, by name.
        buffers: of the student that its state dict leaves out and that have changed.
    """
    content: dict[str, Any] = {"key": key, "at": progress, "ranks": ranks, "precision": precision}
    content |= {name: module.state_dict() for name, module in (others or {}).items()}
    if buffers:
        content["buffers"] = dict(buffers)
    return content | gather(student, method, optimizer)


def gather(student: nn.Module, method: nn.Module | None, optimizer: Any) -> dict[str, Any]:
    """Return the full state of student, method and optimizer, equal on every rank; None is left out.

    Sharded parameters (FSDP2) are gathered; the optimizer's state is then keyed by parameter name, otherwise by index.
    """
    if not is_sharded(student):
        parts = {"student": student, "method": method, "optimizer": optimizer}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    state: dict[str, Any] = {"student": get_model_state_dict(student, options=options)}
    if method is not None:
        state["method"] = method.state_dict()
    if optimizer is not None:
        modules = nn.ModuleDict({"student": student, "method": method or nn.Module()})
        state["optimizer"] = get_optimizer_state_dict(modules, _unwrap(optimizer), options=options)
    return state


def scatter(state: Mapping[str, Any], student: nn.Module, method: nn.Module, optimizer: Any) -> None:
    """Load the state that ``gather`` returned."""
    method.load_state_dict(state["method"])
    if not is_sharded(student):
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(student, state["student"], options=options)
    modules = nn.ModuleDict({"student": student, "method": method})
    set_optimizer_state_dict(modules, _unwrap(optimizer), state["optimizer"], options=options)


def unsaved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are not in the module's state dict: name -> tensor."""
    named = dict(module.named_buffers())
    saved = module.state_dict().keys() if named else ()
    return {name: buffer for name, buffer in named.items() if name not in saved}


def load_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set buffers by name, as ``unsaved_buffers`` returned them."""
    for name, value in buffers.items():
        path, _, own = name.rpartition(".")
        setattr(module.get_submodule(path), own, value.to(module.get_buffer(name).device, copy=True))


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter is sharded over ranks."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters())


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _extract_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of ``value`` into ``tensors``; return ``value`` as JSON that refers to them by path."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        # pairs, because the keys of an optimizer's state are integers and JSON's are not
        items = cast("Mapping[Any, Any]", value).items()
        return {"map": [[key, _extract_tensors(item, f"{path}/{key}", tensors)] for key, item in items]}
    if isinstance(value, (list, tuple)):
        values = cast("Sequence[Any]", value)
        return {"list": [_extract_tensors(item, f"{path}/{i}", tensors) for i, item in enumerate(values)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values; got {type(value).__name__} at {path or '/'}")


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold a value: nested tensors and plain values."""
    try:
        json.dumps(_extract_tensors(value, "", {}))
    except TypeError:
        return False
    return True


def _insert_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo ``_extract_tensors``."""
    if not isinstance(value, dict):
        return value
    node = cast("dict[str, Any]", value)
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "map" in node:
        return {key: _insert_tensors(item, tensors) for key, item in node["map"]}
    return [_insert_tensors(item, tensors) for item in node["list"]]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        return from_bytes(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _write_error(name: str, tensors: Mapping[str, Tensor], folder: Path, error: OSError) -> OSError:
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    return OSError(
        error.errno,
        f"cannot write {name} ({size:.1f} MB) under {folder}: {error.strerror}. Free some space there, or give another "
        "out=; older checkpoints are kept, and the run resumes from them if it is started again.",
    )


def _digest(record: Mapping[str, Any]) -> str:
    return files.sha256_text(json.dumps(record))
