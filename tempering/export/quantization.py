"""Quantize the weights of a student's linear layers with torchao, keep them in a file, and measure what it costs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.tasks.base import Task
from tempering.training.checkpoint import save_weights
from tempering.training.pretrained import cost, first_inputs
from tempering.utils.tensors import copy_model, read_weights

Bits = Literal["int8", "int4"]
GROUP = 32  # weights of a row that share a scale in int4, where the row is a multiple of it


def quantize(net: nn.Module, to: Bits = "int8") -> nn.Module:
    """Return a copy on the CPU whose linear layers have int8 or int4 weights; inputs and other layers stay float.

    A weight of int8 is within 1/254 of the largest of its row, one of int4 within 1/15 of the largest of its 32
    neighbors, or of its row if that is no multiple of 32.

    Raises:
        ImportError: without torchao.
        ValueError: for a network without linear layers, or another type.
    """
    if to not in ("int8", "int4"):
        raise ValueError(f"weights are quantized to int8 or int4; got {to!r}.")
    if not any(isinstance(module, nn.Linear) for module in net.modules()):
        raise ValueError(f"{to} is for linear layers, and this {type(net).__name__} has none.")
    copied = copy_model(net).cpu().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchao.quantization import (  # pyright: ignore
                Int8WeightOnlyConfig,
                IntxWeightOnlyConfig,
                PerAxis,
                PerGroup,
                quantize_,
            )
        except ImportError as error:
            raise ImportError(f'{to} needs torchao ({error}): pip install "tempering[export]"') from error
        if to == "int8":
            quantize_(copied, Int8WeightOnlyConfig())
            return copied
        for grouped, granularity in ((True, PerGroup(GROUP)), (False, PerAxis(0))):
            quantize_(
                copied,
                IntxWeightOnlyConfig(
                    weight_dtype=getattr(torch, "int4"),  # noqa: B009
                    granularity=granularity,
                ),
                lambda module, _, grouped=grouped: (
                    isinstance(module, nn.Linear)
                    and type(module.weight.data) is Tensor
                    and (module.in_features % GROUP == 0) is grouped
                ),
            )
    return copied


def save_quantized(net: nn.Module, path: str | Path, to: Bits, metadata: Mapping[str, str] | None = None) -> None:
    """Write a net of ``quantize`` to a safetensors file: integers, scales and the other tensors; two int4 to a byte."""
    packed = {name: _pack(part) if to == "int4" and wide else part for name, part, wide in _parts(net)}
    save_weights(Path(path), packed, metadata)


def load_quantized(net: nn.Module, path: str | Path, to: Bits) -> nn.Module:
    """Return a copy of a net with the weights of ``save_quantized``, quantized.

    Raises:
        ImportError: without torchao.
        ValueError: for the weights of another network.
    """
    quantized, weights = quantize(net, to), read_weights(Path(path))
    own = {name: (part, to == "int4" and wide) for name, part, wide in _parts(quantized)}
    shapes = {name: (_pack(part) if wide else part).shape for name, (part, wide) in own.items()}
    if other := sorted(
        name
        for name in shapes.keys() | weights.keys()
        if name not in shapes or name not in weights or shapes[name] != weights[name].shape
    ):
        raise ValueError(f"{path} does not hold the weights of this {type(net).__name__} in {to}: {other[0]} differs.")
    with torch.no_grad():
        for name, (part, wide) in own.items():
            part.copy_(_unpack(weights[name], part) if wide else weights[name])
    return quantized


def compare_quantized(net: nn.Module, batches: Sequence[Any] | Any, task: Task, to: Bits = "int8") -> dict[str, Any]:
    """Score and measure a student before and after ``quantize``, on the CPU.

    Returns:
        "to"; "weights", the share of the parameters that are quantized; "before" and "after": "scores", "bytes" of
        the saved weights, "latency_ms" of one sample.
    """
    net = net.cpu()
    quantized = quantize(net, to)
    inputs = first_inputs(task.inputs(next(iter(batches)))[0])
    narrow = sum(part.numel() for _, part, wide in _parts(quantized) if wide)
    found: dict[str, Any] = {"to": to, "weights": narrow / sum(p.numel() for p in net.parameters())}
    for which, model in (("before", net), ("after", quantized)):
        task.prepare_model(model)
        packed = (_pack(part) if to == "int4" and wide else part for _, part, wide in _parts(model))
        found[which] = {
            "scores": task.score(model, batches),
            "bytes": sum(x.numel() * x.element_size() for x in packed),
            "latency_ms": cost(model, lambda model=model: model(inputs)).get("latency_ms"),
        }
    return found


def _parts(net: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the plain tensors that a state consists of: name, tensor, and whether it holds quantized weights."""
    for name, value in net.state_dict().items():
        if type(value) is Tensor:
            yield name, value, False
            continue
        for inner in value.__tensor_flatten__()[0]:
            yield f"{name}.{inner}", getattr(value, inner), inner == "qdata"


def _pack(values: Tensor) -> Tensor:
    """Put pairs of int4, stored as int8, into bytes."""
    flat = nn.functional.pad(values.flatten(), (0, values.numel() % 2)).view(-1, 2)
    return (flat[:, 0] & 15 | flat[:, 1] << 4).view(torch.uint8)


def _unpack(packed: Tensor, like: Tensor) -> Tensor:
    """Undo ``_pack`` for a tensor of that shape."""
    signed = packed.view(torch.int8)
    return torch.stack((signed << 4 >> 4, signed >> 4), 1).flatten()[: like.numel()].view(like.shape)
