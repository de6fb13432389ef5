"""Make the optimizer of a run with its parameter groups, and the schedule of its learning rate."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tempering.teachers.base import Teacher

Groups = list[dict[str, Any]]
Optimizer = Callable[[Groups], torch.optim.Optimizer] | torch.optim.Optimizer | str
Schedule = Callable[[float], float]
WRITE = "Write optimizer=partial(torch.optim.AdamW, lr=1e-3), a function of parameter groups."
WRITE_SCHEDULE = (
    "Write schedule=lambda progress: 1 - progress, a function of the finished fraction of the run, or "
    "schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS), stepped once per step."
)


def make_optimizer(optimizer: Optimizer, groups: Groups) -> torch.optim.Optimizer:
    """Create the optimizer of these parameter groups, the student's first; numbers in it become Python's.

    Args:
        optimizer: a function or class, an optimizer of the student's parameters, which gets the other groups, or the
            name of one of ``torch.optim``, with its default values.

    Raises:
        TypeError: for anything else.
        ValueError: for an optimizer of other parameters, one that evaluates the loss itself (LBFGS), or another name.
    """
    given: Any = _by_name(optimizer) if isinstance(optimizer, str) else optimizer
    made = given
    if isinstance(given, torch.optim.Optimizer):
        made = _with_groups(given, groups)
    elif callable(given):
        _check_step(getattr(given, "func", given))  # of a partial
        made = given(groups)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch optimizer; got {_described(given, made)}. {WRITE}")
    _check_step(type(made))
    for group in made.param_groups:
        for name, value in group.items():
            if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
                group[name] = value.item()  # records and checkpoints hold plain numbers
    return made


def _described(given: object, made: object) -> str:
    kind = type(given).__name__
    return kind if made is given else f"{kind}, which returned {type(made).__name__}"


def _by_name(name: str) -> Callable[[Groups], torch.optim.Optimizer]:
    kinds = {n.lower(): k for n, k in vars(torch.optim).items() if inspect.isclass(k)}
    kind = kinds.get(name.lower())
    if kind is None or kind is torch.optim.Optimizer or not issubclass(kind, torch.optim.Optimizer):
        raise ValueError(f"torch.optim has no optimizer {name!r}. {WRITE}")
    return cast("Callable[[Groups], torch.optim.Optimizer]", kind)


def _check_step(kind: object) -> None:
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        return
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{kind.__name__} evaluates the loss several times in a step, and a run does so once. Use SGD or AdamW: "
            f"{WRITE}"
        )


def _with_groups(optimizer: torch.optim.Optimizer, groups: Groups) -> torch.optim.Optimizer:
    """Add the groups whose parameters the optimizer does not have; the student's have to be in it."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for group in groups for p in group["params"]}
    frozen = {id(p) for group in optimizer.param_groups for p in group["params"] if not p.requires_grad}
    if known - trained - frozen or not known & {id(p) for p in groups[0]["params"]}:
        raise ValueError(
            f"the {type(optimizer).__name__} given as optimizer= holds parameters that are not the student's. {WRITE}"
        )
    for group in groups[1:]:
        if new := [p for p in group["params"] if id(p) not in known]:
            optimizer.add_param_group({**group, "params": new})
    return optimizer


def updating(
    optimizer: torch.optim.Optimizer, teacher: Teacher | None, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """Let a teacher that follows the student do so after every step of the optimizer; return the optimizer.

    Args:
        sharded: whether the student's weights are divided among processes.

    Raises:
        ValueError: for such a teacher of a sharded student.
    """
    if teacher is not None and teacher.follows_student and sharded:
        raise ValueError(
            f"{type(teacher).__name__} follows the student's weights, which FSDP and DeepSpeed shard. Use DDP."
        )
    if teacher is not None and teacher.state is not None:
        optimizer.register_step_post_hook(lambda _optimizer, _args, _kwargs: teacher.update())
    return optimizer


def base_learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of each group before any schedule; a scheduler of torch has changed the current one."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def make_schedule(
    schedule: object, optimizer: torch.optim.Optimizer, steps: int, *, warmup: float = 0.0
) -> Schedule | None:
    """Return progress in [0, 1) -> factor on the learning rate; None for none.

    Args:
        schedule: such a function, a name in ``schedules.SCHEDULES``, or a scheduler of torch, its class or a function
            of the optimizer alone that makes one. A scheduler is stepped once per step of the run, and its learning
            rates for the first parameter group become a table, so that the run can resume at any step.
        optimizer: of the run.
        steps: the run's length.
        warmup: share of the run in which the learning rate rises from 0; the schedule spans the rest.

    Raises:
        TypeError: for anything else.
        ValueError: for another name, a warm-up of a scheduler of torch, or a scheduler that needs scores, changes more
            than the learning rate, or ends before the run.
    """
    if isinstance(schedule, str) or (schedule is None and warmup):
        from tempering.training.schedules import SCHEDULES
        from tempering.utils.registry import lookup

        schedule = lookup(schedule or "constant", SCHEDULES, "schedule")
    if schedule is None:
        return None
    made: object = getattr(schedule, "func", schedule)  # of a partial
    if isinstance(schedule, LRScheduler) or (inspect.isclass(made) and issubclass(made, LRScheduler)):
        if warmup:
            raise ValueError(
                f"warmup={warmup:g} (--warmup) does not go with a scheduler of torch. Put the warm-up into it: "
                "torch.optim.lr_scheduler.SequentialLR, or name a schedule: schedule='cosine'."
            )
        return _Table(_learning_rates(schedule, optimizer, steps), steps)
    if not callable(schedule):
        raise TypeError(f"schedule must be a function; got {schedule!r}. {WRITE_SCHEDULE}")
    factor = functools.partial(_factor, cast("Callable[[float], Any]", schedule))
    if not warmup:
        return factor
    from tempering.training.schedules import with_warmup

    return with_warmup(factor, warmup)


