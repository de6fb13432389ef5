"""A teacher's server that breaks off, never ends, or repeats the key: named, tried again, without the key."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from tempering.teachers import RemoteTeacher

OK, BAD, FAILED = "200 OK", "400 Bad Request", "500 Internal Server Error"


def head(status: str, length: int | None = None) -> bytes:
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{size}Connection: close\r\n\r\n".encode()


def drip(start: bytes, part: bytes = b" ", pause: float = 0.02) -> Iterator[bytes]:
    yield start
    for _ in range(40):
        time.sleep(pause)
        yield part


class Script:
    """A server that sends the same parts to everybody, then closes the connection."""

    def __init__(self, parts: Callable[[bytes], Iterable[bytes]]) -> None:
        self.parts, self.requests, self.sent = parts, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                self.requests += 1
                with connection, contextlib.suppress(OSError):
                    request = connection.recv(65536)
                    while not request.endswith(b"}"):  # a body that is left unread resets the connection
                        request += connection.recv(65536)
                    for part in self.parts(request):
                        connection.sendall(part)
                        self.sent += len(part)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Script]]:
    monkeypatch.setenv("no_proxy", "*")
    made: list[Script] = []

    def start(parts: Callable[[bytes], Iterable[bytes]]) -> Script:
        made.append(Script(parts))
        return made[-1]

    yield start
    for server in made:
        server.close()


def ask(server: Script, **how: Any) -> Any:
    teacher = RemoteTeacher(server.url, "tiny", **{"top": 2, "wait": 0.001, "tries": 2, "timeout": 0.25} | how)
    return teacher.ask([[1, 2, 3]])


def test_the_timeout_is_for_the_whole_response(script: Callable[..., Script]) -> None:
    within = r"in 1 tries of at most 0\.15 s each; the last error: TimeoutError: no complete response within 0\.15 s"
    cases = {
        "a body of a byte at a time": lambda _: drip(head(OK, 10_000)),
        "a body without a length": lambda _: drip(head(OK)),
        "headers": lambda _: drip(b"HTTP/1.1 200 OK\r\nX-Pad: "),
        "a status line": lambda _: drip(b"HTTP/1.1 ", b"2"),
        "a refusal's body": lambda _: drip(head(BAD, 10_000)),
        "nothing at all": lambda _: drip(b"", b""),
    }
    for case, parts in cases.items():
        server, start = script(parts), time.monotonic()
        with pytest.raises(RuntimeError, match=within):
            ask(server, tries=1, timeout=0.15)
        assert time.monotonic() - start < 3, case


def test_the_size_of_a_response_is_limited(script: Callable[..., Script]) -> None:
    block = b"x" * 65536
    server = script(lambda _: itertools.chain([head(OK)], itertools.repeat(block)))
    with pytest.raises(RuntimeError, match=r"is larger than max_bytes=200000\. .*batch=.*max_bytes="):
        ask(server, max_bytes=200_000, timeout=20.0)
    assert server.requests == 1 and server.sent < 2**26
    endless = script(lambda _: itertools.chain([head(BAD)], itertools.repeat(block)))
    with pytest.raises(RuntimeError, match="refused the request: 400 Bad Request: xxx") as caught:
        ask(endless, timeout=20.0)
    assert len(str(caught.value)) < 1000
    nested = script(lambda _: [head(OK), b"[" * 200_000])
    with pytest.raises(RuntimeError, match=r"is not a JSON object: \[\["):
        ask(nested, timeout=20.0)


def test_a_response_that_breaks_off_is_tried_again(script: Callable[..., Script]) -> None:
    cases = {
        f"{FAILED}, whose body breaks off": [head(FAILED, 100), b"{}"],
        f"{BAD}, whose body breaks off": [head(BAD, 100), b"{}"],
        "IncompleteRead": [head(OK, 100), b'{"choices": []}'],
        "RemoteDisconnected": [],
        "BadStatusLine": [b"nonsense\r\n\r\n"],
    }
    for why, parts in cases.items():
        server = script(lambda _, parts=parts: parts)
        with pytest.raises(RuntimeError, match=f"gave no response in 3 tries.*{why}"):
            ask(server, tries=3, timeout=20.0)
        assert server.requests == 3
    # the third response is complete
    answer = [None, *({str(i): {"logprob": -1.0 - (i != t)} for i in (1, 2, 3)} for t in (2, 3))]
    body = json.dumps({"choices": [{"prompt_logprobs": answer}]}).encode()
    left = [[head(FAILED, 100), b"{"], [head(OK, len(body)), body[:9]], [head(OK, len(body)), body]]
    assert len(ask(script(lambda _: left.pop(0)), tries=3, timeout=20.0)[0].ids) == 3


def test_a_key_that_the_server_repeats_is_not_shown(
    script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("plain-secret", "sk-" + "a1" * 16, 'with "quotes" and %'):
        monkeypatch.setenv("SOME_KEY", key)
        echo = json.dumps({"error": "x" * 380 + f" {key} is not valid", "headers": {"Authorization": f"Bearer {key}"}})
        for case, body in {
            "refused": [head("401 " + key), echo.encode()],
            "unavailable": [head("503 Busy"), echo.encode()],
            "no JSON": [head(OK), echo.encode() + b"!"],
            "other keys": [head(OK), echo.encode()],
            "other choices": [head(OK), json.dumps({"choices": [{"prompt_logprobs": [None, {key: {}}, {}]}]}).encode()],
            "no status": [b"Bearer " + key.encode() + b"\r\n\r\n"],
        }.items():
            with pytest.raises(RuntimeError, match=r"127\.0\.0\.1") as caught:
                ask(script(lambda _, body=body: body), key_env="SOME_KEY", timeout=20.0)
            shown = [str(error) for error in (caught.value, caught.value.__cause__) if error is not None]
            for text in shown:
                assert not any(key[: len(key) // 2 + 1] in text for key in (key, json.dumps(key)[1:-1])), (case, text)


def test_an_address_with_a_key_in_it_is_refused() -> None:
    for url in ("https://user:hunter22@host/v1", "http://host/v1?api_key=hunter22", "http://hunter22@host"):
        with pytest.raises(ValueError, match=r"belongs in an environment variable: key_env='NAME'") as caught:
            RemoteTeacher(url, "tiny")
        assert "hunter22" not in str(caught.value)


NO_ADDRESSES = [
    "http://a:1,http://b:2",
    "http://a:1 http://b:2",
    "http://",
    "http://h:port",
    "http://[::1",
    "http://h\n",
]


@pytest.mark.parametrize("url", [*NO_ADDRESSES, "localhost:8000", ["http://a", "http://b"], None])
def test_what_is_no_address_is_refused_at_once(url: Any) -> None:
    with pytest.raises(ValueError, match=r"RemoteTeacher needs an address like 'http://localhost:8000'; got "):
        RemoteTeacher(url, "tiny")


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of http.client would quote it; a line end at its end is dropped."""
    for key in ("secret\nkey", "sécret"):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(ValueError, match=r"SOME_KEY \(key_env\) has characters that no key has") as caught:
            RemoteTeacher("http://localhost", "tiny", key_env="SOME_KEY")
        assert key not in str(caught.value)
    with pytest.raises(ValueError, match=r"variable \*\*\* \(key_env\) is not set"):
        RemoteTeacher("http://localhost", "tiny", key_env="sk-" + "a1" * 16)


