"""Text classification: a row is a text, or a pair of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tempering.tasks.classification import Classification, Outputs


class TextClassification(Classification):
    """Batches of (inputs, labels) or (inputs, labels, ids), inputs a mapping of (B, L) token ids and their mask.

    Models of transformers answer (N, C) .logits and are asked by name; others take the mapping itself. Inputs of
    {"student": ..., "teacher": ...} are two tokenizers' readings of the same texts: rows are texts, so the two
    vocabularies need not agree. ``data.TextPairLoader`` makes such batches.
    """

    def prepare_model(self, model: nn.Module) -> None:
        """Let a model of transformers be asked with one mapping of inputs; one that takes a mapping stays as it is."""
        takes = inspect.signature(model.forward).parameters
        if "input_ids" in takes and not any(isinstance(hook, _ByName) for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(_ByName(frozenset(takes)), with_kwargs=True)

    def inputs(self, batch: Any) -> tuple[Any, Any, Tensor | None]:
        given, _, ids = super().inputs(batch)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"TextClassification needs inputs that are a mapping, with input_ids (B, L); got {type(given).__name__}"
                ". data.TextPairLoader makes them."
            )
        return given.get("student", given), given.get("teacher", given), ids

    def scores(self, answers: Outputs) -> dict[str, float]:
        """What Classification says, and f1 of class 1 in [0, 1] where there are two classes."""
        from torchmetrics.functional.classification import binary_f1_score

        out = super().scores(answers)
        if answers.student.shape[-1] == 2:
            out["f1"] = float(binary_f1_score(answers.student.argmax(-1), answers.labels, ignore_index=-100))
        return out


class _ByName:
    """A hook before the forward: one mapping becomes named inputs, without those that the model does not take."""

    def __init__(self, takes: frozenset[str]) -> None:
        self.takes = takes

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if len(args) == 1 and isinstance(args[0], Mapping):
            return (), {name: value for name, value in {**args[0], **kwargs}.items() if name in self.takes}
        return args, kwargs
