"""Set up Lightning Fabric: strategy and precision."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core import imports
from packaging.version import Version
from torch import nn

from tempering.utils.device import warn_if_bf16_emulated
from tempering.utils.text import counted

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true")


def launched_processes() -> tuple[str, int, int] | None:
    """Return which launcher started this process, on how many machines, and with how many processes on each.

    None without one. torchrun, SLURM's srun and Open MPI's mpirun are known, in Fabric's order: torchrun may run in a
    job of SLURM.

    Raises:
        ValueError: if machines have different numbers of processes, or mpi4py is missing.
    """
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    environ = os.environ
    if TorchElasticEnvironment.detect():
        name, total = "torchrun", int(environ["WORLD_SIZE"])
        each = int(environ.get("LOCAL_WORLD_SIZE", total))
        machines = total // each
    elif SLURMEnvironment.detect():
        name, total, machines = "srun", int(environ["SLURM_NTASKS"]), int(environ.get("SLURM_NNODES", "1"))
        each = total // machines
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        name, total, each = "mpirun", int(environ["OMPI_COMM_WORLD_SIZE"]), int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
        machines = total // each
        if total > 1 and find_spec("mpi4py") is None:
            raise ValueError("mpirun needs mpi4py: pip install mpi4py. Or start the processes by torchrun.")
    else:
        return None
    if machines * each != total:
        raise ValueError(f"{name} started {total} processes, {each} on this machine; each needs the same number.")
    return name, machines, each


def resolve_devices(devices: int | str, num_nodes: int | str) -> tuple[int | str, int]:
    """Return the devices of this machine and the number of machines, from the launcher where they are "auto".

    Raises:
        ValueError: if the launcher started other numbers than are given, with what to type.
    """
    launched = launched_processes()
    if launched is None:
        machines = 1 if num_nodes == "auto" else int(num_nodes)
        if machines > 1 and not {"MASTER_ADDR", "LSB_JOBID"} & os.environ.keys():  # it would wait for the others
            raise ValueError(
                f"num_nodes={machines} needs a launcher that starts the script on every machine, and there is none: "
                f"torchrun --nnodes {machines} --nproc-per-node GPUS --rdzv-endpoint HOST:PORT SCRIPT, or srun."
            )
        return devices, machines
    name, machines, each = launched
    for option, value, started, said in (
        ("devices", devices, each, f"{counted(each, 'process')} on this machine"),
        ("num_nodes", num_nodes, machines, counted(machines, "machine")),
    ):
        if _count(value) not in (None, started):
            raise ValueError(
                f"{name} started {said}, and {option} is {value}. "
                f'Give {option}="auto" or {option}={started} (--{option.replace("_", "-")} {started}).'
            )
    return (devices if "," in str(devices) else each), machines


def _count(value: int | str) -> int | None:
    """Return how many devices or machines a value asks for, such as 2, "2" or "0,1"; None: all that there are."""
    if str(value) in ("auto", "-1"):
        return None
    return len(str(value).strip(",").split(",")) if "," in str(value) else int(value)


def fabric_for(
    *, accelerator: str, devices: int | str, strategy: str, precision: str, num_nodes: int | str = "auto"
) -> Fabric:
    """Launch Fabric; ``strategy="fsdp"`` is torch's FSDP2, which also runs on the CPU.

    Raises:
        ValueError: for an unknown precision, or if a launcher has started other numbers of processes.
    """
    with _without_torchmetrics():
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.precision.double import DoublePrecision
        from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}. bf16 is 'bf16-mixed'.")
    if precision == "16-mixed" and (accelerator == "cpu" or not torch.accelerator.is_available()):
        raise ValueError("precision='16-mixed' needs a GPU; on a CPU use 'bf16-mixed' or '32-true'.")
    fabric_strategy: Any = strategy
    double = DoublePrecision()
    double.convert_output = _identity  # Fabric casts outputs to float32, and the loss would be computed in it
    devices, machines = resolve_devices(devices, num_nodes)
    if strategy == "fsdp":
        count = devices * machines if isinstance(devices, int) and devices > 0 else "auto"
        fabric_strategy = ModelParallelStrategy(
            parallelize_fn=_fully_shard, data_parallel_size=count, tensor_parallel_size=1
        )
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=machines,
        strategy=fabric_strategy,
        precision=None if precision == "64-true" else precision,  # pyright: ignore[reportArgumentType]
        plugins=[double] if precision == "64-true" else [],
    )
    fabric.launch()
    warn_if_bf16_emulated(precision, fabric.device)
    return fabric


@contextmanager
def _without_torchmetrics() -> Generator[None]:
    """Import lightning_fabric without torchmetrics, which it imports for its version only, in one to two seconds."""
    module: Any = imports
    compare = module.compare_version

    def compare_installed(package: str, op: Any, version: str, use_base_version: bool = False) -> bool:
        if package != "torchmetrics":
            return compare(package, op, version, use_base_version)
        return op(Version(metadata.version(package)), Version(version))

    module.compare_version = compare_installed
    try:
        yield
    finally:
        module.compare_version = compare


def _identity(data: Any) -> Any:
    return data


def _fully_shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Apply FSDP2 to every direct child that has parameters, then to the model."""
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        # a list or dict of modules has no forward for FSDP to hook
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def allow_double_backward(model: Any) -> None:
    """Allow derivatives of a model wrapped by Fabric other than by ``fabric.backward()``.

    Fabric's hook on every output rejects them, because they would bypass a loss scale.
    """
    vars(model)["_register_backward_hook"] = _identity


def peak_mb(device: torch.device) -> float:
    """Peak memory in MB: of the CUDA allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # getrusage would include the memory of the parent process
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def unknown_to_fabric(model: nn.Module) -> Generator[None]:
    """Let Fabric wrap a model that answers to every attribute: the wrapper asks it for its own ones meanwhile."""
    own = {"_fabric_module_initialized": False, "_forward_methods": frozenset[str]()}
    model.__dict__.update(own)
    try:
        yield
    finally:
        for name in own:
            del model.__dict__[name]
