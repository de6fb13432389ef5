"""Per-step metrics, the progress bar, and cached teacher outputs for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tempering.temperature.base import Policy, sharpness_gap

if TYPE_CHECKING:
    from tempering.rows import Rows


class Remembered:
    """A teacher whose answers to a fixed, unshuffled loader are kept, so scoring every epoch asks it once.

    Kept by position and sample ids; batches without ids are asked every time, and so is a teacher that is not
    ``still``, since it learns.
    """

    def __init__(self, teacher: Callable[[Any, Tensor | None], Any], *, still: bool = True) -> None:
        self.teacher, self.still = teacher, still
        self.kept: list[tuple[Tensor, Any]] = []
        self.place = 0

    def rewind(self) -> Remembered:
        """Begin the loader again."""
        self.place = 0
        return self

    def __call__(self, inputs: Any, ids: Tensor | None) -> Any:
        place, self.place = self.place, self.place + 1
        if ids is None or not self.still:
            return self.teacher(inputs, ids)
        if place < len(self.kept) and torch.equal(self.kept[place][0], ids):
            return self.kept[place][1]
        answer = self.teacher(inputs, ids)
        if place == len(self.kept):
            self.kept.append((ids, answer))
        return answer


def not_finite(
    value: float, step: int, folder: Path | None, *, blocks: Sequence[Rows] = (), terms: Sequence[Mapping] = ()
) -> FloatingPointError:
    """What is known of a loss that is no number, as the error to raise."""
    if blocks:
        sides = {"student": blocks[-1].student, "teacher": blocks[-1].teacher}
        bad = [side for side, z in sides.items() if (torch.isnan(z) | torch.isposinf(z)).any()]
        named = {k: float(v.detach().sum()) for part in terms for k, v in part.items()}
        where = (
            f"the {' and the '.join(bad)}'s logits hold NaN or infinity" if bad else "both models' logits are finite"
        )
        said = f"the loss is {value} at step {step}: {where}; terms {named}."
    else:
        said = f"the loss is {value} at step {step}, or was so at one before it."
    saved = "" if folder is None else f" The last checkpoint under {folder} is from before."
    return FloatingPointError(
        f"{said} A lower learning rate, max_grad_norm=1.0, or precision='32-true' are what to try.{saved}"
    )


def on_cpu(ask: Callable[[Rows], Any] | None, device: torch.device) -> Callable[[Rows], Any] | None:
    """A policy that lives on ``device``, asked with rows that live on the CPU."""
    if ask is None:
        return None

    def asked(rows: Rows) -> Any:
        target = None if rows.target is None else rows.target.to(device)
        T = ask(rows.with_(student=rows.student.to(device), teacher=rows.teacher.to(device), target=target))
        return type(T)(*(None if x is None else x.detach().cpu() for x in T))

    return asked


def measured(
    blocks: Sequence[Rows], terms: Sequence[Mapping[str, Tensor]], policies: Mapping[str, Policy]
) -> dict[str, Any]:
    """What a line of steps.jsonl says of a batch: the blocks' mean terms, and the temperatures with their spread.

    Terms of one name add up over the blocks, as they do in the loss. Temperatures are those of the last block that has
    classes.
    """
    summed: dict[str, float] = {}
    for name, term in (item for named in terms for item in named.items()):
        summed[name] = summed.get(name, 0.0) + float(term.detach().float().mean())
    line: dict[str, Any] = {"terms": summed}
    rows = next((block for block in reversed(blocks) if block.student.shape[1] > 1), blocks[-1])
    policy = next((p for p in policies.values() if p.last is not None), None)
    if policy is None or policy.last is None or not len(rows):
        return line
    for side, T in (("T_teacher", policy.last.teacher), ("T_student", policy.last.student)):
        values = T.flatten().float()
        low, high = torch.quantile(values[:100_000], values.new_tensor([0.05, 0.95])).tolist()
        line[side] = {"mean": float(values.mean()), "p5": low, "p95": high}
    line["policy"] = {name: float(count) for name, count in policy.report().items()}
    line["gap"] = float(sharpness_gap(rows.with_(student=rows.student.detach()), policy.last))
    return line


class Display:
    """The progress bar of a run on a terminal; nothing where ``quiet`` or on another rank than the first."""

    def __init__(self, total: int, done: int, label: str, *, quiet: bool) -> None:
        self.progress: Any = None
        if quiet:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), transient=True)
        self.task = self.progress.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Display:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def show(self, step: int, note: str | None = None) -> None:
        """Move to ``step``; a new note replaces the old one."""
        if self.progress is not None:
            self.progress.update(self.task, completed=step, **({} if note is None else {"note": note}))
