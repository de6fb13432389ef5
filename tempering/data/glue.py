"""Load text classification data in GLUE's format, labeled sentences or sentence pairs, as batches of token ids."""

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

from tempering.data.batches import ShardedLoader, check_held_out, random_bits, stratified_order
from tempering.data.folders import SPLITS

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
    """Texts, each a sentence or a pair of sentences, and their labels; -1: the label is hidden."""

    texts: list[tuple[str, ...]]
    labels: list[int]


def read_glue(folder: str | Path, *, train: str = "train") -> dict[str, Labeled]:
    """Read the splits train, test and, if any, validation from FOLDER/{train,dev,test}.jsonl or .jsonl.gz.

    A line is an object with an integer "label" and one of ``KEYS``. A split whose labels are all -1, as those of GLUE's
    test sets, is ignored. If train and one other split are left, the other one is the test split.

    Args:
        folder: as above.
        train: name of the training file, without its suffix.

    Raises:
        FileNotFoundError: for a folder without these files, listing its files.
        ValueError: for a malformed line, stating its fields and those required.
    """
    folder = Path(folder)
    splits = {}
    for split, names in (SPLITS | {"train": (train,)}).items():
        path = next((p for name in names for end in SUFFIXES if (p := folder / f"{name}{end}").is_file()), None)
        part = None if path is None else _read(path)
        if part is not None and (split == "train" or max(part.labels) >= 0):
            splits[split] = part
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if missing := [split for split in ("train", "test") if split not in splits]:
        files = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"{folder} should hold {train}.jsonl, and dev.jsonl or test.jsonl with labels (.jsonl.gz too); there is no "
            f"{' and no '.join(missing)} split: it holds {', '.join(files) or 'nothing'}."
        )
    _validate_splits(folder, splits)
    return splits


def _validate_splits(folder: Path, splits: Mapping[str, Labeled]) -> None:
    """Reject splits of different tasks, and a training split of a single class."""
    kinds = {split: len(part.texts[0]) for split, part in splits.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the splits of {folder} differ: sentences per text are {kinds}. Are these one data set?")
    known = {label for label in splits["train"].labels if label >= 0}
    if len(known) < 2:
        raise ValueError(f"{folder}: two or more classes are needed; the labels of the training texts are {known}.")
    for split, part in splits.items():
        if others := {label for label in part.labels if label > max(known)}:
            raise ValueError(f"{folder}: the {split} split has the labels {others}, which no training text has.")


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
                f"{path}, line {number}: got {got or repr(line[:40])}; each line needs an object with the "
                f"texts {pairs}, and an integer label."
            )
        texts.append(tuple(row[key] for key in keys))
        labels.append(label)
    if not labels:
        raise ValueError(f"{path} contains no examples.")
    return Labeled(texts, labels)


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return row if isinstance(row, dict) else {}


def trained_tokenizer(texts: Sequence[tuple[str, ...]], *, vocabulary: int = 4000) -> Any:
    """Train a tokenizer of transformers, byte-level BPE in lower case, on these texts.

    It encodes a pair as [CLS] one [SEP] other [SEP]. Training is deterministic. (That of WordPiece vocabularies is
    not: their trainer iterates over a hash map.)

    Args:
        texts: to train on.
        vocabulary: maximal number of tokens; 260 are the bytes and the special tokens.

    Raises:
        ImportError: without transformers.
    """
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError('texts are tokenized by transformers: pip install "tempering[huggingface]"') from error
    tokenizer, special = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"])), list(SPECIAL.values())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in texts for text in pair), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **SPECIAL)


