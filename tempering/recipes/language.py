"""A small language model distilled on any text, byte by byte; the teacher is trained first where there is none.

Command:  tempering run recipes/language.py --text tinyshakespeare.txt --method dtkd
Sequence-level: ... --method supervised --writes teacher --share 1
On-policy: ... --method "divergence(objective=jsd)" --writes on-policy --share 0.5
Speculative: ... --method "divergence(objective=kl)" --writes speculative --top-k 25
Pairs: ... --text dialogsum.jsonl --kind seq2seq --length 512 --written 200, or gsm8k.jsonl
"""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering import Run, distill
from tempering.data import Pairs, Tokens
from tempering.data.pairs import make_pair, read_pairs
from tempering.data.text import make_prompt_example, windows
from tempering.experiments.presets import arm_from, method_of, slug
from tempering.methods.logits.supervised import Supervised
from tempering.rollouts.scoring import exact_match, rouge_l
from tempering.tasks import GenerationScorer, LanguageModeling, OnPolicy, Seq2Seq, SequenceLevel, Speculative
from tempering.teachers import Live
from tempering.training.distill import CHECK_ONLY
from tempering.training.pretrained import trained

BYTES = 256
EOS, PAD = 256, 257  # of pairs; a running text has no end
SPLITS = ("train", "validation", "test")
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)


def decay(progress: float) -> float:
    """Linear warm-up over the first twentieth, then linear to a tenth."""
    return min(1.0, progress / 0.05 + 0.05) * (1.0 - 0.9 * progress)


