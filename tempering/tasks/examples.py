"""Pick the samples of a split on which student and teacher differ most, for the report."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.data.batches import labeled_batch
from tempering.rows import class_indices, upcast_to_float32
from tempering.tasks.base import Task, TeacherForward, evaluating, tokenizer_of
from tempering.teachers.outputs import Sparse

SCANNED = 2048  # samples that are looked at, so that large splits cost little
SCANNED_TEXTS = 256
SIDE = 96  # pixels of an image, at most
TOP = 3  # classes or tokens of each side
AROUND = 24  # tokens shown before and after the worst
PROMPT = 200  # characters

Item = dict[str, Any]


def class_examples(
    task: Task, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward, most: int
) -> list[Item]:
    """Return the samples of the largest KL(teacher || student) at temperature 1, largest first.

    Returns:
        For each: "kl" in nats, "label" (None: unlabeled), "classes": [class, teacher's probability, student's] of the
        likeliest ones, and what is known of the input: "png", base64 of at most 96 pixels a side, or "text".
    """
    mean, std = (getattr(batches, name, None) for name in ("mean", "std"))
    decode, found, seen = decoder_of(batches), _Largest(most), 0
    with evaluating(student, batches) as on_device:
        for batch in on_device:
            student_in, teacher_in, ids = task.inputs(batch)
            rows = task.rows(student(student_in), teacher(teacher_in, ids), batch)[-1]
            p, q, kl = _compared(rows.student, rows.teacher)
            labels = class_indices(labeled_batch(batch).labels, type(task).__name__).cpu()
            for i in kl.topk(min(most, len(kl))).indices.tolist():
                if found.takes(float(kl[i])):
                    item: Item = {"label": int(y) if labels.ndim == 1 and (y := labels[i]) >= 0 else None}
                    item["classes"] = _likeliest(p[i], q[i], -1 if item["label"] is None else item["label"])
                    found.add(float(kl[i]), item | _shown(student_in, i, mean, std, decode))
            seen += len(kl)
            if seen >= SCANNED:
                break
    return found.items


def token_examples(
    task: Any, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward, most: int
) -> list[Item]:
    """Return the texts with the tokens of the largest KL(teacher || student), at most one token of each.

    Returns:
        For each: "kl" in nats; "prompt", the text before the first token; "tokens", [text, kl] around the worst one,
        which is number "at"; "likeliest", [token, teacher's probability, student's] of the likeliest ones there and
        of the true one, number "label" in it (None: unlabeled).
    """
    decode, found, seen = decoder_of(batches) or _numbered, _Largest(most), 0
    with evaluating(student, batches) as on_device:
        for batch in map(dict, on_device):
            student_in, teacher_in, ids = task.inputs(batch)
            z, t = student(student_in), teacher(teacher_in, ids)
            if isinstance(t, Sparse):
                return []
            rows = task.rows(z, t, batch)[-1]
            index, (_, length), fields = task.row_fields(batch)
            if not len(index) or fields["weight"] is not None:  # no row
                continue
            p, q, kl = _compared(rows.student, rows.teacher)
            texts = (index // length).cpu()
            for b in texts.unique().tolist():
                here = (texts == b).nonzero().squeeze(1)
                worst = int(kl[here].argmax())
                if found.takes(float(kl[here[worst]])):
                    item = _text_item(decode, fields["target"].cpu()[here], kl[here], worst)
                    row, column = int(here[worst]), int(index[here[0]]) % length
                    true = int(fields["target"][row])
                    ranked = _likeliest(p[row], q[row], true)
                    item["label"] = next((n for n, (k, *_) in enumerate(ranked) if k == true), None)
                    item["likeliest"] = [[decode([int(k)]), *both] for k, *both in ranked]
                    item["prompt"] = decode(_prompt(batch, b, column))[-PROMPT:]
                    found.add(item["kl"], item)
            seen += len(texts.unique())
            if seen >= SCANNED_TEXTS:
                break
    return found.items


def _text_item(decode: Callable[[list[int]], str], target: Tensor, kl: Tensor, worst: int) -> Item:
    start, end = max(0, worst - AROUND), worst + AROUND + 1
    values = zip(target[start:end].tolist(), kl[start:end].tolist(), strict=True)
    tokens = [[decode([int(k)]) if k >= 0 else "", round(value, 4)] for k, value in values]
    return {"kl": float(kl[worst]), "tokens": tokens, "at": worst - start}


def _prompt(batch: Mapping[str, Any], b: int, column: int) -> list[int]:
    """Return the tokens before the first row of a causal model's text, or all of an encoder's, without padding."""
    inputs = batch.get("input_ids")
    if inputs is None:
        return []
    labels = batch.get("labels")
    end = inputs.shape[1] if labels is not None and labels.shape != inputs.shape else column + 1
    ids, mask = inputs[b, :end], batch.get("attention_mask")
    return [int(k) for k in (ids if mask is None else ids[mask[b, :end] != 0]).tolist()]


class _Largest:
    """The items of the largest values."""

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0
        self.heap: list[tuple[float, int, Item]] = []

    def takes(self, value: float) -> bool:
        return value == value and self.most > 0 and (len(self.heap) < self.most or value > self.heap[0][0])

    def add(self, value: float, item: Item) -> None:
        self.count += 1
        push = heapq.heappush if len(self.heap) < self.most else heapq.heapreplace
        push(self.heap, (value, -self.count, {"kl": value, **item}))

    @property
    def items(self) -> list[Item]:
        return [item for _, _, item in sorted(self.heap, key=lambda entry: entry[:2], reverse=True)]


def _compared(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both sides' probabilities (N, C) and KL(teacher || student) (N,), on the CPU."""
    log_p, log_q = (upcast_to_float32(z).detach().cpu().log_softmax(-1) for z in (student, teacher))
    q = log_q.exp()
    terms = torch.where(q > 0, q * (log_q - log_p), 0.0)  # minus infinity on both sides is no difference
    return log_p.exp(), q, terms.sum(-1).clamp_min(0)


