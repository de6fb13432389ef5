"""Models that read on, a few tokens at a time, with their caches: causal ones, and encoder-decoders."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

CACHES = ("past_key_values", "cache")  # what transformers call it, before and since version 5.2x
TRIED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # how encoder-decoders read on


def unwrap_model(model: nn.Module) -> nn.Module:
    """The language model inside its wrappers: the first whose forward names a cache; itself where none does."""
    return next((m for m in model.modules() if _cache_of(m) is not None), model)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder of transformers."""
    return bool(getattr(getattr(unwrap_model(model), "config", None), "is_encoder_decoder", False))


def decoder_start_id(model: nn.Module) -> int:
    """The token that the decoder begins with.

    Raises:
        ValueError: for a model whose config names none.
    """
    config = getattr(unwrap_model(model), "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"{type(unwrap_model(model)).__name__} does not say what its decoder begins with. Set "
            "model.config.decoder_start_token_id, to the padding for T5."
        )
    return int(start)


class CachedDecoder:
    """A causal model reading on, token by token, with its cache. Slots that turned out wrong are masked, not removed.

    Each row counts its own positions, so rows may go on at their own pace. Needs attention over all slots: a sliding
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
        """The logits after each of these tokens, (B, n, V)."""
        held: dict[str, Any] = {str(self.name): self.cache, "use_cache": True}
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, **held)
        self.cache, self.forwards = getattr(out, str(self.name)), self.forwards + 1
        return out.logits[..., : self.vocabulary]


class RecomputingDecoder:
    """An encoder-decoder reading on; what stands in one row and not in the slowest is read again.

    Decoders count their positions by the slots of the cache, so a row's tokens must stand in its first ones. Before
    each call the cache is cut back to what every row that still writes has behind it, and the rest is read anew: exact
    for any decoder, nothing twice where rows keep pace, and otherwise the work of a call grows with the distance from
    the slowest row to the fastest.

    Args:
        given: what the model is told beside the decoder's tokens: input_ids, attention_mask, encoder_outputs.
        most: how many tokens the decoder reads at most; what a block has beyond is not asked for.
        cached: False reads from the start with every call; the work grows with the square of the length.
    """

    def __init__(
        self, model: nn.Module, vocabulary: int | None, given: Mapping[str, Any], *, most: int, cached: bool
    ) -> None:
        self.model, self.vocabulary, self.given, self.most, self.cached = model, vocabulary, given, most, cached
        self.start, self.forwards, self.cache, self.slots = decoder_start_id(model), 0, None, None

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """The logits after each of these tokens, (B, n, V); of rows whose last slot is masked they mean nothing."""
        if self.slots is None:
            self.slots = ids.clone()
            self.slots[:, 0] = self.start  # each begins with its own
        else:
            self.slots = torch.cat((self.slots, ids), 1)
        order = (mask == 0).long().argsort(dim=-1, stable=True)  # what stands first, in its order
        n, lengths = ids.shape[1], mask.sum(-1, keepdim=True)
        writing = lengths[mask[:, -1] != 0]
        begin, end = torch.stack((writing.min() - n, writing.max())).tolist()
        begin = min(begin, self.most - 1) if self.cached else 0
        anew = self.slots.gather(1, order)[:, begin : min(self.most, end)]
        said, self.cache = _go_on(self.model, anew, self.cache, self.given, behind=begin, cached=self.cached)
        self.forwards += 1
        last = (lengths - n - begin + torch.arange(n, device=ids.device)).clamp(0, said.shape[1] - 1)
        return said.gather(1, last[..., None].expand(-1, -1, said.shape[-1]))[..., : self.vocabulary]


class ShiftingCacheDecoder:
    """An encoder-decoder that counts distances alone, as T5 does, reading on with its cache: no token is read twice.

    What was refused is taken out of the cache row by row, and each row moved so that all end in one slot, with masked
    ones before; distances stay what they are.

    Args:
        given: as for ``RecomputingDecoder``.
    """

    def __init__(self, model: nn.Module, vocabulary: int | None, given: Mapping[str, Any]) -> None:
        self.model, self.vocabulary, self.given = model, vocabulary, given
        self.start, self.forwards, self.cache, self.held = decoder_start_id(model), 0, None, None

    def decode(self, ids: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], mask: Int[Tensor, "B slots"]) -> Tensor:
        """The logits after each of these tokens, (B, n, V); of rows whose last slot is masked they mean nothing."""
        n, slots = ids.shape[1], torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if self.held is None:
            ids = ids.clone()
            ids[:, 0] = self.start
        held = slots[:, :0] if self.held is None else self._moved(self.held, mask)
        self.held = torch.cat((held, slots[:, -n:]), 1)
        seen = mask.gather(1, self.held)
        said, self.cache = _go_on(self.model, ids, self.cache, self.given, seen=seen)
        self.forwards += 1
        return said[..., : self.vocabulary]

    def _moved(self, held: Int[Tensor, "B w"], mask: Int[Tensor, "B slots"]) -> Int[Tensor, "B v"]:
        """Which slot each of the cache's columns holds, after what the mask leaves out was taken out of it."""
        kept = mask.gather(1, held)
        width = int(kept[mask[:, -1] != 0].sum(-1).max())
        order = kept.argsort(dim=-1, stable=True)[:, kept.shape[1] - width :]
        if width == kept.shape[1] and bool((order[:, 1:] > order[:, :-1]).all()):
            return held
        for layer in _layers(self.cache):
            at = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, at), layer.values.gather(2, at)
        return held.gather(1, order)


