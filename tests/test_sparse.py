"""Few tokens of many: the bucket, the unbiased samples, and their recordings."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tempering import distill
from tempering.data.text import TextExample
from tempering.data.tokens import Tokens
from tempering.integrations.common import fitting
from tempering.methods import DTKD, KD, Divergence  # pyright: ignore[reportAttributeAccessIssue]
from tempering.objectives import cross_entropy, jsd, kl, reverse_kl
from tempering.rows import IGNORE_INDEX, Rows, total
from tempering.tasks import LanguageModeling
from tempering.teachers import CachedTopK, Live, Teacher, TopKTeacher, record_top_k
from tempering.teachers.outputs import Sparse, to_top_k_plus_tail
from tempering.teachers.selection import count_samples, entropy_not_sampled, keep_samples, keep_top_k
from tempering.temperature import Static
from tempering.training.selfcheck import selfcheck
from tests.conftest import random_rows
from tests.paths import needs_shared
from tests.test_generation import PAD, V, gpt2, texts
from tests.test_golden import Case, case, cases  # noqa: F401


def of(rows: Rows, kept: Sparse) -> Rows:
    student, teacher, target = to_top_k_plus_tail(rows.student, kept, rows.target)
    return Rows(student, teacher, target, rows.weight)


@needs_shared
@cases("llm_topk", "k8", "k1", "k32_T")
def test_the_numbers_of_trl_and_of_dense_formulas(case: Case) -> None:  # noqa: F811
    c, tau = case.config, case.config["temperature"]
    student, teacher = (torch.tensor(case.values[f"{who}_logits"]) for who in ("student", "teacher"))
    labels = torch.tensor(case.values["labels"]).flatten()
    leaf, T = student.flatten(0, 1).requires_grad_(), Static(1.0)(random_rows(1))
    rows = Rows(leaf / tau, teacher.flatten(0, 1) / tau, labels, (labels != IGNORE_INDEX).double())
    kept = keep_top_k(teacher, c["top_k"], temperature=tau)
    case.agree("topk_ids", kept.ids)
    case.agree("topk_logprobs", kept.logp)
    case.agree("teacher_tail_mass", kept.tail_logp.exp())
    flat = kept.gather_positions(torch.arange(len(rows)), tuple(labels.view(teacher.shape[:2]).shape))
    found = of(rows, flat)
    case.agree("student_tail_mass", found.student[:, -1].exp().view(teacher.shape[:2]))

    def both(key: str, value: Tensor, grad: str) -> None:
        case.agree(key, value)
        if grad in case.values:
            slope = torch.autograd.grad(value, leaf, retain_graph=True)[0]
            case.agree(grad, slope.view(case.values[grad].shape))

    both("tail_fkl", total({"kl": kl(found, T)}, found), "grad_tail_fkl")
    both("trl_tail", total({"kl": kl(found, T)}, found), "grad_trl_tail")
    both("tail_rkl", total({"kl": reverse_kl(found, T)}, found), "grad_tail_rkl")
    both("tail_jsd", total({"kl": jsd(found, T, beta=c["jsd_beta"])}, found), "grad_tail_jsd")
    case.agree("full_fkl", total({"kl": kl(rows, T)}, rows))
    samples = count_samples(torch.tensor(case.values["rs_sample_ids"]).flatten(0, 1), dtype=torch.float64)
    found = of(rows, samples)
    both("rs_kl", total({"kl": kl(found, T)}, found), "grad_rs")


@pytest.mark.parametrize("k", [1, 3, 5])
def test_never_negative_zero_at_agreement_and_below_the_whole(k: int) -> None:
    rows, T = random_rows(8, 7), Static(1.0)(random_rows(8, 7))
    kept = keep_top_k(rows.teacher, k, besides=rows.target)
    assert kept.ids.shape == (8, k + 1) and all(len(set(ids)) == k + 1 for ids in kept.ids.tolist())
    mass = torch.cat((kept.logp, kept.tail_logp[:, None]), -1).exp().sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-12, atol=0.0)
    for objective in (kl, reverse_kl, jsd):
        value = objective(of(rows, kept), T)
        assert (value > 0).all() and (value <= objective(rows, T) + 1e-12).all()
        assert objective(of(rows.replace(student=rows.teacher), kept), T).abs().max() < 1e-12
    # the label is among the kept tokens, so the hard term is exact
    torch.testing.assert_close(cross_entropy(of(rows, kept)), cross_entropy(rows), rtol=1e-12, atol=1e-13)


def test_all_tokens_kept_are_the_dense_loss_and_extremes_are_finite() -> None:
    rows = random_rows(6, 7)
    leaf = rows.student.clone().requires_grad_()
    rows = rows.replace(student=leaf)
    kept = keep_top_k(rows.teacher, 7)
    assert torch.isneginf(kept.tail_logp).all()
    method = KD(temperature=Static(3.0))
    want = total(method(rows), rows)
    found = of(rows, kept)
    got = total(method(found), found)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaf), torch.autograd.grad(want, leaf), strict=True):
        torch.testing.assert_close(a, b)
    for scale in (1e4, 0.0):
        far = rows.replace(student=(scale * rows.student.detach()).requires_grad_(), teacher=scale * rows.teacher)
        found = of(far, keep_top_k(far.teacher, 2, besides=far.target))
        loss = total(KD()(found), found)
        (slope,) = torch.autograd.grad(loss, far.student)
        assert loss.isfinite() and slope.isfinite().all() and loss >= 0


def test_samples_are_unbiased_and_a_label_that_was_not_drawn_has_no_part() -> None:
    rows, T = random_rows(2, 5, scale=1.0), Static(1.0)(random_rows(1))
    leaf = rows.student.clone().requires_grad_()
    rows = rows.replace(student=leaf)
    (want,) = torch.autograd.grad(total({"kl": kl(rows, T)}, rows), leaf)
    generator, n = torch.Generator().manual_seed(0), 4000
    many = Rows(leaf.repeat(n, 1), rows.teacher.repeat(n, 1), rows.target.repeat(n))  # pyright: ignore
    kept = keep_samples(many.teacher, 6, besides=many.target, generator=generator)
    found = of(many, kept)
    (slope,) = torch.autograd.grad(total({"kl": kl(found, T)}, found), leaf, retain_graph=True)
    torch.testing.assert_close(slope, want, rtol=0.0, atol=0.01)
    assert (found.target >= 0).all() and (kl(found, T) >= 0).all()  # pyright: ignore[reportOptionalOperand]
    torch.testing.assert_close(cross_entropy(found), cross_entropy(many))
    shares = torch.zeros_like(many.teacher).scatter_add_(1, kept.ids, kept.logp.exp())
    torch.testing.assert_close(shares.sum(-1), torch.ones(2 * n).double())
    torch.testing.assert_close(shares.view(n, 2, 5).mean(0), rows.teacher.softmax(-1), rtol=0.0, atol=0.02)


def data(**options: Any) -> Tokens:
    return Tokens(texts(), batch_size=2, pad=PAD, **options)


def kept_of(seed: int = 1, **how: Any) -> TopKTeacher:
    model = gpt2(12, seed).float()
    LanguageModeling().prepare_model(model)
    return TopKTeacher(Live(model), **how)


@pytest.mark.parametrize("how", [{"top": 4}, {"samples": 6}])
def test_a_recording_answers_as_the_teacher_and_trains_as_it(tmp_path: Path, how: dict[str, int]) -> None:
    teacher, task, tokens = kept_of(**how), LanguageModeling(), data()
    ask = partial(record_top_k, inputs=task.inputs, quiet=True)
    cached = ask(teacher, tokens, tmp_path / "kept")
    for batch in tokens:
        _, inputs, ids = task.inputs(batch)
        place, shape = task._positions(batch)[0], tuple(batch["input_ids"].shape)
        live, found = (source(inputs, ids).gather_positions(place, shape) for source in (teacher, cached))
        for kept in (live, found):
            assert (kept.ids[:, -1] == batch["input_ids"].flatten()[place + 1]).all() or "top" in how
        dense = [
            torch.full((len(place), V), -torch.inf).scatter_reduce(1, k.ids, k.logp, "amax") for k in (live, found)
        ]
        torch.testing.assert_close(dense[1], dense[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.tail_logp, live.tail_logp, rtol=1e-4, atol=1e-4)
    losses = []
    for source in (teacher, cached):
        student = gpt2(8, 0).float()
        options: dict[str, Any] = {"task": task, "epochs": 1, "quiet": True, "selfcheck": False, "test": data()}
        run = distill(student, source, tokens, method=Divergence(objective="kl", hard=0.5), **options)
        losses.append(run.best["test"])
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-4)
    again = ask(teacher, tokens, tmp_path / "kept")
    assert again.identity == cached.identity


def test_samples_are_refused_where_they_are_biased(tmp_path: Path) -> None:
    task, tokens, live = LanguageModeling(), data(), kept_of(samples=6)
    cached = record_top_k(live, tokens, tmp_path / "s", inputs=task.inputs, quiet=True)
    unbiased = (KD(temperature=Static(1.0)), Divergence(objective="kl", hard=0.5, temperature=1.0))
    biased = (
        KD(temperature=Static(4.0)),
        Divergence(objective="kl", temperature=4.0),
        Divergence(objective="reverse_kl"),
        Divergence(objective="jsd"),
        DTKD(),
    )
    for teacher in (live, cached):
        for method in unbiased:
            assert fitting(method, teacher, gpt2(8, 0)) is teacher
        for method in biased:
            why = rf"{type(method).__name__} does not suit a teacher of 6 sampled tokens.*TopKTeacher\(teacher, top=16"
            with pytest.raises(ValueError, match=why):
                fitting(method, teacher, gpt2(8, 0))
            with pytest.raises(ValueError, match=why):
                distill(gpt2(8, 0).float(), teacher, tokens, method=method, task=task, epochs=1, quiet=True)
    assert fitting(biased[2], kept_of(top=3), gpt2(8, 0)) is not None


def test_a_recording_is_refused_for_anything_else(tmp_path: Path) -> None:
    task, path = LanguageModeling(), tmp_path / "kept"
    ask = partial(record_top_k, path=path, inputs=task.inputs, quiet=True)
    ask(kept_of(top=3), data())
    with pytest.raises(ValueError, match="its teacher is"):
        ask(kept_of(top=4), data())
    other = Tokens([*texts()[:4], TextExample((1, 2, 3), (False, True, True))], batch_size=2, pad=PAD)
    with pytest.raises(ValueError, match="contains outputs for other data"):
        CachedTopK(path, batches=other)
    with pytest.raises(ValueError, match="contains outputs for other data"):
        distill(gpt2(8, 0), CachedTopK(path), other, method=KD(), task=task, epochs=1, quiet=True)
    held = json.loads((path / "key.json").read_text())
    assert held["rows"] == 5 and held["format"] == 2
    file = path / "00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="was changed since it was recorded"):
        CachedTopK(path)
    with pytest.raises(ValueError, match="needs precision 'fp32' or 'fp16'; got 'bf16'"):
        ask(kept_of(top=3), data(), precision="bf16")


class Said(Teacher):
    """Answers the same to whatever it is asked; ``identity`` is its name."""

    def __init__(self, found: Sparse) -> None:
        self.found, self.identity = found, "said"

    def __call__(self, inputs: Any, ids: torch.Tensor | None) -> Sparse:
        assert ids is not None
        return Sparse(*(x[ids] for x in (self.found.ids, self.found.logp, self.found.tail_logp)))


@pytest.mark.parametrize(("vocabulary", "width"), [(200, 1), (65_536, 2), (65_537, 3), (151_936, 3)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_stored_is_what_was_said_in_few_bytes(
    tmp_path: Path, vocabulary: int, width: int, precision: str
) -> None:
    task, tokens, generator = LanguageModeling(), data(), torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 14, vocabulary, generator=generator)
    logits[..., -1] += 20.0 * torch.rand(5, 14, generator=generator)  # the last id is among the kept
    logits[0, 3] = torch.linspace(-1e5, 0.0, vocabulary)  # far below what half precision says
    said = keep_top_k(logits, 16, besides=torch.randint(vocabulary, (5, 14), generator=generator))
    cached = record_top_k(Said(said), tokens, tmp_path / "s", inputs=task.inputs, precision=precision, quiet=True)
    assert isinstance(cached, CachedTopK)
    ids = torch.tensor([3, 0, 4])
    batch = tokens.gather(ids)[0]
    answer, learned = cached(task.inputs(batch)[1], ids), task.learned(batch)
    assert answer.stored is not None and torch.equal(answer.stored, learned) and answer.logp[~learned].isnan().all()
    found, want = (Sparse(*(x[learned] for x in (s.ids, s.logp, s.tail_logp))) for s in (answer, Said(said)({}, ids)))
    assert torch.equal(found.ids, want.ids) and found.logp.dtype == found.tail_logp.dtype == torch.float32
    assert torch.equal(torch.isneginf(found.logp), torch.isneginf(want.logp))
    held = cached.file("00000.safetensors")
    each, value = held.get_tensor("ids").shape[-1], held.get_tensor("logp").element_size()
    assert (each, value) == (width, 4 if precision == "fp32" else 2)
    size, rows = (
        (tmp_path / "s" / "00000.safetensors").stat().st_size,
        int(task.learned(tokens.gather(torch.arange(5))[0]).sum()),
    )
    assert rows == 25 and size < rows * (17 * (width + value) + value) + 24 * 5 + 700  # and a header
    want, got = (torch.cat((s.logp, s.tail_logp[..., None]), -1).double() for s in (want, found))
    if precision == "fp32":
        assert torch.equal(got, want)
    assert got.logsumexp(-1).abs().max() < (1e-5 if precision == "fp32" else 1e-6)
    p, q = want - want.logsumexp(-1, keepdim=True), got - got.logsumexp(-1, keepdim=True)
    apart = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
    assert apart.max() < 1e-6 and (p.exp() - q.exp()).abs().sum(-1).max() / 2 < 3e-4
    assert len(cached({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, ids[:0]).ids) == 0
    # a student that says what the teacher said
    place, student = learned[0].nonzero().flatten(), logits[3][learned[0]].clone()
    mine, taught, _ = to_top_k_plus_tail(student, answer.gather_positions(place, (3, 14)))
    loss = kl(Rows(mine, taught), Static(1.0)(random_rows(1)))
    assert (loss >= 0).all() and loss.max() < 2e-6


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="one of top and samples"):
        TopKTeacher(Live(gpt2(8, 0)), top=3, samples=3)
    with pytest.raises(ValueError, match="1 <= k <= 7"):
        keep_top_k(torch.zeros(2, 7), 8)
    with pytest.raises(ValueError, match="samples >= 1"):
        keep_samples(torch.zeros(2, 7), 0)
    with pytest.raises(ValueError, match="has token 6, and the student has 5"):
        to_top_k_plus_tail(torch.zeros(1, 5), keep_top_k(torch.arange(7.0)[None], 2))
    with pytest.raises(ValueError, match=r"outputs have \(2,\) positions, and the batch has \(1, 3\)"):
        keep_top_k(torch.zeros(2, 7), 2).gather_positions(torch.tensor([0]), (1, 3))
    with pytest.raises(ValueError, match="no longer than length=2"):
        data(length=2)
    with pytest.raises(ValueError, match="no 2 views"):
        data().replay(2)


def test_the_order_of_tokens_is_drawn_anew_every_epoch_and_starts_anywhere() -> None:
    tokens = data(seed=3)
    first = [batch["ids"].tolist() for batch in tokens]
    tokens.set_epoch(1)
    second = [batch["ids"].tolist() for batch in tokens]
    assert first != second and sorted(i for ids in second for i in ids) == list(range(5)) and len(tokens) == 3
    assert [batch["ids"].tolist() for batch in tokens.iterate(2)] == second[2:]


@pytest.mark.parametrize(
    ("classes", "samples", "sharpness"), [(12, 8, 1.5), (12, 50, 1.5), (2000, 50, 3.0), (2000, 12, 3.0)]
)
def test_a_loss_of_samples_exceeds_the_kl_and_the_self_check_tells_by_how_much(
    classes: int, samples: int, sharpness: float
) -> None:
    rows = random_rows(200, classes, scale=sharpness)
    kept = keep_samples(rows.teacher, samples, generator=torch.Generator().manual_seed(0))
    T = Static(1.0)(random_rows(1))
    excess = float((kl(of(rows, kept), T) - kl(rows, T)).mean())
    assert excess > 0.05
    assert 0.5 * excess < float(entropy_not_sampled(kept, samples)) < 1.25 * excess


def test_the_line_of_the_self_check_names_the_excess() -> None:
    method = Divergence(objective="kl", temperature=1)
    student = gpt2(8, 0).float()
    LanguageModeling().prepare_model(student)
    for how, told in (({"samples": 6}, True), ({"top": 4}, False)):
        line = selfcheck(
            student,
            kept_of(**how),
            next(iter(data())),
            method=method,
            task=LanguageModeling(),
            skip=["above chance"],
        ).line
        assert ("samples (the logged loss lies above the KL, by about " in line) == told
