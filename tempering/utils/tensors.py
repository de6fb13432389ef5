"""Nested structures of tensors, the bytes of a tensor, and the modes of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested tuples, lists and mappings with ``fn`` applied to every tensor.

    Classes are kept: namedtuples, and mappings with attributes such as the outputs of transformers. Other values are
    returned unchanged. The input is not changed.
    """
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return _mapping_like(value, {key: map_tensors(item, fn) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, fn) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)([map_tensors(item, fn) for item in value])
    return value


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return the batch with every tensor in it on the device."""
    return map_tensors(batch, lambda x: x.to(device, non_blocking=True))


def logits_of(output: Any) -> Any:
    """Return the logits in a model's output: ``.logits``, "logits" or "out" of a mapping, the only tensor of a tuple.

    Anything else is returned as it is.
    """
    if isinstance(output, Mapping):
        return next((output[name] for name in ("logits", "out") if name in output), output)
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and len(output) == 1 and isinstance(output[0], Tensor):
        return output[0]
    return output


def described(output: Any) -> str:
    """Describe a model's output for an error, with the line that makes it the logits."""
    if isinstance(output, Tensor):
        dense = ". Rows of pixels need a task of their own" if output.ndim == 4 else ""
        return f"{tuple(output.shape)}{dense}"
    entries = (
        list(output.items())
        if isinstance(output, Mapping)
        else list(enumerate(output))
        if isinstance(output, (tuple, list))
        else []
    )
    if not entries:
        return type(output).__name__
    parts = ", ".join(f"{n!r}: {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for n, x in entries)
    return (
        f"{type(output).__name__} with {parts}. Is it one in training mode only? To select the logits, write "
        f"model.register_forward_hook(lambda module, args, output: output if isinstance(output, torch.Tensor) else "
        f"output[{entries[0][0]!r}])"
    )


def tensor_bytes(x: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, for hashing."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Context manager that puts the models in eval mode and afterwards restores the mode of every module."""
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _mapping_like(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(like) is dict:
        return items
    if isinstance(like, MutableMapping):
        out = copy.copy(like)
        for key, item in items.items():
            out[key] = item
        return out
    make: Any = type(like)
    try:
        return make(items)
    except TypeError:  # its constructor does not take a mapping
        return items
