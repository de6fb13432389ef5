"""Text classification in GLUE's format: sentences, or pairs of them, with a label, as batches of token ids."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempering.data.batches import _order, _proportional, _words
from tempering.data.folders import SPLITS
from tempering.data.sharded import ShardedLoader

KEYS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
SUFFIXES = (".jsonl", ".jsonl.gz")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
Inputs = dict[str, Any]


class Labeled(NamedTuple):
    """Texts of one sentence or a pair each, and their labels; -1 is hidden."""

    texts: list[tuple[str, ...]]
    labels: list[int]


def read_glue(folder: str | Path, *, train: str = "train") -> dict[str, Labeled]:
    """The splits train, validation (where there is one) and test of FOLDER/{train,dev,test}.jsonl or .jsonl.gz.

    A line is an object with an integer "label" and one of ``KEYS``. A split whose labels are all -1, as GLUE's own test
    sets are, is left out; of train and one other split, the other one is the test split.

    Args:
        train: name of the training file, without its ending.

    Raises:
        FileNotFoundError: for a folder without these files, saying what it holds.
        ValueError: for a line that is not so, saying what was found and what is wanted.
    """
    folder = Path(folder)
    found = {}
    for split, names in (SPLITS | {"train": (train,)}).items():
        path = next((p for name in names for end in SUFFIXES if (p := folder / f"{name}{end}").is_file()), None)
        part = None if path is None else _read(path)
        if part is not None and (split == "train" or max(part.labels) >= 0):
            found[split] = part
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    if missing := [split for split in ("train", "test") if split not in found]:
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} should hold {train}.jsonl, and dev.jsonl or test.jsonl with labels (.jsonl.gz too); there is no "
            f"{' and no '.join(missing)} split: it holds {', '.join(there) or 'nothing'}."
        )
    _look(folder, found)
    return found


def _look(folder: Path, found: Mapping[str, Labeled]) -> None:
    """Refuse splits that are not of one task, or of one class."""
    kinds = {split: len(part.texts[0]) for split, part in found.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the splits of {folder} differ: sentences in a text are {kinds}. Are these one data set?")
    known = {label for label in found["train"].labels if label >= 0}
    if len(known) < 2:
        raise ValueError(f"{folder}: two classes or more are wanted; the labels of the training texts are {known}.")
    for split, part in found.items():
        if others := {label for label in part.labels if label > max(known)}:
            raise ValueError(f"{folder}: the {split} split has the labels {others}, and no training text has.")


def _read(path: Path) -> Labeled:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    texts, labels, keys = [], [], None
    for number, line in enumerate(raw.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row = _object(line)
        keys = keys or next((pair for pair in KEYS if all(isinstance(row.get(key), str) for key in pair)), None)
        label = row.get("label")
        if keys is None or any(not isinstance(row.get(key), str) for key in keys) or type(label) is not int:
            pairs = " or ".join(" + ".join(pair) for pair in (KEYS if keys is None else (keys,)))
            got = ", ".join(f"{key}: {type(value).__name__}" for key, value in row.items())
            raise ValueError(
                f"{path}, line {number}: found {got or repr(line[:40])}; wanted an object with the "
                f"texts {pairs}, and an integer label."
            )
        texts.append(tuple(row[key] for key in keys))
        labels.append(label)
    if not labels:
        raise ValueError(f"{path} holds no line.")
    return Labeled(texts, labels)


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}


def trained_tokenizer(texts: Sequence[tuple[str, ...]], *, vocabulary: int = 4000) -> Any:
    """A tokenizer of transformers, byte-level BPE in lower case, trained on these texts: [CLS] one [SEP] other [SEP].

    The same for the same texts in every process. (A word-piece vocabulary is not: its trainer walks a hash map.)

    Args:
        vocabulary: tokens at most; 260 are the bytes and the special ones.

    Raises:
        ImportError: without transformers.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError('texts are tokenized by transformers: pip install "tempering[huggingface]"') from error
    made, special = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"])), list(SPECIAL.values())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator((text for pair in texts for text in pair), trainer)
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **SPECIAL)


