"""Device capabilities and torch.compile modes."""

from __future__ import annotations

import os
import platform
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work, such as copies to the CPU that do not wait."""
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        module.synchronize(*() if device.type == "mps" else (device,))


def is_distributed() -> bool:
    """Return whether this process belongs to a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def has_native_bf16(device: torch.device | str) -> bool:
    """Return whether a device computes in bf16; False if it emulates bf16 by upcasting and rounding.

    CPUs need AVX-512 BF16 or AMX, or ARM's bf16 instructions; CUDA devices need Ampere or later. Other devices are
    assumed to compute in bf16.
    """
    device_type = torch.device(device).type
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return True
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve_precision(precision: str, accelerator: str = "auto", device: str | None = None) -> str:
    """ "bf16" or "fp32" for "auto", by whether the device computes in bf16; any other precision as it is."""
    if precision != "auto":
        return precision
    default = "cpu" if accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return "bf16" if has_native_bf16(device or default) else "fp32"


def warn_if_bf16_emulated(precision: str, device: torch.device) -> None:
    """Warn that a run in bf16 will be slower than one in float32 on this device."""
    if precision.startswith("bf16") and not has_native_bf16(device):
        name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        warnings.warn(
            f"precision={precision!r} on a {name} that does not compute in bf16: torch emulates it, "
            "and a step of a ResNet took eleven times as long as in float32 on such a CPU. precision='32-true' "
            "(--precision 32-true) is faster.",
            stacklevel=2,
        )


def check_memory(owner: str, size: int, remedy: str) -> None:
    """Raise ValueError for a buffer of ``size`` bytes that does not fit in the memory of this machine."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no such query, as on Windows
        return
    if size > memory > 0:
        raise ValueError(
            f"{owner} needs {size / 1e9:,.1f} GB of memory, and this machine has {memory / 1e9:,.1f}. {remedy}"
        )


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


CompileMode = bool | str


def validate_compile_mode(compile: CompileMode) -> None:
    """Raise ValueError for a mode that torch.compile does not have."""
    if not isinstance(compile, bool) and compile not in MODES:
        raise ValueError(
            f"compile must be True, False or a mode of torch.compile, {', '.join(map(repr, MODES))}; got {compile!r}. "
            "'reduce-overhead' replays CUDA graphs."
        )


def maybe_compile(model: nn.Module, compile: CompileMode) -> Any:
    """Return ``model`` with its forward compiled in the given mode; the model itself for False."""
    validate_compile_mode(compile)
    return torch.compile(model, mode=None if compile is True else compile) if compile else model


def clone_outputs(model: Any, compile: CompileMode) -> Any:
    """Make the model clone its outputs if the mode may replay CUDA graphs, whose next replay overwrites the last."""
    if not isinstance(compile, bool):
        model.register_forward_hook(lambda module, args, out: tree_map_only(Tensor, torch.clone, out))
    return model


def mark_step_begin(compile: CompileMode) -> None:
    """Allow CUDA graphs to overwrite the outputs of the previous step; no effect without graphs."""
    if not isinstance(compile, bool):
        torch.compiler.cudagraph_mark_step_begin()
