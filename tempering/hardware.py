"""Which arithmetic a device has, and what it only imitates."""

from __future__ import annotations

import platform
import warnings

import torch


def computes_bf16(device: torch.device | str) -> bool:
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


def warn_of_imitated_bf16(precision: str, device: torch.device) -> None:
    """Say that a run in bf16 will be slower than one in float32 on this device."""
    if precision.startswith("bf16") and not computes_bf16(device):
        name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
        warnings.warn(
            f"precision={precision!r} on a {name} that does not compute in bf16: torch imitates it, "
            "and a step of a ResNet took eleven times as long as in float32 on such a CPU. precision='32-true' "
            "(--precision 32-true) is quicker.",
            stacklevel=2,
        )