class TextPairLoader(ShardedLoader):
    """Batches of (inputs, labels (B,), ids (B,)): inputs is a mapping of (B, L) token ids, their mask and types.

    L is that of the longest text of the batch. The order of an epoch depends on (seed, epoch) alone, ``iterate(start)``
    begins anywhere, and a process's ``shard`` is its share of every batch.

    Args:
        part: texts and labels.
        tokenizer: of transformers, the student's; longer texts are cut, of a pair the longer one.
        teacher_tokenizer: where the teacher has another one; inputs are then {"student": ..., "teacher": ...}, which
            ``tasks.TextClassification`` tells apart.
        batch_size: texts in a step, over all ranks.
        length: most tokens of a text.
        shuffle: a new order every epoch.
        seed: of the order.
        name: of the data set, for records.

    Raises:
        ValueError: for no texts, or as many labels as there are not texts.
    """

    things = "texts"
    augmentation: dict[str, Any] = {"views": None}

    def __init__(
        self,
        part: Labeled,
        tokenizer: Any,
        *,
        teacher_tokenizer: Any = None,
        batch_size: int = 32,
        length: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        name: str = "texts",
    ) -> None:
        if not part.texts or len(part.texts) != len(part.labels) or batch_size < 1 or length < 4:
            raise ValueError(
                "TextPairLoader needs texts with a label each, batch_size >= 1 and length >= 4; got "
                f"{len(part.texts)} texts, {len(part.labels)} labels, batch_size={batch_size} and length={length}."
            )
        self.batch_size, self.length, self.shuffle, self.seed, self.name = batch_size, length, shuffle, seed, name
        self.labels = torch.tensor(part.labels)
        readers = {"student": tokenizer} | ({} if teacher_tokenizer is None else {"teacher": teacher_tokenizer})
        self.pads = {side: reader.pad_token_id or 0 for side, reader in readers.items()}
        self.encoded = {side: _encoded(part.texts, reader, length) for side, reader in readers.items()}
        self.epoch, self.rank, self.world = 0, 0, 1
        self.index = np.arange(len(part.texts))
        self._seal()

    def _seal(self) -> None:
        digest = hashlib.sha256(repr((sorted(self.encoded), self.pads, self.length)).encode())
        for i in self.index.tolist():
            read = {side: texts[i] for side, texts in self.encoded.items()}
            digest.update(json.dumps([read, int(self.labels[i])], sort_keys=True).encode())
        self.identity = digest.hexdigest()

    @property
    def size(self) -> int:
        """Texts in the data set."""
        return len(self.index)

    rows = size

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return self._steps(self.size)

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch the next walk is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
        """The epoch's batches from number ``start`` on."""
        order = _order(self.size, self.seed, self.epoch) if self.shuffle else torch.arange(self.size)
        for step in range(start, len(self)):
            yield self.gather(order[self._share(step, self.size)])

    def gather(self, ids: Tensor) -> tuple[Inputs, Tensor, Tensor]:
        """The batch of these ids, in their order."""
        chosen = self.index[ids.cpu().numpy()]
        inputs = {side: _padded([texts[i] for i in chosen], self.pads[side]) for side, texts in self.encoded.items()}
        return inputs if len(inputs) > 1 else inputs["student"], self.labels[torch.from_numpy(chosen)], ids.cpu()

    # variants: copies that share the texts

    def clean(self) -> TextPairLoader:
        """The same in its own order, as the teacher reads it; texts are not augmented."""
        return self.read_by_teacher()._with(shuffle=False)

    def read_by_teacher(self) -> TextPairLoader:
        """The same with the inputs that the teacher's tokenizer makes, alone."""
        side = "teacher" if "teacher" in self.encoded else "student"
        return self._with(encoded={"student": self.encoded[side]}, pads={"student": self.pads[side]})

    def replay(self, views: int) -> TextPairLoader:
        """Texts have no views.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"texts are not augmented, so there are no {views} views of one. Leave out views=.")

    def subset(self, n: int) -> TextPairLoader:
        """The first ``n`` texts in proportion to the classes, in their old order."""
        if not 0 < n <= self.size:
            raise ValueError(f"cannot take {n} of {self.size} texts.")
        return self if n == self.size else self._only(self._proportional(np.arange(self.size))[:n])

    def split(self, n_validation: int, seed: int = 0) -> tuple[TextPairLoader, TextPairLoader]:
        """(the rest, a hold-out of ``n_validation`` texts in their old order), every class in proportion."""
        if not 0 < n_validation < self.size:
            raise ValueError(f"cannot hold out {n_validation} of {self.size} texts; some must be left on both sides.")
        order = self._proportional(_words(self.size, seed, "split", n_validation).numpy())
        return self._only(order[n_validation:]), self._only(order[:n_validation])._with(shuffle=False)

    def _proportional(self, key: np.ndarray) -> np.ndarray:
        return _proportional(self.labels.numpy()[self.index], key)

    def _only(self, places: np.ndarray) -> TextPairLoader:
        made = self._with(index=self.index[np.sort(places)])
        made._seal()
        return made


def _encoded(texts: Sequence[tuple[str, ...]], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    found: Mapping[str, list[list[int]]] = tokenizer(*columns, truncation=True, max_length=length)
    return [{name: values[i] for name, values in found.items()} for i in range(len(texts))]


def _padded(encoded: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """(B, L) of every name; padding is ``pad`` among the ids and 0 elsewhere."""
    longest = max((len(text["input_ids"]) for text in encoded), default=0)
    out = {}
    for name in encoded[0] if encoded else ():
        values = np.full((len(encoded), longest), pad if name == "input_ids" else 0, np.int64)
        for row, text in enumerate(encoded):
            values[row, : len(text[name])] = text[name]
        out[name] = torch.from_numpy(values)
    return out
