"""Schema of the parts of a record that reports use; checked once, when it is read."""

from __future__ import annotations

from typing import Any

# an object: its members, "*" for any, "!" after required ones; [shape]: a list; float: a number
SCORES = {"test": {}, "validation": {}}
BIN = {"low!": float, "count!": float, "confidence": float, "accuracy": float}
DOT = {"count!": float, "confidence!": float, "accuracy!": float}
FINDING = {"name!": str, "of!": str, "meaning!": str, "value": float, "low": float, "high": float, "n": int}
PAIR = {"true!": int, "predicted!": int, "student!": float, "teacher!": float}
LEVEL = {"level!": str, "parents!": int, "parent!": [int], "attention!": [[float]], "entropy!": [float]}
PART = {"loss!": float, "T_student!": float, "T_teacher!": float}
DRAWN = {
    "tree": [LEVEL],
    "class_names": [str],
    "temperatures": {"policy!": str, "by_difficulty": [PART]},
    "reliability": {"temperature": {"*": float}, "plain": {"*": [DOT]}, "tempered": {"*": [DOT]}},
}
EXAMPLE = {"kl!": float, "classes": [[]], "png": str, "width": float, "height": float, "text": str, "prompt": str}
EXAMPLE |= {"tokens": [[]], "at": int, "label": int, "likeliest": [[]]}
PICTURE = {"jpeg!": str, "width!": float, "height!": float, "boxes!": {"*": [[float]]}}
RECORD = {
    "facts": {
        "result": {"last": SCORES, "best": SCORES},
        "student": {"name": str},
        "teacher": {"identity": str},
        "optimizer": [],
        "columns": [str],
    },
    "epochs": [SCORES],
    "steps": [{"terms": {}, "policy": {}}],
    "analysis": {
        "accuracy": {},
        "ece": {},
        "class_names": [],
        "reliability": {"*": [BIN]},
        "per_class": {"*": [float]},
        "confusions": [PAIR],
        "temperatures": {"by_difficulty": [{}]},
        "examples": [EXAMPLE],
        "teacher_scores": {"*": float},
        "detection": {"map": {}, "map_by_class": {"*": [float]}, "pictures": [PICTURE]},
    },
    "audits": {"audits!": {"*": {"findings!": [FINDING], "drawn": DRAWN}}},
}
NAMES = {dict: "an object", list: "a list", float: "a number", int: "a whole number", str: "a text"}


def misfit(value: Any, shape: Any = RECORD, where: str = "") -> str | None:
    """Return a message on the first mismatch of ``value`` with the shape, else None. Optional parts may be null."""
    kind = shape if isinstance(shape, type) else type(shape)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        return f"{where} must be {NAMES[kind]}; got {value!r:.60}"
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, dict):
        for name, inner in shape.items():
            key, needed = name.rstrip("!"), name.endswith("!")
            for member in value if key == "*" else [key]:
                if needed or value.get(member) is not None:
                    parts.append((value.get(member), inner, f"{where}.{member}".lstrip(".")))
    elif isinstance(shape, list) and shape:
        parts = [(inner, shape[0], f"{where}[{i}]") for i, inner in enumerate(value)]
        parts = [part for part in parts if part[0] is not None or not isinstance(shape[0], type)]
    return next((problem for part in parts if (problem := misfit(*part)) is not None), None)
