"""A teacher whose answers lie on disk: asked once by ``record``, looked up by sample id ever after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.teachers.base import Teacher
from tempering.teachers.cache.base import FORMAT, KEY, CachedTeacher, CorruptCacheError, StoredFile, check_key
from tempering.teachers.cache.recorder import (
    LOGITS,
    STORED,
    Recordable,
    Recording,
    as_recorded,
    device_of,
    query_teacher,
)

RESIDENT = 2**31  # bytes up to which a cache moves onto an accelerator with the run


class Cached(CachedTeacher):
    """Looks the teacher's logits up by sample id; float32, on the device of the inputs. Files are only read.

    Many processes may read one cache. Memory is shared between them, since the file is mapped.

    Args:
        path: the folder that ``record`` wrote.
        batches: refuse to open for other data or other augmentation than these.
        teacher: refuse to open for another teacher's answers.
        clean: give every augmented view of an image the answer to the clean image. The teacher then speaks of another
            picture than the student sees; without it, a cache of clean images serves clean images alone.
        checksum: whether to look at the file's checksum; None does for files below 256 MB.

    Raises:
        FileNotFoundError: where there is no finished cache.
        CorruptCacheError: for files that are truncated or edited.
        ValueError: for other data, augmentation or teacher, naming the field and both values.
    """

    kind = "logits"
    recorded_by = "teachers.record(teacher, batches, path)"

    def __init__(
        self,
        path: str | Path,
        *,
        batches: Any = None,
        teacher: Teacher | None = None,
        clean: bool = False,
        checksum: bool | None = None,
    ) -> None:
        self.clean = clean
        super().__init__(path, batches=batches, teacher=teacher, checksum=checksum)
        self.classes: int = self.key["classes"]

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Float[Tensor, "B C"]:
        if ids is None:
            raise ValueError(
                "a cached teacher looks answers up by sample id, and the batch has none. Yield (x, y, id), as "
                "data.Batches does, or use teachers.Live(model)."
            )
        table = self._mapped
        device = inputs.device if isinstance(inputs, Tensor) else ids.device
        place = ids.to(table.device)
        if table.device.type == "cpu":
            self._in_range(place)
            return table.index_select(0, place).to(device, torch.float32, non_blocking=True)
        # asking whether any id is out of range would wait for the device every step: such a row becomes NaN instead
        known = (place >= 0) & (place < self.rows)
        found = table.index_select(0, place.clamp(0, self.rows - 1)).float()
        return torch.where(known[:, None], found, torch.nan).to(device)

    def to(self, device: torch.device | str) -> Self:
        if torch.device(device).type == "cpu" or self._mapped.nbytes <= RESIDENT:
            self._mapped = self._mapped.to(device)
        return self

    def incompatibility(self, batches: Any) -> str | None:
        """Which of data and augmentation are not those that were recorded, and what to do; None if all are."""
        if (why := super().incompatibility(batches)) is not None:
            return why
        name = getattr(batches, "name", type(batches).__name__)
        ours, theirs = self.key["augmentation"], batches.augmentation
        if ours == theirs:
            return None
        if ours["views"] is None and theirs["views"] is None:
            if self.clean:
                return None
            return (
                f"{self.path} holds answers to clean images, and {name} are augmented: {_to_text(theirs)}. If the "
                f'teacher is to speak of the clean image, say so: Cached("{self.path}", clean=True). If it is to speak '
                "of what the student sees: record(teacher, batches, ANOTHER_PATH, views=8) and batches.replay(8)."
            )
        field = next(f for f in ("views", *ours) if ours.get(f) != theirs.get(f))
        how = "leave out views=" if ours["views"] is None else f"train on batches.replay({ours['views']})"
        return (
            f"{self.path} was recorded with {field}={ours.get(field)}, and {name} have {field}={theirs.get(field)} "
            f"(recorded: {_to_text(ours)}; given: {_to_text(theirs)}). With the recorded settings, {how}; or record "
            "anew: record(teacher, batches, ANOTHER_PATH, views=...)."
        )

    def verify(self, teacher: Teacher, batches: Recordable, *, rows: int = 32, seed: int = 0) -> None:
        """Ask the teacher again about ``rows`` random rows; nothing is said when all are as recorded.

        Raises:
            ValueError: for other batches, or naming the row that differs by more than its precision explains.
        """
        batches = as_recorded(batches, self.key["augmentation"]["views"])
        if (why := self.incompatibility(batches)) is not None:
            raise ValueError(why)
        words = np.random.Philox(key=seed).random_raw(rows)
        ids = torch.from_numpy((words % self.rows).astype(np.int64)).unique()
        fresh = query_teacher(teacher, batches, ids).cpu()
        held = self._mapped.cpu().index_select(0, ids).float()
        finite = torch.where(torch.isfinite(fresh), fresh, 0)
        scale = finite.abs().amax(-1, keepdim=True)
        same = (held == fresh) | ((held - fresh).abs() <= self._tolerance(teacher) * scale)
        wrong = (~same).any(-1).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            off = float((torch.where(torch.isfinite(held), held, 0) - finite)[row].abs().max())
            raise ValueError(
                f"{self.path}: row {int(ids[row])} is not what the teacher answers now: {len(wrong)} of {len(ids)} "
                f"rows looked at differ, this one by {off:.3g} where its logits reach {float(scale[row]):.3g}. Its "
                "teacher, data or augmentation is another one; remove the folder and record it again."
            )

    def _tolerance(self, teacher: Teacher) -> float:
        """How far a row may lie from a fresh answer, as a share of its largest logit.

        Half an ulp in storage, doubled; and what another batch size or device changes in the teacher's sums.
        """
        on_gpu = "cuda" in (self.key["made"]["device"], device_of(teacher).type)
        parameters = () if teacher.model is None else teacher.model.parameters()
        dtype = next((p.dtype for p in parameters), torch.float32)
        # a GPU multiplies float32 in TF32, which has fp16's digits
        computed = torch.finfo(torch.float16 if on_gpu and dtype == torch.float32 else dtype).eps
        return 2 * torch.finfo(STORED[self.key["precision"]][0]).eps + max(1e-4, 8 * computed)

    def _in_range(self, ids: Tensor) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise ValueError(
                f"{self.path} has rows 0 to {self.rows - 1}, and the batch asks for {int(ids.min())} to "
                f"{int(ids.max())}. Are these the batches it was recorded with? Cached(path, batches=...) checks."
            )

    def files(self) -> list[StoredFile]:
        return [StoredFile(self.path / LOGITS, self.key["bytes"], self.key["sha256"])]

    def _map(self) -> Float[Tensor, "rows C"]:
        path, shape = self.path / LOGITS, (self.key["rows"], self.key["classes"])
        dtype, stored = STORED[self.key["precision"]]
        again = f"Remove the folder and record it again: {self.recorded_by}."
        try:
            # copy-on-write: mapped and shared like "r", and torch does not warn of a read-only array
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CorruptCacheError(f"{path} cannot be read ({error}). {again}") from error
        if array.shape != shape or array.dtype != stored:
            raise CorruptCacheError(
                f"{path} has shape {array.shape} and type {array.dtype}; {KEY} says {shape} and {stored}. {again}"
            )
        table = torch.from_numpy(array)
        return table.view(torch.bfloat16) if dtype == torch.bfloat16 else table


def record(
    teacher: Teacher,
    batches: Recordable,
    path: str | Path,
    *,
    views: int | None = None,
    precision: str = "fp16",
    quiet: bool = False,
) -> Cached:
    """Ask the teacher once about every image, or about ``views`` augmentations of each, and open the result.

    A recording that is complete is opened and not made again. One that was cut short goes on where it was; until it is
    complete it lies in ``path.partial`` and is served to nobody. Of several processes that call this one records, and
    the others wait and open what it wrote.

    Args:
        teacher: asked in eval mode, such as Live(model).
        batches: the training batches; they are walked in their own order whatever their shuffling.
        path: the folder to write.
        views: None records clean images. k records k augmentations of each, those that ``batches.replay(k)`` shows in
            training: k times the work and the space.
        precision: "fp16", "bf16" or "fp32", in which logits are stored.
        quiet: no progress bar.

    Returns:
        A Cached opened for these batches; of an older recording a sample of rows is compared with what the teacher
        answers now. One of clean images serves their augmentations too.

    Raises:
        ValueError: where ``path`` holds another recording, naming what differs; for a teacher that answers NaN, or
            logits beyond the precision's range; for a row that the teacher now answers otherwise.
        OSError: when it cannot be written, saying how much is needed; what is done is kept.
    """
    path = Path(path)
    if precision not in STORED:
        raise ValueError(f"record needs precision {', '.join(map(repr, STORED))}; got {precision!r}.")
    if not isinstance(teacher, Teacher):
        raise TypeError(f"record needs a Teacher; got {type(teacher).__name__}. Wrap a module: teachers.Live(model).")
    if path.exists() and not (path / KEY).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there and is no teacher cache. Give a path that is free.")
    seen = as_recorded(batches, views)
    key = {
        "format": FORMAT,
        "data": seen.identity,
        "teacher": teacher.identity,
        "augmentation": seen.augmentation,
        "precision": precision,
        "rows": seen.rows,
    }
    if made := not (path / KEY).is_file():
        Recording(path, teacher, seen, key, quiet=quiet).run()
    check_key(path, key)
    cached = Cached(path, batches=seen, teacher=teacher, clean=views is None)
    if not made:
        cached.verify(teacher, batches)
    return cached


def _to_text(augmentation: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in augmentation.items())
