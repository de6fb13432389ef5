"""Inductor's and Triton's versions of what a chunk spends its time on, made once a process and never required."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InvalidCxxCompiler

from tempering.kernels.analytic import Fast, cross_entropy_and_slope, divergence_and_slope
from tempering.temperature import sharpness

LARGE = {"cpu": 2**24}  # logits of one side from which on compiling, some ten seconds once a process, is worth it
ELSEWHERE = 2**20  # Triton's kernels compile in a second or two
Wanted = bool | Literal["triton", "inductor"] | None


class Versions(NamedTuple):
    """Compiled functions by the names they stand in for, who compiled them, "" for nobody, and why nobody did."""

    functions: Fast
    compiler: str
    why: str


def fast_versions(wanted: Wanted, device: torch.device, numel: int) -> Versions:
    """What runs a walk over chunks: Triton's kernels on CUDA where triton is installed, Inductor's elsewhere.

    ``wanted`` None compiles for many logits (``LARGE``), and goes without, silently but for the answer, where there is
    no compiler or the device is not known.

    Raises:
        ValueError: for a word that is neither.
        RuntimeError: where compiling was asked for and is not possible.
    """
    if wanted not in (None, True, False, "triton", "inductor"):
        raise ValueError(f"compile must be True, False, None, 'triton' or 'inductor'; got {wanted!r}.")
    if wanted is False:
        return Versions({}, "", "compile=False")
    least = LARGE.get(device.type, ELSEWHERE)
    if wanted is None and numel < least:
        return Versions({}, "", f"fewer than {least} logits")
    by, why = "triton" if wanted == "triton" or (wanted != "inductor" and device.type == "cuda") else "inductor", ""
    made, error = _triton(device.type) if by == "triton" else _made(device.type)
    if by == "triton" and error is not None and wanted != "triton":
        why = f"no triton ({_to_text(error)}); "
        by, (made, error) = "inductor", _made(device.type)
    if error is None:
        return Versions(made, by, why)
    why += _to_text(error)
    if wanted:
        raise RuntimeError(
            f"compile={wanted!r}, and {by} cannot compile for {device.type!r} here ({why}). A CPU needs a C++ "
            "compiler, such as g++, and Triton a CUDA device. Leave compile out: the chunks run without it."
        ) from error
    return Versions({}, "", why)


def _to_text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


@functools.cache
def _triton(device: str) -> tuple[Fast, Exception | None]:
    """Triton's kernels, tried on a few rows; on a CPU its interpreter alone can run them."""
    try:
        from triton.runtime.errors import TritonError  # pyright: ignore[reportMissingImports]

        from tempering.kernels import triton_rows
    except ImportError as error:
        return {}, error
    made: Fast = {
        "kl": triton_rows.divergence_and_slope,
        "cross_entropy": triton_rows.cross_entropy_and_slope,
        "exact": triton_rows.exact,
    }
    try:
        _prove(made, device)
    except (TritonError, RuntimeError, ArithmeticError) as error:  # RuntimeError: no driver for this device
        return {}, error
    return made, None


@functools.cache
def _made(device: str) -> tuple[Fast, Exception | None]:
    """Inductor's, the largest one tried on a few rows, so that a missing compiler shows here and nowhere else."""
    plain: dict[str, Callable[..., Any]] = {
        "kl": divergence_and_slope,
        "cross_entropy": cross_entropy_and_slope,
        "centered": sharpness.centered,
        "logsumexp_and_slope": sharpness.logsumexp_and_slope,
    }
    made = {name: _quiet(torch.compile(function, dynamic=True)) for name, function in plain.items()}
    try:
        _prove({"kl": made["kl"]}, device)
    except (TorchDynamoException, InvalidCxxCompiler, ArithmeticError) as error:
        return {}, error
    return made, None


def _prove(made: Fast, device: str) -> None:
    """Hold the compiled functions to the plain ones on a few rows with masked classes, once a process and device.

    Raises:
        ArithmeticError: naming a function whose numbers are wrong here; it is then not used.
    """
    g = torch.Generator().manual_seed(0)
    u, v = (by * torch.randn(5, 300, generator=g) for by in (4.0, 3.0))
    u[:, -7:] = v[:, -7:] = -torch.inf
    T_t, T_s, target = 1.0 + torch.rand(5, 1, generator=g), 1.0 + torch.rand(5, 1, generator=g), torch.arange(5) - 1
    asked: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "kl": (divergence_and_slope, (u, v, T_t, T_s, (T_t * T_s).squeeze(1))),
        "cross_entropy": (cross_entropy_and_slope, (v, target)),
        "exact": (_exactly, (u, v, 4.0, 0.9)),
    }
    for name, function in made.items():
        plain, given = asked[name]
        found = function(*(x.to(device) if isinstance(x, Tensor) else x for x in given))
        for a, b in zip(found, plain(*given), strict=True):
            if not torch.allclose(a.cpu().float(), b.float(), rtol=1e-3, atol=1e-4):
                off = (a.cpu().float() - b.float()).abs().max().item()
                raise ArithmeticError(f"{name} is off by {off:.3g} on {device!r}")


def _exactly(u: Tensor, v: Tensor, tau: float, reach: float) -> sharpness.Solution:
    return sharpness.solve_delta(u, v, tau=tau, solve="exact", reach=reach)


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without what torch says of itself the first time it compiles."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return call
