"""Incremental decoding with key-value caches, for causal models and encoder-decoders."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

CACHES = ("past_key_values", "cache")  # name of the cache argument in transformers, before and since version 5.2x
STRATEGIES: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # results of decoder_strategy


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers: the first module whose forward has a cache argument, else ``model``."""
    return next((m for m in model.modules() if _cache_of(m) is not None), model)


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
    """Decodes a causal model incrementally with its cache; slots of rejected tokens are masked, not removed.

    Each row has its own positions, so rows may advance at different speeds. Needs attention over all slots: a sliding
    window or a recurrent state would count the masked ones.

    Raises:
        TypeError: for a model without a cache.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None) -> None:
        self.name = _cache_of(unwrap_model(model))
        if self.name is None:
            raise TypeError(
                f"{type(model).__name__} has no cache: its forward takes neither {' nor '.join(CACHES)}. Causal models "
                "of transformers do."
            )
        self.model, self.vocabulary, self.cache, self.forwards = model, vocabulary, None, 0

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """Return the logits after each of these tokens, (B, n, V)."""
        cache: dict[str, Any] = {str(self.name): self.cache, "use_cache": True}
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, **cache)
        self.cache, self.forwards = getattr(out, str(self.name)), self.forwards + 1
        return out.logits[..., : self.vocabulary]


class RecomputingDecoder:
    """Decodes an encoder-decoder, recomputing the tokens that the shortest row does not have yet.

    Decoders count their positions by the slots of the cache, so a row's tokens must be in its first slots. Before each
    call the cache is cropped to the length of the shortest unfinished row, and the rest is recomputed: exact for any
    decoder, without repeated work if rows have equal lengths; otherwise the work of a call grows with the difference
    between the shortest and the longest row.

    Args:
        model: the encoder-decoder.
        vocabulary: number of logits to return; None returns all.
        encoder_kwargs: inputs besides the decoder's tokens: input_ids, attention_mask, encoder_outputs.
        most: most tokens that the decoder reads; further tokens of a block are left out.
        cached: False recomputes all tokens at every call; the work then grows with the square of the length.
    """

    def __init__(
        self, model: nn.Module, vocabulary: int | None, encoder_kwargs: Mapping[str, Any], *, most: int, cached: bool
    ) -> None:
        self.model, self.vocabulary, self.encoder_kwargs = model, vocabulary, encoder_kwargs
        self.most, self.cached = most, cached
        self.start, self.forwards, self.cache, self.slots = decoder_start_id(model), 0, None, None

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """Return the logits after each of these tokens, (B, n, V); undefined for rows whose last slot is masked."""
        if self.slots is None:
            self.slots = ids.clone()
            self.slots[:, 0] = self.start  # each model has its own start token
        else:
            self.slots = torch.cat((self.slots, ids), 1)
        order = (mask == 0).long().argsort(dim=-1, stable=True)  # unmasked slots first, in their order
        n, lengths = ids.shape[1], mask.sum(-1, keepdim=True)
        active = lengths[mask[:, -1] != 0]
        begin, end = torch.stack((active.min() - n, active.max())).tolist()
        begin = min(begin, self.most - 1) if self.cached else 0
        tokens = self.slots.gather(1, order)[:, begin : min(self.most, end)]
        logits, self.cache = _forward(
            self.model, tokens, self.cache, self.encoder_kwargs, cache_length=begin, cached=self.cached
        )
        self.forwards += 1
        last = (lengths - n - begin + torch.arange(n, device=ids.device)).clamp(0, logits.shape[1] - 1)
        return logits.gather(1, last[..., None].expand(-1, -1, logits.shape[-1]))[..., : self.vocabulary]


class ShiftingCacheDecoder:
    """Decodes an encoder-decoder with relative positions only, such as T5, without recomputing any token.

    Rejected tokens are removed from the cache row by row, and each row is shifted so that all end in the same slot,
    with masked slots before; distances do not change.

    Args:
        model, vocabulary, encoder_kwargs: as in ``RecomputingDecoder``.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None, encoder_kwargs: Mapping[str, Any]) -> None:
        self.model, self.vocabulary, self.encoder_kwargs = model, vocabulary, encoder_kwargs
        self.start, self.forwards, self.cache, self.columns = decoder_start_id(model), 0, None, None

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """Return the logits after each of these tokens, (B, n, V); undefined for rows whose last slot is masked."""
        n, slots = ids.shape[1], torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if self.columns is None:
            ids = ids.clone()
            ids[:, 0] = self.start
        columns = slots[:, :0] if self.columns is None else self._shift(self.columns, mask)
        self.columns = torch.cat((columns, slots[:, -n:]), 1)
        cache_mask = mask.gather(1, self.columns)
        logits, self.cache = _forward(self.model, ids, self.cache, self.encoder_kwargs, mask=cache_mask)
        self.forwards += 1
        return logits[..., : self.vocabulary]

    def _shift(self, columns: Int[Tensor, "B w"], mask: Int[Tensor, "B slots"]) -> Int[Tensor, "B v"]:
        """Remove masked slots from the cache; return the slot of each of its remaining columns."""
        kept = mask.gather(1, columns)
        width = int(kept[mask[:, -1] != 0].sum(-1).max())
        order = kept.argsort(dim=-1, stable=True)[:, kept.shape[1] - width :]
        if width == kept.shape[1] and bool((order[:, 1:] > order[:, :-1]).all()):
            return columns
        for layer in _layers(self.cache):
            index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        return columns.gather(1, order)


