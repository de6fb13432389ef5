"""Task for batches as transformers collates them: mappings of inputs with "labels"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from tempering.data.batches import LABELS, with_teacher_outputs
from tempering.rows import TEACHER_OUTPUTS, Rows, is_labeled
from tempering.tasks.base import Task, TeacherForward
from tempering.tasks.classification import check_has_classes
from tempering.tasks.language_modeling import LanguageModeling, text_model_kind
from tempering.tasks.row_scores import score_rows
from tempering.utils.tensors import described, logits_of


class Labeled(Task):
    """Handle batches as transformers collates them: a mapping of inputs with "labels"; models return ``.logits``.

    The labels may have another name of ``data.batches.LABELS``, if the Trainer's ``label_names`` has it too.

    (N, C) logits give N rows; rows with the label -100 learn from the teacher only. (N, L, C) logits, of token
    classification or masked language models, give a row for every token whose label is not -100. If a batch has "ids",
    they identify the samples (the Trainer then needs remove_unused_columns=False).

    Args:
        shift: position i predicts the label of i + 1, as in causal language models. ``Labeled(shift=True)`` is
            ``tasks.LanguageModeling()``.
        keep_labels: pass the labels to the models too; encoder-decoders build the decoder's inputs from them.
        features: features for feature-based methods, name -> (student's module, teacher's module), shallow to deep.

    Raises:
        ValueError: for shift together with keep_labels.
        TypeError: for shift in a subclass.
    """

    def __new__(
        cls, *, shift: bool = False, keep_labels: bool = False, features: Mapping[str, tuple[str, str]] | None = None
    ) -> Self:
        if not shift:
            return super().__new__(cls)
        if keep_labels:
            raise ValueError(
                "shift=True is for causal models, whose loss needs no labels in the model; keep_labels=True is for "
                "encoder-decoders, which shift labels themselves. Set one of them."
            )
        if cls is not Labeled:
            raise TypeError(f"{cls.__name__}(shift=True): derive from tasks.LanguageModeling, which shifts the labels.")
        return LanguageModeling(features=features)  # pyright: ignore[reportReturnType]

    def __init__(
        self, *, shift: bool = False, keep_labels: bool = False, features: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        self.keep_labels, self.features = keep_labels, dict(features or {})

    def prepare_model(self, model: nn.Module) -> None:
        """Reject models of text whose task is another one.

        Raises:
            TypeError: for a causal language model, whose labels have to be shifted, or, without keep_labels, an
                encoder-decoder that writes text; for a model of several labels per sample, or of regression.
        """
        check_has_classes(model)
        kind = text_model_kind(model)
        name = next((type(m).__name__ for m in model.modules() if hasattr(m, "can_generate")), "")
        if kind == "causal":
            raise TypeError(
                f"{name} is a causal language model: position i predicts token i + 1, and Labeled() would train it to "
                "copy its input. Its task is tasks.LanguageModeling()."
            )
        if kind == "encoder-decoder" and not self.keep_labels:
            raise TypeError(
                f"{name} is an encoder-decoder, which needs the labels as the decoder's inputs. Its task is "
                "tasks.Seq2Seq()."
            )

    def inputs(self, batch: Any) -> tuple[dict[str, Any], dict[str, Any], Tensor | None]:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"Labeled needs batches that are mappings, as collators of transformers return; got "
                f"{type(batch).__name__}. For (inputs, labels) use tasks.Classification()."
            )
        dropped = {"ids", TEACHER_OUTPUTS} if self.keep_labels else {"ids", TEACHER_OUTPUTS, *LABELS}
        inputs = {name: value for name, value in batch.items() if name not in dropped}
        return inputs, with_teacher_outputs(inputs, batch), batch.get("ids")

    def rows(self, student: Any, teacher: Any, batch: Any) -> list[Rows]:
        logits = _logits(student, "student")
        teacher_logits = logits.detach() if teacher is None else _logits(teacher, "teacher")
        if logits.shape != teacher_logits.shape:
            raise ValueError(
                f"the student's logits are {tuple(logits.shape)} and the teacher's {tuple(teacher_logits.shape)}: both "
                "need the same classes (or vocabulary) in the same order."
            )
        labels, ids = _labels(batch), batch.get("ids")
        if logits.ndim == 2:
            return [Rows(logits, teacher_logits, labels, ids=ids)]
        if labels is None or labels.shape != logits.shape[:2]:
            got = "none" if labels is None else str(tuple(labels.shape))
            raise ValueError(
                f"(N, L, C) logits need labels of shape (N, L) = {tuple(logits.shape[:2])}, -100 where a token is left "
                f"out; got {got}. Collate with labels, such as DataCollatorForTokenClassification."
            )
        labels = labels.flatten()
        index, weight = is_labeled(labels).nonzero().flatten(), None
        if not len(index):  # one row of weight 0 connects the loss to the graph
            index, weight = index.new_zeros(min(1, len(labels))), logits.new_zeros(min(1, len(labels)))
        student, teacher = (z.flatten(0, 1).index_select(0, index) for z in (logits, teacher_logits))
        ids = None if ids is None else ids.index_select(0, index // logits.shape[1])
        target, positions = labels.index_select(0, index), index % logits.shape[1]
        return [Rows(student, teacher, target, weight, ids=ids, positions=positions)]

    def row_weights(self, batch: Any) -> dict[str, Tensor | float]:
        labels = _labels(batch)
        if labels is None or labels.ndim < 2:
            return {"logits": float(len(next(iter(batch.values())) if labels is None else labels))}
        return {"logits": is_labeled(labels).sum()}

    def score(
        self, student: nn.Module, batches: Iterable[Any], *, teacher: TeacherForward | None = None
    ) -> dict[str, float]:
        """Return accuracy in [0, 1], loss in nats, and agreement with the teacher, if any, over labeled rows."""
        return score_rows(self, student, batches, teacher)


def _labels(batch: Mapping[str, Any]) -> Tensor | None:
    return next((batch[name] for name in LABELS if batch.get(name) is not None), None)


def _logits(output: Any, side: str) -> Tensor:
    """Return the (N, C) or (N, L, C) logits of a model's output."""
    logits = logits_of(output)
    if isinstance(logits, Tensor) and logits.ndim in (2, 3):
        return logits
    raise ValueError(
        f"the {side} must return (N, C) or (N, L, C) logits, as a tensor or as .logits; got {described(logits)}."
    )
