"""Distillation as a module of Lightning: ``Trainer(...).fit(DistillModule(student, teacher, method=...), loader)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from tempering.integrations.common import (
    Evaluation,
    Forward,
    batches_again,
    check,
    first_samples,
    fitting,
    forward,
    step_means,
    warn_if_not_finite,
    whole_batches,
)
from tempering.integrations.linear import HiddenForward
from tempering.methods.auxiliary import auxiliary_loss
from tempering.methods.base import BlockLoss, Method, add_auxiliary
from tempering.tasks.base import Task, prepare_task
from tempering.tasks.classification import Classification
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.training.checks import as_method, chunking_for
from tempering.training.distill import SGD
from tempering.training.distributed import gather_objects
from tempering.training.features import PairedFeatures
from tempering.training.optimizers import Optimizer, Schedule, make_optimizer, make_schedule, updating
from tempering.utils.state import borrowed, random_state, set_random_state
from tempering.utils.tensors import remember_sources

try:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.utilities import rank_zero_info
except ImportError as error:
    raise ImportError('DistillModule needs Lightning: pip install "tempering[lightning]"') from error


RANDOM, TEACHER = "tempering_random_states", "tempering_teacher"  # in a checkpoint

P = ParamSpec("P")
T = TypeVar("T")


def _not_compiled(step: Callable[P, T]) -> Callable[P, T]:
    """Return the step as ``torch.compile`` of the module leaves it; see ``compile_student``."""
    return cast("Callable[P, T]", torch.compiler.disable(step))  # pyright: ignore[reportUnknownMemberType]


class DistillModule(pl.LightningModule):
    """Train a student with a distillation method in Lightning's Trainer.

    Logs train_loss with its terms, the temperatures and the agreement with the teacher (train_soft, train_T_teacher,
    ...), all of the whole step, and of validation val_loss, the method's loss, val_accuracy, val_cross_entropy,
    val_agreement and, of tokens, val_perplexity, all means over the rows of the whole split; ``Trainer.test`` logs the
    same as test_loss and so on, and ``Trainer.predict`` returns the student's outputs. The auxiliary loss that a
    mixture of experts computes itself is added in training. ``accumulate_grad_batches``, the number of devices and a
    short last group do not change the loss: Lightning divides every micro-batch by their number, and before the
    optimizer step (and before clipping) the gradient is rescaled to the mean over the rows of the whole step. A
    subclass that overrides ``on_before_optimizer_step`` or a hook of the validation must call this class's first. The
    teacher is not a submodule, so checkpoints do not contain it. ``torch.compile`` of this module compiles the student.

    Args:
        student: the network to train.
        teacher: a module (wrapped in ``teachers.Live``), a Teacher, or None for a method without a teacher.
        method: the loss, with its temperature policy. If it creates projectors from features, call ``prepare(batch)``
            before ``fit`` and before loading a checkpoint.
        task: converts batches to rows; None is Classification().
        optimizer: parameter groups -> optimizer; groups of the method's own parameters follow the student's.
        schedule: progress in [0, 1) -> factor on every group's learning rate.
        chunks: whether to compute losses in chunks of rows (``kernels.chunked``); None: blocks of 2^22 logits or more.
        linear: train language models by ``kernels.linear_loss``, from hidden states, which stores no (N, C) logits. The
            log then has no agreement; validation is unchanged.
        selfcheck: check the first batches of training, and one of each validation loader, before training; with several
            processes the first batch alone.

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
        chunks: bool | None = None,
        linear: bool = False,
        selfcheck: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.method = student, (method := as_method(method))
        self._lent = isinstance(teacher, nn.Module)
        self.teacher = fitting(method, teacher, student)
        if self.teacher is not None:
            self.teacher.follow(student)
        self.task = prepare_task(Classification() if task is None else task, student, self.teacher)
        self.optimizer, self.schedule, self.selfcheck = optimizer, schedule, selfcheck
        self._features = PairedFeatures.from_models(student, self.teacher, self.task.features)
        self._chunking = chunking_for(method, chunks)
        self._linear = HiddenForward(method, self.task, student) if linear else None
        self._evaluations: dict[int, Evaluation] = {}  # of each validation loader
        self._random_states: list[Mapping[str, Any]] = []  # of the processes, from a checkpoint
        self._unit: float | None = None  # divisor of a micro-batch's loss until the step's weight is known
        self._row_weight: Tensor | float = 0.0
        self._sums: dict[str, Tensor] = {}  # of the metrics of the step's micro-batches, divided by the unit

    def forward(self, inputs: Any) -> Any:
        """Return the student's output."""
        return self.student(inputs)

    @torch.no_grad()
    def prepare(self, batch: Any) -> None:
        """Let the method create its parameters from a batch, before the optimizer is created."""
        with borrowed(self.student):
            self.student.eval()
            self.method.setup(self._forward(batch).blocks[-1])
        self.give_back()

    def give_back(self) -> None:
        """Give a teacher that was passed as a module back as it was; its next forward takes it again."""
        if self._lent and isinstance(self.teacher, Live):
            self.teacher.release()

    def compile_student(self) -> None:
        """Compile the student as ``torch.compile(DistillModule(...))`` asks for; the loss round it stays as it is."""
        context: Any = getattr(self, "_compiler_ctx", None)  # of Lightning
        if context is not None and self.student._compiled_call_impl is None:
            self.student._compiled_call_impl = context["dynamo_ctx"](_of_this_file(self.student._call_impl))

    def configure_callbacks(self) -> list[pl.Callback]:
        return [_GiveBack()]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return remember_sources(batch, super().transfer_batch_to_device(batch, device, dataloader_idx))

    @_not_compiled
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.selfcheck:
            self.selfcheck = False
            self._check(batch)
        if not self._is_split():
            out, losses = self._losses(batch, {})
            train_loss = torch.stack([block.loss for block in losses]).sum()
            means = step_means(losses, self.method, {}, out.teacher)
            self._log_step({**means, "loss": train_loss.detach()}, len(out.blocks[0]))
            return train_loss
        name, weight = next(iter(self.task.row_weights(batch).items()))
        if self._unit is None:
            self._unit = max(1.0, float(self.trainer.strategy.broadcast(float(weight))))
        self._row_weight = self._row_weight + torch.as_tensor(weight, dtype=torch.float32, device=self.device)
        unit = {name: self._unit}
        out, losses = self._losses(batch, unit)
        if len(losses) > 1:
            raise ValueError(
                f"{type(self.task).__name__} makes {len(losses)} blocks of rows per batch, whose weights one factor "
                "cannot correct after a split. Use accumulate_grad_batches=1 on one device, or tempering.distill."
            )
        means = {**step_means(losses, self.method, unit, out.teacher), "loss": losses[0].loss.detach()}
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in means.items()}
        return losses[0].loss

    def _losses(self, batch: Any, normalizer: Mapping[str, float]) -> tuple[Forward, list[BlockLoss]]:
        """Return the outputs and the loss of each block, with the student's own auxiliary loss."""
        if self._linear is not None:
            self._move_teacher()
            out, losses = self._linear.losses(batch, self.student, self.teacher, self._progress(), normalizer)
        else:
            out = self._forward(batch)
            losses = self.method.losses(out.blocks, self._progress(), normalizer, self._chunking)
        return out, add_auxiliary(losses, auxiliary_loss(self.student, out.student), normalizer)

    def _log_step(self, means: dict[str, Tensor], rows: int | None = None) -> None:
        for name, value in means.items():
            self.log(f"train_{name}", value, prog_bar=name == "loss", batch_size=rows)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Rescale the accumulated gradient to that of the mean over all rows of the step, and log the step."""
        if not self._is_split() or self._unit is None:
            return
        world = self.trainer.world_size
        weight: Any = self._sum(self._row_weight)  # pyright: ignore[reportArgumentType]
        share = self._unit / float(weight) if float(weight) > 0 else 0.0
        self._log_step({name: self._sum(value) * share for name, value in sorted(self._sums.items())})
        self._row_weight, self._sums = 0.0, {}
        factor = self._unit * self.trainer.accumulate_grad_batches * world / float(weight) if float(weight) > 0 else 1.0
        for group in optimizer.param_groups if factor != 1.0 else ():
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor)

    def on_train_epoch_end(self) -> None:
        """Warn of a loss that is NaN or infinite."""
        if (loss := self.trainer.callback_metrics.get("train_loss")) is not None:
            warn_if_not_finite({"loss": float(loss)}, self.trainer.global_step)

    def on_validation_epoch_start(self) -> None:
        self._evaluations = {}

    def on_test_epoch_start(self) -> None:
        self._evaluations = {}

    @_not_compiled
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx, self.trainer.test_dataloaders)

    def on_test_epoch_end(self) -> None:
        """Log the means over all rows of each test loader."""
        self._log_evaluations("test")

    @_not_compiled
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the student's output."""
        return self.student(self.task.inputs(batch)[0])

    @_not_compiled
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx, self.trainer.val_dataloaders)

    def _evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int, loaders: Any) -> None:
        """Add a batch to the evaluation of its loader; a sample that another process has too does not count."""
        evaluation = self._evaluations.setdefault(dataloader_idx, Evaluation(self.task, self.method))
        if self._repeats_sample(batch_idx, list(_by_name(loaders).values())[dataloader_idx]):
            size = next(len(x) for x in tree_leaves(batch) if isinstance(x, Tensor))
            batch = first_samples(batch, max(1, size - 1))
            if size == 1:  # this process has nothing of its own in the last batch
                evaluation = Evaluation(self.task, self.method)
        evaluation.add(batch, self._forward(batch), self._progress(), self._chunking)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all rows of each validation loader."""
        self._log_evaluations("val")

    def _log_evaluations(self, split: str) -> None:
        for index, evaluation in sorted(self._evaluations.items()):
            suffix = f"/dataloader_idx_{index}" if len(self._evaluations) > 1 else ""
            for name, value in evaluation.result(self._sum, self.device).items():
                shown = name in ("loss", "accuracy")
                key = f"{split}_{name}{suffix}"  # equal on all processes
                self.log(key, value, prog_bar=shown, sync_dist=True, add_dataloader_idx=not suffix)

    def _sum(self, value: Tensor) -> Any:
        return value if self.trainer.world_size == 1 else self.trainer.strategy.reduce(value, reduce_op="sum")

    def _repeats_sample(self, batch_idx: int, loader: Any) -> bool:
        """Return whether the batch ends with a sample that another process has too, added by Lightning's sampler."""
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler) or sampler.drop_last or batch_idx != len(loader) - 1:
            return False
        added = sampler.total_size - len(sampler.dataset)  # pyright: ignore[reportArgumentType]
        return sampler.rank >= sampler.num_replicas - added

    def configure_optimizers(self) -> Any:
        accumulate, devices = self.trainer.accumulate_grad_batches, self.trainer.world_size
        whole_batches(self.method, self.task, accumulate_grad_batches=accumulate, devices=devices)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.optimizer, [{"params": trained}, *self.method.param_groups()])
        sharded = isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy)
        optimizer = updating(optimizer, self.teacher, sharded=sharded)
        if self.schedule is None:
            return optimizer
        steps = self._steps()
        schedule: Any = make_schedule(self.schedule, optimizer, round(steps))
        by_step = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(min(step / steps, 1.0)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": by_step, "interval": "step"}}

    def _move_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def _forward(self, batch: Any) -> Forward:
        self._move_teacher()
        return forward(batch, self.student, self.teacher, self.task, self._features)

    def _check(self, batch: Any) -> None:
        self._move_teacher()
        trainer, alone = self.trainer, self.trainer.world_size == 1
        train, loaders = trainer.train_dataloader, _by_name(trainer.val_dataloaders or [])

        def again(loader: Any, skip: int = 0) -> Iterator[Any]:
            return map(trainer.strategy.batch_to_device, batches_again(loader, skip=skip))

        report = check(
            batch,
            lambda: again(train, 1) if alone and isinstance(train, DataLoader) else (),
            {name: partial(again, part) for name, part in loaders.items() if alone},
            student=self.student,
            teacher=self.teacher,
            method=self.method,
            task=self.task,
            features=self._features,
            loader=train,
        )
        rank_zero_info(report.line)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state, of every process, so that a resumed run draws what the run would have drawn."""
        state = random_state()
        checkpoint[RANDOM] = [state] if self.trainer.world_size == 1 else gather_objects(state)
        if self.teacher is not None and self.teacher.state is not None:
            checkpoint[TEACHER] = self.teacher.state.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_states = checkpoint.get(RANDOM, [])
        if self.teacher is not None and self.teacher.state is not None:
            if TEACHER not in checkpoint:
                raise ValueError(
                    f"the checkpoint has no weights of {type(self.teacher).__name__}. Was it written with another "
                    "teacher? Start without ckpt_path."
                )
            self.teacher.state.load_state_dict(checkpoint[TEACHER])

    def on_fit_start(self) -> None:
        """Restore the random state of a checkpoint; one of another number of processes is not restored."""
        states, self._random_states = self._random_states, []
        if len(states) == self.trainer.world_size:
            set_random_state(states[self.trainer.global_rank])

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


def _by_name(loaders: Any) -> dict[str, Any]:
    """Return the loaders of an evaluation in their order, with names for messages; Lightning takes one, or several."""
    if isinstance(loaders, Mapping):
        return {f"validation loader {name!r}": loader for name, loader in cast("Mapping[str, Any]", loaders).items()}
    several = list(cast("list[Any]", loaders)) if isinstance(loaders, list | tuple) else [loaders]
    return {f"validation loader {i}" if len(several) > 1 else "the validation loader": x for i, x in enumerate(several)}


def _of_this_file(call: Callable[P, T]) -> Callable[P, T]:
    """Return a function that is compiled; the calls of torch's own containers are not."""

    def function(*args: P.args, **kwargs: P.kwargs) -> T:
        return call(*args, **kwargs)

    return function


class _GiveBack(pl.Callback):
    """Compile the student of a compiled module; give the teacher back at the end of ``fit``, or after an exception."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(pl_module, DistillModule):
            pl_module.compile_student()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, DistillModule):
            pl_module.give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)
