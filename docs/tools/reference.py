"""Write the pages of the API reference and of the decisions: a script of mkdocs-gen-files."""

from __future__ import annotations

import ast
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).parents[2]
# (title, packages or modules): a page each, in this order
PAGES = (
    ("Training", ("tempering.training.distill", "tempering.training.config", "tempering.training.experiment")),
    ("Rows and objectives", ("tempering.rows", "tempering.objectives")),
    ("Methods over logits", ("tempering.methods.base", "tempering.methods.combine", "tempering.methods.logits")),
    ("Methods over features", ("tempering.methods.features",)),
    ("Methods for detection", ("tempering.methods.detection",)),
    ("Methods that control the step", ("tempering.methods.step",)),
    ("Temperature policies", ("tempering.temperature",)),
    ("Teachers", ("tempering.teachers",)),
    ("Tasks", ("tempering.tasks",)),
    ("Data", ("tempering.data",)),
    ("Models", ("tempering.models",)),
    ("Generated text", ("tempering.rollouts",)),
    ("Integrations", ("tempering.integrations",)),
    ("Kernels", ("tempering.kernels",)),
    ("Audits", ("tempering.audits",)),
    ("Conformance", ("tempering.conformance",)),
    ("Experiments", ("tempering.experiments",)),
)


def modules(name: str) -> list[str]:
    """The public modules of a package that define something public, or the module itself."""
    path = ROOT / name.replace(".", "/")
    files = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.rglob("*.py"))
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files if public(f)]
    return [n for n in names if not n.endswith("__init__")]


def public(file: Path) -> bool:
    if file.name.startswith("_"):
        return False
    body = ast.parse(file.read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef)
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in body)


def main() -> None:
    lines = []
    for title, names in PAGES:
        found = [module for name in names for module in modules(name)]
        if not found:
            continue
        page = title.lower().replace(" ", "-") + ".md"
        lines.append(f"* [{title}]({page})")
        with mkdocs_gen_files.open(f"reference/{page}", "w") as file:
            file.write(f"# {title}\n\n" + "\n\n".join(f"::: {module}\n    options: {{show_root_toc_entry: false}}" for module in found) + "\n")
    with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as file:
        file.write("\n".join(lines) + "\n")
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    titles = [(d.name, d.read_text(encoding="utf-8").split("\n")[0].lstrip("# ")) for d in decisions]
    with mkdocs_gen_files.open("decisions/SUMMARY.md", "w") as file:
        file.write("".join(f"* [{title}]({name})\n" for name, title in titles))


main()
