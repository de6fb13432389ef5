"""Select how a model is decoded: the first way whose logits, on a few tokens, are those of a plain forward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.rollouts.decoders import (
    CACHES,
    CachedDecoder,
    Decoder,
    RecomputingDecoder,
    ShiftingCacheDecoder,
    cache_argument,
    cache_layers,
    decoder_start_id,
    forward,
    has_only_keys,
    is_encoder_decoder,
    unwrap_model,
)
from tempering.utils.tensors import eval_mode

STRATEGIES: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()  # results of the trials
# calls of a trial: (first slot, end, first slot of the block that is not yet judged)
CALLS = ((0, 3, 3), (3, 6, 3), (6, 7, 6), (7, 8, 6), (8, 10, 8))
KEPT = ((1, 1, 1, 1, 0, 0, 1, 1, 1, 1), (0, 0, 0, 1, 1, 1, 1, 0, 1, 1))  # slots of a trial that are not rejected


def max_positions(model: nn.Module) -> int | None:
    """Return the number of positions in a transformers model's config; None if it states none."""
    return getattr(_text_config(model), "max_position_embeddings", None)


# causal models


def make_causal_decoder(model: nn.Module, vocabulary: int | None, *, rejects: bool, max_length: int) -> Decoder:
    """Return the decoder that fits a causal model, as ``causal_strategy`` finds.

    Args:
        model, rejects: as in ``causal_strategy``.
        vocabulary: number of logits to return; None returns all.
        max_length: max_length tokens of a text.
    """
    return _causal_decoder(causal_strategy(model, rejects=rejects), model, vocabulary, max_length)


def causal_strategy(model: nn.Module, *, rejects: bool) -> str:
    """Return how a causal model is decoded: "mask" or "shift" slots of its cache, or "recompute" all tokens.

    Each model is tried once, in eval mode, on two texts of at most 10 tokens, padded and with rejected tokens: the
    logits of every kept token must be those of a plain forward of its text. "mask" leaves rejected tokens in the cache,
    "shift" removes them (for sliding windows), and "recompute" uses no cache (for convolutions and recurrent states,
    which cannot forget single tokens). A trial is shorter than most windows, so a model with windows never masks
    rejected tokens, and one with chunked attention is always recomputed.

    Args:
        model: the causal model.
        rejects: whether tokens are rejected, as in speculation; otherwise a row is a prompt and what follows.

    Raises:
        TypeError: for a model whose logits differ from a plain forward in each way, or that takes no input_ids.
    """
    known = STRATEGIES.setdefault(model, {})
    key = "rejects" if rejects else "appends"
    if key not in known:
        with torch.no_grad(), eval_mode(model):
            known[key] = _find_causal_strategy(model, rejects)
    return known[key]


def _causal_decoder(strategy: str, model: nn.Module, vocabulary: int | None, max_length: int) -> Decoder:
    if strategy == "mask":
        return CachedDecoder(model, vocabulary)
    if strategy == "shift":
        return ShiftingCacheDecoder(model, vocabulary, {})
    return RecomputingDecoder(model, vocabulary, {}, max_length=max_length, cached=False)


def _find_causal_strategy(model: nn.Module, rejects: bool) -> str:
    core = unwrap_model(model)
    has_cache = cache_argument(core) is not None
    if not has_cache and not hasattr(core, "config"):
        raise TypeError(
            f"{type(model).__name__} has no cache: its forward takes neither {' nor '.join(CACHES)}, and it has no "
            "config of transformers. Causal models of transformers do."
        )
    if (max_positions(model) or len(KEPT[0])) < len(KEPT[0]):
        return "recompute"  # a trial does not fit
    slots, kept, expected = _trial(model, rejects)
    windows = _windows(core)
    ways = ["recompute"]
    if has_cache and not windows.get("attention_chunk_size"):
        ways = ["mask", "shift", "recompute"] if not (rejects and windows) else ["shift", "recompute"]
    errors = {}
    for way in ways:
        try:
            decoder = _causal_decoder(way, model, None, slots.shape[1])
            got = _replay(decoder, slots, kept, expected.shape[-1])
        except Exception as error:
            errors[way] = f"{type(error).__name__}: {error}"
            continue
        errors[way] = f"logits differ by {float((got - expected)[kept != 0].abs().max()):.2g}"
        if way == "mask" and rejects and not has_only_keys(decoder.cache):
            errors[way] = "its cache has states beside keys and values"
        elif is_close(got[kept != 0], expected[kept != 0], 1e-3 if way == "recompute" else 3e-5):
            return way
    raise TypeError(
        f"{type(core).__name__} cannot generate: on a few tokens its logits are not those of a plain forward of the "
        f"same text ({'; '.join(f'{way}: {error}' for way, error in errors.items())}). Its attention may not be causal "
        "(is_decoder=True in its config), or it may not ignore padding. Generate texts with it elsewhere, and train on "
        "them as data."
    )


