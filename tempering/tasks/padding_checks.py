"""Try a causal model on padded and packed texts: whether its logits are those of a plain forward of each text."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempering.rollouts.decoders import unwrap_model
from tempering.rollouts.decoding import is_close, max_positions, trial_tokens
from tempering.utils.tensors import eval_mode, on_host

Layouts = tuple[tuple[str, ...], dict[str, str]]
TRIED: weakref.WeakKeyDictionary[nn.Module, Layouts] = weakref.WeakKeyDictionary()  # results of try_layouts
LENGTHS = (14, 5)  # tokens of the two texts
SERVES = {
    "right": "Its logits depend on padding: use batches of one text without padding.",
    "left": "Pad on the right: data.text.collate(examples, side='right').",
    "packed": "Pad the texts: data.text.collate(examples).",
}


def try_layouts(model: nn.Module, unsupported: tuple[str, ...]) -> Layouts:
    """Return inputs to leave out, and the layouts in which a causal model is inexact, and how.

    Each model of transformers is tried once, in eval mode, on two short texts padded on the "right" and the "left" and
    "packed", with the inputs that ``LanguageModeling`` makes. Position ids are left out for models that count from
    another number than 0, such as RoBERTa, and use_cache is passed on to those that take it unnamed, such as
    GraniteMoe, since they separate packed texts only without a cache. Layouts that raise are not listed, since they
    will raise in training, and offloaded models are not tried.

    Args:
        model: the model.
        unsupported: inputs that are left out in any case.
    """
    if not hasattr(unwrap_model(model), "config") or any(p.is_meta for p in model.parameters()):
        return unsupported, {}
    if model not in TRIED:
        with torch.no_grad(), eval_mode(model):
            first = _find_inexact(model, unsupported) or {}
            others = []
            if "packed" in first and "use_cache" in unsupported:
                others.append(tuple(name for name in unsupported if name != "use_cache"))
            if "right" in first and "position_ids" not in unsupported:
                others.append((*unsupported, "position_ids"))
            tried = [(unsupported, first), *((names, _find_inexact(model, names)) for names in others)]
        known = [(names, inexact) for names, inexact in tried if inexact is not None]
        TRIED[model] = min(known, key=lambda result: len(result[1]))
    return TRIED[model]


def check_layout(model: nn.Module, inexact: Mapping[str, str], inputs: Mapping[str, Any]) -> None:
    """Reject inputs in a layout in which the model is inexact.

    Raises:
        ValueError: naming the model and the layout that serves.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    for layout, how in inexact.items():
        if layout == "packed":
            found = mask is None and positions is not None
        else:
            found = mask is not None and bool((on_host(mask)[:, 0 if layout == "left" else -1] == 0).any())
        if found:
            name = "packed texts" if layout == "packed" else f"texts padded on the {layout}"
            raise ValueError(
                f"{type(unwrap_model(model)).__name__} does not give {name} the logits that each has alone: {how} on a "
                f"few tokens. {SERVES[layout]}"
            )


def _find_inexact(model: nn.Module, unsupported: tuple[str, ...]) -> dict[str, str] | None:
    """Return the inexact layouts, and how; None if the model cannot be tried."""
    if (max_positions(model) or sum(LENGTHS)) < sum(LENGTHS):
        return None
    pad = getattr(getattr(unwrap_model(model), "config", None), "pad_token_id", None)
    tokens = trial_tokens(model, sum(LENGTHS))
    texts = [tokens[None, : LENGTHS[0]], tokens[None, LENGTHS[0] :]]
    keep = {"use_cache": False} if "use_cache" not in unsupported else {}
    try:
        expected = torch.cat([model(input_ids=text, **keep).logits[0] for text in texts])
    except Exception:  # it needs other inputs, or will raise in training with its own words
        return None
    out = {}
    for layout in SERVES:
        inputs, real = _layout(texts, layout, pad if isinstance(pad, int) else 0)
        if layout == "packed" and "position_ids" in unsupported:
            continue
        inputs = {name: value for name, value in inputs.items() if name not in unsupported}
        try:
            got = model(**inputs, **keep).logits[real]
        except Exception:
            continue
        if not is_close(got, expected, 1e-3):
            off = float((got - expected).abs().max() / expected.abs().max())
            out[layout] = f"they differ by {off:.1%} of the largest logit"
    return out


def _layout(texts: list[Tensor], layout: str, pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the inputs of two texts in one layout, and which positions are tokens, in the texts' order."""
    length, lengths = max(LENGTHS), torch.tensor(LENGTHS, device=texts[0].device)
    if layout == "packed":
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(lengths.device)
        return {"input_ids": torch.cat(texts, 1), "position_ids": positions}, torch.ones_like(positions) != 0
    count = torch.arange(length, device=lengths.device)
    real = count < lengths[:, None] if layout == "right" else count >= length - lengths[:, None]
    ids = torch.full(real.shape, pad, device=lengths.device)
    ids[real] = torch.cat(texts, 1)[0]
    mask = real.long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}, real
