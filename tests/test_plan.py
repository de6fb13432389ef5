"""Plans of a step's memory and operations, against the peaks of the same step with values."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tempering as kd
from tempering.cli.main import main
from tempering.conformance.memory import peak_bytes
from tempering.experiments.memory_plan import Loss, logit_copies, plan_step
from tempering.kernels import chunked
from tempering.methods import CSKD, DKD, DTKD, KD, Method  # pyright: ignore[reportAttributeAccessIssue]
from tempering.training.gradient_checkpointing import gradient_checkpointing

BATCH, LENGTH, VOCABULARY, CHUNK = 2, 48, 900, 2**16


def build(dtype: torch.dtype, hidden: int = 48, layers: int = 3) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes: Any = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads), dtype=dtype)


def measured(method: Method, loss: Loss, *, checkpointing: bool) -> int:
    """The peak of a step with values beside the weights, gradients included."""
    student, teacher = build(torch.float32).train(), build(torch.float32, 64, 2).eval()
    task = kd.tasks.LanguageModeling()
    task.prepare_model(student)
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH))
    ids[0, -4:] = 0  # padding, so that the attention has a mask, as a batch of several texts has
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": (ids > 0).long()}

    def rows() -> kd.Rows:
        with torch.no_grad():
            theirs = teacher(ids, batch["attention_mask"], use_cache=False)
        (made,) = task.rows(student(ids, batch["attention_mask"], use_cache=False), theirs, batch)
        return made

    def step() -> None:
        held = rows()  # as the engine holds them until it has logged the step
        if loss == "chunks":
            chunked(method, held, memory=CHUNK, compile=False).loss.backward()
        else:
            kd.total(method(held), held).backward()

    def linear() -> None:
        with torch.no_grad():
            theirs = teacher.get_decoder()(ids).last_hidden_state[:, 1:].flatten(0, 1)
        ours = student.get_decoder()(ids, use_cache=False).last_hidden_state[:, 1:].flatten(0, 1)
        heads = student.lm_head, teacher.lm_head
        target = ids[:, 1:].flatten()
        options: Any = {"memory": CHUNK, "compile": False, "target": target}
        kd.kernels.linear_loss(method, ours, heads[0], theirs, heads[1], **options).loss.backward()

    with gradient_checkpointing(student, nullcontext()) if checkpointing else nullcontext():
        return peak_bytes(linear if loss == "linear" else step)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", ["logits", "chunks", "linear"])
def test_plan_is_the_measured_peak(loss: Loss, checkpointing: bool) -> None:
    method = DTKD()
    made = plan_step(
        build,
        partial(build, hidden=64, layers=2),
        batch_size=BATCH,
        length=LENGTH,
        method=method,
        loss=loss,
        precision="32-true",
        teacher_dtype=torch.float32,
        checkpointing=checkpointing,
        memory=CHUNK,
    )
    peak = measured(method, loss, checkpointing=checkpointing)
    assert made.gradients + made.working == pytest.approx(peak, rel=0.06)
    student = build(torch.float32)
    assert made.parameters == made.trained == sum(p.numel() for p in student.parameters())
    assert made.loss == loss


def test_operations_are_those_of_the_products() -> None:
    alone = plan_step(build, None, batch_size=BATCH, length=LENGTH, method=KD(), precision="32-true")
    both = plan_step(build, build, batch_size=BATCH, length=LENGTH, method=KD(), precision="32-true")
    products = sum(p.numel() for n, p in build(torch.float32).named_parameters() if p.ndim == 2 and "embed" not in n)
    forward = 2 * BATCH * LENGTH * products
    assert both.flops - alone.flops == pytest.approx(forward, rel=0.1)  # attention is the rest
    assert alone.flops == pytest.approx(3 * forward, rel=0.1)
    linear = plan_step(build, build, batch_size=BATCH, length=LENGTH, method=KD(), precision="32-true", loss="linear")
    assert linear.flops == pytest.approx(both.flops, rel=0.03)  # the first token of a text has no row
    assert both.teacher == pytest.approx(2 * both.teacher_parameters, rel=1e-3)  # bfloat16, and the rotary table
    assert both.optimizer == 2 * both.gradients == 8 * both.trained
    assert alone.teacher == 0


def test_mixed_precision_halves_activations_and_keeps_weights() -> None:
    sizes: Any = {"batch_size": BATCH, "length": LENGTH, "method": KD()}
    full, mixed, half = (plan_step(build, None, precision=p, **sizes) for p in ("32-true", "bf16-mixed", "bf16-true"))
    assert full.weights == mixed.weights == pytest.approx(2 * half.weights, rel=0.01)
    assert half.working < mixed.working < full.working


def test_sharding_divides_what_is_shared() -> None:
    made = plan_step(build, build, batch_size=1, length=8, method=KD())
    shared = made.weights + made.gradients + made.optimizer + made.teacher
    assert made.sharded(1) == made.peak
    assert made.sharded(4) == -(-shared // 4) + made.accumulating + 2 * made.largest
    assert made.largest >= 4 * 48 * VOCABULARY  # the embeddings, in float32


def test_a_loss_that_chunks_cannot_compute_is_refused_or_whole() -> None:
    sizes: Any = {"batch_size": 8, "length": 1024, "method": CSKD()}
    with pytest.raises(ValueError, match="loss='logits'"):
        plan_step(build, None, loss="linear", **sizes)
    assert plan_step(partial(build, layers=1), None, **sizes).loss == "logits"
    assert plan_step(partial(build, layers=1), None, **(sizes | {"method": DKD()})).loss == "chunks"
    assert logit_copies(CSKD()) > logit_copies(KD())
    with pytest.raises(ValueError, match="length >= 2"):
        plan_step(build, None, batch_size=1, length=1, method=KD())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
def test_the_command_prints_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "net"
    build(torch.float32).config.save_pretrained(folder)
    assert main(["plan", str(folder), str(folder), "--batch-size", "2", "--length", "32", "--processes", "2"]) == 0
    printed = capsys.readouterr().out
    assert "teacher, 149 K parameters" in printed
    assert "FSDP2 over 2 devices" in printed
    flags = ["--batch-size", "2", "--length", "32", "--device-memory", "0.0001", "--lora", "4"]
    assert main(["plan", str(folder), *flags]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main(["plan", str(tmp_path)]) == 1
    assert "no config.json" in capsys.readouterr().err
