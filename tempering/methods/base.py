"""What a method is: rows in, named and unreduced terms out."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from tempering.rows import Rows, total
from tempering.temperature.base import AdaptivePolicy, Policy, hyperparameters
from tempering.temperature.base import check_run_fraction as check_run_fraction

_STEP: ContextVar[tuple[int, int] | None] = ContextVar("step", default=None)


class Method(nn.Module, ABC):
    """A distillation loss: (rows, progress) -> {term: (N,)}, weighted and unreduced; ``total`` reduces.

    Class attributes:
        paper: the citation, such as "arXiv:1503.02531".
        relational: whether a row's term depends on the other rows. Then the loss depends on how a batch is split, and
            the engine refuses to split it.
        needs_labels: whether it cannot do without targets, whatever its weights.
        needs_teacher: whether it looks at the teacher at all.
        zero_when_equal: whether its terms, those named "hard" aside, vanish for a student equal to the teacher, on
            rows that are not private.
        non_negative: whether no term ever falls below zero.
        shift_invariant: whether a constant added to a row's logits changes nothing, its policies aside.
        owns_step: whether the method runs the models itself (``StepMethod``), so that rows alone do not give its loss.
        needs_double_backward: whether it takes derivatives within its step, and may differentiate them again. Rules out
            torch.compile, FSDP and fp16 with a loss scale.
        needs_live: whether it differentiates through the teacher, so that cached outputs do not suffice.
        trains_teacher: whether its step updates the teacher's weights. ``bind_teacher`` gets the module; the method's
            state_dict then holds the teacher's weights and their optimizer, and no teacher outputs are cached.
    """

    paper: ClassVar[str]
    relational: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    zero_when_equal: ClassVar[bool] = True
    non_negative: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = True
    owns_step: ClassVar[bool] = False
    needs_double_backward: ClassVar[bool] = False
    needs_live: ClassVar[bool] = False
    trains_teacher: ClassVar[bool] = False

    @abstractmethod
    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """The terms of these rows; progress in [0, 1] is the share of the run that is done."""

    def __call__(self, rows: Rows, progress: float = 1.0) -> dict[str, Tensor]:
        # losses are computed in float32 at least, also inside somebody's autocast
        with torch.autocast(rows.student.device.type, enabled=False):
            return super().__call__(rows if rows.weight is None else zero_masked_rows(rows), progress)

    def compute(self, step: Step) -> list[BlockLoss]:
        """Run both models on a micro-batch and reduce the terms of each block of its rows to a loss."""
        return self.losses(step.forward(), step.progress, step.normalizer, step.chunking)

    def losses(
        self,
        blocks: Sequence[Rows],
        progress: float = 1.0,
        normalizer: Mapping[str, Tensor | float] | None = None,
        chunking: Chunking | None = None,
    ) -> list[BlockLoss]:
        """Compute the loss of each block of rows.

        Blocks with one class are computed first, so that the policies keep the temperatures of a block with several.

        Args:
            normalizer: block name -> total weight of its rows in the optimizer step; None: these rows are the step.
            chunking: how to compute large blocks in chunks; None: never.
        """
        losses: dict[int, BlockLoss] = {}
        single_class = [rows.student.shape[1] <= 1 for rows in blocks]
        for i in sorted(range(len(blocks)), key=single_class.__getitem__, reverse=True):
            rows, weight = blocks[i], normalizer.get(blocks[i].name) if normalizer else None
            if chunking and (
                chunking.always or (rows.student.numel() >= chunking.min_logits and rows.task_loss is None)
            ):
                losses[i] = chunking.compute(self, rows, progress, weight)
            else:
                terms = self(rows, progress)
                losses[i] = BlockLoss(rows, total(terms, rows, normalizer=weight), terms)
        return [losses[i] for i in range(len(blocks))]

    def setup(self, rows: Rows) -> None:
        """See one block of rows before the optimizer is made, to size what the method and its policies train."""
        for found in self.policies().values():
            found.setup(rows)

    def needs_setup(self) -> bool:
        """Whether ``setup`` has anything to do."""
        plain = all(type(found).setup is Policy.setup for found in self.policies().values())
        return type(self).setup is not Method.setup or not plain

    def select_features(self, stages: Sequence[str]) -> tuple[str, ...]:
        """Settle on the features to compare, of nets with these stages (shallow to deep) and "pool"; () for none.

        Recipes tap what this names. A method that was told its ``names`` keeps them.
        """
        parts = [m for m in self.modules() if isinstance(m, Method) and m is not self]
        return tuple(dict.fromkeys(name for part in parts for name in part.select_features(stages)))

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """The training batches, for a method that has a say in them."""
        return batches

    def bind_teacher(self, teacher: nn.Module | None) -> None:
        """See the teacher's module, None where there is none, on its device and before any checkpoint is read."""

    def hyperparameters(self) -> dict[str, object]:
        """Constructor arguments by name, as records write them."""
        return hyperparameters(self)

    @classmethod
    def example(cls) -> Self:
        """One of it, as the contract tests make it; overridden where the constructor needs arguments."""
        return cls()

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of what the method itself trains (projectors, learned temperatures); [] for none."""
        apart = [group for found in self.policies().values() for group in found.param_groups()]
        taken = {id(p) for group in apart for p in group["params"]}
        trained = [p for p in self.parameters() if p.requires_grad and id(p) not in taken]
        return [{"params": trained}, *apart] if trained else apart

    def policies(self) -> dict[str, Policy]:
        """Every temperature policy inside, by its path in the module."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Policy)}

    def is_batch_dependent(self) -> bool:
        """Whether the method, or a policy in it, compares rows with each other."""
        inside = [m for m in self.modules() if isinstance(m, Method | Policy)]
        return any(m.relational for m in inside)

    def adaptive_policies(self) -> list[AdaptivePolicy]:
        """The policies that want to be told what a step did."""
        return [p for p in self.policies().values() if isinstance(p, AdaptivePolicy)]


