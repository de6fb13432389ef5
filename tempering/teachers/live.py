"""Live teacher: a frozen module in eval mode that runs in every step."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tempering.rows import TEACHER_OUTPUTS, upcast_to_float32
from tempering.teachers.base import Teacher, fingerprint, key_digest
from tempering.utils.device import clone_outputs, maybe_compile
from tempering.utils.state import ModelState, unwrapped
from tempering.utils.tensors import copy_model, map_tensors

FUSABLE = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Live(Teacher):
    """Runs a module in eval mode and returns its outputs, float32 at least, without gradient.

    Floating point inputs are converted to the type of its weights, outside of autocast.
    The module itself is frozen and put in eval mode, and put back in eval mode if something changes its mode, until
    ``release()`` gives it back as it was; ``precision`` and ``fuse_conv_bn`` use a frozen copy instead. ``identity`` is
    the sha256 of the original weights, ``precision`` and ``fuse_conv_bn``; wrappers (torch.compile, DataParallel) and
    offloading by accelerate do not change it. Inputs with "teacher_outputs", those of this module when the
    batch was generated (``tasks.Speculative(reuse=True)``), are not run again: those outputs are returned.

    Args:
        model: the teacher's module.
        precision: "bf16", "fp16" or "fp32" of a copy; None uses the module itself. Half precision uses the
            channels-last memory format if there are 2d convolutions.
        channels_last: use the channels-last memory format for weights and images; changes speed, not values.
        fuse_conv_bn: fuse batch normalization into the preceding convolution; equal up to rounding. Only leaf modules
            of the fused copy are called, so features of whole stages cannot be extracted.
        compile: apply torch.compile to the forward; a string is its mode, and "reduce-overhead" replays CUDA graphs.
        device: device of the teacher, whatever the student's is: inputs are moved to it, and outputs back. None: the
            student's device.
        normalization: of the images that the model was trained with, if the data is normalized otherwise: "own" reads
            it from the config of a timm model or the image processor of a transformers model; or a pair (mean, std)
            for pixels in [0, 1], a config or a processor. "data": that of the data. None: inputs are not changed, and
            a timm model whose config differs from the data is warned of.
        data_normalization: (mean, std) of the data; None: that of the run's loader.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: for an unknown precision, a normalization that is not found, or a model that torch.fx cannot trace
            for fusing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str | None = None,
        channels_last: bool = False,
        fuse_conv_bn: bool = False,
        compile: bool | str = False,
        device: torch.device | str | None = None,
        normalization: Any = None,
        data_normalization: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise no_teacher_error(model, "Live needs a torch module")
        if precision is not None and precision not in DTYPES:
            raise ValueError(f"Live needs precision {', '.join(map(repr, DTYPES))} or None; got {precision!r}.")
        self.precision, self.channels_last, self.fuse_conv_bn, self.compile = (
            precision,
            channels_last,
            fuse_conv_bn,
            compile,
        )
        self.device = None if device is None else torch.device(device)
        self.normalization, self._data_normalization = normalization, data_normalization
        self._own = self._own_normalization(model)
        self._renormalize: Callable[[Tensor], Tensor] | None = None
        key = {"weights": fingerprint(model), "precision": precision, "fold": fuse_conv_bn}
        self.identity = key_digest(key if self._own is None else {**key, "normalization": self._own})
        if fuse_conv_bn:
            model = _fuse_conv_bn(model)
        if precision is not None:
            model = (model if fuse_conv_bn else copy_model(model)).to(DTYPES[precision])
        self._dtype = None if precision is None else DTYPES[precision]
        self._images_last = channels_last or (self._dtype in (torch.bfloat16, torch.float16) and _has_conv2d(model))
        if self._images_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._model = model
        self._before: ModelState | None = None
        self.take()
        self._converts_inputs = self._images_last or self._dtype is not None or self.device is not None
        self._converts_inputs |= self._own is not None
        self._modules = list(model.modules())
        if self.device is not None:
            self._move(self.device)
        self._forward: Callable[[Any], Any] = clone_outputs(maybe_compile(self._model, compile), compile)
        self._warned = False

    @property
    def model(self) -> nn.Module:
        """The module that runs: the given one, or its fused copy or copy in another precision."""
        return unwrapped(self._model)

    def _own_normalization(self, model: nn.Module) -> Any:
        """Return (mean, std) that the model was trained with; None if inputs are not changed."""
        if self.normalization is None or self.normalization == "data":
            return None
        from tempering.teachers.normalization import WRITE, own_statistics, statistics

        own = own_statistics(unwrapped(model)) if self.normalization == "own" else statistics(self.normalization)
        if own is None:
            raise ValueError(f"Live found no mean and std for normalization={self.normalization!r}. {WRITE}.")
        return own

    def bind_data(self, batches: object) -> None:
        if self._own is None and (self.normalization == "data" or not hasattr(batches, "mean")):
            return
        from tempering.teachers.normalization import WRITE, Renormalize, of_loader, statistics, warn_if_other

        given = self._data_normalization
        data = of_loader(batches) if given is None else statistics(given)
        if self._own is None:
            if data is not None:
                warn_if_other(self.model, data)
        elif data is not None:
            self._renormalize = Renormalize(self._own, data)
        elif self._renormalize is None:
            raise ValueError(
                f"Live has normalization={self.normalization!r}, and {type(batches).__name__} does not say how its "
                f"images are normalized: give data_normalization=(mean, std) too, (0, 0, 0) and (1, 1, 1) for pixels. "
                f"{WRITE}."
            )

    def take(self) -> None:
        """Freeze the module and put it in eval mode; the first forward after ``release`` does so too."""
        if self._before is None:
            self._before = ModelState(self._model)
            _to_eval(self._model)
            self._before.freeze()
            dtypes = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
            self._own_dtype = dtypes.pop() if len(dtypes) == 1 else None

    def release(self) -> Self:
        """Give the module back: its training modes and requires_grad are those before this teacher took it."""
        if self._before is not None:
            self._before.restore(hooks=False)
            self._before = None
        return self

    def to(self, device: torch.device | str) -> Self:
        if self.device is None:
            self._move(device)
        return self

    def _move(self, device: torch.device | str) -> None:
        # accelerate places the parts of a model that it has hooked, and moves their inputs and outputs
        # and bitsandbytes those of a model in 4 or 8 bits, which cannot be moved
        fixed = ("is_loaded_in_4bit", "is_loaded_in_8bit")
        if not any(hasattr(m, "_hf_hook") or any(getattr(m, name, False) for name in fixed) for m in self._modules):
            self._model.to(device)

    @torch.no_grad()
    def __call__(self, inputs: Any, ids: Tensor | None = None) -> Any:
        precomputed = inputs.get(TEACHER_OUTPUTS) if isinstance(inputs, Mapping) else None
        if precomputed is not None and getattr(precomputed, "producer", None) in (self._model, self.model):
            return precomputed
        if isinstance(precomputed, Tensor):
            raise ValueError(
                'the batch has "teacher_outputs", and a live teacher as well. Learn from them with '
                "teacher=teachers.InBatch(), or leave them out of the batches."
            )
        return self.forward_with_grad(inputs, ids)

    def forward_with_grad(self, inputs: Any, ids: Tensor | None = None) -> Any:
        if self._before is None:
            self.take()
        elif any(module.training for module in self._modules):
            self._restore_eval()
        tensors = (inputs,) if isinstance(inputs, Tensor) else tree_leaves(inputs)
        types = {x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()}
        converts = self._converts_inputs or bool(self._own_dtype is not None and types - {self._own_dtype})
        output = self._forward(map_tensors(inputs, self._convert) if converts else inputs)
        output = upcast_to_float32(output) if isinstance(output, Tensor) else map_tensors(output, upcast_to_float32)
        if self.device is None:
            return output
        device = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
        return map_tensors(output, lambda x: x.to(device))

    def _convert(self, x: Tensor) -> Tensor:
        if self._own is not None:
            if self._renormalize is None:
                self.bind_data(None)  # with data_normalization, no loader is needed
            assert self._renormalize is not None
            x = self._renormalize(x)
        x = x if self.device is None else x.to(self.device, non_blocking=self.device.type != "cpu")
        if x.is_floating_point() and self._dtype is not None:
            x = x.to(self._dtype)
        elif (
            x.is_floating_point()
            and self._own_dtype not in (None, x.dtype)
            and not torch.is_autocast_enabled(x.device.type)
        ):
            x = x.to(self._own_dtype)  # autocast converts as each operation needs
        return x.contiguous(memory_format=torch.channels_last) if self._images_last and x.ndim == 4 else x

    def _restore_eval(self) -> None:
        _to_eval(self._model)
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the teacher {type(self._model).__name__} was in training mode; it is back in eval mode. Is it part "
                "of the student, or does a callback call .train() on all modules?",
                stacklevel=4,
            )


