"""Audits of what was distilled: calibration, robustness, privacy, explanation. They return findings and train nothing
of the pair (membership inference may train shadows of its own).

    for finding in Calibration()(student, teacher, test):
        print(finding.of, finding.name, finding.value, (finding.low, finding.high), finding.meaning)

An audit is one file with a subclass of ``Audit``; nothing else is edited.
"""

from tempering.audits.base import Audit, Finding
from tempering.utils.registry import discover

AUDITS: dict[str, type[Audit]] = discover(__name__, __path__, Audit)
globals().update(AUDITS)

__all__ = ["AUDITS", "Audit", "Finding", *AUDITS]  # pyright: ignore[reportUnsupportedDunderAll]
