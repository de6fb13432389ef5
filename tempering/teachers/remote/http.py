"""HTTP client for JSON requests: retries a busy or unreachable server, not a refused request."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any, TypedDict
from urllib.parse import urlsplit

from tempering.utils.text import redact

BUSY = {408, 409, 425, 429, 500, 502, 503, 504, *range(520, 530)}  # of gateways from 520
SHOWN = 400  # characters of a response in an error message
LONGEST = 60.0  # most seconds between two tries
MAX_BYTES = 2**28  # largest response
MAX_ERROR_BYTES = 2**16  # largest part of a refusal that is read


class RequestOptions(TypedDict, total=False):
    """The options of ``Endpoint``."""

    key_env: str | None
    timeout: float
    tries: int
    wait: float
    max_bytes: int


class Endpoint:
    """A server with a JSON API.

    Args:
        url: the server's root, with or without "/v1".
        owner: the class that error messages name.
        key_env: name of the environment variable with the key, which is sent as a bearer token; None for no key.
        timeout: most seconds per try, from the connection to the last byte of the response.
        tries: most tries per request, if the server is busy or unreachable.
        wait: seconds before the second try, doubled before each further one; the server's Retry-After takes precedence.
        max_bytes: largest response.

    Raises:
        ValueError: for a scheme other than http and https, an address with credentials or a query, numbers that are not
            positive, or a key that is missing or cannot be sent.
    """

    def __init__(
        self,
        url: str,
        *,
        owner: str = "RemoteTeacher",
        key_env: str | None = None,
        timeout: float = 120.0,
        tries: int = 5,
        wait: float = 1.0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if not _is_address(url):
            raise ValueError(
                f"{owner} needs an address like 'http://localhost:8000'; got {redact(str(url))!r}. A key belongs "
                "in an environment variable: key_env='NAME'."
            )
        whole = all(isinstance(x, int) for x in (tries, max_bytes))
        if not (0 < timeout <= threading.TIMEOUT_MAX and whole and tries >= 1 and wait >= 0 and max_bytes >= 1):
            raise ValueError(
                f"{owner} needs timeout > 0, tries >= 1, wait >= 0 and max_bytes >= 1; got "
                f"{timeout}, {tries}, {wait} and {max_bytes}."
            )
        if key_env is not None and not os.environ.get(key_env):
            raise ValueError(
                f"the environment variable {redact(key_env)} (key_env) is not set. Type: export NAME=..., and give "
                "key_env='NAME'."
            )
        if key_env is not None and not (
            os.environ[key_env].strip().isascii() and os.environ[key_env].strip().isprintable()
        ):
            raise ValueError(f"the environment variable {key_env} (key_env) has characters that no key has.")
        self.url, self.key_env, self.timeout, self.tries, self.wait = url, key_env, timeout, tries, wait
        self.max_bytes = max_bytes
        self.root = url.rstrip("/").removesuffix("/completions").removesuffix("/v1")

    def post(self, path: str, request: dict[str, Any], *, empty: bool = False) -> Any:
        """Send one request and return the response, a JSON object.

        Args:
            path: of the address, from the root.
            request: the JSON object that is sent.
            empty: the response is an acknowledgment: it may have no content, which returns {}.

        Raises:
            RuntimeError: if there is no response or the request is refused, with the address and the last error.
        """
        url, problem = f"{self.root}{path}", ""
        for number in range(1, self.tries + 1):
            retry, pause = True, min(LONGEST, self.wait * 2 ** (number - 1))
            try:
                status, reason, header, content = self._send(url, request)
            except (OSError, HTTPException) as error:  # refused, interrupted or timed out
                problem = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            else:
                if status < 300:
                    return {} if empty and not content.strip() else self._parse(url, content)
                problem = f"{status} {reason}: {self.excerpt(content)}"
                retry, pause = status in BUSY, _retry_after(header, pause)
                if 300 <= status < 400:
                    problem += ". Give the address that it redirects to: no redirect is followed, to send no key there"
            if not retry:
                raise self.error(f"{url} refused the request: {problem}")
            if number < self.tries:
                time.sleep(pause)
        raise self.error(
            f"{url} gave no response in {self.tries} tries of at most {self.timeout:g} s each; the last error: "
            f"{problem}. Is the server running, and the address correct?{_proxy(url)}"
        )

    def error(self, message: str) -> RuntimeError:
        """Return an error whose message contains no secret."""
        return RuntimeError(redact(message, self._secrets()))

    def excerpt(self, response: object) -> str:
        """Return the beginning of a response, without secrets; they are removed first, so that none is cut in two."""
        text = response.decode("utf-8", "replace") if isinstance(response, bytes) else str(response)
        text = redact(text[:MAX_ERROR_BYTES].strip(), self._secrets())
        return text[:SHOWN] + ("..." if len(text) > SHOWN else "")

    def _secrets(self) -> list[str]:
        return [] if self.key_env is None else [os.environ.get(self.key_env, "").strip()]

    def _send(self, url: str, content: dict[str, Any]) -> tuple[int, str, str | None, bytes]:
        """Return the status, its reason, the header Retry-After and the content of one response.

        Raises:
            OSError, HTTPException: if the response is not complete in time.
            RuntimeError: if it is larger than ``max_bytes``.
        """
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_env].strip()}"
        request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")
        with _deadline(self.timeout) as opener:
            try:
                response = opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                with error:
                    try:
                        text = _read(error, MAX_ERROR_BYTES)
                    except (OSError, HTTPException) as broken:
                        raise HTTPException(f"{error.code} {error.reason}, whose body breaks off: {broken}") from None
                return error.code, str(error.reason), error.headers.get("Retry-After"), text
            with response:
                text = _read(response, self.max_bytes + 1)
        if len(text) > self.max_bytes:
            raise self.error(
                f"the response of {url} is larger than max_bytes={self.max_bytes}. Is it a completion server? For long "
                "texts request fewer at a time (batch=...), or allow more (max_bytes=...)."
            )
        return response.status, response.reason, None, text

    def _parse(self, url: str, content: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise self.error(f"the response of {url} is not a JSON object: {self.excerpt(content)}")
        return parsed


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect, so that the key is sent to the named server only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[urllib.request.OpenerDirector]:
    """Yield an opener whose connections are shut down after ``seconds``; the timeout of a socket is for each read.

    Raises:
        TimeoutError: if the time is over, in place of the error or the incomplete content that this caused.
    """
    sockets: list[socket.socket] = []
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        for connected in sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not that of TLS, which is not safe across threads

    def tracked(kind: type[HTTPConnection]) -> Any:
        class Tracked(kind):
            def connect(self) -> None:
                super().connect()
                sockets.append(self.sock)
                if expired.is_set():
                    expire()

        return Tracked

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: Any) -> Any:
            return self.do_open(tracked(HTTPConnection), req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: Any) -> Any:
            return self.do_open(tracked(HTTPSConnection), req)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield urllib.request.build_opener(_NoRedirect, Http, Https)
    except (OSError, HTTPException, ValueError) as error:
        if not expired.is_set():
            raise
        raise TimeoutError(f"no complete response within {seconds:g} s ({error})") from error
    finally:
        timer.cancel()
    if expired.is_set():
        raise TimeoutError(f"no complete response within {seconds:g} s")


def _read(response: Any, most: int) -> bytes:
    """Read a body to its end, or the first ``most`` bytes of a longer one.

    Raises:
        IncompleteRead: if it ends before its Content-Length.
    """
    parts, size = [], 0
    while size < most and (part := response.read(min(2**20, most - size))):
        parts.append(part)
        size += len(part)
    if size < most and response.length:
        raise IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _is_address(url: Any) -> bool:
    """Whether this is the address of a server, without a key, a query or characters that an address cannot have."""
    try:
        parts = urlsplit(url) if isinstance(url, str) and url.isprintable() and " " not in url else None
        return (
            parts is not None
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
            and not ("@" in parts.netloc or parts.query or parts.fragment or "," in parts.netloc)
        )
    except ValueError:  # of a port or an IPv6 address
        return False


def _proxy(url: str) -> str:
    """Name the environment variable of the proxy through which requests go, if they do, for an error message."""
    parts = urlsplit(url)
    if parts.scheme not in urllib.request.getproxies() or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return f" The request goes through the proxy of {parts.scheme}_proxy; NO_PROXY={parts.hostname} turns it off."


def _retry_after(header: str | None, default: float) -> float:
    """Return the seconds of a Retry-After header; the default for a date."""
    try:
        return min(LONGEST, max(0.0, float(header or "")))
    except ValueError:
        return default
