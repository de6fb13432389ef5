"""Nested structures of tensors, the bytes of a tensor, weights with a checksum, and the modes of modules."""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# tensors on a device -> the CPU tensors that they were moved from, and both versions
_SOURCES: MutableMapping[Tensor, tuple[Tensor, int, int]] = WeakTensorKeyDictionary()


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested tuples, lists and mappings with ``fn`` applied to every tensor.

    Classes are kept: namedtuples, and mappings with attributes such as the outputs of transformers. Other values are
    returned unchanged. The input is not changed.
    """
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        return _mapping_like(value, {key: map_tensors(item, fn) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, fn) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)([map_tensors(item, fn) for item in value])
    return value


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return the batch with every tensor in it on the device; ``on_host`` gives back what shapes depend on.

    Copies to a device do not wait for it; those to CUDA use pinned memory, as others wait there. Copies to
    the CPU wait: their values could be read before they are there.
    """
    kind = torch.device(device).type

    def move(x: Tensor) -> Tensor:
        pinned = x.pin_memory() if kind == "cuda" and x.device.type == "cpu" and x.layout is torch.strided else x
        return _remembered(x, pinned.to(device, non_blocking=kind != "cpu"))

    return map_tensors(batch, move)


def _remembered(source: Tensor, moved: Tensor) -> Tensor:
    """Remember where a tensor on a device came from, if it is one of integers or a vector: images take memory."""
    small = source.ndim <= 1 or not source.is_floating_point()
    if moved.device.type != "cpu" and source.device.type == "cpu" and small and not moved.is_inference():
        _SOURCES[moved] = (source, source._version, moved._version)
    return moved


def remember_sources(batch: Any, moved: Any) -> Any:
    """Do for a batch that something else moved to a device what ``to_device`` does; return ``moved``."""
    for source, x in zip(tree_leaves(batch), tree_leaves(moved), strict=True):
        if isinstance(source, Tensor) and isinstance(x, Tensor) and not source.is_inference():
            _remembered(source, x)
    return moved


def on_host(value: Any) -> Any:
    """Return tensors as they were on the CPU before ``to_device``, so that the host need not wait for the device.

    A value with a tensor that it did not move, or that was changed in place since, is returned as it is.
    """
    known: list[bool] = []

    def source_of(x: Tensor) -> Tensor:
        source, *versions = _SOURCES.get(x, (x, 0, 0)) if x.device.type != "cpu" else (x, 0, 0)
        known.append(source.device.type == "cpu" and (source is x or versions == [source._version, x._version]))
        return source

    sources = map_tensors(value, source_of)
    return sources if all(known) else value


