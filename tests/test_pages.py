"""Pages: their Python blocks run, their links lead somewhere, the site has them, and the reference has every name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tyro

from docs.tools import notebooks, reference, site
from tempering.cli import main as cli
from tempering.experiments.recipe import TEMPLATE, check_flags, find
from tests.forked import run_parts
from tests.paths import ROOT

DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- no test: [^>]+-->\n+)?```python\n(.*?)```", re.DOTALL)
ELSEWHERE = {"conformance.md": "test_conformance"}  # at fewer examples
SLOW = ("lightning_fabric", "sklearn.datasets", "matplotlib.pyplot", "torchmetrics.functional.classification")
SLOW += ("transformers.models.llama.modeling_llama", "transformers.trainer", "tempering.training.trainer")
OPTIONAL = ("transformers", "sklearn", "matplotlib", "pycocotools", "hypothesis", "scipy", "timm", "kornia")


def blocks(text: str) -> list[str]:
    """The Python blocks of a page that are tested."""
    return [code for skipped, code in BLOCK.findall(text) if not skipped]


def parts() -> Iterator[tuple[str, str]]:
    """(name, code) of each page with blocks, each block of README, and each notebook."""
    for file in sorted(DOCS.rglob("*.md")):
        name = file.relative_to(DOCS).as_posix()
        code = "\n".join(blocks(file.read_text(encoding="utf-8")))
        if code and name not in ELSEWHERE and not name.startswith(("notebooks/", "upstream/")):
            yield name, code
    for i, code in enumerate(blocks((ROOT / "README.md").read_text(encoding="utf-8"))):
        yield f"README, block {i + 1}", code
    for file in sorted((DOCS / "notebooks").glob("*.py")):
        yield f"notebooks/{file.name}", re.sub(r"^EPOCHS = \d+", "EPOCHS = 1", file.read_text("utf-8"), flags=re.M)


def test_python_blocks_and_notebooks_run(tmp_path: Path) -> None:
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    code = {name: text for name, text in parts() if not any(package in text for package in missing)}
    if "sklearn" in missing:
        code = {name: text for name, text in code.items() if "digits" not in text}
    folders = {name: tmp_path / str(i) for i, name in enumerate(code)}
    for folder in folders.values():
        folder.mkdir()
    done = run_parts(code, SLOW, cwd=folders, MPLBACKEND="agg", PYTHONPATH=str(ROOT))
    failed = [f"{name}\n{err[-1500:]}" for name, (status, _, err) in done.items() if status]
    assert not failed, "\n\n".join(failed)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each `tempering` command in the shell blocks of README and the site."""
    for file in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL):
            for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                if words[:1] == ["tempering"]:
                    yield file.name, words[1:]


def test_shell_blocks_have_commands_and_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    failed, count = [], 0
    for page, words in commands():
        args, recipe_args = cli.split_argv(words)
        command = cli.COMPARE_COMMANDS.get(args[1] if args[0] == "compare" else "") or cli.load_command(args[0])
        hinted = {"recipe_args": recipe_args} if "recipe_args" in inspect.signature(command).parameters else {}
        given: dict[str, object] = {}

        @functools.wraps(command)
        def parsed(command=command, given=given, **values: object) -> None:
            given.update(values)

        try:
            tyro.cli(
                functools.partial(parsed, **hinted),
                args=cli.split_equals(args[1 + (args[1:2] in (["status"], ["report"])) :]),
            )
            if given.get("recipe") is not None:
                name = str(given["recipe"])
                check_flags(TEMPLATE if Path(name).stem == "mine" else find(name), recipe_args)
        except (SystemExit, ValueError, FileNotFoundError) as error:
            failed.append(f"{page}: tempering {' '.join(words)}\n{error} {capsys.readouterr()}")
        count += 1
    assert count > 30 and not failed, "\n".join(failed)


def test_pages_tested_elsewhere_have_tests() -> None:
    for name, module in ELSEWHERE.items():
        assert f'"{name}"' in (ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")


def test_notebook_pages_have_the_code_of_their_sources() -> None:
    for source in sorted((DOCS / "notebooks").glob("*.py")):
        page = source.with_suffix(".md").read_text(encoding="utf-8")
        missing = [text for text in notebooks.shown(source) if text not in page]
        assert not missing, f"{source.name}: make pages; its page lacks {missing[0]!r}"


def test_navigation_names_pages_that_exist() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    names = re.findall(r"([\w./-]+\.md|[\w./-]+/)$", nav, flags=re.MULTILINE)
    pages = site.written()
    assert len(names) > 30
    assert not [n for n in names if (n if n.endswith(".md") else f"{n}SUMMARY.md") not in pages]
    sections = tuple(n for n in names if n.endswith("/"))
    absent = [p for p in pages if p not in names and not p.startswith(sections)]
    assert not absent, f"mkdocs.yml leaves out {absent}"


def test_links_lead_to_files_that_the_site_has() -> None:
    broken: list[str] = []
    for file in (*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
            to = (file.parent / target).resolve() if target else file
            inside = to.is_relative_to(DOCS) or file == ROOT / "README.md"
            exists = to.exists() if inside else to.relative_to(ROOT).as_posix() in site.outside()
            if not exists or (anchor and anchor not in anchors(to)):
                broken.append(f"{file.relative_to(ROOT)}: {target}#{anchor}")
    assert not broken, broken


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h)).strip().lower() for h in headings)
    return {re.sub(r"\s+", "-", h) for h in plain}


def test_glossary_is_that_of_contributing() -> None:
    own = (DOCS / "explanation" / "glossary.md").read_text(encoding="utf-8")
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Glossary\n")[1].split("\n## ")[0].strip()
    assert table in own


def exported(package: ModuleType) -> Iterator[tuple[str, object]]:
    """(name, object) of the public names of a package that are documented by themselves: classes and functions."""
    for name in sorted({*getattr(package, "__all__", ()), *dir(package)}):
        value = getattr(package, name)
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("tempering."):
            yield name, value


def test_reference_has_every_public_name() -> None:
    import tempering

    listed = set(re.findall(r"^::: (\S+)$", "\n".join(reference.pages().values()), flags=re.MULTILINE))
    subpackages = (*tempering._SUBPACKAGES, "conformance", "testing")
    packages = [tempering, *(importlib.import_module(f"tempering.{name}") for name in subpackages)]
    names = [(f"{p.__name__}.{name}", value) for p in packages for name, value in exported(p)]
    absent = [
        name for name, value in names if isinstance(value, type) or callable(value) if value.__module__ not in listed
    ]
    undocumented = [name for name, value in names if callable(value) and not value.__doc__]
    assert len(names) > 120 and not absent and not undocumented, (absent, undocumented)


def test_the_reference_has_one_entry_per_name() -> None:
    pytest.importorskip("griffe")
    from docs.tools.split_names import split_names

    head, end = "Crop, flip: both.\n\nAttributes:\n    ", '    flip: whether.\n\nReturns:\n    "a", b: both.'
    lines = "offsets,\n        in pixels.\n"
    assert split_names(f"{head}y, x: {lines}{end}") == f"{head}y: {lines}    x: {lines}{end}"
