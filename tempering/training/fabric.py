"""Lightning Fabric: launch, precision, loggers, memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tempering.utils.device import warn_of_imitated_bf16

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from tempering.methods.base import StepMethod


LOGGERS = ("tensorboard", "csv", "wandb")


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true")


def fabric_for(
    *, accelerator: str, devices: int | str, strategy: str, precision: str, loggers: Sequence[Any], folder: Any
) -> Fabric:
    """A launched Fabric; ``strategy="fsdp"`` is torch's FSDP2, which runs on the CPU too.

    Raises:
        ValueError: for a precision or a logger that there is not.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision.double import DoublePrecision
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}. bf16 is 'bf16-mixed'.")
    if precision == "16-mixed" and (accelerator == "cpu" or not torch.accelerator.is_available()):
        raise ValueError("precision='16-mixed' needs a GPU; on a CPU use 'bf16-mixed' or '32-true'.")
    chosen: Any = strategy
    double = DoublePrecision()
    double.convert_output = _as_it_is  # Fabric goes back to float32, and the loss would be computed there
    if strategy == "fsdp":
        count = devices if isinstance(devices, int) and devices > 0 else "auto"
        chosen = ModelParallelStrategy(parallelize_fn=_fully_shard, data_parallel_size=count, tensor_parallel_size=1)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy=chosen,
        precision=None if precision == "64-true" else precision,  # pyright: ignore[reportArgumentType]
        plugins=[double] if precision == "64-true" else [],
        loggers=[_logger(x, folder) for x in loggers],
    )
    fabric.launch()
    warn_of_imitated_bf16(precision, fabric.device)
    return fabric


def _as_it_is(data: Any) -> Any:
    return data


def _fully_shard(model: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2 on every direct child that has parameters, then on the whole."""
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        # a list or dict of modules has no forward for FSDP to hook
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def _logger(wanted: Any, folder: Any) -> Any:
    if not isinstance(wanted, str):
        return wanted
    if wanted not in LOGGERS:
        raise ValueError(f"loggers are {', '.join(LOGGERS)} or objects of lightning_fabric; got {wanted!r}.")
    if folder is None:
        raise ValueError(f"the logger {wanted!r} needs a place to write: give out=FOLDER.")
    try:
        if wanted == "wandb":
            from tempering.training.wandb_logger import WandbLogger

            return WandbLogger(folder)
        from lightning_fabric.loggers.csv_logs import CSVLogger
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        if wanted == "tensorboard":
            return TensorBoardLogger(root_dir=folder, name="logs", version=wanted)
        # a file for each time that the run was started: Fabric's logger removes what it finds
        taken = len(list(Path(folder, "logs").glob("csv*")))
        version = f"csv-{taken + 1}" if taken else "csv"
        return CSVLogger(root_dir=folder, name="logs", version=version, flush_logs_every_n_steps=1)
    except ImportError as error:
        raise ImportError(f'the logger {wanted!r} is not installed: pip install "tempering[{wanted}]"') from error


def may_differentiate(model: Any, method: StepMethod) -> None:
    """Let a method take derivatives of the wrapped model by itself.

    Fabric's hook on every output would refuse any way back but fabric.backward(), for the sake of a loss scale.
    """
    if method.needs_double_backward:
        vars(model)["_register_backward_hook"] = _as_it_is


def peak_mb(device: torch.device) -> float:
    """The most memory held so far, in MB: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # getrusage would count what the process held that started this one
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
