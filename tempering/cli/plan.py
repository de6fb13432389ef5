"""Print the memory and the computation that a distillation of language models needs: the command `tempering plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from tempering.experiments.memory_plan import Build, StepPlan

GIB = 2**30


def plan(
    student: Annotated[str, Positional, arg(metavar="STUDENT")],
    teacher: Annotated[str | None, Positional, arg(metavar="[TEACHER]")] = None,
    *,
    batch_size: int = 8,
    length: int = 1024,
    method: str = "dtkd",
    loss: Literal["default", "logits", "chunks", "linear"] = "default",
    precision: Literal["32-true", "bf16-true", "bf16-mixed"] = "bf16-mixed",
    teacher_precision: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    optimizer: Literal["adamw", "sgd", "adamw8bit"] = "adamw",
    checkpointing: bool = False,
    lora: int | None = None,
    processes: int = 1,
    device_memory: float | None = None,
) -> int:
    """Print the memory, operations and network traffic of a step of distillation, from the models' configs alone.

    tempering plan Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-7B --length 2048 --checkpointing --device-memory 80

    No weights are read or allocated: both models run on tensors without values. STUDENT and TEACHER are folders with a
    config.json, or names on the Hugging Face Hub, of causal language models of transformers. Without TEACHER its
    outputs come from a cache or a server. Leave 10 to 20 % of a device for its context and for fragmentation. Exits
    with 1 if the step does not fit into --device-memory, sharded if there are several processes.

    Args:
        student: the model that is trained.
        teacher: the model that it is distilled from.
        batch_size: texts per device and micro-batch.
        length: tokens per text.
        method: a preset or a method (see `tempering list`).
        loss: "chunks" and "linear" never hold copies of all logits; "default" is what the engine chooses.
        precision: of the student; bf16-mixed has float32 weights.
        teacher_precision: of the teacher's weights.
        optimizer: AdamW, SGD with momentum, or AdamW with a state of 8 bits.
        checkpointing: compute the student's activations again in backward (gradient checkpointing).
        lora: train adapters of this rank on all linear layers (PEFT) instead of the weights.
        processes: devices that share the work.
        device_memory: of one device, in GiB.
    """
    import torch
    from rich.console import Console

    from tempering.experiments.memory_plan import plan_step
    from tempering.experiments.presets import method_of

    if processes < 1:
        raise ValueError(f"--processes is the number of devices, >= 1; got {processes}.")
    made = plan_step(
        builder(student, lora),
        None if teacher is None else builder(teacher),
        batch_size=batch_size,
        length=length,
        method=method_of(method),
        loss=loss,
        precision=precision,
        teacher_dtype=getattr(torch, teacher_precision),
        optimizer=optimizer,
        checkpointing=checkpointing,
    )
    console = Console()
    console.print(
        _table(made), *_lines(made, batch_size * length, processes), sep="\n", highlight=False, soft_wrap=True
    )
    needed = made.sharded(processes)
    if device_memory is None or needed <= device_memory * GIB:
        return 0
    console.print(
        f"does not fit: {needed / GIB:.1f} GiB of {device_memory:g} GiB. {_advice(made, checkpointing, loss)}"
    )
    return 1


def builder(name: str, lora: int | None = None) -> Build:
    """Return a function that builds the causal language model of a folder or a name in a dtype.

    Raises:
        ValueError: for a folder without a config.json, or a config that is not of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json; a folder that model.save_pretrained() wrote has one.")
    config = AutoConfig.from_pretrained(name)

    def build(dtype: torch.dtype) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if lora is None:
            return model
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=lora, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, adapters, autocast_adapter_dtype=False)

    return build


def _table(made: StepPlan) -> object:
    from rich.table import Table

    table = Table(title="Memory of one step on one device", title_justify="left")
    table.add_column("part")
    table.add_column("memory", justify="right")
    parts = {
        f"student, {_count(made.parameters)} parameters": made.weights,
        f"gradients, {_count(made.trained)} trained": made.gradients,
        "optimizer": made.optimizer,
        f"teacher, {_count(made.teacher_parameters)} parameters": made.teacher,
        f"activations, logits, loss ({made.loss}, {made.rows:,} rows)": made.working,
        "together": made.peak,
    }
    for name, taken in parts.items():
        table.add_row(name, size(taken))
    return table


def _lines(made: StepPlan, tokens: int, processes: int) -> list[str]:
    lines = [f"operations: {made.flops / 1e12:,.2f} TFLOP a step, {made.flops / tokens / 1e9:,.2f} GFLOP a token"]
    if processes > 1:
        share = (processes - 1) / processes
        lines += [
            f"DDP over {processes} devices: {size(2 * share * made.gradients)} sent by each in a step",
            f"FSDP2 over {processes} devices: {size(made.sharded(processes))} of memory each, "
            f"{size(share * (2 * made.weights + made.teacher + made.gradients))} received by each in a step",
        ]
    return lines


def _advice(made: StepPlan, checkpointing: bool, loss: str) -> str:
    """Say what would take less of the largest part."""
    if made.working >= max(made.teacher, made.weights + made.gradients + made.optimizer):
        options = ["a smaller --batch-size"] + ["--checkpointing"] * (not checkpointing)
        return "Try " + " or ".join([*options, *["--loss linear"] * (loss != "linear")]) + "."
    if made.teacher >= made.weights + made.gradients + made.optimizer:
        return "Record the teacher first (docs/language.md), or serve it: the plan without TEACHER shows what remains."
    return "Try --lora 16, --optimizer adamw8bit, --precision bf16-true or more --processes."


def size(taken: float) -> str:
    """Return bytes in words, as "1.25 GiB"."""
    for unit, one in (("GiB", GIB), ("MiB", 2**20)):
        if taken >= one:
            return f"{taken / one:,.2f} {unit}"
    return f"{taken / 2**10:,.2f} KiB"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
