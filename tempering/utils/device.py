"""Device capabilities and torch.compile modes."""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def has_native_bf16(device: torch.device | str) -> bool:
    """Whether a device computes in bf16; False where each number is widened, computed and rounded back.

    A CPU does with AVX-512 BF16 or AMX, or ARM's own instructions, and a CUDA device from Ampere on. Of other devices
    nothing is known, and they are taken at their word.
    """
    where = torch.device(device).type
    if where == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if where != "cpu":
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
    """Say that a run in bf16 will be slower than one in float32 on this device."""
    if precision.startswith("bf16") and not has_native_bf16(device):
        name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        warnings.warn(
            f"precision={precision!r} on a {name} that does not compute in bf16: torch imitates it, "
            "and a step of a ResNet took eleven times as long as in float32 on such a CPU. precision='32-true' "
            "(--precision 32-true) is quicker.",
            stacklevel=2,
        )


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


CompileMode = bool | str


def validate_compile_mode(compile: CompileMode) -> None:
    """Refuse a mode that torch.compile does not have."""
    if not isinstance(compile, bool) and compile not in MODES:
        raise ValueError(
            f"compile must be True, False or a mode of torch.compile, {', '.join(map(repr, MODES))}; got {compile!r}. "
            "'reduce-overhead' replays CUDA graphs."
        )


def maybe_compile(model: nn.Module, compile: CompileMode) -> Any:
    """``model`` with its forward compiled as asked; itself for False."""
    validate_compile_mode(compile)
    return torch.compile(model, mode=None if compile is True else compile) if compile else model


def clone_outputs(model: Any, compile: CompileMode) -> Any:
    """The model, answering with copies where a mode may replay graphs: the next replay writes where the last wrote."""
    if not isinstance(compile, bool):
        model.register_forward_hook(lambda module, given, out: tree_map_only(Tensor, torch.clone, out))
    return model


def mark_step_begin(compile: CompileMode) -> None:
    """Say that what graphs gave before may be written over; harmless where there are none."""
    if not isinstance(compile, bool):
        torch.compiler.cudagraph_mark_step_begin()
