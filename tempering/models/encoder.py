"""A model of texts as a module that returns one embedding per text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "cls"]


class Encoder(nn.Module):
    """Return embeddings (N, D) of texts, for ``tasks.Embeddings``, ``tasks.Similarity`` and ``tasks.Ranking``.

    It is called with a mapping of input_ids (N, L) and attention_mask (N, L), of which the model gets what it takes.
    The model is ``encoder.model``, trained in place.

    Args:
        model: of transformers, with last_hidden_state (N, L, D) in its output, such as ``AutoModel``; or a
            SentenceTransformer, which pools and normalizes itself.
        pooling: "mean" over the tokens that are not padding, or "cls", the first of them.
        normalize: whether to divide embeddings by their length.

    Raises:
        ValueError: for another pooling.
    """

    def __init__(self, model: nn.Module, *, pooling: Pooling = "mean", normalize: bool = False) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"Encoder needs pooling 'mean' or 'cls'; got {pooling!r}.")
        self.model, self.pooling, self.normalize = model, pooling, normalize
        parameters = inspect.signature(model.forward).parameters
        self._names = frozenset(parameters) if "input_ids" in parameters else None

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the embeddings, (N, D).

        Raises:
            ValueError: for inputs or outputs without the entries above.
        """
        if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
            raise ValueError(
                f"Encoder needs a mapping with input_ids (N, L), such as a tokenizer returns; got "
                f"{', '.join(map(repr, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__}."
            )
        if self._names is None:
            x = _vectors(self.model(dict(inputs)))
        else:
            x = self._pooled(self.model(**{name: x for name, x in inputs.items() if name in self._names}), inputs)
        return F.normalize(x, dim=-1) if self.normalize else x

    def _pooled(self, output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        states = output.get("last_hidden_state") if isinstance(output, Mapping) else None
        if not isinstance(states, Tensor) or states.ndim != 3:
            raise ValueError(
                f"Encoder pools last_hidden_state (N, L, D), which {type(self.model).__name__} does not return. Load "
                "it by transformers.AutoModel, without a head."
            )
        mask = inputs.get("attention_mask")
        if mask is None:
            return states.mean(1) if self.pooling == "mean" else states[:, 0]
        if self.pooling == "cls":  # texts padded on the left do not begin at 0
            first = mask.long().argmax(1).view(-1, 1, 1).expand(-1, 1, states.shape[2])
            return states.gather(1, first).squeeze(1)
        kept = mask.unsqueeze(-1).to(states.dtype)
        return (states * kept).sum(1) / kept.sum(1).clamp_min(1.0)


def _vectors(output: Any) -> Tensor:
    vectors = output.get("sentence_embedding") if isinstance(output, Mapping) else output
    if isinstance(vectors, Tensor) and vectors.ndim == 2:
        return vectors
    raise ValueError("Encoder needs a model that takes input_ids, or a SentenceTransformer.")
