"""Decoders: the logits after new tokens, of causal models and encoder-decoders, with a key-value cache or without."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

CACHES = ("past_key_values", "cache")  # name of the cache argument in transformers, before and since version 5.2x
WINDOW = "DynamicSlidingWindowLayer"


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers: the first module whose forward has a cache argument, else ``model``."""
    return next((m for m in model.modules() if cache_argument(m) is not None), model)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model is a transformers encoder-decoder."""
    return bool(getattr(getattr(unwrap_model(model), "config", None), "is_encoder_decoder", False))


def decoder_start_id(model: nn.Module) -> int:
    """Return the id of the decoder's start token.

    Raises:
        ValueError: if the model's config has none.
    """
    config = getattr(unwrap_model(model), "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"the config of {type(unwrap_model(model)).__name__} has no decoder_start_token_id. Set it; for T5 it is "
            "the padding token."
        )
    return int(start)


class CachedDecoder:
    """Decodes a causal model with its cache; slots of rejected tokens are masked, not removed.

    Each row has its own positions, so rows may advance at different speeds. Needs attention over all slots: a sliding
    window or a recurrent state would count the masked ones.

    Args:
        model: the causal model.
        vocabulary: number of logits to return; None returns all.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None) -> None:
        self.model, self.vocabulary, self.cache, self.forwards = model, vocabulary, None, 0

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """Return the logits after each of these tokens, (B, n, V)."""
        logits, self.cache = forward(self.model, ids, self.cache, {}, mask=mask, positions=positions)
        self.forwards += 1
        return logits[..., : self.vocabulary]


class RecomputingDecoder:
    """Decodes by recomputing the tokens that the shortest row does not have yet, or all tokens.

    Decoders of encoder-decoders count their positions by the slots of the cache, so a row's tokens must be in its first
    slots. Before each call the cache is cropped to the length of the shortest unfinished row, and the rest is
    recomputed: exact for any decoder, without repeated work if rows have equal lengths; otherwise the work of a call
    grows with the difference between the shortest and the longest row.

    Args:
        model: an encoder-decoder, or with ``cached=False`` a causal model.
        vocabulary: number of logits to return; None returns all.
        encoder_kwargs: inputs besides the decoder's tokens: input_ids, attention_mask, encoder_outputs.
        max_length: max_length tokens that the decoder reads; further tokens of a block are left out.
        cached: False recomputes all tokens at every call; the work then grows with the square of the length.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: int | None,
        encoder_kwargs: Mapping[str, Any],
        *,
        max_length: int,
        cached: bool,
    ) -> None:
        self.model, self.vocabulary, self.encoder_kwargs = model, vocabulary, encoder_kwargs
        self.max_length, self.cached = max_length, cached
        self.causal = not is_encoder_decoder(model)
        self.start = None if self.causal else decoder_start_id(model)
        self.forwards, self.cache, self.slots = 0, None, None

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """Return the logits after each of these tokens, (B, n, V); undefined for rows whose last slot is masked."""
        if self.slots is None:
            self.slots = ids.clone()
            if self.start is not None:
                self.slots[:, 0] = self.start  # each model has its own start token
        else:
            self.slots = torch.cat((self.slots, ids), 1)
        order = (mask == 0).long().argsort(dim=-1, stable=True)  # unmasked slots first, in their order
        n, lengths = ids.shape[1], mask.sum(-1, keepdim=True)
        active = lengths[mask[:, -1] != 0]
        begin, end = torch.stack((active.min() - n, active.max())).tolist()
        begin = min(begin, self.max_length - 1) if self.cached else 0
        tokens = self.slots.gather(1, order)[:, begin : min(self.max_length, end)]
        count = torch.arange(tokens.shape[1], device=ids.device).expand_as(tokens)
        own = {"mask": (count < lengths.clamp_min(1)).long(), "positions": count.minimum(lengths - 1).clamp_min(0)}
        logits, self.cache = forward(
            self.model,
            tokens,
            self.cache,
            self.encoder_kwargs,
            cache_length=begin,
            cached=self.cached,
            **(own if self.causal else {}),
        )
        self.forwards += 1
        last = (lengths - n - begin + torch.arange(n, device=ids.device)).clamp(0, logits.shape[1] - 1)
        return logits.gather(1, last[..., None].expand(-1, -1, logits.shape[-1]))[..., : self.vocabulary]


class ShiftingCacheDecoder:
    """Decodes without recomputing any token, where only distances between slots matter.

    Rejected tokens are removed from the cache row by row, and each row is shifted so that all end in the same slot,
    with masked slots before; distances do not change. This suits encoder-decoders with relative positions, such as T5,
    and causal models, which get their positions, with full attention and sliding windows. Sliding windows keep all
    slots, since a shift may bring them back.

    Args:
        model, vocabulary, encoder_kwargs: as in ``RecomputingDecoder``.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None, encoder_kwargs: Mapping[str, Any]) -> None:
        self.model, self.vocabulary, self.encoder_kwargs = model, vocabulary, encoder_kwargs
        self.causal = not is_encoder_decoder(model)
        self.start = None if self.causal else decoder_start_id(model)
        self.cache = _recording_cache(model) if self.causal else None
        self.forwards, self.columns = 0, None

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """Return the logits after each of these tokens, (B, n, V); undefined for rows whose last slot is masked."""
        n, slots = ids.shape[1], torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if self.columns is None and self.start is not None:
            ids = ids.clone()
            ids[:, 0] = self.start
        columns = slots[:, :0] if self.columns is None else self._shift(self.columns, mask)
        self.columns = torch.cat((columns, slots[:, -n:]), 1)
        cache_mask = mask.gather(1, self.columns)
        own = positions if self.causal else None
        logits, self.cache = forward(self.model, ids, self.cache, self.encoder_kwargs, mask=cache_mask, positions=own)
        self.forwards += 1
        return logits[..., : self.vocabulary]

    def _shift(self, columns: Int[Tensor, "B w"], mask: Int[Tensor, "B slots"]) -> Int[Tensor, "B v"]:
        """Remove masked slots from the cache; return the slot of each of its remaining columns."""
        kept = mask.gather(1, columns)
        width = int(kept[mask[:, -1] != 0].sum(-1).max())
        order = kept.argsort(dim=-1, stable=True)[:, kept.shape[1] - width :]
        if width == kept.shape[1] and bool((order[:, 1:] > order[:, :-1]).all()):
            return columns
        for layer in cache_layers(self.cache):
            for name in ("keys", "values"):
                states = getattr(layer, name)
                index = order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[-1])
                setattr(layer, name, states.gather(2, index))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = width
        return columns.gather(1, order)


