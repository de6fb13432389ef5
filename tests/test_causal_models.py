"""Causal models of every kind of cache: rows and generated texts next to plain forwards, or a rejection by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from docs.tools.causal_models import EXACT, build, examples, outcomes, speculative, table
from tempering.data.text import collate, pack
from tempering.rollouts import OnPolicy, Speculative
from tempering.rollouts.decoding import causal_strategy
from tempering.tasks import LanguageModeling
from tests.cases import each
from tests.lazy_modules import needs

pytestmark = needs("transformers")

FULL = ("exact", "exact", "exact", "exact, mask", "exact, mask")
STATES = ("exact", "exact", "rejected", "exact, recompute", "exact, recompute")


@each(
    "name, expected",
    [
        ("LlamaForCausalLM", FULL),
        ("MistralForCausalLM", (*FULL[:4], "exact, shift")),
        ("GPTNeoForCausalLM", (*FULL[:4], "exact, shift")),  # its window is only in the config
        ("Lfm2ForCausalLM", ("exact", "exact", "rejected", "exact, mask", "exact, recompute")),
        ("MambaForCausalLM", STATES),
        ("OpenAIGPTLMHeadModel", STATES),  # no cache
        ("BartForCausalLM", ("exact", "rejected", "rejected", *STATES[3:])),  # positions by slot
        ("RobertaForCausalLM", STATES),  # positions from another number than 0
        ("XLMWithLMHeadModel", ("exact", "exact", "rejected", "rejected", "rejected")),
    ],
)
def test_a_model_is_exact_or_rejected_by_name(name: str, expected: tuple[str, ...]) -> None:
    assert tuple(outcomes(name).values()) == expected


@each("window", [8, 32])
def test_rejected_tokens_do_not_take_up_a_window(window: int) -> None:
    student, teacher = (build("MistralForCausalLM", seed=seed, sliding_window=window) for seed in (0, 1))
    assert speculative(student, teacher) < EXACT


def test_a_model_that_cannot_generate_is_rejected_before_the_first_batch() -> None:
    model, other = build("BertLMHeadModel", is_decoder=False), build("LlamaForCausalLM")
    data = [collate(examples())]
    for loader in (OnPolicy(model, data, generated_fraction=0.01), Speculative(other, model, data)):
        with pytest.raises(TypeError, match=r"BertLMHeadModel cannot generate: .*is_decoder=True"):
            next(iter(loader))
    next(iter(OnPolicy(model, data, generated_fraction=0.0)))
    model = build("MistralForCausalLM").train()
    state = torch.get_rng_state()
    assert [causal_strategy(model, rejects=rejects) for rejects in (False, True)] == ["mask", "shift"]
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)


def test_the_table_groups_equal_outcomes() -> None:
    columns = dict(zip(("KD", "OnPolicy"), ("exact", "exact, mask"), strict=True))
    results: dict[str, Any] = {"AForCausalLM": columns, "BForCausalLM": columns | {"KD": "rejected"}, "C": columns}
    lines = table(results, ["DForCausalLM"]).splitlines()
    assert lines[-4:-2] == ["| exact | exact, mask | A, C |", "| rejected | exact, mask | B |"]
    assert lines[-1].endswith("than 30 s: D.") and "3 causal models" in lines[0]


def test_layouts_that_change_the_logits_are_rejected_by_name() -> None:
    task, texts = LanguageModeling(), examples()
    cases = {"left": collate(texts, side="left"), "packed": pack(texts, 24)[0], "right": collate(texts)}
    for name, rejected in (("BartForCausalLM", ["left"]), ("BertLMHeadModel", ["packed"]), ("LlamaForCausalLM", [])):
        model = build(name)
        task.prepare_model(model)
        for layout, batch in cases.items():
            if layout in rejected:
                with pytest.raises(
                    ValueError, match=rf"{name} does not give .*{layout}.* the logits that each has alone"
                ):
                    model(task.inputs(batch)[0])
            elif (name, layout) != ("BartForCausalLM", "packed"):  # takes no position ids
                assert model(task.inputs(batch)[0]).logits.isfinite().all()
    small = build("LlamaForCausalLM", max_position_embeddings=8)
    task.prepare_model(small)
    assert causal_strategy(small, rejects=True) == "recompute", "a trial does not fit"
