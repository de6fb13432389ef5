"""Distillation as a module of Lightning: ``Trainer(...).fit(DistillModule(student, teacher, method=...), loader)``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from tempering.integrations.common import blocks_of, fitting, whole_batches
from tempering.methods.base import Method
from tempering.rows import Rows, total
from tempering.tasks.base import Task
from tempering.tasks.classification import Classification
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.training.checks import Optimizer, Schedule, as_method, make_optimizer, make_schedule
from tempering.training.distill import SGD
from tempering.training.features import PairedFeatures, extracting
from tempering.training.loss import chunking_for
from tempering.training.selfcheck import selfcheck as check_first_batch
from tempering.utils.state import borrowed


class DistillModule(pl.LightningModule):
    """Train a student with a distillation method in Lightning's Trainer.

    Logs train_loss, val_loss and val_accuracy. ``accumulate_grad_batches``, the number of devices and a short last
    group do not change the loss: Lightning divides every micro-batch by their number, and before the optimizer step
    (and before clipping) the gradient is rescaled to the mean over the rows of the whole step. A subclass that
    overrides ``on_before_optimizer_step`` must call this one first. The teacher is not a submodule, so checkpoints do
    not contain it.

    Args:
        student: the network to train.
        teacher: a module (wrapped in ``teachers.Live``), a Teacher, or None for a method without a teacher.
        method: the loss, with its temperature policy. If it creates projectors from features, call ``prepare(batch)``
            before ``fit`` and before loading a checkpoint.
        task: converts batches to rows; None is Classification().
        optimizer: parameter groups -> optimizer; groups of the method's own parameters follow the student's.
        schedule: progress in [0, 1) -> factor on every group's learning rate.
        selfcheck: check the first batch before training.

    Raises:
        TypeError, ValueError: if the method or the teacher does not work with this trainer.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        *,
        method: Method | str,
        task: Task | None = None,
        optimizer: Optimizer = SGD,
        schedule: Schedule | Any = None,
        selfcheck: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.method = student, (method := as_method(method))
        self._lent = isinstance(teacher, nn.Module)
        self.teacher = fitting(method, teacher, student)
        self.task = Classification() if task is None else task
        self.optimizer, self.schedule, self.selfcheck = optimizer, schedule, selfcheck
        self._features = PairedFeatures.from_models(student, self.teacher, self.task.features)
        self._chunking = chunking_for(method)
        self._unit: float | None = None  # divisor of a micro-batch's loss until the step's weight is known
        self._row_weight: Tensor | float = 0.0

    def forward(self, inputs: Any) -> Any:
        """Return the student's output."""
        return self.student(inputs)

    @torch.no_grad()
    def prepare(self, batch: Any) -> None:
        """Let the method create its parameters from a batch, before the optimizer is created."""
        with borrowed(self.student):
            self.student.eval()
            self.method.setup(self._blocks(batch)[-1])
        self.give_back()

    def give_back(self) -> None:
        """Give a teacher that was passed as a module back as it was; its next forward takes it again."""
        if self._lent and isinstance(self.teacher, Live):
            self.teacher.release()

    def configure_callbacks(self) -> list[pl.Callback]:
        return [_GiveBack()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.selfcheck:
            self.selfcheck = False
            self._check(batch)
        blocks = self._blocks(batch)
        if not self._is_split():
            losses = self.method.losses(blocks, self._progress(), chunking=self._chunking)
            train_loss = torch.stack([block.loss for block in losses]).sum()
            self.log("train_loss", train_loss.detach(), prog_bar=True, batch_size=len(blocks[0]))
            return train_loss
        if len(blocks) > 1:
            raise ValueError(
                f"{type(self.task).__name__} makes {len(blocks)} blocks of rows per batch, whose weights one factor "
                "cannot correct after a split. Use accumulate_grad_batches=1 on one device, or tempering.distill."
            )
        weight = blocks[0].total_weight.detach()
        if self._unit is None:
            self._unit = max(1.0, float(self.trainer.strategy.broadcast(float(weight))))
        self._row_weight = self._row_weight + weight
        unit = {blocks[0].name: self._unit}
        loss = self.method.losses(blocks, self._progress(), unit, self._chunking)[0].loss
        train_loss = torch.where(weight > 0, loss.detach() * self._unit / weight, 0.0)
        self.log("train_loss", train_loss, prog_bar=True, batch_size=len(blocks[0]))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Rescale the accumulated gradient to that of the mean over all rows of the step."""
        if not self._is_split() or self._unit is None:
            return
        world = self.trainer.world_size
        weight: Any = (
            self._row_weight if world == 1 else self.trainer.strategy.reduce(self._row_weight, reduce_op="sum")
        )
        self._row_weight = 0.0
        factor = self._unit * self.trainer.accumulate_grad_batches * world / float(weight) if float(weight) > 0 else 1.0
        for group in optimizer.param_groups if factor != 1.0 else ():
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rows = self._blocks(batch)[-1]
        self.log("val_loss", total(self.method(rows, self._progress()), rows), prog_bar=True, batch_size=len(rows))
        if rows.target is not None:
            mask = rows.target >= 0 if rows.weight is None else (rows.target >= 0) & (rows.weight > 0)
            right = (rows.student.argmax(-1) == rows.target)[mask].float()
            self.log("val_accuracy", right.mean(), prog_bar=True, batch_size=max(1, len(right)))

    def configure_optimizers(self) -> Any:
        accumulate, devices = self.trainer.accumulate_grad_batches, self.trainer.world_size
        whole_batches(self.method, accumulate_grad_batches=accumulate, devices=devices)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.optimizer, [{"params": trained}, *self.method.param_groups()])
        if self.schedule is None:
            return optimizer
        steps = self._steps()
        schedule: Any = make_schedule(self.schedule, optimizer, round(steps))
        by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(min(step / steps, 1.0)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_step, "interval": "step"}}

    def _blocks(self, batch: Any) -> list[Rows]:
        if self.teacher is not None:
            self.teacher.to(self.device)
        return blocks_of(batch, self.student, self.teacher, self.task, self._features)[1]

    def _check(self, batch: Any) -> None:
        features = None if self._features is None else self._features.features
        if self.teacher is not None:
            self.teacher.to(self.device)
        with extracting(self._features):
            report = check_first_batch(
                self.student, self.teacher, batch, method=self.method, task=self.task, features=features
            )
        rank_zero_info(report.line)

    def _is_split(self) -> bool:
        """Return whether a step is split over micro-batches or devices."""
        return self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1

    def _steps(self) -> float:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the progress of a run needs its end: set max_epochs= or max_steps= of the Trainer.")
        return max(1.0, steps)

    def _progress(self) -> float:
        """Return the fraction of the run completed with this step; 1 outside of training."""
        if self.trainer.state.fn != "fit":
            return 1.0
        return min(1.0, (self.trainer.global_step + 1) / self._steps())


class _GiveBack(pl.Callback):
    """Give the teacher back at the end of ``fit``, also after an exception."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, DistillModule):
            pl_module.give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)
