"""Tasks of encoders: rows of texts, pairs and lists, their plain definitions in torch, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempering import teachers
from tempering.data import TextColumns
from tempering.data.glue import Labeled, TextPairLoader
from tempering.methods import DKD, DTKD, KD, RKD, SP, EmbeddingKD, MarginMSE, Method, RegressionKD, Sum, Supervised
from tempering.models import Encoder
from tempering.rows import Rows, total
from tempering.tasks import Embeddings, Ranking, Similarity, Task
from tempering.training.config import SelfCheckError
from tests.embedding_runs import CASES, N, linear, lists, run, texts
from tests.runs import cut, go, identical, left, stop_at


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(task: Task, method: Method, s: Tensor, t: Tensor | None, batch: Any, of: Any = None) -> Tensor:
    """The loss of a batch, a part of a step whose batch is ``of``."""
    (rows,) = task.rows(s, t, batch)
    method.setup(rows)
    return total(method(rows, 1.0), rows, normalizer=task.row_weights(batch if of is None else of)[rows.name])


def agree(got: Tensor, want: Tensor, leaf: Tensor) -> None:
    """Assert that two losses and their gradients are equal."""
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    slopes = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (got, want)]
    assert slopes[1].abs().sum() > 0
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# plain definitions


def test_embeddings_have_squared_errors_cosines_and_similarities() -> None:
    s, t, w = numbers(7, 3).requires_grad_(), numbers(7, 3, seed=1), torch.tensor([0.0, 1, 2, 1, 0.5, 1, 3]).double()
    batch = (numbers(7, 2), None, w)
    k = w > 0
    each = (s - t).square().mean(1) + 2.0 * (1 - (unit(s) * unit(t)).sum(1))
    agree(loss_of(Embeddings(), EmbeddingKD(cosine=2.0), s, t, batch), (each * w).sum() / w.sum(), s)
    gap = (unit(s[k]) @ unit(s[k]).T - unit(t[k]) @ unit(t[k]).T).square().mean(1)
    only = EmbeddingKD(mse=0.0, similarity=3.0)
    agree(loss_of(Embeddings(), only, s, t, batch), 3.0 * (gap * w[k]).sum() / w.sum(), s)
    assert only.is_batch_dependent() and not EmbeddingKD().is_batch_dependent()
    wide = numbers(7, 5, seed=2)  # no projection for similarities
    assert not list(only.projectors[0].parameters())
    loss_of(Embeddings(), EmbeddingKD(mse=0.0, similarity=1.0), s, wide, batch).backward()
    method = EmbeddingKD()
    got = loss_of(Embeddings(), method, s, wide, batch)
    project = method.projectors[0].double()
    agree(got, ((project(s) - wide).square().mean(1) * w).sum() / w.sum(), s)


def test_translations_go_to_the_embedding_of_the_source() -> None:
    sources, s = numbers(4, 6), numbers(8, 3).requires_grad_()
    t, weight = numbers(4, 3, seed=1), torch.tensor([1.0, 0.0, 2.0, 1.0]).double()
    batch = {"student": {"x": numbers(8, 6)}, "teacher": {"x": sources}, "labels": None, "weight": weight}
    task, ids = Embeddings(), torch.arange(4) + 10
    assert task.inputs(batch)[1]["x"] is sources
    want = ((s.view(2, 4, 3) - t).square().mean(2) * weight).sum() / (2 * weight.sum())
    agree(loss_of(task, EmbeddingKD(), s, t, batch), want, s)
    (rows,) = task.rows(s, t, {**batch, "ids": ids})
    assert rows.ids is not None and rows.ids.tolist() == ids.tolist() * 2


def test_pairs_have_cosines_as_numbers() -> None:
    s, t = numbers(10, 3).requires_grad_(), numbers(10, 4, seed=1)
    y = torch.tensor([0.5, torch.nan, 1.0, 0.0, -1.0]).double()
    batch, k = (numbers(10, 2), y), ~y.isnan()
    both = [(unit(x[:5]) * unit(x[5:])).sum(1) for x in (s, t)]
    want = (0.5 * (both[0] - both[1]).square()).mean() + (both[0] - y)[k].square().sum() / 5
    agree(loss_of(Similarity(), RegressionKD(soft=0.5), s, t, batch), want, s)
    want = (both[0] - y)[k].square().mean()
    agree(loss_of(Similarity(unlabeled="ignore"), Supervised(), s, None, batch), want, s)
    scores = numbers(5, 1, seed=3)  # of a cross-encoder
    want = (both[0] - scores[:, 0]).square().mean()
    agree(loss_of(Similarity(), RegressionKD(hard=0.0), s, scores, batch), want, s)
    method = EmbeddingKD()
    got = loss_of(Similarity(), method, s, t, batch)
    project = method.projectors[0].double()
    agree(got, (project(s) - t).square().mean(1).view(2, 5).sum(0).mean(), s)
    (rows,) = Similarity().rows(s, scores, batch)
    assert not rows.features


def plain_kd(s: Tensor, t: Tensor, T: float) -> Tensor:
    p = (t / T).softmax(1)
    return T * T * (p * ((t / T).log_softmax(1) - (s / T).log_softmax(1))).sum(1).mean()


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_candidates_are_classes(similarity: Any) -> None:
    q, k, s = 3, 4, numbers(3 + 12, 5).requires_grad_()
    x, y = s if similarity == "dot" else unit(s), torch.tensor([0, 3, -100])
    scores, batch = numbers(q * k, 1, seed=1), (numbers(15, 2), y)
    given = torch.stack([7.0 * x[3 + 4 * i : 7 + 4 * i] @ x[i] for i in range(q)])
    want = 0.9 * plain_kd(given, scores.view(q, k), 2.0) + 0.1 * F.cross_entropy(given[:2], y[:2]) * 2 / 3
    task = Ranking(similarity=similarity, scale=7.0)
    for output in (scores, scores.view(-1), scores.view(q, k)):
        agree(loss_of(task, KD(temperature=2.0), s, output, batch), want, s)
    task = Ranking(candidates="batch", similarity=similarity, scale=7.0)
    inside, t = 7.0 * x[:3] @ x[3:].T, numbers(15, 2, seed=2)
    u = t if similarity == "dot" else unit(t)
    want = plain_kd(inside, 7.0 * u[:3] @ u[3:].T, 2.0)
    agree(loss_of(task, KD(soft=1.0, hard=0.0, temperature=2.0), s, t, batch), want, s)
    mapping = {"sentence_embedding": s, "token_embeddings": s}
    torch.testing.assert_close(task.rows(mapping, None, batch)[0].student, inside)


def test_margins_are_those_of_the_relevant_candidate() -> None:
    s, t, y = numbers(4, 5).requires_grad_(), numbers(4, 5, seed=1), torch.tensor([2, -100, 0, 4])
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 3:], mask[3, 0] = False, False
    want = torch.zeros((), dtype=torch.float64)
    for i in (0, 2, 3):
        others = [j for j in range(5) if mask[i, j] and j != y[i]]
        gaps = [((s[i, y[i]] - s[i, j]) - (t[i, y[i]] - t[i, j])).square() for j in others]
        want = want + sum(gaps) / len(gaps) / 4
    batch = {"x": numbers(4, 5), "labels": y, "mask": mask}
    agree(loss_of(Ranking(), MarginMSE(), s, t, batch), want, s)


# padding, order and parts


@pytest.mark.parametrize("make", [KD, DKD, lambda: DTKD(warmup=0.0), lambda: MarginMSE(hard=0.5)])
def test_masked_candidates_their_order_and_empty_lists_do_not_count(make: Any) -> None:
    s, t, y = numbers(5, 4).requires_grad_(), 2.0 * numbers(5, 4, seed=1), torch.tensor([0, 1, 2, -100, 3])
    plain = loss_of(Ranking(), make(), s, t, (numbers(5, 2), y))
    (slope,) = torch.autograd.grad(plain, s)
    assert slope.isfinite().all() and slope.abs().sum() > 0
    wide = [torch.cat((z, numbers(5, 2, seed=5)), 1) for z in (s.detach(), t)]
    wide = [torch.cat((z, torch.full((1, 6), torch.nan))) for z in wide]  # and a query without candidates
    mask = torch.arange(6).expand(6, 6) < torch.tensor([4, 4, 4, 4, 4, 0]).unsqueeze(1)
    order = torch.tensor([3, 5, 0, 2, 4, 1])
    labels = torch.cat((order.argsort()[y.clamp_min(0)].masked_fill(y < 0, -100), torch.tensor([-100])))
    leaf = wide[0][:, order].requires_grad_()
    batch = {"x": numbers(6, 2), "labels": labels, "mask": mask[:, order]}
    padded = loss_of(Ranking(), make(), leaf, wide[1][:, order], batch)
    torch.testing.assert_close(padded, plain, rtol=1e-9, atol=1e-10)
    (moved,) = torch.autograd.grad(padded, leaf)
    torch.testing.assert_close(moved[:5, order.argsort()][:, :4], slope, rtol=1e-7, atol=1e-9)
    assert (moved[5] == 0).all() and (moved[~mask[:, order]] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_loss_does_not_depend_on_split_or_order(name: str) -> None:
    case, data = CASES[name], CASES[name].data()
    with torch.no_grad():
        s, t = case.student().double()(data[0]).requires_grad_(), case.teacher().double()(data[0])
    method, task = case.method(), case.task()
    method.setup(task.rows(s, t, data)[0])
    method.setup = lambda rows: None  # type: ignore
    method.double()
    whole = loss_of(task, method, s, t, data)
    sizes = (5, 1, 11, 7)
    pieces = zip(s.split(sizes), t.split(sizes), cut(data, *sizes), strict=True)
    parts = torch.stack([loss_of(task, method, a, b, part, data) for a, b, part in pieces]).sum()
    agree(parts, whole, s)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    agree(loss_of(task, method, s[order], t[order], tuple(x[order] for x in data)), whole, s)


@pytest.mark.parametrize("name", CASES)
def test_parts_of_a_step_and_a_resumed_run(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint_every": 1, "selfcheck": True, "steps": 4, "skip_checks": ("above chance",)}
    x = CASES[name].data()[0]
    options["test"] = [(x, x[: N // 2, 0]) if name == "projected" else CASES[name].data()]
    run(name, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(name, tmp_path / "stopped", **options, on_step=stop_at(1))
    run(name, tmp_path / "stopped", **options)
    assert identical(left(tmp_path / "whole"), left(tmp_path / "stopped"))
    case = CASES[name]
    parts = run(name, None, steps=2, accumulate=2, max_grad_norm=1e9)
    torch.manual_seed(4)
    together = go(
        [case.data()], student=case.student().double(), teacher=case.teacher().double(), task=case.task(),
        method=case.method(), steps=2, precision="64-true", selfcheck=False,
    )  # fmt: skip
    for p, q in zip(parts.student.parameters(), together.student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_candidates_of_the_batch_are_not_split() -> None:
    batch = (numbers(9, 6), torch.arange(4))
    task = Ranking(candidates="batch")
    more: dict[str, Any] = {"task": task, "method": KD(), "precision": "64-true", "steps": 1}
    go([batch], student=linear(3, 1).double(), teacher=linear(5, 2).double(), **more)
    with pytest.raises(ValueError, match=r"rows of tasks.Ranking depend on the whole batch.*accumulate=2"):
        go([batch] * 2, student=linear(3, 1).double(), teacher=linear(5, 2).double(), **more, accumulate=2)


# scores


def test_scores_are_those_of_their_definitions() -> None:
    from scipy.stats import pearsonr, spearmanr

    x, y = numbers(12, 3), torch.tensor([0.1, 0.5, torch.nan, 0.9, 0.0, 0.3]).double()
    known = ~y.isnan()
    want = F.cosine_similarity(x[:6], x[6:])
    theirs = F.cosine_similarity(x[:6, :2], x[6:, :2])
    parts = [(torch.cat((x[a:b], x[6 + a : 6 + b])), y[a:b]) for a, b in ((0, 2), (2, 6))]
    for task in (Embeddings(), Similarity()):
        got = task.score(nn.Identity(), parts, teacher=lambda z, ids: z[:, :2])
        assert got["spearman"] == pytest.approx(spearmanr(want[known], y[known]).statistic, abs=1e-6)
        assert got["pearson"] == pytest.approx(pearsonr(want[known], y[known]).statistic, abs=1e-6)
        assert got["spearman_teacher"] == pytest.approx(spearmanr(want[known], theirs[known]).statistic, abs=1e-6)
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 9.0], [0.0, 1.0, 2.0, 3.0]])
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2, 3] = False
    batch = {"x": z, "labels": torch.tensor([0, 3, 0, -100]), "mask": mask}  # ranks 1, 3, 3
    got = Ranking().score(nn.Identity(), [batch], teacher=lambda z, ids: -z)
    assert got["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert got["ndcg"] == pytest.approx((1 + 0.5 + 0.5) / 3) and got["accuracy"] == pytest.approx(1 / 3)
    assert got["agreement"] == 0.0
    masked = z.masked_fill(~mask, -torch.inf)[:3]
    assert got["loss"] == pytest.approx(float(F.cross_entropy(masked, torch.tensor([0, 3, 0]))))
    soft = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    got = Ranking(top=2).score(nn.Identity(), [(z[:1], soft)])
    ideal = 1 + 1 / torch.log2(torch.tensor(3.0))
    assert got["mrr"] == 0.5 and got["ndcg"] == pytest.approx(float((1 / torch.log2(torch.tensor(3.0))) / ideal))


# encoders and teachers


def test_encoders_pool_without_padding() -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**sizes, intermediate_size=8), add_pooling_layer=False).eval()
    ids = torch.randint(1, 16, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids), "extra": ids}
    for pooling, of in (("mean", lambda h: h.mean(1)), ("cls", lambda h: h[:, 0])):
        got = Encoder(model, pooling=pooling)(inputs)
        for i, length in enumerate((5, 3, 2)):
            alone = model(input_ids=ids[i : i + 1, :length]).last_hidden_state
            torch.testing.assert_close(got[i : i + 1], of(alone), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(Encoder(model, pooling=pooling, normalize=True)(inputs), unit(got))
    left_padded = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    states = model(**left_padded).last_hidden_state
    torch.testing.assert_close(Encoder(model, pooling="cls")(left_padded)[2], states[2, 3])
    student, teacher = Encoder(model), linear(4, 1)
    with pytest.raises(ValueError, match=r"models.Encoder\(model, pooling='mean'\)"):
        Embeddings().rows(model(input_ids=ids), None, (ids, None))
    with pytest.raises(ValueError, match="needs a mapping with input_ids"):
        student(ids)  # type: ignore
    with pytest.raises(ValueError, match="'mean' or 'cls'; got 'max'"):
        Encoder(model, pooling="max")  # type: ignore
    with pytest.raises(ValueError, match=r"takes input_ids, or a SentenceTransformer"):
        Encoder(Wrapped(teacher))(inputs)


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"tokens": inputs["input_ids"]}


class Bag(nn.Module):
    """The mean of the vectors of a text's words."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(16, size)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (self.words(inputs["input_ids"]) * mask).sum(1) / mask.sum(1).clamp_min(1)


