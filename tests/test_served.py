"""Teachers behind an endpoint, held to the model that a small server in a thread serves."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering import distill
from tempering.data.text import TextExample, collate, pack
from tempering.data.tokens import Tokens
from tempering.methods import Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rows import Rows, total
from tempering.tasks import LanguageModeling
from tempering.teachers import (
    CachedTopK,
    Live,
    RemoteTeacher,
    TeacherMismatchError,
    TopKTeacher,
    record_top_k,
    verify_remote,
)
from tempering.teachers.outputs import Sparse, to_top_k_plus_tail
from tests.test_generation import EOS, PAD, V, gpt2, texts

TOP = 6


class Server(ThreadingHTTPServer):
    """Serves a tiny model by both interfaces; ``change`` spoils its logits, ``answer`` the whole answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = gpt2(12, 5)
        self.change: Callable[[Any], Any] = lambda logp: logp
        self.spoil: Callable[[Any], Any] = lambda choice: choice
        self.failures: list[int] = []
        self.raw: bytes | None = None
        self.header: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.pause, self.name = 0.0, str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def logp(self, text: list[int]) -> Any:
        """Log-probabilities at every position of the text, none at the first, (L, V)."""
        with torch.no_grad():
            logits = self.model(torch.tensor([text])).logits[0]
        found = self.change(torch.log_softmax(logits, -1))
        return torch.cat((torch.full_like(found[:1], torch.nan), found[:-1]))

    def choice(self, number: int, text: list[int], question: dict[str, Any]) -> dict[str, Any]:
        k = question.get("prompt_logprobs") or question["logprobs"]
        steps: list[Any] = []
        for i, row in enumerate(self.logp(text)):
            best = set(row.nan_to_num().topk(k).indices.tolist()) | {text[i]}
            steps.append(None if i == 0 else {t: float(row[t]) for t in sorted(best)})
        if "prompt_logprobs" in question:
            said = [s and {str(t): {"logprob": v, "decoded_token": "x"} for t, v in s.items()} for s in steps]
            return {"index": number, "text": "", "prompt_logprobs": said}
        name = (lambda t: f"token_id:{t}") if question.get("return_tokens_as_token_ids") else self.name
        own = [None if s is None else s[t] for s, t in zip(steps, text, strict=True)]
        likely = [s and {name(t): v for t, v in sorted(s.items(), key=lambda p: -p[1])[:k]} for s in steps]
        tokens = [name(t) for t in text]
        more = {
            "tokens": [*tokens, name(1)],
            "token_logprobs": [*own, -1.0],
            "top_logprobs": [*likely, {name(1): -1.0}],
        }
        return {"index": number, "text": "", "logprobs": more}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(question)
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.pause:
            time.sleep(self.server.pause)
        code = self.server.failures.pop(0) if self.server.failures else 200
        choices = [self.server.choice(i, text, question) for i, text in enumerate(question["prompt"])]
        answer = {"choices": [self.server.spoil(choice) for choice in reversed(choices)]}
        body = json.dumps(answer).encode() if self.server.raw is None else self.server.raw
        self.send_response(code)
        for name, value in self.server.header.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # one that did not wait
            self.wfile.write(b'{"error": "busy"}' if code != 200 else body)

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with serving() as made:
        yield made


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server that answers in a thread."""
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def served(server: Server, **how: Any) -> RemoteTeacher:
    return RemoteTeacher(server.url, "tiny", **{"top": TOP, "wait": 0.001, "batch": 2} | how)


def inputs(side: str = "right") -> dict[str, Any]:
    return collate(texts()[:5], pad=PAD, side=side)


def local(server: Server) -> tuple[Live, LanguageModeling]:
    task = LanguageModeling()
    task.prepare_model(server.model)
    return Live(server.model), task


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("api", ["vllm", "openai"])
def test_the_answers_are_those_of_the_model_at_hand(server: Server, api: Any, side: str) -> None:
    """The loss and its gradient too, with padding on either side and two texts in a question."""
    batch, (live, task) = inputs(side), local(server)
    teacher = served(server, api=api)
    given, taught, _ = task.inputs(batch)
    got, want = teacher(taught), TopKTeacher(live, top=TOP)(taught, None)
    assert len(server.asked) == 3 and all(question["temperature"] == 1.0 for question in server.asked)
    assert got.ids.shape == (*batch["input_ids"].shape, TOP + 1) and got.logp.dtype == torch.float32
    student = gpt2(8, 1)
    task.prepare_model(student)
    losses = []
    for answer in (got, want):
        rows = task.rows(student(given), answer, batch)[0]
        loss = total(Divergence(objective="jsd", hard=1.0)(rows), rows)
        losses.append((loss.detach(), *torch.autograd.grad(loss, list(student.parameters()))))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert verify_remote(teacher, live, taught).line.startswith("remote teacher ok: ")


def test_nothing_is_said_where_nothing_is_predicted(server: Server) -> None:
    batch = collate([TextExample((1, 2, 3), (True,) * 3), TextExample((4,), (True,))], pad=PAD)
    said = served(server)(batch)
    assert [len(question["prompt"]) for question in server.asked] == [1]
    assert torch.isfinite(said.logp).any(-1).tolist() == [[True, True, False], [False] * 3]
    assert not said.tail_logp[1].any()
    assert served(server).ask([]) == []
    with pytest.raises(ValueError, match="nothing to compare"):
        verify_remote(served(server), local(server)[0], collate([TextExample((4,), (True,))], pad=PAD))


def test_openai_s_strings_are_looked_up(server: Server) -> None:
    """Those that are not known fall into the bucket; the text's own token never does."""
    server.name = "t{}".format
    names = {f"t{i}": i for i in range(0, V, 2)}
    said, whole = (
        served(server, api="openai", tokens=names).ask([[1, 2, 3, 4]])[0],
        served(server).ask([[1, 2, 3, 4]])[0],
    )
    for i in range(3):
        got = {int(t): float(v) for t, v in zip(said.ids[i], said.logp[i], strict=True) if v > -torch.inf}
        want = {int(t): float(v) for t, v in zip(whole.ids[i], whole.logp[i], strict=True)}
        likely = dict(sorted(want.items(), key=lambda p: -p[1])[:TOP])
        assert got == {t: v for t, v in want.items() if t == i + 2 or (t % 2 == 0 and t in likely)}
        assert float(said.tail_logp[i].exp()) == pytest.approx(1.0 - sum(map(math.exp, got.values())), abs=1e-5)
    with pytest.raises(RuntimeError, match=r"as strings \('\d+'\) without their ids. Give tokens="):
        server.name = str
        server.choice, old = (lambda n, t, q: old(n, t, {"logprobs": q["logprobs"]})), server.choice
        served(server, api="openai").ask([[1, 2, 3]])


