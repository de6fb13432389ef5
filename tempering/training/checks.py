"""Check and convert what a run is given, before it starts: models, method and config."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves

from tempering.rows import Rows, total
from tempering.teachers.base import Teacher
from tempering.utils.state import frozen_by_teachers
from tempering.utils.tensors import overlap

if TYPE_CHECKING:
    from tempering.methods.base import BlockLoss, Chunking, Method
    from tempering.training.config import TrainConfig


MIN_LOGITS = 2**22  # of the student, from which on chunks save memory and cost no time
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
        ValueError: for trained parameters, buffers or dropout modules that are the teacher's too, or in its memory, for
            parameters that another teacher has frozen, lazy modules that never ran, or a student in which nothing
            requires grad.
    """
    _check_initialized("student", student)
    frozen = frozen_by_teachers(student)
    models = teacher.models if isinstance(teacher, Teacher) else (teacher,)
    for model in (model for model in models if isinstance(model, nn.Module)):
        _check_initialized("teacher", model)
        theirs = [*model.parameters(), *model.buffers()]
        # a part of the teacher that its user has frozen may be reused, as SimKD reuses its classifier
        trained = [(n, p) for n, p in student.named_parameters() if p.requires_grad or n in frozen]
        ours: list[tuple[str, Tensor]] = [*trained, *student.named_buffers()]
        objects = {id(x) for x in theirs}
        shared = [n for n, x in ours if id(x) in objects]
        modes = {id(m) for m in model.modules() if isinstance(m, DROPOUT)}
        named = cast("Iterable[tuple[str, nn.Module]]", student.named_modules())
        shared += [name for name, module in named if id(module) in modes]
        if shared or model is student:
            first = f"{shared[0]!r} and {len(shared) - 1} more" if len(shared) > 1 else repr((shared or ["itself"])[0])
            raise ValueError(
                "the teacher is a part of the student, or shares weights with the student: frozen, they would not be "
                f"trained. Of the student these are {first}. Pass copy.deepcopy(model) as teacher. To share a frozen "
                "part on purpose, call part.requires_grad_(False) before a teacher has the model."
            )
        in_theirs = overlap([x for _, x in ours], theirs)
        if common := [name for (name, _), is_shared in zip(ours, in_theirs, strict=True) if is_shared]:
            raise ValueError(
                f"{len(common)} weights of the student, such as {common[0]!r}, are in the memory of the teacher's: "
                "training the student would change the teacher. Were they taken over by .data, or by "
                "load_state_dict(assign=True)? Pass copy.deepcopy(model) as teacher, or copy the weights with .clone()."
            )
    if frozen:
        raise ValueError(
            f"{len(frozen)} parameters of the student, such as {frozen[0]!r}, would not be trained: teachers.Live has "
            "frozen them, in a model with the same layers. Give one of the two a copy, made before Live, or call "
            "live.release() first. To leave them frozen on purpose, give the student copy.deepcopy(part)."
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError(
            "the student has no parameter that requires grad: there is nothing to train. A copy of a model that "
            "teachers.Live has frozen is frozen too; student.requires_grad_(True) trains it."
        )


def _check_initialized(side: str, model: nn.Module) -> None:
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise ValueError(
            f"the {side} has lazy modules, whose weights have no shape yet. Run it on a batch first: model(inputs)."
        )


def explain_inputs(error: Exception, model: nn.Module, inputs: object) -> None:
    """Add to an error of a forward pass what to write, if its inputs do not fit.

    That is inputs of another type than the weights, or several for a model that takes each as an argument.
    """
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    wrong = sorted(
        {str(x.dtype) for x in tensors if (x.is_floating_point() and x.dtype not in own) or x.dtype == torch.uint8}
    )
    if isinstance(error, TypeError) and ("forward()" in str(error) or isinstance(inputs, Mapping)):
        what = type(cast("Any", inputs)).__name__ if len(tensors) != 1 else f"a tensor {tuple(tensors[0].shape)}"
        what += f" with {', '.join(map(repr, cast('Any', inputs)))}" if isinstance(inputs, Mapping) else ""
        error.add_note(
            f"The model was called with one argument, the inputs of the batch: {what}. For one that takes several, "
            "wrap it in a module whose forward(self, x) returns self.model(*x), and let batches be ((x1, x2), labels); "
            "for one that takes a tensor, let them be (x, labels)."
        )
    elif len(own) == 1 and wrong:
        weights = own.pop()
        convert = "x.float(), and scale pixels to the range that the model was trained with"
        if weights.itemsize == 2:
            convert = f"x.to({weights}); or train float32 weights, student.float(), with precision='bf16-mixed'"
        error.add_note(
            f"The inputs are {', '.join(wrong)} and the student's weights are {weights}: convert the inputs in the "
            f"data set, {convert}."
        )
    elif tensors and "dtype" in str(error) and not any(x.is_floating_point() for x in tensors):
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors)
        error.add_note(
            f"The inputs are {shapes}. Are they the labels? Batches are (inputs, labels) or (inputs, labels, ids)."
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
    if kind == "FullyShardedDataParallel" or any(hasattr(type(m), "_get_fsdp_state") for m in student.modules()):
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
    if teacher is not None and method.trains_teacher and teacher.parts:
        raise ValueError(
            f"{owner} trains one network as the teacher, and {type(teacher).__name__} has {len(teacher.parts)}, of "
            "which it would train the first alone. Give the model itself: teachers.Live(model)."
        )
    if teacher is not None and teacher.follows_student and config.strategy == "fsdp":
        raise ValueError(
            f"{type(teacher).__name__} follows the student's weights, which strategy='fsdp' shards. Use strategy='ddp'."
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
