"""A simulated accelerator: the device ``sim:0``, which computes real numbers without any hardware.

Its tensors wrap CPU tensors and obey the rules of a device: an operation on a tensor of the CPU and one of the device
raises, and every operation for which the host would wait for the device is counted by its place in the code. So a
missing ``device=`` and a hidden ``.item()`` are found on a machine without an accelerator. It is built on torch's
backend in Python (PrivateUse1), whose interface is private: written for torch 2.13.

Random numbers are the CPU's. Not covered: kernels, streams and memory of its own, ``torch.compile``, ``torch.func``.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

# operations whose result the host waits for: a number, or a shape that depends on values
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_linalg_check_errors"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor", "histc"}
COPIES = {"copy_", "_to_copy", "_copy_from"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # take indices on the CPU too
TORCH, HERE = str(Path(torch.__file__).parent), __file__

_counters: list[tuple[Counter[str], str]] = []


@contextmanager
def simulated_device(within: str | Path = "") -> Iterator[Counter[str]]:
    """Context manager in which ``device="sim"`` exists; yields the host's reads, "what file:line" -> count.

    Reads are numbers and shapes that depend on values (``item``, ``nonzero``, boolean masks), synchronization, and
    copies in either direction other than with ``non_blocking=True``. The first call registers the device with torch,
    which has to be before the first backward pass of the process; outside the context it is not available.

    Args:
        within: a folder; the place of a read is its innermost frame in files of this folder. Default: not in torch.

    Raises:
        RuntimeError: with CUDA available, or in a process that cannot register the device.
    """
    _register()
    reads: Counter[str] = Counter()
    _counters.append((reads, str(within)))
    generator, swaps = torch.Generator, torch.__future__.get_swap_module_params_on_conversion()
    torch.Generator = _Generator
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps parameters, and so ties between them
    try:
        with _Factories():
            yield reads
    finally:
        torch.Generator = generator
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        _counters.pop()


class SimulatedTensor(Tensor):
    """A tensor on ``sim:0``; ``raw`` is the CPU tensor with its values, to look at without a counted read."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimulatedTensor:
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=_device())

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor({self.raw})"

    def tolist(self) -> Any:
        _count("tolist")
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert sim:0 device type tensor to numpy, at {_place()}. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@functools.cache
def _device() -> torch.device:
    return torch.device("sim:0")


def _place() -> str:
    """The innermost frame of the code under test, "file:line"."""
    within = _counters[-1][1] if _counters else ""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != HERE and not name.startswith((TORCH, "<")) and name.startswith(within):
            shown = Path(name).relative_to(within) if within else Path(name).name
            return f"{shown}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _count(what: str) -> None:
    if _counters:
        _counters[-1][0][f"{what} {_place()}"] += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU tensors inside, after the checks of a device; wrap its results."""
    tensors: list[Tensor] = []
    inner_args = _unwrapped(args, tensors)
    inner_kwargs = _unwrapped(kwargs, tensors) if kwargs else {}
    device = kwargs.get("device")
    to = None if device is None else torch.device(device).type
    theirs = [x for x in tensors if not isinstance(x, SimulatedTensor)]
    if len(theirs) == len(tensors) and to != "sim":
        return func(*args, **kwargs)
    full, name, waits = _named(func)
    if len(theirs) < len(tensors):
        if theirs:
            _check_devices(name, args, theirs)
        if waits:
            _count_reads(name, full, args, kwargs, to)
    elif theirs and not kwargs.get("non_blocking"):
        _count("copy to the device")
    if to is not None:
        inner_kwargs["device"] = torch.device("cpu" if to == "sim" else to)
    out = func(*inner_args, **inner_kwargs)
    if name == "_to_copy" and to not in (None, "sim"):
        return out
    return _wrapped(out, tensors)


@functools.cache
def _named(func: Any) -> tuple[str, str, bool]:
    """The name of an operation with and without its overload, and whether the host may wait for it."""
    full = func.name().removeprefix("aten::")
    name = full.partition(".")[0]
    return full, name, bool({full, name} & (READS | COPIES | INDEXING))


def _unwrapped(value: Any, tensors: list[Tensor]) -> Any:
    """The arguments of an operation with the CPU tensors inside; the tensors as they were are appended to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _inside(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_unwrapped(x, tensors) for x in value])
    return {k: _unwrapped(x, tensors) for k, x in value.items()} if isinstance(value, dict) else value


