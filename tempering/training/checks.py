"""Check and convert what a run is given, before it starts: models, method, optimizer, schedule and config."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._pytree import tree_leaves

from tempering.rows import Rows, total

if TYPE_CHECKING:
    from tempering.methods.base import BlockLoss, Chunking, Method
    from tempering.teachers.base import Teacher
    from tempering.training.config import TrainConfig


MIN_LOGITS = 2**22  # of the student, from which on chunks save memory and cost no time
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
Groups = list[dict[str, Any]]
Optimizer = Callable[[Groups], torch.optim.Optimizer] | torch.optim.Optimizer | str
Schedule = Callable[[float], float]
WRITE = "Write optimizer=partial(torch.optim.AdamW, lr=1e-3), a function of parameter groups."
WRITE_SCHEDULE = (
    "Write schedule=lambda progress: 1 - progress, a function of the finished fraction of the run, or "
    "schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS), stepped once per step."
)


def as_method(method: object) -> Method:
    """Return the method; a class or a name such as "kd" is constructed with its default values.

    Raises:
        TypeError: for anything else.
        ValueError: for a name that no method has.
    """
    from tempering.methods.base import Method

    if isinstance(method, str):
        from tempering.methods import METHODS
        from tempering.utils.registry import lookup

        try:
            method = lookup(method, METHODS, "method")
        except ValueError as error:
            what = "" if method.isidentifier() else f"method={method!r} is no name of a method."
            raise ValueError(
                f"{what or error} Write the call, such as method=methods.KD(soft=0.9). Presets, such as "
                "kd-matched, and text with values are built by tempering.experiments.presets.method_of(text)."
            ) from error
    if isinstance(method, type) and issubclass(method, Method):
        method = method()
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be a Method, such as methods.DTKD(); got {type(cast('object', method)).__name__}."
        )
    return method


def check_models_are_distinct(student: nn.Module, teacher: nn.Module | Teacher | None) -> None:
    """Check, before anything is changed, that the student can be trained and shares nothing that is trained.

    Raises:
        ValueError: for trained parameters, buffers or dropout modules that are the teacher's too, or a student in
            which nothing requires grad.
    """
    model = teacher if isinstance(teacher, nn.Module) else getattr(teacher, "model", None)
    if isinstance(model, nn.Module):
        theirs = {id(x) for x in (*model.parameters(), *model.buffers())}
        # a frozen part of the teacher may be reused, as SimKD reuses its classifier
        ours = [(n, p) for n, p in student.named_parameters() if p.requires_grad] + list(student.named_buffers())
        shared = [n for n, x in ours if id(x) in theirs]
        modes = {id(m) for m in model.modules() if isinstance(m, DROPOUT)}
        named = cast("Iterable[tuple[str, nn.Module]]", student.named_modules())
        shared += [name for name, module in named if id(module) in modes]
        if shared or model is student:
            first = f"{shared[0]!r} and {len(shared) - 1} more" if len(shared) > 1 else repr((shared or ["itself"])[0])
            raise ValueError(
                "the teacher is a part of the student, or shares weights with the student: frozen, they would not be "
                f"trained. Of the student these are {first}. Pass copy.deepcopy(model) as teacher."
            )
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("the student has no parameter that requires grad: there is nothing to train.")


def explain_input_types(error: RuntimeError, model: nn.Module, inputs: object) -> None:
    """Add to an error of a forward pass what to write, if the inputs are of another type than the weights."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    types = {x.dtype for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    wrong = sorted(str(t) for t in types if (t.is_floating_point and t not in own) or t == torch.uint8)
    if len(own) == 1 and wrong:
        error.add_note(
            f"The inputs are {', '.join(wrong)} and the student's weights are {own.pop()}: convert the inputs "
            "in the data set, x.float(), and scale pixels to the range that the model was trained with."
        )


def check_unsharded(student: nn.Module) -> None:
    """Check that the student is a plain module with values: a run distributes it itself.

    Raises:
        ValueError: for a student that is sharded, wrapped for several processes, or offloaded.
    """
    kind = type(student).__name__
    if kind == "DistributedDataParallel":
        raise ValueError(
            "the student is wrapped in DistributedDataParallel. A run does so itself: give the plain module, "
            "distill(student.module, ..., devices=N, strategy='ddp')."
        )
    if kind == "FullyShardedDataParallel" or any(hasattr(m, "_get_fsdp_state") for m in student.modules()):
        raise ValueError(
            "the student is sharded by FSDP. A run does so itself: give the plain module, distill(model, ..., "
            "devices=N, strategy='fsdp')."
        )
    if any(p.is_meta for p in student.parameters()):
        raise ValueError(
            "the student has parameters on the meta device, which have no values to train. Load it without offloading "
            "(device_map=None), or model.to_empty(device='cpu') and load_state_dict."
        )


