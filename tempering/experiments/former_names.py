"""Former names of flags and of words of methods and policies: records and plans written with them stay usable."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

# flag -> its former name, under which the ids of cells are made: a renamed flag is the same cell. (--subset and --views
# were not renamed to --max-train-samples and --second-view: published commands use them.)
FORMER = {
    "text_source": "writes",
    "max_new_tokens": "written",
    "prompt_length": "prompt",
    "generated_fraction": "share",
    "eval_generation": "grade",
    "no_eval_generation": "no_grade",
    "routing_tree": "tree",
    "cuda_graphs": "graphs",
    "canaries_per_count": "each",
    "canary_digits": "digits",
    "privacy_detectors": "private",
    "class_rows": "rows",
    "anchors_per_image": "keep",
    "resize_mode": "fit",
    "train_file": "train",
}
PRESENT = {former: name for name, former in FORMER.items()}
# the same for words of methods and policies
FORMER_WORDS = {"standardized": "standardised", "ablated": "isolated", "non_target": "rest"}
FORMER_WORDS |= {"holdout": "held", "exam_fraction": "exam_share", "virtual_lr": "course_lr"}
FORMER_WORDS |= {"low_energy": "sure", "high_energy": "unsure", "tail_fraction": "share"}
FORMER_WORDS |= {"differentiable": "attached"}
PRESENT_WORDS = {former: word for word, former in FORMER_WORDS.items()}
# `over` had two meanings: the fraction of the run of a policy, and what PKD standardizes over
FORMER_WORDS |= {"run_fraction": "over", "standardize_over": "over"}


def replace_words(text: str, words: Mapping[str, str]) -> str:
    """Replace whole words: ``words`` maps each to its new one."""
    return re.sub(r"\w+", lambda word: words.get(word[0], word[0]), text)


def former_spec(text: str) -> str:
    """Return a method or policy with its former words, under which ids are made."""
    return replace_words(text, FORMER_WORDS)


def present_spec(text: str) -> str:
    """Return a recorded method or policy with its present words."""
    text = re.sub(r"\bover(?=\s*=\s*['\"]?(batch|image)\b)", "standardize_over", replace_words(text, PRESENT_WORDS))
    return re.sub(r"\bover(?=\s*=)", "run_fraction", text)


def present_flags(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """Return a recorded command line with the present names of its flags, its methods and its policies.

    Args:
        argv: flags and values, as ``--name=value`` or ``--name``, ``value``.
        known: the recipe's flags; a flag that is among them keeps its name, also if it is a former one of another.
    """
    out: list[str] = []
    name = ""
    for word in argv:
        if not word.startswith("--"):
            out.append(present_spec(word) if name in ("method", "temperature") else word)
            continue
        flag, equals, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        present = PRESENT.get(name, name)
        if name not in known and present.removeprefix("no_") in known:
            flag = present.replace("_", "-")
        out.append(f"--{flag}{equals}{present_spec(value) if name in ('method', 'temperature') else value}")
    return out