def _likeliest(p: Tensor, q: Tensor, true: int) -> list[list[float]]:
    """Return [class, teacher's probability, student's] of the likeliest of both and the true one, by the teacher's."""
    top = min(TOP, len(p))
    classes = {*q.topk(top).indices.tolist(), *p.topk(top).indices.tolist(), *([true] if 0 <= true < len(p) else [])}
    classes = sorted(classes, key=lambda k: (-float(q[k]), k))
    return [[k, round(float(q[k]), 4), round(float(p[k]), 4)] for k in classes]


def _numbered(ids: list[int]) -> str:
    return " ".join(f"#{k}" for k in ids)


def decoder_of(batches: Any) -> Callable[[list[int]], str] | None:
    """Return token ids -> text, by the loader's tokenizer or its ``decode``; None without one."""
    decode = getattr(tokenizer_of(batches), "decode", None) or getattr(batches, "decode", None)
    return None if decode is None else lambda ids: str(decode(ids))


def _shown(inputs: Any, i: int, mean: Any, std: Any, decode: Callable[[list[int]], str] | None) -> Item:
    """Return what people can see of sample ``i``: an image or a text; {} of others."""
    if isinstance(inputs, Mapping):
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if decode is None or not isinstance(ids, Tensor):
            return {}
        return {"text": decode((ids[i] if mask is None else ids[i][mask[i] != 0]).tolist())[: 3 * PROMPT]}
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return {}
    return png(inputs[i], mean, std)


def png(image: Tensor, mean: Any = None, std: Any = None) -> Item:
    """Encode a normalized image (C, H, W) as a PNG in base64, with its size; {} without Pillow.

    Without mean and std, which undo the normalization, pixels are scaled to the image's own range.
    """
    try:
        from PIL import Image
    except ImportError:
        return {}
    pixels = image.detach().float().cpu().nan_to_num()
    if mean is not None and std is not None and len(mean) == len(pixels):
        scale, shift = (torch.as_tensor(v, dtype=torch.float32)[:, None, None] for v in (std, mean))
        pixels = pixels * scale + shift
    else:
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12)
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return {"png": base64.b64encode(file.getvalue()).decode(), "width": picture.width, "height": picture.height}