def test_a_run_and_a_recording(server: Server, tmp_path: Path) -> None:
    examples, task, student = texts()[:5], LanguageModeling(), gpt2(8, 1)
    data = Tokens(examples, batch_size=2, pad=PAD)
    teacher = served(server)
    kept = record_top_k(teacher, data, tmp_path / "kept", inputs=task.inputs, quiet=True)
    before = len(server.asked)
    batch, _, ids = data.gather(torch.arange(5))
    a, b = teacher(batch), kept(batch, ids)
    assert isinstance(b, Sparse) and b.stored is not None and int(b.stored.sum()) == 25
    assert all(torch.equal(x[b.stored], y[b.stored]) for x, y in ((a.ids, b.ids), (a.logp, b.logp)))
    verify_remote(teacher, kept, batch, ids)
    again = record_top_k(teacher, data, tmp_path / "kept", inputs=task.inputs, quiet=True)
    assert isinstance(again, CachedTopK) and len(server.asked) == before + 6, "three questions a batch of five"
    with pytest.raises(ValueError, match="its teacher is"):
        record_top_k(served(server, top=3), data, tmp_path / "kept", inputs=task.inputs, quiet=True)
    with pytest.raises(TypeError, match=r"Live returned .*TopKTeacher\(teacher, top=16\)"):
        record_top_k(local(server)[0], data, tmp_path / "other", inputs=task.inputs, quiet=True)
    losses: list[float] = []
    adam = partial(torch.optim.Adam, lr=3e-2)
    how: dict[str, Any] = {"method": Divergence(objective="kl"), "task": task, "optimizer": adam, "epochs": 6}
    how |= {"quiet": True, "skip_checks": ["above chance"]}
    distill(student, teacher, data, on_step=lambda _, loss: losses.append(float(loss)), **how)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def flattened(logp: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logp / 2.5, -1)


def cut(logp: torch.Tensor) -> torch.Tensor:
    """Without all but eight tokens, scaled up."""
    return torch.log_softmax(torch.where(logp >= logp.topk(8).values[:, -1:], logp, -1e4), -1)


def late(logp: torch.Tensor) -> torch.Tensor:
    return torch.roll(logp, 1, 0)


def early(logp: torch.Tensor) -> torch.Tensor:
    return torch.roll(logp, -1, 0)


def renamed(logp: torch.Tensor) -> torch.Tensor:
    return torch.roll(logp, 7, -1)


