"""Sequence to sequence: one row per target token of an encoder-decoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.data.batches import with_teacher_outputs
from tempering.data.text import sources_right
from tempering.rollouts.decoders import is_encoder_decoder, unwrap_model
from tempering.rows import IGNORE_INDEX, is_labeled
from tempering.tasks.language_modeling import (
    NO_INPUTS,
    LanguageModeling,
    UnpackInputs,
    host_fields,
)
from tempering.utils.tensors import on_host, to_device


class Seq2Seq(LanguageModeling):
    """Task for encoder-decoders: batches of (B, S) input_ids with attention_mask, and (B, L) labels; logits (B, L, V).

    ``data.pairs.collate_pairs`` makes them. Position i predicts label i: each model shifts the labels right and inserts
    its own start token. A row is a label that is not -100, or one selected by "learn", (B, L). So padding on either
    side, and micro-batches of unequal size, change neither loss nor gradient, and a target's end counts once.

    "generated", (B, L), are decoder input ids in place of the labels, for generated texts, whose tokens have no label.
    With labels only, -100 is decoded as padding: exclude tokens by "learn", not by -100 in the middle of a target.

    Sources are padded on the right, since many encoders have learned positions; padding on the left is moved.
    Everything else, including the arguments, is as in ``LanguageModeling``.
    """

    def prepare_model(self, model: nn.Module) -> None:
        """Register a hook that unpacks the mapping for a transformers model; leave one that takes a mapping.

        Raises:
            TypeError: for a transformers model that is not an encoder-decoder.
        """
        if hasattr(unwrap_model(model), "config") and not is_encoder_decoder(model):
            raise TypeError(f"{type(model).__name__} is not an encoder-decoder. Its task is tasks.LanguageModeling().")
        parameters = inspect.signature(model.forward).parameters
        wraps = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "input_ids" not in parameters
        prepared = any(isinstance(hook, UnpackInputs) for hook in model._forward_pre_hooks.values())
        if prepared or not (wraps or "input_ids" in parameters):
            return
        unsupported = () if wraps or "use_cache" in parameters else ("use_cache",)
        model.register_forward_pre_hook(_ShiftLabels(unsupported), with_kwargs=True)

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        _check(batch)
        inputs = {name: value for name, value in batch.items() if name not in {*NO_INPUTS, "generated"}}
        inputs = sources_right(inputs) | {"labels": _decoder_ids(batch), "use_cache": False}
        return inputs, with_teacher_outputs(inputs, batch), batch.get("ids")

    def row_fields(self, batch: Any) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
        if isinstance(batch, Mapping):  # the base class reads the values of the next token
            names = [name for name in ("privacy_score", "rollout_log_prob") if name in batch]
            batch = {**batch, **{name: batch[name].roll(1, 1) for name in names}}
        return super().row_fields(batch)

    def _generated(self, batch: Any) -> Tensor:
        return batch["generated"].roll(1, 1)

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        _check(batch)
        return super().row_weights(batch) if self.token_weights is not None else {"logits": _row_mask(batch).sum()}

    def _shape(self, batch: Any) -> tuple[int, int]:
        _check(batch)
        B, L = _decoder_ids(batch).shape
        return B, L

    def _positions(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        device, batch = _decoder_ids(batch).device, host_fields(batch)
        index = _row_mask(batch).flatten().nonzero().flatten()
        labels = (
            batch["labels"] if batch.get("labels") is not None else torch.full_like(batch["generated"], IGNORE_INDEX)
        )
        if not len(index):
            dummy = index.new_zeros(min(1, labels.numel()))
            return to_device((dummy, dummy + IGNORE_INDEX, torch.zeros(len(dummy), device=index.device)), device)
        return to_device((index, labels.flatten().index_select(0, index).long(), None), device)


def _decoder_ids(batch: Mapping[str, Any]) -> Tensor:
    """Return the decoder's input ids before the shift."""
    return batch["labels"] if batch.get("generated") is None else batch["generated"]


def _row_mask(batch: Mapping[str, Any]) -> Tensor:
    return is_labeled(batch["labels"]) if batch.get("learn") is None else batch["learn"] != 0


class _ShiftLabels(UnpackInputs):
    """Unpacks inputs and replaces labels by shifted decoder inputs, so that the model computes no loss."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = super().__call__(model, args, kwargs)
        shift: Any = getattr(unwrap_model(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is not None and "labels" in kwargs and "decoder_input_ids" not in kwargs:
            kwargs["decoder_input_ids"] = shift(labels=kwargs.pop("labels"))
        return args, kwargs


def _check(batch: Any) -> None:
    """Check that a batch has sources and targets, and masks of their shapes."""
    fields = batch if isinstance(batch, Mapping) else {}
    source, target = fields.get("input_ids"), fields.get("labels" if fields.get("generated") is None else "generated")
    if not all(isinstance(x, Tensor) and x.ndim == 2 for x in (source, target)) or len(source) != len(target):  # pyright: ignore
        got = {n: tuple(x.shape) for n, x in fields.items() if isinstance(x, Tensor)} or type(batch).__name__
        raise ValueError(
            f"Seq2Seq needs batches that are mappings with input_ids (B, S) and labels (B, L); got {got}. "
            "data.pairs.collate_pairs makes them."
        )
    for name, like in (("attention_mask", source), ("learn", target), ("labels", target), ("privacy_score", target)):
        value = fields.get(name)
        if value is not None and value.shape != like.shape:  # pyright: ignore[reportOptionalMemberAccess]
            raise ValueError(
                f"Seq2Seq needs {name} of shape {tuple(like.shape)}; got {tuple(value.shape)}. "  # pyright: ignore
                "The labels are not shifted: the model shifts them."
            )
    learn, labels = fields.get("learn"), fields.get("labels")
    if learn is None or labels is None or fields.get("generated") is not None:
        return
    learn, labels = on_host((learn, labels))
    if bool(((learn != 0) & ~is_labeled(labels)).any()):
        raise ValueError(
            'Seq2Seq: "learn" selects tokens whose label is -100, and there is no "generated" with their ids.'
        )
