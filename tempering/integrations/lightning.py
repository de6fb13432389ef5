"""Distillation as a module of Lightning: ``Trainer(...).fit(DistillModule(student, teacher, method=...), loader)``."""

from __future__ import annotations

from collections.abc import Callable
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
from tempering.training.distill import SGD
from tempering.training.features import PairedFeatures
from tempering.training.loss import chunking_for
from tempering.training.selfcheck import selfcheck as check_first_batch


class DistillModule(pl.LightningModule):
    """A student trained under a method beside a teacher, by Lightning's own loop.

    Logs train_loss, val_loss and val_accuracy. ``accumulate_grad_batches``, devices and a short last group do not
    change the loss: Lightning divides every micro-batch by their number, and before the optimizer's step (and before
    clipping) the gradient is rescaled to the mean over the rows of the whole step. A subclass that overrides
    ``on_before_optimizer_step`` calls this one first. The teacher is no submodule, so no checkpoint holds it.

    Args:
        student: the net that is trained.
        teacher: a module (wrapped in ``teachers.Live``), a Teacher, or None for a method that looks at none.
        method: the loss, with its temperature policy. Where it sizes projectors by features, call ``prepare(batch)``
            before ``fit`` and before a checkpoint is loaded.
        task: how batches become rows; None is Classification().
        optimizer: parameter groups -> optimizer; groups of the method's own parameters follow the student's.
        schedule: progress in [0, 1) -> factor on every group's learning rate.
        selfcheck: look at the first batch before training.

    Raises:
        TypeError, ValueError: for a method or a teacher that do not fit this loop.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        *,
        method: Method,
        task: Task | None = None,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = SGD,
        schedule: Callable[[float], float] | None = None,
        selfcheck: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.method = student, method
        self.teacher = fitting(method, teacher, student)
        self.task = Classification() if task is None else task
        self.optimizer, self.schedule, self.selfcheck = optimizer, schedule, selfcheck
        self._features = PairedFeatures.from_models(student, self.teacher, self.task.features)
        self._chunking = chunking_for(method)
        self._unit: float | None = None  # what a micro-batch's loss is divided by, before the step's weight is known
        self._mass: Tensor | float = 0.0

    def forward(self, inputs: Any) -> Any:
        """The student's answer."""
        return self.student(inputs)

    @torch.no_grad()
    def prepare(self, batch: Any) -> None:
        """Let the method size what it trains on a batch, before there is an optimizer."""
        training = self.student.training
        self.student.eval()
        self.method.setup(self._blocks(batch)[-1])
        self.student.train(training)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.selfcheck:
            self.selfcheck = False
            self._check(batch)
        blocks = self._blocks(batch)
        if not self._split():
            losses = self.method.losses(blocks, self._progress(), chunking=self._chunking)
            own = torch.stack([block.loss for block in losses]).sum()
            self.log("train_loss", own.detach(), prog_bar=True, batch_size=len(blocks[0]))
            return own
        if len(blocks) > 1:
            raise ValueError(
                f"{type(self.task).__name__} makes {len(blocks)} blocks of rows a batch, whose weights one factor "
                "cannot mend after a split. Use accumulate_grad_batches=1 on one device, or tempering.distill."
            )
        mass = blocks[0].total_weight.detach()
        if self._unit is None:
            self._unit = max(1.0, float(self.trainer.strategy.broadcast(float(mass))))
        self._mass = self._mass + mass
        unit = {blocks[0].name: self._unit}
        loss = self.method.losses(blocks, self._progress(), unit, self._chunking)[0].loss
        own = torch.where(mass > 0, loss.detach() * self._unit / mass, 0.0)
        self.log("train_loss", own, prog_bar=True, batch_size=len(blocks[0]))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the accumulated gradient into that of the mean over all rows of the step."""
        if not self._split() or self._unit is None:
            return
        world = self.trainer.world_size
        mass: Any = self._mass if world == 1 else self.trainer.strategy.reduce(self._mass, reduce_op="sum")
        self._mass = 0.0
        factor = self._unit * self.trainer.accumulate_grad_batches * world / float(mass) if float(mass) > 0 else 1.0
        for group in optimizer.param_groups if factor != 1.0 else ():
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rows = self._blocks(batch)[-1]
        self.log("val_loss", total(self.method(rows, self._progress()), rows), prog_bar=True, batch_size=len(rows))
        if rows.target is not None:
            known = rows.target >= 0 if rows.weight is None else (rows.target >= 0) & (rows.weight > 0)
            right = (rows.student.argmax(-1) == rows.target)[known].float()
            self.log("val_accuracy", right.mean(), prog_bar=True, batch_size=max(1, len(right)))

    def configure_optimizers(self) -> Any:
        accumulate, devices = self.trainer.accumulate_grad_batches, self.trainer.world_size
        whole_batches(self.method, accumulate_grad_batches=accumulate, devices=devices)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = self.optimizer([{"params": trained}, *self.method.param_groups()])
        if self.schedule is None:
            return optimizer
        steps, schedule = self._steps(), self.schedule
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
        said = check_first_batch(
            self.student, self.teacher, batch, method=self.method, task=self.task, features=features
        )
        rank_zero_info(said.line)

    def _split(self) -> bool:
        """Whether a step is more than one micro-batch on one device."""
        return self.trainer.accumulate_grad_batches > 1 or self.trainer.world_size > 1

    def _steps(self) -> float:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the progress of a run needs its end: give the Trainer max_epochs= or max_steps=.")
        return max(1.0, steps)

    def _progress(self) -> float:
        """The share of the run that is done with this step; 1 outside of training."""
        if self.trainer.state.fn != "fit":
            return 1.0
        return min(1.0, (self.trainer.global_step + 1) / self._steps())
