"""Base classes of methods: losses that map rows to named, unreduced terms."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self, TypeGuard, cast

import torch
from torch import Tensor, nn

from tempering.objectives import cross_entropy
from tempering.rows import Rows, expand_to_rows, total
from tempering.temperature.base import AdaptivePolicy, Policy, hyperparameters
from tempering.utils.search_space import CheckedArguments

_STEP: ContextVar[tuple[int, int] | None] = ContextVar("step", default=None)


class Method(CheckedArguments, nn.Module, ABC):
    """Base class of distillation losses: (rows, progress) -> {term: (N,)}, weighted and unreduced; ``total`` reduces.

    Attributes:
        paper: the citation, such as "arXiv:1503.02531".
        relational: whether a row's term depends on the other rows. The loss then depends on how a batch is split, and
            the trainer does not split it.
        needs_labels: whether it requires targets, whatever its weights.
        needs_teacher: whether it uses the teacher's outputs.
        zero_when_equal: whether all terms but "hard" are 0 for a student equal to the teacher, on rows that are not
            private.
        non_negative: whether every term is always >= 0.
        shift_invariant: whether adding a constant to a row's logits leaves the terms unchanged, policies aside.
        owns_step: whether the method runs the models (``StepMethod``), so that rows alone do not determine its loss.
        needs_double_backward: whether it takes derivatives within its step, and may differentiate them again. Excludes
            torch.compile, FSDP and fp16 with a loss scale.
        needs_live: whether it differentiates through the teacher, so that cached outputs do not suffice.
        second_view: the recipes' --views of the paper: "one" for no second view, or "cutmix".
        teacher_pruned: the recipes' --teacher-pruned of the paper; 0: the teacher has no pruned copy.
        trains_teacher: whether its step updates the teacher's weights. ``bind_teacher`` gets the module; the method's
            state_dict then contains the teacher's weights and their optimizer, and no teacher outputs are cached.
        of_classes: whether terms read a row's logits as those of classes, which has no meaning for numbers to regress.
        pairwise: whether a term compares every row with every other, in memory of N^2: too many for rows of pixels.
        teacher_is_student: of a method that trains the teacher: whether that is a second student, which the run's
            optimizer trains. It may be untrained, and the step may be split. Its terms have names "peer_...".
        hard_is_cross_entropy: whether its ``hard`` weighs the cross entropy of the labels, which a ``Sum`` needs once.
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
    second_view: ClassVar[str] = "one"
    teacher_pruned: ClassVar[float] = 0.0
    trains_teacher: ClassVar[bool] = False
    of_classes: ClassVar[bool] = True
    pairwise: ClassVar[bool] = False
    teacher_is_student: ClassVar[bool] = False
    hard_is_cross_entropy: ClassVar[bool] = True
    hard: float  # of methods with a hard term: its weight

    @abstractmethod
    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        """Compute the terms of these rows; ``progress`` in [0, 1] is the completed fraction of the run."""

    def __call__(self, rows: Rows, progress: float = 1.0) -> dict[str, Tensor]:
        # compute losses in float32 at least, also under autocast
        with torch.autocast(rows.student.device.type, enabled=False):
            return super().__call__(rows if rows.weight is None else zero_masked_rows(rows), progress)

    def with_hard(self, terms: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        """Return the terms with "hard", ``self.hard`` * cross entropy, (N,), unless its weight is 0."""
        return terms | {"hard": self.hard * cross_entropy(rows)} if self.hard else terms

    def compute(self, step: Step) -> list[BlockLoss]:
        """Run both models on a micro-batch and reduce the terms of each block of its rows to a loss."""
        losses = self.losses(step.forward(), step.progress, step.normalizer, step.chunking)
        return losses if step.auxiliary is None else add_auxiliary(losses, step.auxiliary, step.normalizer)

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
        """Create the parameters of the method and its policies from a first block of rows, before the optimizer."""
        for policy in self.policies().values():
            policy.setup(rows)

    def needs_setup(self) -> bool:
        """Whether the method or a policy in it overrides ``setup``."""
        inherited = all(type(policy).setup is Policy.setup for policy in self.policies().values())
        return type(self).setup is not Method.setup or not inherited

    def select_features(self, stages: Sequence[str]) -> tuple[str, ...]:
        """Select and return the features to compare, out of the stages (shallow to deep) and "pool"; () for none.

        Recipes extract these features. A method constructed with ``names`` keeps them.
        """
        parts = [m for m in self.modules() if isinstance(m, Method) and m is not self]
        return tuple(dict.fromkeys(name for part in parts for name in part.select_features(stages)))

    def wrap_batches(self, batches: Iterable[Any], teacher: Any) -> Iterable[Any]:
        """Return the training batches, changed by methods that need other batches."""
        return batches

    def bind_teacher(self, teacher: nn.Module | None) -> None:
        """Receive the teacher's module (or None), on its device, before any checkpoint is loaded."""

    def hyperparameters(self) -> dict[str, object]:
        """Return the constructor arguments by name, as written to records."""
        return hyperparameters(self)

    @classmethod
    def example(cls) -> Self:
        """Return an instance for the contract tests; override if the constructor has required arguments."""
        return cls()

    def param_groups(self) -> list[dict[str, Any]]:
        """Return optimizer groups of the method's own parameters (projectors, learned temperatures); [] for none."""
        policy_groups = [group for policy in self.policies().values() for group in policy.param_groups()]
        assigned = {id(p) for group in policy_groups for p in group["params"]}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in assigned]
        return [{"params": own}, *policy_groups] if own else policy_groups

    def policies(self) -> dict[str, Policy]:
        """Return every temperature policy in the method, by its path in the module."""
        modules = cast("Iterable[tuple[str, nn.Module]]", self.named_modules())
        return {name: m for name, m in modules if isinstance(m, Policy)}

    def is_batch_dependent(self) -> bool:
        """Whether the method, or a method or policy in it, compares rows with each other."""
        parts = [m for m in self.modules() if isinstance(m, Method | Policy)]
        return any(m.relational for m in parts)

    def adaptive_policies(self) -> list[AdaptivePolicy]:
        """Return the policies that are updated after every step."""
        return [p for p in self.policies().values() if isinstance(p, AdaptivePolicy)]


