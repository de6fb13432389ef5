"""torch.compile by one word, for a student and for a teacher; CUDA graphs among the words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
Wanted = bool | str


def refuse(compile: Wanted) -> None:
    """Refuse a mode that torch.compile does not have."""
    if not isinstance(compile, bool) and compile not in MODES:
        raise ValueError(
            f"compile must be True, False or a mode of torch.compile, {', '.join(map(repr, MODES))}; got {compile!r}. "
            "'reduce-overhead' replays CUDA graphs."
        )


def compiled(model: nn.Module, compile: Wanted) -> Any:
    """``model`` with its forward compiled as asked; itself for False."""
    refuse(compile)
    return torch.compile(model, mode=None if compile is True else compile) if compile else model


def keeping(model: Any, compile: Wanted) -> Any:
    """The model, answering with copies where a mode may replay graphs: the next replay writes where the last wrote."""
    if not isinstance(compile, bool):
        model.register_forward_hook(lambda module, given, out: tree_map_only(Tensor, torch.clone, out))
    return model


def begin(compile: Wanted) -> None:
    """Say that what graphs gave before may be written over; harmless where there are none."""
    if not isinstance(compile, bool):
        torch.compiler.cudagraph_mark_step_begin()