class BlockLoss(NamedTuple):
    """The loss of a block of rows.

    Attributes:
        rows: the block.
        loss: (), the reduced terms, with gradient.
        terms: name -> (N,), unreduced.
        path: how chunks were computed (``kernels.chunked.Path``); None without chunks.
    """

    rows: Rows
    loss: Tensor
    terms: Mapping[str, Tensor]
    path: Any = None


class Chunking(NamedTuple):
    """When and how to compute losses in chunks of rows.

    Attributes:
        compute: (method, rows, progress, normalizer) -> the block's loss.
        min_logits: the smallest number of student logits to compute in chunks.
        always: compute every block in chunks, however small.
    """

    compute: Callable[[Method, Rows, float, Tensor | float | None], BlockLoss]
    min_logits: int
    always: bool = False


@dataclass
class Step:
    """One micro-batch: the models, their inputs, and how to turn outputs into rows.

    Attributes:
        normalizer: block name -> total weight of its rows in the optimizer step; {}: this micro-batch is the step.
        chunking: how to compute the loss of large blocks in chunks; None: never.
        rows: the last block of rows, set by ``forward``.
        attached: the teacher's forward pass with gradient; None where it has none.
    """

    student: nn.Module
    teacher: Callable[[Any, Tensor | None], Any]
    student_inputs: Any
    teacher_inputs: Any
    ids: Tensor | None
    batch: Any
    progress: float
    make_rows: Callable[[Any, Any, Any], list[Rows]]
    features: Callable[[], Mapping[str, tuple[Tensor, Tensor]]] | None = None
    rows: Rows | None = None
    teacher_with_grad: Callable[[Any, Tensor | None], Any] | None = None
    normalizer: Mapping[str, Tensor | float] = field(default_factory=dict)
    chunking: Chunking | None = None

    def student_rows(self, output: Any) -> Rows:
        """What one model said, as the student of rows without a teacher: so a teacher's logits may carry a gradient."""
        return only_block(self.make_rows(output, None, self.batch))

    def forward(self) -> list[Rows]:
        """Both forwards on the batch as it is; the last block stays in ``rows``."""
        said, taught = self.student(self.student_inputs), self.teacher(self.teacher_inputs, self.ids)
        blocks = self.make_rows(said, taught, self.batch)
        if self.features is not None:
            blocks[-1] = blocks[-1].replace(features={**blocks[-1].features, **self.features()})
        self.rows = blocks[-1]
        return blocks


