"""A teacher's answers in shards: files of safetensors, each written whole or not at all and checked when opened."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.cache.logits import CHECKED, BrokenCache, key_in, objection_to
from tempering.teachers.cache.recorder import FORMAT, KEY, Recordable, device_of, progress, refuse_other
from tempering.utils.files import alone, lasting, sha256_of

Tensors = dict[str, Tensor]
BYTES = 2**26  # of a shard at most, so that a kill costs little and a shard fits into memory
TEXTS = 1024  # in a shard at most
AGAIN = "Remove the folder and record it again."


def record_shards(
    path: Path,
    key: Mapping[str, Any],
    ask: Callable[[Tensor], Tensors],
    teacher: Teacher,
    *,
    size: int,
    more: Mapping[str, tuple[Tensors, dict[str, str]]] | None = None,
    quiet: bool = False,
) -> None:
    """Ask about ``key["rows"]`` texts, ``size`` in a shard, and move the whole to its path; goes on where it stopped.

    Of several processes that call this one records, and the others wait.

    Args:
        ask: ids to what a shard holds of them.
        more: other files by name, with their metadata.

    Raises:
        ValueError: where another recording was begun or is there, naming what differs.
    """
    if not (path / KEY).is_file():
        _record(path, key, ask, teacher, size, more or {}, quiet)
    refuse_other(path, dict(key))


def _record(
    path: Path,
    key: Mapping[str, Any],
    ask: Callable[[Tensor], Tensors],
    teacher: Teacher,
    size: int,
    more: Mapping[str, tuple[Tensors, dict[str, str]]],
    quiet: bool,
) -> None:
    """Take up what is there, ask about the rest, and finish."""
    folder = path.with_name(path.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if (path / KEY).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # the other one has finished
            return
        key = {**key, "size": size}
        if (folder / KEY).is_file():
            refuse_other(folder, key)
        else:
            lasting(folder / KEY, "w", lambda file: json.dump(key, file))
        files = []
        with progress(key["rows"], 0, quiet) as advance:
            for number, first in enumerate(range(0, key["rows"], size)):
                ids = torch.arange(first, min(first + size, key["rows"]))
                file = folder / f"{number:05d}.safetensors"
                if not file.is_file():
                    _save(file, ask(ids), {})
                files.append(file)
                advance(len(ids))
        for name, (tensors, about) in more.items():
            _save(folder / name, tensors, about)
            files.append(folder / name)
        _finish(path, folder, key, files, teacher)


def key_of(kind: str, batches: Recordable, teacher: Teacher, **own: Any) -> dict[str, Any]:
    """What a recording of this kind is known by."""
    return {
        "format": FORMAT,
        "kind": kind,
        "data": batches.identity,
        "teacher": teacher.identity,
        "augmentation": batches.augmentation,
        "rows": batches.rows,
        "length": batches.at(torch.tensor([0]))[0]["labels"].shape[1],
        **own,
    }


def given(batches: Recordable, ids: Tensor, inputs: Callable[[Any], Any], device: torch.device) -> tuple[Any, Tensor]:
    """What the teacher is to be asked about these texts, on its device; and their labels."""
    batch, labels, _ = batches.at(ids)
    return inputs({name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()})[1], labels


def _save(file: Path, tensors: Tensors, about: dict[str, str]) -> None:
    from safetensors.torch import save

    held = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata=about)
    beside = file.with_suffix(".new")
    lasting(beside, "wb", lambda opened: opened.write(held))
    beside.replace(file)


def _finish(path: Path, folder: Path, key: Mapping[str, Any], files: Iterable[Path], teacher: Teacher) -> None:
    """The key with its checksums, then the folder under its own name."""
    from tempering._version import __version__

    shards = [{"file": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files]
    model = teacher.model
    made = {
        "teacher": type(teacher if model is None else model).__name__,
        "device": device_of(teacher).type,
        "torch": str(torch.__version__),
        "tempering": __version__,
    }
    whole = hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()
    beside = folder / (KEY + ".new")
    record = {**key, "shards": shards, "sha256": whole, "made": made}
    lasting(beside, "w", lambda file: json.dump(record, file, indent=1))
    beside.replace(folder / KEY)
    folder.rename(path)


class Shards:
    """Looks texts up by id. Files are mapped and only read, so many processes may read one cache.

    Args:
        path: the folder of the recording.
        kind: what it must hold.
        batches: refuse to open for other texts, another length or another padding.
        teacher: refuse to open for another teacher's answers.
        checksum: whether to look at every file's checksum; None does below 256 MB. ``verify()`` does at any time.

    Raises:
        FileNotFoundError: where there is no finished recording.
        BrokenCache: naming a file that is missing, truncated or edited.
        ValueError: for other data or another teacher.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str,
        batches: Any = None,
        teacher: Teacher | None = None,
        checksum: bool | None = None,
    ) -> None:
        self.path, self.key = Path(path), key_in(Path(path))
        if self.key.get("kind") != kind:
            raise ValueError(f"{self.path} holds {self.key.get('kind', 'logits')!r}, asked for is {kind!r}.")
        self.rows, self.size, self.length = self.key["rows"], self.key["size"], self.key["length"]
        self.identity = key_digest({name: value for name, value in self.key.items() if name != "made"})
        self.verify(checksum=sum(s["bytes"] for s in self.key["shards"]) < CHECKED if checksum is None else checksum)
        why = None if batches is None else self.objection(batches)
        if why is not None:
            raise ValueError(why)
        if teacher is not None and teacher.identity != self.key["teacher"]:
            raise ValueError(
                f"{self.path} holds the answers of another teacher: its teacher is {self.key['teacher']}, the one "
                f"given is {teacher.identity}. Give that teacher, or record this one elsewhere."
            )
        self._open: dict[str, Any] = {}

    def verify(self, *, checksum: bool = True) -> None:
        """Look at every file's size, and at its checksum.

        Raises:
            BrokenCache: naming the file.
        """
        for shard in self.key["shards"]:
            file = self.path / shard["file"]
            got = file.stat().st_size if file.is_file() else None
            if got != shard["bytes"]:
                what = "is missing" if got is None else f"has {got} bytes, and {KEY} says {shard['bytes']}"
                raise BrokenCache(f"{file} {what}. {AGAIN}")
            if checksum and sha256_of(file) != shard["sha256"]:
                raise BrokenCache(
                    f"{file} was changed since it was recorded: its checksum is not that of {KEY}. {AGAIN}"
                )

    def objection(self, batches: Any) -> str | None:
        """Why these answers do not belong to these batches, and what to do; None if they do."""
        return objection_to(self.path, self.key, batches)

    def at(self, ids: Tensor | None) -> list[tuple[Any, int]]:
        """(file, row in it) of every id.

        Raises:
            ValueError: for no ids, or one that there is not.
        """
        if ids is None:
            raise ValueError(
                "a recorded teacher looks answers up by sample id, and the batch has none. data.Tokens and data.Pairs "
                "have them; what a student wrote itself has none: teachers.Live(model)."
            )
        found = ids.tolist()
        if found and not 0 <= min(found) <= max(found) < self.rows:
            raise ValueError(
                f"{self.path} has texts 0 to {self.rows - 1}, and the batch asks for {min(found)} to {max(found)}. Are "
                "these the batches it was recorded with?"
            )
        return [(self.file(f"{i // self.size:05d}.safetensors"), i % self.size) for i in found]

    def file(self, name: str) -> Any:
        """One of the files, mapped."""
        from safetensors import safe_open

        if name not in self._open:
            self._open[name] = safe_open(str(self.path / name), framework="pt")
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        # a copy sent to another process maps the files itself
        return {**self.__dict__, "_open": {}}


def split(values: Int[Tensor, "*N"], width: int | None = None) -> Int[Tensor, "*N bytes"]:
    """Whole numbers from 0 on in so many bytes each, the least first; None are as many as the largest needs."""
    most = int(values.max()) if values.numel() else 0
    shifts = 8 * torch.arange(width or max(1, -(-most.bit_length() // 8)))
    return ((values[..., None] >> shifts) & 255).to(torch.uint8)


def joined(parts: Int[Tensor, "*N bytes"]) -> Int[Tensor, "*N"]:
    """The numbers that ``split`` took apart."""
    return (parts.long() << 8 * torch.arange(parts.shape[-1])).sum(-1)


def room(bytes_of_text: int) -> int:
    """How many texts go into a shard."""
    return max(1, min(TEXTS, BYTES // max(1, bytes_of_text)))
