"""Describe a run before it is started; the main() of a recipe returns the description."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.tasks.base import Task
from tempering.teachers.base import Teacher
from tempering.teachers.live import Live
from tempering.training.checks import check_models_are_distinct
from tempering.training.config import Run, TrainConfig
from tempering.training.distill import SGD, Optimizer, make_trainer
from tempering.training.pretrained import is_trained, model_folder, train_or_load
from tempering.training.selfcheck import Checked
from tempering.training.trainer import Trainer
from tempering.utils.state import borrowed

if TYPE_CHECKING:
    from tempering.training.logit_cache import LogitCache

Weights = Literal["trained", "present", "random"]  # if the teacher is not trained: train it; raise; use random weights


class UntrainedTeacherError(FileNotFoundError):
    """The teacher of a run has no trained weights."""


@dataclass(kw_only=True)
class Experiment:
    """Describe one run. Creating it trains nothing and writes nothing.

    Attributes:
        student: the model to train.
        teacher: a Teacher, a module, a TeacherRecipe (trained once, when it is first needed), or None.
        train: training batches.
        validation: scored; selects the best epoch and stops early.
        test: scored as well.
        method: the loss, with its temperature policy.
        task: turns batches into rows; None is Classification().
        optimizer: parameter groups -> optimizer.
        schedule: progress in [0, 1) -> factor on the learning rate.
        config: options of training.
        out: folder for records, checkpoints and weights; None writes nothing.
        facts: additional content of facts.json, such as "label" and "data".
        loggers: "tensorboard", "csv", "wandb", "mlflow", "trackio", or Fabric loggers.
        on_step: called after every step with its number (from 0) and its loss.
        bind_teacher: called with this experiment and the teacher, before anything is checked or trained; returns the
            experiment to use. For what depends on the teacher's weights, such as batches that the teacher generates.

    Example:
        >>> Experiment(student=net, teacher=big, train=data, method=DTKD(), config=TrainConfig(epochs=3)).check().line
        'self-check ok: ...'
    """

    student: nn.Module
    teacher: Teacher | nn.Module | TeacherRecipe | None = None
    train: Iterable[Any]
    validation: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    method: Method
    task: Task | None = None
    optimizer: Optimizer = SGD
    schedule: Callable[[float], float] | None = None
    config: TrainConfig
    out: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loggers: Sequence[Any] = ()
    on_step: Callable[[int, Tensor], None] | None = None
    bind_teacher: Callable[[Experiment, Teacher], Experiment] | None = None

    def __post_init__(self) -> None:
        self.config.validate()

    def run(self) -> Run:
        """Train the teacher if it is missing, then the student; resume an interrupted run in ``out``."""
        self._set_threads()
        with borrowed(self.student, self.teacher):
            ready = self.with_teacher("trained")
            trainer = ready._trainer(ready.out)
            teacher: dict[str, Any] = ready.facts.get("teacher") or {}
            if "weights" in teacher:
                trainer.progress_bar.say(f"teacher: {teacher['weights']}")
            return trainer.run(dict(ready.facts))

    def check(self) -> Checked:
        """Run the self-check on the first batch; nothing is trained or written.

        The student's run is checked first; a teacher that is not trained yet has its initial weights there, and its
        own training is checked next.

        Raises:
            ValueError: for arguments that ``run()`` would reject.
            SelfCheckError: if the first batch shows that the run would be wrong.
        """
        self._set_threads()
        with borrowed(self.student, self.teacher):
            checked = self.with_teacher("random")._trainer(None).check()
        recipe = self.teacher
        if not isinstance(recipe, TeacherRecipe) or recipe.is_trained or recipe.train is None:
            return checked
        recipe.train(recipe.build()).check()
        return Checked({**checked.checks, f"training of the teacher {recipe.name}": "ok"})

    def without_test(self) -> Experiment:
        """Return the same run without its test split, for a search that selects by the validation split.

        Raises:
            ValueError: if there is no validation split.
        """
        if self.validation is None:
            raise ValueError(
                "a search scores its trials on a validation split, so that the test split stays unseen, and this run "
                "has none. Give the recipe one, such as --validation=5000."
            )
        teacher = self.teacher.without_test() if isinstance(self.teacher, TeacherRecipe) else self.teacher
        return replace(self, test=None, teacher=teacher)

    def with_teacher(self, weights: Weights, *, cached: bool = True) -> Experiment:
        """Return the same run with its teacher created, and with what depends on it.

        Args:
            weights: if the teacher is not trained, "trained" trains it, "present" raises and "random" uses its initial
                weights.
            cached: False returns the live teacher even if the recipe caches its logits.

        Raises:
            UntrainedTeacherError: for "present", if the teacher is not trained.
        """
        ready, teacher = self, self.teacher
        if isinstance(teacher, TeacherRecipe):
            recipe = teacher if cached else replace(teacher, cache=None)
            prepare = None if self.task is None else self.task.prepare_model
            teacher, facts = recipe.make(weights, prepare)
            train = self.train if recipe.cache is None else recipe.cache.replayed
            ready = replace(self, train=train, facts={**self.facts, "teacher": facts})
        elif isinstance(teacher, nn.Module):
            check_models_are_distinct(self.student, teacher)
            teacher = Live(teacher)
        ready = replace(ready, teacher=teacher, bind_teacher=None)
        return ready if self.bind_teacher is None or teacher is None else self.bind_teacher(ready, teacher)

    @property
    def resolved_teacher(self) -> Teacher | None:
        """The teacher, after ``with_teacher``.

        Raises:
            TypeError: before ``with_teacher``, if the teacher is a module or a TeacherRecipe.
        """
        if self.teacher is None or isinstance(self.teacher, Teacher):
            return self.teacher
        raise TypeError("the teacher is not created yet. Call with_teacher() first.")

    @property
    def splits(self) -> dict[str, Iterable[Any] | None]:
        """Split name -> batches."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def _trainer(self, folder: Path | None) -> Trainer:
        return make_trainer(
            self.student,
            self.resolved_teacher,
            self.train,
            method=self.method,
            task=self.task,
            optimizer=self.optimizer,
            schedule=self.schedule,
            evaluations={"validation": self.validation, "test": self.test},
            config=self.config,
            folder=folder,
            loggers=() if folder is None else self.loggers,
            on_step=self.on_step,
        )

    def _set_threads(self) -> None:
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe:
    """Describe a teacher that is trained once and reused. Creating it builds nothing and trains nothing.

    Attributes:
        name: of the network, in records and in the name of its folder.
        build: returns the network with its initial weights.
        train: the network -> the Experiment that trains it, as its student; its ``out`` is set here. None uses the
            network as ``build`` returns it.
        folder: where trained teachers are kept.
        key: what the trained weights depend on, JSON-able: data, length, learning rate and so on.
        weights: a file in place of training; ``tempering.models.load_checkpoint`` says which.
        wrap: the network -> a Teacher, such as ``partial(Live, precision="bf16")``.
        cache: cache the teacher's logits; the experiment then trains on the cached batches.
        facts: additional content of "teacher" in facts.json.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Callable[[nn.Module], Experiment] | None
    folder: Path
    key: Mapping[str, Any] = field(default_factory=dict[str, Any])
    weights: Path | None = None
    wrap: Callable[[nn.Module], Teacher] = Live
    cache: LogitCache | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def path(self) -> Path:
        """The folder of the teacher's own run."""
        return model_folder(self.name, self.folder, self.key)

    @property
    def is_trained(self) -> bool:
        """Whether the teacher needs no training."""
        return self.train is None or self.weights is not None or is_trained(self.path)

    def make(
        self, weights: Weights, prepare: Callable[[nn.Module], object] | None = None
    ) -> tuple[Teacher, dict[str, Any]]:
        """Create the teacher.

        Args:
            weights: if the network is not trained, "trained" trains it, "present" raises, and "random" uses its
                initial weights and caches nothing.
            prepare: called with the network before its logits are cached.

        Returns:
            The teacher, and the content of "teacher" in facts.json.

        Raises:
            UntrainedTeacherError: if there are no weights and they may not be trained.
        """
        network = self.build()
        facts: dict[str, Any] = {"name": self.name, "parameters": sum(p.numel() for p in network.parameters())}
        ready = weights == "trained" or self.is_trained
        if weights == "present" and not ready:
            raise UntrainedTeacherError(f"the teacher {self.name} is not trained: there are no weights in {self.path}.")
        if ready:
            facts |= self._load(network)
        live = self.wrap(network)
        trained_here = self.train is not None and self.weights is None
        for part in (live, *live.parts.values()) if trained_here else ():  # an ensemble's parts too
            if isinstance(part, Live) and part.normalization is None:
                part.normalization = "data"  # it was trained on these batches
        live.trained = ready
        if self.cache is None:
            return live, {**facts, **self.facts}
        if prepare is not None:
            prepare(network)
        cache = self.cache.open(live, dry=weights != "trained")
        cache.trained = ready
        return cache, {**facts, **self.facts, "calls": cache.rows}

    def _load(self, network: nn.Module) -> dict[str, Any]:
        """Load the trained weights, after training if necessary; return the scores of its training, for records."""
        if self.weights is not None:
            from tempering.models import load_checkpoint

            return {"weights": load_checkpoint(network, self.weights).line}
        elif self.train is not None:
            experiment = self.train

            def train(path: Path) -> None:
                described = experiment(network)
                facts = {"label": f"teacher {self.name}", "student": {"name": self.name}, **described.facts}
                replace(described, out=path, facts=facts).run()

            return {"scores": train_or_load(network, self.name, self.folder, train, key=self.key)}
        return {}

    def without_test(self) -> TeacherRecipe:
        """Return the same teacher, trained without the test split."""
        if self.train is None:
            return self
        original = self.train

        def train(network: nn.Module) -> Experiment:
            return replace(original(network), test=None)

        return replace(self, train=train)
