"""Audits of distilled students: calibration, robustness, privacy, explanation.

Audits return findings and do not train the student or the teacher (membership inference may train shadow models).

    for finding in Calibration()(student, teacher, test):
        print(finding.of, finding.name, finding.value, (finding.low, finding.high), finding.meaning)

To add an audit, write one file with a subclass of ``Audit``; no other file needs to change.
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
