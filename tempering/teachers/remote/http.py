"""HTTP client for JSON requests: retries a busy or unreachable server, not a refused request."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
SHOWN = 400  # characters of a response in an error message
LONGEST = 60.0  # most seconds between two tries


class Endpoint:
    """A server with a JSON API.

    Args:
        url: the server's root, with or without "/v1".
        key_env: name of the environment variable with the key, which is sent as a bearer token; None for no key.
        timeout: most seconds per response.
        tries: most tries per request, if the server is busy or unreachable.
        wait: seconds before the second try, doubled before each further one; the server's Retry-After takes precedence.

    Raises:
        ValueError: for a scheme other than http and https, numbers that are not positive, or a missing key.
    """

    def __init__(self, url: str, *, key_env: str | None, timeout: float, tries: int, wait: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"RemoteTeacher needs an address like 'http://localhost:8000'; got {url!r}.")
        if timeout <= 0 or tries < 1 or wait < 0:
            raise ValueError(
                f"RemoteTeacher needs timeout > 0, tries >= 1 and wait >= 0; got {timeout}, {tries} and {wait}."
            )
        if key_env is not None and not os.environ.get(key_env):
            raise ValueError(f"the environment variable {key_env} (key_env) is not set. Type: export {key_env}=...")
        self.url, self.key_env, self.timeout, self.tries, self.wait = url, key_env, timeout, tries, wait
        self.root = url.rstrip("/").removesuffix("/v1")

    def post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the response.

        Raises:
            RuntimeError: if there is no response or the request is refused, with the address and the last error.
        """
        url, problem = f"{self.root}{path}", ""
        for number in range(1, self.tries + 1):
            retry, pause = True, min(LONGEST, self.wait * 2 ** (number - 1))
            try:
                return self._send(url, request)
            except urllib.error.HTTPError as error:  # read() closes it
                problem = f"{error.code} {error.reason}: {_excerpt(error.read())}"
                retry, pause = error.code in BUSY, _retry_after(error.headers.get("Retry-After"), pause)
            except (OSError, HTTPException) as error:  # refused, interrupted or timed out
                problem = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if not retry:
                raise RuntimeError(f"{url} refused the request: {problem}")
            if number < self.tries:
                time.sleep(pause)
        raise RuntimeError(
            f"{url} gave no response in {self.tries} tries of at most {self.timeout:g} s each; the last error: "
            f"{problem}. Is the server running, and the address correct?"
        )

    def _send(self, url: str, content: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")
        with _OPENER.open(request, timeout=self.timeout) as response:
            text = response.read()
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise RuntimeError(f"the response of {url} is not a JSON object: {_excerpt(text)}")
        return parsed


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect, so that the key is sent to the named server only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _retry_after(header: str | None, default: float) -> float:
    """Return the seconds of a Retry-After header; the default for a date."""
    try:
        return min(LONGEST, max(0.0, float(header or "")))
    except ValueError:
        return default


def _excerpt(response: bytes) -> str:
    text = response.decode("utf-8", "replace").strip()
    return text[:SHOWN] + ("..." if len(text) > SHOWN else "")
