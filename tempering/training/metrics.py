"""Report a run: metrics of a step, the error for a loss that is not finite, and the progress bar."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from tempering.temperature.base import Policy, logsumexp_gap
from tempering.utils.text import printable

if TYPE_CHECKING:
    from tempering.methods.base import BlockLoss
    from tempering.training.config import RunLength


def step_metrics(losses: Sequence[BlockLoss], policies: Mapping[str, Policy]) -> dict[str, Any]:
    """Return a micro-batch's metrics for steps.jsonl: mean terms, temperatures with percentiles, and kernels used.

    Terms of the same name are summed over the blocks, as in the loss. Temperatures are those of the last block with
    more than one class.
    """
    terms: dict[str, float] = {}
    for name, term in (item for block in losses for item in block.terms.items()):
        terms[name] = terms.get(name, 0.0) + float(term.detach().float().mean())
    line: dict[str, Any] = {"terms": terms}
    paths = [block.path for block in losses if block.path is not None]
    path = {"path": paths[-1]._asdict()} if paths else {}
    blocks = [block.rows for block in losses]
    rows = next((block for block in reversed(blocks) if block.student.shape[1] > 1), blocks[-1])
    policy = next((p for p in policies.values() if p.last is not None), None)
    if policy is None or policy.last is None or not len(rows):
        return line | path
    for side, T in (("T_teacher", policy.last.teacher), ("T_student", policy.last.student)):
        values = T.flatten().float()
        low, high = torch.quantile(values[:100_000], values.new_tensor([0.05, 0.95]))
        line[side] = {"mean": float(values.mean()), "p5": float(low), "p95": float(high)}
    line["policy"] = {name: float(count) for name, count in policy.report().items()}
    line["logsumexp_gap"] = float(logsumexp_gap(rows.replace(student=rows.student.detach()), policy.last))
    return line | path


def rollout_metrics(batches: Any) -> dict[str, Any]:
    """Return the statistics of the epoch's generated texts so far as {"rollout": ...}; {} if no texts are generated."""
    report = getattr(batches, "report", None)
    stats: Any = report() if callable(report) else None
    return {"rollout": dict(cast("Mapping[str, float]", stats))} if isinstance(stats, Mapping) and stats else {}


def nonfinite_loss_error(
    loss: float, step: int, folder: Path | None, losses: Sequence[BlockLoss] = (), whose: str = ""
) -> FloatingPointError:
    """Return the error for a loss that is NaN or infinite: names the logits that are not finite, and remedies.

    Args:
        whose: which of several teachers has them, as text that follows.
    """
    if losses:
        rows = losses[-1].rows
        logits = {"student": rows.student, "teacher": rows.teacher}
        bad = [side for side, z in logits.items() if (torch.isnan(z) | torch.isposinf(z)).any()]
        terms = {name: float(term.detach().sum()) for block in losses for name, term in block.terms.items()}
        where = (
            f"the {' and the '.join(bad)}'s logits hold NaN or infinity{whose}"
            if bad
            else "both models' logits are finite"
        )
        text = f"the loss is {loss} at step {step}: {where}; terms {terms}."
    else:
        text = f"the loss is {loss} at step {step} or at an earlier one."
    saved = "" if folder is None else f" The last checkpoint under {folder} is from before."
    advice = "Try a lower learning rate, max_grad_norm=1.0, or precision='32-true'."
    return FloatingPointError(f"{text} {advice}{saved}")


class ProgressBar:
    """Show a run's progress: a bar on a terminal, else a line per epoch; nothing if ``disable``.

    Args:
        length: of the run.
    """

    def __init__(self, length: RunLength, *, disable: bool) -> None:
        self.length = length
        self.first, self.begun = 0, time.perf_counter()
        self.console: Any = None
        self.progress: Any = None
        self.task: Any = None
        if disable:
            return
        from rich.console import Console

        self.console = Console()
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
        texts = [TextColumn(f"{{task.fields[{name}]}}") for name in ("now", "note")]
        self.progress = Progress(*columns, *texts, console=self.console, transient=True)

    @contextmanager
    def show(self, label: str, step: int) -> Generator[None]:
        """Show the bar inside the context, beginning at ``step``."""
        self.first, self.begun = step, time.perf_counter()
        if self.progress is None:
            if self.console is not None:
                self.say(f"{label}:")
            yield
            return
        self.task = self.progress.add_task(printable(label), total=self.length.total, completed=step, now="", note="")
        with self.progress:
            yield

    def update(
        self, step: int, *, epoch: int | None = None, loss: float | None = None, lr: float | None = None
    ) -> None:
        """Advance to ``step``; show epoch, loss and learning rate where they are given."""
        if self.progress is None:
            return
        now = {} if loss is None else {"now": f"epoch {self._of(epoch)}, loss {loss:.4g}, lr {lr:.3g}"}
        self.progress.update(self.task, total=self.length.total, completed=step, **now)

    def epoch(self, line: Mapping[str, Any], note: str | None) -> None:
        """Show the end of an epoch, from its line in epochs.jsonl.

        Args:
            note: the score that selects the best epoch, for the bar.
        """
        if self.progress is not None:
            self.progress.update(self.task, total=self.length.total, completed=line["step"], note=note or "")
        elif self.console is not None:
            self.say(", ".join(self._line(line)))

    def _line(self, line: Mapping[str, Any]) -> Iterator[str]:
        from tempering.utils.text import duration, scores

        step = line["step"]
        yield f"epoch {self._of(line['epoch'])}"
        yield f"step {step}/{self.length.total}"
        yield f"loss {line['loss']:.4g}"
        yield f"lr {line['lr']:.3g}"
        if text := scores(line):
            yield text
        if self.length.total > step > self.first:
            per_step = (time.perf_counter() - self.begun) / (step - self.first)
            yield f"{duration(per_step * (self.length.total - step))} left"

    def _of(self, epoch: int | None) -> str:
        return f"{epoch}" if self.length.epochs is None else f"{epoch}/{self.length.epochs}"

    def say(self, text: str) -> None:
        """Print a line, unless the run is quiet."""
        if self.console is not None:
            self.console.print(printable(text), style="dim", soft_wrap=True, highlight=False, markup=False)
