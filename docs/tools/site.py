"""Add what is not in docs/ to the site: API reference, decisions, recorded tables. A script of mkdocs-gen-files.

Files outside docs/ that pages link to have the same path on the site, so their links to one another hold. A link out of
docs/, or back into it, loses one step up.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*/*.md", "benchmarks/results/*/*.svg")
LINK = re.compile(r"\]\(((?:\.\./)+)([^)\s]+)\)")


def outside() -> dict[str, Path]:
    """Return the files outside docs/ that the site has, by their path from the root."""
    return {file.relative_to(ROOT).as_posix(): file for pattern in OUTSIDE for file in sorted(ROOT.glob(pattern))}


def on_site(text: str, path: str) -> str:
    """Return a page with its links as the site needs them; ``path`` is the page's on the site."""
    depth, inside = path.count("/"), (ROOT / "docs" / path).is_file()

    def link(match: re.Match[str]) -> str:
        up, target = match[1], match[2]
        if inside and up.count("../") == depth + 1:
            return f"]({up[3:]}{target})"
        return f"]({up}{target.removeprefix('docs/')})" if not inside and up.count("../") == depth else match[0]

    return LINK.sub(link, text)


def written() -> dict[str, str]:
    """Return all pages that this script writes, {path on the site: Markdown}."""
    from docs.tools.reference import pages

    docs = {file.relative_to(ROOT / "docs").as_posix(): file for file in sorted((ROOT / "docs").rglob("*.md"))}
    found = {
        path: file.read_text(encoding="utf-8") for path, file in (docs | outside()).items() if path.endswith(".md")
    }
    decisions = [path for path in docs if path.startswith("decisions/")]
    reports = [path for path in docs if path.startswith("upstream/")]
    records = [path for path in outside() if path.endswith("/README.md")]
    contents = {
        "decisions/SUMMARY.md": contents_of(found, decisions, "decisions/"),
        "upstream/SUMMARY.md": contents_of(found, reports, "upstream/"),
        "benchmarks/results/SUMMARY.md": contents_of(found, records, "benchmarks/results/"),
    }
    return pages() | contents | {path: on_site(text, path) for path, text in found.items()}


def contents_of(texts: dict[str, str], paths: list[str], folder: str) -> str:
    """Return a list of pages, by their titles."""
    lines = [(texts[p].split("\n")[0].lstrip("# ").replace("[", "(").replace("]", ")"), p) for p in paths]
    return "".join(f"* [{title}]({path.removeprefix(folder)})\n" for title, path in lines)


def main() -> None:
    import mkdocs_gen_files

    for path, text in written().items():
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)
    for path, source in outside().items():
        if not path.endswith(".md"):
            with mkdocs_gen_files.open(path, "wb") as file:
                file.write(source.read_bytes())


if __name__ != "docs.tools.site":  # mkdocs-gen-files runs it under another name
    sys.path.insert(0, str(ROOT))
    main()
