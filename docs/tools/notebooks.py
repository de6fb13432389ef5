"""Run the notebooks of docs/notebooks, Python files in jupytext's percent format, and write their pages and figures.

Command:  python docs/tools/notebooks.py [NAME ...]

A cell begins at a line ``# %%``; cells marked [markdown] are text in comments. A page has the text, the code, what the
code prints, and the matplotlib figures that it leaves open.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"
CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)
SVG: Any = {"svg.hashsalt": "tempering", "svg.fonttype": "none", "figure.figsize": (7.0, 3.4), "font.size": 10}


def cells(source: Path) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is text, content) of each cell."""
    _, *found = CELL.split(source.read_text(encoding="utf-8"))
    for mark, content in zip(found[::2], found[1::2], strict=True):
        is_text = "[markdown]" in mark
        text = re.sub(r"^# ?", "", content.strip(), flags=re.MULTILINE) if is_text else content.strip()
        yield is_text, text


def shown(source: Path) -> list[str]:
    """Return what a page has of its source: text, and code in fences."""
    return [text if is_text else f"```python\n{text}\n```" for is_text, text in cells(source)]


def run(source: Path) -> dict[str, str]:
    """Run a notebook in the current folder, and return its page and figures, {path in docs/notebooks: content}."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    space: dict[str, Any] = {"__name__": "__main__"}
    parts: list[str] = []
    figures: dict[str, str] = {}
    for (is_text, content), part in zip(cells(source), shown(source), strict=True):
        parts.append(part)
        if is_text:
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), matplotlib.rc_context(SVG):
            exec(compile(content, source.name, "exec"), space)
            for number in pyplot.get_fignums():
                name = f"figures/{source.stem}-{len(figures) + 1}.svg"
                title, figures[name] = drawn(pyplot.figure(number))
                parts.append(f"![{title}]({name})")
        pyplot.close("all")
        if text := out.getvalue().strip():
            position = len(parts) if parts[-1] is part else parts.index(part) + 1
            parts.insert(position, f"```text\n{text}\n```")
    link = f"[{source.name}]({source.name})"
    note = f"*This page is the output of {link}, a notebook in jupytext's format: `jupytext --to ipynb {source.name}`.*"
    return {f"{source.stem}.md": "\n\n".join([parts[0], note, *parts[1:]]) + "\n"} | figures


def drawn(figure: Any) -> tuple[str, str]:
    """Return the title of a figure, which is its alternative text, and its SVG."""
    title = figure.get_suptitle() or "; ".join(axes.get_title() for axes in figure.axes if axes.get_title())
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return title, re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.MULTILINE)


def main() -> None:
    (FOLDER / "figures").mkdir(exist_ok=True)
    warnings.filterwarnings("ignore")
    written: dict[str, str] = {}
    for source in sorted(FOLDER.glob("*.py")):
        if len(sys.argv) > 1 and source.stem not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            written |= run(source)
    for name, text in written.items():  # at the end: records say whether the checkout was changed
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
