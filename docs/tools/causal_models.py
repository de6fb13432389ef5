"""Write the table of causal models in docs/language.md: every one of transformers that builds tiny, tried.

Usage: ``nice python docs/tools/causal_models.py .``; a few minutes. Names after it try only those and print them.

Each model gets random weights and windows of 4 tokens. Its rows in ``LanguageModeling`` (padding right, left, packed),
the greedy texts of ``OnPolicy`` and the verified logits of ``Speculative`` are compared with one plain forward per
text. "exact" is a difference below 1e-3 of the largest logit; "rejected" is an error that names the model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempering.data.text import TextExample, collate, make_prompt_example, pack
from tempering.integrations.common import forward
from tempering.integrations.huggingface import Unpacked
from tempering.rollouts import OnPolicy, Sampling, Speculative
from tempering.rollouts.decoding import causal_strategy
from tempering.tasks import LanguageModeling

BEGIN, END = "<!-- causal models: docs/tools/causal_models.py -->", "<!-- end of causal models -->"
PAD, V, WINDOW, EXACT, MOST = 0, 61, 4, 1e-3, 2e7
GREEDY = Sampling(temperature=0.0)
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
# by name, where a config class has it: sizes that are large by default
MORE: dict[str, Any] = {
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 8),
    **dict.fromkeys(("ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "n_inner"), 32),
    **dict.fromkeys(("d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "attention_hidden_size"), 16),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_state", "state_size", "ssm_state_size", "lru_width"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    "index_n_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_expand": 2,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 8,
    "d_head": 8,
    "moe_layer_start_index": 1,
    "use_sliding_window": True,
}
CONV: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1], "mamba_n_groups": 1},
    "DoryForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "Lfm2ForCausalLM": CONV,
    "Lfm2MoeForCausalLM": CONV,
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "RecurrentGemmaForCausalLM": {"num_hidden_layers": 3},
}
EVEN: dict[str, Any] = {"num_key_value_heads": 2}
VARIANTS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("head_dim",), {}),
    ((), EVEN),
    (("head_dim",), EVEN),
    (("layer_types",), {}),
    (("layer_types", "head_dim"), EVEN),
    (("max_position_embeddings",), EVEN),
    (("num_hidden_layers",), {"num_encoder_layers": 2, "num_decoder_layers": 2}),
    (tuple(MORE), {}),
]  # settings left out, and others, until one builds


def causal_models() -> list[str]:
    """Return the names of transformers' causal models, once each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    listed = [name for names in NAMES.values() for name in ([names] if isinstance(names, str) else names)]
    return sorted(dict.fromkeys(listed))


def build(name: str, *, seed: int = 0, **settings: Any) -> nn.Module:
    """Return a tiny model with random weights, in eval mode.

    Raises:
        ValueError: if it is not tiny with these settings.
    """
    import transformers

    cls = getattr(transformers, name)
    accepted = set(inspect.signature(cls.config_class).parameters) | set(cls.config_class.attribute_map)
    sizes = SIZES | {key: value for key, value in MORE.items() if key in accepted}
    kinds = [*dict.fromkeys(getattr(cls.config_class(), "layer_types", None) or ())]
    if kinds and "layer_types" in inspect.signature(cls.config_class).parameters:
        sizes["layer_types"] = kinds
    sizes |= MODELS.get(name, {}) | settings
    if "layer_types" in sizes:
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    errors = []
    for without, more in VARIANTS:
        try:
            config = cls.config_class(**{key: value for key, value in (sizes | more).items() if key not in without})
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if count > MOST:
                raise ValueError(f"{count:,} parameters")
            torch.manual_seed(seed)
            model = cls(config).eval()
            _randomize(model)
            plain(model, [*range(3, 16)])
            return model
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    raise ValueError(f"{name} does not build tiny: {'; '.join(dict.fromkeys(errors))[:500]}")


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Draw matrices large enough that positions, windows and states have an effect."""
    for name, p in model.named_parameters():
        if p.ndim > 1 and "A_log" not in name:
            p.normal_(0.0, 0.5 / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.3)
        if p.ndim == 2 and "embed" in name:
            p.normal_(0.0, 1.0)


def examples() -> list[TextExample]:
    """Return texts of 3 to 13 tokens with prompts of 1 to 6."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 5), (1, 2), (6, 7))
    return [make_prompt_example(*(torch.randint(3, V, (n,), generator=generator).tolist() for n in s)) for s in sizes]


