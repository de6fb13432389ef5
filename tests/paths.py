"""Where the shared material of the project lies, the marker for tests that need it, and settings of subprocesses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TEMPERING_SHARED", ROOT.parent / "shared"))
needs_shared = pytest.mark.skipif(
    not (SHARED / "golden").is_dir(), reason="needs ../shared (golden numbers and data), which is not here"
)
# for subprocesses that call torch.compile: no pool of compile workers, and no programs built to probe the CPU
FAST_INDUCTOR = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
