"""Store of adversarial perturbations on disk, one file per image: int8 in units of 1/255, so without loss."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tempering.utils.files import write_atomic

FORMAT = 1
AGAIN = "Remove it, and it is computed again."


class _TensorFile(Protocol):
    """The part of safetensors' ``safe_open`` in use."""

    def __enter__(self) -> _TensorFile: ...
    def __exit__(self, *error: object) -> None: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_tensor(self, name: str) -> Tensor: ...


class CorruptStoreError(RuntimeError):
    """A corrupt file of stored perturbations; the message names the file and the remedy."""


class Store:
    """Perturbations of one teacher and attack, by image name; several processes may share a folder.

    Args:
        folder: created if it does not exist.
        teacher: fingerprint of the teacher's weights.
        attack: settings of the attack, JSON-serializable.

    Raises:
        ValueError: for a folder of another teacher or other settings, naming the field and both values.
        CorruptStoreError: for a folder whose key cannot be read.
    """

    def __init__(self, folder: str | Path, *, teacher: str, attack: dict[str, Any]) -> None:
        self.folder = Path(folder)
        expected = {"format": FORMAT, "teacher": teacher, **attack}
        path = self.folder / "key.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(expected, indent=1), concurrent=True)
        try:
            stored: Any = json.loads(path.read_text())
        except ValueError as error:
            raise CorruptStoreError(
                f"{path} is not a key of stored perturbations ({error}). Remove the folder."
            ) from error
        key = _mapping(stored)
        if other := [name for name in expected if key is None or key.get(name) != expected[name]]:
            name, value = other[0], stored if key is None else key.get(other[0])
            raise ValueError(
                f"{self.folder} contains perturbations of another {'teacher' if name == 'teacher' else 'attack'}: its "
                f"{name} is {value!r}, and {expected[name]!r} is needed. Give another cache=, or remove the folder."
            )

    def get(self, name: str, size: tuple[int, ...]) -> Tensor | None:
        """Return the stored int8 perturbation of this image, or None.

        Raises:
            CorruptStoreError: for a file that is truncated or edited.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with cast("_TensorFile", safe_open(path, "pt")) as file:
                metadata, value = file.metadata() or {}, file.get_tensor("delta")
        except (SafetensorError, OSError) as error:
            raise CorruptStoreError(f"{path} cannot be read ({error}). {AGAIN}") from error
        if value.dtype != torch.int8 or tuple(value.shape) != size or metadata.get("sha256") != _checksum(value):
            raise CorruptStoreError(f"{path} is corrupt: its values do not match its checksum. {AGAIN}")
        return value

    def put(self, name: str, value: Tensor) -> None:
        """Write a perturbation atomically."""
        path, value = self._path(name), value.cpu().contiguous()
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, save({"delta": value}, metadata={"sha256": _checksum(value)}), concurrent=True)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"


def _mapping(value: Any) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _checksum(value: Tensor) -> str:
    return hashlib.sha256(value.numpy().data).hexdigest()
