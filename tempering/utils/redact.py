"""Removal of secrets from text that is shown or written: error messages, command lines, addresses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote

__all__ = ["REDACTED", "redact"]

REDACTED = "***"  # as CI logs do: nothing that a terminal, a shell or HTML interprets
_NAMES = (
    r"(?:[\w.-]{0,40}[-_.])?(?:api[-_]?key|access[-_]?key(?:[-_]?id)?|secret(?:[-_]?(?:access[-_]?)?key)?|password|passwd"
    r"|(?:access|auth|api|refresh|id|security|session|hub|hf|github|bearer)[-_]?token|signature|credentials?|authorization)"
)
_VALUE = r"[^\s\"'&#,;)}\]<>\\]+"  # up to what ends a value in a URL, JSON, a header or a command line
_PATTERNS = tuple(  # the first group is kept
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#\"'<>]+(?=@)",  # scheme://user:password@host
        r"(\b[a-z][a-z0-9+.-]{0,20}://)[^\s/?#\"'<>@:]*:[^\s?#\"'<>@]{1,400}(?=@[\w\[])",  # a password with a slash
        r"(\bbearer\s+)(?!tokens?\b|auth)[\w.~+/=-]{6,}",
        rf"([?&;](?:{_NAMES}|key|token|auth|sig)=){_VALUE}",  # of a query string
        rf"((?<!\w){_NAMES}[\"']?\s*[=:]\s*\\?[\"']?(?:basic\s+)?)(?!bearer\b){_VALUE}",
        rf"(--(?:{_NAMES}|token)(?:[\"',]*\s+|=)[\"']?){_VALUE}",  # of a command line
        r"((?<!\w)token[\"']?\s*[=:]\s*[\"']?)[\w.~+/-]{16,}",  # shorter ones are tokens of a text
    )
)
_BARE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"sk-[A-Za-z0-9_-]{8,}|[srp]k_(?:live|test)_[A-Za-z0-9]{8,}|hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{8,}|github_pat_\w{8,}"
    r"|glpat-[\w-]{8,}|xox[abeprs]-[\w-]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{20,}|nvapi-[\w-]{8,}|gsk_[A-Za-z0-9]{8,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r")"
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Replace secrets in a text by "***"; everything else stays as it is.

    Covered: keys by their prefix (sk-, hf_, ghp_, AKIA and similar, JSON web tokens), Bearer and Basic credentials,
    the user and password of a URL (s3://key:secret@bucket), and values that are named api_key, token, password,
    secret, signature or authorization in a query string, a header, JSON or a command line.

    Args:
        text: the text to clean.
        secrets: strings known to be secret, such as the API key in use; also found percent-encoded or in JSON. Empty
            ones are ignored.
    """
    known = {x for secret in secrets if secret for x in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])}
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    text = _BARE.sub(REDACTED, text)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{REDACTED}", text)
    return text
