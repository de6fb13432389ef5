"""Distillation in the Trainer of transformers: ``class KDTrainer(DistillMixin, Trainer): pass``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tempering.integrations.common import (
    Evaluation,
    Forward,
    arguments_of,
    batches_again,
    check,
    excluded_inputs,
    first_samples,
    fitting,
    forward,
    step_means,
    warn_if_not_finite,
    whole_batches,
)
from tempering.integrations.labeled import Labeled as Labeled
from tempering.integrations.linear import HiddenForward
from tempering.integrations.sft import record_sft_metrics
from tempering.methods.auxiliary import auxiliary_loss
from tempering.methods.base import Method, add_auxiliary
from tempering.rollouts.on_policy import OnPolicy
from tempering.rollouts.sampling import GenerationStats
from tempering.rows import TEACHER_OUTPUTS
from tempering.tasks.base import Task, with_columns
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.teachers.outputs import PrecomputedLogits
from tempering.training.checkpoint import save_weights
from tempering.training.checks import as_method, chunking_for
from tempering.training.features import PairedFeatures
from tempering.training.optimizers import updating
from tempering.utils.state import borrowed

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # the user's Trainer follows the mixin in the MRO; this module does not import transformers

METHOD = "distill_method.safetensors"  # the method's own parameters, in the same checkpoint as the student
TEACHER = "distill_teacher.safetensors"  # the weights of a teacher that follows the student


class DistillMixin(Trainer):
    """Use a distillation method as the Trainer's loss: ``class KDTrainer(DistillMixin, Trainer): pass``.

    The loss of a step is the mean over the rows of all its micro-batches and processes, however they are split;
    ``num_items_in_batch`` of transformers is replaced by the total weight of the rows. The teacher is frozen, in eval
    mode, on the Trainer's device and never saved. Parameters of the method (projectors, learned temperatures) are
    added to the optimizer at its learning rate, without weight decay or clipping, and saved in the checkpoints.
    The log has the terms of the loss, the temperatures and the agreement with the teacher, all means over the rows
    since the last log; TRL's own metrics stay. ``eval_loss`` is the method's loss too, the mean over all rows of the
    data set, with ``eval_accuracy``, ``eval_agreement``, ``eval_cross_entropy`` and, of tokens, ``eval_perplexity``.
    With ``rollouts`` the completions of training batches are generated, each process from its own prompts, right before
    their step, by the student without its wrappers, in eval mode, where gradient checkpointing is off and the cache is
    used. They depend on the seed, the epoch, the step and the micro-batch alone, so a resumed run generates the same
    texts; the log has their statistics since the last log, as "rollout_length" and so on.
    The auxiliary loss that a mixture of experts computes itself is added in training. Columns of the data that only one
    of the two models takes, such as ``token_type_ids``, reach that model. With ``model_init`` every run starts with a
    new student and with the method as it was given.

    Args:
        args, kwargs: arguments of the Trainer.
        teacher: a model, frozen during ``train`` and then given back as it was, or a Teacher (its inputs must fit the
            task's: see ``Unpacked``).
        method: the loss, with its temperature policy.
        task: converts batches to rows; None is ``Labeled()``. Causal language models need ``tasks.LanguageModeling()``,
            encoder-decoders ``tasks.Seq2Seq()``.
        rollouts: makes the generated texts to train on from the student and the batches, both of which this trainer
            gives: ``partial(rollouts.OnPolicy, max_new_tokens=64, eos=2)``, or ``lambda student, batches:
            Speculative(student, teacher, batches)``; None trains on the data.
        chunks: whether to compute losses in chunks of rows (``kernels.chunked``); None: blocks of 2^22 logits or more.
        linear: train language models by ``kernels.linear_loss``, from hidden states, which stores no (N, C) logits. The
            log then has no agreement, nor TRL's own metrics; evaluation is unchanged.
        selfcheck: check the first batches of training, and one of each evaluation data set, before training; with
            several processes the first batch alone.

    Raises:
        TypeError, ValueError: if the method, the teacher or the settings do not work with this trainer.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | Teacher | None,
        method: Method | str,
        task: Task | None = None,
        rollouts: Callable[[nn.Module, Iterable[Any]], OnPolicy] | None = None,
        chunks: bool | None = None,
        linear: bool = False,
        selfcheck: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_rollouts(rollouts, task, kwargs.get("train_dataset"))
        super().__init__(*args, **kwargs)
        self.method: Method = (method := as_method(method))
        self._given_method = None if getattr(self, "model_init", None) is None else copy.deepcopy(method)
        self._lent = isinstance(teacher, nn.Module)
        self.task, self.selfcheck = Labeled() if task is None else task, selfcheck
        bare = False
        if isinstance(teacher, nn.Module) and not isinstance(teacher, Unpacked):
            teacher, bare = Unpacked(teacher), True
        self._bare = bare
        self.teacher = fitting(method, teacher, self._module())
        teacher_module = None if self.teacher is None else self.teacher.model
        self._unpacked_teacher = teacher_module if isinstance(teacher_module, Unpacked) else None
        self._excluded_inputs: frozenset[str] = frozenset()
        if self._unpacked_teacher is not None:
            self._excluded_inputs = excluded_inputs(self._module(), self._unpacked_teacher.model)
            self._unpacked_teacher.excluded_inputs = self._unpacked_teacher.excluded_inputs or excluded_inputs(
                self._unpacked_teacher.model, self._module()
            )
        accumulate, processes = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        whole_batches(method, self.task, gradient_accumulation_steps=accumulate, num_processes=processes)
        self._check_arguments()
        if self.teacher is not None:
            self.task = with_columns(self.task, self.teacher)
        self._chunks, self._wants_linear, self._make_rollouts = chunks, linear, rollouts
        self._bind(self._module())
        self._row_weights: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # of the metrics since the last log
        self._summed_steps, self._summed_state = 0, self.state
        self._evaluation: Evaluation | None = None
        self._warned = False  # of a loss that is not finite
        self.label_names = self.label_names or [
            "labels"
        ]  # otherwise the Trainer removes columns that forward() does not take
        # both declare that the loss is already scaled for the whole step; newer transformers read the second
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _bind(self, student: nn.Module) -> None:
        """Take this student: its features, its head and the method's device."""
        self._prepared, self._followed = False, None
        self.task.prepare_model(student)
        if self.teacher is not None:
            self.teacher.follow(Unpacked(student, excluded_inputs=self._excluded_inputs))
            for module in self.teacher.models:
                self.task.prepare_model(module.model if isinstance(module, Unpacked) else module)
            self.teacher.to(self.args.device)
        self.method.to(self.args.device)
        names = {n: (s, f"model.{t}" if self._bare else t) for n, (s, t) in self.task.features.items()}
        self._features = PairedFeatures.from_models(student, self.teacher, names)
        self._chunking = chunking_for(self.method, self._chunks)
        self._linear = HiddenForward(self.method, self.task, student) if self._wants_linear else None
        self._rollouts = None if self._make_rollouts is None else self._bind_rollouts(self._make_rollouts, student)

    def _bind_rollouts(self, make: Callable[..., OnPolicy], student: nn.Module) -> OnPolicy:
        """Return the loader that generates with this student, after trying how its models are decoded."""
        plugin: Any = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        zero3 = plugin is not None and plugin.zero_stage == 3
        if self.is_fsdp_enabled or zero3:
            raise ValueError(
                f"rollouts need the whole weights on every process, and {'ZeRO-3' if zero3 else 'FSDP'} shards them. "
                "Use DistributedDataParallel (torchrun without fsdp=), with PEFT if memory is short."
            )
        if getattr(self.args, "packing", False) or getattr(self.args, "padding_free", False):
            raise ValueError("rollouts need padded texts: set packing=False and padding_free=False.")
        rollouts = make(self.accelerator.unwrap_model(student), ())
        if not isinstance(rollouts, OnPolicy):
            raise TypeError(
                f"rollouts must return an OnPolicy, Speculative or SequenceLevel; got {type(rollouts).__name__}."
            )
        if rollouts.engine is not None and rollouts.engine.staleness:
            raise ValueError(
                f"this trainer reads no batches ahead, and {type(rollouts.engine).__name__} would generate them: write "
                "staleness=0, or run it with tempering.distill."
            )
        rollouts.rank = self.accelerator.process_index
        rollouts.try_models()
        return rollouts

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new student of ``model_init``, and take it with the method as it was given."""
        student = super().call_model_init(trial)
        given: Method | None = getattr(self, "_given_method", None)
        if given is not None:  # in the Trainer's own constructor there is no method yet
            self.method = copy.deepcopy(given)
            self._bind(student)
        return student

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that only the teacher takes, or that hold its outputs, too."""
        super()._set_signature_columns_if_needed()
        names = () if self._unpacked_teacher is None else arguments_of(self._unpacked_teacher.model)[0]
        columns = () if self.teacher is None else self.teacher.columns
        stored = (TEACHER_OUTPUTS,) if self.teacher is not None and self.teacher.reads_outputs else ()
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or ()), *names, *columns, *stored]))

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
        self.method.train(model.training)
        if model.training:
            out, loss = self._training_loss(model, inputs)
            # gradients are averaged over processes, and each process has only its part of the mean
            loss = loss * self.accelerator.num_processes
        else:
            out = self._forward(model, inputs)
            evaluation = self._evaluation or Evaluation(self.task, self.method)
            loss = evaluation.add(inputs, out, self._progress(), self._chunking)
        if self._linear is None if model.training else self._evaluation is not None:
            record_sft_metrics(self, inputs, out, training=model.training)
        if not return_outputs:
            return loss
        # the Trainer drops the first element of outputs that are not a mapping, as if it were the loss
        output = out.student
        return loss, output if isinstance(output, dict) else {"logits": getattr(output, "logits", output)}

    def _training_loss(self, model: nn.Module, inputs: Any) -> tuple[Forward, Tensor]:
        """Return the outputs and this process's part of the loss, and add to the metrics of the step."""
        weights, progress = self._row_weights, self._progress()
        if self._linear is not None:
            out, losses = self._linear.losses(inputs, self._unpacked(model), self.teacher, progress, weights)
        else:
            out = self._forward(model, inputs)
            losses = self.method.losses(out.blocks, progress, weights, self._chunking)
        coefficient = getattr(self, "router_aux_loss_coef", None) if self._asks_for_router_logits() else None
        losses = add_auxiliary(losses, auxiliary_loss(model, out.student, coefficient), weights)
        for name, part in step_means(losses, self.method, weights, out.teacher).items():
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        return out, torch.stack([block.loss for block in losses]).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of the steps since the last log."""
        if "loss" in logs and self._summed_steps:
            names = sorted(self._sums)
            sums = self._all_reduce(torch.stack([self._sums[name] for name in names])).tolist()
            means = {name: value / self._summed_steps for name, value in zip(names, sums, strict=True)}
            logs.update({name: value for name, value in means.items() if name not in logs})
            self._warned = self._warned or warn_if_not_finite(means, self.state.global_step)
            self._sums, self._summed_steps = {}, 0
            if self._rollouts is not None:
                counts = vars(self._rollouts.stats)
                summed = self._all_reduce(torch.tensor([*counts.values()], device=self.args.device)).tolist()
                stats = GenerationStats(**dict(zip(counts, summed, strict=True)))
                logs.update(
                    {f"rollout_{name}": x for name, x in self._rollouts.describe(stats).items()} if stats.texts else {}
                )
                self._rollouts.stats = GenerationStats()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Return the Trainer's output; its loss and scores are means over all rows."""
        self._prepare_method(dataloader)
        self._evaluation = evaluation = Evaluation(self.task, self.method)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluation = None
        result = evaluation.result(self._all_reduce, self.args.device)
        if output.metrics is not None and result:
            output.metrics[f"{metric_key_prefix}_loss"] = result.pop("loss")
            for name, value in result.items():
                output.metrics.setdefault(f"{metric_key_prefix}_{name}", value)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Evaluate a batch; samples that only make the last batch equal on all processes do not count."""
        state, evaluation = self.accelerator.gradient_state, self._evaluation
        if getattr(self.args, "predict_with_generate", False) and getattr(self, "label_smoother", None) is None:
            # Seq2SeqTrainer then takes the loss from the model, which computes none, or from a label smoother
            self.label_smoother = lambda *_: self.compute_loss(model, self._prepare_inputs(inputs))
            try:
                return self.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            finally:
                self.label_smoother = None
        repeats = self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
        if not repeats or evaluation is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._evaluation = None
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        size = len(next(x for x in inputs.values() if isinstance(x, Tensor)))
        own = min(max(0, state.remainder - self.accelerator.process_index * size), size)
        self._evaluation = evaluation if own else None
        with torch.no_grad(), self.compute_loss_context_manager():  # on every process, as collectives need
            self.compute_loss(model, first_samples(self._prepare_inputs(inputs), max(1, own)))
        self._evaluation = evaluation
        return output

    def get_batch_samples(self, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the micro-batches of one step, and the total weight of their rows on all processes."""
        batches, _ = super().get_batch_samples(*args)
        if (rollouts := self._rollouts) is not None:
            first = self.state.global_step * self.args.gradient_accumulation_steps
            rollouts.epoch = int(self.state.epoch or 0)
            batches = [self._own_teacher(rollouts.mixed(batch, first + i)) for i, batch in enumerate(batches)]
        self.method.zero_grad(set_to_none=True)  # the Trainer only resets the gradients of its model
        self._row_weights = {}
        if self._summed_state is not self.state:  # the Trainer started anew, such as with smaller batches
            self._sums, self._summed_steps, self._summed_state = {}, 0, self.state
        self._summed_steps += bool(batches)
        for batch in batches:
            for name, weight in self.task.row_weights(batch).items():
                weight = torch.as_tensor(weight, dtype=torch.float32, device=self.args.device)
                self._row_weights[name] = self._row_weights[name] + weight if name in self._row_weights else weight
        self._row_weights = {name: self._all_reduce(weight) for name, weight in sorted(self._row_weights.items())}
        if self.selfcheck and batches:
            self.selfcheck = False
            self._check(batches[0])
        return batches, sum(self._row_weights.values())

    def _own_teacher(self, batch: Any) -> Any:
        """Return a generated batch whose stored logits, if they are this trainer's teacher's, are known as such."""
        stored = batch.get(TEACHER_OUTPUTS)
        own = self._unpacked_teacher
        if stored is None or own is None or stored.producer is not own.model:
            return batch
        return {**batch, TEACHER_OUTPUTS: PrecomputedLogits(stored.logits, own)}

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
        plain = getattr(optimizer, "optimizer", optimizer)  # accelerate's wraps it
        if self._followed is not plain:  # a second train() has the same one
            self._followed = updating(plain, self.teacher, sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled)
        return optimizer

    def _saved(self) -> Iterator[tuple[str, str, nn.Module]]:
        """Yield what is saved beside the student: the file, the owner's name and the module."""
        if self.method.state_dict():
            yield METHOD, type(self.method).__name__, self.method
        if self.teacher is not None and (state := self.teacher.state) is not None:
            yield TEACHER, type(self.teacher).__name__, state

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        for name, _, module in self._saved():
            save_weights(Path(output_dir or self.args.output_dir or ".") / name, module.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loaded_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._load_saved(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()
        self._load_saved(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load weights that ``save_pretrained`` wrote under the names of earlier versions.

        ``from_pretrained`` renames them back, and the Trainer does not, which leaves such weights as they are
        (transformers issue 48805).

        Raises:
            ValueError: for a checkpoint without some of the student's weights.
        """
        student: Any = self._module()
        if not (load_result.missing_keys and load_result.unexpected_keys and hasattr(student, "from_pretrained")):
            super()._issue_warnings_after_load(load_result)
            return
        saved, found = type(student).from_pretrained(self._loaded_from, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{self._loaded_from} is not of this student: it has no weights {', '.join(missing)}.")
        student.load_state_dict(saved.state_dict())

    def _load_saved(self, checkpoint: str | None) -> None:
        """Load what is saved beside the student from its checkpoint."""
        if checkpoint is None:
            return
        from safetensors.torch import load_file

        for name, owner, module in self._saved():
            path = Path(checkpoint) / name
            if not path.is_file():
                raise ValueError(
                    f"{path} does not exist, so {owner} cannot resume its own parameters. Was the checkpoint written "
                    "with another method or teacher? Start without resume_from_checkpoint."
                )
            module.load_state_dict(load_file(path))

    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _check_arguments(self) -> None:
        """Reject arguments that change the loss of the Trainer, which the method replaces."""
        ignored = ["label_smoothing_factor"] if self.args.label_smoothing_factor else []
        ignored += [] if self.compute_loss_func is None else ["compute_loss_func"]
        default = getattr(type(self.args), "loss_type", None)  # of SFTConfig
        loss_type = getattr(self.args, "loss_type", default)
        if default is not None and loss_type != default:
            ignored.append(f"loss_type={loss_type!r}")
        if ignored:
            raise ValueError(
                f"the method computes the loss, so {' and '.join(ignored)} would have no effect. Leave it out."
            )

    def _asks_for_router_logits(self) -> bool:
        """Whether TRL's SFTTrainer adds the auxiliary loss of a mixture of experts."""
        return bool(getattr(self, "aux_loss_enabled", False))

    def _unpacked(self, model: nn.Module) -> Unpacked:
        options = {"output_router_logits": True} if self._asks_for_router_logits() else {}
        return Unpacked(model, excluded_inputs=self._excluded_inputs, **options)

    def _forward(self, model: nn.Module, inputs: Any) -> Forward:
        return forward(inputs, self._unpacked(model), self.teacher, self.task, self._features)

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
        alone, data, loader = (
            self.accelerator.num_processes == 1,
            self.eval_dataset,
            self.callback_handler.train_dataloader,
        )
        names = list(data) if isinstance(data, dict) else []
        splits: dict[str, Any] = {f"eval_dataset[{name!r}]": name for name in names}
        if data is not None and not names:
            splits["eval_dataset"] = None
        if not alone or self.args.eval_strategy == "no":
            splits = {}

        def again(loader: Any, skip: int = 0) -> Iterator[Any]:
            # accelerate's own loader would take part in the accumulation of gradients
            return map(self._prepare_inputs, batches_again(getattr(loader, "base_dataloader", loader), skip=skip))

        def evaluated(name: str | None) -> Iterator[Any]:
            return again(self.get_eval_dataloader(name))

        report = check(
            self._prepare_inputs(batch),
            lambda: again(self.get_train_dataloader(), 1) if alone else (),
            {name: partial(evaluated, key) for name, key in splits.items()},
            student=Unpacked(model, excluded_inputs=self._excluded_inputs),
            teacher=self.teacher,
            method=self.method,
            task=self.task,
            features=self._features,
            loader=getattr(loader, "base_dataloader", loader),
        )
        if self.is_world_process_zero():
            import logging

            logging.getLogger("tempering").info(report.line)

    @torch.no_grad()
    def _prepare_method(self, loader: Any = None) -> None:
        """Let the method create its parameters from a first batch; restore random states and training modes."""
        if self._prepared or not self.method.needs_setup():
            return
        self._prepared = True
        model = self._module()
        with borrowed(model):
            loader = self.get_train_dataloader() if loader is None else loader
            batch = self._prepare_inputs(next(iter(loader)))
            if hasattr(loader, "end"):
                loader.end()  # accelerate's, which still counts a pass that is left
            model.eval()
            self.method.setup(self._forward(model, batch).blocks[-1])


def _check_rollouts(rollouts: Any, *places: Any) -> None:
    """Reject generated texts that are given as a loader, which this trainer would not bind to its student.

    Args:
        rollouts: the argument.
        places: other arguments in which a loader may be given by mistake.
    """
    loader = next((x for x in (rollouts, *places) if isinstance(x, OnPolicy)), None)
    if loader is not None or not (rollouts is None or callable(rollouts)):
        name = "OnPolicy" if loader is None else type(loader).__name__
        call = f"partial({name}, max_new_tokens=64, eos=2)"
        if name != "OnPolicy":
            call = f"lambda student, batches: {name}({'student, ' * (name == 'Speculative')}teacher, batches)"
        raise TypeError(
            f"this trainer makes its own batches, and gives them and the student to what generates: rollouts={call}, "
            f"with train_dataset=the data and task=tasks.LanguageModeling(); got {type(loader or rollouts).__name__}."
        )


class Unpacked(nn.Module):
    """Call a transformers model with one mapping of inputs: ``teachers.Live(Unpacked(model))``.

    Args:
        model: of transformers.
        excluded_inputs: names of inputs that its forward does not take.
        options: more keyword arguments of its forward.
    """

    def __init__(self, model: nn.Module, *, excluded_inputs: Collection[str] = (), **options: Any) -> None:
        super().__init__()
        self.model, self.excluded_inputs, self.options = model, excluded_inputs, options

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        taken = {name: x for name, x in inputs.items() if name not in self.excluded_inputs}
        return self.model(**taken, **self.options)
