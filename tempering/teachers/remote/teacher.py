"""A teacher behind an endpoint: vLLM's, or any that speaks OpenAI's completions, giving its top log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.outputs import Sparse
from tempering.teachers.remote.http import Endpoint

Api = Literal["vllm", "openai"]
Step = dict[int, float]  # token id -> log-probability, at one position
TOKEN = "token_id:"  # how vLLM writes a token as its id: --return-tokens-as-token-ids
OVER = 1e-3  # how far the mass of the kept tokens may lie above 1: half precision on the server
LEAST = 1e-7  # mass of the bucket at least: below it float32, which a server computes in, cannot tell some from none


class RemoteTeacher(Teacher):
    """Answers ``Sparse`` (B, L, top + 1) to the inputs of a Generation task: the likeliest tokens and the text's next.

    Position i holds what the server says of the token of i + 1, as the task reads it; the last position of a text, for
    which nobody is asked, holds nothing. Token ids are sent, never text, so nothing is tokenized again. Padding is
    taken off by the attention mask. All is at temperature 1: a policy softens the top + 2 outcomes, not the vocabulary.
    ``teachers.record_top_k`` writes the answers to disk; ``teachers.verify_remote`` holds them to a model at hand,
    which a run should begin with. ``identity`` is that of the model's name: what is served under it nobody else can
    see.

    Args:
        url: the server's root, such as "http://localhost:8000".
        model: the name that it serves the teacher by.
        top: how many of the likeliest tokens; the server must allow as many (vLLM: --max-logprobs, 20 by default;
            OpenAI: 5).
        api: "vllm" asks for prompt_logprobs, which come by id. "openai" asks for echo and logprobs, which come as
            strings: "token_id:7", or those of ``tokens``.
        tokens: string -> id as the server writes tokens; a likely token that is not in it falls into the bucket.
        key_env: name of the environment variable with the key; the key itself is kept nowhere.
        batch: texts in one question.
        concurrent: questions on their way at once.
        timeout, tries, wait: seconds for an answer, how often it is asked for, and seconds before the second time.

    Raises:
        ValueError: for arguments that do not fit, or inputs that are packed.
        RuntimeError: for a server that does not answer, or not what was asked; with its address and its words.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        top: int = 16,
        api: Api = "vllm",
        tokens: Mapping[str, int] | None = None,
        key_env: str | None = None,
        batch: int = 8,
        concurrent: int = 4,
        timeout: float = 120.0,
        tries: int = 5,
        wait: float = 1.0,
    ) -> None:
        if api not in get_args(Api) or min(top, batch, concurrent) < 1:
            raise ValueError(
                f"RemoteTeacher needs api 'vllm' or 'openai', and top, batch and concurrent >= 1; got {api!r}, {top}, "
                f"{batch} and {concurrent}."
            )
        self.url, self.top, self.api, self.tokens = url, top, api, tokens
        self.batch, self.concurrent, self.served = batch, concurrent, model
        self.endpoint = Endpoint(url, key_env=key_env, timeout=timeout, tries=tries, wait=wait)
        self.identity = key_digest({"served": model, "top": top})

    def __call__(self, inputs: Mapping[str, Tensor], ids: Tensor | None = None) -> Sparse:
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None and inputs.get("position_ids") is not None:
            raise ValueError("a served teacher cannot keep packed texts apart. Pad them: data.text.collate(examples).")
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        answers = self.ask([row[kept].tolist() for row, kept in zip(tokens, real, strict=True)])
        shape = (*tokens.shape, self.top + 1)
        out = Sparse(torch.zeros(shape, dtype=torch.long), torch.full(shape, -torch.inf), torch.zeros(tokens.shape))
        for row, (kept, said) in enumerate(zip(real.cpu(), answers, strict=True)):
            place = kept.nonzero().flatten()
            for room, values in ((out.ids, said.ids), (out.logp, said.logp), (out.tail_logp, said.tail_logp)):
                room[row, place] = values
        return out.to(tokens.device)

    def ask(self, texts: Sequence[Sequence[int]]) -> list[Sparse]:
        """What the server says of these texts of token ids: ``Sparse`` (L, top + 1) each, on the CPU.

        Fewer than two tokens leave nothing to predict, and are not sent.
        """
        wanted = [i for i, text in enumerate(texts) if len(text) > 1]
        parts = [wanted[i : i + self.batch] for i in range(0, len(wanted), self.batch)]
        with ThreadPoolExecutor(self.concurrent) as pool:
            found = list(pool.map(lambda part: self._asked([list(texts[i]) for i in part]), parts))
        steps = dict(zip(wanted, (one for part in found for one in part), strict=True))
        return [self._sparse(list(text), steps.get(i, [])) for i, text in enumerate(texts)]

    def _asked(self, texts: list[list[int]]) -> list[list[Step]]:
        """The log-probabilities at every position but the first, of each of these texts."""
        # at temperature 1 and without cuts, "raw" and "processed" log-probabilities are the same
        question: dict[str, Any] = {"model": self.served, "prompt": texts, "max_tokens": 1, "temperature": 1.0}
        if self.api == "vllm":
            question |= {"prompt_logprobs": self.top}
        else:
            question |= {"echo": True, "logprobs": self.top}
            question |= {} if self.tokens is not None else {"return_tokens_as_token_ids": True}
        answer = self.endpoint.post("/v1/completions", question)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != len(texts):
            got = f"{len(choices)} choices" if isinstance(choices, list) else f"no choices but {sorted(answer)}"
            raise RuntimeError(f"{self._who} was asked about {len(texts)} texts and answers {got}: {str(answer)[:400]}")
        read = self._by_id if self.api == "vllm" else self._by_string
        try:
            ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
            return [read(choice, text) for choice, text in zip(ordered, texts, strict=True)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"{self._who} answers in another form than api={self.api!r} has ({type(error).__name__}: {error}): "
                f"{str(choices[0])[:400]}"
            ) from error

    def _by_id(self, choice: dict[str, Any], text: list[int]) -> list[Step]:
        """vLLM: a mapping a position, id -> {"logprob": ...}, none at the first; the text's own token is always in."""
        said = choice.get("prompt_logprobs")
        if said is None:
            raise RuntimeError(f"{self._who} gives no prompt_logprobs. Is it vLLM? Others: api='openai'.")
        self._as_long(len(said), text)
        steps = [{int(i): float(entry["logprob"]) for i, entry in step.items()} for step in said[1:]]
        for i, step in enumerate(steps, 1):
            if text[i] not in step:
                raise RuntimeError(
                    f"{self._who} does not speak of the text it was sent: at position {i} it has no probability of "
                    f"token {text[i]}, but of {sorted(step)[:5]}. Does it add a token of its own, or shift by one?"
                )
            self._enough(step)
        return steps

    def _by_string(self, choice: dict[str, Any], text: list[int]) -> list[Step]:
        """OpenAI: tokens, token_logprobs and top_logprobs side by side, None at the first, tokens as strings."""
        said = choice.get("logprobs") or {}
        tokens, own, likely = (said[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
        self._as_long(min(len(tokens), len(own), len(likely)), text, more=1)
        steps = []
        for i in range(1, len(text)):
            known = self._id(tokens[i])
            if known not in (None, text[i]):
                raise RuntimeError(
                    f"{self._who} does not speak of the text it was sent: position {i} is token {text[i]}, and there "
                    f"it is {tokens[i]!r}. Does it add a token of its own, or are ``tokens`` another model's?"
                )
            found = {self._id(token): float(value) for token, value in likely[i].items()}
            if self.tokens is None:
                if None in found:
                    raise RuntimeError(
                        f"{self._who} writes tokens as strings ({next(iter(likely[i]))!r}), which name no id. Give "
                        "tokens={string: id}, or start it with --return-tokens-as-token-ids."
                    )
                self._enough(found)
            steps.append({k: v for k, v in found.items() if k is not None} | {text[i]: float(own[i])})
        return steps

    def _sparse(self, text: list[int], steps: list[Step]) -> Sparse:
        """The likeliest ``top`` of every position with the text's own token, the bucket of the others, and the end."""
        ids = torch.zeros(len(text), self.top + 1, dtype=torch.long)
        logp, rest = torch.full(ids.shape, -torch.inf, dtype=torch.float64), torch.zeros(len(text), dtype=torch.float64)
        for i, step in enumerate(steps):
            following = text[i + 1]
            likely = sorted(step.items(), key=lambda pair: (-pair[1], pair[0]))[: self.top]
            if all(token != following for token, _ in likely):
                likely.append((following, step[following]))
            mass = math.fsum(math.exp(min(value, 1.0)) for _, value in likely)
            if not mass <= 1.0 + OVER:  # NaN too
                raise RuntimeError(
                    f"{self._who} gives no log-probabilities: at position {i + 1} those of {len(likely)} tokens add up "
                    f"to a mass of {mass:g}. Does it return logits?"
                )
            ids[i, : len(likely)] = torch.tensor([token for token, _ in likely])
            logp[i, : len(likely)] = torch.tensor([value for _, value in likely], dtype=torch.float64)
            rest[i] = math.log(max(LEAST, 1.0 - mass))
        return Sparse(ids, logp.float(), rest.float())

    def _id(self, token: str) -> int | None:
        """The id that a string names; None for one that is not known."""
        if token.startswith(TOKEN):
            return int(token.removeprefix(TOKEN))
        return None if self.tokens is None else self.tokens.get(token)

    def _as_long(self, found: int, text: list[int], *, more: int = 0) -> None:
        if not len(text) <= found <= len(text) + more:
            raise RuntimeError(
                f"{self._who} gives log-probabilities of {found} tokens, and the text has {len(text)}. Does it add a "
                "token of its own (a beginning of text), cut long texts, or not know "
                f"{'prompt_logprobs' if self.api == 'vllm' else 'echo'}?"
            )

    def _enough(self, step: Mapping[Any, float]) -> None:
        if len(step) < self.top:
            raise RuntimeError(
                f"{self._who} gives {len(step)} tokens a position, and top={self.top} were asked for. Ask for fewer, "
                "or start it with more (vLLM: --max-logprobs)."
            )

    @property
    def _who(self) -> str:
        return f"{self.endpoint.root} ({self.served!r})"