def _trial(model: nn.Module, rejects: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slots of a trial, (2, 10), which are kept, and the logits of a plain forward of the kept ones."""
    kept = torch.tensor(KEPT, device=next((p.device for p in model.parameters()), None))
    if not rejects:
        kept[:, 3:] = 1
    slots = trial_tokens(model, kept.numel()).view(2, -1)
    rows = [(row, keep != 0) for row, keep in zip(slots, kept, strict=True)]
    logits = [forward(model, row[keep][None], None, {}, cached=False)[0][0] for row, keep in rows]
    expected = logits[0].new_zeros(*slots.shape, logits[0].shape[-1])
    expected[kept != 0] = torch.cat(logits)
    return slots, kept, expected


def trial_tokens(model: nn.Module, count: int) -> Tensor:
    """Return token ids to try a model on, (count,), on its device: the last of its vocabulary that are not special."""
    config = _text_config(model)
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special = {i for value in special for i in (value if isinstance(value, list) else [value])}
    size = getattr(config, "vocab_size", None) or 4
    find = getattr(unwrap_model(model), "get_input_embeddings", None)
    if find is not None and isinstance(table := find(), nn.Embedding):
        size = min(size, len(table.weight))
    tokens = [i for i in range(max(0, size - 30), size) if i not in special] or [0]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.tensor([tokens[(7 * i + 3) % len(tokens)] for i in range(count)], device=device)


def _replay(decoder: Decoder, slots: Tensor, kept: Tensor, classes: int) -> Tensor:
    """Return the logits of a trial's slots, decoded as generation does."""
    parts = []
    for first, end, judged in CALLS:
        mask = kept[:, :end].clone()
        mask[:, judged:] = 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, first:]
        parts.append(decoder.decode(slots[:, first:end], positions, mask))
    out = torch.cat(parts, 1)
    assert out.shape == (*slots.shape, classes), f"logits of shape {tuple(out.shape)}"
    return out


def _windows(core: nn.Module) -> dict[str, int]:
    """Return the sizes of sliding windows and chunks in a model's config, by name."""
    values = vars(_text_config(core)) if _text_config(core) is not None else {}
    names = [name for name in values if ("window" in name and "layers" not in name) or name == "attention_chunk_size"]
    return {name: values[name] for name in names if isinstance(values[name], int) and values[name] > 1}


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(unwrap_model(model), "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


# encoder-decoders


def make_decoder(
    model: nn.Module, vocabulary: int | None, source: Mapping[str, Tensor], *, max_length: int
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
    strategy = decoder_strategy(model, kwargs) if max_length > 2 else "recompute"
    if strategy == "shift":
        return ShiftingCacheDecoder(model, vocabulary, kwargs)
    return RecomputingDecoder(model, vocabulary, kwargs, max_length=max_length, cached=strategy == "crop")


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
    known = STRATEGIES.setdefault(model, {})
    if "target" not in known:
        known["target"] = _find_strategy(model, encoder_kwargs)
    return known["target"]


def _find_strategy(model: nn.Module, encoder_kwargs: Mapping[str, Any]) -> str:
    core: Any = unwrap_model(model)
    if cache_argument(core) is None:
        return "recompute"
    memory = encoder_kwargs["encoder_outputs"][0]
    padding = getattr(core.config, "pad_token_id", None)  # which may have no position
    tokens = [i for i in range(5) if i not in (decoder_start_id(model), padding)]
    ids = torch.tensor([[decoder_start_id(model), *tokens[:2]]] * len(memory), device=memory.device)
    expected, _ = forward(model, ids, None, encoder_kwargs, cached=False)
    _, cache = forward(model, ids, None, encoder_kwargs)
    if not hasattr(cache, "crop") or any(getattr(cache, "is_sliding", ())):
        return "recompute"
    try:
        rest, _ = forward(model, ids[:, 1:], cache, encoder_kwargs, cache_length=1)
    except AssertionError:  # ProphetNet, for more than one token
        return "recompute"
    if not is_close(rest, expected[:, 1:]):
        return "recompute"
    relative = any("relative_attention_bias" in name for name, _ in core.get_decoder().named_modules())
    if not relative or not cache_layers(cache):
        return "crop"
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    first, cache = forward(model, ids[:, [1, 0, 1]], None, encoder_kwargs, mask=mask)
    mask = torch.cat((mask, mask[:, -1:]), 1)
    rest, _ = forward(model, ids[:, 2:], cache, encoder_kwargs, mask=mask)
    return "shift" if is_close(torch.cat((first[:, 1:], rest), 1), expected) else "crop"


def is_close(got: Tensor, expected: Tensor, relative: float = 1e-4) -> bool:
    """Return whether logits are equal up to this part of the largest one, or up to rounding: more on a GPU (TF32)."""
    if got.shape != expected.shape:
        return False
    rounding = max(16 * torch.finfo(expected.dtype).eps, 1e-3 if expected.is_cuda else 0.0)
    return float((got - expected).abs().max()) <= max(relative, rounding) * float(expected.abs().max())