def _has_conv2d(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for m in model.modules())


def _fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode with each batch normalization fused into a convolution that feeds only it.

    Raises:
        ValueError: for a model that torch.fx cannot trace.
    """
    from torch import fx
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    try:
        traced = fx.symbolic_trace(copy_model(model).eval())
    except Exception as error:  # tracing runs the model's own code, which may raise any exception
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}, so it cannot be fused: {error}. Leave out "
            "fuse_conv_bn=True; precision='bf16' makes it faster too."
        ) from error
    modules = dict(traced.named_modules())
    module_calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in module_calls)
    for node in module_calls:
        norm, previous = modules[node.target], node.args[0] if node.args else None
        if not isinstance(previous, fx.Node) or previous.op != "call_module":
            continue
        conv = modules[str(previous.target)]
        # exactly these types: a subclass may compute something else from the same weights
        fusable = (type(conv), type(norm)) in FUSABLE and getattr(norm, "running_mean", None) is not None
        if not fusable or len(previous.users) > 1 or calls[previous.target] > 1:
            continue
        fused = fuse_conv_bn_eval(conv, norm)  # pyright: ignore[reportArgumentType]
        modules[str(previous.target)] = fused
        traced.set_submodule(str(previous.target), fused)
        node.replace_all_uses_with(previous)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _to_eval(model: nn.Module) -> None:
    """Put a module in eval mode; one of ``torch.export`` has a single mode, and is marked as being in it."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False


def no_teacher_error(given: object, needs: str) -> TypeError:
    """Return the error for something other than a teacher, with what to write for a function and for stored logits."""
    advice = ""
    if hasattr(given, "shape"):
        advice = (
            " Logits (samples, classes) in memory are read by the ids of batches: class Stored(teachers.Teacher): "
            "identity = 'a name of these logits', and def __call__(self, inputs, ids): return logits[ids]. As a column "
            "'teacher_outputs' of the data they are teachers.InBatch()."
        )
    elif callable(given):
        advice = " Wrap a function: class Model(nn.Module): forward = staticmethod(function)."
    return TypeError(f"{needs}; got {type(given).__name__}.{advice}")
