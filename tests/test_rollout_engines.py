"""Rollout engines: transformers' generate, our decoders, and a served student, held to the same texts and weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempering import distill
from tempering.methods import Divergence, PolicyGradient  # pyright: ignore[reportAttributeAccessIssue]
from tempering.rollouts import DecoderEngine, OnPolicy, RolloutServer, Sampling, TransformersEngine
from tempering.rollouts.ahead import generate_ahead
from tempering.rollouts.engines import Completion
from tempering.rollouts.server import ServerMismatchError
from tempering.tasks import LanguageModeling
from tests.cases import each
from tests.rollout_servers import StudentServer, serving
from tests.test_generation import EOS, MODELS, PAD, V, gpt2, llama
from tests.test_on_policy import loader

OWN: dict[str, Any] = {"generated_fraction": 1.0, "max_new_tokens": 6, "eos": EOS, "pad": PAD, "vocabulary": V}
GREEDY = Sampling(temperature=0.0)
CUT = Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def student(seed: int = 3) -> nn.Module:
    return llama(8, seed).float()


@cache
def untrained() -> nn.Module:
    """One for all tests that do not train it, so that its decoding is tried once."""
    return student()


@cache
def precise() -> nn.Module:
    return copy.deepcopy(untrained()).double()


@pytest.fixture
def server() -> Iterator[StudentServer]:
    with serving(student(7)) as made:
        yield made


def engine(server: StudentServer, path: Path, **options: Any) -> RolloutServer:
    return RolloutServer(server.url, "tiny", **{"weights": path / "weights", "wait": 0.001, "tries": 3} | options)


def batches(model: nn.Module, made: Any, count: int = 3, **options: Any) -> list[dict[str, Tensor]]:
    return list(OnPolicy(model, loader(count), engine=made, **{**OWN, **options}))


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]], *, exact: bool = True) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if exact or name != "rollout_log_prob":
                assert torch.equal(one[name], other[name]), name
            else:
                torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


@each("sampling", [CUT, GREEDY])
def test_our_decoders_behind_the_interface_write_the_same_bits(sampling: Sampling) -> None:
    for model in (untrained(), precise()):
        same(batches(model, None, 1, sampling=sampling), batches(model, DecoderEngine(), 1, sampling=sampling))


@pytest.mark.parametrize("family", MODELS)
def test_greedy_texts_of_transformers_are_ours(family: str) -> None:
    model = MODELS[family](8, 3)
    for eos in ([EOS, 3], None):
        options: dict[str, Any] = {"sampling": GREEDY, "eos": eos}
        ours, theirs = (batches(model, made, 1, **options) for made in (None, TransformersEngine()))
        same(ours, theirs)


@each("sampling", [Sampling(), CUT])
def test_sampled_texts_of_transformers_have_our_log_probabilities(sampling: Sampling) -> None:
    """By seed, of every copy of a prompt, and with the tokens past ``vocabulary`` left out."""
    model = gpt2(8, 3, V + 9)
    state = torch.get_rng_state()
    options: dict[str, Any] = {"sampling": sampling, "num_generations": 2}
    runs = [batches(model, TransformersEngine(), 1, seed=seed, **options) for seed in (0, 0, 1)]
    same(runs[0], runs[1])
    assert not torch.equal(runs[0][0]["input_ids"], runs[2][0]["input_ids"])
    assert torch.equal(torch.get_rng_state(), state)
    for batch in runs[0]:
        assert len(batch["input_ids"]) == 6 and int(batch["input_ids"].max()) < V
        for row, learn, log_prob in zip(batch["input_ids"], batch["learn"], batch["rollout_log_prob"], strict=True):
            start, end = int(learn.nonzero()[0]), int(learn.nonzero()[-1]) + 1
            logits = model(input_ids=row[None, :end]).logits[0, start - 1 : end - 1, :V]
            want = sampling.log_prob(logits, row[start:end])
            torch.testing.assert_close(log_prob[start:end], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gets temperature from OnPolicy"):
        TransformersEngine(temperature=0.5)
    penalized = batches(model, TransformersEngine(repetition_penalty=50.0), 1, sampling=GREEDY, eos=None)
    for batch in penalized:
        for row, learn in zip(batch["input_ids"], batch["learn"], strict=True):
            assert len(set(row[learn].tolist())) == int(learn.sum()), "no token twice"


@each("api, sampling", [("vllm", Sampling()), ("vllm", CUT), ("vllm", GREEDY), ("sglang", Sampling())])
def test_a_server_gets_the_weights_and_returns_what_they_write(
    server: StudentServer, tmp_path: Path, api: Any, sampling: Sampling
) -> None:
    model, server.loads = untrained(), 0
    made = engine(server, tmp_path, api=api)
    found = batches(model, made, 2, sampling=sampling)
    assert server.loads == 2 and not list((tmp_path / "weights").glob(".next*"))
    assert made.report()["parity"] < 1e-4 and made.report()["refreshes"] == 2
    for batch in found:
        for row, learn, log_prob in zip(batch["input_ids"], batch["learn"], batch["rollout_log_prob"], strict=True):
            start, end = int(learn.nonzero()[0]), int(learn.nonzero()[-1]) + 1
            logits = model(input_ids=row[None, :end]).logits[0, start - 1 : end - 1]
            want = sampling.log_prob(logits, row[start:end])
            torch.testing.assert_close(log_prob[start:end], want, rtol=1e-4, atol=1e-4)
    if sampling is GREEDY:
        same(batches(model, None, 2, sampling=sampling), found)
    assert len({str(prompt) for prompt, _ in server.prompts[:3]}) == 3


def trained(server: StudentServer, path: Path, **options: Any) -> tuple[nn.Module, Any]:
    model, how = student(), {"method": PolicyGradient(importance=True), "task": LanguageModeling(vocabulary=V)}
    made = engine(server, path / "served", **options)
    source = OnPolicy(model, loader(3), engine=made, **OWN)
    adam = partial(torch.optim.Adam, lr=1e-2)
    how |= {"optimizer": adam, "epochs": 2, "quiet": True, "selfcheck": False, "log_every": 1}
    run = distill(model, llama(12, 1).float(), source, out=path / "run", **how)  # pyright: ignore[reportArgumentType]
    return model, run


def test_a_run_generates_with_the_weights_of_each_step(server: StudentServer, tmp_path: Path) -> None:
    """As a run that generates in this process does: every batch by the weights of its step, and its prompts once."""
    _, run = trained(server, tmp_path)
    line = run.epochs[-1]["rollout"]
    assert line["parity"] < 1e-3 and line["staleness"] == 0.0 and line["restarts"] == 0.0
    assert [loads for _, loads in server.prompts] == [1 + i // 3 for i in range(18)], "one load before each batch"


def test_generation_ahead_is_bounded_and_in_order(server: StudentServer, tmp_path: Path) -> None:
    """Batch j has the weights from before batch j - staleness, whatever the time that anything takes."""
    weights = []
    for name, options in (("a", {}), ("b", {"staleness": 2}), ("c", {"staleness": 2})):
        server.late = 0.03 if name == "c" else 0.0
        server.prompts.clear()
        server.loads = 0
        model, run = trained(server, tmp_path / name, **options)
        weights.append([p.detach() for p in model.parameters()])
        seen = [loads for _, loads in server.prompts]
        stale = options.get("staleness", 0)
        want = [1, 1, 1, 2, 2, 2] if stale else [1, 2, 3, 4, 5, 6]  # an epoch begins with the newest
        assert seen == [w for w in want for _ in range(3)]
        prompts = [sorted(prompt for prompt, _ in server.prompts[i : i + 3]) for i in range(0, 18, 3)]
        assert prompts[:3] == prompts[3:] and run.epochs[-1]["rollout"]["staleness"] == (1.0 if stale else 0.0)
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not [t for t in threading.enumerate() if t.name.startswith("rollouts") and t.is_alive()]


def test_generation_ahead_by_nothing_is_synchronous(server: StudentServer, tmp_path: Path) -> None:
    """The same texts, weights and log-probabilities, to the bit."""
    found = []
    for name, ahead in (("a", False), ("b", True)):
        source = OnPolicy(untrained(), loader(2), engine=engine(server, tmp_path / name), **OWN)
        found.append(list(generate_ahead(source, enumerate(loader(2)), 0) if ahead else source))
    same(*found)
    assert [loads for _, loads in server.prompts] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3


def test_a_server_that_restarts_gets_its_weights_again(server: StudentServer, tmp_path: Path) -> None:
    """Its texts by the first weights are not used: the batches are those of a server that did not restart."""
    want = batches(untrained(), engine(server, tmp_path / "a"))
    server.prompts.clear()
    server.restarts = {4, 10}
    made = engine(server, tmp_path / "b", refresh_every=3)
    same(want, batches(untrained(), made))
    assert made.restarts == 2 and len(server.prompts) == 15


def test_a_server_that_is_late_busy_or_dies_is_asked_again(server: StudentServer, tmp_path: Path) -> None:
    want = batches(untrained(), engine(server, tmp_path / "a"), 1)
    server.failures = [200, 503, 200, 200, 0, 200, 429, 0, 503, 200]
    same(want, batches(untrained(), engine(server, tmp_path / "b", tries=6), 1))
    assert not server.failures
    server.late = 0.3
    with pytest.raises(RuntimeError, match=r"no response in 2 tries of at most 0.1 s"):
        batches(untrained(), engine(server, tmp_path / "c", timeout=0.1, tries=2))


SPOILED: dict[str, tuple[Any, str]] = {
    "a token of another model": (lambda ids, lp: ([V + 100, *ids[1:]], lp), f"token {V + 100}, and the student has"),
    "a float": (lambda ids, lp: ([0.5, *ids[1:]], lp), "token 0.5, and the student has"),
    "a short list": (lambda ids, lp: (ids, lp[:-1]), "tokens with . log-probabilities"),
    "nothing": (lambda ids, lp: ([], []), "0 tokens with 0 log-probabilities"),
    "too many": (lambda ids, lp: (ids * 9, lp * 9), "and max_new_tokens=6"),
    "NaN": (lambda ids, lp: (ids, [float("nan"), *lp[1:]]), "no log-probabilities"),
    "logits": (lambda ids, lp: (ids, [7.0, *lp[1:]]), "no log-probabilities"),
    "no numbers": (lambda ids, lp: (ids, None), "has another form than api='vllm'"),
    "cut": (lambda ids, lp: (ids[:2], lp[:2]), "which is not in eos="),
    "others": (lambda ids, lp: (ids, [x - 0.5 for x in lp]), "differ from the student's by"),
}


@each("kind", list(SPOILED))
def test_an_answer_that_cannot_be_is_named(server: StudentServer, tmp_path: Path, kind: str) -> None:
    server.spoil, text = SPOILED[kind]
    with pytest.raises(RuntimeError, match=text):
        batches(untrained(), engine(server, tmp_path), 1, eos=None)


def test_a_server_with_other_weights_or_probabilities_is_refused(server: StudentServer, tmp_path: Path) -> None:
    server.ignores = True  # the load is acknowledged and does nothing
    with pytest.raises(ServerMismatchError, match="does not serve the student: after loading its weights"):
        batches(untrained(), engine(server, tmp_path / "a"))
    server.ignores, server.raw = False, True
    batches(untrained(), engine(server, tmp_path / "b"), 1)
    with pytest.raises(ServerMismatchError, match="start vLLM with --logprobs-mode processed_logprobs"):
        batches(untrained(), engine(server, tmp_path / "c"), sampling=Sampling(temperature=0.5))


def test_what_is_refused(server: StudentServer, tmp_path: Path) -> None:
    for wrong in ({"api": "tgi"}, {"staleness": -1}, {"refresh_every": 0}, {"parity": 0.0}):
        with pytest.raises(ValueError, match="RolloutServer needs api 'vllm' or 'sglang'"):
            engine(server, tmp_path, **wrong)
    with pytest.raises(ValueError, match="cannot sleep while it generates ahead"):
        engine(server, tmp_path, sleep=True, staleness=1)
    with pytest.raises(ValueError, match="RolloutServer needs an address"):
        RolloutServer("localhost", "tiny", weights=tmp_path)
    with pytest.raises(TypeError, match="has no config"):
        OnPolicy(nn.Linear(2, 2), [], engine=engine(server, tmp_path))
    with pytest.raises(TypeError, match=r"needs a model of transformers with generate\(\); got Linear"):
        OnPolicy(nn.Linear(2, 2), [], engine=TransformersEngine())


def test_a_server_sleeps_between_batches(server: StudentServer, tmp_path: Path) -> None:
    batches(untrained(), engine(server, tmp_path, sleep=True), 2)
    paths = [path for path, _ in server.asked]
    assert paths.count("/sleep?level=1") == 2 and paths.count("/wake_up") == 1 and server.asleep


def test_a_killed_run_generates_no_batch_twice(server: StudentServer, tmp_path: Path) -> None:
    """After a crash of the server in mid-epoch, the resumed run generates the batches that were not trained on."""
    model, seen = student(), list[Any]()
    data = [loader(3)[i % 3] for i in range(4)]

    class Recorded(DecoderEngine):
        refresh_every = 1

        def generate(self, prompts: Any, n: int, sampling: Sampling, **options: Any) -> list[Completion]:
            if len(seen) == 2:
                seen.append(None)
                raise RuntimeError("the server is gone")
            seen.append([list(p) for p in prompts])
            return super().generate(prompts, n, sampling, **options)

    how: dict[str, Any] = {"method": Divergence(objective="reverse_kl"), "task": LanguageModeling(vocabulary=V)}
    how |= {"optimizer": partial(torch.optim.SGD, lr=0.1), "epochs": 1, "quiet": True, "selfcheck": False}
    how |= {"out": tmp_path, "checkpoint_every": 1}
    teacher = llama(12, 1).float()
    with pytest.raises(RuntimeError, match="the server is gone"):
        distill(model, teacher, OnPolicy(model, data, engine=Recorded(), **OWN), **how)
    again = student()
    distill(again, teacher, OnPolicy(again, data, engine=Recorded(), **OWN), **how)
    plain = student()
    distill(plain, teacher, OnPolicy(plain, data, **OWN), **(how | {"out": tmp_path / "plain"}))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))
    prompts = [x for x in seen if x is not None]
    want = [prompts_of(batch) for batch in data]
    assert prompts == want


def prompts_of(batch: Any) -> list[list[int]]:
    from tempering.rollouts.sampling import prompts_of as found

    return found(copy.copy(batch))
