"""A small language model distilled on any text, byte by byte; the teacher is trained first where there is none.

Command:  tempering run recipes/language.py --text tinyshakespeare.txt --method dtkd
On-policy: ... --method "divergence(objective=jsd)" --writes on-policy --share 0.5
Speculative: ... --method "divergence(objective=kl)" --writes speculative --top-k 25
"""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering import Run, distill
from tempering.arms import arm_from, method_of, slug
from tempering.data import Tokens
from tempering.data.text import windows
from tempering.engine import CHECK_ONLY
from tempering.methods.supervised import Supervised
from tempering.tasks import Generation, OnPolicy, Speculative
from tempering.teachers import Live
from tempering.trained import trained

BYTES = 256
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)


def decay(progress: float) -> float:
    """Linear warm-up over the first twentieth, then linear to a tenth."""
    return min(1.0, progress / 0.05 + 0.05) * (1.0 - 0.9 * progress)


def main(
    *,
    text: Path,
    method: str = "dtkd",
    temperature: str | None = None,
    writes: Literal["data", "on-policy", "speculative"] = "data",
    share: float = 0.5,
    top_k: int = 25,
    written: int = 32,
    prompt: int = 32,
    label: str | None = None,
    teacher_width: int = 256,
    teacher_layers: int = 4,
    student_width: int = 64,
    student_layers: int = 2,
    length: int = 128,
    epochs: int = 4,
    teacher_epochs: int = 4,
    batch_size: int = 32,
    lr: float = 1e-3,
    subset: int | None = None,
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true",
    accelerator: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Distil a small byte-level GPT; the teacher is trained first, once, beside the run's folder.

    Args:
        text: any text file, plain or .gz. Its last tenth is validation and test, half each.
        method: an arm or a method, such as supervised, kd, dtkd, or "divergence(objective=jsd, beta=0.1)".
        temperature: a policy in place of the method's own, such as "sharpness(2)" or "static(1)".
        writes: who writes the texts that are learned: the data, the student, or student and teacher together.
        share: of batches that are written, where the data does not write them all.
        top_k: how far down the teacher's order a byte may stand, where both write.
        written: how many bytes are written after a prompt.
        prompt: how many bytes of a text are its prompt.
        label: what tables call this run; by itself it follows from the method.
        teacher_width: of the teacher's layers.
        teacher_layers: how many the teacher has.
        student_width: of the student's layers.
        student_layers: how many the student has.
        length: bytes of a text.
        epochs: how long; the schedule is in shares of it.
        teacher_epochs: how long the teacher is trained.
        batch_size: texts a step.
        lr: learning rate at its height, of both.
        subset: distil on this many bytes from the front of the training part.
        precision: of the training, and of the teacher's.
        accelerator: auto, cpu, cuda or mps.
        seed: of the student's first weights, the order and the draws.
        threads: of torch; by itself as many as there are cores.
        resume: go on where an earlier run in the same folder stopped; --no-resume begins again.
        out: the run's folder; by itself runs/language/METHOD-WRITER-SEED. The teacher lies in "teachers" beside it.
        quiet: no progress bar.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arm, loss = arm_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/language", f"{slug(arm.name)}-{writes}-{seed}")
    train = partial(distill, schedule=decay, precision=precision, accelerator=accelerator, resume=resume, quiet=quiet)
    train = partial(train, optimizer=partial(ADAMW, lr=lr), task=Generation())
    parts = _parts(_read(text), length=length, batch_size=batch_size, seed=seed, subset=subset)
    learner, taught, said = _gpt(student_width, student_layers, length, seed=seed), None, None
    if loss.needs_teacher or writes == "speculative":
        net, name = _gpt(teacher_width, teacher_layers, length, seed=0), f"gpt-{teacher_layers}x{teacher_width}"
        whole = _parts(_read(text), length=length, batch_size=batch_size, seed=0)
        key = {"data": whole["train"].identity, "epochs": teacher_epochs, "batch_size": batch_size, "lr": lr}
        teach = partial(
            train, net, None, whole["train"], method=Supervised(), epochs=teacher_epochs, test=whole["test"]
        )
        about: dict[str, Any] = {"label": f"teacher {name}", "student": {"name": name}}
        scores = trained(
            net, name, out.parent / "teachers", lambda place: teach(out=_place(place), facts=about), key=key
        )
        taught, said = Live(net), {"name": name, "scores": scores}
    batches: Any = parts["train"]
    own: dict[str, Any] = {"share": share, "length": min(written, length - prompt), "prompt": prompt, "seed": seed}
    if writes == "on-policy":
        batches = OnPolicy(learner, batches, **own)
    elif writes == "speculative":
        batches = Speculative(learner, taught, batches, top_k=top_k, **own)
    return train(
        learner,
        taught if loss.needs_teacher else None,
        batches,
        method=loss,
        epochs=epochs,
        validation=parts["validation"],
        test=parts["test"],
        seed=seed,
        out=_place(out),
        facts={
            "label": label or (arm.label if writes == "data" else f"{arm.label}, {writes}"),
            "student": {"name": f"gpt-{student_layers}x{student_width}"},
            "teacher": said,
            "data": {"name": text.name, "identity": parts["train"].identity, "length": length, "writes": writes},
        },
    )


def _place(out: Path) -> Path | None:
    return None if CHECK_ONLY.get() else out


def _read(text: Path) -> bytes:
    data = text.read_bytes()
    return gzip.decompress(data) if text.suffix == ".gz" else data


def _parts(data: bytes, *, length: int, batch_size: int, seed: int, subset: int | None = None) -> dict[str, Tokens]:
    """Training, validation and test texts: nine tenths of the file, and half a tenth each."""
    cuts = (0, len(data) * 18 // 20, len(data) * 19 // 20, len(data))
    pieces = {name: data[a:b] for name, a, b in zip(("train", "validation", "test"), cuts, cuts[1:], strict=False)}
    pieces["train"] = pieces["train"][:subset]
    if short := [name for name, piece in pieces.items() if len(piece) < length]:
        raise ValueError(
            f"the text is too short: its {short[0]} part has {len(pieces[short[0]])} bytes, length={length}."
        )
    return {
        name: Tokens(windows(piece, length), batch_size=batch_size, shuffle=name == "train", seed=seed)
        for name, piece in pieces.items()
    }


def _gpt(width: int, layers: int, length: int, *, seed: int) -> nn.Module:
    """A GPT-2 over bytes with the first weights of that seed, the same in every arm; without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    drops: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 32), "n_positions": length}
    return GPT2LMHeadModel(GPT2Config(vocab_size=BYTES, bos_token_id=0, eos_token_id=0, **sizes, **drops))
