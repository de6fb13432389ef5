"""Where the shared material of the project lies, and the marker for tests that need it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TEMPERING_SHARED", ROOT.parent / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "golden").is_dir(), reason="needs ../shared (golden numbers and data), which is not here"
)