Decoder = CachedDecoder | RecomputingDecoder | ShiftingCacheDecoder


def forward(
    model: nn.Module,
    ids: Int[Tensor, "B n"],
    cache: Any,
    encoder_kwargs: Mapping[str, Any],
    *,
    cache_length: int | None = None,
    cached: bool = True,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Crop the cache to ``cache_length`` slots and run the decoder; return the logits and the extended cache."""
    name = str(cache_argument(unwrap_model(model)))
    if cache is not None and cache_length is not None and cache_length < cache.get_seq_length():
        cache.crop(cache_length - cache.get_seq_length())  # a negative argument removes that many slots
    prefix = "decoder_" if is_encoder_decoder(model) else ""
    kwargs = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}position_ids": positions}
    kwargs = {key: value for key, value in kwargs.items() if value is not None and _takes(model, key)}
    kwargs |= {"use_cache": cached} if _takes(model, "use_cache") else {}
    out = model(**kwargs, **({name: cache} if cached else {}), **encoder_kwargs)
    return out.logits, getattr(out, name, None) if cached else None


def cache_layers(cache: Any) -> list[Any]:
    """Return the layers of a decoder's self-attention cache that have keys."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    return [layer for layer in layers if isinstance(getattr(layer, "keys", None), Tensor)]


def has_only_keys(cache: Any) -> bool:
    """Return whether each layer of a causal model's cache has keys and values of tokens, and nothing else."""
    return {type(layer).__name__ for layer in getattr(cache, "layers", ())} <= {"DynamicLayer", WINDOW}


def cache_argument(model: nn.Module) -> str | None:
    """Return the name of the forward's cache argument; None if it has none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in parameters), None)


def _takes(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward has an argument, or tokens go to a model inside of it."""
    parameters = inspect.signature(unwrap_model(model).forward).parameters
    return name in parameters or "input_ids" not in parameters


def _recording_cache(model: nn.Module) -> Any:
    """Return an empty cache whose sliding windows keep all slots."""
    from transformers import DynamicCache

    core: Any = unwrap_model(model)
    cache = DynamicCache(config=core.config)
    if not has_only_keys(cache):
        raise NotImplementedError("its cache has states beside keys and values")
    for layer in cache.layers:
        if type(layer).__name__ == WINDOW:
            layer.activate_past_recording()  # pyright: ignore[reportAttributeAccessIssue]
    return cache
