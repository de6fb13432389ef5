"""Distillation by policy gradients: its expected gradient, summed over all texts, is that of the reverse KL."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tempering.kernels.linear import linear_loss
from tempering.methods import PolicyGradient  # pyright: ignore[reportAttributeAccessIssue]
from tempering.objectives import reverse_kl
from tempering.rollouts import OnPolicy, Sampling, SequenceLevel, Speculative
from tempering.rows import Rows, total
from tempering.tasks import LanguageModeling
from tempering.teachers import Live, TopKTeacher
from tempering.temperature import Temperatures
from tests.cases import each
from tests.conftest import random_rows
from tests.test_generation import EOS, PAD, V, gpt2, llama
from tests.test_on_policy import loader

ONE = Temperatures(torch.ones(1, 1), torch.ones(1, 1))
LENGTH = 3


class Language:
    """All texts of three tokens, and a distribution over them: logits, (V^t, V), of the token after every start."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size, self.texts = size, torch.tensor(list(itertools.product(range(size), repeat=LENGTH)))
        self.logits = [torch.randn(size**t, size, generator=generator, dtype=torch.float64) for t in range(LENGTH)]

    def trained(self) -> list[Tensor]:
        return [z.requires_grad_() for z in self.logits]

    def rows(self) -> Tensor:
        """The logits before every token of every text, (V^3, 3, V)."""
        starts = [torch.zeros(len(self.texts), dtype=torch.long)]
        for t in range(LENGTH - 1):
            starts.append(starts[-1] * self.size + self.texts[:, t])
        return torch.stack([z[start] for z, start in zip(self.logits, starts, strict=True)], 1)

    def log_probs(self) -> Tensor:
        """Of every token of every text, (V^3, 3)."""
        return self.rows().log_softmax(-1).gather(-1, self.texts[..., None])[..., 0]


def made(student: Language, teacher: Language, sampled_from: Language) -> Rows:
    n = len(student.texts)
    text, position = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(LENGTH) + 4, indexing="ij"))
    with torch.no_grad():
        taught, log_prob = teacher.rows().flatten(0, 1), sampled_from.log_probs().flatten()
    fields: dict[str, Any] = {"sampled_id": student.texts.flatten(), "text": text, "positions": position}
    return Rows(student.rows().flatten(0, 1), taught, rollout_log_prob=log_prob, **fields)


def shuffled(rows: Rows, *per_row: Tensor) -> tuple[Rows, ...]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows.select(order), *(x[order] for x in per_row)


@each("size, discount, importance", [(s, d, i) for s in (5, 3) for d in (0.0, 0.6, 1.0) for i in (False, True)])
def test_the_expected_gradient_is_that_of_the_reverse_kl(size: int, discount: float, importance: bool) -> None:
    """Of sequences with discount 1, of tokens given the text before with 0, and of what is between them between."""
    student, teacher = Language(size, 0), Language(size, 1)
    wanted = student.trained()
    with torch.no_grad():
        chance = student.log_probs().sum(-1).exp()
    rows, weights = shuffled(made(student, teacher, student), chance.repeat_interleave(LENGTH))
    terms = PolicyGradient(discount=discount, importance=importance)(rows)
    assert set(terms) == {"soft"} and terms["soft"].shape == (len(rows),)
    expected = (weights * terms["soft"]).sum()
    got = torch.autograd.grad(expected, wanted)

    q, p = student.log_probs(), teacher.log_probs()
    sequences = (q.sum(-1).exp() * (q - p).sum(-1)).sum()
    if discount == 0.0:
        torch.testing.assert_close(expected, sequences, rtol=1e-10, atol=1e-12)
    if discount == 1.0:
        want = torch.autograd.grad(sequences, wanted)
    else:  # the slope of the probability of each text in its token t, times the reward of token u
        chances = [(q.detach().sum(-1) - q[:, t].detach() + q[:, t]).exp() for t in range(LENGTH)]
        pairs = [(t, u) for t in range(LENGTH) for u in range(t, LENGTH)]
        parts = [discount ** (u - t) * (chances[t] * (q - p)[:, u].detach()).sum() for t, u in pairs]
        want = torch.autograd.grad(torch.stack(parts).sum(), wanted)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@each("size", [5, 3])
def test_importance_makes_up_for_tokens_of_other_weights(size: int) -> None:
    """Summed over the texts of another distribution: the reverse KL of each token, given the texts of the other."""
    student, teacher, other = (Language(size, seed) for seed in range(3))
    wanted = student.trained()
    chance = other.log_probs().sum(-1).exp()
    rows = made(student, teacher, other)
    terms = PolicyGradient(importance=True)(rows)["soft"].view(-1, LENGTH)
    got = torch.autograd.grad((chance[:, None] * terms).sum(), wanted, retain_graph=True)
    tokens = reverse_kl(rows, ONE).view(-1, LENGTH)
    want = torch.autograd.grad((chance[:, None] * tokens).sum(), wanted)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((chance[:, None] * terms).sum(), (chance[:, None] * tokens).sum(), rtol=1e-9, atol=0.0)


