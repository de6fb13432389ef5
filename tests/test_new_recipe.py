"""`tempering new-recipe`: the recipe that it writes runs as it is, and no file is overwritten or hidden."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tempering.cli import main as cli
from tempering.experiments import recipe as recipe_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; recipes put theirs on Python's path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: object) -> int:
    return cli.main([str(a) for a in args])


def test_a_new_recipe_is_checked_and_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("new-recipe", "mine") == 0
    assert "wrote mine.py" in capsys.readouterr().out
    text = (folder / "mine.py").read_text()
    assert "template" not in text.lower() and "tempering run mine.py --method dtkd" in text
    short = ("--epochs=1", "--teacher-epochs=2", "--threads=1", "--quiet")
    assert run("check", "mine.py", *short) == 0
    assert "self-check ok" in capsys.readouterr().out and not (folder / "runs" / "mine" / "dtkd-0").exists()
    assert run("run", "mine.py", *short) == 0
    assert "DTKD exact, seed 0: validation " in capsys.readouterr().out
    place = folder / "runs" / "mine" / "dtkd-0"
    facts = json.loads((place / "facts.json").read_text())
    assert facts["status"] == "done" and facts["data"]["train"] == 1000
    assert len((place / "epochs.jsonl").read_text().splitlines()) == 1
    assert (place / "student.safetensors").is_file()


def test_a_new_recipe_reads_a_folder_of_images(folder: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for name, color in (("cat", (200, 0, 0)), ("dog", (0, 0, 200))):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(60):
                images.new("RGB", (20, 18), color).save(folder / "images" / split / name / f"{i}.png")
    assert run("new-recipe", folder / "mine.py") == 0
    short = ("--epochs=1", "--teacher-epochs=1", "--threads=1", "--quiet", "--method=supervised")
    assert run("run", "mine.py", "--data=images", *short, "--out=run") == 0
    facts = json.loads((folder / "run" / "facts.json").read_text())
    assert (facts["data"]["classes"], facts["data"]["train"], facts["teacher"]) == (2, 20, None)


def test_names_that_cannot_be_a_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text("kept\n")
    for name, message in {
        "mine": "mine.py exists and is not overwritten",
        "mine.py": "mine.py exists and is not overwritten",
        "1st": "begins with a letter; got '1st'",
        "my recipe": "got 'my recipe'",
        "random": "random is a Python module, which random.py would shadow",
        "torch": "torch is a Python module",
        "digits": "digits is a recipe of tempering",
        "nowhere/mine": "there is no folder nowhere. Create it first: mkdir -p nowhere",
    }.items():
        assert run("new-recipe", name) == 1
        assert message in capsys.readouterr().err
    assert (folder / "mine.py").read_text() == "kept\n"
    assert [path.name for path in folder.iterdir()] == ["mine.py"]


def test_the_template_is_not_offered_to_be_run() -> None:
    with pytest.raises(FileNotFoundError) as error:
        recipe_file.find("template")
    assert "template.py" not in str(error.value)