class BlockLoss(NamedTuple):
    """The loss of a block of rows.

    Attributes:
        rows: the block.
        loss: (), the reduced terms, with gradient.
        terms: name -> (N,), unreduced.
        path: how the chunks were computed (``kernels.chunked.Path``); None if the block was not chunked.
    """

    rows: Rows
    loss: Tensor
    terms: Mapping[str, Tensor]
    path: Any = None


def add_auxiliary(
    losses: list[BlockLoss], value: Tensor | None, normalizer: Mapping[str, Tensor | float] | None
) -> list[BlockLoss]:
    """Add the auxiliary loss of a micro-batch, (), to its last block, as the term "auxiliary".

    Of a step that is split, the mean over the parts counts, each weighted by its rows: see ``total``.
    """
    if value is None:
        return losses
    last = losses[-1]
    terms = {"auxiliary": expand_to_rows(value, last.rows)}
    share = total(terms, last.rows, normalizer=normalizer.get(last.rows.name) if normalizer else None)
    return [*losses[:-1], last._replace(loss=last.loss + share, terms={**last.terms, **terms})]


class Chunking(NamedTuple):
    """When and how to compute losses in chunks of rows.

    Attributes:
        compute: (method, rows, progress, normalizer) -> the block's loss.
        min_logits: the smallest number of student logits to compute in chunks.
        always: compute every block in chunks, whatever its size.
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
        auxiliary: the student's own auxiliary loss, (), weighted, set by ``forward``; None if it has none.
        teacher_with_grad: the teacher's forward pass with gradient; None if the teacher has none.
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
    auxiliary: Tensor | None = None
    normalizer: Mapping[str, Tensor | float] = field(default_factory=dict[str, Tensor | float])
    chunking: Chunking | None = None

    def student_rows(self, output: Any) -> Rows:
        """Convert one model's output to rows without a teacher; as ``rows.student`` its logits may require grad."""
        return only_block(self.make_rows(output, None, self.batch))

    def forward(self) -> list[Rows]:
        """Run both models on the batch and return its blocks of rows; store the last block in ``rows``."""
        student_output = self.student(self.student_inputs)
        if not isinstance(student_output, Tensor):
            from tempering.methods.auxiliary import auxiliary_loss

            self.auxiliary = auxiliary_loss(self.student, student_output)
        teacher_output = self.teacher(self.teacher_inputs, self.ids)
        blocks = self.make_rows(student_output, teacher_output, self.batch)
        if self.features is not None:
            blocks[-1] = blocks[-1].replace(features={**blocks[-1].features, **self.features()})
        self.rows = blocks[-1]
        return blocks


