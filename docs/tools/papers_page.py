"""docs/papers.md: every method and policy, its equation, its paper's values, what differs, and what we measured.

Made from docstrings, ``published`` and the records under benchmarks/results by ``python docs/tools/papers_page.py .``.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.experiments import published as papers
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

Made by `make docs` from the docstrings, `tempering.papers` and the records in `benchmarks/results`; not edited by hand.

Rows of logits: u the teacher's, v the student's, N rows of C classes. T_t and T_s are their temperatures, p and q the
softmaxes of u / T_t and v / T_s, KL is KL(p || q). A softened divergence is multiplied by T_s T_t. What can be typed
after `--method` or `--temperature` is written as it is typed. "Checked against" names the file with the authors' own
numbers, which the tests hold us to within 1e-9 in float64. A result of ours comes from records in this repository; its
budget is that of the folder it lies in, and is not the papers'.
"""
# the file of the authors' numbers that a part is held to
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
    """The whole page; ``results`` is the folder of the records."""
    found = list(_comparisons(results))
    parts = [HEAD]
    for title, kinds in (("Methods", METHODS), ("Temperature policies", POLICIES)):
        parts += [f"## {title}\n", _index(kinds), *(_part(name, kind, found) for name, kind in kinds.items())]
    return "\n".join(parts)


def _index(kinds: dict[str, Any]) -> str:
    rows = [f"| [{name}](#{name.lower()}) | {_cited(kind.paper)} | {_golden(name)} |" for name, kind in kinds.items()]
    return "\n".join(["| name | paper | checked against |", "|---|---|---|", *rows, ""])


def _part(name: str, kind: type[Method] | type[Policy], found: list[tuple[str, Comparison]]) -> str:
    """One method or policy."""
    equation, differs, reference = told(kind)
    lines = [f"### {name}\n", f"```text\n{textwrap.fill(equation, 110)}\n```\n"]
    lines += [f"**Paper.** {_cited(reference or kind.paper)}\n", f"**Values.**{_presets(kind)}\n"]
    if differs:
        lines += ["**The released code, and where we differ.**\n", *(f"- {text}" for text in differs), ""]
    lines += [f"**Checked against.** {_golden(name)}.\n", f"**Measured.**{_measured(name, found)}\n"]
    return "\n".join(lines)


def told(kind: type[Any]) -> tuple[str, list[str], str]:
    """What a docstring says: its equation, how it stands to what was released, and its reference."""
    text = inspect.cleandoc(kind.__doc__ or "")
    blocks = [block for block in re.split(r"\n\s*\n", text) if block.strip()] or [""]  # python -OO keeps none
    equation, differs, reference = " ".join(blocks[0].split()).replace("``", ""), [], ""
    for block in blocks[1:]:
        if block.startswith(("Reference:", "References:")):
            reference = _line(block.partition(":")[2])
        elif block.startswith("Args:"):
            items = [(name, said) for name, said in _arguments(block) if name != "warmup"]
            differs += [f"`{name}`: {said}" for name, said in items if DIFFERS.search(said)]
        elif DIFFERS.search(block):
            differs += [_line(part) for part in re.split(r"\n(?=- )", block)]
    return equation, [d.removeprefix("- ") for d in differs], reference


def _arguments(block: str) -> Iterator[tuple[str, str]]:
    """(name, what is said of it) of an Args block, whose items are indented once and go on indented twice."""
    for item in re.split(r"\n {4}(?=\S)", block)[1:]:
        name, _, said = item.partition(":")
        yield name, _line(said)


def _line(text: str) -> str:
    """A paragraph in one line, with its double backquotes single and its stars left alone."""
    text = " ".join(text.split()).replace("``", "`")
    return "".join(part if i % 2 else part.replace("*", r"\*").replace("_", r"\_") for i, part in _quoted(text))


def _quoted(text: str) -> Iterator[tuple[int, str]]:
    """Parts outside and, at odd places, inside backquotes."""
    for i, part in enumerate(text.split("`")):
        yield i, f"`{part}`" if i % 2 else part