def only_block(blocks: list[Rows]) -> Rows:
    """The one block of rows that a method which owns its step works on.

    Raises:
        ValueError: for a task that makes several.
    """
    if len(blocks) != 1:
        raise ValueError(
            f"a method that owns its step takes one block of rows, and the task makes {len(blocks)}: "
            f"{', '.join(rows.name for rows in blocks)}. Give it one view of each batch: Classification()."
        )
    return blocks[0]


class StepMethod(Method):
    """A method that owns its step, for what rows alone cannot say: input gradients, a teacher that learns."""

    owns_step = True

    def compute(self, step: Step) -> list[BlockLoss]:
        """Take the method's own step and reduce its terms to a loss.

        Raises:
            TypeError: if ``step()`` leaves ``step.rows`` empty.
        """
        terms = self.step(step)
        if (rows := step.rows) is None:
            raise TypeError(f"{type(self).__name__}.step() must fill step.rows; step.forward() does.")
        return [BlockLoss(rows, total(terms, rows, normalizer=step.normalizer.get(rows.name)), terms)]

    @abstractmethod
    def step(self, step: Step) -> Mapping[str, Tensor]:
        """The terms (N,) of ``step.rows``, which this fills (``step.forward()`` does)."""

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} owns its step: call .step(...), or run it by tempering.distill.")


def zero_masked_rows(rows: Rows) -> Rows:
    """The rows with 0 for the numbers in those of weight 0, which may hold anything: a NaN times 0 would be NaN."""
    if rows.weight is None:
        return rows
    kept = (rows.weight > 0).unsqueeze(1)
    hard = None if rows.task_loss is None else torch.where(rows.weight > 0, rows.task_loss, 0.0)
    student, teacher = (torch.where(kept, side, 0.0) for side in (rows.student, rows.teacher))
    return rows.replace(student=student, teacher=teacher, task_loss=hard)


@contextmanager
def step_rng(seed: int, step: int) -> Iterator[None]:
    """Within it ``drawn`` says what belongs to this step of a run with this seed."""
    token = _STEP.set((seed, step))
    try:
        yield
    finally:
        _STEP.reset(token)


def step_seed() -> int:
    """A number in [0, 2^63) to seed draws by: one for all parts and processes of a step of ``distill``.

    In a loop of one's own torch's generator draws it, anew at every call.
    """
    if (step := _STEP.get()) is None:
        return int(torch.randint(2**63 - 1, ()))
    return int.from_bytes(hashlib.sha256("/".join(map(str, step)).encode()).digest()[:8], "little") >> 1


def linear_warmup(progress: float, warmup: float) -> float:
    """Linear warm-up, from 0 to 1 over the first ``warmup`` of the run; 1 where there is none."""
    return 1.0 if warmup <= 0.0 else min(progress / warmup, 1.0)


def check_weights(owner: str, **values: float) -> None:
    """Refuse weights of terms that are negative or not numbers."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
            raise ValueError(f"{owner} needs {name} >= 0 and finite; got {value!r}.")


def check_policy(owner: str, temperature: object) -> Policy:
    """``temperature`` itself, refused where it is not a policy; a bare number is a common slip."""
    if isinstance(temperature, Policy):
        return temperature
    raise TypeError(
        f"{owner} needs a temperature policy; got {temperature!r}. Write "
        f"temperature=tempering.temperature.Static({temperature if isinstance(temperature, int | float) else 4.0})."
    )


def zero_term(rows: Rows) -> Tensor:
    """A term of nothing with a gradient path, (N,)."""
    return torch.nan_to_num(rows.student, nan=0.0, posinf=0.0, neginf=0.0).float().sum(-1) * 0.0
