"""Sequence to sequence: a row is a token that an encoder-decoder has to write."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.rollouts.decoding import is_encoder_decoder, unwrap_model
from tempering.rows import IGNORE_INDEX, Rows
from tempering.tasks.language_modeling import NO_INPUTS, LanguageModeling, _Unpack, with_teacher_outputs


class Seq2Seq(LanguageModeling):
    """Batches are mappings of (B, S) input_ids with an attention_mask, and (B, L) labels; models answer (B, L, V).

    ``data.pairs.collate_pairs`` makes them. Position i answers for label i: each model shifts the labels right by
    itself, behind its own start. A row is a label that is not -100, or one that "learn", (B, L), names. So padding on
    either side, and micro-batches of unequal size, change neither loss nor gradient, and a target's end counts once.

    "written", (B, L), are the ids that the decoder reads in the labels' place, where a model wrote the text itself and
    its tokens have no label. Where labels alone are given, what is -100 is read as padding: leave tokens unlearned by
    "learn", not by -100 in the midst of a target.

    Sources are padded on the right: many encoders learn their positions. The rest is as in ``LanguageModeling``, and so
    are the arguments.
    """

    def prepare_model(self, model: nn.Module) -> None:
        """Let a model of transformers be asked with one mapping of inputs; one that takes a mapping stays as it is.

        Raises:
            TypeError: for a model of transformers that is no encoder-decoder.
        """
        if hasattr(unwrap_model(model), "config") and not is_encoder_decoder(model):
            raise TypeError(f"{type(model).__name__} is no encoder-decoder. Its task is tasks.LanguageModeling().")
        takes = inspect.signature(model.forward).parameters
        wraps = any(p.kind is p.VAR_KEYWORD for p in takes.values()) and "input_ids" not in takes
        met = any(isinstance(hook, _Unpack) for hook in model._forward_pre_hooks.values())
        if met or not (wraps or "input_ids" in takes):
            return
        absent = () if wraps or "use_cache" in takes else ("use_cache",)
        model.register_forward_pre_hook(_Shift(absent), with_kwargs=True)

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        _check(batch)
        given = {name: value for name, value in batch.items() if name not in {*NO_INPUTS, "generated"}}
        given |= {"labels": _read(batch), "use_cache": False}
        return given, with_teacher_outputs(given, batch), batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        if isinstance(batch, Mapping) and "privacy_score" in batch:  # Generation looks at the token behind
            batch = {**batch, "privacy_score": batch["privacy_score"].roll(1, 1)}
        return super().rows(student, teacher, batch)

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        _check(batch)
        return {"logits": _learned(batch).sum()}

    def _shape(self, batch: Any) -> tuple[int, int]:
        _check(batch)
        B, L = _read(batch).shape
        return B, L

    def _places(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        place = _learned(batch).flatten().nonzero().flatten()
        labels = (
            batch["labels"] if batch.get("labels") is not None else torch.full_like(batch["generated"], IGNORE_INDEX)
        )
        if not len(place):
            nothing = place.new_zeros(min(1, labels.numel()))
            return nothing, nothing + IGNORE_INDEX, torch.zeros(len(nothing), device=place.device)
        return place, labels.flatten().index_select(0, place).long(), None


def _read(batch: Mapping[str, Any]) -> Tensor:
    """What the decoder reads, before it is shifted."""
    return batch["labels"] if batch.get("generated") is None else batch["generated"]


def _learned(batch: Mapping[str, Any]) -> Tensor:
    return batch["labels"] != IGNORE_INDEX if batch.get("learn") is None else batch["learn"] != 0


class _Shift(_Unpack):
    """The same, with the labels turned into what the model's decoder reads; its own loss would be made for nothing."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = super().__call__(model, args, kwargs)
        shift: Any = getattr(unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and "labels" in kwargs and "decoder_input_ids" not in kwargs:
            kwargs["decoder_input_ids"] = shift(labels=kwargs.pop("labels"))
        return args, kwargs


def _check(batch: Any) -> None:
    """Refuse what is no batch of sources with targets, or has a mask of another shape."""
    held = batch if isinstance(batch, Mapping) else {}
    source, target = held.get("input_ids"), held.get("labels" if held.get("generated") is None else "generated")
    if not all(isinstance(x, Tensor) and x.ndim == 2 for x in (source, target)) or len(source) != len(target):  # pyright: ignore
        got = {n: tuple(x.shape) for n, x in held.items() if isinstance(x, Tensor)} or type(batch).__name__
        raise ValueError(
            f"Seq2Seq needs batches that are mappings with input_ids (B, S) and labels (B, L); got {got}. "
            "data.pairs.collate_pairs makes them."
        )
    for name, like in (("attention_mask", source), ("learn", target), ("labels", target), ("privacy_score", target)):
        value = held.get(name)
        if value is not None and value.shape != like.shape:  # pyright: ignore[reportOptionalMemberAccess]
            raise ValueError(
                f"Seq2Seq needs {name} of shape {tuple(like.shape)}; got {tuple(value.shape)}. "  # pyright: ignore
                "The labels are not shifted: the model does that."
            )
    learn, labels = held.get("learn"), held.get("labels")
    if learn is not None and held.get("generated") is None and bool(((learn != 0) & (labels == IGNORE_INDEX)).any()):
        raise ValueError('Seq2Seq: "learn" names tokens whose label is -100, and there is no "written" to say which.')