def _cited(text: str) -> str:
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _golden(name: str) -> str:
    return GOLDEN.get(name) or "no numbers of the authors'; by hand in the tests"


# presets


def presets() -> dict[str, Callable[..., Method]]:
    """The functions of ``papers`` that return a method, by name."""
    found = inspect.getmembers(papers, inspect.isfunction)
    return {name: f for name, f in found if f.__module__ == papers.__name__ and not name.startswith("_")}


def made_by(preset: Callable[..., Method]) -> dict[str, dict[tuple[str, str], Method]]:
    """Everything that a preset knows: data -> pair -> method; one without a pair is under ("", "")."""
    names = [n for n in ("teacher", "student") if n in inspect.signature(preset).parameters]
    if not names:
        return {"": {("", ""): preset()}}
    try:
        preset(*(["?"] * len(names)))
    except papers.UnknownPair as error:
        known = error.known
    else:
        raise TypeError(f"papers.{preset.__name__} answers for any pair of nets; it should know some.")
    return {
        data: {(t, s): preset(*(t, s)[2 - len(names) :], data=data) for t, s in pairs} for data, pairs in known.items()
    }


def _presets(kind: type[Any]) -> str:
    """The papers' values of every pair, as they are typed, those that agree together."""
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
                lines.append(f"- `papers.{name}({call})` = `{text}` ({where})")
    if not lines or kind is Static:  # which every second method has
        return f" The defaults: `{_defaults(kind)}`."
    return "\n\n" + "\n".join(lines)


def _short(found: re.Match[str]) -> str:
    return f"{float(found[0]):.4g}"


def _defaults(kind: type[Any]) -> str:
    """The arguments and what they are by themselves."""
    said = []
    for name, p in inspect.signature(kind.__init__).parameters.items():
        if name == "self":
            continue
        value = f"{p.default:.4g}" if isinstance(p.default, float) else str(p.default)
        said.append(f"*{name}" if p.kind is p.VAR_POSITIONAL else name if p.default is p.empty else f"{name}={value}")
    return f"{kind.__name__}({', '.join(said)})"


# records


def _comparisons(results: Path) -> Iterator[tuple[str, Comparison]]:
    """(name, comparison) of every folder that holds records of runs."""
    for folder in sorted({p.parent for p in results.rglob("*.json") if p.parent.name == "records"}):
        runs = [load_run(path) for path in sorted(folder.glob("*.json")) if not path.name.endswith(".failed.json")]
        if runs:
            yield folder.parent.relative_to(results).as_posix(), compare(runs)


def _measured(name: str, found: list[tuple[str, Comparison]]) -> str:
    if name == Static.__name__:
        return " With the methods that have it by default."
    lines = []
    for folder, comparison in found:
        metric = comparison.metric
        for arm in comparison.arms:
            if arm.mean is None or not any(name in _names(run.of("method")) for run in arm.runs):
                continue
            spread = "" if arm.sd is None else f" ± {metric.show(arm.sd)}"
            best = mean(list(arm.best.values()))
            gaps = [f"{metric.show(g.mean, signed=True)} to {c}" for c, g in arm.versus.items() if g is not None]
            said = f"{metric.show(arm.mean)}{spread}{metric.unit}, best epoch {metric.show(best)}"
            lines.append(
                f"- {arm.label}: {metric.name.replace('/', ' ')} {said}, {arm.n} seed{'s' * (arm.n != 1)}"
                f"{'; ' + ', '.join(gaps) if gaps else ''} (`benchmarks/results/{folder}`)"
            )
    return "\n\n" + "\n".join(lines) if lines else " Not measured."


def _names(method: dict[str, Any]) -> set[str]:
    """The names of a method and of what is in it, as a record has them; of a sum's parts too."""
    found = {str(method.get("name"))}
    for value in method.values():
        found |= _names(value) if isinstance(value, dict) else set()
    return found


def main(root: Path) -> int:
    """Write docs/papers.md under ``root``."""
    path = root / "docs" / "papers.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(root / "benchmarks" / "results"), encoding="utf-8", newline="\n")
    print(f"made: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
