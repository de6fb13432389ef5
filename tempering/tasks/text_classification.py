"""Text classification: one row per text or pair of texts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tempering.data.batches import with_teacher_outputs
from tempering.tasks.classification import Classification, Outputs


class TextClassification(Classification):
    """Task with batches of (inputs, labels) or (inputs, labels, ids), inputs a mapping of (B, L) ids and their mask.

    transformers models get the inputs as keyword arguments and return (N, C) .logits; others get the mapping. Inputs of
    {"student": ..., "teacher": ...} are two tokenizations of the same texts: rows are texts, so the two vocabularies
    may differ. ``data.TextPairLoader`` makes such batches.
    """

    def prepare_model(self, model: nn.Module) -> None:
        """Register a hook that unpacks the mapping for a transformers model; leave one that takes a mapping."""
        super().prepare_model(model)
        unpack_inputs(model)

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        inputs, _, ids = super().inputs(batch)
        if not isinstance(inputs, Mapping):
            raise ValueError(
                "TextClassification needs inputs that are a mapping, with input_ids (B, L); got "
                f"{type(inputs).__name__}. data.TextPairLoader makes them."
            )
        return inputs.get("student", inputs), with_teacher_outputs(inputs.get("teacher", inputs), batch), ids

    def scores(self, outputs: Outputs) -> dict[str, float]:
        """Return the metrics of Classification, and f1 of class 1 in [0, 1] for two classes."""
        from torchmetrics.functional.classification import binary_f1_score

        out = super().scores(outputs)
        if outputs.student.shape[-1] == 2:
            out["f1"] = float(binary_f1_score(outputs.student.argmax(-1), outputs.labels, ignore_index=-100))
        return out


def unpack_inputs(model: nn.Module) -> None:
    """Register a hook that unpacks a mapping to keyword arguments, for a model that takes input_ids, once."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" in parameters and not any(
        isinstance(hook, _UnpackInputs) for hook in model._forward_pre_hooks.values()
    ):
        model.register_forward_pre_hook(_UnpackInputs(frozenset(parameters)), with_kwargs=True)


class _UnpackInputs:
    """A forward pre-hook that unpacks a mapping to keyword arguments, without those that the model does not take."""

    def __init__(self, parameters: frozenset[str]) -> None:
        self.parameters = parameters

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if len(args) == 1 and isinstance(args[0], Mapping):
            return (), {name: value for name, value in {**args[0], **kwargs}.items() if name in self.parameters}
        return args, kwargs
