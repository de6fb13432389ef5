"""Distill a small byte-level language model on any text; the teacher is trained first if it is missing.

Command:  tempering run language --text tinyshakespeare.txt --method dtkd
Sequence-level: ... --method supervised --text-source teacher --generated-fraction 1
On-policy: ... --method "divergence(objective=jsd)" --text-source on-policy --generated-fraction 0.5
Speculative: ... --method "divergence(objective=kl)" --text-source speculative --top-k 25
Pairs: ... --text dialogsum.jsonl --kind seq2seq --length 512 --max-new-tokens 200, or gsm8k.jsonl
"""

from __future__ import annotations

import gzip
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering.data import Pairs, Tokens
from tempering.data.pairs import make_pair, read_pairs
from tempering.data.text import make_prompt_example, windows
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods.logits.supervised import Supervised
from tempering.rollouts.scoring import exact_match, rouge_l
from tempering.tasks import GenerationScorer, LanguageModeling, OnPolicy, Seq2Seq, SequenceLevel, Speculative
from tempering.teachers import Teacher
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe

BYTES = 256
EOS, PAD = 256, 257  # of pairs only
SPLITS = ("train", "validation", "test")
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)


def decay(progress: float) -> float:
    """Return the factor on the learning rate: linear warm-up over the first twentieth, then linear decay to 0.1."""
    return min(1.0, progress / 0.05 + 0.05) * (1.0 - 0.9 * progress)


