"""Adversaries on disk, a file an image: whole 1/255 in int8, so that what is read is what was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tempering.utils.files import write_atomic

FORMAT = 1
AGAIN = "Remove it, and it is made again."


class CorruptStoreError(RuntimeError):
    """A stored adversary that cannot be trusted; the message names the file and what to do."""


class Store:
    """What was made for one teacher by one attack, by the image's name; several processes may share a folder.

    Args:
        folder: made where there is none.
        teacher: the fingerprint of its weights.
        attack: its settings, JSON-able.

    Raises:
        ValueError: for a folder of another teacher or other settings, naming the field and both values.
        CorruptStoreError: for a folder whose key cannot be read.
    """

    def __init__(self, folder: str | Path, *, teacher: str, attack: dict[str, Any]) -> None:
        self.folder = Path(folder)
        wanted = {"format": FORMAT, "teacher": teacher, **attack}
        path = self.folder / "key.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(wanted, indent=1), concurrent=True)
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise CorruptStoreError(f"{path} is no key of stored adversaries ({error}). Remove the folder.") from error
        if other := [name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]]:
            name, has = other[0], found.get(other[0]) if isinstance(found, dict) else found
            raise ValueError(
                f"{self.folder} holds adversaries of another {'teacher' if name == 'teacher' else 'attack'}: its "
                f"{name} is {has!r}, and {wanted[name]!r} is wanted. Give another cache=, or remove the folder."
            )

    def get(self, name: str, size: tuple[int, ...]) -> Tensor | None:
        """The stored int8 of this image, None where there is none.

        Raises:
            CorruptStoreError: for a file that is truncated or edited.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                said, value = file.metadata() or {}, file.get_tensor("delta")
        except (SafetensorError, OSError) as error:
            raise CorruptStoreError(f"{path} cannot be read ({error}). {AGAIN}") from error
        if value.dtype != torch.int8 or tuple(value.shape) != size or said.get("sha256") != _sum(value):
            raise CorruptStoreError(f"{path} is not what was written: its numbers do not fit its checksum. {AGAIN}")
        return value

    def put(self, name: str, value: Tensor) -> None:
        """Write one, whole or not at all."""
        path, value = self._path(name), value.cpu().contiguous()
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, save({"delta": value}, metadata={"sha256": _sum(value)}), concurrent=True)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"


def _sum(value: Tensor) -> str:
    return hashlib.sha256(value.numpy().data).hexdigest()