def only_block(blocks: list[Rows]) -> Rows:
    """Return the single block of rows of a task.

    Raises:
        ValueError: if the task makes several blocks.
    """
    if len(blocks) != 1:
        raise ValueError(
            f"a method that owns its step takes one block of rows, and the task makes {len(blocks)}: "
            f"{', '.join(rows.name for rows in blocks)}. Give it one view of each batch: Classification()."
        )
    return blocks[0]


class StepMethod(Method):
    """A method that runs its own training step, for losses that need input gradients or a teacher that is trained."""

    owns_step = True

    def compute(self, step: Step) -> list[BlockLoss]:
        """Run the method's own step and reduce its terms to a loss.

        Raises:
            TypeError: if ``step()`` leaves ``step.rows`` empty, or the student has an auxiliary loss of its own.
        """
        terms = self.step(step)
        if (rows := step.rows) is None:
            raise TypeError(f"{type(self).__name__}.step() must fill step.rows; step.forward() does.")
        if step.auxiliary is not None:
            raise TypeError(
                f"{type(self).__name__} owns its step and would drop the student's auxiliary loss. Set its "
                "config.output_router_logits = False, or use a method over rows."
            )
        return [BlockLoss(rows, total(terms, rows, normalizer=step.normalizer.get(rows.name)), terms)]

    @abstractmethod
    def step(self, step: Step) -> Mapping[str, Tensor]:
        """Fill ``step.rows`` (as ``step.forward()`` does) and return the terms (N,) of these rows."""

    def forward(self, rows: Rows, progress: float) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} owns its step: call .step(...), or run it by tempering.distill.")


def zero_masked_rows(rows: Rows) -> Rows:
    """Replace the values of rows of weight 0 by 0, since they may be NaN, and NaN times 0 is NaN."""
    if rows.weight is None:
        return rows
    kept = (rows.weight > 0).unsqueeze(1)
    task_loss = None if rows.task_loss is None else torch.where(rows.weight > 0, rows.task_loss, 0.0)
    student, teacher = (torch.where(kept, side, 0.0) for side in (rows.student, rows.teacher))
    reference = None if rows.reference is None else torch.where(kept, rows.reference, 0.0)
    return rows.replace(student=student, teacher=teacher, task_loss=task_loss, reference=reference)


@contextmanager
def step_rng(seed: int, step: int) -> Generator[None, None, None]:
    """Context manager that makes ``step_seed`` deterministic: a function of this seed and step."""
    token = _STEP.set((seed, step))
    try:
        yield
    finally:
        _STEP.reset(token)


def step_seed() -> int:
    """Return a seed in [0, 2^63), equal in all micro-batches and processes of a step of ``distill``.

    In a custom training loop, outside ``step_rng``, torch's default generator draws a new one at every call.
    """
    if (step := _STEP.get()) is None:
        return int(torch.randint(2**63 - 1, ()))
    return int.from_bytes(hashlib.sha256("/".join(map(str, step)).encode()).digest()[:8], "little") >> 1


def linear_warmup(progress: float, warmup: float) -> float:
    """Return the warm-up factor, rising linearly from 0 to 1 over the first ``warmup`` of the run; 1 for warmup 0."""
    return 1.0 if warmup <= 0.0 else min(progress / warmup, 1.0)


def check_policy(owner: str, temperature: object, *, default: float | None = None, allow_number: bool = True) -> Policy:
    """Return the temperature policy; a number is ``Static``, and None is ``Static(default)`` if there is a default.

    Raises:
        TypeError: for anything else; with allow_number=False also for a number, which could mean a fixed temperature or
            the reference of the method's own policy.
    """
    example: int | float = 4.0
    temperature = default if temperature is None else temperature
    if isinstance(temperature, int | float) and not isinstance(temperature, bool):
        if allow_number:
            from tempering.temperature.static import Static

            return Static(float(temperature))
        example = temperature
    if isinstance(temperature, Policy):
        return temperature
    raise TypeError(
        f"{owner} needs a temperature policy; got {temperature!r}. Write "
        f"temperature=tempering.temperature.Static({example})."
    )


def is_row_method(method: object) -> TypeGuard[Method]:
    """Whether it is a method that computes its terms from rows alone, so not a ``StepMethod``."""
    return isinstance(method, Method) and not isinstance(method, StepMethod)


def zero_term(rows: Rows) -> Tensor:
    """Return zeros connected to the student's graph, (N,)."""
    return torch.nan_to_num(rows.student, nan=0.0, posinf=0.0, neginf=0.0).float().sum(-1) * 0.0