def noisy(logp: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logp + 0.4 * torch.sin(3.0 * torch.arange(V)), -1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (flattened, r"temperature 2\.5\."),
        (cut, r"the tail is missing: the probabilities of its .* add up to 0\.94\d\d, the local ones to 0\.7\d\d\d\."),
        (late, "shifted by one: .* the local ones of the position one earlier"),
        (early, "shifted by one: .* the local ones of the position one later"),
        (renamed, "their probabilities agree by rank: the ids mean other tokens"),
        (noisy, r"one differs by 0\.\d+ nats \(text \d, position \d+\)"),
    ],
)
def test_what_the_self_test_finds(server: Server, change: Any, why: str) -> None:
    live, task = local(server)
    with torch.no_grad():
        live.model.lm_head.weight.mul_(3.0)  # sharper: likely tokens that are told apart
    batch = task.inputs(inputs())[1]
    verify_remote(served(server), live, batch)
    server.change = change
    with pytest.raises(TeacherMismatchError, match=why):
        verify_remote(served(server), live, batch)


def test_other_weights_are_found_too(server: Server) -> None:
    live, task = local(server)
    server.model = gpt2(12, 6)
    with pytest.raises(TeacherMismatchError, match="Other weights, or another text"):
        verify_remote(served(server), live, task.inputs(inputs())[1])
    with pytest.raises(TeacherMismatchError, match="recorded with another length"):
        verify_remote(
            served(server), lambda given, ids: Sparse(*(torch.zeros(1, 2, 3),) * 2, torch.zeros(1, 2)), inputs()
        )


def test_a_busy_server_is_asked_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr("tempering.teachers.remote.http.time.sleep", naps.append)
    server.failures = [503, 429, 500]
    assert len(served(server, wait=0.5).ask([[1, 2, 3]])) == 1
    assert naps == [0.5, 1.0, 2.0] and len(server.asked) == 4
    server.failures, server.header = [429], {"Retry-After": "7"}
    served(server).ask([[1, 2, 3]])
    assert naps[3:] == [7.0]
    server.header = {}
    server.failures = [503] * 3
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:\d+/v1/completions gave no response in 3 tries.*503.*busy"):
        served(server, tries=3).ask([[1, 2, 3]])


def test_what_is_not_asked_again(server: Server) -> None:
    server.failures = [401]
    with pytest.raises(RuntimeError, match=r'completions refused the request: 401 Unauthorized: \{"error": "busy"'):
        served(server).ask([[1, 2, 3]])
    server.failures, server.header = [307], {"Location": "http://127.0.0.1:9/"}
    with pytest.raises(RuntimeError, match="refused the request: 307"):
        served(server).ask([[1, 2, 3]])
    assert len(server.asked) == 2


def test_one_that_is_not_there_or_does_not_answer(server: Server) -> None:
    server.pause = 0.5
    with pytest.raises(RuntimeError, match=r"in 2 tries of at most 0\.05 s each; the last error: TimeoutError"):
        served(server, timeout=0.05, tries=2).ask([[1, 2, 3]])
    with pytest.raises(
        RuntimeError, match=r"127\.0\.0\.1:9/v1/completions gave no response in 1 tries.*Is the server running"
    ):
        RemoteTeacher("http://127.0.0.1:9/v1", "tiny", tries=1).ask([[1, 2, 3]])


