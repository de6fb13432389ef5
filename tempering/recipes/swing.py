"""Distill a language model on a text with planted canaries, and measure their exposure (Swing Distillation).

Command:  tempering run swing --method swing
Table:    tempering compare swing --methods kd,swing,redacted --seeds 3 --control KD
Report:   tempering audit RUN --privacy && tempering report RUN
"""

from __future__ import annotations

import gzip
import hashlib
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempering.audits.base import frozen_eval_mode
from tempering.audits.canaries import Canaries
from tempering.data import Tokens
from tempering.data.canaries import canaries, insert_canaries
from tempering.data.privacy import Patterns, byte_offsets, scores
from tempering.data.text import windows
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods.logits.supervised import Supervised
from tempering.tasks import LanguageModeling
from tempering.tasks.base import TeacherForward
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe

BYTES = 256
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)
WORDS = {
    "who": "the cat,a small bird,my sister,the old baker,one sailor,a girl with a kite,the grey horse,his friend",
    "did": "found,carried,painted,forgot,looked for,shared,dropped,sang about",
    "what": "a red ball,the long rope,some warm bread,her best hat,a shiny stone,the broken boat,an apple,a letter",
    "where": "by the river,in the park,on the hill,under a tree,at the market,behind the house,near the sea,in town",
}


class Exposing(LanguageModeling):
    """Language modeling whose scores include the exposure of the loader's canaries."""

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        scores = super().score(student, batches, teacher=teacher)
        planted = getattr(batches, "canaries", ())
        if planted:
            with frozen_eval_mode(student):
                scores |= Canaries(planted).means(student)
        return scores


def decay(progress: float) -> float:
    """Return the factor on the learning rate: linear warm-up over the first twentieth, then linear decay to 0.1."""
    return min(1.0, progress / 0.05 + 0.05) * (1.0 - 0.9 * progress)