class TextPairLoader(ShardedLoader):
    """Load batches of (inputs, labels (B,), ids (B,)); inputs maps names to (B, L) token ids, their mask and types.

    L is the length of the longest text of the batch. The order of an epoch depends on (seed, epoch) alone,
    ``iterate(start)`` starts at any batch, and ``shard`` splits every batch over the ranks.

    Args:
        part: texts and labels.
        tokenizer: of transformers, the student's; longer texts are truncated, of a pair the longer sentence first.
        teacher_tokenizer: of the teacher, if it has another one; inputs are then {"student": ..., "teacher": ...}, from
            which ``tasks.TextClassification`` selects.
        batch_size: texts per step, over all ranks.
        length: maximal number of tokens of a text.
        shuffle: draw a new order every epoch.
        seed: of the order.
        name: of the data set, for records.

    Raises:
        ValueError: for no texts, or another number of labels than of texts.
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
                "TextPairLoader needs texts with one label each, batch_size >= 1 and length >= 4; got "
                f"{len(part.texts)} texts, {len(part.labels)} labels, batch_size={batch_size} and length={length}."
            )
        self.batch_size, self.length, self.shuffle, self.seed, self.name = batch_size, length, shuffle, seed, name
        self.labels = torch.tensor(part.labels)
        tokenizers = {"student": tokenizer} | ({} if teacher_tokenizer is None else {"teacher": teacher_tokenizer})
        self.student_tokenizer = tokenizer
        self.pads = {side: tok.pad_token_id or 0 for side, tok in tokenizers.items()}
        self.encoded = {side: _encode(part.texts, tok, length) for side, tok in tokenizers.items()}
        self.epoch, self.rank, self.world = 0, 0, 1
        self.index = np.arange(len(part.texts))
        self.identity = self._hash()

    def _hash(self) -> str:
        """Return the SHA-256 of token ids and labels, in hexadecimal."""
        digest = hashlib.sha256(repr((sorted(self.encoded), self.pads, self.length)).encode())
        for i in self.index.tolist():
            encoded = {side: texts[i] for side, texts in self.encoded.items()}
            digest.update(json.dumps([encoded, int(self.labels[i])], sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """Number of texts in the data set."""
        return len(self.index)

    rows = size

    @property
    def classes(self) -> int:
        """Number of classes: the largest label plus one."""
        return int(self.labels.max()) + 1

    def __len__(self) -> int:
        return self._num_batches(self.size)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
        return self.iterate(0)

    def iterate(self, start: int = 0) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
        """Iterate over the epoch from batch ``start``."""
        order = self._order(self.size, self.epoch)
        for step in range(start, len(self)):
            yield self.gather(order[self._shard_slice(step, self.size)])

    def gather(self, ids: Tensor) -> tuple[Inputs, Tensor, Tensor]:
        """Return the batch of these ids, in their order."""
        indices = self.index[ids.cpu().numpy()]
        inputs = {side: _pad([texts[i] for i in indices], self.pads[side]) for side, texts in self.encoded.items()}
        return inputs if len(inputs) > 1 else inputs["student"], self.labels[torch.from_numpy(indices)], ids.cpu()

    # copies that share the texts

    def clean(self) -> TextPairLoader:
        """Return a loader of the texts in their stored order, encoded for the teacher; texts are not augmented."""
        return self.read_by_teacher()._replace(shuffle=False)

    def read_by_teacher(self) -> TextPairLoader:
        """Return a loader of the same texts with the inputs of the teacher's tokenizer only."""
        side = "teacher" if "teacher" in self.encoded else "student"
        return self._replace(encoded={"student": self.encoded[side]}, pads={"student": self.pads[side]})

    def replay(self, views: int) -> TextPairLoader:
        """Raise, since texts have no views.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"texts are not augmented, so they have no {views} views. Leave out views=.")

    def subset(self, n: int) -> TextPairLoader:
        """Return a loader of ``n`` texts, stratified by class, in their stored order."""
        if not 0 < n <= self.size:
            raise ValueError(f"cannot take {n} of {self.size} texts.")
        return self if n == self.size else self._select(self._stratified(np.arange(self.size))[:n])

    def split(self, n_validation: int, seed: int = 0) -> tuple[TextPairLoader, TextPairLoader]:
        """Return (the remaining texts, a held-out split of ``n_validation`` texts), stratified by class."""
        check_held_out(n_validation, self.size, "texts")
        order = self._stratified(random_bits(self.size, seed, "split", n_validation).numpy())
        return self._select(order[n_validation:]), self._select(order[:n_validation])._replace(shuffle=False)

    def _stratified(self, key: np.ndarray) -> np.ndarray:
        return stratified_order(self.labels.numpy()[self.index], key)

    def _select(self, indices: np.ndarray) -> TextPairLoader:
        result = self._replace(index=self.index[np.sort(indices)])
        result.identity = result._hash()
        return result


def _encode(texts: Sequence[tuple[str, ...]], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded: Mapping[str, list[list[int]]] = tokenizer(*columns, truncation=True, max_length=length)
    return [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]


def _pad(encoded: Sequence[Mapping[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """Pad every entry to (B, L), input_ids with ``pad`` and all others with 0."""
    longest = max((len(text["input_ids"]) for text in encoded), default=0)
    out = {}
    for name in encoded[0] if encoded else ():
        values = np.full((len(encoded), longest), pad if name == "input_ids" else 0, np.int64)
        for row, text in enumerate(encoded):
            values[row, : len(text[name])] = text[name]
        out[name] = torch.from_numpy(values)
    return out
