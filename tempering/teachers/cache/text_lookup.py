"""Read teacher outputs for texts from shards: safetensors files of several texts each, found by the texts' tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tempering.teachers.base import key_digest
from tempering.teachers.cache.base import CachedTeacher, CorruptCacheError, StoredFile, check_file
from tempering.teachers.cache.texts import BATCH_FIELDS, NO_CONTENT, Text, output_shape, texts_of
from tempering.utils.tensors import on_host

BY_TEXT = 2  # format of recordings by text and learned position; 1 is by sample id, with padding


class Found(NamedTuple):
    """Where the outputs of a batch are stored, and where they belong.

    Attributes:
        shape: (B, L) of the batch.
        parts: for every text that is stored: a file, the text's row in it, and its part of the tensors.
        places: the positions of all parts among B * L.
        stored: the positions that are stored; None: all.
    """

    shape: tuple[int, int]
    parts: list[tuple[Any, int, slice | int]]
    places: Int[Tensor, " N"]
    stored: Bool[Tensor, "B L"] | None

    def scatter(self, values: Tensor, fill: float = torch.nan) -> Tensor:
        """Return (B, L, ...) with the values (N, ...) of all parts, and ``fill`` elsewhere."""
        B, L = self.shape
        out = values.new_full((B * L, *values.shape[1:]), fill)
        return out.index_copy_(0, self.places, values).view(B, L, *values.shape[1:])


class CachedShards(CachedTeacher):
    """A cached teacher of texts whose files are shards; arguments and errors are those of ``CachedTeacher``.

    A text is found by its tokens, so padding, order and batch size are free, and any subset of the texts will do.
    """

    things = "texts"
    data_parts = "tokens, labels, padding and order"

    def _open(self) -> None:
        self.by_text = self.key["format"] == BY_TEXT
        self._verified = False
        if self.by_text:
            self.identity = key_digest({n: x for n, x in self.key.items() if n not in GROWING})
            self._complete = set(self.key["data"])
        else:
            self.size: int = self.key["size"]  # texts per shard
            self.length: int = self.key["length"]

    def files(self) -> list[StoredFile]:
        return [StoredFile(self.path / s["file"], s["bytes"], s["sha256"]) for s in self.key["shards"]]

    def file(self, name: str) -> Any:
        """Return one of the files, memory-mapped; compare its checksum first, unless that was done or declined.

        Raises:
            CorruptCacheError: if it was changed since it was recorded.
        """
        if name not in self._mapped:
            stored = next(file for file in self.files() if file.path.name == name)
            if not self._verified and self.checksum is None:
                check_file(stored, f"Remove the folder and record it again: {self.recorded_by}.")
            self._mapped[name] = open_shard(stored.path)
        return self._mapped[name]

    def find(self, inputs: Mapping[str, Any], ids: Int[Tensor, " B"] | None) -> Found:
        """Return where the outputs of these texts are.

        Raises:
            ValueError: for a text that is not in the recording.
        """
        if not self.by_text:
            return self._find_by_id(ids)
        names = set(self.key["inputs"])
        inputs = {name: x for name, x in inputs.items() if name in names or name not in BATCH_FIELDS}
        if "input_ids" not in inputs:
            raise ValueError(f"{self.path} has texts, and the batch has no input_ids but {sorted(inputs)}.")
        (B, L), texts = output_shape(inputs), texts_of(inputs)
        parts, index = [], [torch.zeros(0, dtype=torch.long)]
        for text in texts:
            place = self._index.get(text.key)
            if place is not None:
                file, row = self.file(place[0]), place[1]
                parts.append((file, row, stored_slice(file, row)))
                index.append(text.row * L + text.columns[stored_positions(file, row)])
            elif len(texts) == B:  # padding of a packed row is not recorded
                raise ValueError(self._missing(text, ids) + self._other_inputs(inputs))
        flat = torch.cat(index)
        return Found((B, L), parts, flat, torch.zeros(B * L, dtype=torch.bool).index_fill_(0, flat, True).view(B, L))

    def _missing(self, text: Text, ids: Tensor | None) -> str:
        which = f"row {text.row} of the batch" if ids is None else f"the text with id {int(ids[text.row])}"
        return (
            f"{self.path} has {self.rows} texts, and {which}, of {len(text.columns)} tokens, is not one of them. Add "
            f"the texts of other batches: {self.recorded_by}. For generated texts: teachers.Live(model)."
        )

    def _other_inputs(self, inputs: Mapping[str, Any]) -> str:
        """Name the inputs besides the tokens that only one of recording and batch has; they belong to a text."""
        names = {n for n, x in inputs.items() if isinstance(x, Tensor) and x.ndim and n not in NO_CONTENT}
        other = sorted(names ^ set(self.key["inputs"]))
        return f" Only one of the two has the inputs {', '.join(other)}: give both the same." if other else ""

    def _find_by_id(self, ids: Int[Tensor, " B"] | None) -> Found:
        if ids is None:
            raise ValueError(
                "a cached teacher looks up outputs by sample id, and the batch has none. Batches of data.Tokens and "
                "data.Pairs have ids; generated texts have none and need teachers.Live(model)."
            )
        numbers = on_host(ids).tolist()
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.rows:
            raise ValueError(
                f"{self.path} has texts 0 to {self.rows - 1}, and the batch has ids {min(numbers)} to {max(numbers)}. "
                "Are these the batches it was recorded with?"
            )
        rows = [(self.file(shard_name(i // self.size)), i % self.size) for i in numbers]
        parts: list[tuple[Any, int, slice | int]] = [(file, row, row) for file, row in rows]
        return Found((len(rows), self.length), parts, torch.arange(len(rows) * self.length), None)

    def first(self) -> tuple[Any, int, slice | int]:
        """Return the part of the first text, which shows an empty batch the shape of its outputs."""
        return self.file(shard_name(0)), 0, slice(0, 0) if self.by_text else 0

    @property
    def _index(self) -> dict[int, tuple[str, int]]:
        """Key of a text -> (file, row in it); of a text that was recorded twice, the later has all its positions."""
        if self._by_key is None:
            self._by_key = {}
            for name in sorted(s["file"] for s in self.key["shards"]):
                if is_shard(name):
                    keys = self.file(name).get_tensor("keys").tolist()
                    self._by_key.update((key, (name, row)) for row, key in enumerate(keys))
        return self._by_key

    def incompatibility(self, batches: Any) -> str | None:
        identity = getattr(batches, "identity", None)
        if not self.by_text or identity is None or not hasattr(batches, "gather"):
            return super().incompatibility(batches)
        if identity in self._complete:
            return None
        names, rows = [*self.key["inputs"], "attention_mask"], batches.rows
        for ids in torch.arange(rows).split(1024):
            batch = batches.gather(ids)[0]
            try:
                texts = texts_of({name: batch[name] for name in names if name in batch})
            except (KeyError, TypeError, AttributeError):
                return super().incompatibility(batches)
            if missing := [text for text in texts if text.key not in self._index]:
                return f"{self.path} contains outputs for other data: {self._missing(missing[0], ids)}"
        self._complete.add(identity)
        return None

    def check_files(self, *, checksum: bool = True) -> None:
        super().check_files(checksum=checksum)
        self._verified = self._verified or checksum

    def _map(self) -> dict[str, Any]:
        self._by_key: dict[int, tuple[str, int]] | None = None
        return {}  # files are memory-mapped at their first use

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_by_key": None}


def device_like(inputs: Mapping[str, Any], ids: Tensor | None) -> torch.device:
    """Return the device of a batch."""
    like = inputs.get("input_ids", ids)
    return torch.device("cpu") if like is None else like.device


GROWING = {"made", "check", "data", "rows", "shards", "sha256"}  # what changes when texts are added


# files


def open_shard(path: Path) -> Any:
    """Memory-map a safetensors file.

    Raises:
        CorruptCacheError: if it is none, naming it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CorruptCacheError(f"{path} cannot be read ({error}). Remove the folder and record it again.") from error


