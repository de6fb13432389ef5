"""Which tokens are private, and where the answer goes: patterns, offsets, padding, packing, shifting, rows."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempering.data import Tokens
from tempering.data.canaries import DIGITS, Canary, canaries, canary_spans, insert_canaries
from tempering.data.privacy import Entities, Patterns, Span, both, byte_offsets, known_spans, scores
from tempering.data.text import TextExample, collate, make_prompt_example, pack, windows
from tempering.rows import Rows
from tempering.tasks import LanguageModeling

TEXT = "to to Mrs Ada Byron, call +44 20 7946 0958 or mail ada.b@mail.example.org, key sk-4f9A8b7c6D5e4f3A2b1c, room 12"


def found(text: str, **options: Any) -> set[tuple[str, str]]:
    return {(span.kind, text[span.start : span.end]) for span in Patterns(**options)(text)}


def test_patterns() -> None:
    kinds = {kind: [text for k, text in found(TEXT) if k == kind] for kind in ("email", "phone", "secret", "name")}
    assert kinds["email"] == ["ada.b@mail.example.org"] and kinds["phone"] == ["+44 20 7946 0958"]
    assert kinds["secret"] == ["sk-4f9A8b7c6D5e4f3A2b1c"] and "Mrs Ada Byron" in kinds["name"]
    assert ("number", "12") in found(TEXT)
    assert found(TEXT, kinds=["number"], more={"room": "room"}) >= {("number", "12"), ("room", "room")}
    plain = "the cat sat by the river and looked at its well-known hat."
    assert not found(plain) and not found("") and found("It cost 1,250.50 or so.") == {("number", "1,250.50")}
    weighted = Patterns(kinds=["number"], weights={"number": 0.25})("room 12")
    assert weighted == [Span(5, 7, 0.25, "number")]


def test_patterns_take_no_quadratic_time() -> None:
    for text in ("1." * 20_000, "a" * 40_000 + "@", "Ab " * 10_000, "x1-" * 15_000):
        Patterns()(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ["numbers"]}, r"no kind of private text is called \['numbers'\]. Known are: email, phone"),
        ({"weights": {"number": 1.5}}, r"weights in \[0, 1\]; got \{'number': 1.5\}"),
        ({"more": {"odd": "("}}, "the pattern of 'odd' is no regular expression"),
    ],
)
def test_slips_in_patterns_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Patterns(**options)


def test_spans_become_scores_of_tokens() -> None:
    text, spans = "pin 4821 é", known_spans([(4, 8), (6, 10, 0.5, "odd")])
    tokens = [(0, 0), (0, 3), (3, 6), (6, 8), (8, 9), (9, 10)]  # the first is a special token
    assert scores(text, tokens, spans) == [0.0, 0.0, 1.0, 1.0, 0.5, 0.5]
    assert byte_offsets(text)[-2:] == [(9, 10), (9, 10)] and len(byte_offsets(text)) == len(text.encode())
    assert scores(text, byte_offsets(text), both(spans, Patterns(kinds=["number"])))[4:8] == [1.0] * 4
    for wrong in ((4, 99), (4, 4), (0, 2, 1.5)):
        with pytest.raises(ValueError, match="a span must be in its text of 10 characters"):
            scores(text, tokens, known_spans([wrong]))


def test_offsets_of_a_trained_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["the pin of anna is 4821 now"] * 9, tokenizers.trainers.BpeTrainer(vocab_size=60))
    text = "the pin is 4821 now"
    coded = tokenizer.encode(text)
    marks = scores(text, coded.offsets, Patterns(kinds=["number"]))
    private = [text[a:b] for (a, b), mark in zip(coded.offsets, marks, strict=True) if mark]
    assert "".join(private).strip() == "4821" and 0 < sum(marks) < len(marks)


def test_entities_are_asked_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    entity = SimpleNamespace(start_char=0, end_char=3, label_="PERSON")
    place = SimpleNamespace(start_char=7, end_char=12, label_="GPE")
    fake = SimpleNamespace(load=lambda name: lambda text: SimpleNamespace(ents=[entity, place]))
    monkeypatch.setitem(sys.modules, "spacy", fake)
    assert Entities("spacy:any", labels=["PERSON"])("Ada in Paris") == [Span(0, 3, 1.0, "PERSON")]
    monkeypatch.setitem(sys.modules, "spacy", None)
    asker = Entities("spacy:any")
    with pytest.raises(ImportError, match=r"needs spaCy: pip install spacy; Patterns\(\) does not"):
        asker("Ada")
    transformers = SimpleNamespace(
        pipeline=lambda *args, **kwargs: (
            lambda text: [{"start": 0, "end": 3, "score": 0.75, "entity_group": "PER", "word": "Ada"}]
        )
    )
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    assert Entities("some/ner")("Ada in Paris") == [Span(0, 3, 0.75, "PER")]


# into batches and rows


def test_scores_go_where_their_tokens_go() -> None:
    one = TextExample((5, 6, 7, 8), (True,) * 4, (0.0, 0.0, 1.0, 0.5))
    other = TextExample((1, 2), (True,) * 2)
    for side, want in (("right", [0.0, 0.0, 1.0, 0.5]), ("left", [0.0, 0.0, 1.0, 0.5])):
        batch = collate([one, other], side=side)
        assert batch["privacy_score"].tolist() == [want, [0.0] * 4]
    assert "privacy_score" not in collate([other])
    (packed,) = pack([other, one], 8)
    assert packed["privacy_score"].tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0]]
    assert "privacy_score" not in pack([other], 4)[0]
    assert [w.privacy_score for w in windows(range(5), 3, privacy_score=(0, 0, 1, 1, 0))] == [(0, 0, 1), (1, 1, 0)]
    made = make_prompt_example([1, 2, 3], [4, 5], eos=9, length=5, privacy_score=([0.1, 0.2, 0.3], [0.4, 0.5]))
    assert made.ids == (2, 3, 4, 5, 9) and made.privacy_score == (0.2, 0.3, 0.4, 0.5, 0.0)
    cut = make_prompt_example([1], [4, 5, 9], eos=9, length=2, privacy_score=([0.1], [0.4, 0.5, 0.0]))
    assert cut.ids == (4, 5) and cut.privacy_score == (0.4, 0.5)
    for make in (
        lambda: TextExample((1, 2), (True, True), (0.5,)),
        lambda: windows(range(5), 3, privacy_score=(0, 0)),
        lambda: make_prompt_example([1], [2], privacy_score=([0.0], [0.0, 0.0])),
    ):
        with pytest.raises(ValueError, match="needs a privacy score for "):
            make()


def test_the_data_s_identity_knows_what_is_private() -> None:
    plain = Tokens([TextExample((1, 2, 3), (True,) * 3)])
    public = Tokens([TextExample((1, 2, 3), (True,) * 3, (0.0, 0.0, 0.0))])
    marked = Tokens([TextExample((1, 2, 3), (True,) * 3, (0.0, 1.0, 0.0))])
    assert len({plain.identity, public.identity, marked.identity}) == 3
    assert plain.identity == Tokens([TextExample((1, 2, 3), (True,) * 3)], canaries=canaries()).identity


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_row_that_predicts_a_private_token_is_the_private_one(side: str) -> None:
    text = TextExample((10, 11, 12, 13), (True,) * 4, (0.0, 0.0, 1.0, 0.25))
    batch = collate([text, TextExample((14, 15), (True,) * 2, (1.0, 0.0))], side=side, length=6, ids=[7, 8])
    logits = torch.zeros(2, 6, 20)
    (rows,) = LanguageModeling().rows(logits, logits, batch)
    assert (
        rows.target is not None
        and rows.privacy_score is not None
        and rows.ids is not None
        and rows.positions is not None
    )
    told = dict(zip(rows.target.tolist(), rows.privacy_score.tolist(), strict=True))
    assert told == {11: 0.0, 12: 1.0, 13: 0.25, 15: 0.0}  # a text's first token is predicted by nothing
    first = 0 if side == "right" else 2
    assert rows.ids.tolist() == [7, 7, 7, 8] and rows.positions[:3].tolist() == [first, first + 1, first + 2]
    assert "privacy_score" not in LanguageModeling().inputs(batch)[0]
    empty = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    (none,) = LanguageModeling().rows(logits, logits, empty)
    assert none.weight is not None and not none.weight.any() and none.privacy_score is not None
    with pytest.raises(ValueError, match="needs privacy_score of the shape of input_ids"):
        LanguageModeling().rows(logits, logits, {**batch, "privacy_score": torch.zeros(2, 5)})


def test_packed_rows_are_private_as_padded_ones() -> None:
    texts = [TextExample((1, 2, 3), (True,) * 3, (0.0, 1.0, 0.5)), TextExample((4, 5), (True,) * 2, (1.0, 0.25))]
    (packed,) = pack(texts, 6)
    logits = torch.zeros(1, 6, 9)
    (rows,) = LanguageModeling().rows(logits, logits, packed)
    assert rows.privacy_score is not None and rows.privacy_score.tolist() == [1.0, 0.5, 0.25]


def test_rows_refuse_a_privacy_outside_its_range() -> None:
    z = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"needs privacy_score of shape \(N,\) = \(3,\)"):
        Rows(z, z, privacy_score=torch.zeros(2))
    for bad in (1.5, -0.1, float("nan")):
        score = torch.tensor([0.0, bad, 1.0])
        with pytest.raises(ValueError, match=r"needs privacy_score in \[0, 1\]"):
            Rows(z, z, privacy_score=score)
        Rows(
            z, z, weight=torch.tensor([1.0, 0.0, 1.0]), privacy_score=score
        )  # where there is no weight anything may stand


# canaries


def test_canaries_are_planted_as_often_as_they_say() -> None:
    secrets = canaries((0, 1, 7), each=3, digits=4, seed=1)
    assert len({c.prompt for c in secrets}) == 9 and all(c.size == 10_000 for c in secrets)
    assert all(c.candidate(c.index) == c.secret for c in secrets)
    text = insert_canaries("a line\n" * 40, secrets, seed=2)
    assert [("\n" + text).count(c.prompt + c.secret + c.end) for c in secrets] == [0] * 3 + [1] * 3 + [7] * 3
    assert (
        text == insert_canaries("a line\n" * 40, secrets, seed=2) != insert_canaries("a line\n" * 40, secrets, seed=3)
    )
    at = canary_spans(text, secrets)
    assert len(at) == 24 and {text[a:b] for a, b in at} == {c.secret for c in secrets if c.repeats}
    numbers = Patterns(kinds=["number"])(text)
    assert [(s.start, s.end) for s in numbers] == at, "the detector of numbers finds each and nothing else"
    assert [Canary("x", "a", 1, alphabet="ba").candidate(i) for i in range(2)] == ["b", "a"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Canary("x", "", 1), "needs a secret of '0123456789' and repeats >= 0; got '' and 1"),
        (lambda: Canary("x", "1a", 1), "got '1a' and 1"),
        (lambda: Canary("x", "1", -1), "got '1' and -1"),
        (lambda: canaries(each=99), "needs 1 to 48 of them"),
        (lambda: canaries(form="no name"), "a form with {name}"),
        (lambda: insert_canaries("no line end", canaries()), "the text has no line break"),
    ],
)
def test_slips_in_canaries_are_named(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
    assert DIGITS == "0123456789"