class Letters:
    """A tokenizer of letters, padded by 0."""

    pad_token_id, pad_token, padding_side = 0, "[PAD]", "right"

    def __call__(self, texts: list[str], *pairs: Any, **options: Any) -> dict[str, list[list[int]]]:
        ids = [[1 + ord(c) % 15 for c in text] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]}


def test_a_cached_teacher_has_the_embeddings_of_the_live_one(tmp_path: Path) -> None:
    part = Labeled([(word,) for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")], [0, 1] * 4)
    loader = TextPairLoader(part, Letters(), batch_size=4, shuffle=True, length=8)
    live = teachers.Live(Bag(5, 1))
    cache = teachers.record(live, loader, tmp_path / "cache", precision="fp32", quiet=True)
    trained = []
    for teacher in (live, cache):
        torch.manual_seed(3)
        made = go(loader, student=Bag(3, 2), teacher=teacher, task=Embeddings(), method=EmbeddingKD(), steps=6)
        trained.append(made.student.get_parameter("words.weight"))
    torch.testing.assert_close(*trained)
    assert (trained[0] - Bag(3, 2).words.weight).abs().max() > 1e-4


def test_stored_scores_teach_as_inputs_of_an_identity() -> None:
    x, y = lists()
    scores = numbers(N, 4, seed=9)
    task = Ranking()
    batch = {"student": x, "teacher": scores, "labels": y}
    with pytest.raises(ValueError, match="finds no inputs"):
        task.inputs({"labels": y})
    student, teacher, _ = task.inputs(batch)
    assert student is x and teacher is scores
    more: dict[str, Any] = {"task": task, "method": KD(), "precision": "64-true", "steps": 2}
    go(
        [batch],
        student=CASES["ranked"].student().double(),
        teacher=nn.Identity(),
        skip_checks=("above chance",),
        **more,
    )


# refused before training


@pytest.mark.parametrize(
    ("method", "reason"),
    [(KD(), "KD does not suit tasks.Embeddings: .*methods.EmbeddingKD"), (RegressionKD(), "RegressionKD does not suit"),
     (Sum(EmbeddingKD(), DTKD(hard=0.0)), "DTKD does not suit"), (Supervised(), "Supervised does not suit")],
)  # fmt: skip
def test_methods_without_a_meaning_are_refused_by_name(method: Any, reason: str) -> None:
    with pytest.raises(SelfCheckError, match=reason):
        run("projected", None, method=method, selfcheck=True)


@pytest.mark.parametrize("method", [RKD(), SP(feature=1.0), EmbeddingKD(mse=0.0, similarity=1.0)])
def test_relations_move_the_student(method: Any) -> None:
    torch.manual_seed(0)
    student = linear(3, 1).double()
    before = student[0].weight.detach().clone()  # type: ignore
    go([texts()], student=student, teacher=linear(5, 2).double(), task=Embeddings(), method=method, steps=2,
       precision="64-true")  # fmt: skip
    assert (student[0].weight - before).abs().max() > 1e-5  # type: ignore


X, Y = torch.zeros(6, 3), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("task", "student", "batch", "reason"),
    [
        (Embeddings(), X, (torch.zeros(5, 3), None), "got 6 of the student for 5 texts"),
        (Embeddings(), X[:, 0], (X, None), r"embeddings \(M, D\) of the student"),
        (Embeddings(), torch.zeros(6, 3, 3), (X, None), r"needs embeddings \(M, D\), or scores, of the student"),
        (Embeddings(), X, (X, None, torch.ones(4)), "one weight per text; got 4 for 6 texts"),
        (Similarity(), X, (X, torch.zeros(3, dtype=torch.long)), "labels .N,. of floating point"),
        (Similarity(), X, (X, torch.zeros(4)), "4 pairs are 8 texts"),
        (Ranking(), X[:5], (X, Y), "Q = 2 queries.*student returns .5, 3."),
        (Ranking(), X, (X, None), "needs labels, one per query"),
        (Ranking(), X, {"x": X, "labels": Y, "mask": torch.ones(2, 3)}, r"mask \(2, 2\).*got \(2, 3\)"),
        (Ranking(), X, {"x": X, "labels": Y, "mask": torch.tensor([[0, 1], [1, 1]])}, "mask leaves out"),
    ],
)  # fmt: skip
def test_bad_batches_are_named(task: Any, student: Any, batch: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        task.rows(student, None, batch)


def test_other_candidates_sizes_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits of the same candidates; got \(2, 2\).*\(2, 3\)"):
        Ranking().rows(X, torch.zeros(6), (X, Y))
    rows = Rows(X[:, :1], X[:, :1], features={"embedding": (X, torch.zeros(6, 4))})
    with pytest.raises(ValueError, match=r"projection=False.*\(3, 4\)"):
        EmbeddingKD(projection=False).setup(rows)
    both = rows.replace(features={**rows.features, "other": (X, X)})
    with pytest.raises(ValueError, match="one projection for all names"):
        EmbeddingKD().setup(both)
    for make in (lambda: Ranking(candidates="all"), lambda: Ranking(scale=0.0), lambda: Similarity(unlabeled="no")):  # type: ignore
        with pytest.raises(ValueError, match="needs"):
            make()
    for task, batches in ((Embeddings(), [(X, None)]), (Ranking(), [(X, torch.full((2,), -100))])):
        with pytest.raises(ValueError, match="nothing to score"):
            task.score(nn.Identity(), batches)


class Padded(Letters):
    """Letters, as tensors."""

    def __call__(self, texts: list[str], *pairs: Any, **options: Any) -> dict[str, Any]:
        words = [a + "|" + b for a, b in zip(texts, pairs[0], strict=True)] if pairs else texts
        ids = [torch.tensor(i, dtype=torch.long) for i in super().__call__(words)["input_ids"]]
        return {"input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True)}


def test_columns_of_texts_are_batches() -> None:
    lists = [(("a", "b", "c", "d"), 2, [1.0, 2.0, 3.0]), (("e", "f", "g"), -1, [4.0, 5.0])]

    def words(*texts: str) -> Tensor:
        return Padded()([*texts])["input_ids"]

    plain = [sample[:2] for sample in lists]
    got = TextColumns(Padded(), teacher_sees="pairs")(plain)
    assert torch.equal(got["student"]["input_ids"], words("a", "e", "b", "c", "d", "f", "g", ""))
    assert torch.equal(got["teacher"]["input_ids"], words("a|b", "a|c", "a|d", "e|f", "e|g", "e|"))
    assert got["labels"].tolist() == [2, -1] and got["mask"].tolist() == [[True] * 3, [True, True, False]]
    got = TextColumns(Padded())(lists)
    assert got["teacher"].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]
    got = TextColumns(Padded(), candidates="batch")([*plain, (("h", "i"), 0)])
    assert torch.equal(got["student"]["input_ids"], words("a", "e", "h", "b", "c", "d", "f", "g", "i"))
    assert got["labels"].tolist() == [2, -1, 5] and "mask" not in got
    got = TextColumns(Padded(), teacher_sees="first")([("a", "b"), ("c", "d")])
    assert torch.equal(got["teacher"]["input_ids"], words("a", "c")) and got["labels"] is None
    student, teacher, _ = Embeddings().inputs(got)
    assert torch.equal(student["input_ids"], words("a", "c", "b", "d")) and len(teacher["input_ids"]) == 2
    with pytest.raises(ValueError, match="all of one form"):
        TextColumns(Padded())([plain[0], ("e", "f")])
    with pytest.raises(ValueError, match="teacher_sees 'texts', 'first' or 'pairs'"):
        TextColumns(Padded(), teacher_sees="all")  # type: ignore
