"""Cache of a teacher's logits: written once by ``record``, looked up by sample id in training."""

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
    recording_path,
)
from tempering.utils.tensors import on_host

RESIDENT = 2**31  # bytes up to which a cache is moved to the accelerator of a run


class Cached(CachedTeacher):
    """Looks up the teacher's logits by sample id; float32, on the device of the inputs. Files are only read.

    Many processes may read one cache and share its memory, since the file is memory-mapped.

    Args:
        path: the folder that ``record`` wrote.
        batches: refuse to open for other data or other augmentation than these.
        teacher: refuse to open for another teacher's outputs.
        clean: use the logits of the clean image for every augmented view of it. Teacher and student then see different
            images; without it, a cache of clean images is refused for augmented batches.
        checksum: whether to compare the file with its checksum; None does below 256 MB.

    Raises:
        FileNotFoundError: if there is no finished cache.
        CorruptCacheError: for files that are truncated or edited.
        ValueError: for other data, augmentation or another teacher, naming the field and both values.
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

    def _open(self) -> None:
        self.classes: int = self.key["classes"]
        self.precision: str = self.key["precision"]

    def __call__(self, inputs: Any, ids: Int[Tensor, " B"] | None) -> Float[Tensor, "B C"]:
        if ids is None:
            raise ValueError(
                "a cached teacher looks up outputs by sample id, and the batch has none. Yield (x, y, id), as "
                "data.Batches does, or use teachers.Live(model)."
            )
        table = self._mapped
        device = inputs.device if isinstance(inputs, Tensor) else ids.device
        if table.device.type == "cpu":
            rows = on_host(ids).cpu()
            self._check_range(rows)
            return table.index_select(0, rows).to(device, torch.float32, non_blocking=True)
        # raising for an id out of range would synchronize with the device every step: such a row becomes NaN instead
        rows = ids.to(table.device)
        in_range = (rows >= 0) & (rows < self.rows)
        logits = table.index_select(0, rows.clamp(0, self.rows - 1)).float()
        return torch.where(in_range[:, None], logits, torch.nan).to(device)

    def to(self, device: torch.device | str) -> Self:
        if torch.device(device).type == "cpu" or self._mapped.nbytes <= RESIDENT:
            self._mapped = self._mapped.to(device)
        return self

    def incompatibility(self, batches: Any) -> str | None:
        """Return which of data and augmentation differ from the recorded ones and what to do; None if none does."""
        if (reason := super().incompatibility(batches)) is not None:
            return reason
        name = getattr(batches, "name", type(batches).__name__)
        things = getattr(batches, "things", self.things)
        recorded, given = self.key["augmentation"], batches.augmentation
        if recorded == given:
            return None
        if recorded["views"] is None and given["views"] is None:
            if self.clean:
                return None
            return (
                f"{self.path} contains outputs for clean {things}, and {name} are augmented: {_to_text(given)}. To use "
                f'the logits of the clean {things}: Cached("{self.path}", clean=True). For logits of the {things} that '
                "the student sees: record(teacher, batches, ANOTHER_PATH, views=8) and batches.replay(8)."
            )
        field = next(f for f in ("views", *recorded) if recorded.get(f) != given.get(f))
        advice = "leave out views=" if recorded["views"] is None else f"train on batches.replay({recorded['views']})"
        return (
            f"{self.path} was recorded with {field}={recorded.get(field)}, and {name} have {field}={given.get(field)} "
            f"(recorded: {_to_text(recorded)}; given: {_to_text(given)}). To use the recording, {advice}; or record "
            "again: record(teacher, batches, ANOTHER_PATH, views=...)."
        )

    def verify(self, teacher: Teacher, batches: Recordable, *, rows: int = 32, seed: int = 0) -> None:
        """Compare ``rows`` random rows with the teacher's current logits.

        Raises:
            ValueError: for other batches, or naming the row that differs by more than the precision explains.
        """
        batches = as_recorded(batches, self.key["augmentation"]["views"])
        if (reason := self.incompatibility(batches)) is not None:
            raise ValueError(reason)
        words = np.random.Philox(key=seed).random_raw(rows)
        ids = torch.from_numpy((words % self.rows).astype(np.int64)).unique()
        current = query_teacher(teacher, batches, ids).cpu()
        stored = self._mapped.cpu().index_select(0, ids).float()
        finite = torch.where(torch.isfinite(current), current, 0)
        scale = finite.abs().amax(-1, keepdim=True)
        equal = (stored == current) | ((stored - current).abs() <= self._tolerance(teacher) * scale)
        wrong = (~equal).any(-1).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            error = float((torch.where(torch.isfinite(stored), stored, 0) - finite)[row].abs().max())
            raise ValueError(
                f"{self.path}: row {int(ids[row])} differs from the teacher's current logits: {len(wrong)} of "
                f"{len(ids)} compared rows differ, this one by {error:.3g}, its largest logit being "
                f"{float(scale[row]):.3g}. The teacher, data or augmentation has changed; remove the folder "
                "and record it again."
            )

    def _tolerance(self, teacher: Teacher) -> float:
        """Return the relative tolerance between a stored row and current logits, as a share of its largest logit.

        Half an ulp in storage, doubled, plus the change of the teacher's sums by another batch size or device.
        """
        on_gpu = "cuda" in (self.key["made"]["device"], device_of(teacher).type)
        parameters = () if teacher.model is None else teacher.model.parameters()
        dtype = next((p.dtype for p in parameters), torch.float32)
        # a GPU multiplies float32 in TF32, which has as many digits as fp16
        computed = torch.finfo(torch.float16 if on_gpu and dtype == torch.float32 else dtype).eps
        return 2 * torch.finfo(STORED[self.key["precision"]][0]).eps + max(1e-4, 8 * computed)

    def _check_range(self, ids: Tensor) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise ValueError(
                f"{self.path} has rows 0 to {self.rows - 1}, and the batch has ids {int(ids.min())} to "
                f"{int(ids.max())}. Are these the batches it was recorded with? Cached(path, batches=...) checks."
            )

    def files(self) -> list[StoredFile]:
        return [StoredFile(self.path / LOGITS, self.key["bytes"], self.key["sha256"])]

    def _map(self) -> Float[Tensor, "rows C"]:
        path, shape = self.path / LOGITS, (self.key["rows"], self.key["classes"])
        dtype, stored = STORED[self.key["precision"]]
        advice = f"Remove the folder and record it again: {self.recorded_by}."
        try:
            # copy-on-write: memory-mapped and shared like "r", without torch's warning about read-only arrays
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python, with all of its errors
            raise CorruptCacheError(f"{path} cannot be read ({error}). {advice}") from error
        if array.shape != shape or array.dtype != stored:
            raise CorruptCacheError(
                f"{path} has shape {array.shape} and type {array.dtype}; {KEY} says {shape} and {stored}. {advice}"
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
    """Run the teacher once on every image, or on ``views`` augmentations of each, and open the result.

    A finished recording is opened, not repeated. An interrupted one is resumed; until it is finished it is in
    ``path.partial`` and cannot be opened. If several processes call this, one records, and the others wait and open the
    result.

    Args:
        teacher: the teacher, such as Live(model), which runs in eval mode.
        batches: the training batches; they are recorded in the order of the data set, whatever their shuffling.
        path: the folder to write.
        views: None records clean images. k records k augmentations of each, those that ``batches.replay(k)`` yields in
            training: k times the work and the space.
        precision: "fp16", "bf16" or "fp32" of the stored logits.
        quiet: whether to hide the progress bar.

    Returns:
        A Cached opened for these batches. A sample of rows of an older recording is compared with the teacher's current
        logits. A recording of clean images is opened with ``clean=True``.

    Raises:
        ValueError: if ``path`` contains another recording, naming the difference; if the teacher's logits are NaN or
            beyond the precision's range; if a row differs from the teacher's current logits.
        OSError: if it cannot be written, naming the space needed; finished rows are kept.
    """
    path = recording_path(path)
    if precision not in STORED:
        raise ValueError(f"record needs precision {', '.join(map(repr, STORED))}; got {precision!r}.")
    if not isinstance(teacher, Teacher):
        raise TypeError(f"record needs a Teacher; got {type(teacher).__name__}. Wrap a module: teachers.Live(model).")
    recorded = as_recorded(batches, views)
    key = {
        "format": FORMAT,
        "data": recorded.identity,
        "teacher": teacher.identity,
        "augmentation": recorded.augmentation,
        "precision": precision,
        "rows": recorded.rows,
    }
    if is_new := not (path / KEY).is_file():
        Recording(path, teacher, recorded, key, quiet=quiet).run()
    check_key(path, key)
    cached = Cached(path, batches=recorded, teacher=teacher, clean=views is None)
    if not is_new:
        cached.verify(teacher, batches)
    return cached


def _to_text(augmentation: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in augmentation.items())
