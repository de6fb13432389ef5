"""Write docs/papers.md: equation, published values, differences from the released code, and results of every method.

Usage: ``python docs/tools/papers_page.py .``. Reads docstrings, ``tempering.experiments.published`` and the records
under benchmarks/results.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.experiments import published
from tempering.experiments.tune.space import format_call, iter_arguments
from tempering.methods import METHODS
from tempering.methods.base import Method
from tempering.reports.compare import Comparison, compare
from tempering.reports.intervals import mean
from tempering.reports.records import load_run
from tempering.temperature import POLICIES
from tempering.temperature.static import Static

if TYPE_CHECKING:
    from tempering.temperature.base import Policy

HEAD = """# Methods and temperature policies, paper by paper

Made by `make pages` from docstrings, `tempering.experiments.published` and the records in `benchmarks/results`; do not
edit.

Notation: u are the teacher's logits, v the student's, N rows of C classes. T_t and T_s are their temperatures, p and
q the softmaxes of u / T_t and v / T_s, and KL is KL(p || q). A softened divergence is multiplied by T_s T_t. Methods
and policies are written as they are typed after `--method` or `--temperature`; `published` is
`tempering.experiments.published`. "Checked against" is the file with numbers from the authors' code, which the tests
reproduce within 1e-9 in float64. Results come from records in this repository; their training budget is that of the
named folder, not the paper's.
"""
# the file of the authors' numbers that a method or policy is tested against
GOLDEN = {
    **dict.fromkeys(("AT", "FitNet", "NST", "PKT", "RKD", "SP", "VID"), "features.npz"),
    **dict.fromkeys(("DIST", "ERKD", "LSKD", "NKD", "RLD", "TTM", "WTTM"), "logit_methods.npz"),
    "CKD": "ckd.npz",
    "CSKD": "cskd.npz",
    "Cosine": "cskd.npz",
    "Curriculum": "ctkd.npz",
    "DKD": "dkd.npz",
    "Divergence": "llm_jsd.npz and llm_kl.npz and llm_skd.npz",
    "DTKD": "dtkd_published.npz and dtkd_exact.npz",
    "Instance": "itkd.npz",
    "KD": "kd.npz",
    "KDIGA": "kdiga.npz",
    "MLKD": "mlkd.npz",
    "R2KD": "r2kd.npz",
    "Sharpness": "dtkd_published.npz and dtkd_exact.npz",
    "Standardized": "logit_methods.npz",
    "ULD": "llm_skd.npz",
}
DIFFERS = re.compile(r"\b(released|published|the source|the copy|differs?|paper|erratum|not known)\b", re.I)
ROUND = re.compile(r"\d+\.\d+(?:e-?\d+)?")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def page(results: Path) -> str:
    """The page; ``results`` is the folder of the records."""
    comparisons = list(_comparisons(results))
    parts = [HEAD]
    for title, kinds in (("Methods", METHODS), ("Temperature policies", POLICIES)):
        parts += [f"## {title}\n", _index(kinds), *(_part(name, kind, comparisons) for name, kind in kinds.items())]
    return "\n".join(parts)


def _index(kinds: dict[str, Any]) -> str:
    rows = [f"| [{name}](#{name.lower()}) | {_cited(kind.paper)} | {_golden(name)} |" for name, kind in kinds.items()]
    return "\n".join(["| name | paper | checked against |", "|---|---|---|", *rows, ""])


def _part(name: str, kind: type[Method] | type[Policy], comparisons: list[tuple[str, Comparison]]) -> str:
    """One method or policy."""
    equation, differs, reference = parse_docstring(kind)
    lines = [f"### {name}\n", f"```text\n{textwrap.fill(equation, 110)}\n```\n"]
    lines += [f"**Paper.** {_cited(reference or kind.paper)}\n", f"**Values.**{_presets(kind)}\n"]
    if differs:
        lines += ["**Differences from the released code.**\n", *(f"- {text}" for text in differs), ""]
    lines += [f"**Checked against.** {_golden(name)}.\n", f"**Measured.**{_measured(name, comparisons)}\n"]
    return "\n".join(lines)


def parse_docstring(kind: type[Any]) -> tuple[str, list[str], str]:
    """Parse a docstring into its equation, its differences from the released code, and its reference."""
    text = inspect.cleandoc(kind.__doc__ or "")
    blocks = [block for block in re.split(r"\n\s*\n", text) if block.strip()] or [""]  # python -OO removes docstrings
    equation, differs, reference = " ".join(blocks[0].split()).replace("``", ""), [], ""
    for block in blocks[1:]:
        if block.startswith(("Reference:", "References:")):
            reference = _line(block.partition(":")[2])
        elif block.startswith("Args:"):
            items = [(name, text) for name, text in _arguments(block) if name != "warmup"]
            differs += [f"`{name}`: {text}" for name, text in items if DIFFERS.search(text)]
        elif DIFFERS.search(block):
            differs += [_line(part) for part in re.split(r"\n(?=- )", block)]
    return equation, [d.removeprefix("- ") for d in differs], reference


def _arguments(block: str) -> Iterator[tuple[str, str]]:
    """(name, description) of the items of an Args block; continuation lines are indented twice."""
    for item in re.split(r"\n {4}(?=\S)", block)[1:]:
        name, _, description = item.partition(":")
        yield name, _line(description)


def _line(text: str) -> str:
    """A paragraph in one line, with single backquotes and escaped stars and underscores."""
    text = " ".join(text.split()).replace("``", "`")
    return "".join(part if i % 2 else part.replace("*", r"\*").replace("_", r"\_") for i, part in _quoted(text))


def _quoted(text: str) -> Iterator[tuple[int, str]]:
    """Parts outside (even index) and inside (odd index) backquotes."""
    for i, part in enumerate(text.split("`")):
        yield i, f"`{part}`" if i % 2 else part


def _cited(text: str) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _golden(name: str) -> str:
    return GOLDEN.get(name) or "no released numbers; computed by hand in the tests"


# presets


def presets() -> dict[str, Callable[..., Method]]:
    """The functions of ``published`` that return a method, by name."""
    functions = inspect.getmembers(published, inspect.isfunction)
    return {name: f for name, f in functions if f.__module__ == published.__name__ and not name.startswith("_")}


def made_by(preset: Callable[..., Method]) -> dict[str, dict[tuple[str, str], Method]]:
    """All methods of a preset: data -> pair -> method; the pair is ("", "") for a preset without pairs."""
    names = [n for n in ("teacher", "student") if n in inspect.signature(preset).parameters]
    if not names:
        return {"": {("", ""): preset()}}
    try:
        preset(*(["?"] * len(names)))
    except published.UnknownPair as error:
        known = error.known
    else:
        raise TypeError(f"published.{preset.__name__} takes any pair of networks; it should know some.")
    return {
        data: {(t, s): preset(*(t, s)[2 - len(names) :], data=data) for t, s in pairs} for data, pairs in known.items()
    }


def _presets(kind: type[Any]) -> str:
    """The published values of every pair, as they are typed, grouped by equal values."""
    lines = []
    for name, preset in presets().items():
        known = made_by(preset)
        first = next(iter(next(iter(known.values())).values()))
        inside = [value for _, value, _ in iter_arguments(first)]
        if type(first) is not kind and (issubclass(kind, Method) or not any(type(v) is kind for v in inside)):
            continue
        call = ", ".join(n for n in ("teacher", "student") if n in inspect.signature(preset).parameters)
        for data, pairs in known.items():
            by_text: dict[str, list[str]] = {}
            for (t, s), method in pairs.items():
                text = ROUND.sub(_short, format_call(method, whole=True))
                by_text.setdefault(text, []).append(s if t in ("", "none") else f"{t} to {s}")
            for text, nets in by_text.items():
                where = f"{data}: {', '.join(nets)}" if data else "for all"
                lines.append(f"- `published.{name}({call})` = `{text}` ({where})")
    if not lines or kind is Static:  # part of most presets
        return f" The defaults: `{_defaults(kind)}`."
    return "\n\n" + "\n".join(lines)


def _short(match: re.Match[str]) -> str:
    return f"{float(match[0]):.4g}"


def _defaults(kind: type[Any]) -> str:
    """The arguments and their defaults."""
    arguments = []
    for name, p in inspect.signature(kind.__init__).parameters.items():
        if name == "self":
            continue
        value = f"{p.default:.4g}" if isinstance(p.default, float) else str(p.default)
        arguments.append(
            f"*{name}" if p.kind is p.VAR_POSITIONAL else name if p.default is p.empty else f"{name}={value}"
        )
    return f"{kind.__name__}({', '.join(arguments)})"


# records


def _comparisons(results: Path) -> Iterator[tuple[str, Comparison]]:
    """(name, comparison) of every folder with records of runs."""
    for folder in sorted({p.parent for p in results.rglob("*.json") if p.parent.name == "records"}):
        runs = [load_run(path) for path in sorted(folder.glob("*.json")) if not path.name.endswith(".failed.json")]
        if runs:
            yield folder.parent.relative_to(results).as_posix(), compare(runs)


def _measured(name: str, comparisons: list[tuple[str, Comparison]]) -> str:
    if name == Static.__name__:
        return " With the methods that use it by default."
    lines = []
    for folder, comparison in comparisons:
        metric = comparison.metric
        for group in comparison.groups:
            if group.mean is None or not any(name in _names(run.of("method")) for run in group.runs):
                continue
            spread = "" if group.sd is None else f" ± {metric.show(group.sd)}"
            best = mean(list(group.best.values()))
            gaps = [f"{metric.show(g.mean, signed=True)} to {c}" for c, g in group.versus.items() if g is not None]
            score = f"{metric.show(group.mean)}{spread}{metric.unit}, best epoch {metric.show(best)}"
            lines.append(
                f"- {group.label}: {metric.name.replace('/', ' ')} {score}, {group.n} seed{'s' * (group.n != 1)}"
                f"{'; ' + ', '.join(gaps) if gaps else ''} (`benchmarks/results/{folder}`)"
            )
    return "\n\n" + "\n".join(lines) if lines else " Not measured."


def _names(method: dict[str, Any]) -> set[str]:
    """The names of a recorded method and of its parts."""
    names = {str(method.get("name"))}
    for value in method.values():
        names |= _names(value) if isinstance(value, dict) else set()
    return names


def main(root: Path) -> int:
    """Write docs/papers.md under ``root``."""
    path = root / "docs" / "papers.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(root / "benchmarks" / "results"), encoding="utf-8", newline="\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