def numbers_on(values: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``like.new_tensor(values)``, without making the host wait for the device as that does."""
    return torch.tensor(values, dtype=dtype or like.dtype).to(like.device, non_blocking=True)


def logits_of(output: Any) -> Any:
    """Return the logits in a model's output: ``.logits``, "logits" or "out" of a mapping, the only tensor of a tuple.

    Anything else is returned as it is.
    """
    if isinstance(output, Mapping):
        return next((output[name] for name in ("logits", "out") if name in output), output)
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and len(output) == 1 and isinstance(output[0], Tensor):
        return output[0]
    return output


def described(output: Any) -> str:
    """Describe a model's output for an error, with the line that makes it the logits."""
    if isinstance(output, Tensor):
        dense = ". Of pixels, use tasks.Segmentation()" if output.ndim == 4 else ""
        return f"{tuple(output.shape)}{dense}"
    entries = (
        list(output.items())
        if isinstance(output, Mapping)
        else list(enumerate(output))
        if isinstance(output, (tuple, list))
        else []
    )
    if not entries:
        return type(output).__name__
    logits = next((n for n, x in entries if isinstance(x, Tensor) and x.ndim > 1), entries[0][0])
    parts = ", ".join(f"{n!r}: {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for n, x in entries)
    return (
        f"{type(output).__name__} with {parts}. Is it one in training mode only? To select the logits, write "
        f"model.register_forward_hook(lambda module, args, output: output if isinstance(output, torch.Tensor) else "
        f"output[{logits!r}])"
    )


def overlap(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether its memory overlaps that of one of the others."""
    spans = sorted(span for x in others if (span := _span(x)) is not None)
    ends = list(itertools.accumulate((end for *_, end in spans), max))  # of all that begin no later
    starts = [start for start, _ in spans]

    def overlaps(span: tuple[int, int]) -> bool:
        before = bisect.bisect_left(starts, span[1])  # those that begin before it ends
        return before > 0 and ends[before - 1] > span[0]

    return [(span := _span(x)) is not None and overlaps(span) for x in tensors]


def _span(x: Tensor) -> tuple[int, int] | None:
    """Return where a tensor's memory begins and ends; None if it has none, or is of a class that hides it."""
    plain = type(x) in (Tensor, nn.Parameter, nn.Buffer) and x.layout == torch.strided
    if not plain or x.device.type == "meta" or not x.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def tensor_bytes(x: Tensor) -> memoryview:
    """Return the bytes of a tensor's values, for hashing."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def copy_model(model: nn.Module) -> Any:
    """Return a copy, also of a model with weights that are computed, as by ``torch.nn.utils.weight_norm``.

    These are attributes with a graph, which ``copy.deepcopy`` refuses; the copy computes them in its next forward.
    """
    computed = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    return copy.deepcopy(model, {id(x): x.detach().clone() for x in computed if not x.is_leaf})


@contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Context manager that puts the models in eval mode and afterwards restores the mode of every module."""
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensors_to_bytes(
    tensors: Mapping[str, Tensor], *, checksum: bool = False, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the content of a safetensors file with these tensors; ``checksum`` puts one into its metadata."""
    from safetensors.torch import save as to_bytes

    # clone: safetensors rejects tensors that share memory, and tied weights do
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = to_bytes(plain)
    if not checksum:
        return content
    end = 8 + int.from_bytes(content[:8], "little")  # of the header; offsets in it count from there
    # written here: safetensors' order of them is random
    own = {"format": "pt", "sha256": _weights_digest(plain, metadata or {}), **(metadata or {})}
    header = json.dumps({"__metadata__": own, **json.loads(content[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, and compare its weights with the checksum in its metadata, if there is one.

    Raises:
        ValueError: if it is not a safetensors file, or its weights are not as they were written.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        weights: dict[str, Tensor] = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file: {error}. If it was one, it was cut or damaged: copy or "
            "make it again. A file of torch.save needs the suffix .pth, .pt, .bin, .ckpt or .tar."
        ) from error
    written = metadata.pop("sha256", None)
    metadata.pop("format", None)
    if written is not None and written != _weights_digest(weights, metadata):
        raise ValueError(
            f"{path} is damaged: its weights do not have the checksum that was written with them. Restore the file, or "
            "train again."
        )
    return weights


def _weights_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode() if metadata else b"")
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def _mapping_like(like: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(like) is dict:
        return items
    if isinstance(like, MutableMapping):
        out = copy.copy(like)
        for key, item in items.items():
            out[key] = item
        return out
    make: Any = type(like)
    try:
        return make(items)
    except TypeError:  # its constructor does not take a mapping
        return items


def batch_digests(batch: Any, path: str = "") -> dict[str, str]:
    """Hash every tensor, array and plain value in a nested batch: path -> hash."""
    if isinstance(batch, Mapping):
        items = list(cast("Mapping[Any, Any]", batch).items())
        return {key: d for name, item in items for key, d in batch_digests(item, f"{path}/{name}").items()}
    if isinstance(batch, (list, tuple)):
        values = cast("Sequence[Any]", batch)
        if not all(isinstance(item, (str, int, float)) for item in values):
            return {key: d for i, item in enumerate(values) for key, d in batch_digests(item, f"{path}/{i}").items()}
    if isinstance(batch, Tensor):
        data = bytes(tensor_bytes(batch)) if batch.layout == torch.strided else repr(batch).encode()
        data += f"{batch.dtype} {tuple(batch.shape)}".encode()
    elif isinstance(batch, np.ndarray):
        array: Any = cast("Any", batch)
        data = (
            repr(array).encode() if array.dtype.hasobject else array.tobytes()
        ) + f"{array.dtype} {array.shape}".encode()
    elif batch is None or isinstance(batch, (str, bytes, int, float, list, tuple)):
        data = repr(cast("Any", batch)).encode()
    else:
        return {}
    return {path: hashlib.sha256(data).hexdigest()[:16]}
