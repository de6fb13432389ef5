"""Text for people: scores and durations in one line, and records without private paths."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tempering.utils.files import map_texts
from tempering.utils.redact import REDACTED, redact

MARKED = r"(?:file://(?:localhost)?/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\(?=\w))"  # of an absolute path, besides a lone slash
START = rf"(?:{MARKED}|/(?=[^\s/]))"
PART = r"(?:[^\s/\\'\"=,;]+[\\/])"
# up to the last component: quoted, the whole text or all of a flag's value, or a word in a text
PATHS = (
    re.compile(rf"(?P<before>[\"']){START}[^\"'\n]*[\\/](?=[^\"'\\/\n]*[\"'])"),
    re.compile(rf"^(?P<before>--[\w.-]+=|){START}[^\n:,;=]*[\\/](?=[^\\/\n]*$)"),
    re.compile(rf"(?P<before>(?<![\w.~/\\:-]))(?:{MARKED}{PART}*|/{PART}+)"),
)


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


def scores(line: Mapping[str, Any]) -> str:
    """Format the accuracies (a detector's mAP) of an evaluation, else its losses."""
    splits = {split: line[split] for split in ("validation", "test") if isinstance(line.get(split), Mapping)}
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
