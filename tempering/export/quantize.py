"""Quantize the linear layers of a student to int8, and measure what it costs and saves."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tempering.tasks.base import Task
from tempering.training.pretrained import cost, first_inputs


def to_int8(net: nn.Module) -> tuple[nn.Module, str]:
    """Return a copy whose linear layers have int8 weights, on the CPU, and the library that made it.

    torchao's ``Int8WeightOnlyConfig`` if it is installed, else ``quantize_dynamic`` of torch.ao, which quantizes the
    inputs of these layers as well.

    Raises:
        ValueError: for a network without linear layers.
    """
    if not any(isinstance(module, nn.Linear) for module in net.modules()):
        raise ValueError(f"int8 is for linear layers, and this {type(net).__name__} has none.")
    copied = copy.deepcopy(net).cpu().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore
        except ImportError:
            from torch.ao.quantization import quantize_dynamic

            return quantize_dynamic(copied, {nn.Linear}, dtype=torch.qint8), "torch.ao"
        quantize_(copied, Int8WeightOnlyConfig())
        return copied, "torchao"


def compare_int8(net: nn.Module, batches: Sequence[Any] | Any, task: Task) -> dict[str, Any]:
    """Score and measure a student before and after ``to_int8``, on the CPU.

    Returns:
        "by", the library; "before" and "after": "scores", "bytes" of the saved weights, "latency_ms" of one sample.
    """
    net = net.cpu()
    quantized, library = to_int8(net)
    task.prepare_model(net)
    task.prepare_model(quantized)
    inputs = first_inputs(task.inputs(next(iter(batches)))[0])
    found: dict[str, Any] = {"by": library}
    for name, model in (("before", net), ("after", quantized)):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        measured = cost(model, lambda model=model: model(inputs))
        scores = task.score(model, batches)
        found[name] = {"scores": scores, "bytes": buffer.tell(), "latency_ms": measured.get("latency_ms")}
    return found