def _wrapped(out: Any, known: list[Tensor]) -> Any:
    """The results as tensors of the device; in-place operations return what they got, copy_ perhaps one on the CPU."""
    if isinstance(out, Tensor):
        for x in known:
            if _inside(x) is out:
                return x
        return SimulatedTensor(out)
    return type(out)([_wrapped(x, known) for x in out]) if isinstance(out, (tuple, list)) else out


def _inside(x: Any) -> Any:
    return x.raw if isinstance(x, SimulatedTensor) else x


def _check_devices(name: str, args: Any, theirs: list[Tensor]) -> None:
    """Reject tensors of the CPU with dimensions, as CUDA does; indices of tensors on the device may be there."""
    if name in COPIES or all(x.ndim == 0 for x in theirs):
        return
    if name in INDEXING and isinstance(args[0], SimulatedTensor):
        values = args[2] if name != "index" and name != "_unsafe_index" else args[0]
        if isinstance(values, SimulatedTensor) or values.ndim == 0:
            _count("copy of an index to the device")
            return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, sim:0 and cpu: aten::"
        f"{name} at {_place()}, with tensors {[tuple(x.shape) for x in theirs if x.ndim]} on the CPU"
    )


def _count_reads(name: str, full: str, args: Any, kwargs: dict[str, Any], to: str | None) -> None:
    """Count what the host waits for in an operation on tensors of the device."""
    if name in READS or full in READS:
        _count(full)
    elif name in INDEXING and any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        _count("boolean mask")
    elif (name == "_to_copy" and to == "cpu") or (name == "copy_" and not isinstance(args[0], SimulatedTensor)):
        if not _non_blocking(args, kwargs):
            _count("copy to the host")
    elif name == "copy_" and not isinstance(args[1], SimulatedTensor) and not _non_blocking(args, kwargs):
        _count("copy to the device")


def _non_blocking(args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking") or args[2:3] == (True,))


class _Factories(TorchDispatchMode):
    """Within it functions that make tensors, such as ``torch.zeros``, take ``device="sim"``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what switches it off at each operation takes longer than the operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _AnyGenerator(type(torch._C.Generator)):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class _Generator(torch._C.Generator, metaclass=_AnyGenerator):
    """``torch.Generator(device="sim")`` is one of the CPU, so its numbers are those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return torch._C.Generator(device="cpu" if torch.device(device).type == "sim" else device)


class _Backend(backend_registration._DummyBackendModule):
    """``torch.sim``: available inside ``simulated_device`` only."""

    def is_available(self) -> bool:
        return bool(_counters)

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        _count("synchronize")


def _register() -> None:
    """Name torch's private backend "sim", once in a process."""
    if backend_registration._privateuse1_backend_name == "sim":
        return
    if torch.cuda.is_available():
        raise RuntimeError("simulated_device() is for machines without CUDA: torch runs one accelerator in a process.")
    try:
        backend_registration._setup_privateuseone_for_python_backend("sim", backend_module=_Backend())
        for name, function in (
            ("empty_strided", _empty_strided),
            ("empty.memory_format", _empty),
            ("_copy_from", _copy_from),
        ):
            torch.library.impl(f"aten::{name}", "privateuseone", function)
    except (AttributeError, RuntimeError) as error:
        raise RuntimeError(
            f"simulated_device() cannot register its device with torch {torch.__version__} ({error}); it is written "
            "for torch 2.13, in a process that has registered no other private backend."
        ) from error


# torch.tensor(list, device=...) switches the modes off and asks the backend itself for these


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    return SimulatedTensor(torch.empty(size, dtype=dtype))


def _copy_from(src: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    to_host = not isinstance(dst, SimulatedTensor)
    if to_host or not (isinstance(src, SimulatedTensor) or non_blocking):
        _count("copy to the host" if to_host else "copy to the device")
    _inside(dst).copy_(_inside(src))
    return dst
