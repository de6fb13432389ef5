"""Objectives of on-policy distillation, against float64 definitions and sums over all texts of small languages."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill, objectives
from tempering.methods import (  # pyright: ignore[reportAttributeAccessIssue]
    KD,
    Divergence,
    MiniLLM,
    PolicyGradient,
    TruncatedImportance,
)
from tempering.rollouts import OnPolicy, TeacherMixed
from tempering.rollouts.on_policy import without_mean_of_others
from tempering.rollouts.sampling import generate
from tempering.rows import Rows, total
from tempering.tasks import LanguageModeling, PrivilegedContext
from tempering.teachers import Live, TopKTeacher, WithReference
from tempering.temperature import Temperatures
from tests.cases import each
from tests.conftest import random_rows
from tests.test_generation import EOS, PAD, V, gpt2, llama
from tests.test_on_policy import Toy, after, loader
from tests.test_policy_gradient import LENGTH, Language, made, shuffled

OWN: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 5, "eos": EOS, "pad": PAD, "vocabulary": V}


def sequences_kl(student: Language, teacher: Language) -> Tensor:
    q, p = student.log_probs(), teacher.log_probs()
    return (q.sum(-1).exp() * (q - p).sum(-1)).sum()


def chances(student: Language) -> Tensor:
    """The probability of the text of each row, a constant."""
    with torch.no_grad():
        return student.log_probs().sum(-1).exp().repeat_interleave(LENGTH)


@each("size", [5, 3])
def test_reward_and_distillation_are_one_objective(size: int) -> None:
    """The gradient of soft * KL - reward * E[R], over all texts, and of the reward alone."""
    student, teacher = Language(size, 0), Language(size, 1)
    wanted, rewards = student.trained(), torch.randn(size**LENGTH, generator=torch.Generator().manual_seed(4)).double()
    rows = made(student, teacher, student).replace(reward=rewards.repeat_interleave(LENGTH))
    rows, weights = shuffled(rows, chances(student))
    for soft, weight in ((1.0, 0.7), (0.0, 2.0), (0.5, 0.0)):
        terms = PolicyGradient(soft=soft, discount=1.0, reward=weight)(rows)["soft"]
        got = torch.autograd.grad((weights * terms).sum(), wanted, retain_graph=True)
        expected_reward = (student.log_probs().sum(-1).exp() * rewards).sum()
        want = torch.autograd.grad(soft * sequences_kl(student, teacher) - weight * expected_reward, wanted)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"PolicyGradient\(reward=1\) needs rows with rewards"):
        PolicyGradient(reward=1.0)(rows.replace(reward=None))


def test_the_mean_of_the_others_is_a_baseline() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 3.0, 5.0, 7.0])
    assert without_mean_of_others(rewards, 3).tolist() == [1.0, -0.5, -0.5, -3.0, 0.0, 3.0]
    assert without_mean_of_others(rewards, 1) is rewards


@each("size", [5, 3])
def test_minillm_without_its_stabilizers_is_the_reverse_kl_of_sequences(size: int) -> None:
    student, teacher = Language(size, 0), Language(size, 1)
    wanted = student.trained()
    rows, weights = shuffled(made(student, teacher, student), chances(student))
    terms = MiniLLM(clip=0.0, length_normalization=False)(rows)
    got = torch.autograd.grad((weights * torch.stack([*terms.values()]).sum(0)).sum(), wanted)
    torch.testing.assert_close(got, torch.autograd.grad(sequences_kl(student, teacher), wanted), rtol=1e-9, atol=1e-12)


@each("clip, normalized", [(0.0, True), (0.2, True), (0.2, False)])
def test_minillm_is_equation_7(clip: float, normalized: bool) -> None:
    """Token by token on texts of the mixture; the gradient by finite differences, with weights and rewards held."""
    student, teacher = Language(3, 0), Language(3, 1)
    mixed = Language(3, 2)
    mixed.logits = [
        (0.2 * t.softmax(-1) + 0.8 * s.softmax(-1)).log() for t, s in zip(teacher.logits, student.logits, strict=True)
    ]
    student.logits = [
        z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(9)) for z in student.logits
    ]
    rows = made(student, teacher, mixed)
    method = MiniLLM(soft=2.0, future=3.0, clip=clip, length_normalization=normalized)
    leaf = rows.student.detach().requires_grad_()
    terms = method(rows.replace(student=leaf))
    z, p, m = rows.student.detach(), rows.teacher.log_softmax(-1), rows.rollout_log_prob
    assert rows.sampled_id is not None and m is not None
    ids, n = rows.sampled_id, len(rows) // LENGTH
    own = lambda x: x.gather(1, ids[:, None])[:, 0]  # noqa: E731
    held = z.log_softmax(-1)
    gain = (own(p) - own(held)).view(n, LENGTH)
    rest = torch.zeros_like(gain)
    for t in range(LENGTH - 1):
        later = gain[:, t + 1 :]
        rest[:, t] = later.mean(-1) if normalized else later.sum(-1)
    weight = (own(held) - m).exp()

    def value(z: Tensor) -> Tensor:
        q = z.log_softmax(-1)
        ratio, r = (own(q) - m).exp(), rest.flatten()
        low, high = (1 - clip, 1 + clip) if clip else (0.0, 1e9)
        second = -torch.minimum(ratio * r, ratio.clamp(low, high) * r)
        return 2.0 * weight * (q.exp() * (q - p)).sum(-1) + 3.0 * second

    torch.testing.assert_close(terms["soft"] + terms["future"], value(z), rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad((terms["soft"] + terms["future"]).sum(), leaf)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    numbers = (value(z + 1e-6 * direction) - value(z - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((slope * direction).sum(-1), numbers, rtol=1e-6, atol=1e-7)
    assert not clip or bool(((weight > 1 + clip) | (weight < 1 - clip)).any())


def test_minillm_of_data_is_language_modeling() -> None:
    rows = random_rows(6, 7)
    assert rows.target is not None
    terms = MiniLLM(hard=0.5)(rows)
    torch.testing.assert_close(sum(terms.values()), 0.5 * objectives.cross_entropy(rows))
    torch.testing.assert_close(MiniLLM()(rows)["soft"], PolicyGradient()(rows)["soft"])
    assert MiniLLM().is_batch_dependent() and not MiniLLM(future=0.0).is_batch_dependent()
    with pytest.raises(ValueError, match=r"MiniLLM needs clip in \[0, 1\)"):
        MiniLLM(clip=1.0)


@each("rows", [1, 8])
def test_teacher_mixed_tokens_are_of_the_mixture(rows: int) -> None:
    """Of 2,000 tokens; the statistic has 4 degrees of freedom, and 23.5 is passed once in 10,000."""
    q, p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).double(), torch.tensor([0.05, 0.35, 0.1, 0.3, 0.2]).double()
    want, toys = 0.3 * p + 0.7 * q, (Toy(q.log().tolist()), Toy(p.log().tolist()))
    counts = torch.zeros(5)
    for seed in range(8 // rows):
        batch, _ = generate(*toys, [[0]] * rows, max_new_tokens=250, mixture=0.3, seed=seed)
        counts += torch.bincount(torch.tensor(sum(after(batch), [])), minlength=5)  # noqa: RUF017
        torch.testing.assert_close(batch["rollout_log_prob"][:, 1:], want.log()[batch["input_ids"][:, 1:]])
    assert counts.sum() == 2000 and ((counts - 2000 * want) ** 2 / (2000 * want)).sum() < 23.5


def test_teacher_mixed_texts_train_minillm() -> None:
    student, teacher = llama(8, 0), llama(12, 1)
    task = LanguageModeling(vocabulary=V)
    for model in (student, teacher):
        task.prepare_model(model)
    (batch,) = TeacherMixed(student, Live(teacher), loader(1), alpha=0.4, **OWN)
    inputs = task.inputs(batch)[0]
    (rows,) = task.rows(student(inputs), Live(teacher)(inputs), batch)
    assert rows.sampled_id is not None
    q, p = (x.softmax(-1).gather(1, rows.sampled_id[:, None])[:, 0] for x in (rows.student, rows.teacher))
    torch.testing.assert_close(rows.rollout_log_prob, (0.4 * p + 0.6 * q).log().detach(), rtol=1e-6, atol=1e-9)
    total(MiniLLM()(rows), rows).backward()
    assert any(bool(p.grad.any()) for p in student.parameters() if p.grad is not None)
    for wrong in ({"alpha": 1.0}, {"sampling": {"do_sample": False}}):
        with pytest.raises(ValueError, match=r"TeacherMixed needs alpha in \[0, 1\)"):
            TeacherMixed(student, teacher, [], **wrong)
    with pytest.raises(TypeError, match="TeacherMixed needs a teacher with a model"):
        TeacherMixed(student, "teacher", [])


def with_grad(rows: Rows) -> Rows:
    return rows.replace(student=rows.student.detach().requires_grad_())


@each("objective", ["kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "adaptive_kl"])
def test_the_student_s_likeliest_tokens_and_one_for_the_others(objective: Any) -> None:
    """The divergence of both distributions over k + 1 outcomes; never above that of all tokens, and equal with all."""
    rows, T = with_grad(random_rows(8, 9, dtype=torch.float64)), Temperatures(*[torch.full((1, 1), 2.0).double()] * 2)
    whole = Divergence(objective=objective, temperature=2.0)(rows)["soft"]
    for k in (1, 3, 8, 9, 20):
        got = Divergence(objective=objective, student_top=k, temperature=2.0)(rows)["soft"]
        q, p = ((x / 2.0).softmax(-1) for x in (rows.student, rows.teacher))
        order = q.topk(min(k, 9)).indices
        few = [torch.cat((x.gather(1, order), 1 - x.gather(1, order).sum(-1, keepdim=True)), 1) for x in (q, p)]
        few = [x if k < 9 else x[:, :9] for x in few]
        one = torch.ones(1, 1).double()
        own = {"skew_kl": {"skew": 0.1}, "skew_reverse_kl": {"skew": 0.1}}.get(objective, {})
        made = Rows(few[0].log(), few[1].log().detach())
        want = T.scale * getattr(objectives, objective)(made, Temperatures(one, one), **own)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
        assert k < 9 or torch.allclose(got, whole)
        assert objective == "adaptive_kl" or bool((got <= whole + 1e-12).all())
        (slope,) = torch.autograd.grad(got.sum(), rows.student, retain_graph=True)
        (reference,) = torch.autograd.grad(want.sum(), rows.student, retain_graph=True)
        torch.testing.assert_close(slope, reference, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="needs student_top >= 0; got -1"):
        Divergence(student_top=-1)


def test_truncated_weights_of_any_method() -> None:
    rows = with_grad(random_rows(6, 7, dtype=torch.float64))
    ids, noise = torch.arange(6), torch.linspace(-2, 2, 6, dtype=torch.float64)
    q = rows.student.detach().log_softmax(-1)[torch.arange(6), ids]
    stale = rows.replace(sampled_id=ids, rollout_log_prob=q - noise)
    inner = Divergence(objective="reverse_kl")
    got = TruncatedImportance(inner, most=3.0)(stale)["soft"]
    weight = noise.exp().clamp_max(3.0)
    torch.testing.assert_close(got, weight * inner(rows)["soft"])
    assert bool((weight == 3.0).any()) and bool((weight < 1).any())
    (slope,) = torch.autograd.grad(got.sum(), rows.student, retain_graph=True)
    (plain,) = torch.autograd.grad(inner(rows)["soft"].sum(), rows.student)
    torch.testing.assert_close(slope, weight[:, None] * plain)
    assert torch.equal(TruncatedImportance(KD())(rows)["soft"], KD()(rows)["soft"]), "of data"
    with pytest.raises(ValueError, match="TruncatedImportance needs the log-probabilities of sampled tokens"):
        TruncatedImportance(KD())(stale.replace(rollout_log_prob=None))

    terms = PolicyGradient(importance=True, truncate=3.0)(stale)["soft"]
    advantage = rows.teacher.log_softmax(-1)[torch.arange(6), ids] - q
    torch.testing.assert_close(terms, -weight * advantage)
    (slope,) = torch.autograd.grad(terms.sum(), rows.student)
    score = torch.eye(7).double()[ids] - rows.student.detach().softmax(-1)
    torch.testing.assert_close(slope, -(weight * advantage)[:, None] * score)
    with pytest.raises(ValueError, match=r"with truncate=2.0 write importance=True"):
        PolicyGradient(truncate=2.0)


def test_weights_of_tokens_do_not_depend_on_how_a_step_is_split() -> None:
    student, teacher = llama(8, 0), llama(12, 1)
    (batch,) = OnPolicy(student, loader(1), **{**OWN, "max_new_tokens": 9, "eos": list(range(0, V, 4))})
    lengths = batch["learn"].sum(-1)
    assert len(set(lengths.tolist())) > 1
    for weights in ("texts", lambda place, length: 0.5**place, None):
        task = LanguageModeling(vocabulary=V, token_weights=weights)  # pyright: ignore[reportArgumentType]
        for model in (student, teacher):
            task.prepare_model(model)

        def rows_of(part: dict[str, Tensor], task: LanguageModeling = task) -> Rows:
            inputs = task.inputs(part)[0]
            return task.rows(student(inputs), Live(teacher)(inputs), part)[0]

        method, rows = Divergence(objective="reverse_kl"), rows_of(batch)
        want = total(method(rows), rows)
        assert float(task.row_weights(batch)["logits"]) == pytest.approx(float(rows.total_weight))
        parts = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(len(lengths))]
        whole = sum(task.row_weights(part)["logits"] for part in parts)
        split = [total(method(r), r, normalizer=whole) for r in map(rows_of, parts)]
        torch.testing.assert_close(torch.stack(split).sum(), want)
        if weights == "texts":
            means = torch.stack([method(rows_of(part))["soft"].mean() for part in parts])
            torch.testing.assert_close(want, means.mean())
        elif weights is not None:
            decay = torch.cat([0.5 ** torch.arange(n) for n in lengths.tolist()])
            torch.testing.assert_close(want, (decay * method(rows)["soft"]).sum() / decay.sum())
    for wrong in ("lines", 3):
        with pytest.raises(ValueError, match="needs token_weights 'texts', a function"):
            LanguageModeling(token_weights=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="that return one weight per token"):
        LanguageModeling(token_weights=lambda place, length: length[:1]).row_weights(batch)


@each("top", [None, 3])
def test_the_initial_student_is_a_reference(top: int | None) -> None:
    student, teacher = gpt2(8, 3), gpt2(12, 4)
    reference, task = copy.deepcopy(student), LanguageModeling(vocabulary=V)
    for model in (student, teacher, reference):
        task.prepare_model(model)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    given = Live(teacher) if top is None else TopKTeacher(Live(teacher), top=top)
    (batch,) = OnPolicy(student, loader(1), **OWN)
    inputs = task.inputs(batch)[0]
    output = WithReference(given, reference)(inputs)
    (rows,) = task.rows(student(inputs), output, batch)
    (plain,) = task.rows(student(inputs), given(inputs, None), batch)
    assert torch.equal(rows.teacher, plain.teacher) and torch.equal(rows.student, plain.student)
    if top is None:
        learned = torch.cat((batch["learn"][:, 1:], torch.zeros_like(batch["learn"][:, :1])), 1)
        assert torch.equal(rows.reference, Live(reference)(inputs).logits[learned][:, :V])
    for method in (PolicyGradient(reference=0.3), Divergence(objective="kl", reference=0.3)):
        terms = method(rows)
        q, r = rows.student.log_softmax(-1), rows.reference.log_softmax(-1)  # pyright: ignore
        torch.testing.assert_close(terms["reference"], 0.3 * (q.exp() * (q - r)).sum(-1), rtol=1e-5, atol=1e-8)
        total(terms, rows).backward(retain_graph=True)
        with pytest.raises(ValueError, match=r"needs the logits of a reference model, such as the initial student"):
            method(plain)
    with pytest.raises(ValueError, match="the reference model would read the teacher's texts"):
        PrivilegedContext().rows(student(inputs), output, batch)


def test_rewards_and_references_run_in_distill() -> None:
    """Texts that please are likelier after training than before; the log has the mean reward."""
    student, teacher = llama(8, 0).float(), llama(12, 1).float()

    def short(texts: list[Any]) -> list[float]:
        assert all(isinstance(t.prompt, str) and isinstance(t.completion, str) for t in texts)
        return [-float(len(t.completion.split())) for t in texts]

    own: dict[str, Any] = {
        **OWN,
        "eos": list(range(0, V, 4)),
        "num_generations": 4,
        "reward": short,
        "decode": lambda ids: " ".join(map(str, ids)),
    }
    source = OnPolicy(student, loader(2), **own)
    method = PolicyGradient(soft=0.01, reward=1.0, reference=0.01)
    how: dict[str, Any] = {"task": LanguageModeling(vocabulary=V), "quiet": True, "epochs": 16, "method": method}
    adam = partial(torch.optim.Adam, lr=5e-2)
    run = distill(student, WithReference(teacher, copy.deepcopy(student)), source, optimizer=adam, **how)
    first, last = (run.epochs[i]["rollout"]["reward"] for i in (0, -1))
    assert last > first + 0.5 and first >= -5.0 and run.epochs[0]["rollout"]["length"] == pytest.approx(-first, abs=0.5)
    for wrong in (lambda texts: [1.0], lambda texts: [float("nan")] * len(texts)):
        with pytest.raises(ValueError, match="reward must return one finite number per text"):
            list(OnPolicy(student, loader(1), **{**OWN, "reward": wrong}))


def test_a_method_gets_no_reference_of_another_shape() -> None:
    rows = random_rows(4, 5)
    with pytest.raises(ValueError, match=r"needs reference of shape \(4, 5\) without gradient; got \(4, 6\)"):
        rows.replace(reference=torch.zeros(4, 6))
    kept = rows.replace(reference=torch.zeros(4, 5), reward=torch.arange(4.0)).select(torch.tensor([1, 3]))
    assert kept.reference is not None and kept.reference.shape == (2, 5) and kept.reward.tolist() == [1.0, 3.0]  # pyright: ignore


def test_models_are_modules() -> None:
    assert isinstance(WithReference(nn.Linear(2, 2), nn.Linear(2, 2)).parts["reference"], Live)
