"""Distillation in the Trainer of transformers: ``class KDTrainer(DistillMixin, Trainer): pass``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tempering.integrations.common import blocks_of, fitting, whole_batches
from tempering.methods.base import Method
from tempering.rows import IGNORE_INDEX, Rows
from tempering.tasks.base import Task, TeacherForward, evaluating
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.training.checkpoint import save_weights
from tempering.training.checks import as_method
from tempering.training.features import PairedFeatures, extracting
from tempering.training.loss import chunking_for
from tempering.training.selfcheck import selfcheck as check_first_batch
from tempering.utils.state import borrowed

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the user's Trainer follows the mixin in the MRO; this module does not import transformers

METHOD = "distill_method.safetensors"  # the method's own parameters, in the same checkpoint as the student


class DistillMixin(Trainer):
    """Use a distillation method as the Trainer's loss: ``class KDTrainer(DistillMixin, Trainer): pass``.

    The loss of a step is the mean over the rows of all its micro-batches and processes, however they are split;
    ``num_items_in_batch`` of transformers is replaced by the total weight of the rows. The teacher is frozen, in eval
    mode, on the Trainer's device and never saved. Parameters of the method (projectors, learned temperatures) are
    added to the optimizer at its learning rate, without weight decay or clipping, and saved in the checkpoints.
    ``eval_loss`` is the method's loss too.

    Args:
        args, kwargs: arguments of the Trainer.
        teacher: a model, frozen during ``train`` and then given back as it was, or a Teacher (its inputs must fit the
            task's: see ``Unpacked``).
        method: the loss, with its temperature policy.
        task: converts batches to rows; None is ``Labeled()``. Causal language models need ``Labeled(shift=True)``.
        selfcheck: check the first batch before training.

    Raises:
        TypeError, ValueError: if the method, the teacher or the settings do not work with this trainer.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | Teacher | None,
        method: Method | str,
        task: Task | None = None,
        selfcheck: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method = method = as_method(method)
        self._lent = isinstance(teacher, nn.Module)
        self.task, self.selfcheck = Labeled() if task is None else task, selfcheck
        bare = False
        if isinstance(teacher, nn.Module) and not isinstance(teacher, Unpacked):
            teacher, bare = Unpacked(teacher), True
        self.teacher = fitting(method, teacher, self._module())
        accumulate, processes = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        whole_batches(method, gradient_accumulation_steps=accumulate, num_processes=processes)
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "the method computes the loss, so label_smoothing_factor and compute_loss_func would have no effect. "
                "Leave them out."
            )
        if self.teacher is not None:
            self.teacher.to(self.args.device)
        self.method.to(self.args.device)
        names = {n: (s, f"model.{t}" if bare else t) for n, (s, t) in self.task.features.items()}
        self._features = PairedFeatures.from_models(self._module(), self.teacher, names)
        self._chunking = chunking_for(method)
        self._row_weights: dict[str, Tensor] = {}
        self.label_names = self.label_names or [
            "labels"
        ]  # otherwise the Trainer removes columns that forward() does not take
        # both declare that the loss is already scaled for the whole step; newer transformers read the second
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train, and give a teacher that was passed as a module back as it was."""
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self._lent and isinstance(self.teacher, Live):
                self.teacher.release()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's part of the step's loss, (), and the outputs if ``return_outputs``."""
        output, blocks = self._blocks(model, inputs)
        training = model.training
        self.method.train(training)
        weights, progress = self._row_weights if training else {}, self._progress()
        losses = self.method.losses(blocks, progress, weights, self._chunking)
        loss = torch.stack([block.loss for block in losses]).sum()
        if training:
            # gradients are averaged over processes, and each process has only its part of the mean
            loss = loss * self.accelerator.num_processes
        if not return_outputs:
            return loss
        # the Trainer drops the first element of outputs that are not a mapping, as if it were the loss
        return loss, output if isinstance(output, dict) else {"logits": _logits(output, "student")}

    def get_batch_samples(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the micro-batches of one step, and the total weight of their rows on all processes."""
        batches, _ = super().get_batch_samples(*args)
        self.method.zero_grad(set_to_none=True)  # the Trainer only resets the gradients of its model
        self._row_weights = {}
        for batch in batches:
            for name, weight in self.task.row_weights(batch).items():
                weight = torch.as_tensor(weight, dtype=torch.float32, device=self.args.device)
                self._row_weights[name] = self._row_weights[name] + weight if name in self._row_weights else weight
        self._row_weights = {name: self._all_reduce(weight) for name, weight in sorted(self._row_weights.items())}
        if self.selfcheck and batches:
            self.selfcheck = False
            self._check(batches[0])
        return batches, sum(self._row_weights.values())

    def create_optimizer(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the Trainer's optimizer, with a parameter group for the method."""
        optimizer = super().create_optimizer(*args)
        self._prepare_method()
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups = [g for g in self.method.param_groups() if not {id(p) for p in g["params"]} & optimized]
        if groups and self.is_deepspeed_enabled:
            raise ValueError(f"DeepSpeed cannot train the parameters that {type(self.method).__name__} owns.")
        for group in groups:
            optimizer.add_param_group({"weight_decay": 0.0, **group})
        if groups:
            optimizer.register_step_pre_hook(self._share_method_gradients)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.method.state_dict():
            save_weights(Path(output_dir or self.args.output_dir or ".") / METHOD, self.method.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.method.state_dict():
            from safetensors.torch import load_file

            path = Path(checkpoint) / METHOD
            if not path.is_file():
                raise ValueError(
                    f"{path} does not exist, so {type(self.method).__name__} cannot resume its own parameters. Was the "
                    "checkpoint written with another method? Start without resume_from_checkpoint."
                )
            self.method.load_state_dict(load_file(path))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _blocks(self, model: nn.Module, inputs: Any) -> tuple[Any, list[Rows]]:
        return blocks_of(inputs, Unpacked(model), self.teacher, self.task, self._features)

    def _progress(self) -> float:
        steps = self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / steps) if steps > 0 else 1.0

    def _all_reduce(self, value: Tensor) -> Any:
        return self.accelerator.reduce(value, reduction="sum")

    def _share_method_gradients(self, *_: Any) -> None:
        """Average gradients of the method over processes, since DistributedDataParallel does not wrap it."""
        if self.accelerator.num_processes > 1:
            for p in self.method.parameters():
                if p.requires_grad:
                    grad = torch.zeros_like(p) if p.grad is None else p.grad
                    p.grad = self._all_reduce(grad) / self.accelerator.num_processes

    def _check(self, batch: Any) -> None:
        model: Any = self.model_wrapped
        student, features = Unpacked(model), None if self._features is None else self._features.features
        batch = self._prepare_inputs(batch)
        with extracting(self._features):
            report = check_first_batch(
                student, self.teacher, batch, method=self.method, task=self.task, features=features
            )
        if self.is_world_process_zero():
            import logging

            logging.getLogger("tempering").info(report.line)

    @torch.no_grad()
    def _prepare_method(self) -> None:
        """Let the method create its parameters from a first batch; restore random states and training modes."""
        if type(self.method).setup is Method.setup:
            return
        model = self._module()
        with borrowed(model):
            batch = self._prepare_inputs(next(iter(self.get_train_dataloader())))
            model.eval()
            self.method.setup(self._blocks(model, batch)[1][-1])


class Unpacked(nn.Module):
    """Call a transformers model with one mapping of inputs: ``teachers.Live(Unpacked(model))``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**inputs)


class Labeled(Task):
    """Handle batches as transformers collates them: a mapping of inputs with "labels"; models return ``.logits``.

    (N, C) logits give N rows; rows with the label -100 learn from the teacher only. (N, L, C) logits give N * L rows;
    a token with the label -100 has weight 0. If a batch has "ids", they identify the samples (the Trainer then needs
    remove_unused_columns=False).

    Args:
        shift: position i predicts the label of i + 1, as in causal language models.
        keep_labels: pass the labels to the models too; encoder-decoders build the decoder's inputs from them.
        features: features for feature-based methods, name -> (student's module, teacher's module), shallow to deep.
    """

    def __init__(
        self,
        *,
        shift: bool = False,
        keep_labels: bool = False,
        features: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.shift, self.keep_labels, self.features = shift, keep_labels, dict(features or {})

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"Labeled needs batches that are mappings, as collators of transformers return; got "
                f"{type(batch).__name__}. For (inputs, labels) use tasks.Classification()."
            )
        dropped = {"ids"} if self.keep_labels else {"ids", "labels"}
        inputs = {name: value for name, value in batch.items() if name not in dropped}
        return inputs, inputs, batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        logits = _logits(student, "student")
        teacher_logits = logits.detach() if teacher is None else _logits(teacher, "teacher")
        if logits.shape != teacher_logits.shape:
            raise ValueError(
                f"the student's logits are {tuple(logits.shape)} and the teacher's {tuple(teacher_logits.shape)}: both "
                "need the same classes (or vocabulary) in the same order."
            )
        labels = batch.get("labels")
        if logits.ndim == 2:
            return [Rows(logits, teacher_logits, labels, ids=batch.get("ids"))]
        if labels is None or labels.shape != logits.shape[:2]:
            got = "none" if labels is None else str(tuple(labels.shape))
            raise ValueError(
                f"(N, L, C) logits need labels of shape (N, L) = {tuple(logits.shape[:2])}, -100 where a token is left "
                f"out; got {got}. Collate with labels, such as DataCollatorForLanguageModeling(mlm=False)."
            )
        if self.shift:
            logits, teacher_logits, labels = logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:]
        labels = labels.flatten()
        return [
            Rows(logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels, weight=(labels != IGNORE_INDEX).float())
        ]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        labels = batch.get("labels")
        if labels is None or labels.ndim < 2:
            return {"logits": float(len(next(iter(batch.values())) if labels is None else labels))}
        return {"logits": (labels[:, 1:] if self.shift else labels).ne(IGNORE_INDEX).sum()}

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return accuracy in [0, 1], loss in nats, and agreement with the teacher, if any, over labeled rows."""
        sums, count = {"accuracy": 0.0, "loss": 0.0, "agreement": 0.0}, 0
        with evaluating(student, batches) as on_device:
            for batch in map(dict, on_device):
                student_in, teacher_in, ids = self.inputs(batch)
                teacher_output = None if teacher is None else teacher(teacher_in, ids)
                rows = self.rows(student(student_in), teacher_output, batch)[0]
                if rows.target is None:
                    raise ValueError("scoring needs labels: the batches have none.")
                mask = rows.target >= 0
                z, y = rows.student[mask].float(), rows.target[mask]
                sums["accuracy"] += float((z.argmax(-1) == y).sum())
                sums["loss"] += float(nn.functional.cross_entropy(z, y, reduction="sum"))
                sums["agreement"] += float((z.argmax(-1) == rows.teacher[mask].argmax(-1)).sum())
                count += len(y)
        if not count:
            raise ValueError("there is nothing to score: no row has a label. Is the split empty?")
        return {name: value / count for name, value in sums.items() if name != "agreement" or teacher is not None}


def _logits(output: Any, side: str) -> Tensor:
    """Return the (N, C) or (N, L, C) logits of a model's output."""
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim in (2, 3):
        return logits
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(f"the {side} must return (N, C) or (N, L, C) logits, as a tensor or as .logits; got {got}.")
