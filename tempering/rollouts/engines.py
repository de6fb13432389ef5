"""Who generates: the interface of rollout engines, with our own decoders and transformers' ``generate`` behind it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tempering.data.text import eos_ids
from tempering.rollouts.generation_config import Sampling
from tempering.rollouts.sampling import GenerationState, check_positions, generate, vocabulary_size
from tempering.rows import upcast_to_float32
from tempering.utils.tensors import eval_mode

Prompts = Sequence[Sequence[int]]


class Completion(NamedTuple):
    """One generated text, without its prompt.

    Attributes:
        ids: its token ids; the last is the end-of-text token, if it ended.
        log_probs: of each token where it was sampled, in nats, after temperature and cuts; None if the engine has none.
    """

    ids: list[int]
    log_probs: list[float] | None = None


class GenerationRequest(NamedTuple):
    """A batch that an engine generates: the batch, the prompt of each of its texts, and the call."""

    batch: Any
    prompts: list[list[int]]
    ask: Callable[[], list[Completion]]


class RolloutEngine(ABC):
    """Generates completions of prompts with the student, for ``OnPolicy(engine=...)``.

    A new engine overrides ``generate``. One with its own copy of the weights gets them by ``snapshot`` and ``push``.

    Attributes:
        student: the model that generates, from ``bind``.
        staleness: most batches that are generated ahead of the training; 0: none.
        refresh_every: number of batches after which the engine's own copy of the weights is refreshed; None: it has
            none.
    """

    student: nn.Module
    staleness: int = 0
    refresh_every: int | None = None

    def bind(self, student: nn.Module) -> None:
        """Take the student that generates.

        Raises:
            TypeError, ValueError: for a model that the engine cannot generate with.
        """
        self.student = student

    @abstractmethod
    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """Return ``n`` completions of each prompt, those of the first prompt first.

        Args:
            prompts: token ids of each prompt.
            n: completions of each.
            sampling: how tokens are sampled.
            max_new_tokens: most tokens of a completion.
            eos: end-of-text token id, or several, of which any ends a text.
            vocabulary: number of tokens; larger ids are not generated.
            seed: seed of the sampling.
        """

    def snapshot(self) -> Any:
        """Copy the student's weights, between two steps of training, for ``push``."""
        return None

    def push(self, snapshot: Any) -> None:
        """Generate with these weights from now on."""
        return

    def verify(self, prompts: Prompts, completions: Sequence[Completion], sampling: Sampling) -> None:
        """Compare the log-probabilities of a first batch to the student's; an engine of its weights need not."""
        return

    def report(self) -> dict[str, float]:
        """Return further statistics."""
        return {}


class DecoderEngine(RolloutEngine):
    """The decoders of this library, which ``OnPolicy`` uses without an engine as well: the same texts, to the bit."""

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        repeated = [list(prompt) for prompt in prompts for _ in range(n)]
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos": eos, "vocabulary": vocabulary, "seed": seed}
        batch, _ = generate(self.student, None, repeated, sampling=sampling, **options)
        kept = batch["learn"].cpu()
        ids, log_probs = batch["input_ids"].cpu(), batch["rollout_log_prob"].cpu()
        return [Completion(ids[i][row].tolist(), log_probs[i][row].tolist()) for i, row in enumerate(kept)]


class TransformersEngine(RolloutEngine):
    """``generate`` of transformers, for models and settings that this library does not decode itself.

    A setting that changes probabilities, such as a repetition penalty, is part of the log-probabilities too.

    Args:
        settings: more settings of its GenerationConfig, such as ``repetition_penalty=1.1``; no beams.

    Raises:
        TypeError: at ``bind``, for a model without ``generate``.
        ValueError: for settings that ``OnPolicy`` has arguments for, or beams.
    """

    def __init__(self, **settings: Any) -> None:
        own = {"max_new_tokens", "eos_token_id", "pad_token_id", "num_return_sequences", "return_dict_in_generate"}
        own |= {"do_sample", "temperature", "top_p", "top_k", "min_p", "output_scores", "max_length"}
        if wrong := sorted(settings.keys() & own):
            raise ValueError(
                f"TransformersEngine gets {', '.join(wrong)} from OnPolicy: give it there (sampling=, max_new_tokens=)."
            )
        if settings.get("num_beams", 1) != 1:
            raise ValueError("TransformersEngine samples or is greedy; beams have no log-probability of a sample.")
        self.settings = settings

    def bind(self, student: nn.Module) -> None:
        if not callable(getattr(student, "generate", None)):
            raise TypeError(
                f"TransformersEngine needs a model of transformers with generate(); got {type(student).__name__}."
            )
        super().bind(student)

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        eos: int | Sequence[int] | None = None,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        from transformers import GenerationConfig

        student: Any = self.student
        longest, ends = max(map(len, prompts)), eos_ids(eos)
        check_positions(student, longest, max_new_tokens)
        device = next(student.parameters()).device
        pad = ends[0] if ends else 0
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        greedy = sampling.temperature == 0.0
        own: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "top_k": sampling.top_k or 0}
        if not greedy:
            own |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p or None}
        own |= {"max_new_tokens": max_new_tokens, "eos_token_id": ends or None, "pad_token_id": pad}
        own |= {"num_return_sequences": 1, "num_beams": 1, "return_dict_in_generate": True, "output_scores": True}
        config, original = GenerationConfig(**own, **self.settings), student.generation_config
        size, columns = vocabulary_size([student], vocabulary), None
        # every copy of a prompt is a row: greedy search takes no num_return_sequences
        ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)

        def cut(_: Tensor, scores: Tensor) -> Tensor:
            nonlocal columns
            if columns is None:
                columns = torch.arange(scores.shape[1], device=scores.device) >= (size or scores.shape[1])
            return scores.masked_fill(columns, -torch.inf)

        with eval_mode(student), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed % 2**63)
            try:
                student.generation_config = copy.deepcopy(config)  # whose settings would fill those left out here
                out = student.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[cut]
                )
            finally:
                student.generation_config = original
        tokens = out.sequences[:, longest:]
        scores = torch.stack([upcast_to_float32(s).log_softmax(-1) for s in out.scores], 1)
        log_probs = scores.gather(-1, tokens[..., None])[..., 0]
        log_probs = torch.zeros_like(log_probs) if greedy else log_probs
        return [_ended(Completion(*pair), ends) for pair in zip(tokens.tolist(), log_probs.tolist(), strict=True)]


def _ended(text: Completion, ends: Sequence[int]) -> Completion:
    """Return a text up to its first end-of-text token."""
    length = next((i + 1 for i, token in enumerate(text.ids) if token in ends), len(text.ids))
    return Completion(text.ids[:length], None if text.log_probs is None else text.log_probs[:length])


def completed_state(
    prompts: list[list[int]],
    completions: Sequence[Completion],
    *,
    max_new_tokens: int,
    eos: int | Sequence[int] | None,
    student: nn.Module,
) -> GenerationState:
    """Return the state of texts that an engine generated, one per prompt, with their batch and statistics."""
    weight = next(student.parameters())
    state = GenerationState(prompts, max_new_tokens=max_new_tokens, eos=eos, device=weight.device)
    state.generated = [text.ids for text in completions]
    state.replaced = [[False] * len(text.ids) for text in completions]
    given = [text.log_probs for text in completions]
    if all(row is not None for row in given):
        width = max(len(text.ids) for text in completions)
        rows = [[*(row or []), *[0.0] * (width - len(row or []))] for row in given]
        state.log_probs = [torch.tensor(rows, dtype=upcast_to_float32(weight[:0]).dtype)]
    return state
