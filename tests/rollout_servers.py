"""A server in a thread that speaks the protocols of vLLM and SGLang, over a tiny model, and can be spoiled."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempering.rollouts.generation_config import Sampling
from tempering.rollouts.sampling import generate


class RolloutHandler(BaseHTTPRequestHandler):
    server: StudentServer

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            code, answer = self.server.answer(self.path, asked)
        if self.server.late:
            time.sleep(self.server.late)
        if code == 0:  # dies while it answers
            self.close_connection = True
            return
        self.send_response(code)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(b"" if answer is None else json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None:
        return


class StudentServer(ThreadingHTTPServer):
    """Serves a copy of a model, as it was at first, until it is told to load other weights.

    Args:
        model: the architecture, and the weights at the start and after a restart.
    """

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(("127.0.0.1", 0), RolloutHandler)
        self.first, self.model, self.lock = copy.deepcopy(model), copy.deepcopy(model).eval(), threading.Lock()
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.prompts: list[tuple[list[int], int]] = []  # of texts, and the number of loads before
        self.failures: list[int] = []  # status of the next answers; 0: none
        self.restarts: set[int] = set()  # numbers of texts before which it restarts
        self.loads, self.late = 0, 0.0
        self.raw, self.ignores, self.asleep = False, False, False
        self.spoil: Callable[[list[int], list[float]], tuple[Any, Any]] = lambda ids, log_probs: (ids, log_probs)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, asked: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append((path, asked))
        if self.failures and (code := self.failures.pop(0)) != 200:
            return code, {"error": "busy"}
        if path in ("/collective_rpc", "/update_weights_from_disk"):
            return 200, self.load(asked["kwargs"]["weights_path"] if "kwargs" in asked else asked["model_path"])
        if path in ("/reset_prefix_cache", "/wake_up", "/sleep?level=1"):
            self.asleep = path.startswith("/sleep") or (self.asleep and path != "/wake_up")
            return 200, None
        assert not self.asleep, path
        assert path in ("/v1/completions", "/generate"), path
        params = asked.get("sampling_params", asked)
        prompt = asked["input_ids"] if path == "/generate" else asked["prompt"]
        if "prompt_logprobs" in asked or params.get("max_new_tokens") == 0:
            return 200, self.scored(path, prompt)
        if len(self.prompts) in self.restarts:
            self.restarts.remove(len(self.prompts))
            self.model.load_state_dict(self.first.state_dict())
        self.prompts.append((prompt, self.loads))
        sampling = Sampling(params["temperature"], params["top_p"], max(params["top_k"], 0) or None, params["min_p"])
        length = params.get("max_new_tokens", params.get("max_tokens"))
        options: dict[str, Any] = {"max_new_tokens": length, "eos": params["stop_token_ids"]}
        batch, _ = generate(self.model, None, [prompt], sampling=sampling, seed=asked.get("seed", 0), **options)
        ids = batch["input_ids"][0][len(prompt) :].tolist()
        if self.raw or sampling.temperature == 0.0:
            log_probs = self.log_probs(prompt + ids)[len(prompt) - 1 :]
        else:
            log_probs = batch["rollout_log_prob"][0][len(prompt) :].tolist()
        ids, log_probs = self.spoil(ids, log_probs)
        if path == "/generate":
            pairs = [[value, i, None] for i, value in zip(ids, log_probs, strict=True)]
            return 200, {"text": "", "meta_info": {"output_token_logprobs": pairs, "finish_reason": {"type": "stop"}}}
        choice = {"index": 0, "token_ids": ids, "prompt_token_ids": prompt, "logprobs": {"token_logprobs": log_probs}}
        return 200, {"choices": [choice | {"text": ""}]}

    def load(self, folder: str) -> dict[str, Any]:
        from safetensors.torch import load_file

        self.loads += 1
        if not self.ignores:
            self.model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
            self.model.tie_weights()  # pyright: ignore[reportCallIssue]
        return {"success": True, "results": [None]}

    @torch.no_grad()
    def log_probs(self, text: list[int]) -> list[float]:
        logits = self.model(input_ids=torch.tensor([text])).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()

    def scored(self, path: str, text: list[int]) -> dict[str, Any]:
        values = self.log_probs(text)
        if path == "/generate":
            pairs = [[None, text[0], None], *([v, i, None] for v, i in zip(values, text[1:], strict=True))]
            return {"meta_info": {"input_token_logprobs": pairs}}
        steps = [None, *({str(i): {"logprob": v}} for v, i in zip(values, text[1:], strict=True))]
        return {"choices": [{"index": 0, "prompt_logprobs": steps}]}


@contextlib.contextmanager
def serving(model: nn.Module) -> Iterator[StudentServer]:
    """A server that answers in a thread."""
    with StudentServer(model) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()
