"""The pages of the API reference, as {path below docs/: Markdown}; ``mkdocstrings`` fills in the docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# (title, packages or modules): one page each, in this order
PAGES = (
    (
        "Training",
        (
            "tempering.training.distill",
            "tempering.training.detector",
            "tempering.training.config",
            "tempering.training.experiment",
        ),
    ),
    ("Rows and objectives", ("tempering.rows", "tempering.objectives")),
    (
        "Methods over logits",
        (
            "tempering.methods.base",
            "tempering.methods.combine",
            "tempering.methods.importance",
            "tempering.methods.logits",
        ),
    ),
    ("Methods over features", ("tempering.methods.features", "tempering.utils.hooks")),
    ("Methods for detection", ("tempering.methods.detection",)),
    ("Methods that control the step", ("tempering.methods.step", "tempering.methods.auxiliary")),
    ("Temperature policies", ("tempering.temperature",)),
    ("Teachers", ("tempering.teachers",)),
    ("Tasks", ("tempering.tasks",)),
    ("Data", ("tempering.data",)),
    ("Models", ("tempering.models",)),
    ("Generated text", ("tempering.rollouts",)),
    ("Integrations", ("tempering.integrations",)),
    ("Kernels", ("tempering.kernels",)),
    ("Audits", ("tempering.audits",)),
    ("Export", ("tempering.export",)),
    ("Conformance", ("tempering.conformance",)),
    ("Testing", ("tempering.testing",)),
    ("Experiments", ("tempering.experiments",)),
    ("Registries and search spaces", ("tempering.utils.registry", "tempering.utils.search_space")),
    (
        "Reports",
        (
            "tempering.reports.records",
            "tempering.reports.compare",
            "tempering.reports.leaderboard",
            "tempering.reports.table",
        ),
    ),
)
DIRECTIVE = """::: {module}
    options:
      heading: "{module}"
      toc_label: "{short}"
      members: [{members}]
"""


def pages() -> dict[str, str]:
    """Return the pages, and the navigation of their section."""
    written = {f"reference/{slug(title)}.md": page(title, names) for title, names in PAGES}
    links = "".join(f"* [{title}]({slug(title)}.md)\n" for title, _ in PAGES)
    return {"reference/SUMMARY.md": links} | written


def slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def page(title: str, names: tuple[str, ...]) -> str:
    found = [module for name in names for module in modules(name)]
    parts = [
        DIRECTIVE.format(module=m, short=m.rpartition(".")[2], members=", ".join(definitions(source(m)))) for m in found
    ]
    return "\n".join([f"# {title}\n", *parts])


def modules(name: str) -> Iterator[str]:
    """Yield the modules of a package that define something public, or the module itself."""
    files = [source(name)] if source(name).is_file() else sorted((ROOT / name.replace(".", "/")).rglob("*.py"))
    for file in files:
        if not file.name.startswith("_") and definitions(file):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts)


def source(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def definitions(file: Path) -> list[str]:
    """Return the names of the public classes and functions that a file defines."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef)
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]
