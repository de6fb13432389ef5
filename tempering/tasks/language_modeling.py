"""Generation: a row is a token that a causal language model has to predict."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.rollouts.decoding import is_encoder_decoder
from tempering.rollouts.scoring import GenerationScorer
from tempering.rows import IGNORE_INDEX, Rows, upcast_to_float32
from tempering.tasks.base import Task
from tempering.teachers.outputs import Hidden, PrecomputedLogits, Sparse, to_top_k_plus_tail
from tempering.utils.tensors import to_device

NO_INPUTS = {"labels", "ids", "learn", "replaced", "privacy_score", "taught"}
OPTIONAL = ("use_cache", "position_ids")  # what a model that does not name them goes without


class LanguageModeling(Task):
    """Batches are mappings of (B, L) input_ids with attention_mask, labels or both; models answer (B, L, V) .logits.

    The models are causal; for encoder-decoders see ``Seq2Seq``.

    Position i answers for the token of i + 1. A row is a token whose label is not -100, which is no padding and whose
    predecessor belongs to the same text; the others are no rows at all. So padding on either side, and micro-batches
    of unequal size, change neither loss nor gradient. Without labels every token of a text is learned. "learn", a
    (B, L) mask, names the rows in the labels' place: a token in it with the label -100 learns from the teacher alone,
    as tokens do that a student wrote itself.

    Positions are counted from the attention mask, as left padding needs them. A batch with position_ids of its own,
    which start again at 0 with every text, and no attention_mask is packed (``data.text.pack``): transformers then
    keep the texts apart. Logits are what the model says they are, with its own soft cap and scale.

    A teacher with another number of logits shares the first ``vocabulary`` of them: the columns of padding are left
    out on both sides, which is what minus infinity on both sides amounts to. "ids", where a batch has them, are those
    of the samples, for teachers that look their answers up. "private", (B, L) in [0, 1], says how private each token
    is; a row has that of the token it predicts.

    Args:
        vocabulary: how many tokens there are, such as ``tasks.shared_vocabulary(student, teacher)``; None takes the
            smaller of the two heads (and the student's where there is no teacher, as scores without one do).
        taps: features for methods that look inside, name -> (student's module, teacher's module), shallow to deep.
        graded: a score of what the student writes by itself, beside those of single tokens.
    """

    def __init__(
        self,
        *,
        vocabulary: int | None = None,
        features: Mapping[str, tuple[str, str]] | None = None,
        scorer: GenerationScorer | None = None,
    ) -> None:
        if vocabulary is not None and vocabulary < 1:
            raise ValueError(f"{type(self).__name__} needs vocabulary >= 1 or None; got {vocabulary!r}.")
        self.vocabulary, self.features, self.scorer = vocabulary, dict(features or {}), scorer

    def prepare_model(self, model: nn.Module) -> None:
        """Let a model of transformers be asked with one mapping of inputs; one that takes a mapping stays as it is.

        Raises:
            TypeError: for an encoder-decoder.
        """
        if is_encoder_decoder(model):
            raise TypeError(f"{type(model).__name__} is an encoder-decoder. Its task is tasks.Seq2Seq().")
        # peft's own forward names but a few of the inputs, and hands the others on
        bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
        takes = inspect.signature(bare.forward).parameters
        wraps = any(p.kind is p.VAR_KEYWORD for p in takes.values()) and "input_ids" not in takes
        met = any(isinstance(hook, _Unpack) for hook in model._forward_pre_hooks.values())
        if met or not (wraps or "input_ids" in takes):
            return
        absent = () if wraps else tuple(name for name in OPTIONAL if name not in takes)
        model.register_forward_pre_hook(_Unpack(absent), with_kwargs=True)

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        _check(batch)
        given = {name: value for name, value in batch.items() if name not in NO_INPUTS} | {"use_cache": False}
        if "attention_mask" in batch and "position_ids" not in batch:
            given["position_ids"] = (batch["attention_mask"].long().cumsum(-1) - 1).clamp_min(0)
        return given, with_teacher_outputs(given, batch), batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        shape = self._shape(batch)
        said = _logits(student, "student", shape)
        place, target, weight = self._places(batch)
        ids = batch["ids"].index_select(0, place // shape[1]) if "ids" in batch else None
        found = said.flatten(0, 1).index_select(0, place)[:, : self.vocabulary]
        own = {"ids": ids, "positions": place % shape[1], "privacy_score": _private(batch, place)}
        if isinstance(teacher, Sparse):
            found, taught, target = to_top_k_plus_tail(found, teacher.gather_positions(place, shape), target)
            return [Rows(found, taught, target, weight, **own)]
        if teacher is None:
            return [Rows(found, found.detach(), target, weight, **own)]
        if isinstance(teacher, Hidden | PrecomputedLogits):
            taught = teacher.gather_positions(place, shape)
        else:
            taught = _logits(teacher, "teacher", shape).flatten(0, 1).index_select(0, place)
        known = min(found.shape[1], taught.shape[1])
        return [Rows(found[:, :known], taught[:, :known], target, weight, **own)]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        return {"logits": prediction_mask(batch).sum()}

    @torch.no_grad()
    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: Callable[[Any, Tensor | None], Any] | None = None
    ) -> dict[str, float]:
        """loss in nats a token, its perplexity, accuracy and agreement of the likeliest token, in [0, 1].

        And what ``scorer`` says of the texts that the student writes.
        """
        for model in (student, getattr(teacher, "model", None)):
            if isinstance(model, nn.Module):
                self.prepare_model(model)
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        training, sums, count = student.training, {"loss": 0.0, "accuracy": 0.0, "agreement": 0.0}, 0
        student.eval()
        try:
            for batch in batches:
                batch = to_device(dict(batch), device)
                student_in, teacher_in, ids = self.inputs(batch)
                said = student(student_in)
                taught = None if teacher is None else teacher(teacher_in, ids)
                sparse = isinstance(taught, Sparse)
                rows = self.rows(said, None if sparse else taught, batch)[0]
                kept = rows.target >= 0  # pyright: ignore[reportOptionalOperand]
                z, y = upcast_to_float32(rows.student)[kept], rows.target[kept]  # pyright: ignore[reportOptionalSubscript]
                likeliest = rows.teacher[kept].argmax(-1)
                if sparse:
                    likeliest = taught.gather_positions(self._places(batch)[0], self._shape(batch)).ids[kept, 0]
                sums["loss"] += float(nn.functional.cross_entropy(z.double(), y, reduction="sum"))
                sums["accuracy"] += float((z.argmax(-1) == y).sum())
                sums["agreement"] += float((z.argmax(-1) == likeliest).sum())
                count += len(y)
        finally:
            student.train(training)
        if not count:
            raise ValueError("there is nothing to score: no token has a label. Is the split empty?")
        out = {name: value / count for name, value in sums.items() if name != "agreement" or teacher is not None}
        out["perplexity"] = math.exp(min(out["loss"], 700.0))
        return out if self.scorer is None else out | self.scorer(student, batches, vocabulary=self.vocabulary)

    def headline(self) -> tuple[str, bool]:
        return "loss", False

    def _shape(self, batch: Any) -> tuple[int, int]:
        """(B, L) of the positions that a model answers for."""
        _check(batch)
        B, L = batch["input_ids"].shape
        return B, L

    def _places(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which of the B * L positions are rows, their targets, and a weight: a batch with none keeps one, of 0."""
        keep, length = prediction_mask(batch), batch["input_ids"].shape[1]
        row, column = keep.nonzero(as_tuple=True)
        if not len(row):
            nothing = row.new_zeros(min(1, keep.shape[0] * length))
            return nothing, nothing + IGNORE_INDEX, torch.zeros(len(nothing), device=row.device)
        return row * length + column, _labels(batch)[row, column + 1].long(), None


def prediction_mask(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens from the second on are to be predicted, (B, L - 1): labeled, no padding, no text's first one."""
    _check(batch)
    learn = batch.get("learn")
    if learn is None:
        learn = _labels(batch) != IGNORE_INDEX
    keep = learn[:, 1:] != 0
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        keep = keep & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if positions is not None:
        keep = keep & (positions[:, 1:] > 0)
    return keep


def with_teacher_outputs(given: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's inputs: with answers of its own, where the batch has some, which it need not be asked for again."""
    return given | {"taught": batch["taught"]} if "taught" in batch else given


def _labels(batch: Mapping[str, Any]) -> Tensor:
    return batch["input_ids"] if batch.get("labels") is None else batch["labels"]


def _private(batch: Mapping[str, Any], place: Tensor) -> Tensor | None:
    """How private the tokens are that these of the B * L positions predict; None where the batch does not say."""
    scores = batch.get("privacy_score")
    if scores is None:
        return None
    return scores.roll(-1, 1).flatten().index_select(0, place)  # a text's last position predicts nothing


class _Unpack:
    """A hook before the forward: one mapping becomes named inputs, without those that the model does not take."""

    def __init__(self, absent: tuple[str, ...]) -> None:
        self.absent = absent

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if len(args) == 1 and isinstance(args[0], Mapping):
            args, kwargs = (), {**args[0], **kwargs}
        if "position_ids" in self.absent and "position_ids" in kwargs and kwargs.get("attention_mask") is None:
            raise ValueError(
                f"{type(model).__name__} takes no position_ids, so it cannot keep packed texts apart. Pad them: "
                "data.text.collate(examples)."
            )
        return args, {name: value for name, value in kwargs.items() if name not in (*self.absent, "taught")}


def _check(batch: Any) -> None:
    """Refuse what is no batch of token ids, or has labels or a mask of another shape."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        got = type(batch).__name__ if ids is None else f"input_ids {tuple(getattr(ids, 'shape', ()))}"
        raise ValueError(
            f"LanguageModeling needs batches that are mappings with input_ids (B, L); got {got}. data.text.collate "
            "makes them."
        )
    for name in ("attention_mask", "labels", "learn", "position_ids", "privacy_score"):
        value = batch.get(name)
        if value is not None and value.shape != ids.shape:
            raise ValueError(
                f"LanguageModeling needs {name} of the shape of input_ids, {tuple(ids.shape)}; got "
                f"{tuple(value.shape)}. The labels are not shifted: the task does that."
            )


def _logits(output: Any, side: str, shape: tuple[int, ...]) -> Tensor:
    """The (B, L, V) logits of a model's output."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == shape:
        return logits
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(f"the {side} must answer (B, L, V) logits, here ({shape[0]}, {shape[1]}, V); got {got}.")
