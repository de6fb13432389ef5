"""The loop: explicit, on Lightning Fabric. It knows rows, tasks, teachers and methods by their base classes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempering.methods.base import Method, Step, StepMethod, drawing
from tempering.rows import Rows, total
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.training.checkpoint import random_state, set_random_state
from tempering.training.checks import apart, fits
from tempering.training.config import At, Run, TrainConfig
from tempering.training.distributed import alike, clip, mean_over_ranks, refuse_split, share_gradients, whole_mass
from tempering.training.fabric import fabric_for, may_differentiate, peak_mb
from tempering.training.features import Tapped
from tempering.training.loss import Loss, losses_of, path_of
from tempering.training.metrics import Display, Remembered, measured, not_finite, on_cpu
from tempering.training.recorder import Recorder
from tempering.training.run_dir import Keeper, alone_in, facts_of, key_of
from tempering.training.selfcheck import Checked
from tempering.training.selfcheck import selfcheck as check_first_batch
from tempering.training.stream import Stream, grouped, repeatable, reseed
from tempering.utils.device import begin, compiled, keeping
from tempering.utils.tensors import on

EMPTY = "the training loader yields no batches. Is the data set empty, or smaller than a batch?"


class Loop:
    """One run's parts and the loop round them."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        method: Method,
        task: Task,
        settings: TrainConfig,
        *,
        folder: str | Path | None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.student, self.teacher, self.method, self.task, self.settings = student, teacher, method, task, settings
        self.folder = None if folder is None else Path(folder)
        self.at, self.on_step = At(), on_step
        self.resumed: dict[str, Any] | None = None
        if isinstance(method, StepMethod):
            fits(method, teacher, settings)
        refuse_split(method, accumulate=settings.accumulate)
        apart(student, teacher)

    def set_up(
        self,
        batches: Iterable[Any],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Callable[[float], float] | None,
        loggers: Sequence[Any],
        evaluations: Mapping[str, Iterable[Any] | None],
    ) -> None:
        """Models on their device, wrapped; streams; the optimizer over the student's and the method's parameters."""
        s = self.settings
        self.fabric = fabric_for(
            accelerator=s.accelerator,
            devices=s.devices,
            strategy=s.strategy,
            precision=s.precision,
            loggers=loggers,
            folder=self.folder,
        )
        self.world, self.first = self.fabric.world_size, self.fabric.is_global_zero
        refuse_split(self.method, world=self.world)
        self.learners = self.method.learners()
        for part in (self.method, *self.learners):
            batches = part.feed(batches, self.teacher)
        self.stream = Stream(batches, self.fabric, seed=s.seed)
        self.total_steps = s.steps or (s.epochs or 0) * math.ceil(len(self.stream) / s.accumulate)
        if not self.total_steps:
            raise ValueError(EMPTY)
        self.method.to(self.fabric.device)
        if self.teacher is not None:
            self.teacher.to(self.fabric.device)
        alike(self.student, self.fabric)
        self.model = keeping(self.fabric.setup_module(compiled(self.student, s.compile)), s.compile)
        if isinstance(self.method, StepMethod):
            may_differentiate(self.model, self.method)
            self.method.meet(None if self.teacher is None else self.teacher.model)
        self.taps = Tapped.between(self.student, self.teacher, self.task.taps)
        self._prepare_method()
        alike(self.method, self.fabric)
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad]}, *self.method.param_groups()]
        self.optimizer: Any = self.fabric.setup_optimizers(optimizer(groups))
        self.schedule = schedule
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self._set_up_scores(evaluations)
        self.recorder = Recorder(self.folder if self.first else None)
        key = key_of(
            self.student,
            self.teacher,
            self.method,
            self.optimizer,
            s,
            data=getattr(self.stream.batches, "identity", None),
            total_steps=self.total_steps,
            world=self.world,
        )
        self.keeper = Keeper(self.folder, self.fabric, (self.student, self.method, self.optimizer), key)

    def _set_up_scores(self, evaluations: Mapping[str, Iterable[Any] | None]) -> None:
        """The splits that are scored, what the teacher says on them, and the score that chooses the best epoch."""
        self.evaluations = {name: loader for name, loader in evaluations.items() if loader is not None}
        for name, loader in self.evaluations.items():
            repeatable(name, loader)
        still = self.task.remember and not (isinstance(self.method, StepMethod) and self.method.trains_teacher)
        teacher = self.teacher
        # a cache of the training set knows no other split, and would answer with rows of its own
        asked = {n: teacher.on(x) for n, x in self.evaluations.items()} if teacher is not None else {}
        self.taught = {n: Remembered(t.to(self.fabric.device), still=still) for n, t in asked.items() if t is not None}
        metric, self.higher = self.task.headline()
        self.best_by = next((f"{name}/{metric}" for name in ("validation", "test") if name in self.evaluations), None)
        if self.settings.patience is not None and self.best_by is None:
            raise ValueError("patience= stops by a score, and there is none: give validation=.")

    @torch.no_grad()
    def _prepare_method(self) -> None:
        """Let the method size what it trains on a first block of rows, before there is an optimizer."""
        if not self.method.wants_rows():
            return
        batch = self._first_batch()
        self.model.eval()
        self.method.prepare(self._step_of(batch, 1.0).forward()[-1])
        self.model.train()

    def _first_batch(self) -> Any:
        """The run's first batch, on the device; the global random numbers are left as they were."""
        before = random_state()
        reseed(self.settings.seed, 0, self.fabric.global_rank)
        batch = next(self.stream.epoch(0, 0), None)
        set_random_state(before)
        if batch is None:
            raise ValueError(EMPTY)
        return on(self.fabric.device, batch)

    # the run

    def run(self, facts: dict[str, Any]) -> Run:
        """Everything from the first batch to the last record."""
        with alone_in(self.folder if self.first else None):
            return self._run(facts)

    def _run(self, facts: dict[str, Any]) -> Run:
        self.at, self.resumed = self.keeper.resume(begin_again=not self.settings.resume)
        begun = facts_of(
            self.keeper.key, self.student, self.teacher, self.method, self.settings, best_by=self.best_by, more=facts
        )
        self.recorder.begin(begun, upto=self.at.step, epochs=self.at.epoch)
        try:
            if self.settings.selfcheck:
                self._check()
            label = str(self.recorder.facts.get("label") or type(self.method).__name__)
            with Display(
                self.total_steps, self.at.step, label, quiet=self.settings.quiet or not self.first
            ) as self.display:
                while self.at.step < self.total_steps and not self.at.stopped:
                    self._epoch()
            return self._finish()
        except KeyboardInterrupt:
            self.recorder.end("interrupted")
            raise
        except BaseException as error:
            self.recorder.end("failed", error=f"{type(error).__name__}: {error}")
            raise

    def _epoch(self) -> None:
        """One epoch, or what a resumed run has left of it; then scores and a checkpoint."""
        s, at = self.settings, self.at
        reseed(s.seed, at.epoch, self.fabric.global_rank)
        stream = self.stream.epoch(at.epoch, at.batch)
        if self.resumed is not None and at.batch:
            # only now: the reseeding above gave a DataLoader the order it had before the interruption
            set_random_state(self.resumed)
        self.resumed = None
        self.model.train()
        self.method.train()
        begun, loss_sum, begun_at = time.perf_counter(), at.loss_sum, at.step
        self.timer = (begun, at.step)
        seconds, walked = at.seconds, at.batch
        for group in grouped(stream, s.accumulate):
            loss = self._step(group)
            loss_sum = loss_sum + loss
            at.step, at.batch = at.step + 1, at.batch + len(group)
            at.seconds = seconds + time.perf_counter() - begun
            if s.checkpoint_every and at.step % s.checkpoint_every == 0:
                at.loss_sum = self._finite(float(loss_sum))
                self.keeper.save(at, keep=s.keep)
            if at.step >= self.total_steps:
                break
        if at.step == begun_at and not walked:
            raise ValueError(EMPTY)
        steps_walked = max(1, math.ceil(at.batch / s.accumulate))
        mean_loss = mean_over_ranks(self._finite(float(loss_sum)) / steps_walked, self.fabric)
        at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
        if at.epoch % s.evaluate_every == 0 or at.step >= self.total_steps:
            self._evaluate(mean_loss)
        self.keeper.save(at, keep=s.keep)

    def _step(self, group: list[Any]) -> Tensor:
        """One update of the weights from the micro-batches of ``group``; the loss, (), whose mean over ranks counts."""
        s, at, progress = self.settings, self.at, (self.at.step + 1) / self.total_steps
        if self.schedule is not None:
            factor = self.schedule(at.step / self.total_steps)
            for param_group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
                param_group["lr"] = lr * factor
        group = [on(self.fabric.device, batch) for batch in group]
        alone = len(group) == 1 and self.world == 1
        mass = {} if alone else whole_mass([self.task.mass(batch) for batch in group], self.fabric)
        summed: Tensor | None = None
        blocks, found = list[Rows](), list[Loss]()
        for i, batch in enumerate(group):
            with self.fabric.no_backward_sync(self.model, enabled=i + 1 < len(group)), drawing(s.seed, at.step):
                blocks, found = self._losses(batch, progress, mass)
                loss = found[0].loss if len(found) == 1 else torch.stack([x.loss for x in found]).sum()
                # ranks are averaged by the strategy, and each has only its share of the one mean
                loss = loss * self.world if self.world > 1 else loss
                self.fabric.backward(loss)
            summed = loss.detach() if summed is None else summed + loss.detach()
        assert summed is not None
        share_gradients(self.method, self.fabric)
        if s.max_grad_norm is not None:
            clip(self.optimizer, self.fabric, max_norm=s.max_grad_norm)
        self.optimizer.step()
        self._learn(group[-1], blocks[-1])
        self.optimizer.zero_grad(set_to_none=True)
        self._log(summed, blocks, found, progress)
        return summed

    def _losses(self, batch: Any, progress: float, mass: Mapping[str, Tensor | float]) -> tuple[list[Rows], list[Loss]]:
        """The blocks of rows of one micro-batch and their losses."""
        begin(self.settings.compile)
        step = self._step_of(batch, progress)
        if isinstance(self.method, StepMethod):
            terms = self.method.step(step)
            if step.rows is None:
                raise TypeError(f"{type(self.method).__name__}.step() must fill step.rows; step.forward() does.")
            return [step.rows], [Loss(total(terms, step.rows, rows_in_batch=mass.get(step.rows.name)), terms)]
        blocks = step.forward()
        return blocks, losses_of(self.method, blocks, progress, mass, chunks=self.settings.chunks)

    def _step_of(self, batch: Any, progress: float) -> Step:
        student_in, teacher_in, ids = self.task.inputs(batch)
        taught = (lambda inputs, ids: None) if self.teacher is None else self.teacher
        attached = None if self.teacher is None else self.teacher.attached
        features = None if self.taps is None else self.taps.features
        args = (student_in, teacher_in, ids, batch, progress, self.task.rows)
        return Step(self.model, taught, *args, features=features, attached=attached)

    @torch.no_grad()
    def _learn(self, batch: Any, rows: Rows) -> None:
        """Tell learning policies by how much each row's cross entropy fell; a second forward only if one asks."""
        fell: Tensor | None = None
        if rows.target is not None and any(policy.wants_reward for policy in self.learners):
            student_in, _, _ = self.task.inputs(batch)
            self.model.eval()
            after = self.task.rows(self.model(student_in), None, batch)[-1]
            self.model.train()
            before, target = rows.student.detach().float(), rows.target.long()
            fell = nn.functional.cross_entropy(before, target, reduction="none", ignore_index=-100)
            fell -= nn.functional.cross_entropy(after.student.float(), target, reduction="none", ignore_index=-100)
        for policy in self.learners:
            policy.learn(fell if policy.wants_reward else None)

    # what is seen of it

    def check(self) -> Checked:
        """Run the self-check on the first batch; nothing is trained or written."""
        features = None if self.taps is None else self.taps.features
        return check_first_batch(
            self.model, self.teacher, self._first_batch(), method=self.method, task=self.task, features=features
        )

    def _check(self) -> None:
        checked = self.check()
        self.recorder.update(selfcheck={"line": checked.line, "checks": checked.checks})
        if self.first and not self.settings.quiet:
            from rich.console import Console

            Console().print(checked.line, style="dim", soft_wrap=True, highlight=False)

    def _log(self, loss: Tensor, blocks: list[Rows], found: list[Loss], progress: float) -> None:
        """A line of steps.jsonl every ``log_every`` steps; on a device only then is it waited for."""
        terms = [x.terms for x in found]
        step, due = self.at.step, self.at.step % self.settings.log_every == 0 or self.at.step + 1 == self.total_steps
        if (due or loss.device.type == "cpu") and not math.isfinite(value := float(loss)):
            raise not_finite(value, step + 1, self.folder, blocks=blocks, terms=terms)
        if self.on_step is not None:
            self.on_step(step, loss)
        self.display.show(step + 1)
        if not due:
            return
        now, (then, before) = time.perf_counter(), self.timer
        took = (now - then) / max(1, step + 1 - before)
        self.timer = (now, step + 1)
        rows_seen = len(blocks[-1]) * self.settings.accumulate * self.world
        line = {
            "step": step + 1,
            "epoch": self.at.epoch + 1,
            "progress": progress,
            "loss": mean_over_ranks(float(loss), self.fabric),
            "lr": self.optimizer.param_groups[0]["lr"],
            "rows_per_second": rows_seen / took,
            "step_ms": 1000.0 * took,
            **measured(blocks, terms, self.method.policies()),
            **path_of(found),
        }
        self.recorder.step(line)
        flat = {"train/loss": line["loss"], "train/lr": line["lr"], "train/step_ms": line["step_ms"]}
        flat |= {f"train/{name}": value for name, value in line["terms"].items()}
        flat |= {f"train/{side}": line[side]["mean"] for side in ("T_teacher", "T_student") if side in line}
        self.fabric.log_dict(flat, step=step + 1)

    def _finite(self, loss_sum: float) -> float:
        """The same number; on a device this is where a step that was not looked at is found out."""
        if not math.isfinite(loss_sum):
            raise not_finite(loss_sum, self.at.step, self.folder)
        return loss_sum

    @torch.no_grad()
    def _evaluate(self, loss: float) -> None:
        at = self.at
        line: dict[str, Any] = {"epoch": at.epoch, "step": at.step, "seconds": at.seconds, "loss": loss}
        line["lr"] = self.optimizer.param_groups[0]["lr"]
        for name, loader in self.evaluations.items():
            taught = self.taught[name].rewind() if name in self.taught else None
            line[name] = self.task.score(self.model, loader, teacher=taught)
        self.model.train()
        self.recorder.epoch(line)
        scores = {name: line[name] for name in self.evaluations}
        at.last = {"epoch": at.epoch, **scores}
        for name, values in scores.items():
            self.fabric.log_dict({f"{name}/{metric}": v for metric, v in values.items()}, step=at.step)
        if self.best_by is None:
            return
        split, metric = self.best_by.split("/")
        value = self.fabric.broadcast(line[split][metric])  # all ranks stop together
        self.display.show(at.step, f"{split} {metric} {value:.4f}")
        if at.best_value is None or (value > at.best_value if self.higher else value < at.best_value):
            at.best_value, at.best, at.stale = value, at.last, 0
            self.keeper.write_weights("best.safetensors")
        else:
            at.stale += 1
        at.stopped = self.settings.patience is not None and at.stale >= self.settings.patience

    def _finish(self) -> Run:
        """Weights, analysis and the closed record."""
        self.keeper.write_weights("student.safetensors")
        name = "test" if "test" in self.evaluations else next(iter(self.evaluations), None)
        if name is not None:
            policy = next(iter(self.method.eval().policies().values()), None)
            ask = on_cpu(policy, self.fabric.device)
            taught = self.taught[name].rewind() if name in self.taught else None
            found = self.task.analyse(self.model, self.evaluations[name], teacher=taught, temperatures=ask)
            (self.at.last or {}).get(name, {}).update(found.pop("scores", {}))
            if found and self.first:
                self.recorder.analysis({"split": name, **found})
        result = {
            "last": self.at.last,
            "best": self.at.best,
            "step_ms": 1000.0 * self.at.seconds / max(1, self.at.step),
            "seconds": self.at.seconds,
            "steps": self.at.step,
            "stopped_early": self.at.stopped,
            "peak_mb": peak_mb(self.fabric.device),
        }
        self.recorder.end("done", result=result)
        for logger in self.fabric.loggers:
            logger.finalize("success")
        self.fabric.barrier()
        return Run(self.student, self.folder, self.recorder.facts, self.recorder.epochs)
