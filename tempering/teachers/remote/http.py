"""Questions to a server over HTTP: JSON there and back, asked again when it is busy, never past what it refused."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
SHOWN = 400  # characters of an answer that an error shows
LONGEST = 60.0  # seconds that are waited between two tries


class Endpoint:
    """One address that answers JSON to JSON.

    Args:
        url: the server's root, with or without "/v1".
        key_env: name of the environment variable that holds the key, sent as a bearer token; None for no key.
        timeout: seconds that one answer may take.
        tries: how often a question is put at most, where the server is busy or cannot be reached.
        wait: seconds before the second try, doubled before every other; the server's Retry-After counts instead.

    Raises:
        ValueError: for another scheme than http and https, numbers that are not positive, or a key that is not there.
    """

    def __init__(self, url: str, *, key_env: str | None, timeout: float, tries: int, wait: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a served teacher needs an address like 'http://localhost:8000'; got {url!r}.")
        if timeout <= 0 or tries < 1 or wait < 0:
            raise ValueError(
                f"a served teacher needs timeout > 0, tries >= 1 and wait >= 0; got {timeout}, {tries} and {wait}."
            )
        if key_env is not None and not os.environ.get(key_env):
            raise ValueError(f"the environment variable {key_env} (key_env) holds no key. Type: export {key_env}=...")
        self.url, self.key_env, self.timeout, self.tries, self.wait = url, key_env, timeout, tries, wait
        self.root = url.rstrip("/").removesuffix("/v1")

    def post(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one question.

        Raises:
            RuntimeError: where it stays unanswered or is refused, naming the address and what was said.
        """
        url, said = f"{self.root}{path}", ""
        for number in range(1, self.tries + 1):
            again, pause = True, min(LONGEST, self.wait * 2 ** (number - 1))
            try:
                return self._once(url, question)
            except urllib.error.HTTPError as error:  # closed by the reading
                said = f"{error.code} {error.reason}: {_shown(error.read())}"
                again, pause = error.code in BUSY, _asked_for(error.headers.get("Retry-After"), pause)
            except (OSError, HTTPException) as error:  # refused, cut off, or past the timeout
                said = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if not again:
                raise RuntimeError(f"{url} refuses the question: {said}")
            if number < self.tries:
                time.sleep(pause)
        raise RuntimeError(
            f"{url} gave no answer in {self.tries} tries of at most {self.timeout:g} s each; the last one: {said}. Is "
            "the server up, and the address right?"
        )

    def _once(self, url: str, question: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        request = urllib.request.Request(url, json.dumps(question).encode(), headers, method="POST")
        with _OPENER.open(request, timeout=self.timeout) as answer:
            text = answer.read()
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise RuntimeError(f"{url} answers something that is no JSON object: {_shown(text)}")
        return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """No redirection is followed: the key is for the server that was named."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _asked_for(header: str | None, otherwise: float) -> float:
    """The seconds of a Retry-After; a date in it is left aside."""
    try:
        return min(LONGEST, max(0.0, float(header or "")))
    except ValueError:
        return otherwise


def _shown(text: bytes) -> str:
    said = text.decode("utf-8", "replace").strip()
    return said[:SHOWN] + ("..." if len(said) > SHOWN else "")
