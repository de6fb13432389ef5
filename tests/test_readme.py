"""README is run: every Python block, in a folder of its own, and what it claims to ship is there."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.forked import run_parts
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_shows_the_three_altitudes() -> None:
    assert len(BLOCKS) == 3, "the loss in one's own loop, an adapter, a whole run"


NAMES = ["loop", "adapter", "run"][: len(BLOCKS)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """How each block ended, run in a folder of its own."""
    pytest.importorskip("sklearn", reason="the whole run is on scikit-learn's digits")
    installed = importlib.util.find_spec("transformers") is not None
    parts = {n: block for n, block in zip(NAMES, BLOCKS, strict=True) if installed or "transformers" not in block}
    return run_parts(
        parts, ["torch", "lightning_fabric", "sklearn"], cwd={name: tmp_path_factory.mktemp(name) for name in parts}
    )


@pytest.mark.parametrize("name", NAMES)
def test_block_runs(name: str, done: dict[str, tuple[int, str, str]]) -> None:
    if name not in done:
        pytest.skip("this block is for the Hugging Face Trainer, which needs transformers")
    code, _, err = done[name]
    assert code == 0, err[-2000:]


def test_links_into_the_tree_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"


def test_test_command_is_the_one_ci_runs() -> None:
    assert "```bash\nmake test\n```" in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
