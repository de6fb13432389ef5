"""README is run: every Python block, in a folder of its own, and what it claims to ship is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_shows_the_three_altitudes() -> None:
    assert len(BLOCKS) == 3, "the loss in one's own loop, an adapter, a whole run"


@pytest.mark.parametrize("block", BLOCKS, ids=["loop", "adapter", "run"][: len(BLOCKS)])
def test_block_runs(block: str, tmp_path) -> None:
    pytest.importorskip("sklearn", reason="the whole run is on scikit-learn's digits")
    if "transformers" in block:
        pytest.importorskip("transformers", reason="this block is for the Hugging Face Trainer")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_links_into_the_tree_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"


def test_test_command_is_the_one_ci_runs() -> None:
    assert "```bash\nmake test\n```" in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