def make_decoder(
    model: nn.Module, vocabulary: int | None, source: Mapping[str, Tensor], *, most: int
) -> RecomputingDecoder | ShiftingCacheDecoder:
    """Encode the source and return the decoder that fits the model, as ``decoder_strategy`` finds.

    Raises:
        TypeError: for a model that is not an encoder-decoder.
    """
    if not is_encoder_decoder(model):
        raise TypeError(
            f"{type(model).__name__} is not an encoder-decoder, and the other model is one: they cannot generate "
            "together."
        )
    # FSMT's decoder attends to later tokens unless it gets the source's ids as well
    kwargs: dict[str, Any] = {n: source[n] for n in ("input_ids", "attention_mask") if source.get(n) is not None}
    kwargs["encoder_outputs"] = unwrap_model(model).get_encoder()(**kwargs)  # pyright: ignore[reportCallIssue]
    strategy = decoder_strategy(model, kwargs) if most > 2 else "recompute"
    if strategy == "shift":
        return ShiftingCacheDecoder(model, vocabulary, kwargs)
    return RecomputingDecoder(model, vocabulary, kwargs, most=most, cached=strategy == "crop")


def decoder_strategy(model: nn.Module, encoder_kwargs: Mapping[str, Any]) -> str:
    """Return how an encoder-decoder is decoded: "shift" or "crop" its cache, or "recompute" all tokens at every call.

    Each model is tested once, on three tokens: whether its logits after a cropped cache are equal, and whether masked
    slots before the first token change nothing. Models without a cache or with sliding windows are recomputed, and so
    are those that take one token at a time with their cache: ProphetNet, which raises for more, and FSMT, which then
    attends to later tokens. Since weights may hide the effect of positions, "shift" needs a decoder with a module named
    "relative_attention_bias", as in T5. A generated padding token takes up a position in M2M100's cache, and none in
    its complete text: only there cached and uncached logits differ.

    Args:
        model: the encoder-decoder.
        encoder_kwargs: as in ``RecomputingDecoder``.
    """
    if model not in STRATEGIES:
        STRATEGIES[model] = _find_strategy(model, encoder_kwargs)
    return STRATEGIES[model]


def _find_strategy(model: nn.Module, encoder_kwargs: Mapping[str, Any]) -> str:
    core: Any = unwrap_model(model)
    if _cache_of(core) is None:
        return "recompute"
    memory = encoder_kwargs["encoder_outputs"][0]
    padding = getattr(core.config, "pad_token_id", None)  # which may have no position
    tokens = [i for i in range(5) if i not in (decoder_start_id(model), padding)]
    ids = torch.tensor([[decoder_start_id(model), *tokens[:2]]] * len(memory), device=memory.device)
    expected, _ = _forward(model, ids, None, encoder_kwargs, cached=False)
    _, cache = _forward(model, ids, None, encoder_kwargs)
    if not hasattr(cache, "crop") or any(getattr(cache, "is_sliding", ())):
        return "recompute"
    try:
        rest, _ = _forward(model, ids[:, 1:], cache, encoder_kwargs, cache_length=1)
    except AssertionError:  # ProphetNet, for more than one token
        return "recompute"
    if not _is_close(rest, expected[:, 1:], ids.shape[1] - 1):
        return "recompute"
    relative = any("relative_attention_bias" in name for name, _ in core.get_decoder().named_modules())
    if not relative or not _layers(cache):
        return "crop"
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    first, cache = _forward(model, ids[:, [1, 0, 1]], None, encoder_kwargs, mask=mask)
    mask = torch.cat((mask, mask[:, -1:]), 1)
    rest, _ = _forward(model, ids[:, 2:], cache, encoder_kwargs, mask=mask)
    return "shift" if _is_close(torch.cat((first[:, 1:], rest), 1), expected, ids.shape[1]) else "crop"


def _is_close(got: Tensor, expected: Tensor, length: int) -> bool:
    if got.shape != expected.shape or got.shape[1] != length:
        return False
    tolerance = max(1e-4, 8 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    return float((got - expected).abs().max()) <= tolerance


def _forward(
    model: nn.Module,
    ids: Int[Tensor, "B n"],
    cache: Any,
    encoder_kwargs: Mapping[str, Any],
    *,
    cache_length: int | None = None,
    cached: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Crop the cache to ``cache_length`` slots and run the decoder; return the logits and the extended cache."""
    name = str(_cache_of(unwrap_model(model)))
    if cache is not None and cache_length is not None and cache_length < cache.get_seq_length():
        cache.crop(cache_length - cache.get_seq_length())  # a negative argument removes that many slots
    cache_kwargs = {name: cache} if cached else {}
    mask_kwargs = {} if mask is None else {"decoder_attention_mask": mask}
    out = model(decoder_input_ids=ids, use_cache=cached, **cache_kwargs, **mask_kwargs, **encoder_kwargs)
    return out.logits, getattr(out, name, None) if cached else None


def _layers(cache: Any) -> list[Any]:
    """Return the layers of a decoder's self-attention cache that have keys."""
    layers = getattr(getattr(cache, "self_attention_cache", None), "layers", ())
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


def _cache_of(model: nn.Module) -> str | None:
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in parameters), None)