@torch.no_grad()
def plain(model: nn.Module, ids: list[int]) -> Tensor:
    """Return the logits of one forward of one text, (L, V)."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def kd(model: nn.Module, layout: str) -> float:
    """Return how far the rows of the Hugging Face adapter lie from plain forwards, relative to the largest logit."""
    texts = examples()
    batch = collate(texts, pad=PAD, side=layout) if layout != "packed" else pack(texts, 24)[0]
    task = LanguageModeling()
    task.prepare_model(model)
    with torch.no_grad():
        (rows,) = forward(batch, Unpacked(model), None, task, None).blocks
    parts = []
    for text in texts:
        logits = plain(model, list(text.ids))
        parts += [logits[i - 1] for i, learned in enumerate(text.learn) if learned and i]
    return _difference(rows.student, torch.stack(parts))


def on_policy(model: nn.Module, _: nn.Module) -> float:
    """Return how far the generated tokens lie below the likeliest of plain forwards."""
    batch = next(iter(OnPolicy(model, [collate(examples(), pad=PAD)], generated_fraction=1.0, **_options())))
    gaps = []
    for z, token in _generated(model, batch):
        gaps.append(float((z.max() - z[token]) / z.abs().max()))
    return max(gaps)


def speculative(student: nn.Module, teacher: nn.Module) -> float:
    """Return how far the verified logits lie from plain forwards of the teacher."""
    data = [collate(examples(), pad=PAD)]
    options = _options() | {"resampling": GREEDY, "top_k": 20, "block": 3, "reuse": True}
    batch = next(iter(Speculative(student, teacher, data, **options)))
    return _difference(batch["teacher_outputs"].logits, torch.stack([z for z, _ in _generated(teacher, batch)]))


def _options() -> dict[str, Any]:
    return {"max_new_tokens": 8, "pad": PAD, "sampling": GREEDY, "vocabulary": V}


def _generated(model: nn.Module, batch: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield each generated token with the logits of a plain forward before it."""
    for ids, mask, learn in zip(batch["input_ids"], batch["attention_mask"], batch["learn"], strict=True):
        logits = plain(model, ids[mask != 0].tolist())[:, :V]
        for i in learn.nonzero().flatten().tolist():
            yield logits[i - 1], int(ids[i])


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        raise AssertionError(f"shapes {tuple(got.shape)} and {tuple(expected.shape)}")
    return float((got - expected).abs().max() / expected.abs().max())


def outcome(model: nn.Module, measure: Callable[[], float]) -> str:
    """Return "exact", "rejected", or what went wrong."""
    try:
        difference = measure()
    except (TypeError, ValueError) as error:
        message = str(error)
        named = type(model).__name__ in message and "unexpected keyword" not in message
        return "rejected" if named else f"{type(error).__name__}: {message[:100]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "exact" if difference < EXACT else f"differs by {difference:.2g}"


def outcomes(name: str) -> dict[str, str]:
    """Return the outcome of each column for one model.

    Raises:
        ValueError: if it does not build tiny.
    """
    model, teacher = build(name), build(name, seed=1)
    for each in (model, teacher):
        LanguageModeling().prepare_model(each)
    columns = {
        f"KD, {layout}": outcome(model, lambda at=layout: kd(model, at)) for layout in ("right", "left", "packed")
    }
    for title, run, rejects in (("OnPolicy", on_policy, False), ("Speculative", speculative, True)):
        found = outcome(model, lambda run=run: run(model, teacher))
        columns[title] = f"exact, {causal_strategy(model, rejects=rejects)}" if found == "exact" else found
    return columns


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise KeyboardInterrupt, which no trial catches, in the main thread after this many seconds."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def table(results: dict[str, dict[str, str]], unbuilt: list[str]) -> str:
    """Return the table, one line per combination of outcomes, the most frequent first."""
    import transformers

    groups: dict[tuple[str, ...], list[str]] = {}
    for name, columns in results.items():
        groups.setdefault(tuple(columns.values()), []).append(name.removesuffix("ForCausalLM"))
    titles = list(next(iter(results.values())))
    lines = [f"transformers {transformers.__version__}: {len(results)} causal models."]
    lines += ["", f"| {' | '.join(titles)} | models |", "|" + "---|" * (len(titles) + 1)]
    for values, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        lines.append(f"| {' | '.join(values)} | {', '.join(names)} |")
    if unbuilt:
        short = ", ".join(name.removesuffix("ForCausalLM") for name in unbuilt)
        lines += ["", f"Not tried, since they do not build tiny, or take longer than 30 s: {short}."]
    return "\n".join(lines)


def main(root: Path, names: list[str]) -> int:
    """Try the models; write the table into docs/language.md, or print it for a choice of names."""
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results, unbuilt, start = {}, [], time.perf_counter()
    for name in names or causal_models():
        try:
            getattr(transformers, name)  # an import that is broken off breaks later ones
            start = time.perf_counter()
            with time_limit(30):
                results[name] = outcomes(name)
            found = " | ".join(results[name].values())
        except (Exception, KeyboardInterrupt) as error:
            unbuilt.append(name)
            found = f"{type(error).__name__}: {error}"
        print(f"{time.perf_counter() - start:5.1f} s  {name}: {found}", flush=True)
    if names:
        return 0
    path = root / "docs" / "language.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{table(results, unbuilt)}\n\n{END}{after}", encoding="utf-8", newline="\n")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), sys.argv[2:]))