def stored_slice(file: Any, row: int) -> slice:
    """Return the part of a shard's tensors that belongs to one of its texts."""
    return slice(*file.get_slice("first")[row : row + 2].tolist())


def stored_positions(file: Any, row: int) -> Int[Tensor, " n"]:
    """Return the numbers of the stored tokens within one of a shard's texts."""
    begin, end = file.get_slice("first_run")[row : row + 2].tolist()
    return torch.cat([torch.arange(a, b) for a, b in [(0, 0), *file.get_slice("runs")[begin:end].tolist()]])


def to_runs(positions: Int[Tensor, " n"]) -> Int[Tensor, "R 2"]:
    """Return increasing numbers as ranges (begin, end)."""
    edges = (positions.diff() != 1).nonzero().flatten() + 1
    parts = [part.tolist() for part in positions.tensor_split(edges) if len(part)]
    return torch.tensor([(part[0], part[-1] + 1) for part in parts], dtype=torch.long).view(-1, 2)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number:05d}.safetensors"


def is_shard(name: str) -> bool:
    """Return whether this is the file name of a shard."""
    return name.split(".")[0].isdigit()


# integers in as few bytes as possible


def to_bytes(values: Int[Tensor, "*N"], width: int | None = None) -> Int[Tensor, "*N bytes"]:
    """Return non-negative integers as uint8, least significant byte first; width None fits the largest."""
    largest = int(values.max()) if values.numel() else 0
    shifts = 8 * torch.arange(width or max(1, -(-largest.bit_length() // 8)))
    return ((values[..., None] >> shifts) & 255).to(torch.uint8)


def from_bytes(parts: Int[Tensor, "*N bytes"]) -> Int[Tensor, "*N"]:
    """Invert ``to_bytes``."""
    return (parts.long() << 8 * torch.arange(parts.shape[-1])).sum(-1)
