"""The report of a check: a table in the terminal, a JSON record, counterexamples and an HTML page."""

from __future__ import annotations

import enum
import html
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tempering._version import __version__
from tempering.utils.files import write_atomic


class Status(enum.StrEnum):
    """How an invariant came out for a loss; ``explained``: by the failure of another invariant."""

    PASS = "pass"
    FAIL = "fail"
    NOT_PROMISED = "not promised"
    NOT_APPLICABLE = "not applicable"
    EXPLAINED = "explained"
    ERROR = "error"


@dataclass
class Result:
    """The result of one invariant.

    Attributes:
        status: PASS; FAIL; NOT_PROMISED, does not hold and is not promised; NOT_APPLICABLE, the loss has no such input
            or refuses it; EXPLAINED, not checked because an invariant before it fails; ERROR, the loss raises.
        message: what is broken, or why it is not applicable.
        tensors: the smallest inputs that break it.
    """

    name: str
    sentence: str
    status: Status
    message: str = ""
    expected: Any = None
    found: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def inputs_text(self) -> str:
        """The inputs as Python."""
        values = {name: re.sub("nan|inf", "torch.\\g<0>", str(x.tolist())) for name, x in self.tensors.items()}
        return "\n".join(f"{n} = torch.tensor({text}, dtype={self.tensors[n].dtype})" for n, text in values.items())


@dataclass
class Report:
    """The results of a loss.

    Attributes:
        name, kind: of the loss.
        results: one per invariant.
        facts: what the loss computes, as measured: definition, power of T, factor, memory, time.
        seconds: duration of the check.
    """

    name: str
    kind: str
    results: list[Result]
    facts: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing that is promised fails."""
        return not self.failures

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if r.status in (Status.FAIL, Status.ERROR)]

    def __getitem__(self, name: str) -> Result:
        return next(r for r in self.results if r.name == name)

    def summary(self) -> str:
        """One line: the counts."""
        counts = {status: sum(r.status is status for r in self.results) for status in Status}
        return f"{self.name}: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)

    def table(self) -> str:
        """The table of the terminal."""
        width = max((len(r.name) for r in self.results), default=0)
        lines = [self.summary(), ""]
        for r in self.results:
            values = "" if r.found is None else f" (expected {_short(r.expected)}, found {_short(r.found)})"
            lines.append(f"{r.status:<14} {r.name:<{width}}  {r.message}{values}".rstrip())
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items() if value is not None)
        return "\n".join([*lines, "", f"measured: {facts}" if facts else "", f"{self.seconds:.1f} s"])

    def record(self) -> dict[str, Any]:
        """The JSON record; its counterexamples are in files beside it."""
        return {
            "format": 1,
            "name": self.name,
            "kind": self.kind,
            "tempering": __version__,
            "facts": self.facts,
            "seconds": round(self.seconds, 2),
            "results": [
                {
                    "name": r.name,
                    "status": str(r.status),
                    "message": r.message,
                    "expected": _json(r.expected),
                    "found": _json(r.found),
                }
                | ({"counterexample": _file_name(r.name)} if r.tensors else {})
                for r in self.results
            ],
        }

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.html and a safetensors file per counterexample; return the page's path."""
        from safetensors.torch import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for r in self.results:
            if r.tensors:
                write_atomic(folder / _file_name(r.name), save({n: x.contiguous() for n, x in r.tensors.items()}))
        write_atomic(folder / "report.json", json.dumps(self.record(), indent=1).encode())
        write_atomic(folder / "report.html", self.page().encode())
        return folder / "report.html"

    def page(self) -> str:
        """One HTML page."""
        rows = "".join(
            f'<tr class="{r.status.replace(" ", "-")}"><td>{r.status}</td>'
            f"<td><b>{_html(r.name)}</b><br>{_html(r.sentence)}</td><td>{_html(r.message)}{_values(r)}</td></tr>"
            for r in self.results
        )
        facts = "".join(f"<li>{_html(str(n))}: {_html(str(v))}</li>" for n, v in self.facts.items() if v is not None)
        return PAGE.format(name=_html(self.name), summary=_html(self.summary()), rows=rows, facts=facts, kind=self.kind)


def _values(r: Result) -> str:
    text = "" if r.found is None else f"<br>expected {_html(_short(r.expected))}, found {_html(_short(r.found))}"
    return text + (
        f"<details><summary>inputs</summary><pre>{_html(r.inputs_text())}</pre></details>" if r.tensors else ""
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "[" + ", ".join(_short(v) for v in value[:6]) + "]" if isinstance(value, list) else str(value)


def _json(value: Any) -> Any:
    """The value in JSON, which has no NaN and infinity: they are written as text."""
    if isinstance(value, list):
        return [_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _html(text: str) -> str:
    return html.escape(text)


def _file_name(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower() + ".safetensors"


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Conformance of {name}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td {{ border-top: 1px solid #8884; padding: .4rem; vertical-align: top }}
td:first-child {{ white-space: nowrap; font-weight: 600 }}
.pass td:first-child {{ color: #2a8a3a }} .fail td:first-child, .error td:first-child {{ color: #d03030 }}
.not-promised td:first-child {{ color: #b07a00 }} .not-applicable, .explained {{ opacity: .65 }}
pre {{ overflow-x: auto; background: #8881; padding: .5rem }}
</style></head><body><h1>Conformance of {name}</h1><p>{summary}. Kind: {kind}.</p><ul>{facts}</ul>
<table>{rows}</table></body></html>
"""
