"""Train a student: the training loop, on Lightning Fabric."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tempering.methods.base import BlockLoss, Method, Step, step_rng
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.training.checkpoint import set_random_state
from tempering.training.checks import chunking_for, smoothed, validate_sampled_teacher, validate_step_method
from tempering.training.config import BEFORE_END, Run, RunLength, TrainConfig, TrainState
from tempering.training.distributed import (
    RunInterrupted,
    StopSignals,
    WorkersEndedError,
    all_reduce_gradients,
    all_reduce_mean,
    broadcast_parameters,
    check_splittable,
    checked_together,
    clip_grad_norm,
    global_row_weights,
)
from tempering.training.evaluator import Evaluator
from tempering.training.fabric import allow_double_backward, fabric_for, peak_mb, unknown_to_fabric
from tempering.training.metrics import ProgressBar, nonfinite_loss_error, rollout_metrics, step_metrics
from tempering.training.optimizers import (
    Optimizer,
    Schedule,
    base_learning_rates,
    make_optimizer,
    make_schedule,
    optimizer_without_decay,
    updating,
)
from tempering.training.resumable_loader import EMPTY, ResumableLoader, micro_batches, reseed
from tempering.training.run_dir import (
    WEIGHT_FILES,
    RunDirectory,
    initial_weights,
    lock_run_dir,
    remember_weights,
    run_folder,
    run_key,
    run_metadata,
)
from tempering.training.run_records import Recorder
from tempering.training.selfcheck import (
    Checked,
    batch_of_one,
    explain_batch_of_one,
    independent_workers,
    selfcheck,
    whose_logits,
)
from tempering.utils.device import clone_outputs, maybe_compile
from tempering.utils.files import describe_files, write_atomic
from tempering.utils.state import ModelState, unwrapped
from tempering.utils.tensors import eval_mode, to_device

if TYPE_CHECKING:
    from tempering.training.ema import WeightAverage
    from tempering.training.features import PairedFeatures
    from tempering.training.loggers import Loggers


class Trainer:
    """Train a student with a method and a teacher.

    Args:
        student: the model to train, in place.
        teacher: None for a method without one.
        batches: the training batches; one that can be iterated over every epoch.
        optimizer: parameter groups -> optimizer; the method's own groups follow the student's.
        schedule: progress in [0, 1) -> factor of every group's learning rate; None: constant.
        evaluations: the splits to score, name -> batches.
        folder: of records, checkpoints and weights; None writes nothing.
        loggers: names of loggers, or loggers of Fabric.
        on_step: called after every step with its number, from 0, and its loss, ().

    Raises:
        ValueError: for models, method, data and config that do not go together.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        task: Task,
        batches: Iterable[Any],
        *,
        optimizer: Optimizer,
        schedule: Schedule | Any,
        evaluations: Mapping[str, Iterable[Any] | None],
        config: TrainConfig,
        folder: str | Path | None = None,
        loggers: Sequence[Any] = (),
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        wrapped, student = student, unwrapped(student)  # records and weights are the plain model's
        self.student, self.teacher, self.method, self.task, self.config = student, teacher, method, task, config
        self.on_step = on_step
        self.folder = None if folder is None else run_folder(folder)
        validate_step_method(method, teacher, config)
        validate_sampled_teacher(method, teacher)
        check_splittable(method, task, accumulate=config.accumulate)
        self.fabric = fabric_for(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=config.strategy,
            precision=config.precision,
        )
        self.loggers = self._make_loggers(loggers) if loggers else None
        self.device, self.world = self.fabric.device, self.fabric.world_size
        self.is_rank_zero = self.fabric.is_global_zero
        check_splittable(method, task, world=self.world)

        # data
        self.adaptive_policies = method.adaptive_policies()
        for part in (method, *self.adaptive_policies):
            batches = part.wrap_batches(batches, teacher)
        if config.balanced_sampling:
            from tempering.training.balanced_sampling import balanced

            batches = balanced(batches)
        self.loader = ResumableLoader(batches, self.fabric, seed=config.seed)
        self.length = RunLength(config, self.loader)
        if not self.length.total:
            raise ValueError(EMPTY)

        # models
        method.to(self.device)
        if teacher is not None:
            teacher.to(self.device)
        broadcast_parameters(student, self.fabric)
        self.initial_weights = None if self.folder is None else initial_weights(student, self.folder)
        self.given = ModelState(student)
        forward = maybe_compile(student, config.compile) if config.compile else wrapped
        # Fabric compiles again what was compiled since it was imported, but cannot what its user compiled
        with unknown_to_fabric(student):
            forward = self.fabric.setup_module(forward, _reapply_compile=bool(config.compile))
        self.model = clone_outputs(forward, config.compile)
        if method.needs_double_backward:
            allow_double_backward(self.model)
        if teacher is not None:
            teacher.follow(student)  # in the precision of the run, and equal on all ranks
        method.bind_teacher(None if teacher is None else teacher.model)
        self.features = self._paired_features()
        self.make_rows = smoothed(task.rows, config.label_smoothing)
        self.chunking = chunking_for(method, config.chunks)
        self.uses_cuda_graphs = isinstance(config.compile, str)  # some modes of torch.compile do
        self._set_up_method()
        broadcast_parameters(method, self.fabric)
        moving = None if teacher is None else teacher.state
        self.optimizer: Any = self.fabric.setup_optimizers(updating(self._make_optimizer(optimizer), teacher))
        self.base_lrs = base_learning_rates(self.optimizer)
        self.schedule = make_schedule(
            config.schedule or schedule, self.optimizer, self.length.total, warmup=config.warmup
        )
        self.average = self._make_average()

        # evaluation, records and checkpoints
        self.evaluator = Evaluator(
            task,
            evaluations,
            teacher,
            device=self.device,
            cache_teacher=task.remember and not method.trains_teacher and moving is None,
            patience=config.patience,
        )
        self.recorder = Recorder(self.folder if self.is_rank_zero else None)
        key = run_key(
            student,
            teacher,
            method,
            self.optimizer,
            config,
            task=task,
            schedule=None if self.folder is None else self.schedule,
            loader=self.loader.batches,
            splits={} if self.folder is None else self.evaluator.splits,
            initial_weights=self.initial_weights,
            total_steps=self.length.total,
            world=self.world,
        )
        others = {"ema": None if self.average is None else self.average.state, "teacher": moving}
        others = {name: module for name, module in others.items() if module is not None}
        self.run_dir = RunDirectory(self.folder, self.fabric, (student, method, self.optimizer), key, others)

        # progress
        self.state = TrainState()
        self.resumed_random_state: dict[str, Any] | None = None
        self.stop = StopSignals(self.folder)
        self.progress_bar = ProgressBar(self.length, disable=config.quiet or not self.is_rank_zero)
        self.last_log = (0.0, 0)  # time and step
        self.sample: Any = None  # the last training batch

    def _make_loggers(self, loggers: Sequence[Any]) -> Loggers:
        from tempering.training.loggers import Loggers

        def on_failure(name: str, reason: str) -> None:
            self.recorder.update(loggers={**self.recorder.facts.get("loggers", {}), name: reason})

        return Loggers(loggers, self.folder, on_failure)

    def _paired_features(self) -> PairedFeatures | None:
        """Find the features that the task names in both models, if it names any."""
        if not self.task.features:
            return None
        from tempering.training.features import PairedFeatures

        return PairedFeatures.from_models(self.student, self.teacher, self.task.features)

    @torch.no_grad()
    def _set_up_method(self) -> None:
        """Let the method size its own modules by a first block of rows, before the optimizer is created.

        Features see a first forward in any case, so that those which nothing overwrites are not copied in training.
        """
        config, changes = self.config, self.config.changes_batches
        if not (changes or self.method.needs_setup() or self.features is not None):
            return
        batch = self.loader.first()
        with eval_mode(self.model), self._hooks():
            rows = self._make_step(batch, 1.0, {}).forward()[-1]
        if changes:
            from tempering.training.batch_changes import batch_changes

            data, rank, classes = self.loader.batches, self.fabric.global_rank, rows.student.shape[1]
            self.loader.change = batch_changes(config, self.task, self.teacher, data, classes=classes, rank=rank)
        if self.method.needs_setup():
            self.method.setup(rows)

    def _make_optimizer(self, optimizer: Optimizer) -> torch.optim.Optimizer:
        if not self.config.decay_norms:
            return optimizer_without_decay(optimizer, self.model, self.student, self.method.param_groups())
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return make_optimizer(optimizer, [{"params": trained}, *self.method.param_groups()])

    def _make_average(self) -> WeightAverage | None:
        if self.config.ema is None:
            return None
        from tempering.training.ema import WeightAverage

        return WeightAverage(self.student, self.config.ema)

    def _hooks(self) -> contextlib.AbstractContextManager[object]:
        """Return a context of forward passes, in which features are extracted; nothing stays on the models after it."""
        features: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.features is not None:
            from tempering.training.features import reset_compiled

            reset_compiled()
            features = self.features
        if not self.config.gradient_checkpointing:
            return features
        from tempering.training.gradient_checkpointing import gradient_checkpointing

        return gradient_checkpointing(self.student, features)

    def check(self) -> Checked:
        """Run the self-check on the first batches, training and scored ones; nothing is trained or written.

        Raises:
            SelfCheckError: if the first batches show that the run would be wrong.
        """
        skip, batch = self.config.skip_checks, self.loader.first()
        with checked_together(self.world), self._hooks():
            checked = selfcheck(
                self.model,
                self.teacher,
                batch,
                method=self.method,
                task=self.task,
                features=None if self.features is None else self.features.features,
                more=self.loader.later,
                single=batch_of_one(self.loader.batches),
                workers=independent_workers(self.loader.batches),
                skip=skip,
            )
            if self.evaluator.splits:
                if "scores" not in skip:
                    self.evaluator.check(self.model, self.method)
                checked.checks["scores"] = "turned off" if "scores" in skip else "ok"
        return checked

    def run(self, facts: Mapping[str, Any]) -> Run:
        """Train to the end, resuming from the newest checkpoint in the folder; a finished run is only read.

        Args:
            facts: additional content of facts.json.

        Raises:
            RunInterrupted: after a signal that asks for an end; a checkpoint is written.
        """
        with self.stop, lock_run_dir(self.folder if self.is_rank_zero else None):
            try:
                self._resume(facts)
                if self.run_dir.how == "finished":
                    from tempering.utils.text import best_and_last

                    run = self.run_dir.read_finished()
                    run.ema = None if self.average is None else self.average.model
                    said = best_and_last(run.facts["result"], run.facts.get("best_by"))
                    self.progress_bar.say(f"{self.folder}: finished run, nothing was trained; {said}")
                    return run
                return self._run()
            finally:
                self.loader.restore()
                if self.folder is not None and self.initial_weights is not None and self.config.strategy != "fsdp":
                    remember_weights(self.student, self.folder, self.initial_weights)

    def _run(self) -> Run:
        try:
            if self.loggers is not None:
                self.loggers.begin(self.recorder.facts)
            if self.config.selfcheck:
                self._report(self.check())
            label = str(self.recorder.facts.get("label") or type(self.method).__name__)
            with self.progress_bar.show(label, self.state.step), self._hooks():
                while not self.length.is_done(self.state):
                    self._train_epoch()
            return self._finish()
        except (KeyboardInterrupt, RunInterrupted):
            self._end("interrupted")
            raise
        except BaseException as error:
            if self.stop.ended_workers(error):
                self._end("interrupted")
                raise self._interrupted(str(self.stop.received), saved=False) from error
            self._end("failed", {"error": f"{type(error).__name__}: {error}"})
            raise

    def _end(self, status: str, facts: Mapping[str, Any] | None = None) -> None:
        """Complete the records, then the logs."""
        self.recorder.end(status, **(facts or {}))
        if self.loggers is not None:
            self.loggers.end(status)

    def _resume(self, facts: Mapping[str, Any]) -> None:
        """Load the newest checkpoint, if there is one, and start the records; those of a finished run stay."""
        if self.folder is not None:
            self.run_dir.key["batches"] = self.loader.fingerprint()
            self.run_dir.key["samples"] = self.loader.samples(self.evaluator.splits)
        self.state, self.resumed_random_state = self.run_dir.resume(
            restart=not self.config.resume,
            extend=self.config.extend,
            again={
                "batches": functools.partial(self.loader.fingerprint, keep_states=False),
                "samples": functools.partial(self.loader.samples, self.evaluator.splits, again=True),
            },
        )
        self.length.resume(self.state)
        if self.run_dir.how == "finished":
            return
        best_by = self.evaluator.best_by
        metadata = run_metadata(
            self.run_dir.key, self.student, self.teacher, self.method, self.config, best_by=best_by, facts=facts
        )
        if self.run_dir.extended is not None:
            before, now = self.run_dir.extended
            metadata["extended"] = [{"from_steps": before, "to_steps": now, "epoch": self.state.epoch}]
        positions = self.run_dir.positions
        self.recorder.begin(metadata, upto=self.state.step, epochs=self.state.epoch, positions=positions)

    def _report(self, checked: Checked) -> None:
        """Record and print the result of the self-check."""
        self.recorder.update(selfcheck={"line": checked.line, "checks": checked.checks})
        self.progress_bar.say(checked.line)

    def _train_epoch(self) -> None:
        """Train an epoch, or the remainder of one after resuming; then evaluate and save a checkpoint."""
        config, state = self.config, self.state
        self.length.begin_epoch(state.epoch)
        reseed(config.seed, state.epoch, self.fabric.global_rank)
        batches = self.loader.epoch(state.epoch, state.batch, self.run_dir.loader_state)
        self.run_dir.loader_state = None
        if self.resumed_random_state is not None and state.batch:
            # after epoch(), in which the seed above gives a DataLoader the order that it had before the interruption
            set_random_state(self.resumed_random_state)
        self.resumed_random_state = None
        self.given.train(self.model)
        self.method.train()
        start, start_step, start_batch, seconds = time.perf_counter(), state.step, state.batch, state.seconds
        loss_sum: Tensor | float = state.loss_sum
        self.last_log = (start, state.step)
        if self.length.ends_epoch(state):  # resumed after the last step
            batches = iter(())
        try:
            for group in micro_batches(self.stop.batches(batches), config.accumulate):
                loss_sum, self.sample = loss_sum + self._step(group), group[-1]
                state.step, state.batch = state.step + 1, state.batch + len(group)
                state.seconds = seconds + time.perf_counter() - start
                stop = self.stop.requested(self.fabric, state.step)
                if stop or (config.checkpoint_every and state.step % config.checkpoint_every == 0):
                    state.loss_sum = self._finite(float(loss_sum))
                    self._save()
                if stop:
                    raise self._interrupted(stop)
                if self.length.ends_epoch(state):
                    break
        except WorkersEndedError as error:
            if self.world > 1 or not state.step:  # other processes may be in a step
                raise
            state.loss_sum = self._finite(float(loss_sum))
            self._save()
            raise self._interrupted(str(self.stop.received)) from error
        except ValueError as error:
            explain_batch_of_one(error, f"the batch of step {state.step + 1}")
            raise
        if state.step == start_step and not start_batch:
            later = f"Epoch {state.epoch + 1} has none: is it a generator, which can be iterated over once?"
            raise ValueError(f"{EMPTY} {later}" if state.epoch else EMPTY)
        steps_in_epoch = max(1, math.ceil(state.batch / config.accumulate))
        mean_loss = all_reduce_mean(self._finite(float(loss_sum)) / steps_in_epoch, self.fabric)
        state.epoch, state.batch, state.loss_sum = state.epoch + 1, 0, 0.0
        self.length.correct(state, steps_in_epoch)
        self._end_epoch(mean_loss)
        self._save()
        stop = self.stop.requested(self.fabric, 0)  # in the evaluation
        if stop and not self.length.is_done(state):
            raise self._interrupted(stop)

    def _interrupted(self, by: str, *, saved: bool = True) -> RunInterrupted:
        requeued = self.config.requeue and self.is_rank_zero
        return self.stop.interrupted(by, self.state.step, requeued=requeued, saved=saved)

    def _save(self) -> None:
        """Write a checkpoint, and the size and hash of the records at this step."""
        loader = self.loader.state() if self.folder is not None and self.state.batch else None
        self.run_dir.save(self.state, keep=self.config.keep, records=self.recorder.positions, loader=loader)
        self.recorder.save_positions()

    def _step(self, batches: list[Any]) -> Tensor:
        """Update the weights once, from one or more micro-batches; return the loss, (), not averaged over ranks."""
        config, number, length = self.config, self.state.step, self.length
        progress = min((number + 1) / length.total, length.epoch_end)
        if self.schedule is not None:
            factor = self.schedule(min(number / length.total, length.epoch_end, BEFORE_END))
            for param_group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                param_group["lr"] = lr * factor
        if self.device.type != "cpu":
            batches = [to_device(batch, self.device) for batch in batches]
        normalizer: Mapping[str, Tensor | float] = {}  # of the whole step; empty: total weight of the batch's own rows
        if len(batches) > 1 or self.world > 1:
            normalizer = global_row_weights([self.task.row_weights(batch) for batch in batches], self.fabric)
        step_losses, blocks = list[Tensor](), list[BlockLoss]()
        for i, batch in enumerate(batches, start=1):
            if self.uses_cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()
            sync = self.fabric.no_backward_sync(self.model, enabled=i < len(batches))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            with sync, step_rng(config.seed, number):
                blocks = self.method.compute(self._make_step(batch, progress, normalizer))
                loss = blocks[0].loss if len(blocks) == 1 else torch.stack([block.loss for block in blocks]).sum()
                if self.world > 1:  # gradients are averaged over ranks, but each rank has its part of the sum
                    loss = loss * self.world
                self.fabric.backward(loss)
            step_losses.append(loss.detach())
        all_reduce_gradients(self.method, self.fabric)
        if config.max_grad_norm is not None:
            clip_grad_norm(self.optimizer, self.fabric, config.max_grad_norm)
        with self._adapting(batches[-1]):
            self.optimizer.step()
        if self.average is not None:
            self.average.update()
        self.optimizer.zero_grad(set_to_none=True)
        loss = functools.reduce(torch.add, step_losses)
        self._log(loss, blocks, progress, batches[-1])
        return loss

    def _make_step(self, batch: Any, progress: float, normalizer: Mapping[str, Tensor | float]) -> Step:
        student_inputs, teacher_inputs, ids = self.task.inputs(batch)
        teacher = self.teacher
        return Step(
            self.model,
            no_teacher if teacher is None else teacher,
            student_inputs,
            teacher_inputs,
            ids,
            batch,
            progress,
            self.make_rows,
            features=None if self.features is None else self.features.features,
            teacher_with_grad=None if teacher is None else teacher.forward_with_grad,
            normalizer=normalizer,
            chunking=self.chunking,
        )

    def _adapting(self, batch: Any) -> contextlib.AbstractContextManager[object]:
        """Return a context of the optimizer's step, which updates the adaptive policies at its end."""
        if not self.adaptive_policies:
            return contextlib.nullcontext()
        from tempering.training.rewards import adapting

        return adapting(self.adaptive_policies, self.model, self.task, batch)

    def _log(self, loss: Tensor, blocks: list[BlockLoss], progress: float, batch: Any) -> None:
        """Log the step every ``log_every`` steps; other steps do not synchronize with a GPU."""
        config, step = self.config, self.state.step + 1
        due = self.state.step % config.log_every == 0 or step == self.length.total
        if (due or loss.device.type == "cpu") and not math.isfinite(value := float(loss)):
            whose = whose_logits(self.teacher, self.task, batch)
            raise nonfinite_loss_error(value, step, self.folder, blocks, whose)
        if self.on_step is not None:
            self.on_step(self.state.step, loss)
        if not due:
            self.progress_bar.update(step)
            return
        now, (last_time, last_step) = time.perf_counter(), self.last_log
        self.last_log = (now, step)
        step_seconds = (now - last_time) / max(1, step - last_step)
        line: dict[str, Any] = {
            "step": step,
            "epoch": self.state.epoch + 1,
            "progress": progress,
            "loss": all_reduce_mean(float(loss), self.fabric),
            "lr": self.optimizer.param_groups[0]["lr"],
            "rows_per_second": len(blocks[-1].rows) * config.accumulate * self.world / step_seconds,
            "step_ms": 1000.0 * step_seconds,
            **step_metrics(blocks, self.method.policies()),
            **rollout_metrics(self.loader.batches),
        }
        self.recorder.step(line)
        self.progress_bar.update(step, epoch=line["epoch"], loss=line["loss"], lr=line["lr"])
        if self.loggers is not None:
            self.loggers.step(line)

    def _finite(self, loss_sum: float) -> float:
        """Return ``loss_sum``; raise if it is not finite, which detects steps that were not logged on a GPU."""
        if not math.isfinite(loss_sum):
            raise nonfinite_loss_error(loss_sum, self.state.step, self.folder)
        return loss_sum

    @torch.no_grad()
    def _end_epoch(self, loss: float) -> None:
        """Score the splits if it is time to, record the epoch, show it, and keep the best weights."""
        state, best_by, note = self.state, self.evaluator.best_by, None
        lr = self.optimizer.param_groups[0]["lr"]
        line = {"epoch": state.epoch, "step": state.step, "seconds": state.seconds, "loss": loss, "lr": lr}
        if state.epoch % self.config.evaluate_every == 0 or self.length.is_done(state):
            scores = self.evaluator.score(self.model)
            scores |= {} if self.average is None else self.average.scores(self.evaluator, self.model)
            self.given.train(self.model)
            line |= scores
            self.recorder.epoch(line | rollout_metrics(self.loader.batches))
            state.last = {"epoch": state.epoch, **scores}
            if self.loggers is not None:
                self.loggers.scores(scores, state.step)
            if best_by is not None:
                split, metric = best_by.split("/")
                value = self.fabric.broadcast(scores[split][metric])  # all ranks stop together
                note = f"{split} {metric} {value:.4f}"
                if self.evaluator.select_best(state, value):
                    self.run_dir.write_weights("best.safetensors")
        self.progress_bar.epoch(line, note)

    def _finish(self) -> Run:
        """Write the weights and the analysis, and complete the records."""
        state = self.state
        cost = self._write_student()
        if self.average is not None:
            with self.average.applied():
                self.run_dir.write_weights("ema.safetensors")
        analysis = self.evaluator.analyze(self.model, self.method, state)
        if self.folder is not None:
            analysis = self.evaluator.compare_models(self.model, analysis, self.config.examples)
        if analysis and self.is_rank_zero:
            self.recorder.analysis(analysis)
        if state.best is not None and state.last is not None and state.best["epoch"] == state.last["epoch"]:
            state.best = state.last  # with the scores of the analysis, also after resuming
        result = {
            "last": state.last,
            "best": state.best,
            "step_ms": 1000.0 * state.seconds / max(1, state.step),
            "seconds": state.seconds,
            "steps": state.step,
            "stopped_early": state.stopped,
            "peak_mb": peak_mb(self.device),
            **({"cost": cost} if cost else {}),
        }
        self._end("done", {"result": result, "files": self._written_files()})
        self.fabric.barrier()
        ema = None if self.average is None else self.average.model
        return Run(self.student, self.folder, self.recorder.facts, self.recorder.epochs, self.run_dir.how, ema)

    def _written_files(self) -> dict[str, Any]:
        """Return size and hash of what the run leaves beside its records, by which damage is noticed later."""
        if self.folder is None or not self.is_rank_zero:
            return {}
        from tempering.training.pretrained import CONFIG, TOKENIZER

        paths = [self.folder / CONFIG, *(self.folder / TOKENIZER).glob("*"), *map(self.folder.joinpath, WEIGHT_FILES)]
        return describe_files(self.folder, filter(Path.is_file, paths))

    def _write_student(self) -> dict[str, Any]:
        """Write the student's weights and config, and return what both models cost; {} without a folder."""
        if self.folder is None:
            return {}
        from tempering.training.pretrained import CONFIG, METADATA, WEIGHTS, costs, save_tokenizer, student_config

        data, batch = self.loader.batches, self.loader.first() if self.sample is None else self.sample
        facts = self.recorder.facts
        config = student_config(self.student, batch, task=self.task, data=data, facts=facts, state=self.state)
        last = {**config, "scores": {"last": config["scores"]["last"]}}
        self.run_dir.write_weights(WEIGHTS, {METADATA: json.dumps(last, sort_keys=True)})
        if not self.is_rank_zero:
            return {}
        write_atomic(self.folder / CONFIG, json.dumps(config, indent=1))
        save_tokenizer(data, self.folder)
        is_sharded = self.config.strategy == "fsdp"  # one rank alone cannot run it
        return {} if is_sharded else costs(self.student, self.teacher, to_device(batch, self.device), self.task)


def no_teacher(inputs: Any, ids: Tensor | None) -> None:
    """Return None, for a run without a teacher."""
    return