def main(
    *,
    text: Path,
    kind: Literal["causal", "seq2seq"] = "causal",
    grade: bool = True,
    method: str = "dtkd",
    temperature: str | None = None,
    writes: Literal["data", "teacher", "on-policy", "speculative"] = "data",
    share: float = 0.5,
    top_k: int = 25,
    written: int = 32,
    prompt: int = 32,
    label: str | None = None,
    teacher_dir: Path | None = None,
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
    """Distil a small byte-level GPT, or T5; the teacher is trained first, once, beside the run's folder.

    Args:
        text: any text file, plain or .gz, or .jsonl of pairs: {"dialogue", "summary"}, {"question", "answer"} or
            {"source", "target"}, of which the second is learned. Its last tenth is validation and test, half each.
        kind: causal, or seq2seq: an encoder-decoder, for pairs.
        grade: let the student answer the pairs of validation and test after every epoch. The score is the share of
            right answers where all have one behind "####", else ROUGE-L.
        method: an arm or a method, such as supervised, kd, dtkd, or "divergence(objective=jsd, beta=0.1)".
        temperature: a policy in place of the method's own, such as "sharpness(2)" or "static(1)".
        writes: who writes the texts that are learned: the data, the teacher, the student, or both of them together.
        share: of batches that are written, where the data does not write them all.
        top_k: how far down the teacher's order a byte may stand, where both write.
        written: how many bytes are written after a prompt, or as an answer.
        prompt: how many bytes of a text are its prompt.
        label: what tables call this run; by itself it follows from the method.
        teacher_dir: where trained teachers are kept and found again; by itself "teachers" beside the run's folder.
        teacher_width: of the teacher's layers.
        teacher_layers: how many the teacher has.
        student_width: of the student's layers.
        student_layers: how many the student has.
        length: bytes of a text; of pairs, of the two together, or of each with seq2seq. Sources are cut, and pairs
            whose target does not fit are left out.
        epochs: how long; the schedule is in shares of it.
        teacher_epochs: how long the teacher is trained.
        batch_size: texts a step.
        lr: learning rate at its height, of both.
        subset: distil on this many bytes, or pairs, from the front of the training part.
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
    split = partial(_parts, text, kind, length=length, batch_size=batch_size)
    parts, pairs = split(seed=seed, subset=subset), _holds_pairs(text)
    graded = _graded(text, written) if pairs and grade else None
    task = Seq2Seq(scorer=graded) if kind == "seq2seq" else LanguageModeling(scorer=graded)
    train = partial(train, optimizer=partial(ADAMW, lr=lr), task=task)
    family, build = (
        "t5" if kind == "seq2seq" else "gpt",
        partial(_net, kind, length + written if pairs else length, pairs),
    )
    learner, taught, said = build(student_width, student_layers, seed=seed), None, None
    if loss.needs_teacher or writes in ("teacher", "speculative"):
        net, name = build(teacher_width, teacher_layers, seed=0), f"{family}-{teacher_layers}x{teacher_width}"
        whole = split(seed=0)
        key = {"data": whole["train"].identity, "epochs": teacher_epochs, "batch_size": batch_size, "lr": lr}
        key |= {"written": written} if pairs else {}
        teach = partial(
            train, net, None, whole["train"], method=Supervised(), epochs=teacher_epochs, test=whole["test"]
        )
        about: dict[str, Any] = {"label": f"teacher {name}", "student": {"name": name}}
        scores = trained(
            net,
            name,
            teacher_dir or out.parent / "teachers",
            lambda place: teach(out=_place(place), facts=about),
            key=key,
        )
        taught, said = Live(net), {"name": name, "scores": scores}
    batches: Any = parts["train"]
    own: dict[str, Any] = {"share": share, "length": min(written, length - prompt), "prompt": prompt, "seed": seed}
    own |= {"length": written, "prompt": 1, "eos": EOS, "pad": PAD} if pairs else {}
    if writes == "teacher":
        batches = SequenceLevel(taught, batches, **own)
    elif writes == "on-policy":
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
            "student": {"name": f"{family}-{student_layers}x{student_width}"},
            "teacher": said,
            "data": {"name": text.name, "identity": parts["train"].identity, "length": length, "writes": writes},
        },
    )


def _place(out: Path) -> Path | None:
    return None if CHECK_ONLY.get() else out


def _read(text: Path) -> bytes:
    data = text.read_bytes()
    return gzip.decompress(data) if text.suffix == ".gz" else data


def _holds_pairs(text: Path) -> bool:
    return ".jsonl" in text.suffixes


def _cut(data: Any, subset: int | None) -> dict[str, Any]:
    """Training, validation and test: nine tenths of the whole, and half a tenth each."""
    cuts = (0, len(data) * 18 // 20, len(data) * 19 // 20, len(data))
    pieces = {name: data[a:b] for name, a, b in zip(SPLITS, cuts, cuts[1:], strict=False)}
    return pieces | {"train": pieces["train"][:subset]}


def _parts(
    text: Path, kind: str, *, length: int, batch_size: int, seed: int, subset: int | None = None
) -> dict[str, Tokens]:
    """Training, validation and test texts, or pairs."""
    if _holds_pairs(text):
        return _pairs(text, kind, length=length, batch_size=batch_size, seed=seed, subset=subset)
    if kind == "seq2seq":
        raise ValueError(f"seq2seq learns pairs, and {text.name} is a running text. Give a .jsonl file.")
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
    """Pairs of bytes whose target, with its end, fits into the length; beside one byte of the source, for causal."""
    room = length - 1 - (kind == "causal")
    found = [(a.encode(), b.encode()) for a, b in read_pairs(text)]
    pieces = _cut([(a, b) for a, b in found if a and 0 < len(b) <= room], subset)
    if short := [name for name, piece in pieces.items() if not piece]:
        raise ValueError(
            f"no pairs for {short[0]}: of {len(found)} in {text.name} {sum(len(b) <= room for _, b in found)} have a "
            f"target of at most {room} bytes. Give a larger length."
        )
    order = {name: {"batch_size": batch_size, "shuffle": name == "train", "seed": seed, "pad": PAD} for name in SPLITS}
    if kind == "causal":
        texts = {
            n: [make_prompt_example(a, b, eos=EOS, length=length) for a, b in piece] for n, piece in pieces.items()
        }
        return {name: Tokens(held, length=length, **order[name]) for name, held in texts.items()}
    both = {n: [make_pair(a, b, eos=EOS, lengths=(length, length)) for a, b in piece] for n, piece in pieces.items()}
    return {name: Pairs(held, lengths=(length, length), **order[name]) for name, held in both.items()}


def _graded(text: Path, written: int) -> GenerationScorer:
    """Exact answers where every target has one, as GSM8K's do; else ROUGE-L."""
    answers = all("####" in target for _, target in read_pairs(text))
    score, name = (exact_match, "answers") if answers else (rouge_l, "rouge_l")
    return GenerationScorer(score, name=name, decode=_decode, eos=EOS, pad=PAD, length=written)


def _decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < BYTES).decode(errors="replace")


def _net(kind: str, length: int, pairs: bool, width: int, layers: int, *, seed: int) -> nn.Module:
    """A GPT-2 or T5 over bytes with the first weights of that seed, the same in every arm; without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    heads = max(1, width // 32)
    if kind == "seq2seq":
        own: dict[str, Any] = {"d_model": width, "d_ff": 4 * width, "d_kv": width // heads, "num_layers": layers}
        config = T5Config(
            vocab_size=PAD + 1, num_heads=heads, dropout_rate=0.0, pad_token_id=PAD, eos_token_id=EOS, **own
        )
        config.decoder_start_token_id = PAD
        return T5ForConditionalGeneration(config)
    drops: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": length}
    end = EOS if pairs else 0
    known = PAD + 1 if pairs else BYTES
    return GPT2LMHeadModel(GPT2Config(vocab_size=known, bos_token_id=end, eos_token_id=end, **sizes, **drops))
