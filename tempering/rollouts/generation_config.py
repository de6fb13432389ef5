"""How tokens are sampled: ``Sampling``, and what transformers' GenerationConfig states of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.rows import upcast_to_float32

# of a GenerationConfig: read here, or without effect on which tokens are sampled
SAMPLED = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
LIMITS = {"max_new_tokens", "eos_token_id"}
WITHOUT_EFFECT = ("output_", "return_", "cache_", "use_cache", "max_length", "pad_token_id", "bos_token_id")
WITHOUT_EFFECT += ("decoder_start_token_id", "transformers_version", "disable_compile", "compile_config", "assistant_")
WITHOUT_EFFECT += ("num_assistant_tokens", "target_lookbehind", "is_assistant", "_")


@dataclass(frozen=True)
class Sampling:
    """Sampling from softmax(logits / temperature), cut to its likeliest tokens; temperature 0 is greedy.

    Args:
        temperature: of the softmax.
        top_p: fewest likeliest tokens whose probabilities add up to this are kept.
        top_k: number of likeliest tokens that are kept, before ``top_p``; None keeps all.
        min_p: tokens below this fraction of the largest probability are left out, after ``top_p``.

    Raises:
        ValueError: for a temperature below 0, top_p outside (0, 1], top_k below 1 or min_p outside [0, 1].
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf") or not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"Sampling needs temperature >= 0 and top_p in (0, 1]; got {self.temperature} and {self.top_p}."
            )
        if (self.top_k is not None and self.top_k < 1) or not 0.0 <= self.min_p <= 1.0:
            raise ValueError(
                f"Sampling needs top_k >= 1 or None, and min_p in [0, 1]; got {self.top_k} and {self.min_p}."
            )

    def draw(
        self,
        logits: Float[Tensor, "B V"],
        generator: torch.Generator,
        other: Float[Tensor, "B V"] | None = None,
        share: float = 0.0,
    ) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
        """Return one sampled token per row, and its log-probability among those that could be sampled.

        With ``other`` logits tokens are of the mixture of both distributions, in which they have this share.
        """
        if other is not None:
            p, r = (x / x.sum(-1, keepdim=True) for x in map(self._probabilities, (logits, other)))
            p = (1.0 - share) * p + share * r
            ids = torch.multinomial(p, 1, generator=generator)
            return ids.squeeze(-1), p.gather(-1, ids).squeeze(-1).log()
        if self.temperature == 0.0:
            ids = logits.argmax(-1)
            return ids, torch.zeros_like(upcast_to_float32(logits[:, 0]))
        p = self._probabilities(logits)
        ids = torch.multinomial(p, 1, generator=generator)
        return ids.squeeze(-1), (p.gather(-1, ids).squeeze(-1) / p.sum(-1)).log()

    def log_prob(self, logits: Float[Tensor, "B V"], ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return the log-probability of tokens among those that could be sampled; 0 if greedy, as ``draw`` does."""
        if self.temperature == 0.0:
            return torch.zeros_like(upcast_to_float32(logits[:, 0]))
        p = self._probabilities(logits)
        return (p.gather(-1, ids[:, None]).squeeze(-1) / p.sum(-1)).log()

    def _probabilities(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Return the probabilities, those of tokens that are cut 0; their sum may be below 1."""
        z = upcast_to_float32(logits) / self.temperature
        if self.top_k is not None and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k).values[..., -1:], -torch.inf)
        p = torch.softmax(z, -1)
        if self.top_p < 1.0:
            likeliest, order = p.sort(dim=-1, descending=True, stable=True)
            outside = (
                likeliest.cumsum(-1) - likeliest >= self.top_p
            )  # the tokens before suffice; the first is always kept
            p = p.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
        if self.min_p > 0.0:
            p = p.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), 0.0)
        return p


def as_sampling(value: Any) -> Sampling | None:
    """Return a sampling as it is, or that of a GenerationConfig of transformers or of a dict with its names.

    As in transformers, a GenerationConfig is greedy without do_sample=True, and keeps 50 tokens unless it sets top_k; a
    dict samples unless it has do_sample=False, and keeps all.

    Raises:
        TypeError: for another type.
        ValueError: for a setting that changes what is generated and is not supported; names it.
    """
    if value is None or isinstance(value, Sampling):
        return value
    settings = _settings(value)
    unsupported = {n: v for n, v in settings.items() if n not in SAMPLED | LIMITS and not n.startswith(WITHOUT_EFFECT)}
    if unsupported:
        raise ValueError(
            f"generation does not support {', '.join(f'{n}={v!r}' for n, v in sorted(unsupported.items()))}. Supported "
            f"are {', '.join(sorted(SAMPLED | LIMITS))}."
        )
    if not settings.get("do_sample", isinstance(value, Mapping)):
        return Sampling(temperature=0.0)
    fields: dict[str, Any] = {} if isinstance(value, Mapping) else {"top_k": 50}
    fields |= {name: settings[name] for name in SAMPLED - {"do_sample"} if name in settings}
    fields["top_k"] = fields.get("top_k") or None  # transformers: top_k=0 keeps all
    return Sampling(**fields)


def generation_limits(value: Any) -> dict[str, Any]:
    """Return max_new_tokens and eos_token_id of a GenerationConfig or a dict, those that it sets."""
    if value is None or isinstance(value, Sampling):
        return {}
    return {name: setting for name, setting in _settings(value).items() if name in LIMITS}


def _settings(value: Any) -> dict[str, Any]:
    """Return the settings that are neither None nor a default."""
    if isinstance(value, Mapping):
        return {name: setting for name, setting in value.items() if setting is not None}
    if not hasattr(value, "to_dict") or not hasattr(value, "do_sample"):
        raise TypeError(
            f"sampling must be a Sampling, a GenerationConfig of transformers, or a dict; got {type(value).__name__}. "
            "Type Sampling(temperature=0.7, top_p=0.9)."
        )
    defaults = vars(type(value)()) | getattr(type(value), "_get_default_generation_params", dict)()
    settings = {name: setting for name, setting in vars(value).items() if setting is not None}
    return {name: setting for name, setting in settings.items() if name in SAMPLED or setting != defaults.get(name)}
