"""Distillation in the trainer of sentence-transformers: a loss, and a student saved as a SentenceTransformer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempering.methods.base import Method
from tempering.models.encoder import Encoder
from tempering.rows import IGNORE_INDEX, Rows
from tempering.tasks.embeddings import Embeddings, EncoderTask, Similarity
from tempering.tasks.ranking import Ranking
from tempering.teachers.live import Live
from tempering.training.checks import as_method, check_models_are_distinct
from tempering.training.method_fits import check_method

try:
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("this integration needs sentence-transformers: pip install 'tempering[sentence]'") from error


class DistillLoss(nn.Module):
    """Loss for ``SentenceTransformerTrainer``: any method over the rows of a task of encoders, of columns of texts.

    ==========  ======================================  ===================================  ==========================
    task        columns                                 labels without a teacher             with a teacher
    ==========  ======================================  ===================================  ==========================
    Ranking     query, relevant document, others        its scores (N, K)                    not needed
    Embeddings  texts, such as sources, translations    its embeddings (N, D) of the first,  not needed
                                                        or (N, columns, D)
    Similarity  first and second texts                                                       similarities (N,), or none
    ==========  ======================================  ===================================  ==========================

    The loss is the mean over the rows of a batch, as of other losses of the library, so with gradient accumulation a
    step is the mean over its batches. Projections are parameters of the loss, which the trainer trains too. Methods are
    at ``progress``, 1.0 unless a callback sets it: warmups are over and schedules at their end.

    Args:
        model: the student.
        method: the loss, or its name.
        task: ``Ranking()``, ``Ranking(candidates="batch")``, ``Embeddings()`` or ``Similarity()``; None: Ranking().
        teacher: a SentenceTransformer, frozen; texts are decoded for it if its tokens are others. None: labels are its
            outputs.
        teacher_columns: number of columns that the teacher sees, the first ones, of Embeddings; 1 for translated pairs.
        teacher_size: size of the embeddings in the labels, if it is not the student's.

    Raises:
        TypeError: for a method that runs the models itself, or a task of another kind.
        ValueError: for a method that learns from steps, or whose parameters depend on the number of candidates.
        SelfCheckError: for a method without a meaning for the task.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        method: Method | str,
        *,
        task: EncoderTask | None = None,
        teacher: SentenceTransformer | None = None,
        teacher_columns: int | None = None,
        teacher_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.method, self.task = model, as_method(method), Ranking() if task is None else task
        name = type(self.method).__name__
        if self.method.owns_step:
            raise TypeError(f"{name} owns its step, and so does this trainer. Run it with tempering.distill.")
        if self.method.adaptive_policies():
            raise ValueError(f"{name} has a policy that learns from every step. Run it with tempering.distill.")
        if not isinstance(self.task, EncoderTask):
            raise TypeError(f"DistillLoss needs a task of encoders, such as tasks.Ranking(); got {self.task!r}.")
        check_models_are_distinct(model, teacher)
        check_method(self.method, self.task)
        self.teacher, self.teacher_columns, self.progress = None, teacher_columns, 1.0
        if teacher is not None:
            self.teacher, self._same_tokens = Live(Encoder(teacher)), _vocabulary(teacher) == _vocabulary(model)
        self._setup(teacher_size if teacher is None else _size(teacher))

    def _setup(self, teacher_size: int | None) -> None:
        """Create the method's projections, before the trainer makes its optimizer."""
        if not self.method.needs_setup():
            return
        if isinstance(self.task, Ranking):
            raise ValueError(
                f"{type(self.method).__name__} has parameters that depend on the candidates. Run it with "
                "tempering.distill."
            )
        size = _size(self.model)
        s, t = torch.zeros(2, size), torch.zeros(2, teacher_size or size)
        labels = torch.zeros(1) if isinstance(self.task, Similarity) else None
        with torch.no_grad():
            self.method.setup(self.task.rows(s, t, (s, labels))[0])

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of a batch, ().

        Args:
            sentence_features: of each column, its token ids, mask and so on.
            labels: see above.

        Raises:
            ValueError: for columns or labels that the task has no use for.
        """
        features = [dict(column) for column in sentence_features]
        student = [self.model(dict(column))["sentence_embedding"] for column in features]
        rows = self._rows(student, self._taught(features, student, labels), labels)
        blocks = self.method.train(self.training).losses([rows], self.progress)
        return torch.stack([block.loss for block in blocks]).sum()

    @torch.no_grad()
    def _taught(self, features: list[dict[str, Any]], student: list[Tensor], labels: Tensor | None) -> Tensor | None:
        """Return the teacher's output in the order of the task; None if the method needs none."""
        if self.teacher is not None:
            self.teacher.to(student[0].device)
            columns = features[: self.teacher_columns] if isinstance(self.task, Embeddings) else features
            return self._ordered([self.teacher(self._for_teacher(column, student[0]), None) for column in columns])
        if not self.method.needs_teacher:
            return None
        wanted = "(N, D) or (N, columns, D) embeddings" if isinstance(self.task, Embeddings) else "(N, K) scores"
        if isinstance(self.task, Similarity) or labels is None or not labels.is_floating_point() or labels.ndim < 2:
            got = "none" if labels is None else f"{tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"DistillLoss needs a teacher=, or its {wanted} as labels; got {got}.")
        return labels.transpose(0, 1).flatten(0, 1) if labels.ndim == 3 else labels

    def _for_teacher(self, column: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
        if self._same_tokens:
            return {name: x for name, x in column.items() if isinstance(x, Tensor)}
        assert self.teacher is not None
        model: Any = self.teacher.model
        texts = self.model.tokenizer.batch_decode(column["input_ids"], skip_special_tokens=True)
        encoded = model.model.preprocess(texts)
        return {name: x.to(like.device) for name, x in encoded.items() if isinstance(x, Tensor)}

    def _ordered(self, columns: list[Tensor]) -> Tensor:
        """Return the embeddings of all columns in the order of the task."""
        if isinstance(self.task, Ranking) and self.task.candidates == "given":
            if len(columns) < 3:
                raise ValueError(
                    f"DistillLoss with Ranking() needs columns of queries and two candidates or more; got "
                    f"{len(columns)} columns. Of pairs, use Ranking(candidates='batch')."
                )
            return torch.cat((columns[0], torch.stack(columns[1:], 1).flatten(0, 1)))
        return torch.cat(columns)

    def _rows(self, student: list[Tensor], teacher: Tensor | None, labels: Tensor | None) -> Rows:
        first = student[0]
        if isinstance(self.task, Ranking):
            n = torch.arange(len(first), device=first.device)
            labels = n if self.task.candidates == "batch" else torch.zeros_like(n)
        elif isinstance(self.task, Similarity):
            known = labels is not None and labels.ndim == 1
            labels = labels.to(first) if known and labels is not None else first.new_full((len(first),), torch.nan)
        else:
            labels = torch.full((len(first),), IGNORE_INDEX, device=first.device)
        output = self._ordered(student)
        (rows,) = self.task.rows(output, teacher, (output, labels))
        return rows

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, for the model card."""
        return {"task": type(self.task).__name__, "method": type(self.method).__name__, **self.method.hyperparameters()}


def as_sentence_transformer(encoder: Encoder, tokenizer: Any, path: str | Path) -> SentenceTransformer:
    """Save an encoder of transformers so that ``SentenceTransformer(path)`` loads it, and return that model.

    Its modules are a Transformer, a Pooling and, if the encoder normalizes, a Normalize: parts for a ``Router`` too,
    such as ``Router.for_query_document([*student], [*teacher])`` of a student of the teacher's embeddings. The default
    settings of the tokenizer are saved with it; "cls" needs padding on the right.

    Args:
        encoder: the student that was trained.
        tokenizer: of the same model.
        path: a folder.

    Raises:
        ValueError: for a model that is none of transformers.
    """
    from sentence_transformers.sentence_transformer import modules as parts  # pyright: ignore[reportMissingImports]

    model: Any = encoder.model
    if isinstance(model, SentenceTransformer):
        model.save_pretrained(str(path))
        return SentenceTransformer(str(path), device="cpu")
    if not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"as_sentence_transformer needs a model of transformers in the encoder; got {type(model).__name__}."
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = parts.Transformer(folder)
        modules = [transformer, parts.Pooling(transformer.get_embedding_dimension(), encoder.pooling)]
        modules += [parts.Normalize()] if encoder.normalize else []
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(path))
    return SentenceTransformer(str(path), device="cpu")


def _size(model: SentenceTransformer) -> int:
    size = model.get_embedding_dimension()
    if size is None:
        raise ValueError("DistillLoss finds no embedding dimension in the model. Does it end in a Pooling or Dense?")
    return size


def _vocabulary(model: SentenceTransformer) -> dict[str, int]:
    return model.tokenizer.get_vocab()