@each("clip", [0.0, 0.2])
def test_terms_and_slopes_are_those_of_the_definition(clip: float) -> None:
    """By finite differences, with the advantage held; a clipped term has no slope."""
    student, teacher, other = (Language(3, seed) for seed in range(3))
    rows = made(student, teacher, other)
    z = rows.student.detach()
    assert rows.rollout_log_prob is not None and rows.sampled_id is not None
    ids, sampled_from = rows.sampled_id[:, None], rows.rollout_log_prob
    logq, logp = (x.log_softmax(-1).gather(1, ids)[:, 0] for x in (z, rows.teacher))

    def value(z: Tensor) -> Tensor:
        own = z.log_softmax(-1).gather(1, ids)[:, 0]
        ratio, advantage = (own - sampled_from).exp(), logp - logq
        return -torch.minimum(
            ratio * advantage, ratio.clamp(1 - clip if clip else 0.0, 1 + clip if clip else 1e9) * advantage
        )

    leaf = z.clone().requires_grad_()
    terms = PolicyGradient(importance=True, clip=clip, soft=2.0)(rows.replace(student=leaf))["soft"]
    torch.testing.assert_close(terms, 2 * value(z), rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(terms.sum(), leaf)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    numbers = (value(z + 1e-6 * direction) - value(z - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((slope * direction).sum(-1), 2 * numbers, rtol=1e-6, atol=1e-8)
    flat = (slope == 0).all(-1)
    ratio, advantage = (logq - sampled_from).exp(), logp - logq
    out = ((ratio > 1 + clip) & (advantage > 0)) | ((ratio < 1 - clip) & (advantage < 0))
    assert torch.equal(flat, out if clip else torch.zeros_like(out)) and bool(out.any())


def test_rows_that_were_not_sampled_get_the_expected_value() -> None:
    rows = random_rows(6, 7)
    torch.testing.assert_close(PolicyGradient(soft=3.0)(rows)["soft"], 3.0 * reverse_kl(rows, ONE))


@each("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.8, top_k=40, min_p=0.01), Sampling(temperature=0.0)])
def test_generated_rows_have_the_log_probability_they_were_sampled_with(sampling: Sampling) -> None:
    student, teacher = gpt2(8, 3).double(), gpt2(12, 4).double()
    own: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 7, "eos": EOS, "pad": PAD, "vocabulary": V}
    task = LanguageModeling(vocabulary=V)
    for model in (student, teacher):
        task.prepare_model(model)
    for batch in OnPolicy(student, loader(), sampling=sampling, **own):
        (rows,) = task.rows(student(task.inputs(batch)[0]), teacher(task.inputs(batch)[0]).logits.detach(), batch)
        index = batch["learn"].nonzero()
        assert rows.sampled_id is not None
        assert torch.equal(rows.sampled_id, batch["input_ids"][batch["learn"]]) and torch.equal(rows.text, index[:, 0])
        assert torch.equal(rows.positions, index[:, 1] - 1)
        z = rows.student.detach() / (sampling.temperature or 1.0)
        kept = z if sampling.top_k is None else z.masked_fill(z < z.topk(40).values[:, -1:], -torch.inf)
        p = kept.softmax(-1)
        order = p.sort(-1, descending=True)
        before = order.values.cumsum(-1) - order.values
        p = p * torch.zeros_like(p).scatter(-1, order.indices, (before < sampling.top_p).double())
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0.0)
        want = (p / p.sum(-1, keepdim=True)).gather(1, rows.sampled_id[:, None])[:, 0].log()
        want = want if sampling.temperature else torch.zeros_like(want)
        torch.testing.assert_close(rows.rollout_log_prob, want, rtol=1e-6, atol=1e-9)
        loss = total(PolicyGradient(importance=True, clip=0.2)(rows), rows)
        loss.backward()
    own["max_new_tokens"] = 3
    for source in (Speculative(student, teacher, loader(), **own), SequenceLevel(teacher, loader(), **own)):
        assert all("rollout_log_prob" not in batch for batch in source)


def test_kernels_and_top_k_teachers_compute_the_same() -> None:
    student, teacher = llama(8, 0), llama(12, 1)
    task = LanguageModeling(vocabulary=V)
    for model in (student, teacher):
        task.prepare_model(model)
    (batch,) = OnPolicy(student, loader(1), generated_fraction=1.0, max_new_tokens=6, pad=PAD, vocabulary=V)
    inputs = task.inputs(batch)[0]
    rows = task.rows(student(inputs), Live(teacher)(inputs), batch)[0]
    method = PolicyGradient(importance=True)
    want = total(method(rows), rows)
    index, _, fields = task.row_fields(batch)
    states = [model.model(**inputs).last_hidden_state.flatten(0, 1)[index] for model in (student, teacher)]
    heads = [model.lm_head.weight for model in (student, teacher)]
    options: dict[str, Any] = {"classes": V, "memory": 4096, **fields}
    got = linear_loss(method, states[0], heads[0], states[1].detach(), heads[1].detach(), **options)
    torch.testing.assert_close(got.loss, want, rtol=1e-9, atol=1e-12)

    few = TopKTeacher(Live(teacher), top=3)(inputs, None)
    sparse = task.rows(student(inputs), few, batch)[0]
    plain = PolicyGradient()
    torch.testing.assert_close(plain(sparse)["soft"], plain(rows)["soft"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="these rows have none: a teacher's most likely tokens leave out the others"):
        method(sparse)


def test_what_is_refused_and_what_is_split() -> None:
    with pytest.raises(ValueError, match=r"clips importance weights: with clip=0.2 write importance=True"):
        PolicyGradient(clip=0.2)
    for wrong in ({"discount": 1.5}, {"discount": -0.1}, {"clip": 1.0, "importance": True}):
        with pytest.raises(ValueError, match=r"needs discount in \[0, 1\] and clip in \[0, 1\)"):
            PolicyGradient(**wrong)
    rows = random_rows(4, 5).replace(sampled_id=torch.arange(4))
    with pytest.raises(ValueError, match="its rows need text and positions"):
        PolicyGradient(discount=0.5)(rows)
    assert PolicyGradient(discount=0.5).is_batch_dependent() and not PolicyGradient().is_batch_dependent()