def main(
    *,
    text: Path | None = None,
    method: str = "swing",
    temperature: str | None = None,
    canaries_per_count: int = 5,
    canary_digits: int = 3,
    privacy_detectors: str = "number",
    label: str | None = None,
    subset: int | None = 100_000,
    teacher_width: int = 128,
    teacher_layers: int = 2,
    student_width: int = 64,
    student_layers: int = 2,
    length: int = 64,
    teacher_epochs: int = 12,
    batch_size: int = 32,
    lr: float = 3e-3,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=8, evaluate_every=8),
) -> Experiment:
    """Distill a small byte-level GPT on a text with planted canaries; the teacher is trained on it first.

    Every seed has its own canaries and its own teacher, so that the spread over seeds includes the choice of canaries.

    Args:
        text: any text file, plain or .gz, whose last tenth is validation and test, half each; default: generated text.
        method: a preset or a method, such as kd, swing, redacted, or "swing(noise=0)".
        temperature: a policy in place of the method's own, such as "private(sharpness(4), high=10)".
        canaries_per_count: number of canaries for each number of repeats, which are 0, 1, 10 and 100.
        canary_digits: number of digits of a canary; 3 digits give 1000 candidates.
        privacy_detectors: kinds of text that are marked as private, separated by commas (``data.privacy.KINDS``).
        label: name of this run in tables; default: that of the method.
        subset: use this many bytes from the start of the text; None for all.
        teacher_width: width of the teacher's layers.
        teacher_layers: number of the teacher's layers.
        student_width: width of the student's layers.
        student_layers: number of the student's layers.
        length: bytes of a text.
        teacher_epochs: epochs of the teacher's training.
        batch_size: texts per step.
        lr: peak learning rate, of both.
        out: the run's folder; default: runs/swing/METHOD-SEED. The teacher is kept in "teachers" next to it.
        config: options of training. The seed also selects the canaries and their positions.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    out, seed = out or Path("runs/swing", f"{slug(preset.name)}-{config.seed}"), config.seed
    content, detector = _read(text, subset), Patterns(kinds=privacy_detectors.split(","))
    sizes = {"length": length, "batch_size": batch_size, "seed": seed}
    parts: dict[str, Any] = _parts(content, detector, canaries_per_count, canary_digits, **sizes)
    network, name = _gpt(student_width, student_layers, length, seed=seed), f"gpt-{teacher_layers}x{teacher_width}"
    optimizer = partial(ADAMW, lr=lr)
    teacher_config = replace(config.for_teacher(teacher_epochs), seed=seed, evaluate_every=teacher_epochs)

    def train_teacher(model: nn.Module) -> Experiment:
        return Experiment(
            student=model,
            **parts,
            method=Supervised(),
            task=Exposing(),
            optimizer=optimizer,
            schedule=decay,
            config=teacher_config,
        )

    key = {"data": parts["train"].identity, "epochs": teacher_epochs, "batch": batch_size, "lr": lr, "seed": seed}
    teacher_recipe = TeacherRecipe(
        name=name,
        build=partial(_gpt, teacher_width, teacher_layers, length, seed=seed),
        train=train_teacher,
        folder=out.parent / "teachers",
        key=key | config.changed("precision"),
    )
    secrets = parts["train"].canaries
    repeats = sorted({secret.repeats for secret in secrets})
    return Experiment(
        student=network,
        teacher=teacher_recipe if loss.needs_teacher else None,
        **parts,
        method=loss,
        task=Exposing(),
        optimizer=optimizer,
        schedule=decay,
        config=config,
        out=out,
        facts={
            "label": label or preset.label,
            "student": {"name": f"gpt-{student_layers}x{student_width}"},
            "data": {
                "name": "made up" if text is None else text.name,
                # of the text without canaries, equal for every seed
                "identity": hashlib.sha256(content.encode()).hexdigest(),
                "canaries": {f"{n}x": sum(secret.repeats == n for secret in secrets) for n in repeats},
            },
            "columns": ["test/exposure", *(f"test/exposure_{n}x" for n in repeats), "test/loss"],
        },
    )


def _read(text: Path | None, subset: int | None) -> str:
    if text is None:
        return _synthetic_text(subset or 100_000)
    data = text.read_bytes()
    return (gzip.decompress(data) if text.suffix == ".gz" else data)[:subset].decode(errors="ignore")


def _synthetic_text(size: int) -> str:
    """Generate random sentences, one per line, equal in every run."""
    rng, words = random.Random(0), [part.split(",") for part in WORDS.values()]
    lines: list[str] = []
    while sum(map(len, lines)) < size:
        lines += [" ".join(rng.choice(choices) for choices in words) + ".\n" for _ in range(100)]
    return "".join(lines)[:size]


def _parts(
    text: str, detector: Patterns, each: int, digits: int, *, length: int, batch_size: int, seed: int
) -> dict[str, Tokens]:
    """Split the text: 90 % training, with canaries, and 5 % each validation and test, without."""
    cuts = (0, len(text) * 18 // 20, len(text) * 19 // 20, len(text))
    pieces = {name: text[a:b] for name, a, b in zip(("train", "validation", "test"), cuts, cuts[1:], strict=False)}
    if short := [name for name, piece in pieces.items() if len(piece) < length]:
        raise ValueError(
            f"the text is too short: its {short[0]} part has {len(pieces[short[0]])} characters, length={length}."
        )
    secrets = canaries(each=each, digits=digits, seed=seed)
    pieces["train"] = insert_canaries(pieces["train"], secrets, seed=seed)
    loaders = {}
    for name, piece in pieces.items():
        privacy = scores(piece, byte_offsets(piece), detector) if name == "train" else None
        texts = windows(list(piece.encode()), length, privacy_score=privacy)
        known = () if name == "validation" else secrets  # whose exposure is measured with the split
        loaders[name] = Tokens(texts, batch_size=batch_size, shuffle=name == "train", seed=seed, canaries=known)
    return loaders


def _gpt(width: int, layers: int, length: int, *, seed: int) -> nn.Module:
    """Build a byte-level GPT-2 without dropout, with initial weights from the seed, equal for every method."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": max(1, width // 32), "n_positions": length}
    return GPT2LMHeadModel(GPT2Config(vocab_size=BYTES, bos_token_id=0, eos_token_id=0, **sizes, **dropouts))
