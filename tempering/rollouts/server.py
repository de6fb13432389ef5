"""Rollouts of a student that vLLM or SGLang serves over HTTP, with its weights refreshed by file."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from torch import nn

from tempering.data.text import eos_ids
from tempering.rollouts.decoders import forward
from tempering.rollouts.decoding import max_positions, trial_tokens
from tempering.rollouts.engines import Completion, Prompts, RolloutEngine
from tempering.rollouts.generation_config import Sampling
from tempering.rollouts.sampling import generate, vocabulary_size
from tempering.teachers.remote.http import Endpoint, RequestOptions
from tempering.utils.device import is_distributed
from tempering.utils.tensors import eval_mode

Api = Literal["vllm", "sglang"]
LIKELY = math.log(1e-3)  # smallest log-probability that is compared; below it the server's rounding dominates
PROBE = 16  # tokens of the text whose log-probabilities tell which weights are served
RESTARTS = 3  # most times that a batch is generated again
NEXT = ".next-"  # of a folder with weights that are not served yet
COMPARED = 8  # completions of the first batch that are compared


class ServerMismatchError(RuntimeError):
    """Raised if the server's log-probabilities are not those of the student; the message says which."""


class Snapshot(NamedTuple):
    """The student's weights between two steps: their number and folder (None: another process writes it), and a text
    with its log-probabilities, by which served weights are recognized.
    """

    number: int
    folder: Path | None
    text: list[int]
    log_probs: list[float]


