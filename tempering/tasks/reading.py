"""Models that read on, a few tokens at a time: causal ones with their cache, encoder-decoders from the start."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

CACHES = ("past_key_values", "cache")  # what transformers call it, before and since version 5.2x


def inner(model: nn.Module) -> nn.Module:
    """The language model inside its wrappers: the first whose forward names a cache; itself where none does."""
    return next((m for m in model.modules() if _cache_of(m) is not None), model)


def encodes(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder of transformers."""
    return bool(getattr(getattr(inner(model), "config", None), "is_encoder_decoder", False))


def start_of(model: nn.Module) -> int:
    """The token that the decoder begins with.

    Raises:
        ValueError: for a model whose config names none.
    """
    config = getattr(inner(model), "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(inner(model)).__name__} does not say what its decoder begins with. Set "
            "model.config.decoder_start_token_id, to the padding for T5."
        )
    return int(start)


class Reader:
    """A causal model reading on, token by token, with its cache. Slots that turned out wrong are masked, not removed.

    Each row counts its own positions, so rows may go on at their own pace. Needs attention over all slots: a sliding
    window or a recurrent state would count the masked ones.

    Raises:
        TypeError: for a model without a cache.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None) -> None:
        self.name = _cache_of(inner(model))
        if self.name is None:
            raise TypeError(
                f"{type(model).__name__} has no cache: its forward takes neither {' nor '.join(CACHES)}. Causal models "
                "of transformers do."
            )
        self.model, self.vocabulary, self.cache, self.forwards = model, vocabulary, None, 0

    def read(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """The logits after each of these tokens, (B, n, V)."""
        held: dict[str, Any] = {str(self.name): self.cache, "use_cache": True}
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, **held)
        self.cache, self.forwards = getattr(out, str(self.name)), self.forwards + 1
        return out.logits[..., : self.vocabulary]


class Rereader:
    """An encoder-decoder reading on. The source is read once, and what is written again with every call.

    Decoders count their positions by the slots of the cache, so with one no row could go on at its own pace. Without,
    the work grows with the square of the length.

    Args:
        source: input_ids (B, S), and attention_mask where there is padding.
        most: how many tokens the decoder reads at most; what a block has beyond is not asked for.

    Raises:
        TypeError: for a model that is no encoder-decoder.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None, source: Mapping[str, Tensor], *, most: int) -> None:
        if not encodes(model):
            raise TypeError(
                f"{type(model).__name__} is no encoder-decoder, and the other model is one: they cannot write together."
            )
        self.model, self.vocabulary, self.most, self.start, self.forwards = model, vocabulary, most, start_of(model), 0
        self.source = {name: source[name] for name in ("attention_mask",) if source.get(name) is not None}
        self.encoded = inner(model).get_encoder()(input_ids=source["input_ids"], **self.source)  # pyright: ignore
        self.slots: Tensor | None = None

    def read(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """The logits after each of these tokens, (B, n, V)."""
        if self.slots is None:
            self.slots = ids.clone()
            self.slots[:, 0] = self.start  # each begins with its own
        else:
            self.slots = torch.cat((self.slots, ids), 1)
        order = (mask == 0).long().argsort(dim=-1, stable=True)  # what stands first, in its order
        lengths = mask.sum(-1, keepdim=True)
        said = self.model(
            encoder_outputs=self.encoded,
            decoder_input_ids=self.slots.gather(1, order)[:, : min(self.most, int(lengths.max()))],
            use_cache=False,
            **self.source,
        ).logits
        self.forwards += 1
        n = ids.shape[1]
        last = (lengths - n + torch.arange(n, device=ids.device)).clamp_max(said.shape[1] - 1)
        return said.gather(1, last[..., None].expand(-1, -1, said.shape[-1]))[..., : self.vocabulary]


def _cache_of(model: nn.Module) -> str | None:
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in takes), None)
