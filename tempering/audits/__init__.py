"""Audits of what was distilled: calibration, robustness, privacy, explanation. They return findings and train nothing
of the pair (membership inference may train shadows of its own).

    for finding in Calibration()(student, teacher, test):
        print(finding.of, finding.name, finding.value, (finding.low, finding.high), finding.meaning)

An audit is one file with a subclass of ``Audit``; nothing else is edited.
"""

from typing import Any

from tempering.audits.base import Audit as Audit
from tempering.audits.base import Finding as Finding
from tempering.utils.registry import Registry

AUDITS: Registry[Audit] = Registry(__name__, __path__, Audit)


def __getattr__(name: str) -> Any:
    return AUDITS.attribute(name)


def __dir__() -> list[str]:
    return sorted((*globals(), *AUDITS))
