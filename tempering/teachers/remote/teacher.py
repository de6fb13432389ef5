"""Teacher on a server that returns top log-probabilities: vLLM, or OpenAI's completions API."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from tempering.teachers.base import Teacher, key_digest
from tempering.teachers.outputs import Sparse
from tempering.teachers.remote.http import Endpoint, RequestOptions
from tempering.utils.tensors import on_host

Api = Literal["vllm", "openai"]
Step = dict[int, float]  # token id -> log-probability, at one position
TOKEN = "token_id:"  # prefix of token ids in vLLM: --return-tokens-as-token-ids
TOLERANCE = 1e-3  # by which the probabilities of the kept tokens may exceed 1 in sum: half precision on the server
LOWEST = -9999.0  # what vLLM writes for minus infinity, which JSON does not have
MIN_TAIL = 1e-7  # smallest probability of the tail: the resolution of float32, in which a server computes


class RemoteTeacher(Teacher):
    """Returns ``Sparse`` (B, L, top + 1) for ``LanguageModeling`` inputs: the likeliest tokens and the text's next.

    Position i has the server's log-probabilities of token i + 1, as the task reads them; the last position of a text is
    empty. Token ids are sent, never text, so nothing is tokenized again. Padding is removed by the attention mask. All
    values are at temperature 1: a policy softens the top + 2 outcomes, not the vocabulary. ``teachers.record_top_k``
    writes the outputs to disk; ``teachers.verify_remote`` compares them to a local model and should be called before
    a run. ``identity`` is computed from the model's name, since the served weights cannot be read.

    Args:
        url: the server's root, such as "http://localhost:8000".
        model: name of the teacher on the server.
        top: number of likeliest tokens; the server must allow as many (vLLM: --max-logprobs, 20 by default;
            OpenAI: 5).
        api: "vllm" requests prompt_logprobs, which are keyed by id. "openai" requests echo and logprobs, whose tokens
            are strings: "token_id:7", or the keys of ``tokens``.
        tokens: string -> id as the server writes tokens; a likely token that is not in it belongs to the tail.
        batch: texts per request.
        concurrent: requests at the same time.
        options: key_env: name of the environment variable with the key, which is not stored; timeout (default 120),
            tries (5) and wait (1): most seconds per response as a whole, most tries, and seconds before the second;
            max_bytes: largest response.

    Raises:
        ValueError: for invalid arguments, or packed inputs.
        RuntimeError: for a server without a response, or with an unexpected one; with its address and its message.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        top: int = 16,
        api: Api = "vllm",
        tokens: Mapping[str, int] | None = None,
        batch: int = 8,
        concurrent: int = 4,
        **options: Unpack[RequestOptions],
    ) -> None:
        if api not in get_args(Api) or not all(isinstance(x, int) and x >= 1 for x in (top, batch, concurrent)):
            raise ValueError(
                f"RemoteTeacher needs api 'vllm' or 'openai', and top, batch and concurrent >= 1; got {api!r}, {top}, "
                f"{batch} and {concurrent}."
            )
        self.url, self.top, self.api, self.tokens = url, top, api, tokens
        self.batch, self.concurrent, self.served = batch, concurrent, model
        self.endpoint = Endpoint(url, **options)
        self.identity = key_digest({"served": model, "top": top})

    def __call__(self, inputs: Mapping[str, Tensor], ids: Tensor | None = None) -> Sparse:
        if not isinstance(inputs, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"RemoteTeacher needs the inputs of LanguageModeling; got {type(inputs).__name__}.")
        tokens, mask, labels = (inputs.get(name) for name in ("input_ids", "attention_mask", "labels"))
        if tokens is None or tokens.is_floating_point() or (labels is not None and labels.shape != tokens.shape):
            raise ValueError(
                "RemoteTeacher needs the inputs of LanguageModeling, with integer input_ids; got "
                f"{', '.join(f'{n} {tuple(x.shape)}' for n, x in inputs.items())}. Encoder-decoders need Live(model)."
            )
        if mask is None and inputs.get("position_ids") is not None:
            raise ValueError("RemoteTeacher cannot keep packed texts apart. Pad them: data.text.collate(examples).")
        device, tokens = tokens.device, on_host(tokens).cpu()
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else on_host(mask).cpu() != 0
        outputs = self.ask([row[kept].tolist() for row, kept in zip(tokens, real, strict=True)])
        shape = (*tokens.shape, self.top + 1)
        out = Sparse(torch.zeros(shape, dtype=torch.long), torch.full(shape, -torch.inf), torch.zeros(tokens.shape))
        for row, (kept, text) in enumerate(zip(real, outputs, strict=True)):
            positions = kept.nonzero().flatten()
            for padded, values in ((out.ids, text.ids), (out.logp, text.logp), (out.tail_logp, text.tail_logp)):
                padded[row, positions] = values
        return out.to(device)

    def ask(self, texts: Sequence[Sequence[int]]) -> list[Sparse]:
        """Query the server for texts of token ids; return ``Sparse`` (L, top + 1) of each, on the CPU.

        Texts of fewer than two tokens have nothing to predict and are not sent.
        """
        indices = [i for i, text in enumerate(texts) if len(text) > 1]
        parts = [indices[i : i + self.batch] for i in range(0, len(indices), self.batch)]
        with ThreadPoolExecutor(self.concurrent) as pool:
            results = list(pool.map(lambda part: self._request([list(texts[i]) for i in part]), parts))
        steps = dict(zip(indices, (steps for part in results for steps in part), strict=True))
        return [self._sparse(list(text), steps.get(i, [])) for i, text in enumerate(texts)]

    def _request(self, texts: list[list[int]]) -> list[list[Step]]:
        """Return the log-probabilities at every position but the first, of each of these texts."""
        # at temperature 1 without top-k or top-p, "raw" and "processed" log-probabilities are the same
        request: dict[str, Any] = {"model": self.served, "prompt": texts, "max_tokens": 1, "temperature": 1.0}
        if self.api == "vllm":
            request |= {"prompt_logprobs": self.top}
        else:
            request |= {"echo": True, "logprobs": self.top}
            request |= {} if self.tokens is not None else {"return_tokens_as_token_ids": True}
        response = self.endpoint.post("/v1/completions", request)
        choices = response.get("choices")
        if not isinstance(choices, list) or len(choices) != len(texts):
            got = f"{len(choices)} choices" if isinstance(choices, list) else f"no choices but {sorted(response)}"
            raise self.endpoint.error(
                f"{self._source} returned {got} for {len(texts)} texts: {self.endpoint.excerpt(response)}"
            )
        parse = self._by_id if self.api == "vllm" else self._by_string
        try:
            ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
            return [parse(choice, text) for choice, text in zip(ordered, texts, strict=True)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self.endpoint.error(
                f"the response of {self._source} has another form than api={self.api!r} ({type(error).__name__}: "
                f"{error}): {self.endpoint.excerpt(choices[0])}"
            ) from None  # the original may quote the response

    def _by_id(self, choice: dict[str, Any], text: list[int]) -> list[Step]:
        """Parse vLLM's: id -> {"logprob": ...} per position, None at the first; the text's own token is always in."""
        logprobs = choice.get("prompt_logprobs")
        if logprobs is None:
            raise self.endpoint.error(
                f"{self._source} returns no prompt_logprobs. Is it vLLM? For others: api='openai'."
            )
        self._check_length(len(logprobs), text)
        steps = [{_id(i): float(entry["logprob"]) for i, entry in step.items()} for step in logprobs[1:]]
        for i, step in enumerate(steps, 1):
            if text[i] not in step:
                raise self.endpoint.error(
                    f"{self._source} returns log-probabilities of another text: at position {i} it has none of token "
                    f"{text[i]}, but of {sorted(step)[:5]}. Does it insert a token, or shift by one?"
                )
            self._check_top(step)
        return steps

    def _by_string(self, choice: dict[str, Any], text: list[int]) -> list[Step]:
        """Parse OpenAI's: tokens, token_logprobs and top_logprobs, None at the first, with tokens as strings."""
        logprobs = choice.get("logprobs") or {}
        tokens, own, likely = (logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs"))
        self._check_length(min(len(tokens), len(own), len(likely)), text, more=1)
        steps = []
        for i in range(1, len(text)):
            token_id = self._id(tokens[i])
            if token_id not in (None, text[i]):
                raise self.endpoint.error(
                    f"{self._source} returns log-probabilities of another text: position {i} is token {text[i]}, and "
                    f"in the response it is {tokens[i]!r}. Does it insert a token, or are ``tokens`` of another model?"
                )
            step = {self._id(token): float(value) for token, value in likely[i].items()}
            if self.tokens is None:
                if None in step:
                    raise self.endpoint.error(
                        f"{self._source} returns tokens as strings ({next(iter(likely[i]))!r}) without their ids. Give "
                        "tokens={string: id}, or start it with --return-tokens-as-token-ids."
                    )
                self._check_top(step)
            steps.append({k: v for k, v in step.items() if k is not None} | {text[i]: float(own[i])})
        return steps

    def _sparse(self, text: list[int], steps: list[Step]) -> Sparse:
        """Return the ``top`` likeliest tokens per position with the text's own, and the tail; the last is empty."""
        ids = torch.zeros(len(text), self.top + 1, dtype=torch.long)
        logp, tail = torch.full(ids.shape, -torch.inf, dtype=torch.float64), torch.zeros(len(text), dtype=torch.float64)
        for i, step in enumerate(steps):
            next_token = text[i + 1]
            possible = {token: value for token, value in step.items() if not value <= LOWEST}
            likely = sorted(possible.items(), key=lambda pair: (-pair[1], pair[0]))[: self.top]
            if next_token in possible and all(token != next_token for token, _ in likely):
                likely.append((next_token, step[next_token]))
            is_nan = any(map(math.isnan, step.values()))
            total = math.nan if is_nan else math.fsum(math.exp(min(value, 1.0)) for _, value in likely)
            if not 0.0 < total <= 1.0 + TOLERANCE:
                raise self.endpoint.error(
                    f"{self._source} returns no log-probabilities: at position {i + 1} the probabilities of "
                    f"{len(likely)} tokens add up to {total:g}. Does it return logits?"
                )
            ids[i, : len(likely)] = torch.tensor([token for token, _ in likely], dtype=torch.long)
            logp[i, : len(likely)] = torch.tensor([value for _, value in likely], dtype=torch.float64)
            tail[i] = math.log(max(MIN_TAIL, 1.0 - total))
        return Sparse(ids, logp.float(), tail.float())

    def _id(self, token: str) -> int | None:
        """Return the id of a token string; None if it is unknown."""
        if token.startswith(TOKEN):
            return _id(token.removeprefix(TOKEN))
        return None if self.tokens is None else self.tokens.get(token)

    def _check_length(self, count: int, text: list[int], *, more: int = 0) -> None:
        if not len(text) <= count <= len(text) + more:
            raise self.endpoint.error(
                f"{self._source} returns log-probabilities of {count} tokens, and the text has {len(text)}. Does it "
                "insert a token (a beginning of text), truncate long texts, or ignore "
                f"{'prompt_logprobs' if self.api == 'vllm' else 'echo'}?"
            )

    def _check_top(self, step: Mapping[Any, float]) -> None:
        if len(step) < self.top:
            raise self.endpoint.error(
                f"{self._source} returns {len(step)} tokens per position, fewer than top={self.top}. Give a smaller "
                "top, or start the server with more (vLLM: --max-logprobs)."
            )

    @property
    def _source(self) -> str:
        return f"{self.endpoint.root} ({self.served!r})"


def _id(token: str) -> int:
    """Return a token id; an error of it is the caller's to name."""
    if not 0 <= (number := int(token)) < 2**31:
        raise ValueError(f"{number} is no token id")
    return number
