"""A small text classifier distilled on data in GLUE's format; the teacher is trained first where there is none.

Command:  tempering run recipes/glue.py --data DIR --method dtkd
A table:  tempering compare recipes/glue.py --methods supervised,kd,dtkd,interactive --seeds 3 --out OUT -- --data DIR
Names:    ... --teacher textattack/bert-base-uncased-SST-2 --teacher-epochs 0 --student 4x128

DIR holds train.jsonl and dev.jsonl or test.jsonl, plain or .gz: an object a line, with a text ("sentence") or two
("sentence1" and "sentence2", "premise" and "hypothesis", ...) and an integer "label".
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tempering import Run, distill
from tempering.data.glue import TextPairLoader, read_glue, trained_tokenizer
from tempering.experiments.presets import arm_from, method_of, slug
from tempering.methods.base import Method
from tempering.methods.logits.supervised import Supervised
from tempering.tasks import TextClassification
from tempering.teachers import Live, record
from tempering.training.distill import CHECK_ONLY
from tempering.training.pretrained import trained

SIZE = re.compile(r"(\d+)x(\d+)")  # a net that is built here: layers x width
BUILT_LR, LOADED_LR = 5e-4, 2e-5
ADAMW = partial(torch.optim.AdamW, weight_decay=0.01)


def decay(progress: float) -> float:
    """Linear warm-up over the first tenth, then linear to nothing."""
    return min(progress / 0.1 + 0.02, 1.0) * min(1.0, (1.0 - progress) / 0.9)


def main(
    *,
    data: Path,
    method: str = "dtkd",
    temperature: str | None = None,
    label: str | None = None,
    teacher: str = "4x128",
    student: str = "2x64",
    epochs: int = 8,
    teacher_epochs: int = 4,
    batch_size: int = 32,
    lr: float | None = None,
    teacher_lr: float | None = None,
    dropout: float = 0.1,
    length: int = 64,
    vocabulary: int = 4000,
    train: str = "train",
    subset: int | None = None,
    validation: int = 0,
    teacher_cache: bool = False,
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true",
    accelerator: str = "auto",
    evaluate_every: int = 1,
    selfcheck: bool = True,
    seed: int = 0,
    threads: int | None = None,
    resume: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> Run:
    """Distil a text classifier; the teacher is trained first, once, beside the run's folder.

    Args:
        data: folder of train.jsonl and dev.jsonl or test.jsonl, plain or .gz.
        method: an arm or a method, such as supervised, kd, dtkd, or "interactive(held=500, teacher_lr=1e-4)".
        temperature: a policy in place of the method's own, such as "sharpness(2)" or "static(1)".
        label: what tables call this run; by itself it follows from the method.
        teacher: LAYERSxWIDTH of a BERT that is built here; else a name on the hub or a folder.
        student: the same of the student.
        epochs: how long; the schedule is in shares of it.
        teacher_epochs: how long the teacher is trained, on all training texts; 0 takes a named one as it is.
        batch_size: texts a step.
        lr: the student's learning rate at its height; by itself 5e-4, and 2e-5 of a named one.
        teacher_lr: the same of the teacher's training (what Interactive does to it later is the method's own).
        dropout: of nets that are built here.
        length: most tokens of a text.
        vocabulary: tokens of the tokenizer that is trained here, on the training texts; a named net brings its own.
        train: name of the training file, without its ending.
        subset: distil on this many texts, classes in proportion; by itself on all. The teacher sees all.
        validation: training texts held out to choose the best epoch by, where there is no dev file beside a test file.
        teacher_cache: ask the teacher once and keep its answers; by itself it is asked at every step.
        precision: of the training, and of the teacher's.
        accelerator: auto, cpu, cuda or mps.
        evaluate_every: epochs between evaluations.
        selfcheck: look at the first batch before training.
        seed: of the student's first weights and of the order.
        threads: of torch; by itself as many as there are cores.
        resume: go on where an earlier run in the same folder stopped; --no-resume begins again.
        out: the run's folder; by itself runs/glue/DATA/METHOD-SEED. The teacher lies in "teachers" beside it.
        quiet: no progress bar.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    arm, loss = arm_from(method, temperature), method_of(method, temperature)
    _may_remember(loss, teacher_cache)
    out = out or Path("runs/glue", data.resolve().name, f"{slug(arm.name)}-{seed}")
    go = partial(distill, schedule=decay, task=TextClassification(), precision=precision, accelerator=accelerator)
    go = partial(go, selfcheck=selfcheck, resume=resume, quiet=quiet)
    parts = read_glue(data, train=train)
    readers = _readers(student, teacher if loss.needs_teacher else None, parts["train"].texts, vocabulary)
    read = partial(_splits, data.resolve().name, parts, readers, batch_size, length, validation)
    splits = read(seed=seed)
    whole, classes = splits["train"], splits["train"].classes
    splits["train"] = whole if subset is None else whole.subset(subset)
    learner, taught, said = _new(student, readers["student"], classes, length, dropout, seed=seed), None, None
    if loss.needs_teacher:
        own = readers.get("teacher", readers["student"])
        net, rate = _new(teacher, own, classes, length, dropout, seed=0), teacher_lr or _rate(teacher)
        said = {"name": _called(teacher), "parameters": sum(p.numel() for p in net.parameters())}
        if teacher_epochs or SIZE.fullmatch(teacher):
            key = {"epochs": teacher_epochs, "batch_size": batch_size, "lr": rate, "dropout": dropout}
            key |= {"data": whole.identity, "length": length, "precision": precision}
            teach = partial(_teach, net, teacher, read, partial(go, epochs=teacher_epochs, optimizer=_adamw(rate)))
            said["scores"] = trained(net, slug(_called(teacher)), out.parent / "teachers", teach, key=key)
        taught = Live(net)
        if teacher_cache:
            TextClassification().prepare_model(net)
            place = out.parent / "teachers" / f"answers-{taught.identity[:10]}-{splits['train'].identity[:10]}"
            live, taught = taught, record(taught, splits["train"], place, quiet=quiet)
            taught.fallback = live  # the other splits are not in it
            said["calls"] = taught.rows
    return go(
        learner,
        taught,
        splits["train"],
        method=loss,
        optimizer=_adamw(lr or _rate(student)),
        epochs=epochs,
        validation=splits.get("validation"),
        test=splits["test"],
        evaluate_every=evaluate_every,
        seed=seed,
        out=None if CHECK_ONLY.get() else out,
        facts={
            "label": label or arm.label,
            "student": {"name": _called(student)},
            "teacher": said,
            "data": _facts(splits),
        },
    )