def validate_step_method(method: Method, teacher: Teacher | None, config: TrainConfig) -> None:
    """Check that teacher and config allow the gradients that the method takes within its step.

    Raises:
        ValueError: for a teacher without gradient, or an option that rules out a second derivative.
    """
    owner = type(method).__name__
    if method.needs_live and (teacher is None or teacher.model is None):
        raise ValueError(
            f"{owner} differentiates through the teacher, and {'None' if teacher is None else type(teacher).__name__} "
            "has no gradient. Give the model itself: teachers.Live(model)."
        )
    if method.needs_double_backward:
        options = {
            f"compile={config.compile!r}": bool(config.compile),
            "strategy='fsdp'": config.strategy == "fsdp",
            "precision='16-mixed'": config.precision == "16-mixed",
        }
        if unsupported := [name for name, is_set in options.items() if is_set]:
            raise ValueError(
                f"{owner} takes derivatives within its step, which {', '.join(unsupported)} does not support. Leave it "
                "out; strategy='ddp' and precision='bf16-mixed' work."
            )


def validate_sampled_teacher(method: Method, teacher: Teacher | None) -> None:
    """Check that a method's gradient is linear in the teacher's probabilities, if those are sampled.

    Only then does the gradient to the samples equal that to the teacher in expectation: forward KL at temperature 1. A
    method that cannot be computed without features or a task is not checked.

    Raises:
        ValueError: for another divergence or temperature.
    """
    if teacher is None or teacher.samples is None or method.owns_step:
        return
    student, *logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = (x.softmax(-1) for x in logits)

    def gradient(probabilities: Tensor) -> Tensor:
        leaf = student.clone().requires_grad_()
        rows = Rows(leaf, probabilities.log(), torch.arange(4))
        return torch.autograd.grad(total(copy.deepcopy(method)(rows, 1.0), rows), leaf)[0]

    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # pyright: ignore[reportUnknownMemberType]
            expected, got = (gradient(p) + gradient(q)) / 2, gradient((p + q) / 2)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return
    if not torch.allclose(expected, got, rtol=1e-5, atol=1e-8):
        raise ValueError(
            f"{type(method).__name__} does not suit a teacher of {teacher.samples} sampled tokens: they are unbiased "
            "for forward KL at temperature 1 only: Divergence(objective='kl', temperature=1). For others and other "
            "temperatures keep the likeliest tokens and the tail: teachers.TopKTeacher(teacher, top=16)."
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


def chunking_for(method: Method, chunks: bool | None = None) -> Chunking | None:
    """Select how to compute the method's losses in chunks; None: not in chunks.

    Args:
        chunks: True for ``kernels.chunked`` always, which raises a ValueError for a method or rows that it cannot
            compute; False for never; None for blocks of 2^22 logits or more, if every row's terms depend on that row
            alone and no policy adapts after the step.
    """
    from tempering.methods.base import Chunking

    if chunks is None:
        independent = not (method.owns_step or method.is_batch_dependent() or method.adaptive_policies())
        return Chunking(chunked_loss, MIN_LOGITS) if independent else None
    return Chunking(chunked_loss, 0, always=True) if chunks else None


def chunked_loss(method: Method, rows: Rows, progress: float, normalizer: Tensor | float | None) -> BlockLoss:
    """Compute the loss of a block in chunks, with its gradient, in the memory of a few rows."""
    # imported here because it loads torch's compilers
    from tempering.kernels.chunked import chunked
    from tempering.methods.base import BlockLoss

    loss, terms, path = chunked(method, rows, progress, normalizer=normalizer)
    return BlockLoss(rows, loss, terms, path)


def smoothed(make_rows: Callable[[Any, Any, Any], list[Rows]], smoothing: float) -> Callable[..., list[Rows]]:
    """Return a function that makes a task's rows with label smoothing; without it, the task's own."""
    if not smoothing:
        return make_rows

    def make(student: Any, teacher: Any, batch: Any) -> list[Rows]:
        blocks = make_rows(student, teacher, batch)
        if own := [rows.name for rows in blocks if rows.task_loss is not None]:
            raise ValueError(
                f"label_smoothing= (--label-smoothing) is of the cross entropy, and the block {own[0]!r} has its "
                "task's own loss. Leave it out, or smooth in the task."
            )
        return [rows.replace(label_smoothing=smoothing) for rows in blocks]

    return make
