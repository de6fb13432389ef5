"""The concept tree of a student that routes its classes, such as KDExplainer's: what it says, and two of them compared.

A tree is what ``net.tree()`` returns: for each routed level, shallow to deep, "level", "parents", each child's first
"parent", and the "entropy" of its row; the last level's children are the classes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.audits.base import Finding
from tempering.audits.intervals import average

Tree = list[dict[str, Any]]


def tree_of(net: nn.Module) -> Tree | None:
    """The net's concept tree; None for a net that has none."""
    ask = getattr(net, "tree", None)
    return None if ask is None else ask()


def branches(tree: Tree) -> dict[str, list[int]]:
    """Stage -> the expert there that each class descends from, by first parents; deep to shallow."""
    names = ["stage1", *(level["level"] for level in tree[:-1])]
    at, found = tree[-1]["parent"], {}
    for name, level in zip(reversed(names), reversed([{"parent": None}, *tree[:-1]]), strict=True):
        found[name] = at
        at = at if level["parent"] is None else [level["parent"][expert] for expert in at]
    return found


def compared(explainers: Mapping[str, nn.Module], *, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """What several trainings of one explainer attend to, such as hard labels, label smoothing and KD.

    Args:
        explainers: label -> a trained net with a ``tree()``.
        class_names: one a class; by itself their numbers.

    Returns:
        Plain enough for JSON: "entropy" and "entropy_unannealed", label -> level -> mean in nats of its children's rows
        (at the temperature the net ended with, and at 1, which compares nets that were annealed alike or not); "most",
        level -> the entropy of a child that takes all its parents evenly; "tree" and "branches", label -> stage ->
        expert -> the classes on it; "alike", stage -> "a | b" -> adjusted Rand index of the two groupings.

    Raises:
        ValueError: for no nets, one without a tree, or trees of other sizes.
    """
    trees = {label: tree_of(net) for label, net in explainers.items()}
    if not trees or any(tree is None for tree in trees.values()):
        wrong = [f"{label} ({type(explainers[label]).__name__})" for label, tree in trees.items() if tree is None]
        raise ValueError(f"compared() needs nets with a tree(), such as models.explainer's; got {wrong or 'none'}.")
    known = {label: tree for label, tree in trees.items() if tree is not None}
    if len({tuple((level["parents"], len(level["parent"])) for level in tree) for tree in known.values()}) > 1:
        raise ValueError(f"compared() needs trees of the same sizes; those of {', '.join(known)} differ.")
    first = next(iter(known.values()))
    names = class_names or [str(k) for k in range(len(first[-1]["parent"]))]
    means = {
        key: {label: _means(tree, key) for label, tree in known.items()} for key in ("entropy", "entropy_unannealed")
    }
    on = {label: branches(tree) for label, tree in known.items()}
    pairs = list(itertools.combinations(on, 2))
    return {
        **means,
        "most": {level["level"]: math.log(level["parents"]) for level in first},
        "tree": known,
        "branches": {label: {stage: _groups(of, names) for stage, of in found.items()} for label, found in on.items()},
        "alike": {
            stage: {f"{a} | {b}": adjusted_rand(on[a][stage], on[b][stage]) for a, b in pairs}
            for stage in branches(first)
        },
    }


def adjusted_rand(a: Sequence[int], b: Sequence[int]) -> float:
    """How alike two groupings of the same things are: 1 for the same, about 0 for unrelated ones, may be below.

    Two groupings that leave nothing to chance (all in one group, or each alone, in both) have 1.

    Reference: Hubert and Arabie, "Comparing Partitions", Journal of Classification 1985.
    """

    def pairs(counts: Counter[Any]) -> int:
        return sum(math.comb(n, 2) for n in counts.values())

    both, left, right = pairs(Counter(zip(a, b, strict=True))), pairs(Counter(a)), pairs(Counter(b))
    chance = left * right / max(1, math.comb(len(a), 2))
    most = (left + right) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def findings(tree: Tree, teacher: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> list[Finding]:
    """The student's tree in numbers, and whether its last branches hold what the teacher takes for each other."""
    found = []
    for level in tree:
        entropy, own = (_means([level], key)[level["level"]] for key in ("entropy", "entropy_unannealed"))
        meaning = (
            f"Mean entropy in nats of what {len(level['parent'])} children take of {level['parents']} parents each: 0 "
            f"is one parent alone, {math.log(level['parents']):.3f} all evenly. At temperature 1 it is {own:.3f}, "
            "which the schedule alone does not bring down."
        )
        found.append(Finding(f"routing_entropy_{level['level']}", "student", entropy, meaning, n=len(level["parent"])))
    branch = torch.tensor(tree[-1]["parent"])
    used = len(branch.unique())
    meaning = f"Last experts that any class hears first, of {tree[-1]['parents']}."
    found.append(Finding("experts_used", "student", float(used), meaning, n=len(branch)))
    others = torch.ones_like(teacher).scatter_(1, y.unsqueeze(1), 0.0)
    inside = (branch == branch[y].unsqueeze(1)).to(teacher.dtype) * others
    p = teacher.softmax(-1) * others
    share, chance = (p * inside).sum(-1) / p.sum(-1), inside.sum(-1) / others.sum(-1)
    kept = torch.isfinite(share)
    if used > 1 and kept.any():
        meaning = (
            "Of the probability that the teacher gives to wrong classes, the share on those that hang on the label's "
            f"own last expert. By chance it would be {float(chance[kept].mean()):.3f}, the size of the branches."
        )
        found.append(average("branch_share", "both", share[kept], meaning, share=True))
    return found


def _means(tree: Tree, key: str) -> dict[str, float]:
    return {level["level"]: sum(level[key]) / len(level[key]) for level in tree}


def _groups(of: Sequence[int], names: Sequence[str]) -> dict[str, list[str]]:
    return {str(e): [n for n, at in zip(names, of, strict=True) if at == e] for e in sorted(set(of))}