def test_redirects_and_proxies_are_named(script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch) -> None:
    moved = script(lambda _: [b"HTTP/1.1 308 Moved\r\nLocation: http://other/\r\nContent-Length: 0\r\n\r\n"])
    with pytest.raises(RuntimeError, match=r"refused the request: 308 Moved.*Give the address that it redirects to"):
        ask(moved, timeout=20.0)
    busy = script(lambda _: [head("529 Overloaded")])
    with pytest.raises(RuntimeError, match="gave no response in 2 tries"):
        ask(busy, timeout=20.0)
    assert (moved.requests, busy.requests) == (1, 2)
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://user:password@127.0.0.1:9")
    with pytest.raises(RuntimeError, match=r"through the proxy of http_proxy; NO_PROXY=127\.0\.0\.1") as caught:
        ask(busy, timeout=20.0)
    assert "password" not in str(caught.value)


def test_numbers_that_are_no_log_probabilities_are_refused(script: Callable[..., Script]) -> None:
    def answer(*steps: dict[str, Any]) -> bytes:
        logprobs = [None, *({i: {"logprob": x} for i, x in step.items()} for step in steps)]
        return json.dumps({"choices": [{"prompt_logprobs": logprobs}]}).encode()

    good = {"2": -1.0, "3": -2.0, "4": -9.0}
    for step, message in {
        (("4", math.nan),): "no log-probabilities: at position 1 .* add up to nan",
        (("-5", -3.0),): "-5 is no token id",
        (("9" * 30, -3.0),): "9 is no token id",
        (("2", -math.inf), ("3", -math.inf), ("4", -math.inf)): "probabilities of 0 tokens add up to 0",
    }.items():
        body = answer(good | dict(step), good)
        with pytest.raises(RuntimeError, match=message):
            ask(script(lambda _, body=body: [head(OK, len(body)), body]), timeout=20.0)


def test_inputs_of_other_tasks_are_refused() -> None:
    teacher, tokens = RemoteTeacher("http://localhost", "tiny"), torch.zeros(2, 3, dtype=torch.long)
    wrong: list[Any] = [tokens, {"input_ids": tokens.float()}, {"x": tokens}]
    for inputs in (*wrong, {"input_ids": tokens, "labels": tokens[:, :2]}):
        with pytest.raises(ValueError, match="RemoteTeacher needs the inputs of LanguageModeling"):
            teacher(inputs)
