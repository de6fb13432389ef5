"""Apply a function to every tensor of a nested structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def on(device: torch.device, batch: Any) -> Any:
    """The batch with every tensor in it on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, (tuple, list)):
        return type(batch)(on(device, part) for part in batch)
    if isinstance(batch, dict):
        return {key: on(device, part) for key, part in batch.items()}
    return batch


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        out: Any = copy.copy(value)  # keeps the class: transformers' outputs are mappings with attributes
        for key, item in value.items():
            out[key] = each(item, change)
        return out
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(each(item, change) for item in value)
    return value
