"""bf16 where a device computes in it, and a warning where it only imitates it."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from tempering import distill
from tempering.methods.logits.kd import KD
from tempering.utils import device as hardware


def cpu(monkeypatch: pytest.MonkeyPatch, *, avx512: bool = False, amx: bool = False, machine: str = "x86_64") -> None:
    """A CPU that has these instructions."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def test_a_cpu_computes_in_bf16_by_either_of_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx512, amx in ((False, False), (True, False), (False, True)):
        cpu(monkeypatch, avx512=avx512, amx=amx)
        assert hardware.has_native_bf16("cpu") is (avx512 or amx)
    cpu(monkeypatch, avx512=True, machine="arm64")
    assert hardware.has_native_bf16("cpu") is torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert hardware.has_native_bf16("mps")


def test_a_cuda_device_is_asked_without_what_it_imitates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not hardware.has_native_bf16("cuda:0")


def train(precision: str, out: Path) -> None:
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    options = {"accelerator": "cpu", "precision": precision, "selfcheck": False, "quiet": True}
    distill(nn.Linear(3, 2), nn.Linear(3, 2), batches, method=KD(), steps=1, out=out, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_in_imitated_bf16_says_so_and_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str
) -> None:
    cpu(monkeypatch)
    with pytest.warns(UserWarning, match=rf"precision='{precision}' on a CPU that does not .*--precision 32-true"):
        train(precision, tmp_path / "imitated")
    cpu(monkeypatch, avx512=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(precision, tmp_path / "computed")


def test_a_run_in_float32_is_not_warned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train("32-true", tmp_path)