def make_decoder(
    model: nn.Module, vocabulary: int | None, source: Mapping[str, Tensor], *, most: int
) -> RecomputingDecoder | ShiftingCacheDecoder:
    """An encoder-decoder that reads on, in the way that it is able to; the source is read once.

    Raises:
        TypeError: for a model that is no encoder-decoder.
    """
    if not is_encoder_decoder(model):
        raise TypeError(
            f"{type(model).__name__} is no encoder-decoder, and the other model is one: they cannot write together."
        )
    # FSMT's decoder looks ahead where it is not told the source's ids as well
    given: dict[str, Any] = {n: source[n] for n in ("input_ids", "attention_mask") if source.get(n) is not None}
    given["encoder_outputs"] = unwrap_model(model).get_encoder()(**given)  # pyright: ignore[reportCallIssue]
    way = decoder_strategy(model, given) if most > 2 else "whole"
    if way == "move":
        return ShiftingCacheDecoder(model, vocabulary, given)
    return RecomputingDecoder(model, vocabulary, given, most=most, cached=way == "cut")


def decoder_strategy(model: nn.Module, given: Mapping[str, Any]) -> str:
    """How an encoder-decoder can read on: "move" or "cut" its cache, or "whole", from the start with every call.

    It is tried on three tokens, once a model: whether it says the same behind a cache that was cut back, and whether
    masked slots before the first change nothing. Not cut are models without a cache or with one of sliding windows,
    and those that take one token at a time with it: ProphetNet, which refuses more, and FSMT, which then looks ahead.
    Since weights may hide a position, "move" is for decoders alone with a part named "relative_attention_bias", as T5
    and its kind have. A padding token that was itself written takes up a position behind M2M100's cache, and none in
    its whole text: there alone the two differ.

    Args:
        given: as for ``RecomputingDecoder``.
    """
    if model not in TRIED:
        TRIED[model] = _tried(model, given)
    return TRIED[model]


def _tried(model: nn.Module, given: Mapping[str, Any]) -> str:
    core: Any = unwrap_model(model)
    if _cache_of(core) is None:
        return "whole"
    memory = given["encoder_outputs"][0]
    padding = getattr(core.config, "pad_token_id", None)  # which may have no position
    some = [i for i in range(5) if i not in (decoder_start_id(model), padding)]
    ids = torch.tensor([[decoder_start_id(model), *some[:2]]] * len(memory), device=memory.device)
    want, _ = _go_on(model, ids, None, given, cached=False)
    _, cache = _go_on(model, ids, None, given)
    if not hasattr(cache, "crop") or any(getattr(cache, "is_sliding", ())):
        return "whole"
    try:
        rest, _ = _go_on(model, ids[:, 1:], cache, given, behind=1)
    except AssertionError:  # ProphetNet's refusal of more than one token
        return "whole"
    if not _near(rest, want[:, 1:], ids.shape[1] - 1):
        return "whole"
    relative = any("relative_attention_bias" in name for name, _ in core.get_decoder().named_modules())
    if not relative or not _layers(cache):
        return "cut"
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    first, cache = _go_on(model, ids[:, [1, 0, 1]], None, given, seen=mask)
    mask = torch.cat((mask, mask[:, -1:]), 1)
    rest, _ = _go_on(model, ids[:, 2:], cache, given, seen=mask)
    return "move" if _near(torch.cat((first[:, 1:], rest), 1), want, ids.shape[1]) else "cut"


def _near(got: Tensor, want: Tensor, length: int) -> bool:
    if got.shape != want.shape or got.shape[1] != length:
        return False
    scale = max(1e-4, 8 * torch.finfo(want.dtype).eps) * float(want.abs().max())
    return float((got - want).abs().max()) <= scale


def _go_on(
    model: nn.Module,
    ids: Int[Tensor, "B n"],
    cache: Any,
    given: Mapping[str, Any],
    *,
    behind: int | None = None,
    cached: bool = True,
    seen: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """The logits after tokens that the decoder reads behind so many slots of its cache, and the cache with them."""
    name = str(_cache_of(unwrap_model(model)))
    if cache is not None and behind is not None and behind < cache.get_seq_length():
        cache.crop(behind - cache.get_seq_length())  # below zero: so many slots go
    held = {name: cache} if cached else {}
    masked = {} if seen is None else {"decoder_attention_mask": seen}
    out = model(decoder_input_ids=ids, use_cache=cached, **held, **masked, **given)
    return out.logits, getattr(out, name, None) if cached else None


def _layers(cache: Any) -> list[Any]:
    """The layers of a decoder's own cache, where it shows their keys."""
    layers = getattr(getattr(cache, "self_attention_cache", None), "layers", ())
    return [layer for layer in layers if getattr(layer, "keys", None) is not None]


def _cache_of(model: nn.Module) -> str | None:
    takes = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in takes), None)