def main(
    *,
    text: Path,
    kind: Literal["causal", "seq2seq"] = "causal",
    eval_generation: bool = True,
    method: str = "dtkd",
    temperature: str | None = None,
    text_source: Literal["data", "teacher", "on-policy", "speculative"] = "data",
    generated_fraction: float = 0.5,
    top_k: int = 25,
    max_new_tokens: int = 32,
    prompt_length: int = 32,
    label: str | None = None,
    teacher_dir: Path | None = None,
    teacher_width: int = 256,
    teacher_layers: int = 4,
    student_width: int = 64,
    student_layers: int = 2,
    length: int = 128,
    teacher_epochs: int = 4,
    batch_size: int = 32,
    lr: float = 1e-3,
    subset: int | None = None,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=4),
) -> Experiment:
    """Distill a small byte-level GPT, or T5; the teacher is trained first, once, next to the run's folder.

    Args:
        text: any text file, plain or .gz, or .jsonl of pairs: {"dialogue", "summary"}, {"question", "answer"} or
            {"source", "target"}, of which the second is predicted. Its last tenth is validation and test, half each.
        kind: causal, or seq2seq: an encoder-decoder, for pairs.
        eval_generation: generate targets for the pairs of validation and test after every epoch. The score is exact
            match if all targets have an answer after "####", otherwise ROUGE-L.
        method: a preset or a method, such as supervised, kd, dtkd, or "divergence(objective=jsd, beta=0.1)".
        temperature: a policy in place of the method's own, such as "sharpness(2)" or "static(1)".
        text_source: source of the training texts: the data, the teacher, the student, or both by speculation.
        generated_fraction: fraction of batches that are generated, unless the source is the data.
        top_k: with speculation, a byte of the student is accepted if it is among the teacher's k most likely.
        max_new_tokens: number of bytes generated after a prompt, or as a target.
        prompt_length: number of bytes of a text that are its prompt.
        label: name of this run in tables; default: that of the method.
        teacher_dir: where trained teachers are kept; default: "teachers" next to the run's folder.
        teacher_width: width of the teacher's layers.
        teacher_layers: number of the teacher's layers.
        student_width: width of the student's layers.
        student_layers: number of the student's layers.
        length: bytes of a text; of pairs, of both together, or of each with seq2seq. Sources are truncated, and pairs
            whose target does not fit are left out.
        teacher_epochs: epochs of the teacher's training.
        batch_size: texts per step.
        lr: peak learning rate, of both.
        subset: train the student on this many bytes, or pairs, from the start of the training part.
        out: the run's folder; default: runs/language/METHOD-SOURCE-SEED. The teacher is kept in "teachers" next to it.
        config: options of training.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    out = out or Path("runs/language", f"{slug(preset.name)}-{text_source}-{config.seed}")
    load = partial(_parts, text, kind, length=length, batch_size=batch_size)
    parts, pairs = load(seed=config.seed, subset=subset), _holds_pairs(text)
    for part in parts.values():
        part.decode = _decode
    scorer = _scorer(text, max_new_tokens) if pairs and eval_generation else None
    task = Seq2Seq(scorer=scorer) if kind == "seq2seq" else LanguageModeling(scorer=scorer)
    build = partial(_net, kind, length + max_new_tokens if pairs else length, pairs)
    network, family = build(student_width, student_layers, seed=config.seed), "t5" if kind == "seq2seq" else "gpt"
    optimizer, teacher = partial(ADAMW, lr=lr), f"{family}-{teacher_layers}x{teacher_width}"
    by_teacher = text_source in ("teacher", "speculative")
    needs_teacher = loss.needs_teacher or by_teacher
    teacher_parts = load(seed=0) if needs_teacher else parts

    def train_teacher(model: nn.Module) -> Experiment:
        """Train on all texts, with seed 0."""
        return Experiment(
            student=model,
            train=teacher_parts["train"],
            test=teacher_parts["test"],
            method=Supervised(),
            task=task,
            optimizer=optimizer,
            schedule=decay,
            config=config.for_teacher(teacher_epochs),
        )

    key = {"data": teacher_parts["train"].identity, "epochs": teacher_epochs, "batch_size": batch_size, "lr": lr}
    key |= {"written": max_new_tokens} if pairs else {}
    teacher_recipe = TeacherRecipe(
        name=teacher,
        build=partial(build, teacher_width, teacher_layers, seed=0),
        train=train_teacher,
        folder=teacher_dir or out.parent / "teachers",
        key=key | config.changed("precision"),
    )
    generation: dict[str, Any] = {"generated_fraction": generated_fraction, "seed": config.seed}
    generation |= {"max_new_tokens": min(max_new_tokens, length - prompt_length), "prompt_length": prompt_length}
    generation |= {"max_new_tokens": max_new_tokens, "prompt_length": 1, "eos": EOS, "pad": PAD} if pairs else {}

    def generate_texts(experiment: Experiment, teacher: Teacher) -> Experiment:
        """Replace training texts by texts of the teacher; pass it on only if the method needs it."""
        if text_source == "teacher":
            batches = SequenceLevel(teacher, parts["train"], **generation)
        else:
            batches = Speculative(experiment.student, teacher, parts["train"], top_k=top_k, **generation)
        return replace(experiment, train=batches, teacher=teacher if loss.needs_teacher else None)

    return Experiment(
        student=network,
        teacher=teacher_recipe if needs_teacher else None,
        train=OnPolicy(network, parts["train"], **generation) if text_source == "on-policy" else parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        method=loss,
        task=task,
        optimizer=optimizer,
        schedule=decay,
        config=config,
        out=out,
        facts={
            "label": label or (preset.label if text_source == "data" else f"{preset.label}, {text_source}"),
            "student": {"name": f"{family}-{student_layers}x{student_width}"},
            "data": {"name": text.name, "identity": parts["train"].identity, "length": length, "writes": text_source},
        },
        bind_teacher=generate_texts if by_teacher else None,
    )


def _read(text: Path) -> bytes:
    data = text.read_bytes()
    return gzip.decompress(data) if text.suffix == ".gz" else data


def _holds_pairs(text: Path) -> bool:
    return ".jsonl" in text.suffixes


def _cut(data: Any, subset: int | None) -> dict[str, Any]:
    """Split into 90 % training, 5 % validation and 5 % test; keep the first ``subset`` of training."""
    cuts = (0, len(data) * 18 // 20, len(data) * 19 // 20, len(data))
    pieces = {name: data[a:b] for name, a, b in zip(SPLITS, cuts, cuts[1:], strict=False)}
    return pieces | {"train": pieces["train"][:subset]}


def _parts(
    text: Path, kind: str, *, length: int, batch_size: int, seed: int, subset: int | None = None
) -> dict[str, Tokens]:
    """Return the loaders of training, validation and test."""
    if _holds_pairs(text):
        return _pairs(text, kind, length=length, batch_size=batch_size, seed=seed, subset=subset)
    if kind == "seq2seq":
        raise ValueError(f"seq2seq needs pairs, and {text.name} is plain text. Give a .jsonl file.")
    pieces = _cut(_read(text), subset)
    if short := [name for name, piece in pieces.items() if len(piece) < length]:
        raise ValueError(
            f"the text is too short: its {short[0]} part has {len(pieces[short[0]])} bytes, length={length}."
        )
    return {
        name: Tokens(windows(piece, length), batch_size=batch_size, shuffle=name == "train", seed=seed)
        for name, piece in pieces.items()
    }


def _pairs(text: Path, kind: str, *, length: int, batch_size: int, seed: int, subset: int | None) -> dict[str, Tokens]:
    """Return loaders of pairs whose target and EOS fit into the length, with one byte of the source for causal."""
    max_target = length - 1 - (kind == "causal")
    all_pairs = [(a.encode(), b.encode()) for a, b in read_pairs(text)]
    pieces = _cut([(a, b) for a, b in all_pairs if a and 0 < len(b) <= max_target], subset)
    if short := [name for name, piece in pieces.items() if not piece]:
        raise ValueError(
            f"no pairs for {short[0]}: {sum(len(b) <= max_target for _, b in all_pairs)} of {len(all_pairs)} in "
            f"{text.name} have a target of at most {max_target} bytes. Give a larger length."
        )
    order = {name: {"batch_size": batch_size, "shuffle": name == "train", "seed": seed, "pad": PAD} for name in SPLITS}
    if kind == "causal":
        texts = {
            n: [make_prompt_example(a, b, eos=EOS, length=length) for a, b in piece] for n, piece in pieces.items()
        }
        return {name: Tokens(examples, length=length, **order[name]) for name, examples in texts.items()}
    examples = {
        n: [make_pair(a, b, eos=EOS, lengths=(length, length)) for a, b in piece] for n, piece in pieces.items()
    }
    return {n: Pairs(part, lengths=(length, length), **order[n]) for n, part in examples.items()}


def _scorer(text: Path, max_new_tokens: int) -> GenerationScorer:
    """Score by exact match if every target has an answer, as in GSM8K; otherwise by ROUGE-L."""
    answers = all("####" in target for _, target in read_pairs(text))
    score, name = (exact_match, "answers") if answers else (rouge_l, "rouge_l")
    return GenerationScorer(score, name=name, decode=_decode, eos=EOS, pad=PAD, max_new_tokens=max_new_tokens)


def _decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < BYTES).decode(errors="replace")


def _net(kind: str, length: int, pairs: bool, width: int, layers: int, *, seed: int) -> nn.Module:
    """Build a byte-level GPT-2 or T5 without dropout, with initial weights from the seed, equal for every method."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    heads = max(1, width // 32)
    if kind == "seq2seq":
        sizes: dict[str, Any] = {"d_model": width, "d_ff": 4 * width, "d_kv": width // heads, "num_layers": layers}
        config = T5Config(
            vocab_size=PAD + 1, num_heads=heads, dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, **sizes
        )
        config.decoder_start_token_id = PAD
        return T5ForConditionalGeneration(config)
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": length}
    end = EOS if pairs else 0
    vocab_size = PAD + 1 if pairs else BYTES
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=end, eos_token_id=end, **sizes, **dropouts))