def _factor(schedule: Callable[[float], Any], progress: float) -> float:
    try:
        factor = schedule(progress)
    except (AttributeError, TypeError) as error:
        raise TypeError(f"schedule({progress:.4g}) fails with {error!r}. {WRITE_SCHEDULE}") from error
    if isinstance(factor, (int, float)):
        return float(factor)
    if not isinstance(factor, np.number) and not (isinstance(factor, Tensor) and factor.ndim == 0):
        raise TypeError(f"schedule must return a number; got {type(cast('object', factor)).__name__}. {WRITE_SCHEDULE}")
    return float(cast("Any", factor).item())


class _Table:
    """Progress -> factor, one per step."""

    def __init__(self, factors: Sequence[float], steps: int) -> None:
        self.factors, self.steps = tuple(factors), steps

    def __call__(self, progress: float) -> float:
        return self.factors[min(round(progress * self.steps), self.steps - 1)]

    def __repr__(self) -> str:
        return f"factors {self.factors}"


def _learning_rates(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Step the scheduler on an optimizer of one number; return the factors on the learning rate."""
    if isinstance(schedule, ReduceLROnPlateau) or getattr(schedule, "func", schedule) is ReduceLROnPlateau:
        raise ValueError(f"ReduceLROnPlateau needs the scores of a run while it trains. {WRITE_SCHEDULE}")
    made, bases = isinstance(schedule, LRScheduler), base_learning_rates(optimizer)
    if made:
        if hasattr(schedule, "_schedulers"):
            raise ValueError(
                f"{type(schedule).__name__} holds other schedulers. Give a function of the optimizer: a class of "
                f"LRScheduler or a partial of one. {WRITE_SCHEDULE}"
            )
        optimizer = schedule.optimizer
        bases = base_learning_rates(optimizer)
    numbers = [{"params": [torch.zeros((), requires_grad=True)], "lr": lr, "initial_lr": lr} for lr in bases]
    stand_in = torch.optim.SGD(numbers, momentum=0.9)
    if made:
        scheduler = copy.copy(schedule)
        scheduler.optimizer = stand_in
        for group, now in zip(stand_in.param_groups, optimizer.param_groups, strict=True):
            group |= {name: value for name, value in now.items() if name == "lr" or name not in group}
    else:
        scheduler = schedule(stand_in)
    factors: list[float] = []
    for step in range(steps):
        if step:
            stand_in.step()  # pyright: ignore[reportUnknownMemberType]
            try:
                scheduler.step()
            except ValueError as error:
                raise ValueError(f"{type(scheduler).__name__} ends before the run of {steps} steps: {error}") from error
        factors.append(float(stand_in.param_groups[0]["lr"]) / float(bases[0]))
        if stand_in.param_groups[0]["momentum"] != 0.9:
            raise ValueError(
                f"{type(scheduler).__name__} changes the momentum too, and a run's schedule the learning rate alone. "
                "Give it cycle_momentum=False."
            )
    return factors


def split_by_decay(model: nn.Module, student: nn.Module) -> list[dict[str, Any]]:
    """Return the student's trained parameters in two groups: with weight decay, and with ``weight_decay=0``.

    Without decay are parameters of one dimension or none, those named "bias", and those whose names
    ``student.no_weight_decay()`` returns (timm's models), as in timm's ``param_groups_weight_decay``.

    Args:
        model: the student as it is trained, with its wrappers.
        student: the plain model.
    """
    listed: Any = getattr(student, "no_weight_decay", tuple)  # a method of timm's models
    without: tuple[str, ...] = tuple(listed())
    decayed, exempt = list[Tensor](), list[Tensor]()
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_exempt = p.ndim <= 1 or any(f".{name}".endswith(f".{end}") for end in ("bias", *without))
            (exempt if is_exempt else decayed).append(p)
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_without_decay(
    optimizer: Optimizer, model: nn.Module, student: nn.Module, others: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Create the optimizer of the student's two groups and of the others, those of the method.

    Raises:
        ValueError: for an optimizer that decays the exempt parameters all the same.
    """
    groups = split_by_decay(model, student)
    made = make_optimizer(optimizer, [*groups, *others])
    _check_exempt(made, groups)
    return made


def _check_exempt(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    exempt = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and any(id(p) in exempt for p in group["params"]):
            raise ValueError(
                f"decay_norms=False (--no-decay-norms) sets weight_decay=0 in groups of norms and biases, and this "
                f"{type(optimizer).__name__} decays them by {group['weight_decay']:g}. Give a function of parameter "
                "groups, such as optimizer=partial(torch.optim.AdamW, lr=1e-3), or leave decay_norms=True."
            )
