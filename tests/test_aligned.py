"""Two tokenizers on one text: the alignment, the merged rows, and what is learned from them."""

from __future__ import annotations

import itertools
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.data.token_alignment import (
    AlignedExample,
    Pieces,
    align_groups,
    collate_spans,
    make_aligned_example,
    shared_tokens,
)
from tempering.methods import DTKD, KD, ULD, Divergence, HybridULD, Supervised  # pyright: ignore
from tempering.objectives import cross_entropy, jsd
from tempering.rows import Rows, total
from tempering.tasks import CrossTokenizer, LanguageModeling
from tempering.tasks.base import prepare_task
from tempering.teachers import Ensemble, Live, Routed
from tempering.temperature import Sharpness, Static
from tests.conftest import random_rows
from tests.lazy_modules import needs
from tests.paths import needs_shared
from tests.test_generation import gpt2
from tests.test_golden import Case, case, cases  # noqa: F401

pytestmark = needs("transformers")

WORDS = [" ", "a", "b", "c", "ab", "abc", "ca", " a", " b", "é", "bc ab", "cab"]
END, BEGIN = 300, 301


def letters(*, bos: bool = False) -> Pieces:
    """Every byte is a token."""
    table = {i: bytes([i]) for i in range(256)} | {256: b"", 257: b""}
    return Pieces(lambda text: list(text.encode()), table, eos=256, bos=257 if bos else None)


def words(*, bos: bool = False) -> Pieces:
    """The longest known piece first; single bytes from 20 on."""
    table = {i: word.encode() for i, word in enumerate(WORDS)} | {20 + i: bytes([i]) for i in range(256)}
    pieces = sorted(table.items(), key=lambda pair: (-len(pair[1]), pair[0]))

    def encode(text: str) -> list[int]:
        left, out = text.encode(), []
        while left:
            number, piece = next((i, p) for i, p in pieces if left.startswith(p))
            out.append(number)
            left = left[len(piece) :]
        return out

    return Pieces(encode, table | {END: b"", BEGIN: b""}, eos=END, bos=BEGIN if bos else None)


TEXTS = [("a b", "abc cab é"), ("", "bc abca"), ("ca ca", "b"), ("abc", " a bcé ab")]


def texts(student: Pieces | None = None, teacher: Pieces | None = None, **how: Any) -> list[AlignedExample]:
    sides = (student or letters(bos=True), teacher or words(bos=True))
    return [make_aligned_example(*sides, prompt, completion, **how) for prompt, completion in TEXTS]


# which tokens belong together


def test_groups_close_where_both_sides_end() -> None:
    assert align_groups([1, 1, 1], [1, 1, 1]) == ([0, 1, 2], [0, 1, 2])
    assert align_groups([3], [1, 1, 1]) == ([0], [0, 0, 0])
    assert align_groups([2, 2, 1], [1, 3, 1]) == ([0, 0, 1], [0, 0, 1])
    assert align_groups([1, 2, 1, 1], [1, 1, 2, 1]) == ([0, 1, 1, 2], [0, 1, 1, 2])
    assert align_groups([], [1]) == ([], [-1])


def test_a_beginning_on_one_side_moves_nothing() -> None:
    assert align_groups([0, 1, 2], [1, 2]) == ([-1, 0, 1], [0, 1])
    assert align_groups([1, 0, 2], [3]) == ([0, -1, 0], [0])


def test_what_is_left_over_takes_nothing_with_it() -> None:
    assert align_groups([1, 1, 1, 3], [1, 1, 3]) == ([0, 1, -1, -1], [0, 1, -1])
    assert align_groups([1, 1, 1, 1, 1], [1, 1]) == ([0, 1, -1, -1, -1], [0, 1])


