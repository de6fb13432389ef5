"""Distill a small text classifier on data in GLUE's format; the teacher is trained first if it is missing.

Command:  tempering run glue --data DIR --method dtkd
Table:    tempering compare glue --methods supervised,kd,dtkd,interactive --seeds 3 --out OUT -- --data DIR
Names:    ... --teacher textattack/bert-base-uncased-SST-2 --teacher-epochs 0 --student 4x128

DIR holds train.jsonl and dev.jsonl or test.jsonl, plain or .gz: one object per line, with a text ("sentence") or two
("sentence1" and "sentence2", "premise" and "hypothesis", ...) and an integer "label".
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempering.data.glue import TextPairLoader, read_glue, trained_tokenizer
from tempering.experiments.presets import method_of, preset_from, slug
from tempering.methods.base import Method
from tempering.methods.logits.supervised import Supervised
from tempering.tasks import TextClassification
from tempering.training.config import TrainConfig
from tempering.training.experiment import Experiment, TeacherRecipe
from tempering.training.logit_cache import LogitCache

SIZE = re.compile(r"(\d+)x(\d+)")  # a network that is built here: layers x width
BUILT_LR, LOADED_LR = 5e-4, 2e-5
ADAMW = partial(torch.optim.AdamW, weight_decay=0.01)


def decay(progress: float) -> float:
    """Return the factor on the learning rate: linear warm-up over the first tenth, then linear decay to 0."""
    return min(progress / 0.1 + 0.02, 1.0) * min(1.0, (1.0 - progress) / 0.9)


def main(
    *,
    data: Path,
    method: str = "dtkd",
    temperature: str | None = None,
    label: str | None = None,
    teacher: str = "4x128",
    student: str = "2x64",
    teacher_epochs: int = 4,
    batch_size: int = 32,
    lr: float | None = None,
    teacher_lr: float | None = None,
    dropout: float = 0.1,
    length: int = 64,
    vocabulary: int = 4000,
    train_file: str = "train",
    subset: int | None = None,
    validation: int = 0,
    teacher_cache: bool = False,
    out: Path | None = None,
    config: TrainConfig = TrainConfig(epochs=8),
) -> Experiment:
    """Distill a text classifier; the teacher is trained first, once, next to the run's folder.

    Args:
        data: folder of train.jsonl and dev.jsonl or test.jsonl, plain or .gz.
        method: a preset or a method, such as supervised, kd, dtkd, or "interactive(holdout=500, teacher_lr=1e-4)".
        temperature: a policy in place of the method's own, such as "sharpness(2)" or "static(1)".
        label: name of this run in tables; default: that of the method.
        teacher: LAYERSxWIDTH of a BERT that is built here, a name on the Hugging Face Hub, or a folder.
        student: the student's network, in the same form.
        teacher_epochs: epochs of the teacher's training, on all training texts; 0 uses a named one as it is.
        batch_size: texts per step.
        lr: peak learning rate of the student; default: 5e-4, or 2e-5 for a named network.
        teacher_lr: peak learning rate of the teacher's training, with the same default. Interactive has its own.
        dropout: of networks that are built here.
        length: maximum number of tokens of a text.
        vocabulary: size of the tokenizer that is trained here, on the training texts; a named network uses its own.
        train_file: name of the training file, without its extension.
        subset: train the student on this many texts, classes in proportion; default: all. The teacher uses all.
        validation: training texts held out to select the best epoch, if there is no dev file with a test file.
        teacher_cache: cache the teacher's logits of the training texts.
        out: the run's folder; default: runs/glue/DATA/METHOD-SEED. The teacher is kept in "teachers" next to it.
        config: options of training.
    """
    preset, loss = preset_from(method, temperature), method_of(method, temperature)
    _check_cacheable(loss, teacher_cache)
    out = out or Path("runs/glue", data.resolve().name, f"{slug(preset.name)}-{config.seed}")
    parts = read_glue(data, train=train_file)
    tokenizers = _tokenizers(student, teacher if loss.needs_teacher else None, parts["train"].texts, vocabulary)
    read = partial(_splits, data.resolve().name, parts, tokenizers, batch_size, length, validation)
    splits: dict[str, Any] = read(seed=config.seed)
    all_texts, classes = splits["train"], splits["train"].classes
    splits["train"] = all_texts if subset is None else all_texts.subset(subset)
    build = partial(_build, classes=classes, length=length, dropout=dropout)
    network, rate = build(student, tokenizers["student"], seed=config.seed), teacher_lr or _default_lr(teacher)
    teacher_name, folder = _name(teacher), out.parent / "teachers"

    def train_teacher(model: nn.Module) -> Experiment:
        """Train on all training texts, with seed 0."""
        teacher_splits: dict[str, Any] = {split: part.read_by_teacher() for split, part in read(seed=0).items()}
        return Experiment(
            student=model,
            **teacher_splits,
            method=Supervised(),
            task=TextClassification(),
            optimizer=partial(ADAMW, lr=rate),
            schedule=decay,
            config=config.for_teacher(teacher_epochs),
            facts={
                "label": f"teacher {teacher_name}",
                "student": {"name": teacher_name},
                "data": _facts(teacher_splits),
            },
        )

    key = {"epochs": teacher_epochs, "batch_size": batch_size, "lr": rate, "dropout": dropout, "length": length}
    teacher_recipe = TeacherRecipe(
        name=slug(teacher_name),
        build=partial(build, teacher, tokenizers.get("teacher", tokenizers["student"]), seed=0),
        train=train_teacher if teacher_epochs or _is_built(teacher) else None,
        folder=folder,
        key=key | {"data": all_texts.identity, "precision": config.precision},
        cache=LogitCache(batches=splits["train"], folder=folder, quiet=config.quiet) if teacher_cache else None,
        facts={"name": teacher_name},
    )
    return Experiment(
        student=network,
        teacher=teacher_recipe if loss.needs_teacher else None,
        **splits,
        method=loss,
        task=TextClassification(),
        optimizer=partial(ADAMW, lr=lr or _default_lr(student)),
        schedule=decay,
        config=config,
        out=out,
        facts={"label": label or preset.label, "student": {"name": _name(student)}, "data": _facts(splits)},
    )


def _check_cacheable(loss: Method, teacher_cache: bool) -> None:
    """Check that the method neither trains the teacher nor differentiates through it, if its logits are cached."""
    if teacher_cache and loss.needs_live:
        reason = "trains its teacher" if loss.trains_teacher else "differentiates through its teacher"
        raise ValueError(f"{type(loss).__name__} {reason}, so its logits cannot be cached. Omit --teacher-cache.")


def _tokenizers(student: str, teacher: str | None, texts: list[tuple[str, ...]], vocabulary: int) -> dict[str, Any]:
    """Return the student's tokenizer, and the teacher's if it differs. Networks that are built here share one."""
    built = trained_tokenizer(texts, vocabulary=vocabulary) if _is_built(student) or _is_built(teacher) else None

    def tokenizer(name: str) -> Any:
        if _is_built(name):
            return built
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    own = tokenizer(student)
    other = own if teacher is None else tokenizer(teacher)
    equal = other is own or (type(other), other.get_vocab()) == (type(own), own.get_vocab())
    return {"student": own} if equal else {"student": own, "teacher": other}


def _splits(
    name: str,
    parts: dict[str, Any],
    tokenizers: dict[str, Any],
    batch_size: int,
    length: int,
    validation: int,
    *,
    seed: int,
) -> dict[str, TextPairLoader]:
    """Return a loader of every split; that of the training split is shuffled."""
    options = {"teacher_tokenizer": tokenizers.get("teacher"), "batch_size": batch_size, "length": length, "name": name}
    loaders = {
        split: TextPairLoader(part, tokenizers["student"], shuffle=split == "train", seed=seed, **options)
        for split, part in parts.items()
    }
    if validation and "validation" in loaders:
        raise ValueError(
            f"{name} has its own validation split ({loaders['validation'].size} texts). Omit --validation."
        )
    if validation:
        loaders["train"], loaders["validation"] = loaders["train"].split(validation)
    return loaders


def _facts(splits: dict[str, TextPairLoader]) -> dict[str, Any]:
    """Return the facts of the data for records."""
    train = splits["train"]
    sizes = {split: splits[split].size if split in splits else 0 for split in ("train", "validation", "test")}
    return {"name": train.name, **sizes, "classes": train.classes, "identity": train.identity, "length": train.length}


def _is_built(name: str | None) -> bool:
    return name is not None and SIZE.fullmatch(name) is not None


def _name(name: str) -> str:
    return f"bert-{name}" if _is_built(name) else Path(name).name


def _build(name: str, tokenizer: Any, *, classes: int, length: int, dropout: float, seed: int) -> nn.Module:
    """Build a BERT with initial weights from the seed, equal for every method; or load a named network."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    if not (size := SIZE.fullmatch(name)):
        return AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    layers, width = map(int, size.groups())
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    sizes |= {"num_attention_heads": max(1, width // 32), "max_position_embeddings": length}
    dropouts: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    vocab: dict[str, Any] = {
        "num_labels": classes,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return BertForSequenceClassification(BertConfig(**vocab, **sizes, **dropouts))


def _default_lr(name: str) -> float:
    return BUILT_LR if _is_built(name) else LOADED_LR
