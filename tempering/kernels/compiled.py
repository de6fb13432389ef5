"""Versions of the per-chunk functions compiled by Inductor or Triton, once per process; optional."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tempering.kernels.analytic import Fast, cross_entropy_and_slope, divergence_and_slope
from tempering.temperature import sharpness
from tempering.temperature.sharpness import HUGE, Solution, exact, first_look_of

LARGE = {"cpu": 2**24}  # minimum logits of one side to compile for; takes about ten seconds, once per process
ELSEWHERE = 2**20  # Triton's kernels compile in a second or two
Wanted = bool | Literal["triton", "inductor"] | None


class Versions(NamedTuple):
    """Compiled functions by the names that they override, their compiler ("" for none), and the reason for none."""

    functions: Fast
    compiler: str
    why: str


def fast_versions(wanted: Wanted, device: torch.device, numel: int) -> Versions:
    """Return the compiled functions: Triton's kernels on CUDA if triton is installed, Inductor's otherwise.

    With ``wanted`` None, compiles for many logits only (``LARGE``), and returns no functions, with the reason but
    without a warning, if there is no compiler.

    Raises:
        ValueError: for an unknown value of ``wanted``.
        RuntimeError: if compilation was requested and is not possible.
    """
    if wanted not in (None, True, False, "triton", "inductor"):
        raise ValueError(f"compile must be True, False, None, 'triton' or 'inductor'; got {wanted!r}.")
    if wanted is False:
        return Versions({}, "", "compile=False")
    minimum = LARGE.get(device.type, ELSEWHERE)
    if wanted is None and numel < minimum:
        return Versions({}, "", f"fewer than {minimum} logits")
    use_triton = wanted == "triton" or (wanted != "inductor" and device.type == "cuda")
    compiler, why = "triton" if use_triton else "inductor", ""
    functions, error = _triton(device.type) if compiler == "triton" else _inductor(device.type)
    if compiler == "triton" and error is not None and wanted != "triton":
        why = f"no triton ({_to_text(error)}); "
        compiler, (functions, error) = "inductor", _inductor(device.type)
    if error is None:
        return Versions(functions, compiler, why)
    why += _to_text(error)
    if wanted:
        raise RuntimeError(
            f"compile={wanted!r}, but {compiler} cannot compile for {device.type!r} here ({why}). A CPU needs a C++ "
            "compiler, such as g++, and Triton a CUDA device. Leave compile out: the chunks run without it."
        ) from error
    return Versions({}, "", why)


def _to_text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


@functools.cache
def _triton(device: str) -> tuple[Fast, Exception | None]:
    """Triton's kernels, verified on a few rows; on a CPU only its interpreter can run them."""
    try:
        from triton.runtime.errors import TritonError  # pyright: ignore[reportMissingImports]

        from tempering.kernels import triton_rows
    except ImportError as error:
        return {}, error
    functions: Fast = {
        "kl": triton_rows.divergence_and_slope,
        "cross_entropy": triton_rows.cross_entropy_and_slope,
        "exact": triton_rows.exact,
    }
    try:
        _verify(functions, device)
    except (TritonError, RuntimeError, ArithmeticError) as error:  # RuntimeError: no driver for this device
        return {}, error
    return functions, None


@functools.cache
def _inductor(device: str) -> tuple[Fast, Exception | None]:
    """Inductor's functions, the largest one verified on a few rows, so that a missing compiler is found here."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InvalidCxxCompiler

    plain: dict[str, Callable[..., Any]] = {
        "kl": divergence_and_slope,
        "cross_entropy": cross_entropy_and_slope,
        "exact": first_look_of,
    }
    functions = {name: _without_warnings(torch.compile(function, dynamic=True)) for name, function in plain.items()}
    functions["exact"] = functools.partial(_finish, functions["exact"])
    try:
        _verify({"kl": functions["kl"]}, device)
    except (TorchDynamoException, InvalidCxxCompiler, ArithmeticError) as error:
        return {}, error
    return functions, None


def _verify(functions: Fast, device: str) -> None:
    """Compare the compiled functions with the plain ones on a few rows with masked classes, once per device.

    Raises:
        ArithmeticError: naming a function whose results are wrong; the compiled functions are then not used.
    """
    g = torch.Generator().manual_seed(0)
    u, v = (scale * torch.randn(5, 300, generator=g) for scale in (4.0, 3.0))
    u[:, -7:] = v[:, -7:] = -torch.inf
    T_t, T_s, target = 1.0 + torch.rand(5, 1, generator=g), 1.0 + torch.rand(5, 1, generator=g), torch.arange(5) - 1
    references: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "kl": (divergence_and_slope, (u, v, T_t, T_s, (T_t * T_s).squeeze(1))),
        "cross_entropy": (cross_entropy_and_slope, (v, target)),
        "exact": (_exact, (u, v, 4.0, 0.9)),
    }
    for name, function in functions.items():
        plain, args = references[name]
        results = function(*(x.to(device) if isinstance(x, Tensor) else x for x in args))
        for a, b in zip(results, plain(*args), strict=True):
            if not torch.allclose(a.cpu().float(), b.float(), rtol=1e-3, atol=1e-4):
                error = (a.cpu().float() - b.float()).abs().max().item()
                raise ArithmeticError(f"{name} differs by {error:.3g} on {device!r}")


def _exact(u: Tensor, v: Tensor, tau: float, reach: float) -> Solution:
    return sharpness.solve_delta(u, v, tau=tau, solve="exact", reach=reach)


def _finish(first_look: Callable[..., Any], u: Tensor, v: Tensor, tau: float, reach: float) -> Solution:
    """The exact solver with a compiled first look at all rows; the few others are looked at in eager mode."""
    dtype = torch.promote_types(u.dtype, v.dtype)
    u, v = u.to(dtype), v.to(dtype)
    is_tame = all(bool(torch.stack(z.aminmax()).abs().amax() <= HUGE) for z in (u, v))
    pieces = _pieces(u.shape[1])

    def compiled(u: Tensor, v: Tensor, tau: Tensor, end: Tensor) -> Any:
        sides = (z.unflatten(1, pieces) if pieces[0] > 1 else z for z in (u, v))
        return first_look(*sides, tau, end, is_tame)

    return exact(u, v, tau, reach, compiled)


def _pieces(classes: int) -> tuple[int, int]:
    """Split the classes into pieces of at most 4,096, if they divide into such; see ``over_classes``."""
    counts = range(-(-classes // 4096), max(classes // 512, 1) + 1)
    count = next((k for k in counts if not classes % k), 1)
    return count, classes // count


def _without_warnings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Suppress the warnings that torch emits when it compiles for the first time."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args)

    return call