def test_groups_are_the_finest_that_cover_the_same_bytes() -> None:
    draw = random.Random(0)
    for _ in range(200):
        text = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 30)))

        def cut(text: bytes = text) -> list[int]:
            places = sorted({0, len(text), *(draw.randrange(len(text)) for _ in range(draw.randrange(len(text))))})
            sizes = [b - a for a, b in itertools.pairwise(places)]
            for _ in range(draw.randrange(3)):
                sizes.insert(draw.randrange(len(sizes) + 1), 0)
            return sizes

        sides = (cut(), cut())
        found = []
        for sizes, groups in zip(sides, align_groups(*sides), strict=True):
            ends, parts = list(itertools.accumulate(sizes)), {}
            for size, end, group in zip(sizes, ends, groups, strict=True):
                assert (group == -1) == (size == 0)
                if size:
                    parts[group] = parts.get(group, b"") + text[end - size : end]
            found.append((parts, {end for end, size in zip(ends, sizes, strict=True) if size}))
        assert found[0][0] == found[1][0] and b"".join(found[0][0].values()) == text
        assert len(found[0][0]) == len(found[0][1] & found[1][1])


def test_prompts_ends_and_the_first_token() -> None:
    made = make_aligned_example(letters(), words(), "a b", "abc é")
    assert made.student.ids == (*b"a b", *"abc é".encode(), 256) and made.teacher.ids[-3:] == (0, 9, END)
    assert made.groups[0] == (-1, -1, -1, 0, 0, 0, 1, 2, 2, 3), "a letter of two bytes is one piece there"
    assert [g for g in made.groups[1] if g >= 0] == [0, 1, 2, 3]
    alone = make_aligned_example(letters(), words(), "", "ab a")
    assert alone.groups[0] == (-1, -1, 0, 0, 1), "nothing predicts a text's first token, so its group is none"
    begun = make_aligned_example(letters(bos=True), words(), "", "ab a")
    assert begun.groups[0] == (-1, -1, -1, 0, 0, 1), "nor where the other side alone has a beginning"
    assert make_aligned_example(letters(bos=True), words(bos=True), "", "ab a").groups[0] == (-1, 0, 0, 1, 1, 2)
    short = make_aligned_example(letters(), words(), "a", "abc abc abc", length=6)
    assert len(short.student) == len(short.teacher) == 6 and short.teacher.ids[-1] == END
    assert short.student.ids == (*b"abc ab",) and short.groups == ((-1, -1, -1, 0, 0, -1), (-1, -1, 0, -1, -1, -1))


def test_a_text_that_the_tokens_do_not_spell_is_refused() -> None:
    lower = Pieces(lambda text: list(text.lower().encode()), {i: bytes([i]) for i in range(256)})
    with pytest.raises(ValueError, match=r"do not spell the text: from byte 1 on it has b'B', and they have b'b'"):
        lower.cut("aB")


