"""Which tokens of a text are private: detectors of spans, and spans as a score for each token.

    scores(text, offsets, Patterns())      # a number in [0, 1] a token, for TextExample(private=) and its makers

A detector is anything that takes a text and returns spans: ``Patterns``, ``Entities``, or a function of one's own.
None finds everything. What a detector misses is distilled as any other text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Characters ``start`` to ``end`` of a text (end excluded), how private they are in [0, 1], and what they are."""

    start: int
    end: int
    score: float = 1.0
    kind: str = "private"


Detector = Callable[[str], Iterable[Span]]

HONORIFIC = r"(?:Mr|Mrs|Ms|Dr|Prof|Sir|Lady|Miss|Mister|Madam)\.?"
NAME = r"[A-Z][a-z]+(?:[-'][A-Z][a-z]+)*"
KINDS: dict[str, str] = {
    "email": r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63}){1,4}",
    # a group in brackets or +, then groups between which one separator stands; seven digits at least in all
    "phone": r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}(?![\w-])",
    # a known prefix, or one word of 20 characters or more that mixes letters and digits
    "secret": r"\b(?:sk|pk|ghp|gho|xox[bap]|AKIA|AIza)[-_]?[A-Za-z0-9_-]{12,}"
    r"|\b(?=[A-Za-z_+/=-]{0,200}\d)(?=[\d_+/=-]{0,200}[A-Za-z])[A-Za-z0-9_+/=-]{20,}",
    "number": r"\d+(?:[.,]\d+)*",
    # behind an honorific, or two capitalized words in a row
    "name": rf"\b{HONORIFIC} {NAME}(?: {NAME})*|\b{NAME}(?: {NAME})+",
}


@dataclass(frozen=True)
class Patterns:
    """Spans by regular expressions: simple, quick, and neither complete nor exact; overlapping ones are all returned.

    A name is what follows an honorific, or two capitalized words in a row; so headings are names, and a first name by
    itself, or a text in lower case, has none.

    Args:
        kinds: of ``KINDS``; None for all.
        weights: how private a kind is, in [0, 1]; 1 where it is not named.
        more: kinds of one's own, name -> regular expression.

    Raises:
        ValueError: for a kind that there is not, a weight outside [0, 1], or an expression that cannot be read.
    """

    kinds: Sequence[str] | None = None
    weights: Mapping[str, float] | None = None
    more: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        there, weights = {**KINDS, **(self.more or {})}, dict(self.weights or {})
        if unknown := sorted({*(self.kinds or ()), *weights} - set(there)):
            raise ValueError(f"no kind of private text is called {unknown}. There are: {', '.join(there)}.")
        if wrong := {kind: w for kind, w in weights.items() if not 0.0 <= w <= 1.0}:
            raise ValueError(f"Patterns needs weights in [0, 1]; got {wrong}.")
        for kind, pattern in (self.more or {}).items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern of {kind!r} cannot be read: {error}.") from error

    def __call__(self, text: str) -> list[Span]:
        there, weights = {**KINDS, **(self.more or {})}, self.weights or {}
        wanted = [*KINDS, *(self.more or {})] if self.kinds is None else [*self.kinds, *(self.more or {})]
        spans = []
        for kind in dict.fromkeys(wanted):
            for found in re.finditer(there[kind], text):
                if kind != "phone" or sum(c.isdigit() for c in found.group()) >= 7:
                    spans.append(Span(*found.span(), weights.get(kind, 1.0), kind))
        return sorted(spans)


class Entities:
    """Spans of a named-entity model: of spaCy, "spacy:NAME", or else one of transformers by its name or folder.

    Args:
        model: such as "spacy:en_core_web_sm" or "dslim/bert-base-NER". It is loaded at the first text.
        labels: which of its labels are private; None for all.

    Raises:
        ImportError: at the first text, where the library or spaCy's model is not installed.
    """

    def __init__(self, model: str, *, labels: Sequence[str] | None = None) -> None:
        self.model, self.labels = model, None if labels is None else frozenset(labels)
        self._find: Callable[[str], Iterable[tuple[int, int, float, str]]] | None = None

    def __call__(self, text: str) -> list[Span]:
        if self._find is None:
            self._find = _spacy(self.model[6:]) if self.model.startswith("spacy:") else _pipeline(self.model)
        found = (Span(*entity) for entity in self._find(text))
        return [span for span in found if self.labels is None or span.kind in self.labels]


def _spacy(name: str) -> Callable[[str], Iterable[tuple[int, int, float, str]]]:
    try:
        import spacy  # pyright: ignore[reportMissingImports]

        model = spacy.load(name)
    except ImportError as error:
        raise ImportError(f"Entities('spacy:{name}') needs spaCy: pip install spacy; Patterns() does not.") from error
    except OSError as error:
        raise ImportError(f"spaCy's model {name!r} is not installed: python -m spacy download {name}.") from error
    return lambda text: [(e.start_char, e.end_char, 1.0, e.label_) for e in model(text).ents]


def _pipeline(name: str) -> Callable[[str], Iterable[tuple[int, int, float, str]]]:
    try:
        from transformers import pipeline
    except ImportError as error:
        raise ImportError(
            f"Entities({name!r}) needs transformers: pip install 'tempering[models]'. Patterns() needs nothing."
        ) from error
    asked: Any = pipeline("token-classification", model=name, aggregation_strategy="simple")
    return lambda text: [(e["start"], e["end"], float(e["score"]), e["entity_group"]) for e in asked(text)]


def both(*detectors: Detector) -> Detector:
    """What any of the detectors finds."""
    return lambda text: sorted(span for detector in detectors for span in detector(text))


def known_spans(spans: Iterable[Sequence[Any]]) -> Detector:
    """A detector that knows the spans of its one text: (start, end), with a score and a kind where they are known."""
    known = [Span(*span) for span in spans]
    return lambda text: known


def scores(text: str, offsets: Sequence[tuple[int, int]], detector: Detector) -> list[float]:
    """How private each token is: the highest score of the spans it shares a character with, 0 for none.

    Args:
        text: what was tokenized.
        offsets: (start, end) of each token in the text, as ``tokenizer(text, return_offsets_mapping=True)`` gives them
            (special tokens are (0, 0), and never private), or ``byte_offsets``.
        detector: of spans.

    Raises:
        ValueError: for a span that does not lie in the text, or a score outside [0, 1].
    """
    by_character = [0.0] * len(text)
    for span in detector(text):
        if not 0 <= span.start < span.end <= len(text) or not 0.0 <= span.score <= 1.0:
            raise ValueError(f"a span must lie in its text of {len(text)} characters, with a score in [0, 1]: {span}.")
        for place in range(span.start, span.end):
            by_character[place] = max(by_character[place], span.score)
    return [max(by_character[start:end], default=0.0) for start, end in offsets]


def byte_offsets(text: str) -> list[tuple[int, int]]:
    """Offsets of a text's UTF-8 bytes, each the character that it is a part of."""
    return [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