def _may_remember(loss: Method, teacher_cache: bool) -> None:
    """Refuse stored answers of a teacher that the method goes back through or trains, before anything is trained."""
    if teacher_cache and loss.needs_live:
        why = "trains its teacher" if loss.trains_teacher else "goes back through its teacher"
        raise ValueError(f"{type(loss).__name__} {why}, whose stored answers would not do: leave out --teacher-cache.")


def _readers(student: str, teacher: str | None, texts: list[tuple[str, ...]], vocabulary: int) -> dict[str, Any]:
    """The student's tokenizer; and the teacher's, where it is another one. Nets that are built here share one."""
    built = trained_tokenizer(texts, vocabulary=vocabulary) if _is_built(student) or _is_built(teacher) else None

    def reader(name: str) -> Any:
        if _is_built(name):
            return built
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)

    found = {"student": reader(student)}
    other = found["student"] if teacher is None else reader(teacher)
    same = other is found["student"] or (type(other), other.get_vocab()) == (
        type(found["student"]),
        found["student"].get_vocab(),
    )
    return found if same else found | {"teacher": other}


def _splits(
    name: str,
    parts: dict[str, Any],
    readers: dict[str, Any],
    batch_size: int,
    length: int,
    validation: int,
    *,
    seed: int,
) -> dict[str, TextPairLoader]:
    """Every split as batches, those for training shuffled."""
    others = {"teacher_tokenizer": readers.get("teacher"), "batch_size": batch_size, "length": length, "name": name}
    made = {
        split: TextPairLoader(part, readers["student"], shuffle=split == "train", seed=seed, **others)
        for split, part in parts.items()
    }
    if validation and "validation" in made:
        raise ValueError(f"{name} has its own validation split ({made['validation'].size} texts): no --validation.")
    if validation:
        made["train"], made["validation"] = made["train"].split(validation)
    return made


def _facts(splits: dict[str, TextPairLoader]) -> dict[str, Any]:
    """What a record says of the data."""
    train = splits["train"]
    sizes = {split: splits[split].size if split in splits else 0 for split in ("train", "validation", "test")}
    return {"name": train.name, **sizes, "classes": train.classes, "identity": train.identity, "length": train.length}


def _teach(net: nn.Module, name: str, read: Any, go: Any, folder: Path) -> None:
    """The teacher's own training: the same recipe on all training texts, seed 0."""
    own = {split: part.read_by_teacher() for split, part in read(seed=0).items()}
    go(
        net,
        None,
        own["train"],
        method=Supervised(),
        validation=own.get("validation"),
        test=own["test"],
        out=None if CHECK_ONLY.get() else folder,
        facts={"label": f"teacher {_called(name)}", "student": {"name": _called(name)}, "data": _facts(own)},
    )


def _is_built(name: str | None) -> bool:
    return name is not None and SIZE.fullmatch(name) is not None


def _called(name: str) -> str:
    return f"bert-{name}" if _is_built(name) else Path(name).name


def _new(name: str, tokenizer: Any, classes: int, length: int, dropout: float, *, seed: int) -> nn.Module:
    """A BERT of that size with the first weights of that seed, the same in every arm; or the named net with a head."""
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    if not (size := SIZE.fullmatch(name)):
        return AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=classes, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    layers, width = map(int, size.groups())
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    sizes |= {"num_attention_heads": max(1, width // 32), "max_position_embeddings": length}
    drops: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    known: dict[str, Any] = {
        "num_labels": classes,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    return BertForSequenceClassification(BertConfig(**known, **sizes, **drops))


def _rate(name: str) -> float:
    return BUILT_LR if _is_built(name) else LOADED_LR


def _adamw(lr: float) -> Any:
    return partial(ADAMW, lr=lr)