@pytest.fixture(scope="module")
def tokenizers() -> Any:
    """A byte-level one and one of SentencePiece's kind, trained on a few lines, as transformers wraps them."""
    made, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    lines = ["the cat sat on the mat", "naïve 水 and the rest of it, the end", "the theatre of the absurd"] * 5
    level = made.Tokenizer(made.models.BPE())
    level.pre_tokenizer = made.pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = made.decoders.ByteLevel()
    alphabet = made.pre_tokenizers.ByteLevel.alphabet()
    trainer = made.trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    level.train_from_iterator(lines, trainer)
    sentence = made.Tokenizer(made.models.BPE(unk_token="<unk>", byte_fallback=True))
    sentence.pre_tokenizer = made.pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = made.trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    sentence.train_from_iterator([line.replace("水", "") for line in lines], trainer)
    sentence.post_processor = made.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrap = transformers.PreTrainedTokenizerFast
    return (
        wrap(tokenizer_object=level, eos_token="<end>"),
        wrap(tokenizer_object=sentence, bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    )


def test_tokenizers_of_transformers(tokenizers: Any) -> None:
    ours, theirs = map(Pieces.of, tokenizers)
    assert (ours.bos, theirs.bos) == (None, 0) and ours.eos == tokenizers[0].eos_token_id
    assert ours.table[tokenizers[0].eos_token_id] == b"" and theirs.table[0] == b""
    for text in ("the cat", "naïve 水 end", " the  rest", ""):
        for side in (ours, theirs):
            ids, sizes = side.cut(text)
            assert sum(sizes) == len(text.encode()) and len(ids) == len(sizes)
    made = make_aligned_example(ours, theirs, "the cat sat", "on 水 the mat")
    assert made.teacher.ids[0] == 0 and made.groups[0][-1] == made.groups[1][-1] == max(made.groups[0])
    pairs = list(zip(*shared_tokens(ours, theirs), strict=True))
    assert (ours.eos, theirs.eos) in pairs and len(pairs) > 256
    assert all(ours.table[a] == theirs.table[b] for a, b in pairs)
    plain = {tokenizers[1].convert_ids_to_tokens(b) for _, b in pairs}
    assert "t" in plain and "<0x74>" not in plain, "a letter before its byte"


def test_a_vocabulary_of_another_kind_is_refused() -> None:
    class WordPiece:
        all_special_ids: tuple[int, ...] = ()

        def get_vocab(self) -> dict[str, int]:
            return {"the": 0, "##re": 1}

    with pytest.raises(ValueError, match=r"WordPiece has neither bytes nor .* data.spans.Pieces"):
        Pieces.of(WordPiece())


# rows


def models() -> tuple[nn.Module, nn.Module]:
    return gpt2(8, 0, 258), gpt2(12, 1, 302)


def rows_of(
    task: CrossTokenizer, made: list[AlignedExample], student: nn.Module, teacher: nn.Module, side: str = "right"
) -> Rows:
    batch = collate_spans(made, pad=(256, 256), side=side, ids=list(range(len(made))))
    for model in (student, teacher):
        task.prepare_model(model)
    ours, theirs, ids = task.inputs(batch)
    (rows,) = task.rows(student(ours), Live(teacher)(theirs, ids), batch)
    assert float(task.row_weights(batch)["logits"]) == len(rows)
    return rows


def by_hand(model: nn.Module, made: AlignedExample, who: int, merge: str) -> tuple[list[Tensor], list[int]]:
    """Every group's distribution over the vocabulary and its bucket, from the definition, and the kept token."""
    example = (made.student, made.teacher)[who]
    logp = torch.log_softmax(model(input_ids=torch.tensor([example.ids])).logits[0].detach(), -1)
    out, kept = [], []
    for number in range(max(made.groups[who]) + 1):
        places = [i for i, g in enumerate(made.groups[who]) if g == number]
        chosen = places[-1] if merge == "bayesian" else places[0]
        chance = torch.ones((), dtype=torch.float64)
        for i in places:
            if i != chosen:
                chance = chance * logp[i - 1, example.ids[i]].exp()
        out.append(torch.cat((chance * logp[chosen - 1].exp(), (1.0 - chance)[None])))
        kept.append(example.ids[chosen])
    return out, kept


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
def test_rows_are_the_merged_distributions(merge: Any) -> None:
    student, teacher, made = *models(), texts()
    rows = rows_of(CrossTokenizer(merge=merge), made, student, teacher)
    assert rows.student.shape == rows.teacher.shape and rows.student.shape[1] == 303
    number = 0
    for text, one in enumerate(made):
        (ours, kept), (theirs, _) = (by_hand(m, one, who, merge) for who, m in enumerate((student, teacher)))
        assert len(ours) == len(theirs)
        for p, q, token in zip(ours, theirs, kept, strict=True):
            got = torch.softmax(rows.student[number], -1)
            torch.testing.assert_close(torch.cat((got[:258], got[-1:])), p, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(torch.softmax(rows.teacher[number], -1), q, rtol=1e-9, atol=1e-12)
            assert not got[258:-1].any() and int(rows.target[number]) == token and int(rows.ids[number]) == text
            number += 1
    assert number == len(rows) and float((torch.softmax(rows.student, -1)[:, -1] > 0.1).double().mean()) > 0.1


def test_several_teachers_of_another_vocabulary() -> None:
    """Rows of the mean of their outputs, and of the one that each text has; the column reaches no model."""
    student, teacher, made = *models(), texts()
    other, narrow, task = gpt2(12, 5, 302), gpt2(12, 5, 258), CrossTokenizer()
    for model in (student, teacher, other, narrow):
        task.prepare_model(model)
    batch = collate_spans(made, pad=(256, 256), ids=list(range(len(made)))) | {"domain": [0, 1] * (len(made) // 2)}
    batch["domain"] += [0] * (len(made) - len(batch["domain"]))
    alone = [Live(net)(task.inputs(batch)[1]).logits for net in (teacher, other)]
    ours, first = torch.tensor(batch["domain"])[:, None, None], student(task.inputs(batch)[0])
    wanted = {"mean": (alone[0] + alone[1]) / 2, "routed": torch.where(ours == 0, *alone)}
    made_of = {"mean": Ensemble([teacher, other]), "routed": Routed([teacher, other], by="domain")}
    for name, several in made_of.items():
        own = prepare_task(task, student, several)
        _, inputs, ids = own.inputs(batch)
        rows, plain = own.rows(first, several(inputs, ids), batch)[0], task.rows(first, wanted[name], batch)[0]
        torch.testing.assert_close(rows.teacher, plain.teacher, rtol=1e-9, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"'0' \(Live\) returned .*302\) torch.float64 and teacher '1' \(Live\) returned .*258\) torch"
    ):
        Ensemble([teacher, narrow])(task.inputs(batch | {"teacher": batch["student"]})[1], None)


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
def test_the_hard_term_is_the_likelihood_of_the_text(merge: Any) -> None:
    """Whichever token is kept; of all tokens, where all have a partner."""
    student, teacher, made = *models(), texts()
    rows = rows_of(CrossTokenizer(merge=merge), made, student, teacher)
    whole = 0.0
    for one in made:
        logp = torch.log_softmax(student(input_ids=torch.tensor([one.student.ids])).logits[0].detach(), -1)
        places = [i for i, g in enumerate(one.groups[0]) if g >= 0]
        whole -= float(sum(logp[i - 1, one.student.ids[i]] for i in places))
    assert float(cross_entropy(rows).detach().sum()) == pytest.approx(whole, rel=1e-9)


def test_one_tokenizer_on_both_sides_is_the_plain_task() -> None:
    student, teacher = gpt2(8, 0, 258), gpt2(12, 1, 258)
    made = texts(letters(bos=True), letters(bos=True))
    rows = rows_of(CrossTokenizer(), made, student, teacher)
    batch = collate_spans(made, pad=(256, 256))["student"]
    task = LanguageModeling()
    plain = task.rows(student(task.inputs(batch)[0]), teacher(task.inputs(batch)[0]).logits.detach(), batch)[0]
    for method in (KD(), DTKD(), Divergence(objective="jsd"), ULD()):
        torch.testing.assert_close(total(method(rows), rows), total(method(plain), plain), rtol=1e-9, atol=1e-11)


def test_zero_at_agreement_and_not_one_position_off() -> None:
    student = gpt2(8, 0, 258)
    made = texts(letters(bos=True), letters(bos=True))
    method = ULD(hard=0.0)
    rows = rows_of(CrossTokenizer(), made, student, student)
    assert float(total(method(rows), rows).detach()) == 0.0
    batch = collate_spans(made, pad=(256, 256))
    task = CrossTokenizer()
    said = student(task.inputs(batch)[0]).logits.detach()
    shifted = task.rows(said, said.roll(1, 1), batch)[0]
    assert float(total(method(shifted), shifted)) > 0.01


@pytest.mark.parametrize("merge", ["bayesian", "observed"])
def test_padding_and_splitting_change_nothing(merge: Any) -> None:
    student, teacher, made = *models(), texts()
    shared = shared_tokens(letters(bos=True), words(bos=True))
    task = CrossTokenizer(merge=merge, shared=shared)
    method = HybridULD(matched=task.matched)

    def found(parts: list[list[AlignedExample]], side: str) -> tuple[Tensor, ...]:
        student.zero_grad()
        blocks = [rows_of(task, part, student, teacher, side) for part in parts]
        whole = float(sum(map(len, blocks)))
        loss = torch.stack([total(method(rows), rows, normalizer=whole) for rows in blocks]).sum()
        loss.backward()
        return loss.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)

    want = found([made], "right")
    assert want[0] > 0.1 and any(g.abs().max() > 1e-4 for g in want[1:])
    for parts in ([made], [made[:1], made[1:]], [[one] for one in made]):
        for side in ("left", "right"):
            torch.testing.assert_close(found(parts, side), want, rtol=1e-9, atol=1e-11)


def test_shared_tokens_come_first() -> None:
    student, teacher, made = *models(), texts()
    shared = shared_tokens(letters(bos=True), words(bos=True))
    task = CrossTokenizer(shared=shared)
    rows, plain = rows_of(task, made, student, teacher), rows_of(CrossTokenizer(), made, student, teacher)
    m = task.matched
    assert m == len(shared[0]) == 257
    for side, ids in ((rows.student, shared[0]), (rows.teacher, shared[1])):
        other = plain.student if side is rows.student else plain.teacher
        torch.testing.assert_close(side[:, :m], other[:, ids])
        torch.testing.assert_close(side[:, -1], other[:, -1])
        torch.testing.assert_close(
            torch.logsumexp(side, -1), torch.zeros(len(rows), dtype=torch.float64), atol=1e-9, rtol=0
        )
    torch.testing.assert_close(cross_entropy(rows), cross_entropy(plain))
    torch.testing.assert_close(ULD()(rows)["soft"], ULD()(plain)["soft"])


def test_a_token_that_is_all_but_certain_leaves_finite_numbers() -> None:
    made = texts()
    batch = collate_spans(made, pad=(256, END))
    task = CrossTokenizer(shared=shared_tokens(letters(bos=True), words(bos=True)))
    logits = []
    for name, width in (("student", 258), ("teacher", 302)):
        tokens = batch[name]["input_ids"].roll(-1, 1)
        logits.append((1e4 * nn.functional.one_hot(tokens, width)).float())
    for ours, theirs in (logits, (-logits[0], logits[1]), (logits[0], -logits[1])):
        leaf = ours.clone().requires_grad_()
        rows = task.rows(leaf, theirs, batch)[0]
        for method in (HybridULD(matched=task.matched), ULD(temperature=Sharpness(4.0))):
            loss = total(method(rows), rows)
            assert loss.isfinite() and torch.autograd.grad(loss, leaf, retain_graph=True)[0].isfinite().all()


def test_a_run_learns_from_a_teacher_of_another_tokenizer() -> None:
    made = texts() * 2
    batches = [collate_spans(made[i : i + 4], pad=(256, END)) for i in (0, 4)]
    task = CrossTokenizer(shared=shared_tokens(letters(bos=True), words(bos=True)))
    student, teacher = (model.float() for model in models())
    adam = partial(torch.optim.Adam, lr=2e-2)
    losses: list[float] = []
    method = HybridULD(matched=task.matched)
    how = {"task": task, "optimizer": adam, "epochs": 8, "quiet": True, "validation": batches[:1]}
    done = distill(
        student,
        teacher,
        batches,
        method=method,
        selfcheck=True,
        on_step=lambda _, loss: losses.append(float(loss)),
        **how,
    )
    assert losses[-1] < 0.6 * losses[0]
    assert {"loss", "accuracy", "perplexity"} == set(done.epochs[-1]["validation"])
    distill(student, None, batches, method=Supervised(), **how)


def test_a_batch_without_groups_is_zero() -> None:
    one = AlignedExample(texts()[0].student, texts()[0].teacher, tuple((-1,) * len(g) for g in texts()[0].groups))  # pyright: ignore
    student, teacher = models()
    rows = rows_of(CrossTokenizer(), [one], student, teacher)
    loss = total(ULD()(rows), rows)
    loss.backward()
    assert float(loss.detach()) == 0.0 and len(rows) == 0


def test_what_is_refused() -> None:
    batch, task = collate_spans(texts(), pad=(256, END)), CrossTokenizer()
    shape = batch["student"]["input_ids"].shape
    student, teacher = torch.zeros(*shape, 258), torch.zeros(*batch["teacher"]["input_ids"].shape, 302)
    with pytest.raises(ValueError, match="merge 'bayesian' or 'observed'"):
        CrossTokenizer(merge="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="as many on both sides and none twice"):
        CrossTokenizer(shared=([1, 1], [2, 3]))
    with pytest.raises(ValueError, match="the teacher has 302 logits, and no token 302"):
        CrossTokenizer(shared=([1], [302])).rows(student, teacher, batch)
    with pytest.raises(ValueError, match=r"needs batches with 'student'.*collate_spans"):
        task.inputs({"input_ids": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=rf"the teacher's logits of its whole vocabulary.* got \({shape[0]}, 3, 302\)"):
        task.rows(student, teacher[:, :3], batch)
    broken = {**batch, "teacher": {**batch["teacher"], "groups": batch["teacher"]["groups"].clamp_max(0)}}
    with pytest.raises(ValueError, match="not of one alignment"):
        task.rows(student, teacher, broken)


# methods


@needs_shared
@cases("llm_skd", "akl")
def test_uld_by_numbers(case: Case) -> None:  # noqa: F811
    student, teacher = (torch.tensor(case.values[f"{who}_logits"]).flatten(0, 1) for who in ("student", "teacher"))
    labels = torch.tensor(case.values["labels"]).flatten()
    leaf = student.requires_grad_()
    rows = Rows(leaf, teacher, labels)
    terms = ULD(hard=0.0)(rows)
    case.agree("uld_per_token", terms["soft"].view(case.values["uld_per_token"].shape))
    slope = torch.autograd.grad(total(terms, rows.replace(weight=(labels != -100).double())), leaf)[0]
    case.agree("uld_grad", slope.view(case.values["uld_grad"].shape))


def test_uld_is_blind_to_the_order_and_the_hybrid_is_not() -> None:
    rows = random_rows(5, 8)
    turned = rows.replace(student=rows.teacher[:, torch.randperm(8)])
    assert ULD.up_to_order and not HybridULD.up_to_order
    assert float(ULD()(turned)["soft"].abs().max()) < 1e-12
    assert float(HybridULD(matched=3)(turned)["exact"].mean()) > 1e-2
    fewer = rows.replace(student=torch.cat((rows.student[:, :5], torch.full((5, 3), -torch.inf).double()), 1))
    p, q = torch.softmax(rows.teacher, 1), torch.softmax(rows.student[:, :5], 1)
    want = [
        sum(abs(a - b) for a, b in zip(sorted(x, reverse=True), [*sorted(y, reverse=True), 0, 0, 0], strict=True))
        for x, y in zip(p.tolist(), q.tolist(), strict=True)
    ]
    torch.testing.assert_close(ULD()(fewer)["soft"], torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("matched", [0, 3, 8, 20])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_hybrid_is_a_divergence_of_what_is_shared_and_uld_of_the_rest(matched: int, beta: float) -> None:
    rows = random_rows(5, 8)
    got = HybridULD(matched=matched, beta=beta, exact=2.0, ranked=3.0)(rows)
    sides = []
    for z in (rows.student, rows.teacher):
        p = torch.softmax(z, 1)
        sides.append(torch.cat((p[:, :matched], p[:, matched:].sum(1, keepdim=True)), 1).log())
    folded = Rows(*sides)
    torch.testing.assert_close(got["exact"], 2.0 * jsd(folded, Static(1.0)(folded), beta=beta))
    p, q = (torch.softmax(z, 1)[:, matched:].sort(1).values for z in (rows.student, rows.teacher))
    torch.testing.assert_close(got["ranked"], 3.0 * (p - q).abs().sum(1))
    if matched >= 8:
        torch.testing.assert_close(got["exact"], 2.0 * jsd(rows, Static(1.0)(rows), beta=beta))


def test_the_hybrid_refuses() -> None:
    with pytest.raises(ValueError, match="matched >= 0"):
        HybridULD(matched=-1)
    with pytest.raises(ValueError, match=r"beta in \[0, 1\]"):
        HybridULD(matched=1, beta=2.0)
