"""A teacher that is asked anew every time: a frozen module in eval mode."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tempering.rows import upcast_to_float32
from tempering.teachers.base import Teacher, fingerprint, key_digest
from tempering.teachers.outputs import PrecomputedLogits
from tempering.utils.device import clone_outputs, maybe_compile
from tempering.utils.tensors import map_tensors

FUSABLE = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Live(Teacher):
    """Answers in float32 at least, without gradient, whatever is done to the module's mode.

    The module itself is frozen and put in eval mode; ``precision`` and ``fuse_conv_bn`` leave it alone and use a frozen
    copy. ``identity`` is that of the weights as they came, with precision and fold. Inputs with "taught", answers that
    this very module gave while the batch was written (``tasks.Speculative(reuse=True)``), are answered with those.

    Args:
        model: the module that answers.
        precision: "bf16", "fp16" or "fp32", of a copy; None leaves it as it is. Half precision is laid out
            channels-last where there are convolutions.
        channels_last: lay weights and images out so; a change of speed, not of values.
        fold: fold batch normalization into the convolution before it; equal but for rounding. Only leaf modules of
            the folded copy are called, so features of whole stages cannot be tapped.
        compile: torch.compile its forward; a word is its mode, and "reduce-overhead" replays CUDA graphs.
        device: where it stays, whatever the student's is: inputs are brought there, and answers back. None: with the
            student.

    Raises:
        TypeError: for something that is no module.
        ValueError: for a precision that there is not, or a model that cannot be traced to be folded.
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
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Live needs a torch module; got {type(model).__name__}.")
        if precision is not None and precision not in DTYPES:
            raise ValueError(f"Live needs precision {', '.join(map(repr, DTYPES))} or None; got {precision!r}.")
        self.precision, self.channels_last, self.fuse_conv_bn, self.compile = (
            precision,
            channels_last,
            fuse_conv_bn,
            compile,
        )
        self.device = None if device is None else torch.device(device)
        self.identity = key_digest({"weights": fingerprint(model), "precision": precision, "fold": fuse_conv_bn})
        if fuse_conv_bn:
            model = _fuse_conv_bn(model)
        if precision is not None:
            model = (model if fuse_conv_bn else copy.deepcopy(model)).to(DTYPES[precision])
        self._dtype = None if precision is None else DTYPES[precision]
        self._images_last = channels_last or (self._dtype in (torch.bfloat16, torch.float16) and _convolves(model))
        if self._images_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._model = model.eval().requires_grad_(False)
        self._converts_inputs = self._images_last or self._dtype is not None or self.device is not None
        self._modules = list(model.modules())
        if self.device is not None:
            self._model.to(self.device)
        self._forward: Callable[[Any], Any] = clone_outputs(maybe_compile(self._model, compile), compile)
        self._warned = False

    @property
    def model(self) -> nn.Module:
        """The module that answers: the given one, or the copy in another precision or folded."""
        return self._model

    def to(self, device: torch.device | str) -> Self:
        if self.device is None:
            self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, inputs: Any, ids: Tensor | None = None) -> Any:
        known = inputs.get("taught") if isinstance(inputs, Mapping) else None
        if isinstance(known, PrecomputedLogits) and known.producer is self._model:
            return known
        return self.forward_with_grad(inputs, ids)

    def forward_with_grad(self, inputs: Any, ids: Tensor | None = None) -> Any:
        if any(module.training for module in self._modules):
            self._back_to_eval()
        answer = self._forward(map_tensors(inputs, self._prepared) if self._converts_inputs else inputs)
        answer = upcast_to_float32(answer) if isinstance(answer, Tensor) else map_tensors(answer, upcast_to_float32)
        if self.device is None:
            return answer
        here = next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))
        return map_tensors(answer, lambda x: x.to(here))

    def _prepared(self, x: Tensor) -> Tensor:
        x = x if self.device is None else x.to(self.device, non_blocking=True)
        if x.is_floating_point() and self._dtype is not None:
            x = x.to(self._dtype)
        return x.contiguous(memory_format=torch.channels_last) if self._images_last and x.ndim == 4 else x

    def _back_to_eval(self) -> None:
        self._model.eval()
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"somebody put the teacher {type(self._model).__name__} in training mode; it is back in eval mode. Is "
                "it a part of the student, or does a callback call .train() on everything?",
                stacklevel=4,
            )


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) for m in model.modules())


def _fuse_conv_bn(model: nn.Module) -> nn.Module:
    """A copy in eval mode with each batch normalization folded into the convolution that feeds it alone.

    Raises:
        ValueError: for a model that torch.fx cannot trace.
    """
    from torch import fx
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    try:
        traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}, so it cannot be folded: {error}. Leave out fold=True; "
            "precision='bf16' makes it faster too."
        ) from error
    parts = dict(traced.named_modules())
    called = [node for node in traced.graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in called)
    for node in called:
        norm, before = parts[node.target], node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        conv = parts[str(before.target)]
        # exactly these types: a subclass may compute something else from the same weights
        fits = (type(conv), type(norm)) in FUSABLE and getattr(norm, "running_mean", None) is not None
        if not fits or len(before.users) > 1 or calls[before.target] > 1:
            continue
        folded = fuse_conv_bn_eval(conv, norm)  # pyright: ignore[reportArgumentType]
        parts[str(before.target)] = folded
        traced.set_submodule(str(before.target), folded)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
