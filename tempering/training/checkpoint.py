"""Checkpoints that are whole or not there: tensors as safetensors, the rest as JSON, written beside and renamed."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempering.utils import files

NAME = "step-{:08d}"
OLD = ".replaced"  # a checkpoint that makes way for a newer one of its step
STATE, TENSORS = "state.json", "tensors.safetensors"
FORMAT = 1


class CorruptCheckpointError(RuntimeError):
    """A checkpoint that cannot be trusted; the message names it and what to do."""


def save(folder: Path, step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write ``state`` (nested dicts and lists of tensors and plain values) as the checkpoint of ``step``.

    It is written beside its place, flushed, and renamed, so a kill at any moment leaves a whole one. All but the
    newest ``keep`` are removed.

    Raises:
        OSError: when it cannot be written, saying how much was needed; the older checkpoints stay.
    """
    place = folder / NAME.format(step)
    beside, old = place.with_name(place.name + ".partial"), place.with_name(place.name + OLD)
    tensors: dict[str, Tensor] = {}
    plain = _part(state, "", tensors)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        files.write_file(beside / TENSORS, _tensor_bytes(tensors))
        record = {"format": FORMAT, "step": step, TENSORS: files.sha256_file(beside / TENSORS), "state": plain}
        files.write_file(beside / STATE, json.dumps({**record, "sha256": _digest(record)}).encode())
        if place.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        beside.rename(place)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise _unwritten(f"the checkpoint of step {step}", tensors, folder, error) from error
    gone = [NAME.format(step) for step in sorted(found(folder))[:-keep]]
    for name in (old.name, *gone, *(f"{name}{OLD}" for name in gone), *(p.name for p in folder.glob("*.partial"))):
        shutil.rmtree(folder / name, ignore_errors=True)
    return place


def found(folder: Path) -> list[int]:
    """The steps that have a checkpoint here, in no order."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(rf"step-(\d{{8,}})({re.escape(OLD)})?", p.name) for p in folder.iterdir())
    return list({int(m.group(1)) for m in matches if m})


def load(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state, None where there is none.

    Raises:
        CorruptCheckpointError: where the newest one is truncated, edited or unreadable.
    """
    steps = found(folder)
    if not steps:
        return None
    place = folder / NAME.format(max(steps))
    if not place.is_dir():
        place = place.with_name(place.name + OLD)
    try:
        return read(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rest = [s for s in steps if s != max(steps)]
        older = f"from step {max(rest)}" if rest else "from the start: there is no older one"
        raise CorruptCheckpointError(
            f"the checkpoint {place} is broken: {error}. Remove that folder to resume {older}."
        ) from error


def read(place: Path) -> dict[str, Any]:
    """The state in one checkpoint's folder, each file compared with its hash.

    Raises:
        ValueError: for one that is not as it was written.
    """
    record = json.loads((place / STATE).read_bytes())
    if record.pop("sha256") != _digest(record):
        raise ValueError(f"{STATE} is not as it was written (edited)")
    if record["format"] != FORMAT:
        raise ValueError(f"its format is {record['format']!r}, and this version reads {FORMAT}")
    if files.sha256_file(place / TENSORS) != record[TENSORS]:
        raise ValueError(f"{TENSORS} is not as it was written (truncated or edited)")
    return _whole(record["state"], _read_tensors(place / TENSORS))


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write weights alone as one safetensors file, atomically.

    Raises:
        OSError: when it cannot be written; an older file stays.
    """
    try:
        files.write_atomic(path, _tensor_bytes({name: t.detach() for name, t in tensors.items()}), fsync=True)
    except OSError as error:
        raise _unwritten(f"the weights {path.name}", tensors, path.parent, error) from error


def gather(student: nn.Module, method: nn.Module | None, optimizer: Any) -> dict[str, Any]:
    """The whole state of student, method and optimizer, of which None are left out; the same on every rank.

    Sharded parameters (FSDP2) are put together; then the optimizer's state is by parameter name, else by number.
    """
    if not sharded(student):
        parts = {"student": student, "method": method, "optimizer": optimizer}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=False)
    out: dict[str, Any] = {"student": get_model_state_dict(student, options=whole)}
    if method is not None:
        out["method"] = method.state_dict()
    if optimizer is not None:
        trained = nn.ModuleDict({"student": student, "method": method or nn.Module()})
        out["optimizer"] = get_optimizer_state_dict(trained, _bare(optimizer), options=whole)
    return out


def scatter(state: Mapping[str, Any], student: nn.Module, method: nn.Module, optimizer: Any) -> None:
    """Put back what ``gather`` took."""
    method.load_state_dict(state["method"])
    if not sharded(student):
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    whole = StateDictOptions(full_state_dict=True)
    set_model_state_dict(student, state["student"], options=whole)
    trained = nn.ModuleDict({"student": student, "method": method})
    set_optimizer_state_dict(trained, _bare(optimizer), state["optimizer"], options=whole)


def sharded(module: nn.Module) -> bool:
    """Whether any parameter lies in parts on several ranks."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters())


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def random_state() -> dict[str, Any]:
    """The state of every global random number generator."""
    version, words, gauss = random.getstate()
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    out: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), pos, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        out["cuda"] = list(torch.cuda.get_rng_state_all())
    return out


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _part(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors taken out into ``tensors`` and named in their place."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        # pairs, since the keys of an optimizer's state are integers and JSON's are not
        return {"map": [[key, _part(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_part(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values; got {type(value).__name__} at {path or '/'}")


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "map" in value:
        return {key: _whole(item, tensors) for key, item in value["map"]}
    return [_whole(item, tensors) for item in value["list"]]


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save as to_bytes

    # clone: safetensors refuses tensors that share memory, and tied weights do
    return to_bytes({name: t.cpu().contiguous().clone() for name, t in tensors.items()})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        return from_bytes(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _unwritten(what: str, tensors: Mapping[str, Tensor], folder: Path, error: OSError) -> OSError:
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    return OSError(
        error.errno,
        f"cannot write {what} ({size:.1f} MB) under {folder}: {error.strerror}. Free some space there, or give another "
        "out=; older checkpoints are untouched, and the run resumes from them when it is started again.",
    )


def _digest(record: Mapping[str, Any]) -> str:
    return files.sha256_text(json.dumps(record))