class RolloutServer(RolloutEngine):
    """Generates with the student on a server, vLLM or SGLang, whose weights are refreshed by file.

    Before the first batch, and then every ``refresh_every`` batches, the student is saved to ``weights``, each file
    written beside and renamed, and the server loads it. Start the server from this folder, so that it has the
    newest weights after a restart. vLLM needs VLLM_SERVER_DEV_MODE=1, and ``--logprobs-mode processed_logprobs`` if the
    sampling has a temperature or cuts.

    Token ids are sent and received, never text. The server has to agree with the student: after each refresh, and after
    each batch, on the log-probabilities of a short text, and in the first batch on those of the sampled tokens. A
    server that restarted with other weights gets the current ones, and the batch is generated again.

    With ``staleness`` a thread generates up to that many batches ahead: batch j has the weights from before batch
    j - staleness - refresh_every + 1, or later ones. ``methods.PolicyGradient(importance=True, truncate=2.0)`` and
    ``methods.TruncatedImportance`` correct for it. A resumed run generates its first batches anew, by the weights of
    the checkpoint. With 0 nothing is generated ahead.

    Args:
        url: the server's root, such as "http://localhost:8000".
        model: name of the student on the server.
        weights: folder of the weights, which the server can read.
        api: "vllm" uses /v1/completions, /collective_rpc (reload_weights) and /reset_prefix_cache, "sglang" /generate
            and /update_weights_from_disk.
        staleness: most batches that are generated ahead.
        refresh_every: batches from one refresh to the next.
        parity: largest accepted difference of log-probabilities, in nats, of tokens of probability 0.001 and more;
            bfloat16 on one side needs up to 0.1.
        concurrent: requests at the same time.
        sleep: free the server's memory between batches, for one on the same device: /sleep?level=1 and /wake_up of
            vLLM (--enable-sleep-mode), the key-value cache in SGLang (--enable-memory-saver).
        options: key_env: name of the environment variable with the key, which is not stored; timeout (default 120),
            tries (5) and wait (1): most seconds per response as a whole, most tries, and seconds before the second,
            doubled for each: 10 tries wait six minutes for a server that restarts; max_bytes: largest response.

    Raises:
        ValueError: for invalid arguments.
        TypeError: at ``bind``, for a student that is no transformers model, is sharded, or has adapters.
        ServerMismatchError: while it runs, if the server's log-probabilities are not the student's.
        RuntimeError: for a server without a response, or with an unexpected one; with its address and its message.

    Reference: the protocols of vLLM and SGLang as their sources have them in 2026, not tried against them.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        weights: str | Path,
        api: Api = "vllm",
        staleness: int = 0,
        refresh_every: int = 1,
        parity: float = 0.1,
        concurrent: int = 16,
        sleep: bool = False,
        **options: Unpack[RequestOptions],
    ) -> None:
        whole = all(isinstance(x, int) for x in (staleness, refresh_every, concurrent))
        if api not in get_args(Api) or not whole or staleness < 0 or min(refresh_every, concurrent) < 1 or parity <= 0:
            raise ValueError(
                "RolloutServer needs api 'vllm' or 'sglang', staleness >= 0, refresh_every and concurrent >= 1 and "
                f"parity > 0; got {api!r}, {staleness}, {refresh_every}, {concurrent} and {parity}."
            )
        if sleep and staleness:
            raise ValueError("RolloutServer cannot sleep while it generates ahead: write sleep=False or staleness=0.")
        self.url, self.served, self.weights, self.api = url, model, Path(weights).absolute(), api
        self.staleness, self.refresh_every, self.parity = staleness, refresh_every, parity
        self.concurrent, self.sleep = concurrent, sleep
        self.endpoint = Endpoint(url, owner="RolloutServer", **options)
        self.largest, self.refreshes, self.restarts = 0.0, 0, 0
        self._current: Snapshot | None = None
        self._lock, self._asleep = threading.Lock(), False

    def bind(self, student: nn.Module) -> None:
        sharded = any(hasattr(p, "full_tensor") for p in student.parameters())
        if sharded or not hasattr(student, "save_pretrained") or hasattr(student, "peft_config"):
            kind = "sharded parameters" if sharded else "adapters" if hasattr(student, "peft_config") else "no config"
            raise TypeError(
                f"RolloutServer saves the student with save_pretrained(), and {type(student).__name__} has {kind}. Use "
                "a whole model of transformers, or leave out engine= to generate in this process."
            )
        super().bind(student)

    def snapshot(self) -> Snapshot:
        """Save the student's weights beside those that are served, and the log-probabilities of a short text."""
        student: Any = self.student
        room = (max_positions(student) or PROBE + 1) - 1
        options: dict[str, Any] = {"max_new_tokens": min(PROBE, room), "sampling": Sampling(temperature=0.0)}
        batch, _ = generate(student, None, [trial_tokens(student, 1).tolist()], **options)
        text = batch["input_ids"][0].tolist()
        log_probs = self._log_probs(text, 1, Sampling())
        folder = None
        if _rank() == 0:
            folder = self.weights / f"{NEXT}{self.refreshes}"
            shutil.rmtree(folder, ignore_errors=True)
            with _quiet():
                student.save_pretrained(folder, max_shard_size="10000GB")  # one file, which one rename replaces
        self.refreshes += 1
        return Snapshot(self.refreshes - 1, folder, text, log_probs)

    def push(self, snapshot: Snapshot) -> None:
        """Rename the saved files into place, and let the server load them.

        Raises:
            ServerMismatchError: if its log-probabilities are not those of the student.
            RuntimeError: if it refuses.
        """
        with self._lock:
            _barrier()  # no process generates with the weights before any more
            if snapshot.folder is not None:
                for file in sorted(snapshot.folder.iterdir()):
                    os.replace(file, self.weights / file.name)
                for left in self.weights.glob(f"{NEXT}*"):  # this one, and those of runs that were interrupted
                    if left == snapshot.folder or int(left.name.removeprefix(NEXT)) < snapshot.number:
                        shutil.rmtree(left)
                self._load()
            _barrier()
            self._current = snapshot
            self._check_weights("after loading its weights")

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
        size = vocabulary_size([self.student], vocabulary) or 2**31

        def ask(job: tuple[int, Sequence[int]]) -> Completion:
            number = int.from_bytes(hashlib.sha256(f"{seed}/{job[0]}".encode()).digest()[:4], "little") >> 1
            found = self._ask(list(job[1]), sampling, max_new_tokens, eos_ids(eos), number)
            self._check(found, max_new_tokens, eos_ids(eos), size)
            return found if sampling.temperature else Completion(found.ids, [0.0] * len(found.ids))

        jobs = list(enumerate(prompt for prompt in prompts for _ in range(n)))
        with self._lock, ThreadPoolExecutor(self.concurrent) as pool:
            for _ in range(RESTARTS):
                self._wake()
                completions = list(pool.map(ask, jobs))
                if self._serves_current():
                    self._rest()
                    return completions
                self.restarts += 1  # other weights: it was restarted
                self._load()
                self._check_weights("after it was given its weights again, since it served others")
        raise self.endpoint.error(
            f"{self._source} served other weights than the student's after each of {RESTARTS} tries of a batch. Is it "
            "restarted again and again, or does another run refresh its weights?"
        )

    def verify(self, prompts: Prompts, completions: Sequence[Completion], sampling: Sampling) -> None:
        """Compare the log-probabilities of the sampled tokens of a few completions to the student's.

        Raises:
            ServerMismatchError: if one differs by more than ``parity``; of greedy texts, if a token is not the
                likeliest by more than that.
        """
        for prompt, text in list(zip(prompts, completions, strict=True))[:COMPARED]:
            whole = [*prompt, *text.ids]
            if sampling.temperature == 0.0:
                own = self._log_probs(whole, len(prompt), Sampling())
                best = self._log_probs(whole, len(prompt), None)
                gap = max(b - a for a, b in zip(own, best, strict=True))
            else:
                own = self._log_probs(whole, len(prompt), sampling)
                gap = _largest(own, text.log_probs or [])
            self.largest = max(self.largest, gap)
            if gap > self.parity:
                raise ServerMismatchError(
                    f"{self._source} returns log-probabilities of its own tokens that differ from the student's by "
                    f"{gap:.3g} nats, and parity={self.parity:g}, though both agree on the weights. They have to be "
                    f"those of {sampling}: start vLLM with --logprobs-mode processed_logprobs; SGLang's are before "
                    "top_p, top_k and min_p: leave these out."
                )

    def report(self) -> dict[str, float]:
        """Return the largest difference of log-probabilities so far, and the numbers of refreshes and restarts."""
        return {"parity": self.largest, "refreshes": float(self.refreshes), "restarts": float(self.restarts)}

    # the student

    @torch.no_grad()
    def _log_probs(self, text: list[int], start: int, sampling: Sampling | None) -> list[float]:
        """Return the student's log-probabilities of a text's tokens from ``start`` on; None: of the likeliest."""
        ids = torch.tensor([text], device=next(self.student.parameters()).device)
        with eval_mode(self.student):
            logits = forward(self.student, ids, None, {}, cached=False)[0][0, start - 1 : -1]
        if sampling is None:
            return logits.float().log_softmax(-1).amax(-1).tolist()
        return sampling.log_prob(logits, ids[0, start:]).tolist()

    def _check_weights(self, when: str) -> None:
        assert self._current is not None
        own, gap = self._current.log_probs, self._gap()
        self.largest = max(self.largest, gap)
        if gap > self.parity:
            raise ServerMismatchError(
                f"{self._source} does not serve the student: {when}, its log-probabilities of {len(own)} tokens differ "
                f"by up to {gap:.3g} nats from the student's, and parity={self.parity:g}. Was it started from "
                f"{self.weights}, unquantized, and did it load the files there?"
            )

    def _serves_current(self) -> bool:
        return self._current is None or self._gap() <= self.parity

    def _gap(self) -> float:
        assert self._current is not None
        return _largest(self._current.log_probs, self._score(self._current.text))

    # the protocols

    def _load(self) -> None:
        """Let the server load the files in ``weights``."""
        self._wake()
        path = str(self.weights)
        if self.api == "vllm":
            request = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            self.endpoint.post("/collective_rpc", request, empty=True)
            self.endpoint.post("/reset_prefix_cache", {}, empty=True)
            return
        response = self.endpoint.post("/update_weights_from_disk", {"model_path": path})
        if response.get("success") is not True:
            raise self.endpoint.error(f"{self._source} did not load {path}: {self.endpoint.excerpt(response)}")

    def _wake(self) -> None:
        if self._asleep:
            vllm = self.api == "vllm"
            self.endpoint.post("/wake_up" if vllm else "/resume_memory_occupation", self._tags(), empty=True)
            self._asleep = False

    def _rest(self) -> None:
        if self.sleep:
            vllm = self.api == "vllm"
            path = "/sleep?level=1" if vllm else "/release_memory_occupation"
            self.endpoint.post(path, self._tags(), empty=True)
            self._asleep = True

    def _tags(self) -> dict[str, Any]:
        return {} if self.api == "vllm" else {"tags": ["kv_cache"]}

    def _ask(
        self, prompt: list[int], sampling: Sampling, max_new_tokens: int, ends: Sequence[int], seed: int
    ) -> Completion:
        """Return one completion."""
        own: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p}
        own |= {"top_k": sampling.top_k or -1, "stop_token_ids": list(ends), "skip_special_tokens": False}
        if self.api == "sglang":
            request = {"input_ids": prompt, "sampling_params": own | {"max_new_tokens": max_new_tokens}}
            response = self.endpoint.post("/generate", request | {"return_logprob": True})
            return self._parsed(response, lambda: _pairs(response["meta_info"]["output_token_logprobs"]))
        request = {"model": self.served, "prompt": prompt, "max_tokens": max_new_tokens, "n": 1, "seed": seed, **own}
        response = self.endpoint.post("/v1/completions", request | {"logprobs": 0, "return_token_ids": True})

        def completion() -> Completion:
            (choice,) = response["choices"]
            if choice.get("prompt_token_ids") not in (None, prompt):
                raise ValueError("another prompt: does it insert a token, or cut long prompts?")
            if choice.get("token_ids") is None:
                raise ValueError("no token_ids: it needs a vLLM that knows return_token_ids")
            return Completion(list(choice["token_ids"]), [*map(float, choice["logprobs"]["token_logprobs"])])

        return self._parsed(response, completion)

    def _score(self, text: list[int]) -> list[float]:
        """Return the server's log-probabilities of a text's tokens but the first, at temperature 1."""
        if self.api == "sglang":
            request: dict[str, Any] = {"input_ids": text, "return_logprob": True, "logprob_start_len": 0}
            request |= {"sampling_params": {"max_new_tokens": 0, "temperature": 1.0}}
            response = self.endpoint.post("/generate", request)
            scored = self._parsed(response, lambda: _pairs(response["meta_info"]["input_token_logprobs"][1:]))
        else:
            request = {"model": self.served, "prompt": text, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1}
            response = self.endpoint.post("/v1/completions", request)

            def entries() -> Completion:
                steps = response["choices"][0]["prompt_logprobs"][1:]
                values = [step[str(i)]["logprob"] for i, step in zip(text[1:], steps, strict=True)]
                return Completion(text[1:], [*map(float, values)])

            scored = self._parsed(response, entries)
        if scored.ids != text[1:]:
            raise self.endpoint.error(f"{self._source} returns log-probabilities of another text than was sent.")
        return scored.log_probs or []

    def _parsed(self, response: Any, parse: Callable[[], Completion]) -> Completion:
        try:
            found = parse()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self.endpoint.error(
                f"the response of {self._source} has another form than api={self.api!r} ({type(error).__name__}: "
                f"{error}): {self.endpoint.excerpt(response)}"
            ) from None  # the original may quote the response
        if any(math.isnan(x) or x > 1e-3 for x in found.log_probs or []):
            raise self.endpoint.error(
                f"{self._source} returns values that are no log-probabilities: {self.endpoint.excerpt(found.log_probs)}"
            )
        return found

    def _check(self, text: Completion, max_new_tokens: int, ends: Sequence[int], size: int) -> None:
        """Raise for a completion that cannot be one."""
        ids, count = text.ids, len(text.log_probs or [])
        wrong = next((i for i in ids if not isinstance(i, int) or not 0 <= i < size), None)  # pyright: ignore
        early = next((i for i in ids[:-1] if i in ends), None)
        problem = ""
        if wrong is not None:
            problem = f"token {wrong!r}, and the student has {size} tokens. Is it another model's?"
        elif count != len(ids) or not 0 < len(ids) <= max_new_tokens:
            problem = f"{len(ids)} tokens with {count} log-probabilities, and max_new_tokens={max_new_tokens}"
        elif early is not None:
            problem = f"tokens after the end of the text, token {early}"
        elif len(ids) < max_new_tokens and ids[-1] not in ends:
            problem = (
                f"a text of {len(ids)} of {max_new_tokens} tokens that ends with token {ids[-1]}, which is not in "
                f"eos={list(ends)}. Give all end-of-text tokens of the model as eos, or allow longer texts (vLLM: "
                "--max-model-len)"
            )
        if problem:
            raise self.endpoint.error(f"{self._source} returns {problem}.")

    @property
    def _source(self) -> str:
        return f"{self.endpoint.root} ({self.served!r})"


def _pairs(entries: Sequence[Sequence[Any]]) -> Completion:
    """Return the tokens of SGLang's [log-probability, id, text] entries."""
    return Completion([entry[1] for entry in entries], [float(entry[0]) for entry in entries])


def _largest(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference, of tokens that one side finds likely."""
    pairs = zip(own, other, strict=True)
    return max((abs(a - b) for a, b in pairs if max(a, b) >= LIKELY), default=0.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out transformers' progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _rank() -> int:
    return torch.distributed.get_rank() if is_distributed() else 0


def _barrier() -> None:
    if is_distributed():
        torch.distributed.barrier()
