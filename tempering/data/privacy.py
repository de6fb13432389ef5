"""Detect private spans of a text, and score how private each token is.

    scores(text, offsets, Patterns())      # per token, in [0, 1], for TextExample(privacy_score=) and make_* functions

A detector is a callable that takes a text and returns spans: ``Patterns``, ``Entities``, or your own function. No
detector finds everything; private text that it misses is distilled like any other text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Characters ``start`` to ``end`` (excluded) of a text, how private they are in [0, 1], and of which kind."""

    start: int
    end: int
    score: float = 1.0
    kind: str = "private"


Detector = Callable[[str], Iterable[Span]]

HONORIFIC = r"(?:Mr|Mrs|Ms|Dr|Prof|Sir|Lady|Miss|Mister|Madam)\.?"
NAME = r"[A-Z][a-z]+(?:[-'][A-Z][a-z]+)*"
KINDS: dict[str, str] = {
    "email": r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63}){1,4}",
    # an optional prefix + or (...), then groups of digits with one separator between; at least seven digits in all
    "phone": r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,4}(?![\w-])",
    # a known prefix, or a word of 20 or more characters with letters and digits
    "secret": r"\b(?:sk|pk|ghp|gho|xox[bap]|AKIA|AIza)[-_]?[A-Za-z0-9_-]{12,}"
    r"|\b(?=[A-Za-z_+/=-]{0,200}\d)(?=[\d_+/=-]{0,200}[A-Za-z])[A-Za-z0-9_+/=-]{20,}",
    "number": r"\d+(?:[.,]\d+)*",
    # after an honorific, or two capitalized words in a row
    "name": rf"\b{HONORIFIC} {NAME}(?: {NAME})*|\b{NAME}(?: {NAME})+",
}


@dataclass(frozen=True)
class Patterns:
    """Detect spans by regular expressions: fast, but neither complete nor exact. Overlapping spans are all returned.

    A name is one or more capitalized words after an honorific, or two or more capitalized words in a row. So headings
    are detected as names, but single first names and names in lower case are not.

    Args:
        kinds: of ``KINDS``; None for all.
        weights: kind -> how private it is, in [0, 1]; default: 1.
        more: additional kinds, name -> regular expression.

    Raises:
        ValueError: for an unknown kind, a weight outside [0, 1], or an invalid regular expression.
    """

    kinds: Sequence[str] | None = None
    weights: Mapping[str, float] | None = None
    more: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        patterns, weights = {**KINDS, **(self.more or {})}, dict(self.weights or {})
        if unknown := sorted({*(self.kinds or ()), *weights} - set(patterns)):
            raise ValueError(f"no kind of private text is called {unknown}. Known are: {', '.join(patterns)}.")
        if wrong := {kind: w for kind, w in weights.items() if not 0.0 <= w <= 1.0}:
            raise ValueError(f"Patterns needs weights in [0, 1]; got {wrong}.")
        for kind, pattern in (self.more or {}).items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern of {kind!r} is no regular expression: {error}.") from error

    def __call__(self, text: str) -> list[Span]:
        patterns, weights = {**KINDS, **(self.more or {})}, self.weights or {}
        kinds = [*KINDS, *(self.more or {})] if self.kinds is None else [*self.kinds, *(self.more or {})]
        spans = []
        for kind in dict.fromkeys(kinds):
            for match in re.finditer(patterns[kind], text):
                if kind != "phone" or sum(c.isdigit() for c in match.group()) >= 7:
                    spans.append(Span(*match.span(), weights.get(kind, 1.0), kind))
        return sorted(spans)


class Entities:
    """Detect spans with a named-entity model of spaCy ("spacy:NAME") or of transformers (name or folder).

    Args:
        model: such as "spacy:en_core_web_sm" or "dslim/bert-base-NER". It is loaded at the first call.
        labels: its labels that are private; None for all.

    Raises:
        ImportError: at the first call, if the library or the model of spaCy is not installed.
    """

    def __init__(self, model: str, *, labels: Sequence[str] | None = None) -> None:
        self.model, self.labels = model, None if labels is None else frozenset(labels)
        self._find: Callable[[str], Iterable[tuple[int, int, float, str]]] | None = None

    def __call__(self, text: str) -> list[Span]:
        if self._find is None:
            self._find = _spacy(self.model[6:]) if self.model.startswith("spacy:") else _pipeline(self.model)
        spans = (Span(*entity) for entity in self._find(text))
        return [span for span in spans if self.labels is None or span.kind in self.labels]


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
    classifier: Any = pipeline("token-classification", model=name, aggregation_strategy="simple")
    return lambda text: [(e["start"], e["end"], float(e["score"]), e["entity_group"]) for e in classifier(text)]


def both(*detectors: Detector) -> Detector:
    """Combine detectors: return the spans of all of them."""
    return lambda text: sorted(span for detector in detectors for span in detector(text))


def known_spans(spans: Iterable[Sequence[Any]]) -> Detector:
    """Return a detector that always returns these spans of one text: (start, end), and optionally score and kind."""
    fixed = [Span(*span) for span in spans]
    return lambda text: fixed


def scores(text: str, offsets: Sequence[tuple[int, int]], detector: Detector) -> list[float]:
    """Score how private each token is: the highest score of the spans that it overlaps, 0 if there are none.

    Args:
        text: the text that was tokenized.
        offsets: (start, end) of each token in the text, as returned by ``tokenizer(text, return_offsets_mapping=True)``
            (special tokens are (0, 0), and never private), or by ``byte_offsets``.
        detector: of spans.

    Raises:
        ValueError: for a span outside the text, or a score outside [0, 1].
    """
    by_character = [0.0] * len(text)
    for span in detector(text):
        if not 0 <= span.start < span.end <= len(text) or not 0.0 <= span.score <= 1.0:
            raise ValueError(
                f"a span must be in its text of {len(text)} characters, with a score in [0, 1]; got {span}."
            )
        for i in range(span.start, span.end):
            by_character[i] = max(by_character[i], span.score)
    return [max(by_character[start:end], default=0.0) for start, end in offsets]


def byte_offsets(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each UTF-8 byte of a text: that of the character it belongs to."""
    return [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
