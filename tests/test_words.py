"""Docstrings, comments, messages and pages are in plain American English (CONTRIBUTING.md, section "Style")."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.paths import ROOT

# regular expression (case-insensitive, a space is any white space), what to write instead, an example that matches
PHRASES = (
    (r"\bby itself\b", "default: ...", "by itself 0.05"),
    (r"\bgo(es|ing)? on\b(?! to\b)|\bwent on\b", "resume, continue", "a killed run goes\non"),
    (r"\bimitat(e|es|ed|ing)\b", "emulate", "torch imitates it"),
    (r"\b(is|are|was|were|be|been|being) (told|met)\b", "gets, knows, is set", "the net is told its temperature"),
    (r"\b(is|are|was|were|be|been|being) asked\b(?! for\b)", "runs, is called", "the teacher is asked once"),
    (
        r"(?:^|\. )(?-i:What) (is|was|are|a|an|the|it|one|they)\b[^?.]*\b(is|are|was)\b",
        "the subject",
        "What a row is is",
    ),
    (
        r"\b(value|number|term|loss|score|delta|bit|byte|entry|label|sample|weight)s? a row\b",
        "per row",
        "one value a row",
    ),
    (r"\bso many\b", "this many, the number of ...", "at most so many tokens"),
    (r"\bis no number\b", "is NaN or infinite", "when the loss is no number"),
    (r"\bstands? (beside|behind)\b", "is next to, follows", "KD stands beside it"),
    (
        r"\b(files?|folders?|records?|shards?|weights|checkpoints?|runs?) (lies?|stands?) in\b",
        "is in",
        "the file lies in it",
    ),
    (r"\bof one's own\b", "your own", "a loop of one's own"),
    (r"\bheld (to|against)\b", "tested against, compared with, limited to", "held to the authors' numbers"),
    (r"\bright, and told so\b|\bthree altitudes\b|\bdone right\b", "the fact", "Right, and told so"),
    (r"\b(?-i:Reading on)\b", "Documentation", "Reading on"),
    (r"\bfound by looking\b|\bmet by every\b", "discovered, covered by", "found by looking, met by every test"),
)
BRITISH = (
    r"\bcolour\w*|\bgrey\w*|\bcentr(e|es|ed|ing)\b|\b(un)?labell\w+|\bmodell(ed|ing)\b|\bcancell(ed|ing)\b|\btravell\w+"
    r"|\bbehaviour\w*|\bfavour\w*|\bneighbour\w*|\bhonour\w*|\bartefact\w*|\bpractis(e|ed|es|ing)\b|\bdistils?\b"
    r"|\bfulfils?\b|\blicence\b|\b(analys|paralys)(e|ed|ing)\b|\b(un)?(\w*normal|standard|general|initial|optim|minim|"
    r"maxim|regular|serial|token|summar|local|parallel|vector|categor|organ|recogn|character|emphas|final|util|visual|"
    r"special|penal|central|memor|random|synchron|quant|binar|capital|marginal|symmetr|linear|stabil|author|prior|real)"
    r"is(e|ed|es|ing|ation|ations|er|ers)\b"
)
RULES = (*PHRASES, (BRITISH, "the American spelling", "standardised, greyish colours"))
PATTERNS = [(re.compile(p.replace(" ", r"\s+"), re.IGNORECASE | re.MULTILINE), better) for p, better, _ in RULES]
# literal meanings: file -> lines with these words may stay
ALLOWED: dict[str, tuple[str, ...]] = {
    "docs/decisions/013-speed.md": ("# 013. What is optimized, and what is left",),
    "tempering/experiments/former_names.py": ("FORMER_WORDS =",),  # names in recorded plans
    "tempering/recipes/swing.py": ("the grey horse",),  # training text: recorded runs have it
}
GENERATED = ("docs/performance.md",)  # its labels are keys of recorded benchmarks


def test_phrases_and_spelling() -> None:
    offenders = [
        f"{name}:{line}: {' '.join(words.split())!r}; write {better}"
        for path in files()
        for name in [path.relative_to(ROOT).as_posix()]
        for line, words, better in banned_phrases(path)
        if not any(part in path.read_text(encoding="utf-8").splitlines()[line - 1] for part in ALLOWED.get(name, ()))
    ]
    assert not offenders, f"{len(offenders)} phrases to rewrite:\n" + "\n".join(offenders)


def test_every_pattern_matches_its_example() -> None:
    for (pattern, _), (_, _, example) in zip(PATTERNS, RULES, strict=True):
        assert pattern.search(example), pattern.pattern


def test_every_exception_is_needed() -> None:
    for name, parts in ALLOWED.items():
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        found = [lines[line - 1] for line, *_ in banned_phrases(ROOT / name)]
        assert all(any(part in line for line in found) for part in parts), f"{name}: {parts}"
    assert all((ROOT / name).is_file() for name in GENERATED)


def files() -> Iterator[Path]:
    """The package, the pages, README and CONTRIBUTING."""
    yield from sorted((ROOT / "tempering").rglob("*.py"))
    yield from (page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in map(_name, GENERATED))
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))


def banned_phrases(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, words, what to write instead) of a page or a module."""
    for start, text in prose(path):
        for pattern, better in PATTERNS:
            for match in pattern.finditer(text):
                yield start + text[: match.start()].count("\n"), match[0], better


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(first line, text) of a page, or of each comment and string of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, text
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            yield token.start[0], token.string.strip("\"'# ")


def _name(path: str) -> str:
    return Path(path).name
