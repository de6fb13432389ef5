"""README is short, and what it claims is so; tests/test_pages.py runs its blocks."""

from __future__ import annotations

import re
import tomllib

import tempering
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_shows_the_three_altitudes() -> None:
    assert len(BLOCKS) == 3, "the loss in one's own loop, an adapter, a whole run"


def test_extras_are_those_of_pyproject() -> None:
    listed = re.findall(r"`([\w-]+)`", README.split("\nExtras: ")[1].split("Development:")[0])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert listed == [name for name in extras if name != "dev"]
    page = (ROOT / "docs" / "start" / "install.md").read_text()
    assert re.findall(r"^\| `([\w-]+)`", page, flags=re.MULTILINE) == listed


def test_every_place_names_the_same_version() -> None:
    version = tempering.__version__
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE) == [version]
    assert re.findall(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0] == version


def test_readme_is_one_screen() -> None:
    assert len(README.splitlines()) < 150


def test_test_command_is_the_one_ci_runs() -> None:
    assert "```bash\nmake test\n```" in README
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")
