"""Text for people: scores and durations in one line, and text and records without secrets and private paths."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

MARKED = r"(?:file://(?:localhost)?/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\(?=\w))"  # of an absolute path, besides a lone slash
START = rf"(?:{MARKED}|/(?=[^\s/]))"
PART = r"(?:[^\s/\\'\"=,;]+[\\/])"
# up to the last component: quoted, the whole text or all of a flag's value, or a word in a text
PATHS = (
    re.compile(rf"(?P<before>[\"']){START}[^\"'\n]*[\\/](?=[^\"'\\/\n]*[\"'])"),
    re.compile(rf"^(?P<before>--[\w.-]+=|){START}[^\n:,;=]*[\\/](?=[^\\/\n]*$)"),
    re.compile(rf"(?P<before>(?<![\w.~/\\:-]))(?:{MARKED}{PART}*|/{PART}+)"),
)


LONG = 4096  # characters
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # but tab and newline


def printable(text: object) -> str:
    """Return the text with control characters escaped, as \\x1b: in a terminal they could clear or forge lines."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], str(text))


def printable_texts(value: Any) -> Any:
    """Apply ``printable`` to every text and key in nested lists and mappings."""
    if isinstance(value, Mapping):
        return {printable(key): printable_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable_texts(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def number(value: object) -> float | None:
    """Return ``value`` as a float; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def counted(n: float, noun: str) -> str:
    """Return a number with its noun: "1 seed", "3 classes", "1,000 rows"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{n:,.0f} {noun}{plural if n != 1 else ''}"


def scores(line: Mapping[str, Any]) -> str:
    """Format the accuracies (a detector's mAP) of an evaluation, else its losses."""
    names = ("validation", "test", "validation_ema", "test_ema")  # of the student, and of the average of its weights
    splits = {s.replace("_ema", " (EMA)"): line[s] for s in names if isinstance(line.get(s), Mapping)}
    accuracies = [
        f"{split} {'mAP ' * (key == 'map')}{100 * v:.2f} %"
        for key in ("accuracy", "map")
        for split, s in splits.items()
        if (v := number(s.get(key))) is not None
    ]
    return ", ".join(
        accuracies or [f"{split} loss {v:.4g}" for split, s in splits.items() if (v := number(s.get("loss")))]
    )


def best_and_last(result: Mapping[str, Any], best_by: str | None) -> str:
    """Format the last and the best evaluation of a run, each with its epoch."""
    last, best = result.get("last") or {}, result.get("best") or {}
    by = f" by {best_by.replace('/', ' ')}" if best_by else ""
    shown = scores(last) or "no scores"
    if best and best.get("epoch") == last.get("epoch"):
        return f"{shown} (last epoch {last.get('epoch')}, also the best{by})"
    said = f"{shown} (last epoch {last.get('epoch')})"
    return f"{said}; {scores(best) or 'no scores'} (best epoch {best.get('epoch')}{by})" if best else said


def duration(seconds: float) -> str:
    """Format a duration with its two largest units: "12 s", "5 min", "1 h 05 min", "2 d 3 h"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


def without_private_paths(value: Any, host: str | None = None) -> Any:
    """Return JSON-able ``value`` without secrets, with absolute paths cut to their last component.

    Covers POSIX, home, Windows and UNC paths and file URLs, also with spaces where the text's end, a flag or quotes
    bound them.

    Args:
        host: name of a machine, which is redacted as well.
    """
    name = None if not host or len(host) < 3 or host == "localhost" else host
    pattern = None if name is None else re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])", re.IGNORECASE)

    def clean(text: str) -> str:
        text = redact(text)
        for path in PATHS:
            text = path.sub(r"\g<before>", text)
        return text if pattern is None else pattern.sub(REDACTED, text)

    return map_texts(value, clean)


# secrets

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
    return _redact_short(text) if len(text) <= LONG else _redact(text)


def _redact(text: str) -> str:
    text = _BARE.sub(REDACTED, text)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<1>{REDACTED}", text)
    return text


_redact_short = lru_cache(4096)(_redact)  # a run writes the same facts several times


def without_secrets(value: Any) -> Any:
    """Return JSON-able ``value`` with every secret in it redacted; a name before a value, or its key, counts."""
    return map_texts(value, redact)


def map_texts(value: Any, clean: Callable[[str], str]) -> Any:
    """Apply ``clean`` to every text in nested lists and mappings; one that a secret's name precedes is redacted."""
    if isinstance(value, Mapping):
        pairs = [(key, f"{key}=", item) for key, item in value.items()]
        return {key: REDACTED if _is_secret(name, item) else map_texts(item, clean) for key, name, item in pairs}
    if isinstance(value, (list, tuple)):
        flags = ["", *(f"{item} " if isinstance(item, str) and item.startswith("-") else "" for item in value)]
        pairs = zip(flags, value, strict=False)
        return [REDACTED if _is_secret(flag, item) else map_texts(item, clean) for flag, item in pairs]
    if not isinstance(value, str) or (len(value) > LONG and " " not in value):  # encoded data, such as an image
        return value
    return clean(value)


def _is_secret(name: str, value: object) -> bool:
    if not name or not isinstance(value, str) or not value or value.startswith("-"):
        return False
    return redact(f"{name}{value}") != f"{redact(name)}{redact(value)}"
