"""Write the model card of a student."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FACTS = ("task", "data", "classes", "mean", "std", "tokenizer", "label", "seed", "best_by")
USE = {
    "timm": 'import timm\n\nnet = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
    "transformers": "from transformers import {model}\n\nnet = {model}.from_pretrained(FOLDER)",
    "tempering": "import tempering\n\nnet = tempering.load_student(FOLDER)",
}


def model_card(
    config: Mapping[str, Any],
    *,
    library: str,
    cost: Mapping[str, Any],
    comparison: str | None = None,
    quantized: Mapping[str, Any] | None = None,
) -> str:
    """Return the card as markdown with a YAML header.

    Args:
        config: of the student.
        library: whose format the folder has: "timm", "transformers" or "tempering".
        cost: what student and teacher cost, as in the result of facts.json.
        comparison: the table of a comparison that the run is part of, as markdown.
        quantized: what ``compare_quantized`` returns.
    """
    teacher = (config.get("teacher") or {}).get("name")
    name = (config.get("student") or {}).get("name", "student")
    network = config.get("network") or {}
    lines = ["---", f"library_name: {library}", "tags:", "- knowledge-distillation", "- tempering", "---", ""]
    lines += [f"# {name}{f', distilled from {teacher}' if teacher else ''}", ""]
    lines += ["```python", USE[library].format(model=network.get("class", "AutoModel")), "```", ""]
    shown = {key: config.get(key) for key in FACTS if config.get(key) is not None}
    method = dict(config.get("method") or {})
    lines += [f"- {key.replace('_', ' ')}: {_text(value)}" for key, value in shown.items()]
    lines += [f"- method: {method.pop('name', 'none')} {json.dumps(method) if method else ''}".rstrip()]
    lines += [f"- inputs, without the batch: {json.dumps(config.get('inputs'))}", "", "## Scores", ""]
    lines += [*_scores(config.get("scores") or {}), ""]
    if cost:
        lines += [
            "## Cost",
            "",
            *cost_table(cost),
            "",
            "FLOPs and latency are of one sample on the machine of the run.",
        ]
        lines += [""]
    if comparison:
        lines += ["## Comparison", "", comparison.strip(), ""]
    if quantized:
        lines += [f"## {quantized['to']}", "", *quantized_table(quantized), ""]
    return "\n".join(lines)


def cost_table(cost: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a markdown table of what each model costs."""
    rows = [
        (who, *(_number(one.get(key)) for key in ("parameters", "flops", "bytes", "latency_ms")))
        for who in ("student", "teacher")
        if (one := cost.get(who))
    ]
    return _table(("", "parameters", "FLOPs", "bytes of weights", "latency (ms)"), rows)


def _scores(scores: Mapping[str, Any]) -> list[str]:
    rows = [
        (f"{which}, epoch {evaluation.get('epoch')}", split, metric, f"{value:.4f}")
        for which, evaluation in scores.items()
        for split, metrics in (evaluation or {}).items()
        if isinstance(metrics, Mapping)
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
    return _table(("weights", "split", "metric", "value"), rows) if rows else ["This run was not scored."]


def quantized_table(quantized: Mapping[str, Any]) -> list[str]:
    """Return what ``compare_quantized`` found as markdown."""

    def rows() -> Iterator[tuple[str, ...]]:
        for which in ("before", "after"):
            one = quantized[which]
            scores = ", ".join(f"{name} {value:.4f}" for name, value in one["scores"].items())
            yield which, scores, _number(one["bytes"]), _number(one["latency_ms"])

    share = f"{100 * quantized['weights']:.3g} % of the parameters, those of linear layers, are {quantized['to']}."
    return [share, "", *_table(("", "scores", "bytes of weights", "latency (ms)"), list(rows()))]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _text(value: Any) -> str:
    return (
        ", ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in value) if isinstance(value, list) else value
    )
