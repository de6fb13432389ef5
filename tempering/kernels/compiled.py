"""Inductor's versions of what a chunk spends its time on, made once a process and never required."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InvalidCxxCompiler

from tempering.kernels.analytic import Fast, cross_entropy_and_slope, divergence_and_slope
from tempering.temperature import sharpness

LARGE = 2**24  # logits of one side from which on compiling, some ten seconds once a process, is worth it


def fast_versions(wanted: bool | None, device: torch.device, numel: int) -> tuple[Fast, str]:
    """Compiled functions by the names they stand in for, {} for none, and why there are none.

    ``wanted`` None compiles for ``LARGE`` logits and more, and goes without, silently but for the answer, where
    Inductor finds no compiler or does not know the device.

    Raises:
        RuntimeError: where compiling was asked for and is not possible.
    """
    if wanted is False:
        return {}, "compile=False"
    if wanted is None and numel < LARGE:
        return {}, f"fewer than {LARGE} logits"
    made, error = _made(device.type)
    why = "" if error is None else f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if wanted and error is not None:
        raise RuntimeError(
            f"compile=True, and Inductor cannot compile for {device.type!r} here ({why}). A CPU needs a C++ compiler, "
            "such as g++. Leave compile out: the chunks run without it."
        ) from error
    return made, why


@functools.cache
def _made(device: str) -> tuple[Fast, Exception | None]:
    """The functions, the largest one tried on two rows, so that a missing compiler shows here and nowhere else."""
    plain: dict[str, Callable[..., Any]] = {
        "kl": divergence_and_slope,
        "cross_entropy": cross_entropy_and_slope,
        "centred": _plain(sharpness.centred),
        "_std": _plain(sharpness._std),
        "_sharpness": _plain(sharpness._sharpness),
    }
    made = {name: _quiet(torch.compile(function, dynamic=True)) for name, function in plain.items()}
    z, one = torch.zeros(2, 8, device=device), torch.ones(2, 1, device=device)
    try:
        made["kl"](z, z, one, one, one.squeeze(1))
    except (TorchDynamoException, InvalidCxxCompiler) as error:
        return {}, error
    return made, None


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "__wrapped__", function)


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without what torch says of itself the first time it compiles."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return call