def test_the_key_is_read_from_the_environment_and_kept_nowhere(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the environment variable SOME_KEY"):
        served(server, key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "s3cret")
    teacher = served(server, key_env="SOME_KEY")
    teacher.ask([[1, 2, 3]])
    assert server.keys == ["Bearer s3cret"]
    assert "s3cret" not in repr({**vars(teacher), **vars(teacher.endpoint)})


def spoilt(**changes: Any) -> Callable[[Any], Any]:
    return lambda choice: {name: value for name, value in {**choice, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("api", "spoil", "why"),
    [
        ("vllm", spoilt(prompt_logprobs=...), "returns no prompt_logprobs. Is it vLLM"),
        ("vllm", spoilt(prompt_logprobs=[None, {}]), "log-probabilities of 2 tokens, and the text has 3"),
        (
            "vllm",
            spoilt(prompt_logprobs=[None, {"9": {"logprob": -1.0}}, {}]),
            r"has none of token 2, but of \[9\]",
        ),
        (
            "vllm",
            spoilt(prompt_logprobs=[None] + [{"2": {"logprob": -1.0}}] * 2),
            "returns 1 tokens per position, fewer than top=6",
        ),
        ("vllm", spoilt(prompt_logprobs=[None, [], []]), "has another form than api='vllm'"),
        ("openai", spoilt(logprobs=None), "has another form than api='openai' .KeyError"),
        (
            "openai",
            spoilt(logprobs={"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{}]}),
            "of 1 tokens, and the text has 3.*or ignore echo",
        ),
        (
            "openai",
            spoilt(logprobs={"tokens": ["token_id:7"] * 3, "token_logprobs": [-1.0] * 3, "top_logprobs": [{}] * 3}),
            "position 1 is token 2, and in the response it is 'token_id:7'",
        ),
    ],
)
def test_answers_that_are_refused(server: Server, api: Any, spoil: Any, why: str) -> None:
    server.spoil = spoil
    with pytest.raises(RuntimeError, match=rf"127\.0\.0\.1:\d+ \('tiny'\) .*{why}"):
        served(server, api=api).ask([[1, 2, 3]])


@pytest.mark.parametrize("lowest", [-9999.0, -1e30])
def test_what_a_server_writes_for_minus_infinity_holds_nothing(server: Server, lowest: float) -> None:
    """vLLM writes -9999.0; a reverse divergence would count it as a log-probability."""
    server.change = lambda logp: torch.where(logp >= logp.topk(3).values[:, -1:], logp, lowest)
    found = served(server).ask([[1, 2, 3, 4]])[0]
    assert torch.isfinite(found.logp[:3]).sum(-1).tolist() == [3, 3, 3] and bool((found.logp[:3, :3] > -20).all())


def test_numbers_that_are_no_log_probabilities(server: Server) -> None:
    for change in (lambda logp: logp + 9.0, lambda logp: logp * torch.nan):
        server.change = change
        with pytest.raises(RuntimeError, match=r"no log-probabilities: at position 1 .* Does it return logits"):
            served(server).ask([[1, 2, 3]])
    server.raw = b"<html>a proxy</html>"
    with pytest.raises(RuntimeError, match="is not a JSON object: <html>a proxy"):
        served(server).ask([[1, 2, 3]])
    server.raw = b'{"choices": []}'
    with pytest.raises(RuntimeError, match="returned 0 choices for 1 texts"):
        served(server).ask([[1, 2, 3]])


@pytest.mark.parametrize("api", ["vllm", "openai"])
@pytest.mark.parametrize("nothing", [-9999.0, -torch.inf])
def test_a_probability_of_0_holds_nothing(server: Server, api: Any, nothing: float) -> None:
    """vLLM writes -9999.0 for minus infinity: the token belongs to the tail, also if it is the text's own."""
    allowed = [1, 2, 7]

    def mask(logp: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(logp, -torch.inf)
        kept[:, allowed] = logp[:, allowed].log_softmax(-1)
        return kept

    text = [1, 2, 9, 7]
    server.change = lambda logp: mask(logp).clamp_min(nothing)
    found = served(server, api=api).ask([text])[0]
    want = mask(server.model(torch.tensor([text])).logits[0].detach())
    for i in range(3):
        held = {int(t): float(v) for t, v in zip(found.ids[i], found.logp[i], strict=True) if v > -torch.inf}
        assert held == pytest.approx({t: float(want[i, t]) for t in allowed}, abs=1e-5)
    z = torch.randn(3, server.model.config.vocab_size, generator=torch.Generator().manual_seed(0))  # pyright: ignore
    student, teacher, target = to_top_k_plus_tail(
        z, found.gather_positions(torch.arange(3), (4,)), torch.tensor(text[1:])
    )
    assert target is not None and target.tolist()[1] == -100
    reverse = Divergence(objective="reverse_kl")(Rows(student, teacher, target), 1.0)["soft"]
    q = z.softmax(-1)[:, allowed]
    rest = 1.0 - q.sum(-1)
    by_hand = (q * (q.log() - want[:3, allowed])).sum(-1) + rest * (rest.log() - math.log(1e-7))
    torch.testing.assert_close(reverse, by_hand.to(reverse.dtype), rtol=1e-3, atol=1e-3)


def test_arguments_that_are_refused(server: Server) -> None:
    for how, why in (
        ({"api": "grpc"}, "api 'vllm' or 'openai'"),
        ({"top": 0}, "top, batch and concurrent >= 1"),
        ({"timeout": 0.0}, "timeout > 0"),
    ):
        with pytest.raises(ValueError, match=why):
            served(server, **how)
    with pytest.raises(ValueError, match="an address like"):
        RemoteTeacher("file:///etc/passwd", "tiny")
    packed = pack([TextExample((1, 2, EOS), (True,) * 3)], 4)[0]
    with pytest.raises(ValueError, match="cannot keep packed texts apart"):
        served(server)(packed)
    assert served(server).identity != served(server, top=3).identity
    assert served(server).identity == served(server, batch=1, api="openai").identity
