"""Language modeling: one row per token that a causal language model has to predict."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempering.data.batches import with_teacher_outputs
from tempering.rollouts.decoders import is_encoder_decoder
from tempering.rollouts.sampling import TEACHER_PROMPT
from tempering.rollouts.scoring import GenerationScorer
from tempering.rows import IGNORE_INDEX, TEACHER_OUTPUTS, Rows, is_labeled, upcast_to_float32
from tempering.tasks.base import Task, TeacherForward
from tempering.tasks.padding_checks import check_layout, try_layouts
from tempering.tasks.row_scores import score_rows
from tempering.teachers.outputs import Hidden, PrecomputedLogits, Referenced, Sparse, to_top_k_plus_tail
from tempering.utils.state import unwrapped
from tempering.utils.tensors import on_host, to_device

NO_INPUTS = {
    "labels",
    "ids",
    "learn",
    "replaced",
    "privacy_score",
    TEACHER_OUTPUTS,
    "rollout_log_prob",
    "reward",
    *TEACHER_PROMPT,
}
OPTIONAL = ("use_cache", "position_ids")  # left out for models whose forward does not have them


class LanguageModeling(Task):
    """Task for causal models: batches of (B, L) input_ids with attention_mask, labels or both; (B, L, V) .logits.

    For encoder-decoders see ``Seq2Seq``.

    Position i predicts token i + 1. A row is a token that has a label (not -100 or -1), is not padding and whose
    predecessor belongs to the same text; other tokens are not rows. So padding on either side, and
    micro-batches of unequal size, change neither loss nor gradient. Without labels every token of a text is learned.
    "learn", a (B, L) mask, selects the rows in place of the labels: a token in it with the label -100 is learned from
    the teacher only, as generated tokens are.

    Positions are counted from the attention mask, as left padding needs. A batch with position_ids, which restart at 0
    with every text, is packed (``data.text.pack``). transformers separates packed texts only without an attention_mask,
    so that of a packed batch is not passed on. Logits are the model's own, with its soft cap and scale. A batch of
    inputs_embeds in place of input_ids needs labels.

    With a teacher of another number of logits, the first ``vocabulary`` of both are compared: the columns of padding
    are left out on both sides, which is equivalent to minus infinity on both sides. "ids" of a batch are the ids of its
    samples, for cached teachers. "privacy_score", (B, L) in [0, 1], is the privacy score of each token; a row has that
    of the token it predicts.

    Args:
        vocabulary: number of tokens, such as ``tasks.shared_vocabulary(student, teacher)``; None is the smaller of the
            two heads (the student's without a teacher).
        features: features for feature methods, name -> (student's module, teacher's module), shallow to deep.
        scorer: a score of texts that the student generates, in addition to those of single tokens.
        token_weights: (place, length) -> weights >= 0 of tokens, (N,) each: the number of learned tokens before it in
            its text, and of all of them. "texts" is 1 / length: each text counts the same, whatever its length. None:
            every token counts the same. Scores are not weighted.

    Raises:
        ValueError: for a vocabulary below 1, or other token_weights; while it runs, for weights of another shape.
    """

    unit = "token"
    reads_same_texts = True  # whether the teacher's inputs are the student's

    def __init__(
        self,
        *,
        vocabulary: int | None = None,
        features: Mapping[str, tuple[str, str]] | None = None,
        scorer: GenerationScorer | None = None,
        token_weights: Callable[[Tensor, Tensor], Tensor] | Literal["texts"] | None = None,
    ) -> None:
        if not (token_weights is None or token_weights == "texts" or callable(token_weights)):
            raise ValueError(
                f"{type(self).__name__} needs token_weights 'texts', a function (place, length) -> weights, or None; "
                f"got {token_weights!r}."
            )
        self.token_weights = token_weights
        if vocabulary is not None and vocabulary < 1:
            raise ValueError(f"{type(self).__name__} needs vocabulary >= 1 or None; got {vocabulary!r}.")
        self.vocabulary, self.features, self.scorer = vocabulary, dict(features or {}), scorer

    def prepare_model(self, model: nn.Module) -> None:
        """Register a hook that unpacks the mapping for a transformers model; leave one that takes a mapping.

        Raises:
            TypeError: for an encoder-decoder, or a masked language model, which sees the tokens it would predict.
        """
        if is_encoder_decoder(model):
            raise TypeError(f"{type(model).__name__} is an encoder-decoder. Its task is tasks.Seq2Seq().")
        if text_model_kind(model) == "masked":
            raise TypeError(
                f"{type(model).__name__} is a masked language model, which sees the token that it would predict. Its "
                "task is integrations.huggingface.Labeled()."
            )
        # the forward of peft names only some of the inputs, and passes on the others
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
        parameters = inspect.signature(base.forward).parameters
        wraps = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "input_ids" not in parameters
        prepared = any(isinstance(hook, UnpackInputs) for hook in model._forward_pre_hooks.values())
        if prepared or not (wraps or "input_ids" in parameters):
            return
        unsupported = () if wraps else tuple(name for name in OPTIONAL if name not in parameters)
        unsupported, inexact = (unsupported, {}) if wraps else try_layouts(model, unsupported)
        model.register_forward_pre_hook(UnpackInputs(unsupported, inexact), with_kwargs=True)

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        _check(batch)
        inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS} | {"use_cache": False}
        mask, positions = batch.get("attention_mask"), batch.get("position_ids")
        if mask is not None and positions is None:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        elif mask is not None and _is_packed(*on_host((positions, mask))):
            del inputs["attention_mask"]
            inputs["position_ids"] = positions.masked_fill(mask == 0, 0)  # every token of padding is a text of its own
        return inputs, with_teacher_outputs(inputs, batch), batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        if isinstance(teacher, Referenced):
            return self._with_reference(student, teacher, batch)
        index, shape, fields = self.row_fields(batch)
        z = _logits(student, "student", shape).flatten(0, 1).index_select(0, index)[:, : self.vocabulary]
        if isinstance(teacher, Sparse):
            entries = teacher.gather_positions(*self.teacher_index(batch, index, shape))
            if (sampled := fields["sampled_id"]) is not None:
                matches = (entries.ids == sampled[:, None]) & ~torch.isneginf(entries.logp)
                found = matches.int().argmax(-1)
                fields["sampled_id"] = torch.where(matches.any(-1), found, entries.ids.shape[1])  # else the tail
                fields["rollout_log_prob"] = None  # of a token, not of the tail
            z, t, target = to_top_k_plus_tail(z, entries, fields["target"])
            fields["target"] = target
            return [Rows(z, t, **fields)]
        if teacher is None:
            return [Rows(z, z.detach(), **fields)]
        t = _teacher_logits(teacher, *self.teacher_index(batch, index, shape))
        columns = min(z.shape[1], t.shape[1])
        return [Rows(z[:, :columns], t[:, :columns], **fields)]

    def _with_reference(self, student: Any, teacher: Referenced, batch: Any) -> list[Rows]:
        """Return the rows with the logits of the reference model, over the same classes as the teacher's."""
        if not self.reads_same_texts:
            raise ValueError(
                f"WithReference: in {type(self).__name__} the reference model would read the teacher's texts, not the "
                "student's."
            )
        (rows,) = self.rows(student, teacher.output, batch)
        index, shape, _ = self.row_fields(batch)
        r = _teacher_logits(teacher.reference, index, shape)[:, : self.vocabulary]
        if isinstance(teacher.output, Sparse):
            r = to_top_k_plus_tail(r, teacher.output.gather_positions(index, shape))[0]
        return [rows.replace(reference=r[:, : rows.student.shape[1]])]

    def row_fields(self, batch: Any) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
        """Return the rows' indices (N,) among B * L positions, (B, L), and the fields of ``Rows`` beside logits."""
        shape = self._shape(batch)
        index, target, weight = self._positions(batch)
        weight = self._token_weights(batch, index, shape) if weight is None else weight
        ids = batch["ids"].index_select(0, index // shape[1]) if "ids" in batch else None
        fields = {"target": target, "weight": weight, "ids": ids, "positions": index % shape[1]}
        fields["privacy_score"] = _of_predicted(batch.get("privacy_score"), index)
        log_prob = _of_predicted(batch.get("rollout_log_prob"), index)
        sampled = None if log_prob is None else _of_predicted(self._generated(batch), index)
        text = None if log_prob is None else index // shape[1]
        fields |= {"sampled_id": sampled, "rollout_log_prob": log_prob, "text": text}
        if batch.get("reward") is not None:
            fields["reward"] = batch["reward"].index_select(0, index // shape[1])
        return index, shape, fields

    def _token_weights(self, batch: Any, index: Tensor, shape: tuple[int, int]) -> Tensor | None:
        """Return the weights of the rows at these of the B * L positions; None without ``token_weights``."""
        if self.token_weights is None:
            return None
        first = torch.zeros(shape, dtype=torch.long, device=index.device)
        first[:, 0] = 1
        if batch.get("position_ids") is not None:  # packed
            first |= (batch["position_ids"] == 0).long()
        text = first.flatten().cumsum(0).index_select(0, index)
        _, inverse, counts = text.unique_consecutive(return_inverse=True, return_counts=True)
        begins = counts.cumsum(0) - counts
        place, length = torch.arange(len(index), device=index.device) - begins[inverse], counts[inverse]
        weigh: Callable[[Tensor, Tensor], Any] | str = self.token_weights
        weights = 1.0 / length if isinstance(weigh, str) else weigh(place, length)
        if not isinstance(weights, Tensor) or weights.shape != index.shape:
            raise ValueError(
                f"{type(self).__name__} needs token_weights that return one weight per token, {tuple(index.shape)}; "
                f"got {tuple(getattr(weights, 'shape', ())) or weights}."
            )
        return weights.float()

    def teacher_index(self, batch: Any, index: Tensor, shape: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Return the rows' indices among the positions of the teacher's output, and the number of those, (B, L)."""
        return index, shape

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        if self.token_weights is not None:
            index, _, weight = self._positions(batch)
            weight = self._token_weights(batch, index, self._shape(batch)) if weight is None else weight
            return {"logits": weight.sum()}  # pyright: ignore[reportOptionalMemberAccess]
        return {"logits": prediction_mask(batch).sum()}

    def learned(self, batch: Any) -> Tensor:
        """Return which positions of the teacher's logits are rows, (B, L), as caches of its outputs store."""
        index, _, weight = self._positions(batch)
        index, shape = self.teacher_index(batch, index, self._shape(batch))
        mask = torch.zeros(shape, dtype=torch.bool, device=index.device).flatten()
        return mask.index_fill(0, index if weight is None else index[:0], True).view(shape)

    def scored_rows(self, student: Any, teacher: Any, batch: Any) -> tuple[Rows, Tensor | None]:
        teacher = teacher.output if isinstance(teacher, Referenced) else teacher
        if not isinstance(teacher, Sparse):
            return super().scored_rows(student, teacher, batch)
        # the student is scored on its whole vocabulary, not on the teacher's most likely tokens
        index, shape, _ = self.row_fields(batch)
        teacher_top = teacher.gather_positions(*self.teacher_index(batch, index, shape)).ids[:, 0]
        return self.rows(student, None, batch)[-1], teacher_top

    @torch.no_grad()
    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return the loss in nats per token, its perplexity, and top-1 accuracy and agreement in [0, 1].

        The scores of ``scorer`` on generated texts are added.

        Raises:
            NothingToScoreError: if no token has a label.
        """
        for model in (student, getattr(teacher, "model", None)):
            if isinstance(model, nn.Module):
                self.prepare_model(unwrapped(model))
        out = score_rows(self, student, batches, teacher)
        return out if self.scorer is None else out | self.scorer(student, batches, vocabulary=self.vocabulary)

    def examples(
        self, student: nn.Module, batches: Iterable[Any], teacher: TeacherForward, most: int
    ) -> list[dict[str, Any]]:
        from tempering.tasks.examples import token_examples

        return token_examples(self, student, batches, teacher, most) if self.comparable else []

    def score_teacher(self, teacher: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        return score_rows(
            self, teacher, batches, None
        )  # without texts of ``scorer``, which a large teacher writes slowly

    def headline(self) -> tuple[str, bool]:
        return "loss", False

    def probability_cut(self, student: Any, teacher: Any, batch: Any) -> float | None:
        teacher = teacher.output if isinstance(teacher, Referenced) else teacher
        index, _, weight = self._positions(batch)
        shape = self._shape(batch)
        columns = _logits(student, "student", shape)[..., : self.vocabulary].shape[-1]
        if isinstance(teacher, Sparse) or weight is not None or not len(index):  # no row
            return None
        logits = _teacher_logits(teacher, *self.teacher_index(batch, index, shape))
        if logits.shape[1] <= columns:
            return None
        cut = 0.0
        for z in map(upcast_to_float32, logits.split(256)):
            cut += float((z[:, columns:].logsumexp(-1) - z.logsumexp(-1)).exp().sum())
        return cut / len(index)

    def _generated(self, batch: Any) -> Tensor:
        """Return the tokens of a generated batch, (B, L)."""
        return batch["input_ids"]

    def _shape(self, batch: Any) -> tuple[int, int]:
        """Return (B, L) of the models' logits."""
        _check(batch)
        B, L = _tokens(batch).shape
        return B, L

    def _positions(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the rows' indices among B * L positions, targets and weights; without rows, one of weight 0."""
        device, batch = _tokens(batch).device, host_fields(batch)  # the number of rows depends on their values
        keep = prediction_mask(batch)
        length = keep.shape[1] + 1
        row, column = keep.nonzero(as_tuple=True)
        if not len(row):
            dummy = row.new_zeros(min(1, keep.shape[0] * length))
            return to_device((dummy, dummy + IGNORE_INDEX, torch.zeros(len(dummy), device=row.device)), device)
        return to_device((row * length + column, _labels(batch)[row, column + 1].long(), None), device)


def host_fields(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with what determines its rows on the CPU, if it is known there: see ``on_host``."""
    names = ("input_ids", "labels", "learn", "attention_mask", "position_ids", "generated", "teacher_prompt_mask")
    return {**batch, **on_host({name: batch[name] for name in names if batch.get(name) is not None})}


def _is_packed(positions: Tensor, mask: Tensor) -> bool:
    """Return whether a text begins behind another one of its row."""
    return bool(((positions == 0) & (mask != 0))[:, 1:].logical_and(mask[:, :-1] != 0).any())


def prediction_mask(batch: Mapping[str, Any]) -> Tensor:
    """Return which tokens from the second on are rows, (B, L - 1): labeled, no padding, not first in their text."""
    _check(batch)
    learn = batch.get("learn")
    if learn is None:
        learn = is_labeled(_labels(batch))
    keep = learn[:, 1:] != 0
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None:
        keep = keep & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if positions is not None:
        keep = keep & (positions[:, 1:] > 0)
    return keep


def text_model_kind(model: nn.Module) -> str:
    """Return "causal", "masked" or "encoder-decoder" for a language model of transformers, in any wrappers; else ""."""
    inner: Any = next((m for m in model.modules() if callable(getattr(m, "can_generate", None))), None)
    config = getattr(inner, "config", None)
    if config is None or not inner.can_generate():
        return "masked" if type(inner).__name__.endswith("ForMaskedLM") else ""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    return "causal" if getattr(config, "causal", True) else ""  # XLM and Flaubert have one class for both


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return the tokens, (B, L), or the labels of a batch of embeddings."""
    return batch["labels"] if batch.get("input_ids") is None else batch["input_ids"]


def _labels(batch: Mapping[str, Any]) -> Tensor:
    return batch["input_ids"] if batch.get("labels") is None else batch["labels"]


def _of_predicted(values: Tensor | None, index: Tensor) -> Tensor | None:
    """Return the values, (B, L), of the tokens predicted at these of the B * L positions; None if there are none."""
    return None if values is None else values.roll(-1, 1).flatten().index_select(0, index)  # the last predicts nothing


class UnpackInputs:
    """A forward pre-hook that unpacks a mapping to keyword arguments, without those that the model does not take."""

    def __init__(self, unsupported: tuple[str, ...], inexact: Mapping[str, str] | None = None) -> None:
        self.unsupported, self.inexact = unsupported, dict(inexact or {})

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if len(args) == 1 and isinstance(args[0], Mapping):
            args, kwargs = (), {**args[0], **kwargs}
        if "position_ids" in self.unsupported and "position_ids" in kwargs and kwargs.get("attention_mask") is None:
            raise ValueError(
                f"{type(model).__name__} takes no position_ids, so it cannot keep packed texts apart. Pad them: "
                "data.text.collate(examples)."
            )
        if self.inexact:
            check_layout(model, self.inexact, kwargs)
        return args, {name: value for name, value in kwargs.items() if name not in (*self.unsupported, TEACHER_OUTPUTS)}


def _check(batch: Any) -> None:
    """Check that a batch has input_ids (B, L), or labels (B, L), and labels and masks of their shape."""
    ids = batch.get("input_ids", batch.get("labels")) if isinstance(batch, Mapping) else None
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
                f"{tuple(value.shape)}. The labels are not shifted: the task shifts them."
            )


def _teacher_logits(output: Any, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the teacher's logits at these of the B * L positions, (N, V)."""
    if isinstance(output, Hidden | PrecomputedLogits):
        return output.gather_positions(index, shape)
    return _logits(output, "teacher", shape).flatten(0, 1).index_select(0, index)


def _logits(output: Any, side: str, shape: tuple[int, ...]) -> Tensor:
    """Return the (B, L, V) logits of a model's output."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == shape:
        return logits
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(f"the {side} must return (B, L, V) logits, here ({shape[0]}, {shape[1]}, V); got {got}.")
