"""Trade time for memory: recompute activations in the backward pass (gradient checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn


def check_gradient_checkpointing(student: nn.Module) -> None:
    """Check that the student has gradient checkpointing of its own.

    Raises:
        ValueError: if it has none.
    """
    if _switches(student) is None:
        raise ValueError(
            f"{type(student).__name__} has no gradient checkpointing. Models of transformers "
            "(gradient_checkpointing_enable) and timm (set_grad_checkpointing) have it; in your own, call "
            "torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) in forward, and leave the option out."
        )


@contextmanager
def gradient_checkpointing(student: nn.Module, inner: AbstractContextManager[object]) -> Generator[None]:
    """Enter ``inner``, and let the student recompute its activations; one that did so already is left as it is."""
    switches = None
    if not any(
        getattr(m, "gradient_checkpointing", getattr(m, "grad_checkpointing", False)) for m in student.modules()
    ):
        switches = _switches(student)
    if switches is not None:
        switches[0]()
    try:
        with inner:
            yield
    finally:
        if switches is not None:
            switches[1]()


def _switches(student: Any) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """Return the functions that switch it on and off; None if there are none."""
    if hasattr(student, "set_grad_checkpointing"):  # timm
        return partial(student.set_grad_checkpointing, True), partial(student.set_grad_checkpointing, False)
    for kind in ("activation", "gradient"):  # transformers, in this order: the second is deprecated
        on, off = (getattr(student, f"{kind}_checkpointing_{switch}", None) for switch in ("enable", "disable"))
        if on is not None and off is not None and getattr(student, "supports_gradient_checkpointing", True):
            return partial(on, {"use_reentrant": False}), off
    return None
